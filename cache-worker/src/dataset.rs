//! The datasets that this worker serves.

use std::{collections::HashMap, fmt, future::Future, sync::Arc};

use bytes::Bytes;
use forebay_cache_store::{ChunkStore, DatasetPolicy, DatasetUsage};
use forebay_metadata::{DatasetIndex, DatasetOptions, Index, MetadataError, Namespace, NamespaceError, Source};
use forebay_protocol::{BLOCK_SIZE, DatasetId, DatasetPath, FileIdentity, InvalidPath, worker::ScanProgress};
use forebay_under_store::{Limits, StoreError, open};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    config::{DatasetConfig, Policy},
    fill::{FillError, Pools, Wanted},
    metrics::{DatasetMetrics, Metrics, level, set},
};

/// Why a dataset cannot be served.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum DatasetError {
    /// Its configuration is wrong.
    #[error("source {path}: {source}")]
    Path {
        /// As configured.
        path: String,
        /// Why it is no path.
        source: InvalidPath,
    },
    /// A source cannot be what it says.
    #[error("source {uri}: {source}")]
    Source {
        /// As configured; without credentials.
        uri: String,
        /// Why.
        source: StoreError,
    },
    /// The sources do not fit together.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The index does not open.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// A dataset that is served.
pub(crate) struct Dataset {
    pub(crate) id: DatasetId,
    /// Namespace of its object.
    pub(crate) owner: String,
    /// Name of its object.
    pub(crate) name: String,
    config: Mutex<DatasetConfig>,
    pub(crate) index: Arc<DatasetIndex>,
    /// By mount path, longest first.
    pools: Vec<(DatasetPath, Pools)>,
    pub(crate) metrics: DatasetMetrics,
    closed: CancellationToken,
    /// Why the last fetch of file contents failed, if it did.
    problem: Mutex<Option<String>>,
    /// The scan that this worker coordinates, if it does.
    pub(crate) scan: watch::Sender<Option<ScanProgress>>,
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({}/{})", self.owner, self.name)
    }
}

impl Dataset {
    async fn open(
        config: DatasetConfig,
        limits: &Limits,
        metadata: &Arc<Index>,
        metrics: &Metrics,
    ) -> Result<Self, DatasetError> {
        let mut sources = Vec::new();
        let mut pools = Vec::new();
        let mut fingerprint = Xxh3::new();
        for source in &config.sources {
            let path = DatasetPath::parse(Bytes::copy_from_slice(source.path.as_bytes()))
                .map_err(|error| DatasetError::Path { path: source.path.clone(), source: error })?;
            let store = open(&source.spec, limits)
                .map_err(|error| DatasetError::Source { uri: source.spec.uri.clone(), source: error })?;
            // What decides which objects are listed; credentials do not.
            for part in [source.path.as_str(), &source.spec.uri, &format!("{:?}", source.spec.s3)] {
                fingerprint.update(part.as_bytes());
                fingerprint.update(&[0]);
            }
            pools.push((path.clone(), Pools::new(limits)));
            sources.push(Source { path, store });
        }
        pools.sort_by_key(|(path, _)| std::cmp::Reverse(path.as_bytes().len()));
        let namespace = Arc::new(Namespace::new(sources)?);
        let options = DatasetOptions { fingerprint: fingerprint.digest(), ..DatasetOptions::default() };
        let index = DatasetIndex::open(metadata.clone(), config.id, namespace, options).await?;
        Ok(Self {
            id: config.id,
            owner: config.namespace.clone(),
            name: config.name.clone(),
            metrics: metrics.dataset(&config.namespace, &config.name),
            config: Mutex::new(config),
            index,
            pools,
            closed: CancellationToken::new(),
            problem: Mutex::new(None),
            scan: watch::Sender::new(None),
        })
    }

    pub(crate) fn namespace(&self) -> &Arc<Namespace> {
        self.index.namespace()
    }

    /// The pools of the source that answers for `path`; `None` where no source is.
    pub(crate) fn pools(&self, path: &DatasetPath) -> Option<&Pools> {
        self.pools.iter().find(|(mount, _)| path.starts_with(mount)).map(|(_, pools)| pools)
    }

    /// Ready when the dataset is no longer served (in this form).
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + Send + '_ {
        self.closed.cancelled()
    }

    /// Ends what is done for it, and waits for its listings' end.
    pub(crate) async fn close(&self) {
        self.closed.cancel();
        self.index.close().await;
    }

    /// A sender knows this generation.
    pub(crate) fn saw_generation(&self, generation: u64) {
        self.index.adopt_generation(generation);
    }

    /// Counts a reader's request of which `hits` blocks are held.
    pub(crate) fn count_request(&self, wanted: &Wanted, range_bytes: u64, hits: u32) {
        let blocks = u64::from(wanted.blocks.end - wanted.blocks.start);
        // Only the last block of a file is short; it counts with what it has.
        let hit_bytes = if u64::from(hits) == blocks { range_bytes } else { u64::from(hits) * BLOCK_SIZE };
        let hit_bytes = hit_bytes.min(range_bytes);
        self.metrics.hit_bytes.inc_by(hit_bytes);
        self.metrics.miss_bytes.inc_by(range_bytes - hit_bytes);
    }

    pub(crate) fn source_failed(&self, error: &FillError) {
        let text = error.to_string();
        let mut problem = self.problem.lock();
        if problem.as_deref() != Some(&text) {
            warn!(dataset = %self.name, %error, "fetching from the source failed");
            *problem = Some(text);
        }
    }

    pub(crate) fn source_answered(&self) {
        let mut problem = self.problem.lock();
        if problem.take().is_some() {
            info!(dataset = %self.name, "the source answers again");
        }
    }

    /// What is wrong with its sources; empty when nothing is.
    pub(crate) fn source_problem(&self) -> String {
        let answered = self.problem.lock().clone().or_else(|| self.index.source_problem());
        answered.or_else(|| self.index.store_problem()).unwrap_or_default()
    }

    /// Copies what other crates count.
    pub(crate) fn sample_metrics(&self, usage: &DatasetUsage) {
        let requests = self.index.requests();
        let m = &self.metrics;
        set(&m.store_gets, requests.gets);
        set(&m.store_lists, requests.lists);
        set(&m.store_heads, requests.heads);
        set(&m.store_errors, requests.errors);
        set(&m.store_bytes, requests.bytes);
        set(&m.evicted_bytes, usage.evicted_bytes);
        set(&m.corrupt_blocks, usage.corrupt_blocks);
        level(&m.cached_bytes, usage.cached_bytes);
        level(&m.pinned_bytes, usage.pinned_bytes);
        level(&m.cached_chunks, usage.chunks);
    }

    /// The name of a version of a file of this dataset.
    pub(crate) fn identity(&self, path: &DatasetPath, version: &forebay_protocol::FileVersion) -> FileIdentity {
        version.identity(self.id, path)
    }
}

fn policy(config: &DatasetConfig) -> DatasetPolicy {
    let policy = match config.policy {
        Policy::Hold => forebay_cache_store::Policy::Hold,
    };
    DatasetPolicy { policy, quota: config.quota }
}

/// What [`Datasets::apply`] did.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Datasets that are served anew, for those who do something for each.
    pub(crate) opened: Vec<Arc<Dataset>>,
    /// Whether some cannot be served; worth another try.
    pub(crate) incomplete: bool,
}

/// Everything that is served.
pub(crate) struct Datasets {
    served: RwLock<HashMap<DatasetId, Arc<Dataset>>>,
    /// Why configured datasets are not served.
    failed: RwLock<HashMap<DatasetId, String>>,
    applying: tokio::sync::Mutex<()>,
    limits: Limits,
    store: Arc<ChunkStore>,
    metadata: Arc<Index>,
    metrics: Arc<Metrics>,
}

impl Datasets {
    pub(crate) fn new(limits: Limits, store: Arc<ChunkStore>, metadata: Arc<Index>, metrics: Arc<Metrics>) -> Self {
        Self {
            served: RwLock::default(),
            failed: RwLock::default(),
            applying: tokio::sync::Mutex::new(()),
            limits,
            store,
            metadata,
            metrics,
        }
    }

    pub(crate) fn get(&self, id: &DatasetId) -> Option<Arc<Dataset>> {
        self.served.read().get(id).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Dataset>> {
        let mut all: Vec<_> = self.served.read().values().cloned().collect();
        all.sort_by(|a, b| (&a.owner, &a.name).cmp(&(&b.owner, &b.name)));
        all
    }

    /// Why a dataset is not served.
    pub(crate) fn why_not(&self, id: &DatasetId) -> String {
        match self.failed.read().get(id) {
            Some(why) => format!("dataset {id} cannot be served: {why}"),
            None => format!("this worker does not serve dataset {id}"),
        }
    }

    /// Serves exactly these from now on. A dataset that is gone loses its cached bytes; one whose sources changed is
    /// taken up again; one that cannot be served stays as it was, if it was.
    pub(crate) async fn apply(&self, configs: Vec<DatasetConfig>) -> Applied {
        let _one_at_a_time = self.applying.lock().await;
        let mut applied = Applied::default();
        let gone: Vec<Arc<Dataset>> = {
            let mut served = self.served.write();
            let gone: Vec<DatasetId> =
                served.keys().filter(|id| !configs.iter().any(|config| config.id == **id)).copied().collect();
            gone.iter().filter_map(|id| served.remove(id)).collect()
        };
        for dataset in gone {
            info!(dataset = %dataset.name, id = %dataset.id, "no longer served; its cache is dropped");
            self.forget(&dataset).await;
        }
        // Those that were taken away while this worker was not running.
        for id in self.store.datasets() {
            if self.get(&id).is_none() && !configs.iter().any(|config| config.id == id) {
                self.store.forget_dataset(id);
                self.forget_listings(id).await;
            }
        }
        self.failed.write().retain(|id, _| configs.iter().any(|config| config.id == *id));
        for config in configs {
            match self.apply_one(config.clone()).await {
                Ok(opened) => {
                    self.failed.write().remove(&config.id);
                    applied.opened.extend(opened);
                }
                Err(error) => {
                    applied.incomplete = true;
                    let text = error.to_string();
                    let known = self.failed.write().insert(config.id, text.clone());
                    if known.as_ref() != Some(&text) {
                        error!(dataset = %config.name, %error, "the dataset cannot be served");
                    }
                }
            }
        }
        applied
    }

    async fn apply_one(&self, config: DatasetConfig) -> Result<Option<Arc<Dataset>>, DatasetError> {
        let policy = policy(&config);
        if let Some(current) = self.get(&config.id) {
            let mut known = current.config.lock();
            let same =
                known.sources == config.sources && known.name == config.name && known.namespace == config.namespace;
            if same {
                if *known != config {
                    self.store.set_dataset(config.id, policy);
                    *known = config;
                }
                return Ok(None);
            }
        }
        if let Some(current) = self.get(&config.id) {
            // Readers are told to try again; one index may not be open twice.
            self.served.write().remove(&config.id);
            current.close().await;
            self.metrics.forget_dataset(&current.owner, &current.name);
        }
        let id = config.id;
        let dataset = Arc::new(Dataset::open(config, &self.limits, &self.metadata, &self.metrics).await?);
        self.store.set_dataset(id, policy);
        self.served.write().insert(id, dataset.clone());
        info!(dataset = %dataset.name, namespace = %dataset.owner, %id, "serving");
        Ok(Some(dataset))
    }

    async fn forget(&self, dataset: &Arc<Dataset>) {
        dataset.close().await;
        self.forget_listings(dataset.id).await;
        self.store.forget_dataset(dataset.id);
        self.metrics.forget_dataset(&dataset.owner, &dataset.name);
    }

    async fn forget_listings(&self, id: DatasetId) {
        if let Err(error) = self.metadata.forget_dataset(id).await {
            warn!(dataset = %id, %error, "its listings were not forgotten");
        }
    }

    /// Ends what is done for them; they stay on disk.
    pub(crate) async fn close(&self) {
        let all: Vec<_> = self.served.write().drain().map(|(_, dataset)| dataset).collect();
        for dataset in all {
            dataset.close().await;
        }
    }
}
