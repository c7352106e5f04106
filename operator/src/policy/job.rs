//! The Job of a run. Pure.

use forebay_api::{
    Apply, ConfigMapRef, Limits, LoadOrder, PreloadPolicy, PreloadPolicySpec, RunTrigger, Select, rules,
    service_address,
};
use forebay_preload::{asked, due::Past};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{
            ConfigMapVolumeSource, Container, EnvVar, KeyToPath, PodSpec, PodTemplateSpec, ResourceRequirements,
            Volume, VolumeMount,
        },
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};
use sha2::{Digest as _, Sha256};

use crate::{
    args::WorkerArgs,
    labels::{self, Owner},
    pods,
};

/// Longest beginning of a policy's name in that of a Job, of which pods make names and labels of 63 characters.
const MAX_PREFIX: usize = 43;
/// Annotation with what started the run.
const TRIGGER: &str = "forebay.io/trigger";
/// Where the ConfigMap with a manifest is mounted, and the name of its key there.
const MANIFEST: &str = "/etc/forebay/manifest";
const LINES: &str = "lines";
/// How long the pod may take to end. It keeps nothing.
const GRACE_SECONDS: i64 = 5;

/// A run that is to start.
pub struct Start<'a> {
    pub owner: &'a Owner,
    pub spec: &'a PreloadPolicySpec,
    /// UID of the Dataset.
    pub dataset: &'a str,
    /// Name of its CacheRuntime.
    pub runtime: &'a str,
    pub trigger: RunTrigger,
    /// What has happened once it has started.
    pub past: &'a Past,
    /// UID of the Job of the run before it.
    pub before: Option<&'a str>,
    pub now: Timestamp,
}

impl Start<'_> {
    /// The same for the same run, however often it is tried: of two operators one makes the Job.
    fn name(&self) -> String {
        let Past { since: _, schedule, dataset, request, revision } = self.past;
        let (uid, before) = (&self.owner.uid, self.before);
        let cause = format!("{uid}\0{before:?}\0{schedule:?}\0{dataset:?}\0{request:?}\0{revision:?}");
        let hash: String = Sha256::digest(cause).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let name = &self.owner.name;
        format!("{}-{hash}", name.get(..MAX_PREFIX).unwrap_or(name).trim_end_matches('-'))
    }
}

/// The Job of a run.
pub fn build(start: &Start<'_>, workers: &WorkerArgs) -> Job {
    let Start { owner, spec, .. } = start;
    let seconds = |duration: &str| rules::seconds(duration).unwrap_or_default();
    let labels = labels::of_policy(&owner.name);
    Job {
        metadata: ObjectMeta {
            name: Some(start.name()),
            namespace: Some(owner.namespace.clone()),
            labels: Some(labels.clone()),
            annotations: Some([(TRIGGER.to_owned(), format!("{:?}", start.trigger))].into()),
            owner_references: Some(vec![owner.reference::<PreloadPolicy>()]),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            backoff_limit: i32::try_from(spec.backoff_limit).ok(),
            // None at all is no deadline: the API server takes 1 or more.
            active_deadline_seconds: spec.deadline.as_deref().and_then(|d| i64::try_from(seconds(d).max(1)).ok()),
            ttl_seconds_after_finished: i32::try_from(seconds(&spec.ttl_after_finished)).ok(),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
                spec: Some(PodSpec {
                    restart_policy: Some("Never".into()),
                    automount_service_account_token: Some(false),
                    enable_service_links: Some(false),
                    termination_grace_period_seconds: Some(GRACE_SECONDS),
                    image_pull_secrets: pods::pull_secrets(workers),
                    security_context: Some(pods::restricted_pod()),
                    containers: vec![container(start, workers)],
                    volumes: Some([pods::key_volume(start.runtime)].into_iter().chain(manifest_volume(spec)).collect()),
                    ..PodSpec::default()
                }),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// The ConfigMap with the manifest, if the run has one.
fn manifest_volume(spec: &PreloadPolicySpec) -> Option<Volume> {
    let ConfigMapRef { name, key } = spec.select.manifest.as_ref()?.config_map_ref.clone()?;
    let item = KeyToPath { key, path: LINES.into(), mode: None };
    Some(Volume {
        name: "manifest".into(),
        config_map: Some(ConfigMapVolumeSource { name, items: Some(vec![item]), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    })
}

fn manifest_mount(spec: &PreloadPolicySpec) -> Option<VolumeMount> {
    manifest_volume(spec).map(|volume| VolumeMount {
        read_only: Some(true),
        name: volume.name,
        mount_path: MANIFEST.into(),
        ..VolumeMount::default()
    })
}

fn container(start: &Start<'_>, workers: &WorkerArgs) -> Container {
    let Select { path, include, exclude, min_size, max_size, min_age, max_age, manifest } = &start.spec.select;
    let Limits { bandwidth, requests_per_second } = &start.spec.limits;
    let modified = |age: &Option<String>| asked::modified(start.now, age.as_deref()?);
    // Kubernetes replaces $(VARIABLE) in arguments.
    let plain = |text: &str| text.replace('$', "$$");
    let mut args = vec![
        "preload".to_owned(),
        format!("--service={}", service_address(&start.owner.namespace, start.runtime)),
        format!("--key-file={}/key", pods::KEY),
        format!("--dataset={}", start.dataset),
        "--run=$(JOB_UID)".to_owned(),
        format!("--path={}", plain(path)),
    ];
    args.extend(include.iter().map(|glob| format!("--include={}", plain(glob))));
    args.extend(exclude.iter().map(|glob| format!("--exclude={}", plain(glob))));
    args.extend(min_size.iter().map(|size| format!("--min-size={}", size.as_str())));
    args.extend(max_size.iter().map(|size| format!("--max-size={}", size.as_str())));
    args.extend(modified(max_age).map(|time| format!("--modified-after={time}")));
    args.extend(modified(min_age).map(|time| format!("--modified-before={time}")));
    let manifest = manifest.clone().unwrap_or_default();
    args.extend(manifest.path.iter().map(|path| format!("--manifest={}", plain(path))));
    args.extend(manifest.config_map_ref.iter().map(|_| format!("--manifest-file={MANIFEST}/{LINES}")));
    args.extend((start.spec.load.pin == Apply::Always).then(|| "--pin".to_owned()));
    args.extend((start.spec.load.verify == Apply::Always).then(|| "--verify".to_owned()));
    let order = match start.spec.order {
        None | Some(LoadOrder::Manifest) => None,
        Some(LoadOrder::Name) => Some("--order=name".to_owned()),
        Some(LoadOrder::Size) => Some("--order=size".to_owned()),
    };
    args.extend(order);
    args.extend((start.spec.priority != 0).then(|| format!("--priority={}", start.spec.priority)));
    args.extend(start.spec.load.replicas.iter().map(|count| format!("--replicas={count}")));
    args.extend(bandwidth.iter().map(|bytes| format!("--bandwidth={}", bytes.as_str())));
    args.extend(requests_per_second.iter().map(|count| format!("--requests-per-second={count}")));
    Container {
        name: "preload".into(),
        image: Some(workers.image.clone()),
        image_pull_policy: Some(workers.image_pull_policy.clone()),
        args: Some(args),
        env: Some(vec![
            pods::of_pod("JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
            EnvVar { name: "FOREBAY_LOG".into(), value: Some(workers.log.clone()), value_from: None },
        ]),
        resources: Some(ResourceRequirements {
            requests: pods::amounts([("cpu", "20m"), ("memory", "32Mi")]),
            limits: pods::amounts([("memory", "128Mi")]),
            claims: None,
        }),
        security_context: Some(pods::restricted()),
        volume_mounts: Some([pods::key_mount()].into_iter().chain(manifest_mount(start.spec)).collect()),
        ..Container::default()
    }
}

#[cfg(test)]
mod tests {
    use forebay_api::edits::EDITS;
    use serde_json::{Value, json};

    use super::*;

    fn built(name: &str, spec: Value, request: &str) -> Value {
        let spec: PreloadPolicySpec = serde_json::from_value(spec).unwrap();
        let owner = Owner { namespace: "vision".into(), name: name.into(), uid: "u-1".into() };
        let past = Past { request: Some(request.to_owned()), ..Past::default() };
        let trigger = RunTrigger::Request;
        let start = Start {
            owner: &owner,
            spec: &spec,
            dataset: "d-1",
            runtime: "gpu-pool",
            trigger,
            past: &past,
            before: None,
            now: Timestamp::from_second(100_000).unwrap(),
        };
        let workers = WorkerArgs { image: "forebay:1".into(), ..WorkerArgs::default() };
        serde_json::to_value(build(&start, &workers)).unwrap()
    }

    #[test]
    fn the_pod_is_told_what_to_load_and_nothing_more() {
        let job = built(
            "before-work",
            json!({
                "datasetRef": {"name": "imagenet"},
                "select": {"path": "/train", "include": ["**/$(HOME) x:y.jpg"], "maxSize": "1Gi", "maxAge": "1h"},
                "load": {"pin": "Always"},
                "limits": {"bandwidth": "5Mi", "requestsPerSecond": 40},
                "deadline": "2h",
                "backoffLimit": 5,
                "ttlAfterFinished": "30m",
            }),
            "1",
        );
        let spec = &job["spec"];
        assert_eq!((&spec["activeDeadlineSeconds"], &spec["ttlSecondsAfterFinished"]), (&json!(7200), &json!(1800)));
        assert_eq!(spec["backoffLimit"], 5);
        let pod = &spec["template"]["spec"];
        assert_eq!(pod["automountServiceAccountToken"], false);
        let args = &pod["containers"][0]["args"];
        for expected in [
            "--service=gpu-pool-forebay.vision.svc:7400",
            "--dataset=d-1",
            "--run=$(JOB_UID)",
            "--path=/train",
            "--include=**/$$(HOME) x:y.jpg",
            "--max-size=1Gi",
            "--modified-after=1970-01-02T02:46:40Z",
            "--pin",
            "--bandwidth=5Mi",
            "--requests-per-second=40",
        ] {
            assert!(args.as_array().unwrap().contains(&json!(expected)), "{expected} in {args}");
        }
    }

    /// The edits of the table that take effect with the next run.
    #[test]
    fn each_edit_of_what_a_run_does_changes_its_job() {
        let spec = || json!({"datasetRef": {"name": "d"}, "deadline": "1h"});
        let before = built("a", spec(), "1");
        let manifest = |name: &str, key: &str| json!({"manifest": {"configMapRef": {"name": name, "key": key}}});
        let rows = EDITS.iter().filter(|edit| edit.kind == "PreloadPolicy");
        let rows = rows.filter(|edit| edit.effect.is_some_and(|effect| effect.starts_with("The next run")));
        let mut count = 0;
        for row in rows {
            let mut edited = spec();
            match row.field {
                "spec.select.path" => edited["select"] = json!({"path": "/b"}),
                "spec.select.include" => edited["select"] = json!({"include": ["b"]}),
                "spec.select.exclude" => edited["select"] = json!({"exclude": ["b"]}),
                "spec.select.minSize" => edited["select"] = json!({"minSize": "1Ki"}),
                "spec.select.maxSize" => edited["select"] = json!({"maxSize": "1Ki"}),
                "spec.select.minAge" => edited["select"] = json!({"minAge": "1h"}),
                "spec.select.maxAge" => edited["select"] = json!({"maxAge": "1h"}),
                "spec.select.manifest.path" => edited["select"] = json!({"manifest": {"path": "/list"}}),
                "spec.select.manifest.configMapRef.name" => edited["select"] = manifest("lists", "a"),
                "spec.select.manifest.configMapRef.key" => {
                    let run = |key: &str| {
                        let spec = json!({"datasetRef": {"name": "d"}, "select": manifest("lists", key)});
                        built("a", spec, "1")
                    };
                    assert_ne!(run("a"), run("b"));
                    edited["select"] = manifest("lists", "b");
                }
                "spec.order" => edited["order"] = json!("Size"),
                "spec.priority" => edited["priority"] = json!(-7),
                "spec.load.pin" => edited["load"] = json!({"pin": "Always"}),
                "spec.load.verify" => edited["load"] = json!({"verify": "Always"}),
                "spec.load.replicas" => edited["load"] = json!({"replicas": 2}),
                "spec.limits.bandwidth" => edited["limits"] = json!({"bandwidth": "1Mi"}),
                "spec.limits.requestsPerSecond" => edited["limits"] = json!({"requestsPerSecond": 5}),
                "spec.deadline" => edited["deadline"] = json!("2h"),
                "spec.backoffLimit" => edited["backoffLimit"] = json!(7),
                "spec.ttlAfterFinished" => edited["ttlAfterFinished"] = json!("2h"),
                other => panic!("no edit for {other}"),
            }
            assert_ne!(built("a", edited, "1"), before, "{}", row.field);
            count += 1;
        }
        assert_eq!(count, 20);
    }

    #[test]
    fn a_run_has_one_name_of_its_own() {
        let name = |name: &str, request: &str| {
            built(name, json!({"datasetRef": {"name": "d"}}), request)["metadata"]["name"].as_str().unwrap().to_owned()
        };
        assert_eq!(name("a", "1"), name("a", "1"));
        assert_ne!(name("a", "1"), name("a", "2"));
        let long = name(&"a".repeat(63), "1");
        assert!(long.len() <= 52 && rules::is_label(&long), "{long}");
    }
}
