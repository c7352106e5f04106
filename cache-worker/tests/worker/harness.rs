//! Workers, a store and a client for one test.

use std::{
    fs,
    future::Future,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_cache_worker::{
    DatasetConfig, DatasetsFile, Policy, Replicas, RunningWorker, SourceConfig, VolumeShape, WorkerOptions,
};
use forebay_client::{Client, ClientConfig, ClientError, DatasetClient, EntryKind, MemoryBudget};
use forebay_protocol::{
    DatasetId, DatasetPath, FileVersion,
    handshake::RuntimeKey,
    table::{Member, MemberState, WorkerTable},
    worker::{
        DatasetStatus, LoadProgress, LoadRequest, RefreshRequest, ScanProgress, ScanState, StatusRequest,
        StatusResponse,
    },
};
use forebay_test_store::{Options, TestStore};
use forebay_under_store::{Limits, S3Addressing, S3Credentials, S3Options, SourceSpec};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    sync::watch,
};
use tonic::Status;

pub(crate) const BUCKET: &str = "data";
pub(crate) const BLOCK: u64 = 64 * 1024;
pub(crate) const MIB: u64 = 1 << 20;

/// What the bytes of an object are: eight bytes at a time, by seed and position.
pub(crate) fn generate(seed: u64, offset: u64, out: &mut [u8]) {
    let mut at = offset;
    let mut left = out;
    while !left.is_empty() {
        let mut x = seed.wrapping_add((at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let word = (x ^ (x >> 31)).to_le_bytes();
        let from = (at % 8) as usize;
        let count = left.len().min(8 - from);
        let (now, rest) = left.split_at_mut(count);
        now.copy_from_slice(&word[from..from + count]);
        left = rest;
        at += count as u64;
    }
}

pub(crate) fn contents(seed: u64, size: u64) -> Bytes {
    let mut bytes = vec![0; size as usize];
    generate(seed, 0, &mut bytes);
    bytes.into()
}

pub(crate) fn path(text: &str) -> DatasetPath {
    DatasetPath::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

/// A worker on a runtime of its own, so that it can be killed.
pub(crate) struct TestWorker {
    pub(crate) options: WorkerOptions,
    running: Option<(Runtime, RunningWorker)>,
}

impl TestWorker {
    pub(crate) async fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let started = runtime.spawn(RunningWorker::start(self.options.clone())).await.unwrap();
        let worker = match started {
            Ok(worker) => worker,
            Err(error) => panic!("a worker does not start: {error:#}"),
        };
        // Started again, it listens where clients look for it.
        self.options.listen = worker.address();
        self.running = Some((runtime, worker));
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.options.listen
    }

    /// Drains it as at SIGTERM, and then ends it in order; how long the first took.
    pub(crate) async fn drain(&mut self) -> Duration {
        let (runtime, worker) = self.running.take().unwrap();
        let drained = runtime.spawn(async move {
            let start = Instant::now();
            worker.drain().await;
            let took = start.elapsed();
            worker.stop().await.map(|()| took)
        });
        let took = drained.await.unwrap().unwrap();
        end(runtime).await;
        took
    }

    pub(crate) fn metrics_address(&self) -> SocketAddr {
        self.running.as_ref().unwrap().1.metrics_address().unwrap()
    }

    /// Ends it in order.
    pub(crate) async fn stop(&mut self) {
        let (runtime, worker) = self.running.take().unwrap();
        runtime.spawn(worker.stop()).await.unwrap().unwrap();
        end(runtime).await;
    }

    /// Ends it at once, as a crash would: nothing is flushed or answered.
    pub(crate) async fn kill(&mut self) {
        let (runtime, worker) = self.running.take().unwrap();
        end(runtime).await;
        drop(worker);
    }
}

/// As the end of the process: whatever still runs is gone when this returns, with the files that it has open.
async fn end(runtime: Runtime) {
    tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(10))).await.unwrap();
}

pub(crate) struct Cluster {
    pub(crate) store: TestStore,
    pub(crate) dir: TempDir,
    pub(crate) key: RuntimeKey,
    pub(crate) id: DatasetId,
    pub(crate) workers: Vec<TestWorker>,
    pub(crate) client: Client,
    table: watch::Sender<Arc<WorkerTable>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            if let Some((runtime, _)) = worker.running.take() {
                runtime.shutdown_background();
            }
        }
    }
}

fn write_private(path: &Path, text: &[u8]) {
    let next = path.with_extension("next");
    fs::write(&next, text).unwrap();
    fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&next, path).unwrap();
}

impl Cluster {
    pub(crate) async fn start(workers: usize) -> Self {
        Self::start_with(workers, |_| {}, |_| {}).await
    }

    /// A store with an empty bucket, workers that serve it as one dataset, and a client.
    pub(crate) async fn start_with(
        workers: usize,
        change_options: impl Fn(&mut WorkerOptions),
        change_dataset: impl Fn(&mut DatasetConfig),
    ) -> Self {
        let store = TestStore::start(Options { latency: Duration::ZERO, dir: None }).await;
        store.create_bucket(BUCKET).await;
        let dir = tempfile::tempdir().unwrap();
        let key = RuntimeKey::generate();
        let id = DatasetId::local("default", "data");
        write_private(&dir.path().join("key"), hex(key.expose()).as_bytes());
        let mut dataset = with_sources(id, vec![at("/", source(&store, ""))]);
        change_dataset(&mut dataset);
        write_datasets(dir.path(), &[dataset]);
        let table = watch::Sender::new(Arc::new(WorkerTable { epoch: 1, members: Vec::new() }));
        write_private(&dir.path().join("table.json"), &serde_json::to_vec(&**table.borrow()).unwrap());
        let config = ClientConfig {
            name: "test".into(),
            key: key.clone(),
            memory: MemoryBudget::new(128 << 20),
            deadline: Duration::from_secs(30),
            max_read_ahead: 0,
            connections_per_worker: 2,
        };
        let client = Client::new(config, table.subscribe());
        let mut cluster = Self { store, dir, key, id, workers: Vec::new(), client, table };
        for index in 0..workers {
            let mut options = WorkerOptions {
                name: format!("w-{index}"),
                listen: ([127, 0, 0, 1], 0).into(),
                metrics_listen: Some(([127, 0, 0, 1], 0).into()),
                owner: format!("default/test/w-{index}"),
                cache_dir: cluster.dir.path().join(format!("w-{index}")),
                capacity: 4 << 30,
                table: cluster.dir.path().join("table.json"),
                datasets: cluster.dir.path().join("datasets.json"),
                key_file: cluster.dir.path().join("key"),
                limits: Limits {
                    deadline: Duration::from_secs(15),
                    progress_timeout: Duration::from_secs(2),
                    ..Limits::default()
                },
                ..WorkerOptions::default()
            };
            change_options(&mut options);
            let mut worker = TestWorker { options, running: None };
            worker.start().await;
            cluster.workers.push(worker);
        }
        cluster.publish((0..workers).collect());
        cluster.ready().await;
        cluster
    }

    /// Names the datasets that are served from now on.
    pub(crate) fn configure(&self, datasets: &[DatasetConfig]) {
        write_datasets(self.dir.path(), datasets);
    }

    /// The dataset with other sources.
    pub(crate) fn with_sources(&self, sources: Vec<SourceConfig>) -> DatasetConfig {
        with_sources(self.id, sources)
    }

    /// Writes a table of these workers.
    pub(crate) fn publish(&self, members: Vec<usize>) {
        self.publish_members(members.into_iter().map(|index| self.member(index)).collect());
    }

    /// A table of these workers that only clients know.
    pub(crate) fn tell_clients(&self, members: Vec<usize>) {
        let members = members.into_iter().map(|index| self.member(index)).collect();
        let epoch = self.table.borrow().epoch + 1;
        self.table.send_replace(Arc::new(WorkerTable { epoch, members }));
    }

    /// A worker as a table names it.
    pub(crate) fn member(&self, index: usize) -> Member {
        Member {
            name: self.workers[index].options.name.clone(),
            address: self.workers[index].address().to_string(),
            weight: 1,
            state: MemberState::Serving,
        }
    }

    /// Writes a table of these members.
    pub(crate) fn publish_members(&self, members: Vec<Member>) {
        let epoch = self.table.borrow().epoch + 1;
        let table = WorkerTable { epoch, members };
        write_private(&self.dir.path().join("table.json"), &serde_json::to_vec(&table).unwrap());
        self.table.send_replace(Arc::new(table));
    }

    /// Waits until every worker that runs knows the table and the dataset.
    pub(crate) async fn ready(&self) {
        let epoch = self.table.borrow().epoch;
        eventually("workers that know the table", || async {
            for worker in self.workers.iter().filter(|worker| worker.running.is_some()) {
                let Ok(mut control) = self.client.control(&worker.options.name).await else { return false };
                let Ok(status) = control.status(StatusRequest::default()).await else { return false };
                let status = status.into_inner();
                if status.table_epoch < epoch || status.datasets.is_empty() {
                    return false;
                }
            }
            true
        })
        .await;
    }

    pub(crate) async fn restart(&mut self, index: usize) {
        self.workers[index].start().await;
        self.ready().await;
    }

    pub(crate) async fn put(&self, key: &str, seed: u64, size: u64) {
        self.store.put(BUCKET, key, contents(seed, size)).await;
    }

    pub(crate) fn put_virtual(&self, key: &str, seed: u64, size: u64) {
        self.store.put_virtual(BUCKET, key, size, Arc::new(move |offset, out: &mut [u8]| generate(seed, offset, out)));
    }

    pub(crate) fn names(&self) -> DatasetClient {
        self.client.dataset(self.id)
    }

    pub(crate) async fn version(&self, file: &str) -> Result<FileVersion, ClientError> {
        let (directory, name) = path(file).split().unwrap();
        match self.names().lookup(&directory, &name).await?.kind {
            EntryKind::File { version } => Ok(version),
            EntryKind::Directory => panic!("{file} is a directory"),
        }
    }

    /// Reads a range of the current version.
    pub(crate) async fn read(&self, file: &str, offset: u64, len: u64) -> Result<Vec<u8>, ClientError> {
        let version = self.version(file).await?;
        read_at(&self.names(), file, version, offset, len).await
    }

    /// Reads a whole file and compares it with what was generated.
    pub(crate) async fn check(&self, file: &str, seed: u64, size: u64) {
        let version = self.version(file).await.unwrap();
        assert_eq!(version.size, size, "{file}");
        for offset in (0..size).step_by(32 * MIB as usize) {
            let len = (size - offset).min(32 * MIB);
            let got = read_at(&self.names(), file, version.clone(), offset, len).await.unwrap();
            let mut expected = vec![0; len as usize];
            generate(seed, offset, &mut expected);
            assert!(got == expected, "{file} has wrong bytes after {offset} ({} of {len})", got.len());
        }
    }

    /// Lists everything again: what was put since the workers started is seen.
    pub(crate) async fn refresh(&self, at: &str) -> ScanProgress {
        let mut control = self.client.control(&self.workers[0].options.name).await.unwrap();
        let request = RefreshRequest { dataset: self.id.to_bytes(), path: Bytes::copy_from_slice(at.as_bytes()) };
        let mut stream = control.refresh(request).await.unwrap().into_inner();
        let mut last = ScanProgress::default();
        while let Some(progress) = stream.message().await.unwrap() {
            last = progress;
        }
        assert_eq!(last.state(), ScanState::Complete, "{}", last.error);
        last
    }

    pub(crate) async fn status(&self, index: usize) -> DatasetStatus {
        self.status_of(index, self.id).await.unwrap().datasets.remove(0)
    }

    /// What a worker says of one dataset.
    pub(crate) async fn status_of(&self, index: usize, dataset: DatasetId) -> Result<StatusResponse, Status> {
        let mut control = self.client.control(&self.workers[index].options.name).await.unwrap();
        Ok(control.status(StatusRequest { dataset: dataset.to_bytes() }).await?.into_inner())
    }

    /// Sums of a number over the workers that run.
    pub(crate) async fn sum(&self, number: impl Fn(&DatasetStatus) -> u64) -> u64 {
        let mut sum = 0;
        for index in (0..self.workers.len()).filter(|index| self.workers[*index].running.is_some()) {
            sum += number(&self.status(index).await);
        }
        sum
    }
}

pub(crate) async fn read_at(
    names: &DatasetClient,
    file: &str,
    version: FileVersion,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, ClientError> {
    let pieces = names.open(path(file), version).read(offset, len as usize).await?;
    Ok(pieces.concat())
}

pub(crate) fn source(store: &TestStore, prefix: &str) -> SourceSpec {
    SourceSpec {
        uri: format!("s3://{BUCKET}/{prefix}"),
        s3: Some(S3Options {
            endpoint: Some(store.endpoint()),
            region: Some("us-east-1".into()),
            addressing: Some(S3Addressing::Path),
        }),
        credentials: Some(S3Credentials {
            access_key_id: store.access_key().into(),
            secret_access_key: store.secret_key().into(),
            session_token: None,
        }),
    }
}

/// Has the first worker load what is below a path.
pub(crate) async fn begin_load(cluster: &Cluster, path: &'static str) -> tonic::Streaming<LoadProgress> {
    let mut control = cluster.client.control("w-0").await.unwrap();
    let request = LoadRequest {
        dataset: cluster.id.to_bytes(),
        path: Bytes::from_static(path.as_bytes()),
        ..LoadRequest::default()
    };
    control.load(request).await.unwrap().into_inner()
}

/// The metrics of the first worker.
pub(crate) async fn metrics(cluster: &Cluster) -> String {
    http(cluster, "/metrics").await
}

/// What the metrics server of the first worker answers.
pub(crate) async fn http(cluster: &Cluster, path: &str) -> String {
    http_of(&cluster.workers[0], path).await
}

/// What the metrics server of a worker answers.
pub(crate) async fn http_of(worker: &TestWorker, path: &str) -> String {
    let mut stream = TcpStream::connect(worker.metrics_address()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// A source at a path.
pub(crate) fn at(path: &str, spec: SourceSpec) -> SourceConfig {
    SourceConfig { path: path.into(), spec, request_budget: Default::default(), problem: None }
}

fn with_sources(id: DatasetId, sources: Vec<SourceConfig>) -> DatasetConfig {
    DatasetConfig {
        id,
        namespace: "default".into(),
        name: "data".into(),
        sources,
        policy: Policy::Hold,
        quota: None,
        reserve: 0,
        priority: 0,
        ttl: None,
        replicas: Replicas::default(),
        shape: VolumeShape::Auto,
        sync_interval: None,
    }
}

fn write_datasets(dir: &Path, datasets: &[DatasetConfig]) {
    let file = DatasetsFile { datasets: datasets.to_vec() };
    write_private(&dir.join("datasets.json"), &serde_json::to_vec(&file).unwrap());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Waits for a condition, 20 s at most.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < Duration::from_secs(20), "no {what} within 20 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Every file below a directory.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}
