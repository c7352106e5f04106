//! The containers of a worker's pod.

use std::collections::BTreeMap;

use forebay_api::{Medium, WORKER_HTTP_PORT, WORKER_PORT};
use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, ContainerPort, EnvVar, HTTPGetAction, Probe, ResourceRequirements, SecurityContext,
    },
    apimachinery::pkg::{api::resource::Quantity, util::intstr::IntOrString},
};

use super::volume::{self, CACHE, STATE};
use crate::{
    args::WorkerArgs,
    numbers::quantity,
    pods::{KEY, USER, of_pod, restricted},
    runtime::validate::{ValidRuntime, ValidVolume},
};

/// How long a worker that is to go serves on, and the longest that its end takes then.
const DRAIN_SECONDS: (i64, i64) = (10, 30);
/// How long opening a cache may take: after an unclean end, the index of a full disk is read and compared with it.
const OPEN_SECONDS: i32 = 120;
/// How much longer anything that walks a disk takes on one that rotates.
const HDD_FACTOR: i32 = 5;

/// How much longer what walks the tier's disk may take than on flash.
fn slowness(runtime: &ValidRuntime) -> i32 {
    match runtime.tier.medium {
        Medium::Ssd => 1,
        Medium::Hdd => HDD_FACTOR,
    }
}

/// From SIGTERM to SIGKILL.
pub fn grace_seconds(runtime: &ValidRuntime) -> i64 {
    DRAIN_SECONDS.0 + DRAIN_SECONDS.1 * i64::from(slowness(runtime))
}

/// The worker itself.
pub fn worker(runtime: &ValidRuntime, workers: &WorkerArgs) -> Container {
    let tier = &runtime.tier;
    let args = [
        "worker",
        "--kubernetes",
        "--name=$(POD_NAME)",
        "--namespace=$(POD_NAMESPACE)",
        &format!("--runtime={}", runtime.owner.name),
        &format!("--listen=0.0.0.0:{WORKER_PORT}"),
        &format!("--http=0.0.0.0:{WORKER_HTTP_PORT}"),
        &format!("--cache-dir={CACHE}"),
        &format!("--capacity={}", tier.capacity),
        &format!("--high-percent={}", tier.high_percent),
        &format!("--low-percent={}", tier.low_percent),
        &format!("--key-file={KEY}/key"),
        &format!("--state-dir={STATE}"),
        &format!("--drain={}", DRAIN_SECONDS.0),
    ];
    let port = |name: &str, port: u16| ContainerPort {
        name: Some(name.into()),
        container_port: port.into(),
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    };
    Container {
        name: "worker".into(),
        image: Some(workers.image.clone()),
        image_pull_policy: Some(workers.image_pull_policy.clone()),
        args: Some(args.map(str::to_owned).into()),
        env: Some(vec![
            of_pod("POD_NAME", "metadata.name"),
            of_pod("POD_NAMESPACE", "metadata.namespace"),
            EnvVar { name: "FOREBAY_LOG".into(), value: Some(workers.log.clone()), value_from: None },
        ]),
        ports: Some(vec![port("data", WORKER_PORT), port("http", WORKER_HTTP_PORT)]),
        startup_probe: Some(probe("/healthz", 1, OPEN_SECONDS * slowness(runtime))),
        liveness_probe: Some(probe("/healthz", 10, 3)),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        resources: Some(resources(runtime)),
        security_context: Some(restricted()),
        volume_mounts: Some(volume::mounts(runtime)),
        ..Container::default()
    }
}

/// Gives the worker its directory on the node, which the kubelet makes as root.
pub fn take_over(runtime: &ValidRuntime, workers: &WorkerArgs) -> Option<Container> {
    let ValidVolume::HostPath(_) = runtime.tier.volume else { return None };
    Some(Container {
        name: "own-cache".into(),
        image: Some(workers.image.clone()),
        image_pull_policy: Some(workers.image_pull_policy.clone()),
        command: Some(["chown", &format!("{USER}:{USER}"), CACHE].map(str::to_owned).into()),
        env: Some(vec![of_pod("POD_NAME", "metadata.name")]),
        security_context: Some(SecurityContext {
            run_as_non_root: Some(false),
            run_as_user: Some(0),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: Some(vec!["CHOWN".into()]) }),
            ..restricted()
        }),
        volume_mounts: Some(vec![volume::cache_mount(runtime)]),
        ..Container::default()
    })
}

/// What a worker asks for and may use; the user's items take the place of ours.
fn resources(runtime: &ValidRuntime) -> ResourceRequirements {
    let mut requests = BTreeMap::from([("cpu", "100m".to_owned()), ("memory", "256Mi".to_owned())]);
    if runtime.tier.volume == ValidVolume::EmptyDir {
        // A node that cannot hold the tier is not chosen.
        requests.insert("ephemeral-storage", quantity(runtime.tier.capacity));
    }
    let limits = BTreeMap::from([("memory", "1Gi".to_owned())]);
    let user = runtime.pieces.resources.clone().unwrap_or_default();
    let merged = |ours: BTreeMap<&str, String>, user: BTreeMap<String, forebay_api::Amount>| {
        let ours = ours.into_iter().map(|(name, amount)| (name.to_owned(), Quantity(amount)));
        Some(ours.chain(user.into_iter().map(|(name, amount)| (name, Quantity(amount.0)))).collect())
    };
    ResourceRequirements {
        requests: merged(requests, user.requests),
        limits: merged(limits, user.limits),
        claims: None,
    }
}

fn probe(path: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::String("http".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::runtime::build::testing;

    fn built(runtime: &ValidRuntime) -> Value {
        serde_json::to_value(worker(runtime, &testing::workers())).unwrap()
    }

    #[test]
    fn the_worker_is_told_its_tier() {
        let container = built(&testing::runtime(ValidVolume::EmptyDir));
        let args: Vec<&str> = container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
        for expected in ["--runtime=gpu-pool", "--capacity=1099511627776", "--high-percent=95", "--low-percent=85"] {
            assert!(args.contains(&expected), "{expected} in {args:?}");
        }
        assert_eq!(container["image"], "forebay:1");
    }

    #[test]
    fn a_rotating_disk_gets_more_time() {
        let mut runtime = testing::runtime(ValidVolume::EmptyDir);
        let (grace, probe) = (grace_seconds(&runtime), built(&runtime)["startupProbe"]["failureThreshold"].clone());
        runtime.tier.medium = Medium::Hdd;
        assert!(grace_seconds(&runtime) > grace);
        assert!(built(&runtime)["startupProbe"]["failureThreshold"].as_i64() > probe.as_i64());
    }

    #[test]
    fn resources_are_replaced_item_by_item() {
        let mut runtime = testing::runtime(ValidVolume::EmptyDir);
        runtime.pieces.resources =
            Some(serde_json::from_value(json!({"requests": {"cpu": 2}, "limits": {"memory": "4Gi"}})).unwrap());
        assert_eq!(
            built(&runtime)["resources"],
            json!({
                "requests": {"cpu": "2", "memory": "256Mi", "ephemeral-storage": "1Ti"},
                "limits": {"memory": "4Gi"},
            })
        );
        runtime.tier.volume = ValidVolume::HostPath("/mnt".into());
        assert!(built(&runtime)["resources"]["requests"]["ephemeral-storage"].is_null());
    }

    #[test]
    fn only_a_directory_of_the_node_needs_root_for_a_moment() {
        let workers = testing::workers();
        assert!(take_over(&testing::runtime(ValidVolume::EmptyDir), &workers).is_none());
        let runtime = testing::runtime(ValidVolume::HostPath("/mnt".into()));
        let container = serde_json::to_value(take_over(&runtime, &workers).unwrap()).unwrap();
        assert_eq!(container["command"], json!(["chown", "10001:10001", CACHE]));
        assert_eq!(container["securityContext"]["capabilities"], json!({"drop": ["ALL"], "add": ["CHOWN"]}));
    }
}
