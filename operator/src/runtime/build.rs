//! A valid CacheRuntime to the objects that it consists of. Pure; one file a kind.

mod budget;
mod container;
mod network_policy;
mod role_binding;
mod secret;
mod service;
mod service_account;
mod stateful_set;
mod volume;

use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::RoleBinding,
};

use super::validate::ValidRuntime;
use crate::{args::WorkerArgs, key::Master};

/// What a CacheRuntime consists of, in the order in which it is applied.
pub struct Objects {
    /// Only created: nobody here reads Secrets.
    pub secret: Secret,
    pub service: Service,
    /// None when the user names one.
    pub service_account: Option<ServiceAccount>,
    pub role_binding: RoleBinding,
    pub policy: NetworkPolicy,
    pub budget: PodDisruptionBudget,
    pub stateful_set: StatefulSet,
}

/// The objects of a CacheRuntime.
pub fn build(runtime: &ValidRuntime, workers: &WorkerArgs, master: &Master) -> Objects {
    Objects {
        secret: secret::build(runtime, master),
        service: service::build(runtime),
        service_account: service_account::build(runtime),
        role_binding: role_binding::build(runtime),
        policy: network_policy::build(runtime),
        budget: budget::build(runtime),
        stateful_set: stateful_set::build(runtime, workers),
    }
}

#[cfg(test)]
pub(super) mod testing {
    use forebay_api::{Medium, PodMetadata, PodPieces};

    use super::*;
    use crate::{
        labels::Owner,
        runtime::validate::{ValidTier, ValidVolume},
    };

    pub(crate) fn runtime(volume: ValidVolume) -> ValidRuntime {
        ValidRuntime {
            owner: Owner { namespace: "vision".into(), name: "gpu-pool".into(), uid: "u-1".into() },
            replicas: 3,
            tier: ValidTier { medium: Medium::Ssd, capacity: 1 << 40, volume, high_percent: 95, low_percent: 85 },
            metadata: PodMetadata::default(),
            pieces: PodPieces::default(),
        }
    }

    pub(crate) fn workers() -> WorkerArgs {
        WorkerArgs {
            image: "forebay:1".into(),
            image_pull_policy: "IfNotPresent".into(),
            image_pull_secrets: vec!["regcred".into()],
            priority_class: "forebay-worker".into(),
            log: "info".into(),
        }
    }
}
