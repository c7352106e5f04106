//! A spec that can be built from. What a Dataset's claim and volume are made of, the API server has checked.

use forebay_api::Dataset;

use crate::labels::Owner;

/// Size of a volume whose Dataset has not been counted, and least size of any: nobody reserves it anywhere.
const NOMINAL: u64 = 1 << 30;

/// A Dataset of which everything is known that its objects are built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidDataset {
    pub owner: Owner,
    /// Name of its CacheRuntime.
    pub runtime: String,
    /// Bytes that its volume is said to have.
    pub capacity: u64,
}

impl ValidDataset {
    pub fn volume_name(&self) -> String {
        volume_name(&self.owner.uid)
    }
}

/// Name of the volume of a Dataset: volumes have no namespace.
pub fn volume_name(uid: &str) -> String {
    format!("forebay-{uid}")
}

pub fn validate(dataset: &Dataset, owner: Owner) -> ValidDataset {
    let bytes = dataset.status.as_ref().and_then(|status| status.bytes);
    ValidDataset {
        owner,
        runtime: dataset.spec.runtime_ref.name.clone(),
        capacity: bytes.unwrap_or_default().clamp(NOMINAL, i64::MAX as u64),
    }
}
