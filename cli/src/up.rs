//! `forebay up`: the Datasets of manifests, served on one machine.
//!
//! This process is the keeper of the mounts and the supervisor of the workers and daemons. It owns nothing that a reader
//! needs byte by byte, so it has little reason to die; when it does, its children die with it (parent-death signal), the
//! mounts answer ENOTCONN, and the next start takes everything away.
//!
//! Order of start: lock, clean up after a predecessor, workers, table, daemons, mounts, record. Teardown is the reverse.

mod children;
mod control;
mod instance;
mod layout;
mod policies;
mod privileges;
mod teardown;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use clap::Args;
use forebay_api::{
    Quantity, QuantityError,
    manifest::{self, Manifest},
};
use forebay_cache_worker::WorkerOptions;
use forebay_client::MIN_BUDGET;
use forebay_fuse::{DaemonOptions, NodeCacheOptions, default_memory_budget};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use self::{
    children::ChildArgs,
    control::ask,
    layout::{DatasetRecord, Layout, Record, RuntimeRecord, read_key},
};
use self::{instance::Instance, privileges::RunAs};
use crate::{
    args::{Global, Output},
    output,
    pod::PodArgs,
};

/// Arguments of `up`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Manifests: CacheRuntimes, Datasets, the Secrets they name, and PreloadPolicies
    #[arg(long, short, required = true, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Mount each Dataset at DIR/NAME
    #[arg(long, value_name = "DIR")]
    mount: PathBuf,
    /// As root: run workers and daemons as this user, NAME or UID:GID [default: who called sudo, else nobody]
    #[arg(long, value_name = "USER")]
    run_as: Option<RunAs>,
    /// How long a read, a look-up or a listing may take until the program gets EIO, in seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    deadline: u64,
    /// Memory for reads under way and read-ahead of each Dataset, in MiB
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(8..=65536), value_name = "MIB")]
    memory: u64,
    /// As root: disk for whole files of 1Mi and more, which the kernel reads without any daemon; 0 for none
    #[arg(long, default_value = "10Gi", value_parser = quantity_or_none, value_name = "QUANTITY")]
    node_cache: u64,
    /// Requests that each worker has under way at a source at most [default: 64]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096), value_name = "N")]
    source_concurrency: Option<u32>,
    /// Requests that each worker sends to a source in a second at most [default: no limit]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    source_requests_per_second: Option<u32>,
    /// Let other users read the mounts when started without root (needs user_allow_other in /etc/fuse.conf)
    #[arg(long)]
    allow_other: bool,
}

/// Arguments of the hidden `worker`.
#[derive(Clone, Debug, Args)]
pub struct WorkerChildArgs {
    #[command(flatten)]
    pub child: ChildArgs,
    /// WorkerOptions as JSON
    #[arg(long, required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    options: Option<PathBuf>,
    #[command(flatten)]
    pod: PodArgs,
}

/// Arguments of the hidden `fuse`.
#[derive(Clone, Debug, Args)]
pub struct FuseChildArgs {
    #[command(flatten)]
    pub child: ChildArgs,
    /// The keeper's socket; without --parent it is waited for
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Where /healthz, /readyz and /metrics are answered [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Memory for file contents over all volumes, as 512Mi [default: half of the container's limit]
    #[arg(long, value_parser = memory_budget, value_name = "QUANTITY")]
    memory_budget: Option<usize>,
    /// Directory of its own for whole files of 1Mi and more, which the kernel reads without this daemon [default: none]
    #[arg(long, requires = "node_cache_capacity", value_name = "DIR")]
    node_cache: Option<PathBuf>,
    /// Disk that they may take, as 20Gi
    #[arg(long, requires = "node_cache", value_parser = quantity, value_name = "QUANTITY")]
    node_cache_capacity: Option<u64>,
    /// Part of that file system that stays free; a kubelet evicts pods below 10
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u8).range(0..=99), value_name = "PERCENT")]
    node_cache_free: u8,
    /// Each volume has the memory that its configuration says, instead of a part of one budget
    #[arg(long, conflicts_with = "memory_budget")]
    memory_per_volume: bool,
}

pub fn quantity(text: &str) -> Result<u64, String> {
    Quantity::new(text).bytes().map_err(|error| error.to_string())
}

/// The same, or 0 for none.
pub fn quantity_or_none(text: &str) -> Result<u64, String> {
    match Quantity::new(text).bytes() {
        Err(QuantityError::Zero) => Ok(0),
        bytes => bytes.map_err(|error| error.to_string()),
    }
}

fn memory_budget(text: &str) -> Result<usize, String> {
    let bytes = usize::try_from(quantity(text)?).map_err(|_| "more than this machine can address".to_owned())?;
    if bytes < MIN_BUDGET {
        return Err(format!("at least {}Mi are needed: a few requests of 1Mi", MIN_BUDGET >> 20));
    }
    Ok(bytes)
}

/// How long a worker has to flush its index after SIGTERM.
const WORKER_GRACE: Duration = Duration::from_secs(10);
/// How long a daemon has after SIGTERM, when its mounts are gone.
const DAEMON_GRACE: Duration = Duration::from_secs(3);
/// How long a mount may stay busy before it is taken from its users.
const UNMOUNT_GRACE: Duration = Duration::from_secs(5);

/// Serves until SIGINT or SIGTERM.
pub async fn run(global: Global, args: UpArgs) -> anyhow::Result<ExitCode> {
    let manifest = match manifest::load(&args.file) {
        Ok(manifest) => manifest,
        Err(errors) => {
            errors.iter().for_each(|error| eprintln!("{error}"));
            bail!("{} error(s) in the manifests; nothing was started", errors.len());
        }
    };
    check(&manifest)?;
    // Registered first: an early Ctrl-C must find the way out that cleans up.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let layout = Layout::new(global.state_dir.clone())?;
    let mut instance = Instance::prepare(layout, &args)?;
    let started = tokio::select! {
        started = instance.start(&manifest, &args) => started,
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted while starting")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated while starting")),
    };
    if started.is_ok() {
        announce(&global, &instance)?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        info!("stopping");
    }
    instance.stop().await;
    started.map(|()| ExitCode::SUCCESS)
}

/// What `up` asks of manifests beyond what the objects themselves must be.
fn check(manifest: &Manifest) -> anyhow::Result<()> {
    if manifest.datasets.is_empty() {
        bail!("the manifests declare no Dataset; add one (see examples/quickstart.yaml)");
    }
    for (index, dataset) in manifest.datasets.iter().enumerate() {
        if let Some(other) = manifest.datasets[..index].iter().find(|other| other.name == dataset.name) {
            bail!(
                "Datasets {}/{} and {}/{} would both be mounted at DIR/{}; serve them by two instances",
                other.namespace,
                other.name,
                dataset.namespace,
                dataset.name,
                dataset.name
            );
        }
    }
    Ok(())
}

fn announce(global: &Global, instance: &Instance) -> anyhow::Result<()> {
    let record = instance.record();
    match global.output {
        Output::Json => output::json_line(&json!({
            "ready": true,
            "stateDir": instance.layout().state(),
            "datasets": record.datasets,
        })),
        Output::Table => {
            for dataset in &record.datasets {
                if let Some(mount) = &dataset.mount {
                    println!("{} is mounted at {}", dataset.name, mount.display());
                }
            }
            println!("serving; Ctrl-C stops");
            Ok(())
        }
    }
}

impl WorkerChildArgs {
    /// Runs a cache worker until SIGTERM.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (options, agent): (WorkerOptions, _) = match &self.options {
            Some(file) => {
                let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
                (serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))?, None)
            }
            None => {
                let (options, agent) = self.pod.options()?;
                (options, Some(agent))
            }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(async {
            let stop = CancellationToken::new();
            let (ready, address) = tokio::sync::oneshot::channel::<std::net::SocketAddr>();
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let token = stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                token.cancel();
            });
            tokio::spawn(async move {
                if let Ok(address) = address.await {
                    children::say_ready(&address.to_string());
                }
            });
            let mut worker = std::pin::pin!(forebay_cache_worker::run(options, stop.clone(), ready));
            let agent = async {
                match agent {
                    Some(agent) => forebay_worker_agent::run(agent).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = &mut worker => ended?,
                failed = agent => {
                    // In order, for others may count on it; then the reason is told.
                    stop.cancel();
                    worker.await?;
                    failed?;
                }
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

impl FuseChildArgs {
    /// Runs a FUSE daemon until SIGTERM.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Self {
            child,
            socket,
            http,
            memory_budget,
            memory_per_volume,
            node_cache,
            node_cache_capacity,
            node_cache_free,
        } = self;
        let usual = DaemonOptions::new(socket);
        let memory = memory_budget.unwrap_or_else(default_memory_budget);
        forebay_fuse::daemon::run(DaemonOptions {
            // In a pod the keeper comes when its own pod does; a child of `up` has no reason to wait for long.
            connect_deadline: usual.connect_deadline.filter(|_| child.has_parent()),
            http,
            memory: (!memory_per_volume).then_some(memory),
            node_cache: node_cache.zip(node_cache_capacity).map(|(dir, capacity)| NodeCacheOptions {
                dir,
                capacity,
                free_percent: node_cache_free,
            }),
            ..usual
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_budget_is_a_quantity_that_suffices() {
        assert_eq!(memory_budget("512Mi"), Ok(512 << 20));
        assert!(memory_budget("1Mi").unwrap_err().contains("4Mi"));
        assert!(memory_budget("much").is_err());
    }

    #[test]
    fn a_node_cache_may_be_none() {
        assert_eq!((quantity_or_none("0"), quantity_or_none("2Gi")), (Ok(0), Ok(2 << 30)));
        assert!(quantity("0").is_err() && quantity_or_none("-1").is_err());
    }
}
