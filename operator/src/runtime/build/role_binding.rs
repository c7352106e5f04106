//! What the workers may: see the Datasets and CacheRuntimes of their namespace, and read the Secrets in it that Datasets
//! name.

use k8s_openapi::api::rbac::v1::{RoleBinding, RoleRef, Subject};

use super::service_account;
use crate::runtime::validate::ValidRuntime;

/// The chart's ClusterRole, which the operator may bind.
const ROLE: &str = "forebay-worker";

pub fn build(runtime: &ValidRuntime) -> RoleBinding {
    RoleBinding {
        metadata: runtime.owner.runtime_meta(),
        role_ref: RoleRef {
            api_group: "rbac.authorization.k8s.io".into(),
            kind: "ClusterRole".into(),
            name: ROLE.into(),
        },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".into(),
            name: service_account::name(runtime),
            namespace: Some(runtime.owner.namespace.clone()),
            api_group: None,
        }]),
    }
}
