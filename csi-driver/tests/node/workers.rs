//! From an object store through real workers to a pod's mount, as in a cluster: the daemons have nothing but the service
//! and the key of the Secret.

use std::{net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use forebay_cache_worker::{DatasetConfig, DatasetsFile, Policy, Replicas, SourceConfig, VolumeShape, WorkerOptions};
use forebay_protocol::{
    DatasetId,
    table::{Member, MemberState, WorkerTable},
};
use forebay_test_store::{Options, TestStore};
use forebay_under_store::{S3Addressing, S3Credentials, S3Options, SourceSpec};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    daemon::Trees,
    rig::{DATASET, KEY, PATIENCE, Rig, can_mount, eventually},
};

const BUCKET: &str = "bucket";

fn contents(index: usize) -> Bytes {
    (0..1_500_000 + index).map(|position| (position.wrapping_mul(31) ^ position >> 7 ^ index) as u8).collect()
}

fn write_private(path: &Path, contents: &[u8]) {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let temporary = path.with_extension("new");
    let mut file =
        std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary).unwrap();
    file.write_all(contents).unwrap();
    std::fs::rename(temporary, path).unwrap();
}

fn dataset(store: &TestStore) -> DatasetConfig {
    let s3 = S3Options {
        endpoint: Some(store.endpoint()),
        region: Some("us-east-1".into()),
        addressing: Some(S3Addressing::Path),
    };
    let credentials = S3Credentials {
        access_key_id: store.access_key().into(),
        secret_access_key: store.secret_key().into(),
        session_token: None,
    };
    let spec = SourceSpec { uri: format!("s3://{BUCKET}/"), s3: Some(s3), credentials: Some(credentials) };
    DatasetConfig {
        id: DatasetId(Uuid::try_parse(DATASET).unwrap()),
        namespace: "default".into(),
        name: "pictures".into(),
        sources: vec![SourceConfig { path: "/".into(), spec, request_budget: Default::default(), problem: None }],
        policy: Policy::Hold,
        quota: None,
        shape: VolumeShape::Auto,
        reserve: 0,
        priority: 0,
        ttl: None,
        replicas: Replicas::default(),
        sync_interval: None,
    }
}

/// Workers in this process, stopped when it is dropped.
struct Workers {
    stop: CancellationToken,
    addresses: Vec<SocketAddr>,
    dir: tempfile::TempDir,
}

impl Workers {
    async fn start(count: usize, store: &TestStore) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write_private(&at("key"), KEY.as_bytes());
        let datasets = DatasetsFile { datasets: vec![dataset(store)] };
        write_private(&at("datasets.json"), &serde_json::to_vec(&datasets).unwrap());
        let stop = CancellationToken::new();
        let mut workers = Self { stop: stop.clone(), addresses: Vec::new(), dir };
        for index in 0..count {
            let name = format!("runtime-forebay-{index}");
            let cache_dir = workers.dir.path().join(&name);
            std::fs::create_dir(&cache_dir).unwrap();
            let options = WorkerOptions {
                owner: format!("default/runtime/{name}"),
                name,
                cache_dir,
                capacity: 1 << 30,
                table: workers.dir.path().join("table.json"),
                datasets: workers.dir.path().join("datasets.json"),
                key_file: workers.dir.path().join("key"),
                ..WorkerOptions::default()
            };
            let (ready, address) = oneshot::channel();
            tokio::spawn(forebay_cache_worker::run(options, stop.clone(), ready));
            workers.addresses.push(address.await.unwrap());
        }
        workers.table(1);
        workers
    }

    fn table(&self, epoch: u64) {
        let members = self.addresses.iter().enumerate().map(|(index, address)| Member {
            name: format!("runtime-forebay-{index}"),
            address: address.to_string(),
            weight: 1,
            state: MemberState::Serving,
        });
        let table = WorkerTable { epoch, members: members.collect() };
        write_private(&self.dir.path().join("table.json"), &serde_json::to_vec(&table).unwrap());
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn read(path: std::path::PathBuf) -> std::io::Result<Vec<u8>> {
    let reading = tokio::task::spawn_blocking(move || std::fs::read(path));
    tokio::time::timeout(2 * PATIENCE, reading).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn from_the_store_to_the_pod() {
    if !can_mount() {
        return;
    }
    let store = TestStore::start(Options::default()).await;
    store.create_bucket(BUCKET).await;
    for index in 0..8 {
        store.put(BUCKET, &format!("train/{index}"), contents(index)).await;
    }
    let workers = Workers::start(2, &store).await;
    let mut rig = Rig::with(Trees::Workers, &[]).await;
    rig.service = workers.addresses[0].to_string();

    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    // By name only, as a pod's own volume has it.
    rig.publish_inline("csi-0a", "other").await.unwrap();
    let inline = rig.target_path("other");
    for index in 0..8 {
        let name = format!("train/{index}");
        assert!(read(target.join(&name)).await.unwrap() == contents(index), "{name}");
        rig.daemons.remove(0).kill();
        rig.daemon();
        assert!(read(inline.join(&name)).await.unwrap() == contents(index), "{name}");
    }
    let total: u64 = (0..8).map(|index| contents(index).len() as u64).sum();
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        // No daemon may serve for a moment.
        let usage = rig.stats("v", &target).await.unwrap_or_default();
        if usage.first().is_some_and(|usage| usage.total as u64 >= total) && usage[1].total == 8 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{usage:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(rig.health("v", &target).await.unwrap().health_statuses, vec![]);

    // All workers go: the volume says so.
    workers.stop.cancel();
    rig.health_becomes("v", &target, |health| health.reason == "NoWorker").await;
    rig.unpublish("v", "pod").await.unwrap();
    rig.unpublish("csi-0a", "other").await.unwrap();
    rig.unstage("v").await.unwrap();
    eventually("nothing is left", || rig.mounts().is_empty()).await;
    rig.assert_clean();
    assert!(!rig.logged().contains(KEY));
}
