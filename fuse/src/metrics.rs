//! Numbers of the volumes that a daemon serves, for whoever shows them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_client::ClientMetrics;
use forebay_keeper::tables::{Counter, CounterSnapshot, NodeStats, OpenStats};
use parking_lot::Mutex;

use crate::{fs::FileSystem, notices::Notices, tree::Tree};

/// The numbers of one volume.
#[derive(Clone, Debug)]
pub struct VolumeMetrics {
    /// Name of the volume.
    pub volume: String,
    /// Requests by operation, and what else survives the daemon: totals since the volume was mounted.
    pub counters: CounterSnapshot,
    /// The node table.
    pub nodes: NodeStats,
    /// The open table.
    pub opens: OpenStats,
    /// Times that invalidations came faster than the kernel took them, so that all names were expired instead.
    pub notice_overflows: u64,
    /// Of the client, since this daemon prepared the volume.
    pub client: Option<ClientMetrics>,
}

type Snapshot = dyn Fn(&str) -> Option<VolumeMetrics> + Send + Sync;

/// Where one volume's numbers come from. It keeps nothing alive.
pub(crate) struct VolumeSource(Arc<Snapshot>);

impl VolumeSource {
    pub(crate) fn new<T: Tree>(
        fs: &Arc<FileSystem<T>>,
        notices: &Arc<Notices>,
        client: impl Fn(&FileSystem<T>) -> Option<ClientMetrics> + Send + Sync + 'static,
    ) -> Self {
        let (fs, notices) = (Arc::downgrade(fs), Arc::downgrade(notices));
        Self(Arc::new(move |volume| {
            let (fs, notices) = (Weak::upgrade(&fs)?, Weak::upgrade(&notices)?);
            Some(VolumeMetrics {
                volume: volume.to_owned(),
                counters: fs.counters().snapshot(),
                nodes: fs.tables().nodes.stats(),
                opens: fs.tables().opens.stats(),
                notice_overflows: notices.overflows(),
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
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
        metrics.clone().add("a", VolumeSource::new(&fs, &notices, |_| None));
        fs.counters().add(Counter::Read, 3);
        let [volume] = <[VolumeMetrics; 1]>::try_from(metrics.snapshot()).unwrap();
        assert_eq!((volume.volume.as_str(), volume.counters.get(Counter::Read)), ("a", 3));
        // Numbers keep nothing alive.
        drop(fs);
        assert!(metrics.snapshot().is_empty());
        metrics.remove("a");
    }
}
