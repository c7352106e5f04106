//! The daemon: connects to a keeper, stands by, serves the volumes that it is given.
//!
//! A standby is warm: its runtime runs, and for every volume that it may have to serve, the client exists and has its
//! first connections. What is left for a take-over is mapping the tables and attaching the session, milliseconds.
//!
//! The process is replaceable at any moment: the kernel sends again to its successor whatever it had taken. It outlives the
//! keeper, too: without one it serves on, and what it holds is what the next keeper begins with. So on SIGTERM it first
//! waits until a keeper says that it holds everything.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use forebay_client::MemoryBudget;
use forebay_keeper::{
    Health,
    daemon::{Attach, DaemonLink, DaemonOptions as LinkOptions, LinkError, Message},
};
use futures::{StreamExt, stream::BoxStream};
use tokio::{runtime::Runtime, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    adapter::Adapter,
    config::{ConfigError, DatasetRef, VolumeConfig},
    fs::{FileSystem, Options, Tables},
    invalidation::follow,
    local::{Desk, LocalFiles},
    metrics::{Metrics, VolumeSource, carry_over},
    node_cache::{NodeCache, NodeCacheOptions},
    notices::Notices,
    remote::Workers,
    session::{self, Running},
    tree::Tree,
};

/// How often the loop looks at anything but messages.
const TICK: Duration = Duration::from_millis(50);
/// How often the runtime shows that it makes progress; the keeper wants to see it every second.
const PROGRESS: Duration = Duration::from_millis(100);
/// How long a daemon that was told to end waits for a keeper that has everything: less than the 30 s that Kubernetes gives.
const LEAVE_PATIENCE: Duration = Duration::from_secs(25);
/// The first pause between two attempts to reach a keeper, and the longest.
const CONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// At least this many threads, so that one that computes (checksums) does not hold the others.
const MIN_THREADS: usize = 2;

/// How a daemon runs.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// The keeper's socket.
    pub socket: PathBuf,
    /// For the keeper's status and for logs.
    pub name: String,
    /// How long to wait for the keeper to listen; `None`: for ever.
    pub connect_deadline: Option<Duration>,
    /// How long to go on after SIGTERM until a keeper has taken back what is held here. There is nothing to wait for when
    /// nothing is held.
    pub leave_patience: Duration,
    /// Where the volumes' numbers can be read while the daemon runs.
    pub metrics: Metrics,
    /// Where they are shown over HTTP as well.
    pub http: Option<SocketAddr>,
    /// Where whole files are kept on this node; without it, none are.
    pub node_cache: Option<NodeCacheOptions>,
    /// Memory for file contents over all volumes, in bytes. `None`: each volume has what its configuration says.
    pub memory: Option<usize>,
}

impl DaemonOptions {
    /// For a keeper at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            name: format!("forebay-fuse-{}", std::process::id()),
            connect_deadline: Some(Duration::from_secs(10)),
            leave_patience: LEAVE_PATIENCE,
            metrics: Metrics::default(),
            http: None,
            node_cache: None,
            memory: None,
        }
    }
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No runtime could be made.
    #[error("the runtime cannot start")]
    Runtime(#[source] io::Error),
    /// Nothing can be shown over HTTP.
    #[error("cannot listen on {address}")]
    Http {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There never was a keeper.
    #[error(transparent)]
    Keeper(#[from] LinkError),
    /// A session ended while its volume was still mounted. The process must end, so that a standby takes over.
    #[error("the session of volume {volume} ended: {reason}")]
    Session {
        /// Which.
        volume: String,
        /// Why.
        reason: String,
    },
}

/// Where the trees of volumes come from.
pub trait Volumes {
    /// Their kind.
    type Tree: Tree;

    /// The tree of a volume; makes no request. Called within the runtime.
    fn open(&mut self, config: &VolumeConfig) -> Result<Self::Tree, ConfigError>;

    /// Numbers of a tree's own, for [`Metrics`].
    fn metrics(tree: &Self::Tree) -> Option<forebay_client::ClientMetrics>;
}

/// Serves volumes whose trees are in cache workers, until the keeper says stop, SIGTERM or SIGINT.
///
/// **The caller must exit the process when this returns.** Its threads still serve, so that no request is answered with
/// an error because its daemon leaves; the keeper gives the mounts to the next daemon when this process is gone.
pub fn run(options: DaemonOptions) -> Result<(), DaemonError> {
    let memory = options.memory.map(MemoryBudget::new);
    options.metrics.set_memory(memory.clone());
    run_with(options, Workers { memory })
}

/// [`run`] with trees from elsewhere.
pub fn run_with<V: Volumes>(options: DaemonOptions, volumes: V) -> Result<(), DaemonError> {
    // The budget belongs to whoever makes the trees.
    let DaemonOptions { socket, name, connect_deadline, leave_patience, metrics, http, node_cache, memory: _ } =
        options;
    let threads = std::thread::available_parallelism().map_or(MIN_THREADS, |count| count.get().max(MIN_THREADS));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("forebay-fuse")
        .enable_all()
        .build()
        .map_err(DaemonError::Runtime)?;
    let stop = Arc::new(AtomicBool::new(false));
    runtime.block_on(async { spawn_signals(&stop) }).map_err(DaemonError::Runtime)?;
    if let Some(address) = http {
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address));
        let listener = listener.map_err(|source| DaemonError::Http { address, source })?;
        // It is never stopped: like everything here it ends with the process.
        runtime.spawn(forebay_exposition::serve(listener, Arc::new(metrics.clone()), CancellationToken::new()));
    }
    let progress = Arc::new(AtomicU64::new(0));
    runtime.spawn(count_progress(progress.clone()));
    let options = || {
        let progress = progress.clone();
        let progress = Box::new(move || progress.load(Ordering::Relaxed));
        LinkOptions { name: name.clone(), progress, deadline: Duration::ZERO }
    };
    let Some(link) = connect(&socket, options, connect_deadline, &stop)? else { return Ok(()) };
    let node_cache = node_cache.map(NodeCache::new);
    metrics.set_node_cache(node_cache.clone());
    let desk = Desk::new(link.backings());
    let mut daemon = Daemon { runtime, link, leave_patience, volumes, metrics, node_cache, desk, held: HashMap::new() };
    let result = daemon.serve(&stop);
    // Everything is left to the exit. Ending the runtime would drop requests, and a request that is dropped is answered
    // with an error; one that is merely taken is sent again to the next daemon. And as long as the link stands, the
    // keeper waits: it hangs up when the last thread of this process is gone.
    std::mem::forget(daemon);
    result
}

/// Connects as soon as there is a keeper; `None` when it is to stop before.
fn connect(
    socket: &Path,
    options: impl Fn() -> LinkOptions,
    deadline: Option<Duration>,
    stop: &AtomicBool,
) -> Result<Option<DaemonLink>, LinkError> {
    let began = Instant::now();
    let mut pause = CONNECT_PAUSE.0;
    let mut told = false;
    while !stop.load(Ordering::Relaxed) {
        let error = match DaemonLink::connect(socket, options()) {
            Ok(link) => return Ok(Some(link)),
            Err(error) => error,
        };
        if deadline.is_some_and(|deadline| began.elapsed() >= deadline) {
            return Err(error);
        }
        if !std::mem::replace(&mut told, true) {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::info!(socket = %socket.display(), %error, cause, "waiting for a keeper");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(CONNECT_PAUSE.1);
    }
    Ok(None)
}

fn spawn_signals(stop: &Arc<AtomicBool>) -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let stop = stop.clone();
        tokio::spawn(async move {
            if signals.recv().await.is_some() {
                stop.store(true, Ordering::Relaxed);
            }
        });
    }
    Ok(())
}

/// Passes on how a volume is, for ever.
async fn follow_health(mut states: BoxStream<'static, Health>, told: watch::Sender<Option<Health>>) {
    while let Some(health) = states.next().await {
        told.send_replace(Some(health));
    }
    // Whoever has nothing more to say stays as he said.
    std::future::pending().await
}

async fn count_progress(progress: Arc<AtomicU64>) {
    let mut ticks = tokio::time::interval(PROGRESS);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        progress.fetch_add(1, Ordering::Relaxed);
    }
}

/// A volume, in one of its two states.
enum Volume<T: Tree> {
    Prepared { encoded: Vec<u8>, config: VolumeConfig, tree: T },
    Attached { running: Running, tasks: Vec<JoinHandle<()>>, health: watch::Receiver<Option<Health>> },
}

struct Daemon<V: Volumes> {
    runtime: Runtime,
    link: DaemonLink,
    leave_patience: Duration,
    volumes: V,
    metrics: Metrics,
    node_cache: Option<NodeCache>,
    desk: Desk,
    held: HashMap<String, Volume<V::Tree>>,
}

/// Why a volume was not attached.
#[derive(Debug, thiserror::Error)]
enum AttachFailure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Tables(#[from] forebay_keeper::tables::AttachError),
    #[error("the session cannot start: {0}")]
    Session(#[from] io::Error),
}

impl<V: Volumes> Daemon<V> {
    fn serve(&mut self, stop: &AtomicBool) -> Result<(), DaemonError> {
        let mut leaving: Option<Instant> = None;
        loop {
            self.metrics.set_linked(self.link.is_connected());
            if stop.load(Ordering::Relaxed) {
                let since = *leaving.get_or_insert_with(Instant::now);
                if self.link.leave() {
                    break;
                }
                if since.elapsed() >= self.leave_patience {
                    tracing::warn!("no keeper has taken back what is held here: its mounts may end now");
                    break;
                }
            }
            match self.link.next_message(Some(TICK)) {
                None => {
                    self.look_after_sessions()?;
                    self.tell_health();
                }
                Some(Message::Role(role)) => tracing::info!(?role, "role"),
                Some(Message::Prepare { volume, config }) => {
                    // A standby that cannot prepare will say why when it has to attach.
                    if let Err(error) = self.prepare(&volume, config) {
                        tracing::warn!(volume, %error, "the volume cannot be prepared");
                    }
                }
                Some(Message::Attach(attach)) => {
                    let (volume, generation) = (attach.volume.clone(), attach.generation);
                    match self.attach(attach) {
                        Ok(()) => {
                            self.link.attached(&volume, generation);
                            tracing::info!(volume, generation, "attached");
                        }
                        Err(error) => {
                            tracing::error!(volume, generation, %error, "the volume cannot be attached");
                            self.link.attach_failed(&volume, generation, &error.to_string());
                        }
                    }
                }
                Some(Message::Detach { volume }) => self.detach(&volume),
                Some(Message::Backing { volume, node, result }) => self.desk.answered(volume, node, &result),
                Some(Message::Go) if leaving.is_some() => break,
                Some(Message::Go) => tracing::warn!("may go without having asked"),
                Some(Message::Stop) => break,
            }
        }
        tracing::info!("stopping");
        Ok(())
    }

    fn prepare(&mut self, volume: &str, encoded: Vec<u8>) -> Result<(), ConfigError> {
        match self.held.get(volume) {
            Some(Volume::Attached { .. }) => return Ok(()),
            Some(Volume::Prepared { encoded: known, .. }) if *known == encoded => return Ok(()),
            _ => {}
        }
        let (config, tree) = self.open(&encoded)?;
        self.held.insert(volume.to_owned(), Volume::Prepared { encoded, config, tree });
        Ok(())
    }

    fn open(&mut self, encoded: &[u8]) -> Result<(VolumeConfig, V::Tree), ConfigError> {
        let config = VolumeConfig::decode(encoded)?;
        let _context = self.runtime.enter();
        let tree = self.volumes.open(&config)?;
        Ok((config, tree))
    }

    fn attach(&mut self, attach: Attach) -> Result<(), AttachFailure> {
        let Attach { volume, generation: _, first, fuse, init, config: encoded, tables } = attach;
        let (config, tree) = match self.held.remove(&volume) {
            Some(Volume::Prepared { encoded: known, config, tree }) if known == encoded => (config, tree),
            other => {
                close(other);
                self.open(&encoded)?
            }
        };
        let tables = tables.open()?;
        let tables = Tables {
            nodes: Arc::new(tables.nodes),
            opens: Arc::new(tables.opens),
            counters: Arc::new(tables.counters),
        };
        let notices = Arc::new(Notices::new());
        let options = Options { ttl: config.ttl(), directory_time_ns: config.mounted_at_ns };
        let mut fs = FileSystem::new(tree, tables, notices.clone(), options);
        if let Some(cache) = &self.node_cache {
            let opens = &fs.tables().opens;
            let local = LocalFiles::new(volume.clone(), cache.clone(), self.desk.clone(), opens);
            if let DatasetRef::Id(dataset) = config.dataset {
                let _context = self.runtime.enter();
                local.is_of(dataset);
            }
            fs = fs.with_local(local);
        }
        let fs = Arc::new(fs);
        let adapter = Adapter::new(fs.clone(), self.runtime.handle().clone(), config.deadline());
        let changes = {
            let _context = self.runtime.enter();
            fs.tree().changes()
        };
        let running = session::attach(fs.clone(), adapter, notices.clone(), fuse, &init, first)?;
        let (health_sender, health) = watch::channel(None);
        let source = VolumeSource::new(config.name, health.clone(), &fs, &notices, |fs| V::metrics(fs.tree()));
        self.metrics.add(&volume, source);
        let tasks = vec![
            self.runtime.spawn({
                let fs = fs.clone();
                async move { follow(&fs, changes, &notices).await }
            }),
            self.runtime.spawn(carry_over(fs.clone(), V::metrics)),
            self.runtime.spawn({
                let fs = fs.clone();
                async move { follow_health(fs.tree().health(), health_sender).await }
            }),
            self.runtime.spawn(async move { fs.maintain().await }),
        ];
        self.held.insert(volume, Volume::Attached { running, tasks, health });
        Ok(())
    }

    fn detach(&mut self, volume: &str) {
        self.metrics.remove(volume);
        close(self.held.remove(volume));
        tracing::info!(volume, "detached");
    }

    /// Tells the keeper how volumes are, where that changed.
    fn tell_health(&mut self) {
        for (name, volume) in &mut self.held {
            let Volume::Attached { health, .. } = volume else { continue };
            if health.has_changed().unwrap_or(false)
                && let Some(health) = health.borrow_and_update().as_ref()
            {
                self.link.health(name, health);
            }
        }
    }

    /// A session ends by itself when its mount is gone; the keeper says so soon. Any other end is fatal.
    fn look_after_sessions(&mut self) -> Result<(), DaemonError> {
        let ended: Vec<String> = self
            .held
            .iter()
            .filter(|(_, volume)| match volume {
                Volume::Attached { running, .. } => running.session.is_finished(),
                Volume::Prepared { .. } => false,
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in ended {
            let Some(Volume::Attached { running, tasks, health: _ }) = self.held.remove(&name) else { continue };
            self.link.gone(&name);
            running.close();
            tasks.iter().for_each(JoinHandle::abort);
            self.metrics.remove(&name);
            match running.session.join() {
                Ok(Ok(())) => tracing::info!(volume = name, "the mount is gone"),
                // The connection was aborted: the mount is as good as gone.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ECONNABORTED) => {
                    tracing::warn!(volume = name, "the mount was aborted");
                }
                Ok(Err(error)) => return Err(DaemonError::Session { volume: name, reason: error.to_string() }),
                Err(_) => return Err(DaemonError::Session { volume: name, reason: "it panicked".to_owned() }),
            }
        }
        Ok(())
    }
}

/// Lets go of a volume: its tasks end, its session ends with the mount.
fn close<T: Tree>(volume: Option<Volume<T>>) {
    match volume {
        Some(Volume::Attached { running, tasks, health: _ }) => {
            running.close();
            tasks.iter().for_each(JoinHandle::abort);
        }
        Some(Volume::Prepared { .. }) | None => {}
    }
}
