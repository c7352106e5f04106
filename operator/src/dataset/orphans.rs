//! Volumes whose Dataset went without its finalizer: somebody removed it by force.

use std::collections::HashSet;

use k8s_openapi::api::core::v1::PersistentVolume;
use kube::{Api, core::PartialObjectMeta};
use tracing::{info, warn};

use super::validate::volume_name;
use crate::{apply::delete, context::Context};

/// Deletes them once they are bound no more: the garbage collector takes their claims.
pub async fn remove(context: &Context) {
    let datasets = context.stores.datasets.state();
    let kept: HashSet<String> =
        datasets.iter().filter_map(|dataset| dataset.metadata.uid.as_deref()).map(volume_name).collect();
    let orphans = context.stores.volumes.state_filter(|volume| {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        volume.status.phase != "Bound" && !kept.contains(name)
    });
    let api: Api<PartialObjectMeta<PersistentVolume>> = Api::all(context.client.clone());
    for volume in orphans {
        let name = volume.metadata.name.as_deref();
        match delete(&api, &volume.metadata).await {
            Ok(true) => info!(name, "deleted a volume whose Dataset is gone"),
            Ok(false) => {}
            Err(error) => warn!(name, %error, "a volume whose Dataset is gone could not be deleted"),
        }
    }
}
