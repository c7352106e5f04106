//! The volume behind the claim: what the node plugin is told.

use forebay_api::{object_name, service_address};
use k8s_openapi::{
    api::core::v1::{
        CSIPersistentVolumeSource, ObjectReference, PersistentVolume, PersistentVolumeSpec, SecretReference,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};

use crate::{dataset::validate::ValidDataset, labels, numbers::quantity};

/// Name of the CSI driver.
const DRIVER: &str = "csi.forebay.io";

/// `claim` is the UID of the claim that it belongs to: no other claim of that name gets it.
pub fn build(dataset: &ValidDataset, claim: &str) -> PersistentVolume {
    let owner = &dataset.owner;
    let key = SecretReference { name: Some(object_name(&dataset.runtime)), namespace: Some(owner.namespace.clone()) };
    let attributes = [
        ("dataset", owner.uid.clone()),
        ("name", format!("{}/{}", owner.namespace, owner.name)),
        ("service", service_address(&owner.namespace, &dataset.runtime)),
    ];
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(dataset.volume_name()),
            labels: Some(labels::of_dataset(&owner.name)),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            capacity: Some([("storage".to_owned(), Quantity(quantity(dataset.capacity)))].into()),
            access_modes: Some(vec!["ReadOnlyMany".into()]),
            storage_class_name: Some(String::new()),
            volume_mode: Some("Filesystem".into()),
            // It goes when the Dataset goes, by our hand.
            persistent_volume_reclaim_policy: Some("Retain".into()),
            claim_ref: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("PersistentVolumeClaim".into()),
                namespace: Some(owner.namespace.clone()),
                name: Some(owner.name.clone()),
                uid: Some(claim.to_owned()),
                ..ObjectReference::default()
            }),
            csi: Some(CSIPersistentVolumeSource {
                driver: DRIVER.into(),
                volume_handle: owner.uid.clone(),
                read_only: Some(true),
                volume_attributes: Some(attributes.map(|(key, value)| (key.to_owned(), value)).into()),
                node_stage_secret_ref: Some(key.clone()),
                node_publish_secret_ref: Some(key),
                ..CSIPersistentVolumeSource::default()
            }),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::dataset::testing::dataset;

    #[test]
    fn the_volume_tells_the_node_all_it_needs() {
        let volume = serde_json::to_value(build(&dataset(), "u-3")).unwrap();
        assert_eq!(volume["metadata"]["name"], "forebay-u-2");
        let spec = &volume["spec"];
        assert_eq!(spec["claimRef"]["uid"], "u-3");
        assert_eq!(spec["persistentVolumeReclaimPolicy"], "Retain");
        assert_eq!(spec["capacity"]["storage"], "144431130Ki");
        let secret = json!({"name": "gpu-pool-forebay", "namespace": "vision"});
        assert_eq!(
            spec["csi"],
            json!({
                "driver": "csi.forebay.io",
                "volumeHandle": "u-2",
                "readOnly": true,
                "volumeAttributes": {
                    "dataset": "u-2",
                    "name": "vision/imagenet",
                    "service": "gpu-pool-forebay.vision.svc:7400",
                },
                "nodeStageSecretRef": secret,
                "nodePublishSecretRef": secret,
            })
        );
    }
}
