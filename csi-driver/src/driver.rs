//! The driver as a process: directories, keeper, sockets, and how it ends.
//!
//! Ending unmounts nothing: the FUSE daemons go on serving, and the next process takes up what this one leaves.

use std::{
    fs::DirBuilder,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use forebay_keeper::{Event, Keeper, KeeperError, KeeperOptions};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;
use tracing::{debug, error, info, warn};

use crate::{
    calls::Calls,
    controller::Controller,
    http::Http,
    identity::Identity,
    metrics::Metrics,
    node::Node,
    proto::csi::{controller_server::ControllerServer, identity_server::IdentityServer, node_server::NodeServer},
    registration::{self, Registered},
    services::Services,
    socket,
    stages::{Stages, keeper_options},
    volumes::Volumes,
};

/// How long calls under way may take after SIGTERM.
const GRACE: Duration = Duration::from_secs(8);
/// How long the keeper waits, then, until daemons hold every volume. With [`GRACE`] below the 30 s that a pod has.
const LEAVE: Duration = Duration::from_secs(18);

/// How often the keeper is asked for a sign of life.
const WATCH: Duration = Duration::from_secs(5);

/// How the driver runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the node.
    pub node_id: String,
    /// The driver's socket.
    pub endpoint: PathBuf,
    /// The driver's directory.
    pub plugin_dir: PathBuf,
    /// Where the kubelet looks for plugins; `None`: it is not told.
    pub registration_dir: Option<PathBuf>,
    /// The directory of the keeper's record.
    pub state_dir: PathBuf,
    /// User of the FUSE daemons.
    pub daemon_uid: u32,
    /// The directory of their node cache.
    pub node_cache: Option<PathBuf>,
    /// How long nobody may serve a mount.
    pub abort_after: Duration,
    /// Where to answer over HTTP.
    pub http: Option<SocketAddr>,
    /// Whether there is a Controller service.
    pub controller: bool,
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(options: Options) -> anyhow::Result<()> {
    // Registered first: an early signal must find the way out that cleans up.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let starting = options.clone();
    let (keeper, events, inline) = tokio::task::spawn_blocking(move || start_keeper(&starting)).await??;
    let keeper = Arc::new(keeper);
    tokio::spawn(log_events(events));

    let metrics = Metrics::shared();
    let volumes = Arc::new(Volumes::new(Stages::new(Arc::clone(&keeper)), inline));
    let calls = Calls::new(volumes, Arc::clone(&metrics));
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());

    let (listener, name) =
        socket::listen(&options.endpoint).with_context(|| format!("listening on {}", options.endpoint.display()))?;
    let incoming = UnixListenerStream::new(listener);
    let services = services(&options, &calls);
    let serving = Server::builder().serve_with_incoming_shutdown(services, incoming, stop.clone().cancelled_owned());
    let serving = tasks.spawn(serving);
    let registered = options.registration_dir.as_deref().map(|directory| {
        let registered = Registered::default();
        let socket = registration::socket_in(directory);
        tasks.spawn(registration::run(socket, options.endpoint.clone(), registered.clone(), stop.clone()));
        registered
    });
    if let Some(address) = options.http {
        let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
        let http = Arc::new(Http { calls: calls.clone(), metrics, registered });
        tasks.spawn(forebay_exposition::serve(listener, http, stop.clone()));
    }
    let watched = watch(Arc::clone(&keeper));
    info!(endpoint = %options.endpoint.display(), "serving");

    let failed = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = serving => ended?.context("serving the driver's socket"),
        error = watched => Err(error),
    };
    info!("stopping; every mount stays");
    stop.cancel();
    drop(name);
    tasks.close();
    if timeout(GRACE, tasks.wait()).await.is_err() {
        warn!("calls are still under way after {GRACE:?}");
    }
    // What ends with it has been told: the next process mounts it again.
    match tokio::task::spawn_blocking(move || keeper.leave(LEAVE)).await? {
        Ok(()) => {}
        Err(KeeperError::Unheld(volumes)) => error!(?volumes, "no daemon holds these: their mounts end now"),
        Err(error) => error!(%error, "the keeper did not end well"),
    }
    failed
}

/// The keeper, what it has to say, and the directory for stage mounts of inline volumes.
fn start_keeper(options: &Options) -> anyhow::Result<(Keeper, mpsc::Receiver<Event>, PathBuf)> {
    let sockets = options.plugin_dir.join("keeper");
    let inline = options.plugin_dir.join("inline");
    // Daemons of another user look into that one.
    directory(&sockets, 0o755)?;
    directory(&inline, 0o700)?;
    directory(&options.state_dir, 0o700)?;
    if let Some(node_cache) = &options.node_cache {
        directory(node_cache, 0o700)?;
        chown(node_cache, Some(options.daemon_uid), None)
            .with_context(|| format!("giving {} to user {}", node_cache.display(), options.daemon_uid))?;
    }
    let keeper = KeeperOptions {
        allowed_uids: vec![options.daemon_uid],
        state_file: Some(options.state_dir.join("mounts.json")),
        abort_after: options.abort_after,
        ..keeper_options(sockets.join("keeper.sock"))
    };
    let (keeper, events, cleaned) = Keeper::start(keeper).context("starting the keeper of the mounts")?;
    for cleaned in cleaned {
        warn!(volume = cleaned.volume, target = %cleaned.target.display(), "took down a mount that was left dead");
    }
    let inline = std::fs::canonicalize(&inline).with_context(|| format!("resolving {}", inline.display()))?;
    Ok((keeper, events, inline))
}

/// A directory of that mode. Those above it are made as needed.
fn directory(path: &Path, mode: u32) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .with_context(|| format!("making the directory {}", path.display()))
}

fn services(options: &Options, calls: &Calls) -> Services {
    let identity = Identity { calls: calls.clone(), controller: options.controller };
    let node = Node { calls: calls.clone(), id: options.node_id.clone() };
    Services {
        identity: IdentityServer::new(identity),
        node: NodeServer::new(node),
        controller: options.controller.then(|| ControllerServer::new(Controller { calls: calls.clone() })),
    }
}

/// Ends when the keeper answers no more: then this process is of no use, and another one must take its place. On a thread
/// of its own, so that no number of calls under way is taken for it.
async fn watch(keeper: Arc<Keeper>) -> anyhow::Error {
    let (sender, ended) = oneshot::channel();
    let keeper = Arc::downgrade(&keeper);
    let watching = std::thread::Builder::new().name("csi-watch".to_owned()).spawn(move || {
        while let Some(keeper) = keeper.upgrade() {
            if let Err(error) = keeper.status() {
                let _ = sender.send(anyhow::Error::new(error));
                return;
            }
            drop(keeper);
            std::thread::sleep(WATCH);
        }
    });
    match watching {
        Ok(_) => ended.await.unwrap_or_else(|_| anyhow::anyhow!("nobody watches the keeper")),
        Err(error) => anyhow::Error::new(error).context("starting a thread"),
    }
}

async fn log_events(mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        match &event {
            Event::DaemonJoined { .. } | Event::Attached { .. } | Event::PredecessorGone { .. } => {
                debug!(?event, "keeper");
            }
            Event::TakenOver { .. } | Event::Resumed { .. } => info!(?event, "keeper"),
            _ => warn!(?event, "keeper"),
        }
    }
}
