//! A dataset that this worker serves.

mod problem;
mod source;
mod store;
mod sync;

use std::{fmt, future::Future, ops::Range, sync::Arc};

use forebay_cache_store::DatasetUsage;
use forebay_metadata::{DatasetIndex, DatasetOptions, Index, MetadataError, Namespace, NamespaceError};
use forebay_protocol::{
    BLOCK_SIZE, DatasetId, DatasetPath, FileIdentity, FileVersion, InvalidPath, worker::ScanProgress,
};
use forebay_under_store::{ByteStream, Limits, Requests, StoreError};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::problem::SourceProblem;
pub(crate) use self::source::Source;
use self::{source::SourceOpener, sync::Sync};
use crate::{
    budget::Lender,
    config::{DatasetConfig, SourceConfig},
    copies::Copies,
    fill::{FillError, Pools, Wanted},
    load::Runs,
    metrics::{DatasetMetrics, Metrics, level, set},
};

/// Why a dataset cannot be served. A source that cannot be used is no reason: the others are served.
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
    /// The sources do not fit together.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The index does not open.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// What takes up datasets.
pub(crate) struct Opener {
    sources: SourceOpener,
    metadata: Arc<Index>,
    metrics: Arc<Metrics>,
}

impl Opener {
    pub(crate) fn new(limits: Limits, metadata: Arc<Index>, metrics: Arc<Metrics>) -> Self {
        Self { sources: SourceOpener::new(limits), metadata, metrics }
    }

    /// The sources of a configuration: those of `before` that are still meant, and new ones.
    fn sources(&self, configs: &[SourceConfig], before: &[Arc<Source>]) -> Result<Vec<Arc<Source>>, DatasetError> {
        let mut sources = Vec::with_capacity(configs.len());
        for config in configs {
            let known = before.iter().find(|source| source.is(config)).cloned();
            sources.push(match known {
                Some(source) => {
                    source.set_budget(config.request_budget);
                    source
                }
                None => self.sources.open(config.clone())?,
            });
        }
        sources.sort_by_key(|source| std::cmp::Reverse(source.path.as_bytes().len()));
        Ok(sources)
    }
}

fn namespace(sources: &[Arc<Source>]) -> Result<Arc<Namespace>, NamespaceError> {
    let sources = sources.iter().map(|source| forebay_metadata::Source {
        path: source.path.clone(),
        store: source.store.clone(),
        fingerprint: source.fingerprint(),
    });
    Ok(Arc::new(Namespace::new(sources.collect())?))
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
    sources: RwLock<Arc<[Arc<Source>]>>,
    /// What was asked of sources that it no longer has.
    retired: Mutex<Requests>,
    pub(crate) metrics: DatasetMetrics,
    closed: CancellationToken,
    /// Why the last fetch of file contents failed, if it did.
    problem: Mutex<Option<String>>,
    /// The scan that this worker coordinates, if it does.
    pub(crate) scan: watch::Sender<Option<ScanProgress>>,
    /// What was scanned is no longer all that there is.
    pub(crate) rescan: Notify,
    /// Loads that have a name.
    pub(crate) runs: Runs,
    /// When this worker last had the sources listed.
    pub(crate) sync: Sync,
    /// What this worker lends of the sources' request budgets, if it is the one that does.
    pub(crate) lender: Lender,
    /// What others are to hold, too.
    pub(crate) copies: Copies,
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({}/{})", self.owner, self.name)
    }
}

impl Dataset {
    pub(crate) async fn open(config: DatasetConfig, opener: &Opener) -> Result<Self, DatasetError> {
        let sources = opener.sources(&config.sources, &[])?;
        let opened = match namespace(&sources) {
            Ok(namespace) => {
                DatasetIndex::open(opener.metadata.clone(), config.id, namespace, DatasetOptions::default())
                    .await
                    .map_err(DatasetError::from)
            }
            Err(error) => Err(error.into()),
        };
        let index = opened.inspect_err(|_| sources.iter().for_each(|source| source.replace()))?;
        Ok(Self {
            id: config.id,
            owner: config.namespace.clone(),
            name: config.name.clone(),
            metrics: opener.metrics.dataset(&config.namespace, &config.name),
            copies: Copies::new(config.replicas),
            config: Mutex::new(config),
            index,
            sources: RwLock::new(sources.into()),
            retired: Mutex::default(),
            closed: CancellationToken::new(),
            problem: Mutex::new(None),
            scan: watch::Sender::new(None),
            rescan: Notify::new(),
            runs: Runs::default(),
            sync: Sync::default(),
            lender: Lender::default(),
        })
    }

    /// How it is configured.
    pub(crate) fn config(&self) -> DatasetConfig {
        self.config.lock().clone()
    }

    /// Takes over another configuration of the same object. Readers of sources that stay notice nothing. After an error
    /// it is to be called again; until then the old configuration is what [`Self::config`] gives.
    pub(crate) async fn update(&self, config: DatasetConfig, opener: &Opener) -> Result<(), DatasetError> {
        let before = self.sources.read().clone();
        let sources = opener.sources(&config.sources, &before)?;
        let gone = |old: &[Arc<Source>], new: &[Arc<Source>]| {
            let gone = old.iter().filter(|source| !new.iter().any(|kept| Arc::ptr_eq(kept, source)));
            gone.cloned().collect::<Vec<_>>()
        };
        let other = match namespace(&sources) {
            Ok(namespace) => namespace,
            Err(error) => {
                gone(&sources, &before).iter().for_each(|source| source.replace());
                return Err(error.into());
            }
        };
        let gone = gone(&before, &sources);
        let same_objects = other.fingerprint() == self.namespace().fingerprint();
        *self.sources.write() = sources.into();
        let replaced = self.index.replace(other).await;
        for source in gone {
            let mut retired = self.retired.lock();
            *retired = *retired + source.requests();
            drop(retired);
            // Only now, so that who is sent away finds its successor.
            source.replace();
        }
        if !same_objects {
            self.scan.send_replace(None);
        }
        // With other credentials a scan that failed may succeed.
        self.rescan.notify_one();
        replaced?;
        info!(dataset = %self.name, sources = config.sources.len(), "serving other sources");
        *self.config.lock() = config;
        Ok(())
    }

    /// Notes terms that have nothing to do with its sources.
    pub(crate) fn set_terms(&self, config: DatasetConfig) {
        self.copies.set(config.replicas);
        *self.config.lock() = config;
    }

    pub(crate) fn namespace(&self) -> Arc<Namespace> {
        self.index.namespace()
    }

    /// Its sources, by mount path, longest first.
    pub(crate) fn sources(&self) -> Arc<[Arc<Source>]> {
        self.sources.read().clone()
    }

    /// The pools of the source that answers for `path`; `None` where no source is.
    pub(crate) fn pools(&self, path: &DatasetPath) -> Option<Arc<Pools>> {
        let sources = self.sources.read();
        sources.iter().find(|source| path.starts_with(&source.path)).map(|source| source.pools.clone())
    }

    /// A range of a version of a file, from the source that answers for it: a new one, if sources change before the
    /// answer begins. `None` where no source is.
    pub(crate) async fn get(
        &self,
        path: &DatasetPath,
        version: &FileVersion,
        range: Range<u64>,
    ) -> Result<Option<ByteStream>, StoreError> {
        loop {
            let namespace = self.namespace();
            let Some((store, key)) = namespace.resolve(path) else { return Ok(None) };
            match store.get(&key, &version.key, version.size, range.clone()).await {
                Err(_) if !Arc::ptr_eq(&namespace, &self.namespace()) => {}
                answer => return answer.map(Some),
            }
        }
    }

    /// Ready when the dataset is no longer served (in this form).
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + Send + '_ {
        self.closed.cancelled()
    }

    /// Ends what is done for it, and waits for its listings' end.
    pub(crate) async fn close(&self) {
        self.closed.cancel();
        self.sources.read().iter().for_each(|source| source.replace());
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

    /// What is wrong with its sources: the first that has a problem, in the order of paths.
    pub(crate) fn source_problem(&self) -> Option<SourceProblem> {
        let sources = self.sources.read().clone();
        let mut sources: Vec<_> = sources.iter().collect();
        sources.sort_by_key(|source| &source.path);
        sources.into_iter().find_map(|source| source.problem())
    }

    /// Asks its sources whether they are there.
    pub(crate) fn check_sources(&self) {
        self.sources.read().iter().for_each(|source| source.check_soon());
    }

    /// What was asked of its sources since the start.
    pub(crate) fn requests(&self) -> Requests {
        *self.retired.lock() + self.index.requests()
    }

    /// Copies what other crates count.
    pub(crate) fn sample_metrics(&self, usage: &DatasetUsage) {
        let requests = self.requests();
        let m = &self.metrics;
        set(&m.store_gets, requests.gets);
        set(&m.store_lists, requests.lists);
        set(&m.store_heads, requests.heads);
        set(&m.store_errors, requests.errors);
        set(&m.store_throttled, requests.throttled);
        set(&m.store_bytes, requests.bytes);
        set(&m.evicted_bytes, usage.evicted_bytes);
        set(&m.expired_bytes, usage.expired_bytes);
        set(&m.corrupt_blocks, usage.corrupt_blocks);
        level(&m.cached_bytes, usage.cached_bytes);
        level(&m.pinned_bytes, usage.pinned_bytes);
        level(&m.cached_chunks, usage.chunks);
        level(&m.replicated_bytes, self.copies.replicated());
        level(&m.spare_bytes, usage.spare_bytes);
        level(&m.staleness_seconds, self.sync.age().map_or(0, |age| age.as_secs()));
    }

    /// The name of a version of a file of this dataset.
    pub(crate) fn identity(&self, path: &DatasetPath, version: &FileVersion) -> FileIdentity {
        version.identity(self.id, path)
    }
}
