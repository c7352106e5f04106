//! Pieces that all pods share that are made here: as whom they run, and the key by which workers know them.

use std::collections::BTreeMap;

use forebay_api::object_name;
use k8s_openapi::{
    api::core::v1::{
        Capabilities, EnvVar, EnvVarSource, LocalObjectReference, ObjectFieldSelector, PodSecurityContext,
        SeccompProfile, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
    },
    apimachinery::pkg::api::resource::Quantity,
};

use crate::args::WorkerArgs;

/// User and group of what runs in them.
pub const USER: i64 = 10001;
/// Where the key of the CacheRuntime is.
pub const KEY: &str = "/etc/forebay/key";

/// What the Pod Security Standard `restricted` wants of a pod.
pub fn restricted_pod() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

/// What the Pod Security Standard `restricted` wants of a container.
pub fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
        ..SecurityContext::default()
    }
}

/// The Secret with the key of a CacheRuntime.
pub fn key_volume(runtime: &str) -> Volume {
    Volume {
        name: "key".into(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(object_name(runtime)),
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Where it is mounted.
pub fn key_mount() -> VolumeMount {
    VolumeMount { read_only: Some(true), name: "key".into(), mount_path: KEY.into(), ..VolumeMount::default() }
}

/// Who pulls the image.
pub fn pull_secrets(workers: &WorkerArgs) -> Option<Vec<LocalObjectReference>> {
    let secrets: Vec<LocalObjectReference> =
        workers.image_pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() }).collect();
    Some(secrets).filter(|secrets| !secrets.is_empty())
}

/// A variable that holds a field of the pod.
pub fn of_pod(name: &str, field: &str) -> EnvVar {
    EnvVar {
        name: name.into(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: field.into(), api_version: None }),
            ..EnvVarSource::default()
        }),
    }
}

/// Amounts of resources by name.
pub fn amounts<const N: usize>(pairs: [(&str, &str); N]) -> Option<BTreeMap<String, Quantity>> {
    Some(pairs.into_iter().map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned()))).collect())
}
