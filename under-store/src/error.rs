//! Errors of the under store, by what the caller can do.

/// Why a store did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No such object, directory or bucket: the caller forgets it.
    #[error("not found: {0}")]
    NotFound(String),
    /// The object is no longer the version that was asked for: the caller looks it up again.
    #[error("changed at the source: {0}")]
    VersionMismatch(String),
    /// The credentials are refused: somebody must change them.
    #[error("permission denied: {0}")]
    PermissionDenied(String),
    /// The store does not answer, or answers with errors, beyond the retries: try again later.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// The request itself is wrong (a bad URI, a range beyond the object): a defect or a bad manifest.
    #[error("invalid request: {0}")]
    Invalid(String),
}
