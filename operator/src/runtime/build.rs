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

#[cfg(test)]
mod tests {
    use forebay_api::{CacheRuntime, edits::EDITS};
    use serde_json::{Value, json};

    use super::*;
    use crate::{labels::Owner, runtime::validate};

    /// What a spec is built into, as far as an edit can change it.
    fn built(spec: &Value) -> Vec<Value> {
        let runtime: CacheRuntime = serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": spec})).unwrap();
        let owner = Owner { namespace: "n".into(), name: "a".into(), uid: "u".into() };
        let valid = validate::validate(&runtime, owner).unwrap();
        let master = Master::of([0; 32]);
        let Objects { secret, service, service_account, role_binding, policy, budget, stateful_set } =
            build(&valid, &testing::workers(), &master);
        vec![
            json!(secret),
            json!(service),
            json!(service_account),
            json!(role_binding),
            json!(policy),
            json!(budget),
            json!(stateful_set),
        ]
    }

    /// Another value for each field of the table.
    fn edit(spec: &mut Value, field: &str) {
        let tier = &mut spec["tiers"][0];
        match field {
            "spec.replicas" => spec["replicas"] = json!(5),
            "spec.tiers[].medium" => tier["medium"] = json!("HDD"),
            "spec.tiers[].capacity" => tier["capacity"] = json!("2Gi"),
            "spec.tiers[].volume.emptyDir" => tier["volume"] = json!({"emptyDir": {}}),
            "spec.tiers[].volume.hostPath.path" => tier["volume"]["hostPath"]["path"] = json!("/other"),
            "spec.tiers[].watermarks.highPercent" => tier["watermarks"] = json!({"highPercent": 99}),
            "spec.tiers[].watermarks.lowPercent" => tier["watermarks"] = json!({"lowPercent": 11}),
            "spec.template.metadata.labels" => spec["template"]["metadata"]["labels"] = json!({"a": "b"}),
            "spec.template.metadata.annotations" => spec["template"]["metadata"]["annotations"] = json!({"a": "b"}),
            "spec.template.spec.nodeSelector" => spec["template"]["spec"]["nodeSelector"] = json!({"a": "b"}),
            "spec.template.spec.tolerations" => {
                spec["template"]["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
            }
            "spec.template.spec.affinity" => spec["template"]["spec"]["affinity"] = json!({"podAffinity": {}}),
            "spec.template.spec.resources.requests" => {
                spec["template"]["spec"]["resources"] = json!({"requests": {"cpu": "3"}});
            }
            "spec.template.spec.resources.limits" => {
                spec["template"]["spec"]["resources"] = json!({"limits": {"cpu": "3"}});
            }
            "spec.template.spec.serviceAccountName" => spec["template"]["spec"]["serviceAccountName"] = json!("b"),
            "spec.template.spec.priorityClassName" => spec["template"]["spec"]["priorityClassName"] = json!("b"),
            other => panic!("no edit for {other}"),
        }
    }

    #[test]
    fn each_edit_of_the_table_changes_what_is_built_and_can_be_applied() {
        let before = json!({"replicas": 3, "tiers": [
            {"name": "t", "medium": "SSD", "capacity": "1Gi", "volume": {"hostPath": {"path": "/mnt"}}},
        ]});
        let edits = EDITS.iter().filter(|edit| edit.kind == "CacheRuntime" && edit.effect.is_some());
        for row in edits {
            let mut spec = before.clone();
            edit(&mut spec, row.field);
            let (old, new) = (built(&before), built(&spec));
            assert_ne!(old, new, "{}", row.field);
            let (old, new) = (&old[6]["spec"], &new[6]["spec"]);
            for immutable in ["serviceName", "selector", "podManagementPolicy", "volumeClaimTemplates"] {
                assert_eq!(old[immutable], new[immutable], "{}", row.field);
            }
        }
    }
}
