//! A worker in a pod: `forebay worker --kubernetes`, as the operator's StatefulSet starts it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use forebay_cache_worker::{DatasetsFile, WorkerOptions};
use forebay_under_store::Limits;
use forebay_worker_agent::{AgentOptions, DATASETS, TABLE};

use crate::up::{DatasetRecord, Record, RuntimeRecord};

/// Where the agent keeps what the API said, unless it is told otherwise.
const STATE: &str = "/run/forebay";
/// Where the key of the runtime is mounted.
const KEY: &str = "/etc/forebay/key/key";

/// Arguments of `worker --kubernetes`.
#[derive(Clone, Debug, Args)]
pub struct PodArgs {
    /// Learn from the Kubernetes API what to serve and who the workers are
    #[arg(long)]
    kubernetes: bool,
    /// The pod's name: the worker's name in the table
    #[arg(long, required_if_eq("kubernetes", "true"), requires = "kubernetes", value_name = "NAME")]
    name: Option<String>,
    /// The pod's namespace
    #[arg(long, required_if_eq("kubernetes", "true"), requires = "kubernetes", value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Name of its CacheRuntime
    #[arg(long, required_if_eq("kubernetes", "true"), requires = "kubernetes", value_name = "NAME")]
    runtime: Option<String>,
    /// Where clients and other workers connect
    #[arg(long, default_value = "0.0.0.0:7400", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Where /healthz, /readyz and /metrics are answered
    #[arg(long, default_value = "0.0.0.0:7401", value_name = "ADDRESS")]
    http: SocketAddr,
    /// Directory of the cache; it has to be writable
    #[arg(long, default_value = "/var/lib/forebay/cache", value_name = "DIR")]
    cache_dir: PathBuf,
    /// Bytes that the cache may take
    #[arg(long, required_if_eq("kubernetes", "true"), requires = "kubernetes", value_name = "BYTES")]
    capacity: Option<u64>,
    /// Percent of the capacity above which room is made
    #[arg(long, default_value_t = 95, value_parser = clap::value_parser!(u8).range(1..=100), value_name = "PERCENT")]
    high_percent: u8,
    /// Percent of the capacity at which making room ends
    #[arg(long, default_value_t = 85, value_parser = clap::value_parser!(u8).range(1..=99), value_name = "PERCENT")]
    low_percent: u8,
    /// The runtime's key: 64 hexadecimal digits
    #[arg(long, default_value = KEY, value_name = "FILE")]
    key_file: PathBuf,
    /// Where the agent keeps what the API said: in memory, for it holds credentials
    #[arg(long, default_value = STATE, value_name = "DIR")]
    state_dir: PathBuf,
    /// Memory for file contents, in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=1_048_576), value_name = "MIB")]
    memory: u64,
    /// How long it goes on serving after SIGTERM, at most, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600), value_name = "SECONDS")]
    drain: u64,
    /// Requests under way at a source at most [default: 64]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096), value_name = "N")]
    source_concurrency: Option<u32>,
    /// Requests sent to a source in a second at most [default: no limit]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    source_requests_per_second: Option<u32>,
}

/// What a verb that runs in a worker's pod needs to know of it: `runtime` is `NAMESPACE/NAME`.
pub fn record(runtime: &str) -> anyhow::Result<Record> {
    let (namespace, name) = runtime.split_once('/').context("--in-pod is NAMESPACE/NAME")?;
    let path = Path::new(STATE).join(DATASETS);
    let text = std::fs::read(&path).with_context(|| format!("no worker runs here: reading {}", path.display()))?;
    let file: DatasetsFile = serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
    let datasets = file.datasets.into_iter().map(|dataset| DatasetRecord {
        id: dataset.id,
        namespace: dataset.namespace,
        name: dataset.name,
        runtime: name.to_owned(),
        mount: None,
    });
    let runtime = RuntimeRecord {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        table: Path::new(STATE).join(TABLE),
        key: KEY.into(),
    };
    Ok(Record { pid: 1, runtimes: vec![runtime], datasets: datasets.collect() })
}

impl PodArgs {
    /// What the worker and its agent are told.
    pub fn options(&self) -> anyhow::Result<(WorkerOptions, AgentOptions)> {
        let needed = |value: &Option<String>, flag: &str| value.clone().with_context(|| format!("{flag} is missing"));
        let name = needed(&self.name, "--name")?;
        let namespace = needed(&self.namespace, "--namespace")?;
        let runtime = needed(&self.runtime, "--runtime")?;
        let usual = Limits::default();
        let worker = WorkerOptions {
            owner: format!("{namespace}/{runtime}/{name}"),
            name,
            listen: self.listen,
            metrics_listen: Some(self.http),
            cache_dir: self.cache_dir.clone(),
            capacity: self.capacity.context("--capacity is missing")?,
            high_percent: self.high_percent,
            low_percent: self.low_percent,
            table: self.state_dir.join(TABLE),
            datasets: self.state_dir.join(DATASETS),
            key_file: self.key_file.clone(),
            limits: Limits {
                concurrency: self.source_concurrency.map_or(usual.concurrency, |concurrency| concurrency as usize),
                requests_per_second: self.source_requests_per_second.or(usual.requests_per_second),
                ..usual
            },
            memory_budget: self.memory << 20,
            drain: Duration::from_secs(self.drain),
            ..WorkerOptions::default()
        };
        Ok((worker, AgentOptions { namespace, runtime, state_dir: self.state_dir.clone() }))
    }
}
