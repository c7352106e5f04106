//! A spec that can be built from.

use forebay_api::{CacheRuntime, Medium, PodMetadata, PodPieces, PodTemplate, QuantityError};

use crate::labels::Owner;

/// A CacheRuntime of which everything is known that its objects are built from.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRuntime {
    pub owner: Owner,
    pub replicas: i32,
    pub tier: ValidTier,
    /// Labels and annotations of the pods.
    pub metadata: PodMetadata,
    /// The rest that the user adds to them.
    pub pieces: PodPieces,
}

/// Where each worker keeps bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidTier {
    /// What the volume is on.
    pub medium: Medium,
    /// Bytes.
    pub capacity: u64,
    pub volume: ValidVolume,
    pub high_percent: u8,
    pub low_percent: u8,
}

/// What the tier is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValidVolume {
    /// Directory of the node.
    HostPath(String),
    EmptyDir,
}

/// What the API server lets through and nobody can build.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    #[error("spec.tiers is empty")]
    NoTier,
    #[error("spec.tiers[0].capacity {0}: {remedy}", remedy = .0.remedy())]
    Capacity(QuantityError),
    #[error("spec.tiers[0].volume has none of hostPath and emptyDir")]
    NoVolume,
    #[error("spec.replicas is too large")]
    Replicas,
}

/// The spec of a CacheRuntime, checked.
pub fn validate(runtime: &CacheRuntime, owner: Owner) -> Result<ValidRuntime, Invalid> {
    let tier = runtime.spec.tiers.first().ok_or(Invalid::NoTier)?;
    let volume = match (&tier.volume.host_path, &tier.volume.empty_dir) {
        (Some(volume), _) => ValidVolume::HostPath(volume.path.clone()),
        (None, Some(_)) => ValidVolume::EmptyDir,
        (None, None) => return Err(Invalid::NoVolume),
    };
    let PodTemplate { metadata, spec: pieces } = runtime.spec.template.clone().unwrap_or_default();
    Ok(ValidRuntime {
        owner,
        metadata: metadata.unwrap_or_default(),
        pieces: pieces.unwrap_or_default(),
        replicas: i32::try_from(runtime.spec.replicas).map_err(|_| Invalid::Replicas)?,
        tier: ValidTier {
            medium: tier.medium,
            capacity: tier.capacity.bytes().map_err(Invalid::Capacity)?,
            volume,
            high_percent: tier.watermarks.high_percent,
            low_percent: tier.watermarks.low_percent,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judge(tier: serde_json::Value) -> Result<ValidRuntime, String> {
        let runtime = json!({"metadata": {"name": "a"}, "spec": {"replicas": 2, "tiers": [tier]}});
        let runtime: CacheRuntime = serde_json::from_value(runtime).unwrap();
        let owner = Owner { namespace: "n".into(), name: "a".into(), uid: "u".into() };
        validate(&runtime, owner).map_err(|invalid| invalid.to_string())
    }

    #[test]
    fn a_spec_becomes_what_is_built_from() {
        let tier = json!({"name": "t", "medium": "SSD", "capacity": "1.5Gi", "volume": {"hostPath": {"path": "/mnt"}}});
        let valid = judge(tier).unwrap();
        assert_eq!((valid.replicas, valid.tier.capacity), (2, 3 << 29));
        assert_eq!(valid.tier.volume, ValidVolume::HostPath("/mnt".into()));
        assert_eq!((valid.tier.high_percent, valid.tier.low_percent), (95, 85));
    }

    #[test]
    fn what_no_schema_can_say_is_refused_with_the_field() {
        for capacity in ["1.1Ki", "9Ei"] {
            let tier = json!({"name": "t", "medium": "SSD", "capacity": capacity, "volume": {"emptyDir": {}}});
            let why = judge(tier).unwrap_err();
            assert!(why.starts_with("spec.tiers[0].capacity is "), "{why}");
        }
    }
}
