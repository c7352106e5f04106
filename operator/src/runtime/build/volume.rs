//! What workers have mounted: their cache, what they keep for their next start, the runtime's key.

use k8s_openapi::{
    api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Volume, VolumeMount},
    apimachinery::pkg::api::resource::Quantity,
};

use crate::{
    numbers::quantity,
    pods,
    runtime::validate::{ValidRuntime, ValidVolume},
};

/// Where a worker keeps bytes.
pub const CACHE: &str = "/var/lib/forebay/cache";
/// Where it keeps what the API server said, for its next start.
pub const STATE: &str = "/run/forebay";
/// Room for what the API server said: 16 MiB a file, written beside the old one.
const STATE_SIZE: u64 = 64 << 20;

/// The volumes of a pod.
pub fn all(runtime: &ValidRuntime) -> Vec<Volume> {
    let owner = &runtime.owner;
    let cache = match &runtime.tier.volume {
        ValidVolume::HostPath(path) => Volume {
            host_path: Some(HostPathVolumeSource {
                path: format!("{path}/{}.{}", owner.namespace, owner.name),
                type_: Some("DirectoryOrCreate".into()),
            }),
            ..Volume::default()
        },
        ValidVolume::EmptyDir => Volume {
            empty_dir: Some(EmptyDirVolumeSource {
                size_limit: Some(Quantity(quantity(size_limit(runtime.tier.capacity)))),
                medium: None,
            }),
            ..Volume::default()
        },
    };
    vec![
        Volume { name: "cache".into(), ..cache },
        Volume {
            name: "state".into(),
            // Credentials of sources are in it: never on a disk.
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".into()),
                size_limit: Some(Quantity(quantity(STATE_SIZE))),
            }),
            ..Volume::default()
        },
        pods::key_volume(&owner.name),
    ]
}

/// Above this the kubelet evicts the pod: the capacity, and room for the metadata and indexes that are beside it.
fn size_limit(capacity: u64) -> u64 {
    capacity.saturating_add(capacity / 16).saturating_add(256 << 20).min(i64::MAX as u64)
}

/// Where they are mounted in the worker.
pub fn mounts(runtime: &ValidRuntime) -> Vec<VolumeMount> {
    let mount =
        |name: &str, path: &str| VolumeMount { name: name.into(), mount_path: path.into(), ..VolumeMount::default() };
    vec![cache_mount(runtime), mount("state", STATE), pods::key_mount()]
}

/// A node's directory is shared by the runtime's workers on that node: each has one of its own below it.
pub fn cache_mount(runtime: &ValidRuntime) -> VolumeMount {
    VolumeMount {
        name: "cache".into(),
        mount_path: CACHE.into(),
        sub_path_expr: match runtime.tier.volume {
            ValidVolume::HostPath(_) => Some("$(POD_NAME)".into()),
            ValidVolume::EmptyDir => None,
        },
        ..VolumeMount::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::runtime::build::testing;

    #[test]
    fn an_empty_directory_is_limited_above_the_capacity() {
        let volumes = serde_json::to_value(all(&testing::runtime(ValidVolume::EmptyDir))).unwrap();
        assert_eq!(volumes[0]["emptyDir"]["sizeLimit"], "1114368Mi");
        assert_eq!(volumes[1]["emptyDir"]["medium"], "Memory");
        assert_eq!(volumes[2]["secret"]["secretName"], "gpu-pool-forebay");
        assert_eq!(size_limit(i64::MAX as u64), i64::MAX as u64);
    }

    #[test]
    fn a_directory_of_the_node_is_divided_by_runtime_and_worker() {
        let runtime = testing::runtime(ValidVolume::HostPath("/mnt/nvme0".into()));
        let volumes = serde_json::to_value(all(&runtime)).unwrap();
        assert_eq!(volumes[0]["hostPath"], json!({"path": "/mnt/nvme0/vision.gpu-pool", "type": "DirectoryOrCreate"}));
        assert_eq!(mounts(&runtime)[0].sub_path_expr.as_deref(), Some("$(POD_NAME)"));
    }
}
