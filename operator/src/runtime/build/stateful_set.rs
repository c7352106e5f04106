//! The workers.

use forebay_api::object_name;
use k8s_openapi::{
    api::{
        apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy},
        core::v1::{PodSpec, PodTemplateSpec, Toleration, TopologySpreadConstraint},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};

use super::{container, service_account, volume};
use crate::{args::WorkerArgs, labels, pods, runtime::validate::ValidRuntime};

pub fn build(runtime: &ValidRuntime, workers: &WorkerArgs) -> StatefulSet {
    let owner = &runtime.owner;
    // Ours win: they are what selects the pods.
    let mut labels: std::collections::BTreeMap<String, String> =
        runtime.metadata.labels.iter().map(|(key, value)| (key.clone(), value.0.clone())).collect();
    labels.extend(labels::of_runtime(&owner.name));
    let annotations = Some(runtime.metadata.annotations.clone()).filter(|annotations| !annotations.is_empty());
    StatefulSet {
        metadata: owner.runtime_meta(),
        spec: Some(StatefulSetSpec {
            service_name: Some(object_name(&owner.name)),
            replicas: Some(runtime.replicas),
            // Workers do not wait for each other; nor does a new spec wait for pods of an old one that cannot start.
            pod_management_policy: Some("Parallel".into()),
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: None,
            }),
            revision_history_limit: Some(2),
            selector: selector(runtime),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(labels), annotations, ..ObjectMeta::default() }),
                spec: Some(pod(runtime, workers)),
            },
            ..StatefulSetSpec::default()
        }),
        status: None,
    }
}

fn selector(runtime: &ValidRuntime) -> LabelSelector {
    LabelSelector { match_labels: Some(labels::worker_selector(&runtime.owner.name)), match_expressions: None }
}

fn pod(runtime: &ValidRuntime, workers: &WorkerArgs) -> PodSpec {
    let pieces = &runtime.pieces;
    let node_selector = pieces.node_selector.iter().map(|(key, value)| (key.clone(), value.0.clone())).collect();
    let class = pieces.priority_class_name.clone().unwrap_or_else(|| workers.priority_class.clone());
    let tolerations: Vec<Toleration> = pieces.tolerations.iter().map(toleration).collect();
    PodSpec {
        service_account_name: Some(service_account::name(runtime)),
        automount_service_account_token: Some(true),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(container::grace_seconds(runtime)),
        node_selector: Some(node_selector).filter(|labels: &std::collections::BTreeMap<_, _>| !labels.is_empty()),
        tolerations: Some(tolerations).filter(|tolerations| !tolerations.is_empty()),
        affinity: pieces.affinity.clone(),
        priority_class_name: Some(class).filter(|class| !class.is_empty()),
        image_pull_secrets: pods::pull_secrets(workers),
        security_context: Some(pods::restricted_pod()),
        topology_spread_constraints: Some(vec![TopologySpreadConstraint {
            max_skew: 1,
            topology_key: "kubernetes.io/hostname".into(),
            when_unsatisfiable: "ScheduleAnyway".into(),
            label_selector: Some(selector(runtime)),
            ..TopologySpreadConstraint::default()
        }]),
        init_containers: container::take_over(runtime, workers).map(|container| vec![container]),
        containers: vec![container::worker(runtime, workers)],
        volumes: Some(volume::all(runtime)),
        ..PodSpec::default()
    }
}

fn toleration(toleration: &forebay_api::Toleration) -> Toleration {
    let forebay_api::Toleration { key, operator, value, effect, toleration_seconds } = toleration;
    Toleration {
        key: key.clone(),
        operator: operator.map(|operator| format!("{operator:?}")),
        value: value.clone(),
        effect: effect.map(|effect| format!("{effect:?}")),
        toleration_seconds: *toleration_seconds,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    fn built(runtime: &ValidRuntime) -> Value {
        serde_json::to_value(build(runtime, &testing::workers())).unwrap()
    }

    #[test]
    fn the_set_is_the_runtimes_own_and_selects_its_pods() {
        let set = built(&testing::runtime(ValidVolume::EmptyDir));
        assert_eq!(set["metadata"]["name"], "gpu-pool-forebay");
        assert_eq!(set["metadata"]["ownerReferences"][0]["uid"], "u-1");
        let spec = &set["spec"];
        assert_eq!((&spec["replicas"], &spec["podManagementPolicy"]), (&json!(3), &json!("Parallel")));
        assert_eq!(spec["serviceName"], "gpu-pool-forebay");
        let labels = &spec["template"]["metadata"]["labels"];
        for (key, value) in spec["selector"]["matchLabels"].as_object().unwrap() {
            assert_eq!(&labels[key], value);
        }
    }

    #[test]
    fn pods_meet_the_restricted_standard() {
        let pod = built(&testing::runtime(ValidVolume::EmptyDir))["spec"]["template"]["spec"].clone();
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert!(pod["initContainers"].is_null() && pod["hostNetwork"].is_null() && pod["hostPID"].is_null());
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["capabilities"], json!({"drop": ["ALL"]}));
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert!(pod["volumes"].as_array().unwrap().iter().all(|volume| volume["hostPath"].is_null()));
    }

    #[test]
    fn what_the_user_adds_is_there_and_ours_wins() {
        let mut runtime = testing::runtime(ValidVolume::EmptyDir);
        runtime.metadata = serde_json::from_value(json!({
            "labels": {"team": "vision", "forebay.io/runtime": "another"}, "annotations": {"a": "b"},
        }))
        .unwrap();
        runtime.pieces = serde_json::from_value(json!({
            "nodeSelector": {"pool": "cache"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}],
            "affinity": {"podAntiAffinity": {}},
            "serviceAccountName": "s3-reader",
            "priorityClassName": "high",
        }))
        .unwrap();
        let template = built(&runtime)["spec"]["template"].clone();
        let labels = &template["metadata"]["labels"];
        assert_eq!((&labels["team"], &labels["forebay.io/runtime"]), (&json!("vision"), &json!("gpu-pool")));
        assert_eq!(template["metadata"]["annotations"], json!({"a": "b"}));
        let pod = &template["spec"];
        assert_eq!(pod["nodeSelector"], json!({"pool": "cache"}));
        assert_eq!(
            pod["tolerations"],
            json!([{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}])
        );
        assert_eq!(pod["affinity"], json!({"podAntiAffinity": {}}));
        assert_eq!((&pod["serviceAccountName"], &pod["priorityClassName"]), (&json!("s3-reader"), &json!("high")));
        // Without it, what the operator was given.
        let plain = built(&testing::runtime(ValidVolume::EmptyDir));
        assert_eq!(plain["spec"]["template"]["spec"]["priorityClassName"], "forebay-worker");
        assert_eq!(plain["spec"]["template"]["spec"]["imagePullSecrets"], json!([{"name": "regcred"}]));
    }
}
