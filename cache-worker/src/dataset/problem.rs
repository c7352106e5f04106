//! What is wrong with a source, as people, the operator and `kubectl` see it.

use forebay_under_store::StoreError;
use serde::{Deserialize, Serialize};

/// Why a source cannot be used although it is configured: told by whoever writes the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceProblem {
    /// In CamelCase, such as `SecretNotFound`.
    pub reason: String,
    /// For people; without credentials.
    pub message: String,
}

/// The reason of what a store says of itself.
pub(crate) fn reason(error: &StoreError) -> &'static str {
    match error {
        StoreError::PermissionDenied(_) => "CredentialsInvalid",
        StoreError::NotFound(_) => "BucketNotFound",
        // A changed object is no problem of a store; were it one, it would pass.
        StoreError::Unavailable(_) | StoreError::VersionMismatch(_) => "SourceUnreachable",
        StoreError::Invalid(_) => "SourceInvalid",
    }
}
