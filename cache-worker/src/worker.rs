//! A worker: its parts, its start and its end.
//!
//! Start: files, stores, listener, then the tasks; from then on it serves. End: it is not ready any more, and goes on
//! serving until nobody counts on it (or for as long as it may); then nothing new is accepted, data connections answer
//! what is under way (4 s), fetches end, indexes are flushed.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use forebay_cache_store::{ChunkStore, StoreOptions};
use forebay_client::{Client, ClientConfig, MemoryBudget};
use forebay_metadata::Index;
use forebay_protocol::{
    DatasetId,
    handshake::RuntimeKey,
    worker::{self, DatasetStatus, StatusResponse},
};
use rustix::fs::Access;
use tokio::{
    net::TcpListener,
    sync::{Notify, SetOnce, mpsc, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    config::{ConfigError, VolumeShape, WorkerOptions, read_datasets, read_key, read_table},
    copies,
    dataset::Dataset,
    datasets::Datasets,
    fill::{FillEngine, Peers},
    grpc,
    heat::Heat,
    http, listener,
    load::Loads,
    members::Members,
    metrics::{Metrics, level},
    notices, reload,
};

/// Control connections that wait to be taken by the gRPC server.
const CONTROL_QUEUE: usize = 256;
/// How long tasks may take to end: the drain of data connections (4 s) and a little.
const STOP_TASKS: Duration = Duration::from_secs(6);
/// How long listings and fetches may take to end.
const STOP_WORK: Duration = Duration::from_secs(5);
/// How often a worker that drains looks whether it may end.
const DRAIN_LOOK: Duration = Duration::from_millis(100);
/// How long nobody asks a worker that drains before it ends: those who learn of a new table late are still served.
const DRAIN_QUIET: Duration = Duration::from_secs(1);
/// Memory of the client with which this worker walks trees; it reads no contents.
const WALK_BUDGET: usize = forebay_client::MIN_BUDGET;
/// How long a worker that starts is not named to clients for want of its datasets.
const LOADED: Duration = Duration::from_secs(5);
/// Deadline of one step of such a walk: the owner may have to list a large directory first.
const WALK_DEADLINE: Duration = Duration::from_secs(60);

/// Everything that tasks share.
pub(crate) struct Worker {
    pub(crate) options: WorkerOptions,
    pub(crate) key: RuntimeKey,
    /// Another value with every start.
    incarnation: u64,
    started: Instant,
    pub(crate) store: Arc<ChunkStore>,
    pub(crate) engine: FillEngine,
    pub(crate) datasets: Datasets,
    pub(crate) members: Members,
    /// For walks through the owners of directories.
    pub(crate) client: Client,
    pub(crate) metrics: Arc<Metrics>,
    /// The loads under way.
    pub(crate) loads: Loads,
    /// What readers ask for most.
    pub(crate) heat: Heat,
    /// A client knows a newer table.
    pub(crate) newer_table: Notify,
    loaded: SetOnce<()>,
    draining: AtomicBool,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl Worker {
    /// A sender knows this epoch of the table.
    pub(crate) fn saw_epoch(&self, epoch: u64) {
        if epoch > self.members.table().epoch {
            self.engine.saw_epoch(epoch);
            self.newer_table.notify_one();
        }
    }

    pub(crate) fn datasets_loaded(&self) {
        // Every later configuration says so again.
        let _ = self.loaded.set(());
    }

    /// Why this worker is not ready; `None` when it is.
    pub(crate) fn not_ready(&self) -> Option<&'static str> {
        if self.stop.is_cancelled() || self.draining.load(Ordering::Acquire) {
            return Some("stopping");
        }
        if !self.loaded.initialized() {
            return Some("the datasets are not loaded yet");
        }
        (!self.members.has_self()).then_some("this worker is not in the table yet")
    }

    /// Copies what is counted elsewhere into the metrics.
    pub(crate) async fn sample_metrics(self: &Arc<Self>) {
        let worker = self.clone();
        let sampled = tokio::task::spawn_blocking(move || {
            let totals = worker.store.totals();
            let m = &worker.metrics;
            level(&m.capacity, totals.capacity);
            level(&m.used, totals.used);
            level(&m.tier_healthy, u64::from(totals.problem.is_none() && !worker.engine.disk().is_hung()));
            level(&m.budget_free, worker.engine.budget_available());
            level(&m.chunks_in_flight, worker.engine.chunks_in_flight() as u64);
            level(&m.hot_chunks, worker.heat.chunks() as u64);
            level(&m.table_epoch, worker.members.table().epoch);
            for dataset in worker.datasets.all() {
                dataset.sample_metrics(&worker.store.usage(dataset.id));
            }
        })
        .await;
        if let Err(error) = sampled {
            warn!(%error, "sampling metrics failed");
        }
    }

    /// What `Status` answers about these datasets, and those that are being wiped.
    pub(crate) fn status(&self, datasets: &[Arc<Dataset>], wiping: &[DatasetId]) -> StatusResponse {
        let totals = self.store.totals();
        let count = |gauge: &prometheus_client::metrics::gauge::Gauge| u64::try_from(gauge.get()).unwrap_or(0);
        let m = &self.metrics;
        StatusResponse {
            worker: self.options.name.clone(),
            incarnation: self.incarnation,
            table_epoch: self.members.table().epoch,
            capacity_bytes: totals.capacity,
            used_bytes: totals.used,
            tier_problem: self.engine.disk().problem().or(totals.problem).unwrap_or_default(),
            datasets: datasets.iter().map(|dataset| self.dataset_status(dataset)).collect(),
            uptime_seconds: self.started.elapsed().as_secs(),
            connections: count(&m.data_connections) + count(&m.control_connections),
            requests_in_flight: count(&m.requests_in_flight),
            wiping: wiping.iter().map(|id| id.to_bytes()).collect(),
        }
    }

    /// What changes while somebody is served.
    fn activity(&self) -> (i64, u64) {
        let served = self.datasets.all().iter().map(|dataset| dataset.metrics.served_bytes.get()).sum();
        (self.metrics.requests_in_flight.get(), served)
    }

    fn dataset_status(&self, dataset: &Dataset) -> DatasetStatus {
        let usage = self.store.usage(dataset.id);
        let requests = dataset.requests();
        let problem = dataset.source_problem();
        let synced_ms = dataset.sync.age().map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let m = &dataset.metrics;
        let shape = match dataset.config().shape {
            VolumeShape::Auto => worker::VolumeShape::Auto,
            VolumeShape::Large => worker::VolumeShape::Large,
            VolumeShape::Small => worker::VolumeShape::Small,
        };
        DatasetStatus {
            dataset: dataset.id.to_bytes(),
            namespace: dataset.owner.clone(),
            name: dataset.name.clone(),
            generation: dataset.index.generation(),
            cached_bytes: usage.cached_bytes,
            pinned_bytes: usage.pinned_bytes,
            cached_chunks: usage.chunks,
            hit_bytes: m.hit_bytes.get(),
            miss_bytes: m.miss_bytes.get(),
            store_bytes: requests.bytes,
            store_throttled: requests.throttled,
            replicated_bytes: dataset.copies.replicated(),
            store_gets: requests.gets,
            store_lists: requests.lists,
            store_heads: requests.heads,
            store_errors: requests.errors,
            evicted_bytes: usage.evicted_bytes,
            expired_bytes: usage.expired_bytes,
            bypassed_bytes: m.bypassed_bytes.get(),
            corrupt_blocks: usage.corrupt_blocks,
            served_bytes: m.served_bytes.get(),
            scan: dataset.scan.borrow().clone().map(|scan| worker::ScanProgress { synced_ms, ..scan }),
            source_problem: problem.as_ref().map(|problem| problem.message.clone()).unwrap_or_default(),
            version_conflicts: m.version_conflicts.get(),
            source_problem_reason: problem.map(|problem| problem.reason).unwrap_or_default(),
            volume_shape: shape.into(),
            runs: dataset.runs.to_wire(),
            listing_generation: dataset.index.listing_generation(),
        }
    }
}

/// A worker that serves.
pub struct RunningWorker {
    worker: Arc<Worker>,
    metadata: Arc<Index>,
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    control: JoinHandle<()>,
}

impl RunningWorker {
    /// Starts a worker; it serves when this returns.
    pub async fn start(options: WorkerOptions) -> anyhow::Result<Self> {
        anyhow::ensure!(!options.name.is_empty(), "a worker needs a name");
        let key = read_key(&options.key_file)?;
        let (table, runtime) = present(read_table(&options.table))?.unwrap_or_default();
        let configs = present(read_datasets(&options.datasets))?;
        let listener =
            TcpListener::bind(options.listen).await.with_context(|| format!("listening on {}", options.listen))?;
        let address = listener.local_addr()?;
        let metrics_listener = match options.metrics_listen {
            Some(address) => Some(TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?),
            None => None,
        };
        let metrics_address = metrics_listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let (store, metadata) = open_stores(&options).await?;

        let stop = CancellationToken::new();
        let metrics = Arc::new(Metrics::new());
        let (conflicts, conflicts_queue) = mpsc::channel(notices::CONFLICTS);
        let members = Members::new(options.name.clone(), key.clone(), table, runtime);
        let empty = store.totals().chunks == 0;
        let peers = Peers::new(options.name.clone(), key.clone(), members.subscribe(), empty);
        let memory = options.memory_budget;
        let engine = FillEngine::new(store.clone(), peers, memory, conflicts, metrics.clone(), stop.child_token());
        let client_config = ClientConfig {
            name: options.name.clone(),
            key: key.clone(),
            memory: MemoryBudget::new(WALK_BUDGET),
            deadline: WALK_DEADLINE,
            max_read_ahead: 0,
            connections_per_worker: 1,
        };
        let worker = Arc::new(Worker {
            key,
            incarnation: rand::random::<u64>().max(1),
            started: Instant::now(),
            store: store.clone(),
            engine,
            datasets: Datasets::new(options.limits.clone(), store, metadata.clone(), metrics.clone()).await?,
            client: Client::new(client_config, members.subscribe()),
            members,
            metrics,
            loads: Loads::default(),
            heat: Heat::default(),
            newer_table: Notify::new(),
            loaded: SetOnce::new(),
            draining: AtomicBool::new(false),
            stop,
            tasks: TaskTracker::new(),
            options,
        });
        let (control_queue, control_sockets) = mpsc::channel(CONTROL_QUEUE);
        worker.tasks.spawn(listener::run(worker.clone(), listener, control_queue));
        let control = tokio::spawn(grpc::serve(worker.clone(), control_sockets));
        worker.tasks.spawn(notices::rechecks(worker.clone(), conflicts_queue));
        worker.tasks.spawn(reload::table(worker.clone()));
        worker.tasks.spawn(reload::datasets(worker.clone(), configs));
        worker.tasks.spawn(reload::wipe(worker.clone()));
        worker.tasks.spawn(copies::count(worker.clone()));
        if let Some(listener) = metrics_listener {
            worker.tasks.spawn(http::run(worker.clone(), listener));
        }
        info!(worker = %worker.options.name, %address, "serving");
        Ok(Self { worker, metadata, address, metrics_address, control })
    }

    /// Where data and control connections are accepted.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are answered.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Goes on serving, though not ready any more, for as long as the options say, or until the table gives this worker
    /// no share, others were offered what is pinned here, and nobody asks it for anything.
    pub async fn drain(&self) {
        let worker = &self.worker;
        worker.draining.store(true, Ordering::Release);
        let until = Instant::now() + worker.options.drain;
        let (mut last, mut quiet) = (worker.activity(), Instant::now());
        while Instant::now() < until {
            sleep(DRAIN_LOOK).await;
            let now = worker.activity();
            if now != last || now.0 > 0 {
                (last, quiet) = (now, Instant::now());
            }
            let epoch = worker.members.table().epoch;
            let offered = || worker.datasets.all().iter().all(|dataset| dataset.copies.were_offered(epoch));
            if !worker.members.counts_on_self() && quiet.elapsed() >= DRAIN_QUIET && offered() {
                break;
            }
        }
    }

    /// Stops serving, in order, within about 20 s.
    pub async fn stop(self) -> anyhow::Result<()> {
        let Self { worker, metadata, address: _, metrics_address: _, control } = self;
        info!(worker = %worker.options.name, "stopping");
        worker.stop.cancel();
        worker.tasks.close();
        if timeout(STOP_TASKS, worker.tasks.wait()).await.is_err() {
            warn!("tasks were still running after {STOP_TASKS:?}");
        }
        control.abort();
        let ended = timeout(STOP_WORK, async {
            worker.engine.drained().await;
            worker.datasets.close().await;
        });
        if ended.await.is_err() {
            warn!("fetches or listings were still running after {STOP_WORK:?}");
        }
        let store = worker.store.clone();
        drop(worker);
        // Dropping the index flushes it, when its last user is gone.
        tokio::task::spawn_blocking(move || {
            store.close();
            drop(metadata);
        })
        .await?;
        Ok(())
    }
}

/// Runs a worker until `shutdown` is cancelled; `ready` hears where it listens, once it serves the datasets that it was
/// given (or is slow to: clients go elsewhere for those).
pub async fn run(
    options: WorkerOptions,
    shutdown: CancellationToken,
    ready: oneshot::Sender<SocketAddr>,
) -> anyhow::Result<()> {
    let given = options.datasets.exists();
    let running = RunningWorker::start(options).await?;
    if given {
        let loaded = shutdown.run_until_cancelled(timeout(LOADED, running.worker.loaded.wait())).await;
        if let Some(Err(_)) = loaded {
            warn!("the datasets were not loaded within {LOADED:?}");
        }
    }
    // Nobody has to listen.
    let _ = ready.send(running.address());
    shutdown.cancelled().await;
    running.drain().await;
    running.stop().await
}

/// What a file holds, if it is there.
fn present<T>(read: Result<T, ConfigError>) -> Result<Option<T>, ConfigError> {
    match read {
        Err(error) if error.is_missing() => Ok(None),
        read => read.map(Some),
    }
}

/// Whether this process can write to the cache directory, said so that somebody can mend it.
fn check_writable(directory: &Path) -> anyhow::Result<()> {
    let checked = fs::create_dir_all(directory)
        .and_then(|()| Ok(rustix::fs::access(directory, Access::WRITE_OK | Access::READ_OK | Access::EXEC_OK)?));
    checked.with_context(|| {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        format!(
            "cache directory {} is not writable by uid {uid}, gid {gid} (make it theirs: chown {uid}:{gid}; in a pod, \
             an emptyDir is with fsGroup)",
            directory.display()
        )
    })
}

async fn open_stores(options: &WorkerOptions) -> anyhow::Result<(Arc<ChunkStore>, Arc<Index>)> {
    let chunks = StoreOptions {
        dir: options.cache_dir.join("chunks"),
        owner: options.owner.clone(),
        capacity: options.capacity,
        high_percent: options.high_percent,
        low_percent: options.low_percent,
    };
    let (cache, metadata) = (options.cache_dir.clone(), options.cache_dir.join("metadata"));
    tokio::task::spawn_blocking(move || {
        check_writable(&cache)?;
        let store = ChunkStore::open(chunks).context("opening the chunk store")?;
        let index = Index::open(&metadata).context("opening the metadata index")?;
        Ok((store, index))
    })
    .await?
}
