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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    #[test]
    fn the_workers_own_account_or_the_users_gets_the_role() {
        let mut runtime = testing::runtime(ValidVolume::EmptyDir);
        let subject = |runtime: &ValidRuntime| build(runtime).subjects.unwrap().remove(0).name;
        assert_eq!(subject(&runtime), "gpu-pool-forebay");
        runtime.pieces.service_account_name = Some("s3-reader".into());
        assert_eq!(subject(&runtime), "s3-reader");
        assert_eq!(build(&runtime).role_ref.name, "forebay-worker");
    }
}
