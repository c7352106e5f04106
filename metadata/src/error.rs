//! Errors, by what the caller can do.

use std::path::PathBuf;

use forebay_under_store::StoreError;

/// Why metadata is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// The directory, or the name in it, does not exist: the caller forgets it.
    #[error("no such file or directory")]
    NotFound,
    /// The source does not answer, or answers with errors: try again later.
    #[error("the source is unavailable: {0}")]
    Unavailable(String),
    /// The source refuses the credentials: somebody must change them.
    #[error("the source denies permission: {0}")]
    PermissionDenied(String),
    /// No answer within the deadline; the listing goes on: try again.
    #[error("the listing did not get there within the deadline")]
    Deadline,
    /// The dataset is no longer served here: ask another worker.
    #[error("the dataset is no longer served here")]
    Closed,
    /// The index itself failed (disk full, i/o error) or met a defect: somebody must look.
    #[error("metadata index: {0}")]
    Internal(String),
}

impl MetadataError {
    /// What a failed request to a source means to somebody who asks for metadata.
    pub(crate) fn from_store(error: &StoreError) -> Self {
        match error {
            StoreError::NotFound(_) => Self::NotFound,
            StoreError::PermissionDenied(message) => Self::PermissionDenied(message.clone()),
            StoreError::Unavailable(message) | StoreError::VersionMismatch(message) => {
                Self::Unavailable(message.clone())
            }
            StoreError::Invalid(message) => Self::Internal(format!("request to the source: {message}")),
        }
    }
}

/// Why an index does not open. A damaged file is no reason: it is set aside and rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("{} is open in another process", .0.display())]
    InUse(PathBuf),
    /// The directory or the file cannot be read, written or created.
    #[error("{}: {message}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
}

/// Why a step in the database failed; internal, becomes [`MetadataError::Internal`] where it cannot be repaired.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    /// The file is damaged: it is set aside and rebuilt.
    #[error("damaged: {0}")]
    Damaged(String),
    /// One record is damaged: its directory is forgotten and listed again.
    #[error("damaged record of directory {0}")]
    Record(u64),
    /// The system failed; nothing was changed.
    #[error("{0}")]
    Failed(String),
}

impl From<IndexError> for MetadataError {
    fn from(error: IndexError) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<redb::StorageError> for IndexError {
    fn from(error: redb::StorageError) -> Self {
        match error {
            redb::StorageError::Corrupted(message) => Self::Damaged(message),
            redb::StorageError::Io(error)
                if matches!(error.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) =>
            {
                Self::Damaged(error.to_string())
            }
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<redb::TransactionError> for IndexError {
    fn from(error: redb::TransactionError) -> Self {
        match error {
            redb::TransactionError::Storage(error) => error.into(),
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<redb::TableError> for IndexError {
    fn from(error: redb::TableError) -> Self {
        match error {
            redb::TableError::Storage(error) => error.into(),
            // The tables are opened with one type each, so another type is somebody else's file.
            other => Self::Damaged(other.to_string()),
        }
    }
}

impl From<redb::CommitError> for IndexError {
    fn from(error: redb::CommitError) -> Self {
        match error {
            redb::CommitError::Storage(error) => error.into(),
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<redb::SetDurabilityError> for IndexError {
    fn from(error: redb::SetDurabilityError) -> Self {
        Self::Failed(error.to_string())
    }
}
