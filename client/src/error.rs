//! What a caller of this crate can do about a failure.

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The directory or the name does not exist.
    #[error("not found")]
    NotFound,
    /// The path names something that is no directory.
    #[error("not a directory")]
    NotDirectory,
    /// The source no longer has the version that is read: look the name up again.
    #[error("the source no longer has this version")]
    VersionGone,
    /// The source refuses the credentials: mend them.
    #[error("permission denied: {0}")]
    PermissionDenied(String),
    /// Nobody could answer in time: try again later.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// The call makes no sense; a defect of the caller.
    #[error("invalid: {0}")]
    Invalid(String),
}
