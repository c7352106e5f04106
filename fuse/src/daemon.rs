//! The daemon: connects to a keeper, stands by, serves the volumes that it is given.
//!
//! A standby is warm: its runtime runs, and for every volume that it may have to serve, the client exists and has its
//! first connections. What is left for a take-over is mapping the tables and attaching the session, milliseconds.
//!
//! The process is replaceable at any moment: it exits on SIGTERM without ceremony, and the kernel sends again to its
//! successor whatever it had taken.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use forebay_keeper::daemon::{Attach, DaemonLink, DaemonOptions as LinkOptions, LinkError, Message};
use tokio::{runtime::Runtime, task::JoinHandle};

use crate::{
    adapter::Adapter,
    config::{ConfigError, VolumeConfig},
    fs::{FileSystem, Options, Tables},
    invalidation::follow,
    metrics::{Metrics, VolumeSource, carry_over},
    notices::Notices,
    remote::Workers,
    session::{self, Running},
    tree::Tree,
};

/// How often the loop looks at anything but messages.
const TICK: Duration = Duration::from_millis(50);
/// How often the runtime shows that it makes progress; the keeper wants to see it every second.
const PROGRESS: Duration = Duration::from_millis(100);
/// At least this many threads, so that one that computes (checksums) does not hold the others.
const MIN_THREADS: usize = 2;

/// How a daemon runs.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// The keeper's socket.
    pub socket: PathBuf,
    /// For the keeper's status and for logs.
    pub name: String,
    /// How long to wait for the keeper to listen.
    pub connect_deadline: Duration,
    /// Where the volumes' numbers can be read while the daemon runs.
    pub metrics: Metrics,
}

impl DaemonOptions {
    /// For a keeper at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            name: format!("forebay-fuse-{}", std::process::id()),
            connect_deadline: Duration::from_secs(10),
            metrics: Metrics::default(),
        }
    }
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No runtime could be made.
    #[error("the runtime cannot start")]
    Runtime(#[source] io::Error),
    /// The keeper is gone, or never was.
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
    run_with(options, Workers)
}

/// [`run`] with trees from elsewhere.
pub fn run_with<V: Volumes>(options: DaemonOptions, volumes: V) -> Result<(), DaemonError> {
    let DaemonOptions { socket, name, connect_deadline, metrics } = options;
    let threads = std::thread::available_parallelism().map_or(MIN_THREADS, |count| count.get().max(MIN_THREADS));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("forebay-fuse")
        .enable_all()
        .build()
        .map_err(DaemonError::Runtime)?;
    let stop = Arc::new(AtomicBool::new(false));
    runtime.block_on(async { spawn_signals(&stop) }).map_err(DaemonError::Runtime)?;
    let progress = Arc::new(AtomicU64::new(0));
    runtime.spawn(count_progress(progress.clone()));
    let link = DaemonLink::connect(
        &socket,
        LinkOptions { name, progress: Box::new(move || progress.load(Ordering::Relaxed)), deadline: connect_deadline },
    )?;
    let mut daemon = Daemon { runtime, link, volumes, metrics, held: HashMap::new() };
    let result = daemon.serve(&stop);
    // Everything is left to the exit. Ending the runtime would drop requests, and a request that is dropped is answered
    // with an error; one that is merely taken is sent again to the next daemon. And as long as the link stands, the
    // keeper waits: it hangs up when the last thread of this process is gone.
    std::mem::forget(daemon);
    result
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
    Attached { running: Running, tasks: Vec<JoinHandle<()>> },
}

struct Daemon<V: Volumes> {
    runtime: Runtime,
    link: DaemonLink,
    volumes: V,
    metrics: Metrics,
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
        while !stop.load(Ordering::Relaxed) {
            match self.link.next_message(Some(TICK))? {
                None => self.look_after_sessions()?,
                Some(Message::Role(role)) => tracing::info!(?role, "role"),
                Some(Message::Prepare { volume, config }) => {
                    // A standby that cannot prepare will say why when it has to attach.
                    if let Err(error) = self.prepare(&volume, config) {
                        tracing::warn!(volume, %error, "the volume cannot be prepared");
                    }
                }
                Some(Message::Attach(attach)) => {
                    let (volume, generation) = (attach.volume.clone(), attach.generation);
                    let sender = self.link.sender();
                    match self.attach(attach) {
                        Ok(()) => {
                            sender.attached(&volume, generation)?;
                            tracing::info!(volume, generation, "attached");
                        }
                        Err(error) => {
                            tracing::error!(volume, generation, %error, "the volume cannot be attached");
                            sender.attach_failed(&volume, generation, &error.to_string())?;
                        }
                    }
                }
                Some(Message::Detach { volume }) => self.detach(&volume),
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
        let fs = Arc::new(FileSystem::new(tree, tables, notices.clone(), options));
        let adapter = Adapter::new(fs.clone(), self.runtime.handle().clone(), config.deadline());
        let changes = {
            let _context = self.runtime.enter();
            fs.tree().changes()
        };
        let running = session::attach(fs.clone(), adapter, notices.clone(), fuse, &init, first)?;
        self.metrics.add(&volume, VolumeSource::new(&fs, &notices, |fs| V::metrics(fs.tree())));
        let tasks = vec![
            self.runtime.spawn({
                let fs = fs.clone();
                async move { follow(&fs, changes, &notices).await }
            }),
            self.runtime.spawn(carry_over(fs.clone(), V::metrics)),
            self.runtime.spawn(async move { fs.maintain().await }),
        ];
        self.held.insert(volume, Volume::Attached { running, tasks });
        Ok(())
    }

    fn detach(&mut self, volume: &str) {
        self.metrics.remove(volume);
        close(self.held.remove(volume));
        tracing::info!(volume, "detached");
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
            let Some(Volume::Attached { running, tasks }) = self.held.remove(&name) else { continue };
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
        Some(Volume::Attached { running, tasks }) => {
            running.close();
            tasks.iter().for_each(JoinHandle::abort);
        }
        Some(Volume::Prepared { .. }) | None => {}
    }
}
