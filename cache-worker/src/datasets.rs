//! The datasets that this worker serves, and those that it no longer does.
//!
//! A dataset that is configured no longer is closed at once and wiped in the background: its chunks (the pinned ones
//! too) and what is known of its directories. So are those that went away while no worker ran. Nothing is wiped before
//! a configuration was read.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use forebay_cache_store::{ChunkStore, DatasetPolicy};
use forebay_metadata::{Index, MetadataError};
use forebay_protocol::DatasetId;
use forebay_under_store::Limits;
use futures::{StreamExt, stream};
use parking_lot::{Mutex, RwLock};
use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::{
    config::DatasetConfig,
    dataset::{Dataset, DatasetError, Opener},
    metrics::Metrics,
};

/// Datasets that are taken up, or get other sources, at once.
const APPLYING: usize = 16;
/// How soon a dataset that is being wiped and came back is looked at again.
const WIPED: Duration = Duration::from_millis(20);

/// What [`Datasets::apply`] did.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Datasets that are served anew, for those who do something for each.
    pub(crate) opened: Vec<Arc<Dataset>>,
    /// Whether some cannot be served; worth another try.
    pub(crate) incomplete: bool,
}

/// What is left to do for a dataset that is on the disk and not served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Leftover {
    /// Nothing was done yet.
    #[default]
    Whole,
    /// Its index is being closed, or its listings are being forgotten: it may not be opened.
    Busy,
    /// Its chunks are being deleted.
    Chunks,
}

/// Everything that is served, and what else is on the disk.
pub(crate) struct Datasets {
    served: RwLock<HashMap<DatasetId, Arc<Dataset>>>,
    /// Why configured datasets are not served.
    failed: RwLock<HashMap<DatasetId, String>>,
    /// What is configured; `None` before anything was read.
    configured: RwLock<Option<HashSet<DatasetId>>>,
    leftovers: Mutex<BTreeMap<DatasetId, Leftover>>,
    applying: tokio::sync::Mutex<()>,
    opener: Opener,
    store: Arc<ChunkStore>,
    metadata: Arc<Index>,
    metrics: Arc<Metrics>,
}

impl Datasets {
    /// Looks what is on the disk.
    pub(crate) async fn new(
        limits: Limits,
        store: Arc<ChunkStore>,
        metadata: Arc<Index>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, MetadataError> {
        let listed = metadata.datasets().await?;
        let leftovers = listed.into_iter().chain(store.datasets()).map(|id| (id, Leftover::Whole)).collect();
        Ok(Self {
            served: RwLock::default(),
            failed: RwLock::default(),
            configured: RwLock::new(None),
            leftovers: Mutex::new(leftovers),
            applying: tokio::sync::Mutex::new(()),
            opener: Opener::new(limits, metadata.clone(), metrics.clone()),
            store,
            metadata,
            metrics,
        })
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

    /// Datasets of which something is on the disk though they are not served: they are being wiped, or taken up, or
    /// it is not known yet what is configured.
    pub(crate) fn unserved(&self) -> Vec<DatasetId> {
        let leftovers: Vec<_> = self.leftovers.lock().keys().copied().collect();
        let served = self.served.read();
        leftovers.into_iter().filter(|id| !served.contains_key(id)).collect()
    }

    fn is_configured(&self, id: &DatasetId) -> bool {
        self.configured.read().as_ref().is_some_and(|configured| configured.contains(id))
    }

    /// Serves exactly these from now on. A dataset that is gone is wiped; one that cannot be served (any more, in the
    /// new way) stays as it was, if it was.
    pub(crate) async fn apply(&self, configs: Vec<DatasetConfig>) -> Applied {
        let _one_at_a_time = self.applying.lock().await;
        let configured: HashSet<DatasetId> = configs.iter().map(|config| config.id).collect();
        let gone: Vec<Arc<Dataset>> =
            self.served.read().values().filter(|dataset| !configured.contains(&dataset.id)).cloned().collect();
        self.failed.write().retain(|id, _| configured.contains(id));
        *self.configured.write() = Some(configured);
        for dataset in gone {
            info!(dataset = %dataset.name, id = %dataset.id, "no longer served; its cache is wiped");
            // Never in neither: who asks whether it is wiped must not hear that too early.
            self.leftovers.lock().insert(dataset.id, Leftover::Busy);
            self.served.write().remove(&dataset.id);
            dataset.close().await;
            self.leftovers.lock().insert(dataset.id, Leftover::Whole);
            self.metrics.forget_dataset(&dataset.owner, &dataset.name);
        }
        let results = stream::iter(configs)
            .map(|config| async {
                let (id, name) = (config.id, config.name.clone());
                (id, name, self.apply_one(config).await)
            })
            .buffer_unordered(APPLYING);
        let results: Vec<_> = results.collect().await;
        let mut applied = Applied::default();
        for (id, name, result) in results {
            match result {
                Ok(opened) => {
                    self.failed.write().remove(&id);
                    applied.opened.extend(opened);
                }
                Err(error) => {
                    applied.incomplete = true;
                    let text = error.to_string();
                    let known = self.failed.write().insert(id, text.clone());
                    if known.as_ref() != Some(&text) {
                        error!(dataset = %name, %error, "the dataset cannot be served");
                    }
                }
            }
        }
        applied
    }

    async fn apply_one(&self, config: DatasetConfig) -> Result<Option<Arc<Dataset>>, DatasetError> {
        let policy = policy(&config);
        if let Some(current) = self.get(&config.id) {
            let known = current.config();
            if (&known.namespace, &known.name) == (&config.namespace, &config.name) {
                if known.sources != config.sources {
                    current.update(config.clone(), &self.opener).await?;
                }
                if known != config {
                    self.store.set_dataset(config.id, policy);
                    current.set_terms(config);
                }
                return Ok(None);
            }
            // Another object: readers are told to try again; one index may not be open twice.
            self.served.write().remove(&config.id);
            current.close().await;
            self.metrics.forget_dataset(&current.owner, &current.name);
        }
        let id = config.id;
        while self.leftovers.lock().get(&id) == Some(&Leftover::Busy) {
            sleep(WIPED).await;
        }
        let dataset = Arc::new(Dataset::open(config, &self.opener).await?);
        self.store.set_dataset(id, policy);
        self.served.write().insert(id, dataset.clone());
        self.leftovers.lock().remove(&id);
        info!(dataset = %dataset.name, namespace = %dataset.owner, %id, "serving");
        Ok(Some(dataset))
    }

    /// A round of wiping what is configured no longer. The chunk store deletes in its own background.
    pub(crate) async fn wipe(&self) {
        if self.configured.read().is_none() {
            return;
        }
        // After an unclean end, the store finds chunks little by little.
        for id in self.store.datasets() {
            if self.get(&id).is_none() {
                self.leftovers.lock().entry(id).or_default();
            }
        }
        for id in self.unserved() {
            if self.begin_wiping(id) {
                let forgotten = self.metadata.forget_dataset(id).await;
                let next = match &forgotten {
                    Ok(()) => Leftover::Chunks,
                    Err(error) => {
                        warn!(dataset = %id, %error, "its listings were not forgotten; trying again");
                        Leftover::Whole
                    }
                };
                self.leftovers.lock().insert(id, next);
            }
            let wiped = self.store.usage(id).chunks == 0;
            let mut leftovers = self.leftovers.lock();
            if wiped && leftovers.get(&id) == Some(&Leftover::Chunks) {
                leftovers.remove(&id);
                info!(dataset = %id, "wiped");
            }
        }
    }

    /// Whether the listings of a dataset are to be forgotten now.
    fn begin_wiping(&self, id: DatasetId) -> bool {
        let mut leftovers = self.leftovers.lock();
        // Looked at under the lock: whoever takes it up has configured it before, and looks here before opening it.
        if self.is_configured(&id) || leftovers.get(&id) != Some(&Leftover::Whole) {
            return false;
        }
        leftovers.insert(id, Leftover::Busy);
        self.store.forget_dataset(id);
        true
    }

    /// Ends what is done for them; they stay on disk.
    pub(crate) async fn close(&self) {
        let all: Vec<_> = self.served.write().drain().map(|(_, dataset)| dataset).collect();
        for dataset in all {
            dataset.close().await;
        }
    }
}

fn policy(config: &DatasetConfig) -> DatasetPolicy {
    DatasetPolicy {
        policy: config.policy,
        quota: config.quota,
        ttl: config.ttl,
        reserve: config.reserve,
        priority: config.priority,
    }
}
