//! Numbers of the volumes that a daemon serves, for whoever shows them.

mod text;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use forebay_client::{ClientMetrics, MemoryBudget, MemoryUsage};
use forebay_exposition::Exposed;
use forebay_keeper::{
    Health,
    tables::{Counter, CounterSnapshot, NodeStats, OpenStats},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{fs::FileSystem, node_cache::NodeCache, notices::Notices, tree::Tree};

/// The numbers of one volume.
#[derive(Clone, Debug)]
pub struct VolumeMetrics {
    /// Name of the volume.
    pub volume: String,
    /// `namespace/name` of its dataset.
    pub dataset: String,
    /// Requests by operation, and what else survives the daemon: totals since the volume was mounted.
    pub counters: CounterSnapshot,
    /// The node table.
    pub nodes: NodeStats,
    /// The open table.
    pub opens: OpenStats,
    /// Times that invalidations came faster than the kernel took them, so that all names were expired instead.
    pub notice_overflows: u64,
    /// How it is; `None` while that is not known.
    pub health: Option<Health>,
    /// Of the client, since this daemon prepared the volume.
    pub client: Option<ClientMetrics>,
}

type Source = dyn Fn(&str) -> Option<VolumeMetrics> + Send + Sync;

/// Where one volume's numbers come from. It keeps nothing alive.
pub(crate) struct VolumeSource(Arc<Source>);

impl VolumeSource {
    pub(crate) fn new<T: Tree>(
        dataset: String,
        health: watch::Receiver<Option<Health>>,
        fs: &Arc<FileSystem<T>>,
        notices: &Arc<Notices>,
        client: impl Fn(&FileSystem<T>) -> Option<ClientMetrics> + Send + Sync + 'static,
    ) -> Self {
        let (fs, notices) = (Arc::downgrade(fs), Arc::downgrade(notices));
        Self(Arc::new(move |volume| {
            let (fs, notices) = (Weak::upgrade(&fs)?, Weak::upgrade(&notices)?);
            Some(VolumeMetrics {
                volume: volume.to_owned(),
                dataset: dataset.clone(),
                counters: fs.counters().snapshot(),
                nodes: fs.tables().nodes.stats(),
                opens: fs.tables().opens.stats(),
                notice_overflows: notices.overflows(),
                health: health.borrow().clone(),
                client: client(&fs),
            })
        }))
    }
}

/// How often what the client counts is carried into the counters that survive the daemon; a kill loses one interval.
const CARRY: Duration = Duration::from_millis(50);

/// Carries what the client counts into the shared counters, for ever.
pub(crate) async fn carry_over<T: Tree>(fs: Arc<FileSystem<T>>, client: fn(&T) -> Option<ClientMetrics>) {
    let mut ticks = tokio::time::interval(CARRY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut carried = ClientMetrics::default();
    loop {
        ticks.tick().await;
        let Some(now) = client(fs.tree()) else { return };
        let counters = fs.counters();
        counters.add(Counter::WorkerBytes, now.bytes_from_workers - carried.bytes_from_workers);
        counters.add(Counter::HitBlocks, now.hit_blocks - carried.hit_blocks);
        counters.add(Counter::MissBlocks, now.miss_blocks - carried.miss_blocks);
        carried = now;
    }
}

/// A handle to the numbers of a daemon; clones show the same.
#[derive(Clone, Default)]
pub struct Metrics {
    volumes: Arc<Mutex<BTreeMap<String, VolumeSource>>>,
    linked: Arc<AtomicBool>,
    memory: Arc<Mutex<Option<MemoryBudget>>>,
    node_cache: Arc<Mutex<Option<NodeCache>>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.volumes.lock().keys()).finish()
    }
}

impl Metrics {
    /// The numbers of every attached volume, now.
    pub fn snapshot(&self) -> Vec<VolumeMetrics> {
        self.volumes.lock().iter().filter_map(|(volume, source)| source.0(volume)).collect()
    }

    pub(crate) fn add(&self, volume: &str, source: VolumeSource) {
        self.volumes.lock().insert(volume.to_owned(), source);
    }

    pub(crate) fn remove(&self, volume: &str) {
        self.volumes.lock().remove(volume);
    }

    /// Whether a keeper is connected now.
    pub(crate) fn set_linked(&self, linked: bool) {
        self.linked.store(linked, Ordering::Relaxed);
    }

    /// The memory that all volumes share, if they do.
    pub(crate) fn set_memory(&self, memory: Option<MemoryBudget>) {
        *self.memory.lock() = memory;
    }

    /// The node cache, if there is one.
    pub(crate) fn set_node_cache(&self, cache: Option<NodeCache>) {
        *self.node_cache.lock() = cache;
    }

    fn memory(&self, volumes: &[VolumeMetrics]) -> MemoryUsage {
        if let Some(shared) = &*self.memory.lock() {
            return shared.usage();
        }
        volumes.iter().filter_map(|volume| volume.client.as_ref()).fold(MemoryUsage::default(), |sum, client| {
            MemoryUsage {
                total: sum.total + client.budget_total,
                used: sum.used + client.budget_used,
                peak: sum.peak + client.budget_peak,
                waits: sum.waits + client.budget_waits,
            }
        })
    }
}

impl Exposed for Metrics {
    async fn metrics(&self) -> Result<String, fmt::Error> {
        let volumes = self.snapshot();
        let memory = self.memory(&volumes);
        let node_cache = self.node_cache.lock().as_ref().map(NodeCache::usage).unwrap_or_default();
        text::Snapshot { linked: self.linked.load(Ordering::Relaxed), memory, node_cache, volumes }.text()
    }

    fn not_ready(&self) -> Option<String> {
        (!self.linked.load(Ordering::Relaxed)).then(|| "no keeper is connected".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use forebay_keeper::tables::{Counter, Counters, NodeTable, OpenTable};

    use super::*;
    use crate::{
        fs::{Options, Tables},
        memory::MemoryTree,
    };

    #[test]
    fn a_volume_shows_its_numbers_while_it_is_served() {
        let tables = Tables {
            nodes: Arc::new(NodeTable::create(1 << 20).unwrap()),
            opens: Arc::new(OpenTable::create(16).unwrap()),
            counters: Arc::new(Counters::create().unwrap()),
        };
        let notices = Arc::new(Notices::new());
        let options = Options { ttl: Duration::from_secs(1), directory_time_ns: 0 };
        let fs = Arc::new(FileSystem::new(MemoryTree::new(), tables, notices.clone(), options));
        let metrics = Metrics::default();
        assert!(metrics.snapshot().is_empty());
        let (health, told) = watch::channel(None);
        metrics.clone().add("a", VolumeSource::new("ns/data".to_owned(), told, &fs, &notices, |_| None));
        health.send_replace(Some(Health::default()));
        fs.counters().add(Counter::Read, 3);
        let [volume] = <[VolumeMetrics; 1]>::try_from(metrics.snapshot()).unwrap();
        assert_eq!((volume.volume.as_str(), volume.counters.get(Counter::Read)), ("a", 3));
        assert_eq!((volume.dataset.as_str(), volume.health), ("ns/data", Some(Health::default())));
        assert!(metrics.not_ready().is_some());
        metrics.set_linked(true);
        assert_eq!(metrics.not_ready(), None);
        // Numbers keep nothing alive.
        drop(fs);
        assert!(metrics.snapshot().is_empty());
        metrics.remove("a");
    }
}
