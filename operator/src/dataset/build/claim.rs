//! The claim that pods mount. It names its volume, so that it binds to no other.

use forebay_api::Dataset;
use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements},
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};

use crate::{dataset::validate::ValidDataset, labels};

/// What it asks for can never change, while the Dataset grows and shrinks: any volume is enough.
const REQUEST: &str = "1";

pub fn build(dataset: &ValidDataset) -> PersistentVolumeClaim {
    let owner = &dataset.owner;
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(owner.name.clone()),
            namespace: Some(owner.namespace.clone()),
            labels: Some(labels::of_dataset(&owner.name)),
            owner_references: Some(vec![owner.reference::<Dataset>()]),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadOnlyMany".into()]),
            // Empty, not absent: the cluster's default class is not meant.
            storage_class_name: Some(String::new()),
            volume_name: Some(dataset.volume_name()),
            volume_mode: Some("Filesystem".into()),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), Quantity(REQUEST.into()))].into()),
                limits: None,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::testing::dataset;

    #[test]
    fn the_claim_has_the_name_of_the_dataset_and_binds_to_its_volume_only() {
        let claim = serde_json::to_value(build(&dataset())).unwrap();
        assert_eq!(claim["metadata"]["name"], "imagenet");
        assert_eq!(claim["metadata"]["namespace"], "vision");
        assert_eq!(claim["metadata"]["ownerReferences"][0]["kind"], "Dataset");
        assert_eq!(claim["metadata"]["ownerReferences"][0]["uid"], "u-2");
        assert_eq!(claim["spec"]["volumeName"], "forebay-u-2");
        assert_eq!(claim["spec"]["storageClassName"], "");
        assert_eq!(claim["spec"]["accessModes"], serde_json::json!(["ReadOnlyMany"]));
    }
}
