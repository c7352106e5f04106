//! What is hot: chunks with which one worker is busy, so that others are to share the readers.
//!
//! The owner of a chunk measures how much is asked of it, a second at a time. When that is more than a worker is to give to
//! one chunk, it has others take a copy (`replicas.max` of them at most), and then tells everybody who reads it how many
//! workers to ask in turns; from then on it sees its part only, and reckons with all of it. When it is less for a while,
//! it tells a smaller number; the copies stay until their room is wanted.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_protocol::{ChunkKey, DatasetPath, FileVersion};
use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::debug;

use crate::{dataset::Dataset, fill::Wanted, load::Found, worker::Worker};

const WINDOW: Duration = Duration::from_secs(1);
/// Chunks that are counted in a window: what is hot is among the first that come.
const COUNTED: usize = 4096;
/// Windows in which fewer workers would have done, before fewer are told.
const COOLING: u32 = 20;

/// What this worker knows of the chunks that it owns.
#[derive(Default)]
pub(crate) struct Heat(Mutex<State>);

#[derive(Default)]
struct State {
    since: Option<Instant>,
    counts: HashMap<ChunkKey, Counted>,
    /// Chunks of which several workers have copies, and readers are told so.
    told: HashMap<ChunkKey, Told>,
}

struct Counted {
    dataset: Weak<Dataset>,
    path: DatasetPath,
    version: FileVersion,
    cost: u64,
}

#[derive(Clone, Copy)]
struct Told {
    workers: u32,
    /// Windows in which fewer would have done.
    cooling: u32,
}

/// A chunk that more workers are to have.
struct Wish {
    dataset: Arc<Dataset>,
    file: Found,
    key: ChunkKey,
    workers: u32,
}

impl Heat {
    /// Chunks whose readers are told to ask several workers.
    pub(crate) fn chunks(&self) -> usize {
        self.0.lock().told.len()
    }
}

/// Notes that a reader asked for blocks of a chunk; how many workers he is to ask in turns from now on.
pub(crate) fn note(worker: &Arc<Worker>, wanted: &Wanted) -> u8 {
    let most = wanted.dataset.copies.most();
    if most < 2 || worker.members.place(wanted.key.placement_key(), 1).is_none() {
        return 1;
    }
    let cost = 1 + u64::from(wanted.blocks.end - wanted.blocks.start);
    let (workers, wishes) = worker.heat.0.lock().note(wanted, cost, worker.options.hot_blocks_per_second);
    for wish in wishes {
        worker.tasks.spawn(grant(worker.clone(), wish));
    }
    // At most 16 by the API.
    workers.min(most).min(u8::MAX.into()) as u8
}

impl State {
    fn note(&mut self, wanted: &Wanted, cost: u64, busy: u64) -> (u32, Vec<Wish>) {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        let mut wishes = Vec::new();
        if now.duration_since(since) >= WINDOW {
            wishes = self.end_window(now.duration_since(since), busy);
            self.since = Some(now);
        }
        if let Some(counted) = self.counts.get_mut(&wanted.key) {
            counted.cost += cost;
        } else if self.counts.len() < COUNTED {
            let Wanted { dataset, path, version, key, blocks: _ } = wanted.clone();
            self.counts.insert(key, Counted { dataset: Arc::downgrade(&dataset), path, version, cost });
        }
        (self.told.get(&wanted.key).map_or(1, |told| told.workers), wishes)
    }

    fn end_window(&mut self, lasted: Duration, busy: u64) -> Vec<Wish> {
        let counts = mem::take(&mut self.counts);
        let mut wishes = Vec::new();
        self.told.retain(|key, told| {
            let cost = counts.get(key).map_or(0, |counted| counted.cost);
            let wanted = workers_for(cost.saturating_mul(told.workers.into()), lasted, busy);
            told.cooling = if wanted < told.workers { told.cooling + 1 } else { 0 };
            if told.cooling > COOLING {
                *told = Told { workers: told.workers - 1, cooling: 0 };
            }
            told.workers > 1
        });
        for (key, Counted { dataset, path, version, cost }) in counts {
            let told = self.told.get(&key).map_or(1, |told| told.workers);
            let Some(dataset) = dataset.upgrade() else { continue };
            let workers = workers_for(cost.saturating_mul(told.into()), lasted, busy).min(dataset.copies.most());
            if workers > told {
                wishes.push(Wish { dataset, file: Found { path, version }, key, workers });
            }
        }
        wishes
    }
}

/// How many workers are to give what was asked in a window.
fn workers_for(cost: u64, lasted: Duration, busy: u64) -> u32 {
    let rate = cost as f64 / lasted.as_secs_f64().max(0.001);
    // Saturates.
    ((rate / busy.max(1) as f64) as u32).saturating_add(1)
}

/// Has others take copies of a chunk, and tells its readers when they have them.
async fn grant(worker: Arc<Worker>, wish: Wish) {
    let Wish { dataset, file, key, workers } = wish;
    // Something else than all of it is nothing that others could take over.
    if !worker.store.holds(key).is_some_and(|held| held.whole) {
        return;
    }
    match dataset.copies.ensure(&file, key, workers, false).await {
        Ok(()) => {
            let told = Told { workers, cooling: 0 };
            worker.heat.0.lock().told.insert(key, told);
            debug!(path = %file.path, chunk = key.index, workers, "readers are to ask several workers");
        }
        Err(reason) => debug!(path = %file.path, chunk = key.index, workers, reason, "too few copies"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_workers_as_the_rate_wants() {
        let second = Duration::from_secs(1);
        assert_eq!(workers_for(0, second, 2000), 1);
        assert_eq!(workers_for(1999, second, 2000), 1);
        assert_eq!(workers_for(2000, second, 2000), 2);
        assert_eq!(workers_for(7000, 2 * second, 2000), 2);
        assert_eq!(workers_for(u64::MAX, second, 1), u32::MAX);
    }
}
