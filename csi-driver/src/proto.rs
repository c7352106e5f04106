//! The generated messages and services.
//!
//! Requests that carry secrets have a `Debug` of our own, which shows the names of the secrets and nothing of what they
//! are.

/// Generated from `proto/csi.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Generated from `proto/pluginregistration.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

use std::{collections::HashMap, fmt};

/// Names only.
struct Redacted<'a>(&'a HashMap<String, String>);

impl fmt::Debug for Redacted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.keys().map(|name| (name, format_args!("..")))).finish()
    }
}

impl fmt::Debug for csi::NodeStageVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { volume_id, staging_target_path, volume_capability, secrets, volume_context } = self;
        f.debug_struct("NodeStageVolumeRequest")
            .field("volume_id", volume_id)
            .field("staging_target_path", staging_target_path)
            .field("volume_capability", volume_capability)
            .field("secrets", &Redacted(secrets))
            .field("volume_context", volume_context)
            .finish()
    }
}

impl fmt::Debug for csi::NodePublishVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { volume_id, staging_target_path, target_path, volume_capability, readonly, secrets, volume_context } =
            self;
        f.debug_struct("NodePublishVolumeRequest")
            .field("volume_id", volume_id)
            .field("staging_target_path", staging_target_path)
            .field("target_path", target_path)
            .field("volume_capability", volume_capability)
            .field("readonly", readonly)
            .field("secrets", &Redacted(secrets))
            .field("volume_context", volume_context)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let secrets = HashMap::from([("key".to_owned(), "hunter2".to_owned())]);
        let stage =
            csi::NodeStageVolumeRequest { volume_id: "seen".into(), secrets: secrets.clone(), ..Default::default() };
        let publish = csi::NodePublishVolumeRequest { volume_id: "seen".into(), secrets, ..Default::default() };
        for text in [format!("{stage:?}"), format!("{publish:#?}")] {
            assert!(text.contains("seen") && text.contains("key"), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}
