//! Why a volume operation was not done, and the one place that decides its gRPC code.

use forebay_keeper::KeeperError;
use forebay_protocol::errors::chain;
use tonic::Status;

/// Named for what the caller can do. The texts go to whoever called, and from there into a pod's events: they name no
/// secret.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The request can never be done: correct it.
    #[error("{0}")]
    Invalid(String),
    /// There is no such volume at that place.
    #[error("{0}")]
    NotFound(String),
    /// The volume is there already, for another use: undo that one first.
    #[error("{0}")]
    Incompatible(String),
    /// Something else has to be done first.
    #[error("{0}")]
    Precondition(String),
    /// Another call for the volume is under way: repeat it later.
    #[error("another operation on volume '{0}' is under way")]
    Pending(String),
    /// It would be right a little later.
    #[error("{0}")]
    Unavailable(String),
    /// It took too long. It may still be done.
    #[error("{0}")]
    Timeout(String),
    /// The operating system refused.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The keeper of the mounts refused.
    #[error("{}", chain(.0))]
    Keeper(#[from] KeeperError),
}

/// For a failed system call.
pub fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> VolumeError {
    let what = what.into();
    move |source| VolumeError::System { what, source }
}

impl From<VolumeError> for Status {
    fn from(error: VolumeError) -> Self {
        let text = error.to_string();
        match error {
            VolumeError::Invalid(_) => Self::invalid_argument(text),
            VolumeError::NotFound(_) => Self::not_found(text),
            VolumeError::Incompatible(_) => Self::already_exists(text),
            VolumeError::Precondition(_) => Self::failed_precondition(text),
            VolumeError::Pending(_) => Self::aborted(text),
            VolumeError::Unavailable(_) => Self::unavailable(text),
            VolumeError::Timeout(_) => Self::deadline_exceeded(text),
            // The next process takes the call.
            VolumeError::Keeper(KeeperError::Leaving | KeeperError::Ended) => Self::unavailable(text),
            VolumeError::System { .. } | VolumeError::Keeper(_) => Self::internal(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_keeper::MountError;
    use tonic::Code;

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let source = std::io::Error::from_raw_os_error(1);
        let error = VolumeError::Keeper(MountError::System { what: "cannot open /dev/fuse".into(), source }.into());
        let status = Status::from(error);
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(status.message(), "cannot open /dev/fuse: Operation not permitted (os error 1)");
    }
}
