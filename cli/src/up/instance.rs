//! One running instance: what was started, in order, and how it ends.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use forebay_api::manifest::{Manifest, TierVolume, ValidatedDataset, ValidatedRuntime};
use forebay_cache_worker::{DatasetConfig, DatasetsFile, SourceConfig, WorkerOptions};
use forebay_fuse::{DatasetRef, KeySource, TableSource, VolumeConfig};
use forebay_keeper::{
    Event, Keeper, KeeperError, KeeperOptions, MountInfo, MountSpec, VolumeStatus, mount::clean_stale, tables::Counter,
};
use forebay_protocol::{
    DatasetId,
    table::{Member, MemberState, WorkerTable},
};
use forebay_under_store::{Limits, S3Addressing, S3Credentials, S3Options, SourceSpec};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    DAEMON_GRACE, DatasetRecord, Layout, Record, RuntimeRecord, UNMOUNT_GRACE, UpArgs, WORKER_GRACE,
    children::{ChildSpec, ChildState, path_argument, ready, supervise},
    control,
    layout::{check_reachable, own_directory, runtime_key, state_directory, write_private},
    policies::Policies,
    privileges::{RunAs, is_root},
    teardown::{InstanceLock, Leavings},
};
use crate::session::read_table;

/// The keeper's deadlines for one mount: to resolve and to look at the target (10 s each), two runs of `fusermount3` (20 s
/// each), INIT (10 s).
const MOUNT_DEADLINE: Duration = Duration::from_secs(70);
/// Part of the node cache's file system that stays free, in percent.
const NODE_CACHE_FREE: u8 = 5;
/// Two: one serves, one stands by.
const DAEMONS: usize = 2;

/// A running instance. Dropped fields end in their order: the lock is the last.
pub struct Instance {
    layout: Layout,
    record: Record,
    run_as: Option<RunAs>,
    keeper: Option<Arc<Keeper>>,
    /// The mount that is being made.
    mounting: Option<JoinHandle<Result<MountInfo, KeeperError>>>,
    workers: Group,
    daemons: Group,
    policies: Policies,
    control: CancellationToken,
    leavings: Leavings,
    _lock: InstanceLock,
}

/// Children that are stopped together.
#[derive(Default)]
struct Group {
    stop: CancellationToken,
    states: Vec<Arc<ChildState>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Group {
    fn supervise(&mut self, spec: ChildSpec) -> mpsc::Receiver<String> {
        let (sender, receiver) = mpsc::channel(4);
        let (state, task) = supervise(spec, sender, self.stop.clone());
        self.states.push(state);
        self.tasks.push(task);
        receiver
    }

    async fn end(&mut self) {
        self.stop.cancel();
        for task in self.tasks.drain(..) {
            if let Err(error) = task.await {
                warn!(%error, "a child's supervisor failed");
            }
        }
    }
}

impl Instance {
    /// Takes the lock and cleans up after an instance that was killed.
    pub fn prepare(layout: Layout, args: &UpArgs) -> anyhow::Result<Self> {
        let run_as = match (is_root(), args.run_as) {
            (true, run_as) => Some(run_as.unwrap_or_else(RunAs::default_for_root)),
            (false, None) => None,
            (false, Some(_)) => bail!("--run-as needs root"),
        };
        state_directory(layout.state())?;
        if let Some(user) = run_as {
            check_reachable(&layout.record(), user)?;
        }
        let lock = InstanceLock::take(&layout)?;
        for cleaned in clean_stale(&layout.mounts()).context("taking down mounts of an instance that was killed")? {
            info!(?cleaned, "an instance that was killed had left a mount");
        }
        let mut leavings = Leavings::begin(layout.leavings());
        for file in [layout.record(), layout.control_socket(), layout.keeper_socket()] {
            leavings.file(file)?;
        }
        Ok(Self {
            record: Record { pid: std::process::id(), runtimes: Vec::new(), datasets: Vec::new() },
            layout,
            run_as,
            keeper: None,
            mounting: None,
            workers: Group::default(),
            daemons: Group::default(),
            policies: Policies::default(),
            control: CancellationToken::new(),
            leavings,
            _lock: lock,
        })
    }

    /// Where it keeps its state.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What it runs.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Starts everything that the manifests declare.
    pub async fn start(&mut self, manifest: &Manifest, args: &UpArgs) -> anyhow::Result<()> {
        for runtime in &manifest.runtimes {
            self.start_runtime(runtime, &manifest.datasets, args).await?;
        }
        let keeper = self.start_keeper(args)?;
        let mounted_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mount = std::path::absolute(&args.mount).with_context(|| format!("resolving {}", args.mount.display()))?;
        for dataset in &manifest.datasets {
            let target = mount.join(&dataset.name);
            self.leavings.mount_point(&target)?;
            let directory = self.layout.runtime(&dataset.namespace, &dataset.runtime);
            let id = DatasetId::local(&dataset.namespace, &dataset.name);
            let config = VolumeConfig {
                name: format!("{}/{}", dataset.namespace, dataset.name),
                budget_bytes: args.memory << 20,
                deadline_ms: args.deadline * 1000,
                mounted_at_ns: i64::try_from(mounted_at.as_nanos()).unwrap_or(i64::MAX),
                ..VolumeConfig::new(
                    DatasetRef::Id(id),
                    TableSource::File(directory.join("table.json")),
                    KeySource::File(directory.join("key")),
                )
            };
            self.mount(
                &keeper,
                MountSpec {
                    allow_other: is_root() || args.allow_other,
                    fsname: format!("forebay:{}/{}", dataset.namespace, dataset.name),
                    ..MountSpec::new(id.to_string(), &target, config.encode()?)
                },
            )
            .await?;
            self.record.datasets.push(DatasetRecord {
                id,
                namespace: dataset.namespace.clone(),
                name: dataset.name.clone(),
                runtime: dataset.runtime.clone(),
                mount: Some(target),
            });
        }
        self.policies = Policies::start(manifest, &self.record)?;
        self.serve_control(keeper)?;
        write_private(&self.layout.record(), &serde_json::to_vec_pretty(&self.record)?, None)
    }

    /// Starts the workers of a runtime and writes its table.
    async fn start_runtime(
        &mut self,
        runtime: &ValidatedRuntime,
        datasets: &[ValidatedDataset],
        args: &UpArgs,
    ) -> anyhow::Result<()> {
        let directory = self.layout.runtime(&runtime.namespace, &runtime.name);
        if let Some(runtimes) = directory.parent() {
            own_directory(runtimes, None)?;
        }
        own_directory(&directory, None)?;
        let (table, key, served) =
            (directory.join("table.json"), directory.join("key"), directory.join("datasets.json"));
        runtime_key(&key, self.run_as)?;
        let served_here = datasets
            .iter()
            .filter(|dataset| dataset.namespace == runtime.namespace && dataset.runtime == runtime.name)
            .map(|dataset| dataset_config(dataset, runtime.replicas))
            .collect();
        write_private(&served, &serde_json::to_vec_pretty(&DatasetsFile { datasets: served_here })?, self.run_as)?;
        // Epochs only grow, over restarts too: whoever still holds an old table must see that this one is newer.
        let epoch = read_table(&table).map_or(1, |old| old.epoch + 1);
        let empty = WorkerTable { epoch, members: Vec::new() };
        write_private(&table, &serde_json::to_vec_pretty(&empty)?, self.run_as)?;

        // The workers make their cache directories in it themselves: root touches nothing in a directory of theirs.
        let caches = directory.join("cache");
        own_directory(&caches, self.run_as)?;
        let mut starting = Vec::new();
        for index in 0..runtime.replicas {
            let name = format!("{}-{index}", runtime.name);
            let cache_dir = match &runtime.tier.volume {
                TierVolume::EmptyDir => caches.join(&name),
                TierVolume::HostPath(path) => {
                    let cache_dir = path.join(format!("{}.{name}", runtime.namespace));
                    own_directory(&cache_dir, self.run_as)?;
                    cache_dir
                }
            };
            if let Some(user) = self.run_as {
                check_reachable(&cache_dir.join("chunks"), user)?;
            }
            let options = WorkerOptions {
                name: name.clone(),
                listen: ([127, 0, 0, 1], 0).into(),
                metrics_listen: None,
                owner: format!("{}/{}/{name}", runtime.namespace, runtime.name),
                cache_dir,
                capacity: runtime.tier.capacity_bytes,
                high_percent: runtime.tier.high_percent,
                low_percent: runtime.tier.low_percent,
                table: table.clone(),
                datasets: served.clone(),
                key_file: key.clone(),
                limits: limits(args),
                ..WorkerOptions::default()
            };
            starting.push((name.clone(), self.start_worker(&directory, &name, &options)?, options));
        }
        let mut members = Vec::new();
        for (name, mut lines, mut options) in starting {
            let address = ready(&format!("worker {name}"), &mut lines).await?;
            // Started again, it listens where clients look for it.
            options.listen = address.parse().with_context(|| format!("worker {name} said '{address}'"))?;
            write_options(&directory, &name, &options, self.run_as)?;
            members.push(Member { name, address, weight: 1, state: MemberState::Serving });
        }
        let full = WorkerTable { epoch: epoch + 1, members };
        write_private(&table, &serde_json::to_vec_pretty(&full)?, self.run_as)?;
        self.record.runtimes.push(RuntimeRecord {
            namespace: runtime.namespace.clone(),
            name: runtime.name.clone(),
            table,
            key,
        });
        info!(runtime = runtime.name, workers = runtime.replicas, "workers are up");
        Ok(())
    }

    fn start_worker(
        &mut self,
        directory: &Path,
        name: &str,
        options: &WorkerOptions,
    ) -> anyhow::Result<mpsc::Receiver<String>> {
        let file = write_options(directory, name, options, self.run_as)?;
        Ok(self.workers.supervise(ChildSpec {
            name: name.to_owned(),
            arguments: vec!["worker".into(), "--options".into(), path_argument(&file)?],
            run_as: self.run_as,
            grace: WORKER_GRACE,
        }))
    }

    fn start_keeper(&mut self, args: &UpArgs) -> anyhow::Result<Arc<Keeper>> {
        let user = self.run_as.map_or_else(|| rustix::process::geteuid().as_raw(), |run_as| run_as.uid);
        let options = KeeperOptions {
            allowed_uids: vec![user],
            state_file: Some(self.layout.mounts()),
            ..KeeperOptions::new(self.layout.keeper_socket())
        };
        let (keeper, events, _) = Keeper::start(options).context("starting the keeper of the mounts")?;
        tokio::spawn(log_events(events));
        let keeper = Arc::new(keeper);
        self.keeper = Some(Arc::clone(&keeper));
        let mut arguments = vec![
            "fuse".into(),
            // `--memory` is for each Dataset.
            "--memory-per-volume".into(),
            "--socket".into(),
            path_argument(&self.layout.keeper_socket())?,
        ];
        // Without root the kernel reads no files for others.
        if is_root() && args.node_cache > 0 {
            let directory = self.layout.node_cache();
            own_directory(&directory, self.run_as)?;
            arguments.extend(["--node-cache".into(), path_argument(&directory)?]);
            arguments.extend(["--node-cache-capacity".into(), args.node_cache.to_string()]);
            arguments.extend(["--node-cache-free".into(), NODE_CACHE_FREE.to_string()]);
        }
        for index in 0..DAEMONS {
            self.daemons.supervise(ChildSpec {
                name: format!("fuse-{index}"),
                arguments: arguments.clone(),
                run_as: self.run_as,
                grace: DAEMON_GRACE,
            });
        }
        Ok(keeper)
    }

    async fn mount(&mut self, keeper: &Arc<Keeper>, spec: MountSpec) -> anyhow::Result<()> {
        let keeper = Arc::clone(keeper);
        let target = spec.target.clone();
        // Kept here: whoever is interrupted while it goes on must take down what comes of it.
        let mounting = self.mounting.insert(tokio::task::spawn_blocking(move || keeper.mount(spec)));
        let mounted = mounting.await;
        self.mounting = None;
        let info = mounted?.with_context(|| format!("mounting {}", target.display()))?;
        for loss in &info.losses {
            warn!(mount = %target.display(), "{loss}");
        }
        Ok(())
    }

    fn serve_control(&self, keeper: Arc<Keeper>) -> anyhow::Result<()> {
        let listener = control::bind(&self.layout.control_socket())?;
        let (daemons, workers) = (self.daemons.states.clone(), self.workers.states.clone());
        let policies = self.policies.report();
        let status = move || {
            let mut answer = describe(&keeper, &daemons, &workers);
            answer["policies"] = policies.to_json();
            answer
        };
        tokio::spawn(control::serve(listener, Arc::new(status), self.control.clone()));
        Ok(())
    }

    /// Takes everything down, in the reverse order of its start. Never fails: what cannot be taken down is logged.
    pub async fn stop(&mut self) {
        self.control.cancel();
        self.policies = Policies::default();
        if let Some(mounting) = self.mounting.take()
            && timeout(MOUNT_DEADLINE, mounting).await.is_err()
        {
            warn!("a mount is still being made after {MOUNT_DEADLINE:?}; the next start takes it down");
        }
        if let Some(keeper) = self.keeper.take() {
            let unmounting = Arc::clone(&keeper);
            if let Err(error) = tokio::task::spawn_blocking(move || unmount_all(&unmounting)).await {
                warn!(%error, "unmounting failed");
            }
            self.daemons.end().await;
            // Only now: a keeper that ends stops its daemons, and their supervisors would start them again. It keeps its
            // record of what could not be unmounted, for the next start.
            match tokio::task::spawn_blocking(move || keeper.shutdown(Duration::ZERO)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(error = format!("{:#}", anyhow::Error::new(error)), "a mount is left"),
                Err(error) => warn!(%error, "the keeper failed"),
            }
        }
        self.workers.end().await;
    }
}

fn unmount_all(keeper: &Keeper) {
    let volumes = match keeper.status() {
        Ok(status) => status.volumes,
        Err(error) => return warn!(%error, "the keeper does not answer"),
    };
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| match keeper.unmount(&volume.mount.volume, UNMOUNT_GRACE) {
                Ok(taken) => info!(mount = %volume.mount.target.display(), ?taken, "unmounted"),
                Err(error) => warn!(mount = %volume.mount.target.display(), %error, "cannot be unmounted"),
            });
        }
    });
}

async fn log_events(mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        debug!(?event, "keeper");
    }
}

fn describe(keeper: &Keeper, daemons: &[Arc<ChildState>], workers: &[Arc<ChildState>]) -> Value {
    let children = |states: &[Arc<ChildState>]| -> Vec<Value> {
        states
            .iter()
            .map(|state| json!({"name": state.name, "pid": state.pid(), "restarts": state.restarts()}))
            .collect()
    };
    let mounts: Vec<Value> = match keeper.status() {
        Ok(status) => status.volumes.iter().map(describe_volume).collect(),
        Err(error) => return json!({"problem": error.to_string()}),
    };
    json!({"mounts": mounts, "daemons": children(daemons), "workers": children(workers)})
}

fn describe_volume(volume: &VolumeStatus) -> Value {
    let requests: u64 =
        Counter::ALL.iter().filter(|counter| counter.is_request()).map(|counter| volume.counters.get(*counter)).sum();
    json!({
        "target": volume.mount.target,
        "connection": volume.mount.connection,
        "state": volume.state,
        "daemonPid": volume.daemon,
        "takeovers": volume.takeovers,
        "lastTakeoverMillis": volume.last_takeover_millis,
        "requests": requests,
        "resent": volume.counters.get(Counter::Resent),
        "waiting": volume.waiting,
        "counters": volume.counters.iter().collect::<BTreeMap<_, _>>(),
    })
}

/// What each worker may ask of a source.
fn limits(args: &UpArgs) -> Limits {
    let usual = Limits::default();
    Limits {
        concurrency: args.source_concurrency.map_or(usual.concurrency, |concurrency| concurrency as usize),
        requests_per_second: args.source_requests_per_second.or(usual.requests_per_second),
        ..usual
    }
}

fn write_options(
    directory: &Path,
    name: &str,
    options: &WorkerOptions,
    owner: Option<RunAs>,
) -> anyhow::Result<PathBuf> {
    let file = directory.join(format!("{name}.json"));
    write_private(&file, &serde_json::to_vec_pretty(options)?, owner)?;
    Ok(file)
}

/// The Dataset as each of `workers` workers sees it: the quota is shared out evenly, as placement shares out the files.
fn dataset_config(dataset: &ValidatedDataset, workers: u32) -> DatasetConfig {
    let sources = dataset
        .sources
        .iter()
        .map(|source| SourceConfig {
            path: source.path.clone(),
            spec: SourceSpec {
                uri: source.uri.clone(),
                s3: source.s3.as_ref().map(|s3| S3Options {
                    endpoint: s3.endpoint.clone(),
                    region: s3.region.clone(),
                    addressing: s3.addressing.map(|addressing| match addressing {
                        forebay_api::Addressing::Path => S3Addressing::Path,
                        forebay_api::Addressing::VirtualHost => S3Addressing::VirtualHost,
                    }),
                }),
                credentials: source.credentials.as_ref().map(|credentials| S3Credentials {
                    access_key_id: credentials.access_key_id.clone(),
                    secret_access_key: credentials.secret_access_key.clone(),
                    session_token: credentials.session_token.clone(),
                }),
            },
            request_budget: forebay_worker_agent::request_budget(source.request_budget),
            problem: None,
        })
        .collect();
    DatasetConfig {
        id: DatasetId::local(&dataset.namespace, &dataset.name),
        namespace: dataset.namespace.clone(),
        name: dataset.name.clone(),
        sources,
        policy: forebay_worker_agent::policy(dataset.policy),
        quota: dataset.quota_bytes.map(|quota| quota.div_ceil(u64::from(workers))),
        reserve: dataset.reserve_bytes.div_ceil(u64::from(workers)),
        priority: dataset.priority,
        shape: forebay_worker_agent::shape(dataset.shape),
        ttl: dataset.ttl,
        replicas: forebay_worker_agent::replicas(dataset.replicas),
        sync_interval: dataset.sync_interval,
    }
}
