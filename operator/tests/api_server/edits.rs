//! What each edit does, row by row of the table in docs/api.md: seen in what the operator applies and in what the agent of
//! a worker writes, and gone again when the edit is taken back.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use forebay_api::edits::EDITS;
use forebay_worker_agent::{AgentOptions, DATASETS};
use serde_json::{Value, json};

use crate::cluster::{Cluster, DATASET, Kind, ROLE_BINDING, RUNTIME, SECRET, STATEFUL_SET};

/// How long an edit may take to have its effect.
const DEADLINE: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "edits";

/// A field of the table and another value for it.
struct Row {
    field: &'static str,
    /// Where in the spec it is, as a JSON pointer.
    at: &'static str,
    value: Value,
    effect: Effect,
}

enum Effect {
    /// The value is there afterwards, or in the list that is there: place, JSON pointer, value.
    Seen(Vec<(Place, &'static str, Value)>),
    /// The API server names the field and says why.
    Refused(&'static str, &'static str),
}

#[derive(Clone, Copy)]
enum Place {
    /// The object of this kind that is made for the CacheRuntime.
    Made(Kind),
    /// What the worker is told to serve.
    Told,
}

/// An object that is edited.
struct Edited<'a> {
    cluster: &'a Cluster,
    kind: Kind,
    name: &'static str,
    /// Name of what is made for it.
    made: &'static str,
    state_dir: PathBuf,
    spec: Value,
}

const SET: Place = Place::Made(STATEFUL_SET);

fn seen(field: &'static str, at: &'static str, value: Value, place: Place, pointer: &'static str, is: Value) -> Row {
    Row { field, at, value, effect: Effect::Seen(vec![(place, pointer, is)]) }
}

/// A value that is where it is put.
fn passed(field: &'static str, at: &'static str, value: Value, place: Place, pointer: &'static str) -> Row {
    seen(field, at, value.clone(), place, pointer, value)
}

fn refused(field: &'static str, at: &'static str, value: Value, names: &'static str, why: &'static str) -> Row {
    Row { field, at, value, effect: Effect::Refused(names, why) }
}

/// `value` with `new` at a JSON pointer, whose last members need not be there.
fn with(mut value: Value, pointer: &str, new: &Value) -> Value {
    let mut target = &mut value;
    for name in pointer.split('/').skip(1) {
        target = match target {
            Value::Array(items) => &mut items[name.parse::<usize>().unwrap()],
            object => &mut object[name],
        };
    }
    *target = new.clone();
    value
}

impl Edited<'_> {
    async fn respec(&self, spec: &Value) -> Result<(), String> {
        self.cluster.respec(self.kind, NAMESPACE, self.name, spec).await
    }

    async fn holds(&self, (place, pointer, expected): &(Place, &str, Value)) -> bool {
        let object = match place {
            Place::Made(kind) => self.cluster.get(*kind, NAMESPACE, self.made).await,
            Place::Told => {
                let file = std::fs::read(self.state_dir.join(DATASETS)).ok();
                file.map(|file| serde_json::from_slice(&file).unwrap())
            }
        };
        match object.unwrap_or_default().pointer(pointer) {
            Some(Value::Array(items)) if !expected.is_array() => items.contains(expected),
            there => there == Some(expected),
        }
    }

    async fn wait(&self, row: &Row, effects: &[(Place, &str, Value)], there: bool) {
        let began = Instant::now();
        for effect in effects {
            while self.holds(effect).await != there {
                let (_, pointer, expected) = effect;
                assert!(began.elapsed() < DEADLINE, "{}: {pointer} is {expected}: not {there}", row.field);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    async fn check(&self, row: &Row) {
        let edited = with(self.spec.clone(), row.at, &row.value);
        match &row.effect {
            Effect::Refused(names, why) => {
                let said = self.respec(&edited).await.unwrap_err();
                assert!(said.contains(&format!("{names}: ")) && said.contains(why), "{}: {said}", row.field);
            }
            Effect::Seen(effects) => {
                self.wait(row, effects, false).await;
                self.respec(&edited).await.unwrap();
                self.wait(row, effects, true).await;
                self.respec(&self.spec).await.unwrap();
                self.wait(row, effects, false).await;
            }
        }
    }

    /// Checks all rows, which are those of the table.
    async fn check_all(&self, rows: &[Row]) {
        let table = EDITS.iter().filter(|edit| edit.kind == self.kind.1);
        let fields: Vec<&str> = table.map(|edit| edit.field).collect();
        assert_eq!(rows.iter().map(|row| row.field).collect::<Vec<_>>(), fields);
        for row in rows {
            self.check(row).await;
        }
    }
}

pub(crate) async fn of_each_field_of_a_runtime(cluster: &Cluster) {
    cluster.namespace(NAMESPACE).await;
    let volume = json!({"hostPath": {"path": "/mnt"}});
    let tier = json!({"name": "t", "medium": "SSD", "capacity": "1Gi", "volume": volume});
    let spec = json!({"replicas": 2, "tiers": [tier]});
    cluster.create(RUNTIME, NAMESPACE, json!({"metadata": {"name": "pool"}, "spec": spec})).await;
    cluster.wait(STATEFUL_SET, NAMESPACE, "pool-forebay", |_| true).await;
    let pool = Edited { cluster, kind: RUNTIME, name: "pool", made: "pool-forebay", state_dir: PathBuf::new(), spec };

    let args = "/spec/template/spec/containers/0/args";
    let toleration = json!({"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5});
    let term = json!({"topologyKey": "zone", "labelSelector": {"matchLabels": {"a": "b"}}});
    let affinity = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}});
    pool.check_all(&[
        passed("spec.replicas", "/replicas", json!(5), SET, "/spec/replicas"),
        refused("spec.tiers[].name", "/tiers/0/name", json!("other"), "spec.tiers", "names of tiers cannot be changed"),
        // Ten seconds to drain, and five times the 30 that flash has.
        seen(
            "spec.tiers[].medium",
            "/tiers/0/medium",
            json!("HDD"),
            SET,
            "/spec/template/spec/terminationGracePeriodSeconds",
            json!(160),
        ),
        seen("spec.tiers[].capacity", "/tiers/0/capacity", json!("2Gi"), SET, args, json!("--capacity=2147483648")),
        // The capacity, a sixteenth of it, and 256Mi.
        seen(
            "spec.tiers[].volume.emptyDir",
            "/tiers/0/volume",
            json!({"emptyDir": {}}),
            SET,
            "/spec/template/spec/volumes/0/emptyDir/sizeLimit",
            json!("1344Mi"),
        ),
        seen(
            "spec.tiers[].volume.hostPath.path",
            "/tiers/0/volume/hostPath/path",
            json!("/other"),
            SET,
            "/spec/template/spec/volumes/0/hostPath/path",
            json!("/other/edits.pool"),
        ),
        seen(
            "spec.tiers[].watermarks.highPercent",
            "/tiers/0/watermarks/highPercent",
            json!(99),
            SET,
            args,
            json!("--high-percent=99"),
        ),
        seen(
            "spec.tiers[].watermarks.lowPercent",
            "/tiers/0/watermarks/lowPercent",
            json!(11),
            SET,
            args,
            json!("--low-percent=11"),
        ),
        passed(
            "spec.template.metadata.labels",
            "/template/metadata/labels/team",
            json!("vision"),
            SET,
            "/spec/template/metadata/labels/team",
        ),
        passed(
            "spec.template.metadata.annotations",
            "/template/metadata/annotations",
            json!({"a": "b"}),
            SET,
            "/spec/template/metadata/annotations",
        ),
        passed(
            "spec.template.spec.nodeSelector",
            "/template/spec/nodeSelector",
            json!({"pool": "cache"}),
            SET,
            "/spec/template/spec/nodeSelector",
        ),
        passed(
            "spec.template.spec.tolerations",
            "/template/spec/tolerations",
            json!([toleration]),
            SET,
            "/spec/template/spec/tolerations",
        ),
        passed("spec.template.spec.affinity", "/template/spec/affinity", affinity, SET, "/spec/template/spec/affinity"),
        passed(
            "spec.template.spec.resources.requests",
            "/template/spec/resources/requests/cpu",
            json!("3"),
            SET,
            "/spec/template/spec/containers/0/resources/requests/cpu",
        ),
        passed(
            "spec.template.spec.resources.limits",
            "/template/spec/resources/limits/memory",
            json!("3Gi"),
            SET,
            "/spec/template/spec/containers/0/resources/limits/memory",
        ),
        Row {
            field: "spec.template.spec.serviceAccountName",
            at: "/template/spec/serviceAccountName",
            value: json!("reader"),
            effect: Effect::Seen(vec![
                (SET, "/spec/template/spec/serviceAccountName", json!("reader")),
                (Place::Made(ROLE_BINDING), "/subjects/0/name", json!("reader")),
            ]),
        },
        passed(
            "spec.template.spec.priorityClassName",
            "/template/spec/priorityClassName",
            json!("high"),
            SET,
            "/spec/template/spec/priorityClassName",
        ),
    ])
    .await;
}

pub(crate) async fn of_each_field_of_a_dataset(cluster: &Cluster) {
    cluster.namespace(NAMESPACE).await;
    let tier = json!({"name": "t", "medium": "SSD", "capacity": "1Gi", "volume": {"emptyDir": {}}});
    let runtime = json!({"replicas": 2, "tiers": [tier]});
    cluster.create(RUNTIME, NAMESPACE, json!({"metadata": {"name": "other"}, "spec": runtime})).await;
    for name in ["one", "two"] {
        let keys = json!({"accessKeyId": name, "secretAccessKey": "s"});
        cluster.create(SECRET, NAMESPACE, json!({"metadata": {"name": name}, "stringData": keys})).await;
    }
    let source = json!({
        "path": "/a",
        "uri": "s3://bucket/a/",
        "secretRef": {"name": "one"},
        "s3": {"endpoint": "https://one.example.com", "region": "eu-west-1", "addressing": "Path"},
    });
    let spec = json!({"runtimeRef": {"name": "other"}, "sources": [source], "cache": {"quota": "1Gi"}});
    cluster.create(DATASET, NAMESPACE, json!({"metadata": {"name": "pictures"}, "spec": spec})).await;

    let directory = tempfile::tempdir().unwrap();
    let state_dir = directory.path().to_owned();
    let options = AgentOptions { namespace: NAMESPACE.into(), runtime: "other".into(), state_dir: state_dir.clone() };
    let mut agent = tokio::task::JoinSet::new();
    agent.spawn(forebay_worker_agent::run_with(cluster.client(), options));
    let pictures = Edited { cluster, kind: DATASET, name: "pictures", made: "other-forebay", state_dir, spec };

    let told = Place::Told;
    pictures
        .check_all(&[
            refused(
                "spec.runtimeRef.name",
                "/runtimeRef/name",
                json!("pool"),
                "spec.runtimeRef",
                "cannot be changed: its bytes are on the workers of the runtime it was created with",
            ),
            passed("spec.sources[].path", "/sources/0/path", json!("/b"), told, "/datasets/0/sources/0/path"),
            passed(
                "spec.sources[].uri",
                "/sources/0/uri",
                json!("s3://bucket/b/"),
                told,
                "/datasets/0/sources/0/spec/uri",
            ),
            passed(
                "spec.sources[].secretRef.name",
                "/sources/0/secretRef/name",
                json!("two"),
                told,
                "/datasets/0/sources/0/spec/credentials/accessKeyId",
            ),
            passed(
                "spec.sources[].s3.endpoint",
                "/sources/0/s3/endpoint",
                json!("https://two.example.com"),
                told,
                "/datasets/0/sources/0/spec/s3/endpoint",
            ),
            passed(
                "spec.sources[].s3.region",
                "/sources/0/s3/region",
                json!("eu-west-2"),
                told,
                "/datasets/0/sources/0/spec/s3/region",
            ),
            passed(
                "spec.sources[].s3.addressing",
                "/sources/0/s3/addressing",
                json!("VirtualHost"),
                told,
                "/datasets/0/sources/0/spec/s3/addressing",
            ),
            passed(
                "spec.sources[].requestBudget.getPerSecond",
                "/sources/0/requestBudget/getPerSecond",
                json!(500),
                told,
                "/datasets/0/sources/0/requestBudget/getPerSecond",
            ),
            passed(
                "spec.sources[].requestBudget.listPerSecond",
                "/sources/0/requestBudget/listPerSecond",
                json!(20),
                told,
                "/datasets/0/sources/0/requestBudget/listPerSecond",
            ),
            passed(
                "spec.sources[].requestBudget.headPerSecond",
                "/sources/0/requestBudget/headPerSecond",
                json!(50),
                told,
                "/datasets/0/sources/0/requestBudget/headPerSecond",
            ),
            seen(
                "spec.sync.mode",
                "/sync",
                json!({"mode": "Periodic", "interval": "5m"}),
                told,
                "/datasets/0/syncInterval/secs",
                json!(300),
            ),
            seen(
                "spec.sync.interval",
                "/sync",
                json!({"mode": "Periodic", "interval": "1m30s"}),
                told,
                "/datasets/0/syncInterval/secs",
                json!(90),
            ),
            passed("spec.cache.policy", "/cache/policy", json!("LRU"), told, "/datasets/0/policy"),
            // Each of the two workers has its half.
            seen("spec.cache.quota", "/cache/quota", json!("4Gi"), told, "/datasets/0/quota", json!(2_u64 << 30)),
            seen("spec.cache.reserve", "/cache/reserve", json!("2Gi"), told, "/datasets/0/reserve", json!(1_u64 << 30)),
            passed("spec.cache.priority", "/cache/priority", json!(5), told, "/datasets/0/priority"),
            seen("spec.cache.ttl", "/cache/ttl", json!("72h"), told, "/datasets/0/ttl/secs", json!(259_200)),
            seen(
                "spec.cache.replicas.min",
                "/cache/replicas",
                json!({"min": 2}),
                told,
                "/datasets/0/replicas/min",
                json!(2),
            ),
            seen(
                "spec.cache.replicas.max",
                "/cache/replicas",
                json!({"min": 1, "max": 3}),
                told,
                "/datasets/0/replicas/max",
                json!(3),
            ),
            passed("spec.volume.shape", "/volume/shape", json!("Small"), told, "/datasets/0/shape"),
        ])
        .await;
}
