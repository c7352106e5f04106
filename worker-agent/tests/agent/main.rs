//! The agent against a real API server, as a user with the workers' rights and no more.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where it cannot go on")]

mod api_server;

use std::{
    fs,
    future::Future,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

use api_server::{ApiServer, WORKER_USER};
use forebay_api::{CacheRuntime, Dataset};
use forebay_cache_worker::{DatasetConfig, DatasetsFile, TableFile};
use forebay_worker_agent::{AgentOptions, DATASETS, TABLE, run_with};
use k8s_openapi::api::{
    core::v1::{Namespace, Secret},
    rbac::v1::{Role, RoleBinding},
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

const NAMESPACE: &str = "vision";

/// An agent, and where it writes.
struct Agent {
    dir: TempDir,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    fn start(client: Client, dir: TempDir) -> Self {
        let options =
            AgentOptions { namespace: NAMESPACE.into(), runtime: "cache".into(), state_dir: dir.path().to_owned() };
        Self { dir, task: tokio::spawn(run_with(client, options)) }
    }

    /// Ends it as the container's end would.
    fn stop(self) -> TempDir {
        self.task.abort();
        self.dir
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn table(&self) -> Option<TableFile> {
        read(&self.path(TABLE))
    }

    fn dataset(&self, name: &str) -> Option<DatasetConfig> {
        let file: DatasetsFile = read(&self.path(DATASETS))?;
        file.datasets.into_iter().find(|dataset| dataset.name == name)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    Some(serde_json::from_slice(&fs::read(path).ok()?).unwrap())
}

async fn within<T, F: Future<Output = Option<T>>>(most: Duration, what: &str, mut look: impl FnMut() -> F) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < most, "{what}: not within {most:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const SOON: Duration = Duration::from_secs(4);

fn object<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

async fn create<K>(api: &Api<K>, value: Value) -> K
where
    K: Resource + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    within(Duration::from_secs(10), "the object is taken", || async {
        api.create(&PostParams::default(), &object(value.clone())).await.ok()
    })
    .await
}

fn dataset(name: &str, runtime: &str, secret: Option<&str>) -> Value {
    let mut source = json!({"path": "/", "uri": "s3://bucket/"});
    if let Some(secret) = secret {
        source["secretRef"] = json!({"name": secret});
    }
    json!({
        "apiVersion": "forebay.io/v1alpha1", "kind": "Dataset",
        "metadata": {"name": name, "finalizers": ["forebay.io/test"]},
        "spec": {"runtimeRef": {"name": runtime}, "sources": [source], "cache": {"quota": "1Gi"}},
    })
}

fn secret(name: &str, id: &str) -> Value {
    json!({"metadata": {"name": name}, "stringData": {"accessKeyId": id, "secretAccessKey": "s"}})
}

fn members(epoch: u64, states: &[&str]) -> Value {
    let member = |(index, state): (usize, &&str)| {
        json!({"name": format!("cache-forebay-{index}"), "address": format!("10.0.0.{index}:7400"), "weight": 1,
               "state": state})
    };
    json!({"status": {"table": {"epoch": epoch, "members": states.iter().enumerate().map(member).collect::<Vec<_>>()}}})
}

async fn patch_status<K: Resource + Clone + DeserializeOwned + std::fmt::Debug>(
    api: &Api<K>,
    name: &str,
    value: Value,
) {
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(value)).await.unwrap();
}

/// The namespace, what workers may do in it, and the runtime.
async fn prepare(admin: &Client) -> Api<CacheRuntime> {
    let namespaces: Api<Namespace> = Api::all(admin.clone());
    for name in [NAMESPACE, "elsewhere"] {
        create(&namespaces, json!({"metadata": {"name": name}})).await;
    }
    let roles: Api<Role> = Api::namespaced(admin.clone(), NAMESPACE);
    let rules = json!([
        {"apiGroups": ["forebay.io"], "resources": ["datasets", "cacheruntimes"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["keys", "later"], "verbs": ["get"]},
    ]);
    create(&roles, json!({"metadata": {"name": "worker"}, "rules": rules})).await;
    let bindings: Api<RoleBinding> = Api::namespaced(admin.clone(), NAMESPACE);
    let binding = json!({
        "metadata": {"name": "worker"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "worker"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": WORKER_USER}],
    });
    create(&bindings, binding).await;
    let runtimes: Api<CacheRuntime> = Api::namespaced(admin.clone(), NAMESPACE);
    let tier = json!({"name": "disk", "medium": "SSD", "capacity": "1Gi", "volume": {"emptyDir": {}}});
    let runtime = |name: &str| {
        json!({"apiVersion": "forebay.io/v1alpha1", "kind": "CacheRuntime", "metadata": {"name": name},
               "spec": {"replicas": 2, "tiers": [tier]}})
    };
    create(&runtimes, runtime("cache")).await;
    create(&runtimes, runtime("other")).await;
    runtimes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_say_what_the_api_server_says() {
    let Some(mut server) = ApiServer::start().await else { return };
    let admin = server.admin();
    let runtimes = prepare(&admin).await;
    let datasets: Api<Dataset> = Api::namespaced(admin.clone(), NAMESPACE);
    let strangers: Api<Dataset> = Api::namespaced(admin.clone(), "elsewhere");
    let secrets: Api<Secret> = Api::namespaced(admin.clone(), NAMESPACE);
    create(&secrets, secret("keys", "first")).await;
    let plain = create(&datasets, dataset("plain", "cache", None)).await;
    create(&datasets, dataset("keyed", "cache", Some("keys"))).await;
    create(&datasets, dataset("foreign", "other", None)).await;
    create(&strangers, dataset("stranger", "cache", None)).await;

    let agent = Agent::start(server.worker(), tempfile::tempdir().unwrap());
    let known = within(SOON, "the datasets", || async { agent.dataset("plain") }).await;
    assert_eq!(known.id.to_string(), plain.metadata.uid.unwrap());
    assert_eq!((known.namespace.as_str(), known.quota), (NAMESPACE, Some(512 << 20)));
    let credentials =
        |dataset: &DatasetConfig| dataset.sources[0].spec.credentials.clone().map(|keys| keys.access_key_id);
    assert_eq!(credentials(&agent.dataset("keyed").unwrap()).as_deref(), Some("first"));
    assert!(agent.dataset("foreign").is_none() && agent.dataset("stranger").is_none() && agent.table().is_none());
    assert_eq!(fs::metadata(agent.path(DATASETS)).unwrap().permissions().mode() & 0o777, 0o600);

    // The table comes and changes; an older one does not come back.
    patch_status(&runtimes, "cache", members(1, &["Serving"])).await;
    let table = within(SOON, "the table", || async { agent.table() }).await;
    assert_eq!(Some(table.runtime_uid), runtimes.get("cache").await.unwrap().metadata.uid);
    patch_status(&runtimes, "cache", members(3, &["Serving", "Draining"])).await;
    within(SOON, "the next table", || async { agent.table().filter(|table| table.epoch == 3) }).await;
    patch_status(&runtimes, "cache", members(2, &["Serving"])).await;

    // A share of the quota for each worker.
    let replicas = Patch::Merge(json!({"spec": {"replicas": 4}}));
    runtimes.patch("cache", &PatchParams::default(), &replicas).await.unwrap();
    let quarter = Some(256 << 20);
    within(SOON, "the share", || async { agent.dataset("plain").filter(|dataset| dataset.quota == quarter) }).await;
    assert_eq!(agent.table().unwrap().epoch, 3);

    // Secrets that are missing, incomplete, forbidden, there, and changed.
    create(&datasets, dataset("late", "cache", Some("later"))).await;
    create(&datasets, dataset("denied", "cache", Some("private"))).await;
    let reason = |agent: &Agent, name: &str| {
        let problem = agent.dataset(name)?.sources[0].problem.clone();
        Some(problem.map(|problem| problem.reason).unwrap_or_default())
    };
    let told = async |name: &'static str, wanted: &'static str, most: Duration| {
        within(most, wanted, || async { reason(&agent, name).filter(|reason| reason == wanted) }).await;
    };
    told("late", "SecretNotFound", SOON).await;
    told("denied", "SecretNotFound", SOON).await;
    assert_eq!(reason(&agent, "keyed").as_deref(), Some(""), "the others are not held up");
    create(&secrets, json!({"metadata": {"name": "later"}, "stringData": {"accessKeyId": "id"}})).await;
    told("late", "SecretInvalid", Duration::from_secs(6)).await;
    let whole = Patch::Merge(json!({"stringData": {"secretAccessKey": "s"}}));
    secrets.patch("later", &PatchParams::default(), &whole).await.unwrap();
    told("late", "", Duration::from_secs(6)).await;
    datasets
        .patch("denied", &PatchParams::default(), &Patch::Merge(json!({"metadata": {"finalizers": []}})))
        .await
        .unwrap();
    datasets.delete("denied", &DeleteParams::default()).await.unwrap();
    within(SOON, "its end", || async { agent.dataset("denied").is_none().then_some(()) }).await;
    let changed = Patch::Merge(json!({"stringData": {"accessKeyId": "second"}}));
    secrets.patch("keys", &PatchParams::default(), &changed).await.unwrap();
    let new = || async { agent.dataset("keyed").filter(|dataset| credentials(dataset).as_deref() == Some("second")) };
    within(Duration::from_secs(20), "the changed Secret", new).await;

    // One that is deleted is served until its claim is gone.
    patch_status(&datasets, "plain", json!({"status": {"claimName": "plain"}})).await;
    datasets.delete("plain", &DeleteParams::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(agent.dataset("plain").is_some());
    patch_status(&datasets, "plain", json!({"status": {"claimName": null}})).await;
    within(SOON, "the end of its service", || async { agent.dataset("plain").is_none().then_some(()) }).await;

    // The API server is away, and the container is started again meanwhile.
    server.stop();
    let before = (fs::read(agent.path(TABLE)).unwrap(), fs::read(agent.path(DATASETS)).unwrap());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let agent = Agent::start(server.worker(), agent.stop());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!agent.task.is_finished());
    assert_eq!((fs::read(agent.path(TABLE)).unwrap(), fs::read(agent.path(DATASETS)).unwrap()), before);
    server.restart().await;
    create(&datasets, dataset("new", "cache", None)).await;
    within(Duration::from_secs(8), "the new dataset", || async { agent.dataset("new") }).await;
    assert!(agent.dataset("keyed").is_some());
}
