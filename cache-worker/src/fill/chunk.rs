//! What is in flight of one chunk.
//!
//! A [`Slot`] exists for a block from the moment somebody is going to fetch it until it is valid on disk, or, when it is
//! not stored, until the last reader that waited for it has taken it. Slots are only made and removed under the lock, so
//! two readers never fetch one block.

use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;
use forebay_cache_store::Chunk;
use forebay_protocol::{ChunkKey, DatasetPath, FileVersion};
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Class, FillEngine, MAX_RUN_BLOCKS,
    run::{self, Run},
};
use crate::dataset::Dataset;

/// A block in memory.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    /// Its bytes.
    pub(crate) bytes: Bytes,
    /// Its checksum.
    pub(crate) checksum: u32,
    /// Its share of the memory budget.
    pub(super) _permit: Arc<OwnedSemaphorePermit>,
}

/// A block that is in flight, or in memory.
pub(super) struct Slot {
    pub(super) run: Arc<Run>,
    /// Readers that have not taken it yet.
    waiters: u32,
    /// Set when it has arrived.
    block: Option<Block>,
}

/// What a reader finds at a block's place.
pub(super) enum Place {
    /// It has not arrived.
    InFlight,
    /// It is in memory.
    Arrived,
    /// It is no longer (or never was) in flight.
    Absent,
}

/// One chunk of which something is in flight or waited for. Lives as long as a reader or a run holds it.
pub(super) struct ChunkFill {
    pub(super) engine: FillEngine,
    pub(super) dataset: Arc<Dataset>,
    pub(super) path: DatasetPath,
    pub(super) version: FileVersion,
    pub(super) key: ChunkKey,
    slots: Mutex<HashMap<u32, Slot>>,
}

impl Drop for ChunkFill {
    fn drop(&mut self) {
        self.engine.forget(self.key);
    }
}

impl ChunkFill {
    pub(super) fn new(
        engine: FillEngine,
        dataset: Arc<Dataset>,
        path: DatasetPath,
        version: FileVersion,
        key: ChunkKey,
    ) -> Self {
        Self { engine, dataset, path, version, key, slots: Mutex::new(HashMap::new()) }
    }

    /// Attaches a reader to everything of `blocks` that is neither valid nor already attached, and starts runs for what
    /// nobody fetches yet. `attached[i]` belongs to `blocks.start + i`.
    pub(super) fn attach(
        self: &Arc<Self>,
        blocks: Range<u32>,
        chunk: Option<&Arc<Chunk>>,
        class: &Class,
        attached: &mut [Option<Arc<Run>>],
    ) {
        let mut runs: Vec<Arc<Run>> = Vec::new();
        {
            let mut slots = self.slots.lock();
            let mut missing: Vec<Range<u32>> = Vec::new();
            for (place, block) in attached.iter_mut().zip(blocks.clone()) {
                // Validity is set before the slot is removed, so a block without slot is valid or nobody's.
                if place.is_some() || chunk.is_some_and(|chunk| chunk.is_valid(block)) {
                    continue;
                }
                if let Some(slot) = slots.get_mut(&block) {
                    slot.waiters += 1;
                    slot.run.join(class);
                    *place = Some(slot.run.clone());
                    continue;
                }
                match missing.last_mut() {
                    Some(last) if last.end == block && last.len() < MAX_RUN_BLOCKS as usize => last.end += 1,
                    _ => missing.push(block..block + 1),
                }
            }
            for range in missing {
                let run = Arc::new(Run::new(range.clone(), chunk.cloned(), class));
                for block in range {
                    slots.insert(block, Slot { run: run.clone(), waiters: 1, block: None });
                    attached[(block - blocks.start) as usize] = Some(run.clone());
                }
                runs.push(run);
            }
        }
        if !runs.is_empty() {
            // Not the reader's own task: others may wait for these runs when the reader has gone.
            self.engine.inner.tasks.spawn(run::drive(self.clone(), runs));
        }
    }

    /// Takes the blocks from `first` on that are in memory, `limit` at most, and lets go of them.
    pub(super) fn take(&self, first: u32, limit: usize, attached: &mut [Option<Arc<Run>>]) -> Vec<Block> {
        let mut taken = Vec::new();
        let mut slots = self.slots.lock();
        for (block, place) in (first..).zip(attached.iter_mut()).take(limit) {
            let Some(run) = place else { break };
            let Some(slot) = slots.get_mut(&block).filter(|slot| Arc::ptr_eq(&slot.run, run)) else { break };
            let Some(held) = &slot.block else { break };
            taken.push(held.clone());
            slot.waiters -= 1;
            if slot.waiters == 0 && run.bypasses() {
                slots.remove(&block);
            }
            *place = None;
        }
        taken
    }

    /// Whether `block` is still in flight for a reader that is attached to it by `run`.
    pub(super) fn place(&self, block: u32, run: &Arc<Run>) -> Place {
        match self.slots.lock().get(&block) {
            Some(slot) if Arc::ptr_eq(&slot.run, run) => {
                if slot.block.is_some() {
                    Place::Arrived
                } else {
                    Place::InFlight
                }
            }
            _ => Place::Absent,
        }
    }

    /// Forgets the runs of blocks that are no longer in flight, so that they can be attached again.
    pub(super) fn forget_absent(&self, first: u32, attached: &mut [Option<Arc<Run>>]) {
        let slots = self.slots.lock();
        for (block, place) in (first..).zip(attached.iter_mut()) {
            let in_flight = |run: &Arc<Run>| slots.get(&block).is_some_and(|slot| Arc::ptr_eq(&slot.run, run));
            if !place.as_ref().is_some_and(in_flight) {
                *place = None;
            }
        }
    }

    /// Lets go of blocks that the reader does not want any more, or found elsewhere.
    pub(super) fn detach(&self, first: u32, attached: &mut [Option<Arc<Run>>]) {
        if attached.iter().all(Option::is_none) {
            return;
        }
        let mut left: Vec<Arc<Run>> = Vec::new();
        {
            let mut slots = self.slots.lock();
            for (block, place) in (first..).zip(attached.iter_mut()) {
                let Some(run) = place.take() else { continue };
                if let Some(slot) = slots.get_mut(&block).filter(|slot| Arc::ptr_eq(&slot.run, &run)) {
                    slot.waiters -= 1;
                    if slot.waiters == 0 && slot.block.is_some() && run.bypasses() {
                        slots.remove(&block);
                    }
                }
                if left.last().is_none_or(|last| !Arc::ptr_eq(last, &run)) {
                    left.push(run);
                }
            }
        }
        for run in left {
            run.reconsider.notify_one();
        }
    }

    /// Whether anybody still waits for a block of `run`; when nobody does, its slots are removed, so that nobody can come
    /// to wait for a run that is about to be given up.
    pub(super) fn give_up(&self, run: &Arc<Run>) -> bool {
        let mut slots = self.slots.lock();
        let waited = run
            .blocks
            .clone()
            .any(|block| slots.get(&block).is_some_and(|slot| Arc::ptr_eq(&slot.run, run) && slot.waiters > 0));
        if !waited {
            self.remove_slots(&mut slots, run, |_| true);
        }
        !waited
    }

    /// A block has arrived.
    pub(super) fn arrived(&self, run: &Arc<Run>, index: u32, block: Block) {
        {
            let mut slots = self.slots.lock();
            if let Some(slot) = slots.get_mut(&index).filter(|slot| Arc::ptr_eq(&slot.run, run)) {
                if slot.waiters == 0 && run.bypasses() {
                    slots.remove(&index);
                } else {
                    slot.block = Some(block);
                }
            }
        }
        run.changed.notify_waiters();
    }

    /// Blocks are valid on disk: whoever comes now finds them there.
    pub(super) fn stored(&self, run: &Arc<Run>, blocks: Range<u32>) {
        {
            let mut slots = self.slots.lock();
            self.remove_slots(&mut slots, run, |block| blocks.contains(&block));
        }
        run.changed.notify_waiters();
    }

    /// From now on the blocks of `run` stay in memory until their waiters have them.
    pub(super) fn not_stored(&self, run: &Arc<Run>) {
        {
            let mut slots = self.slots.lock();
            run.set_bypass();
            slots.retain(|_, slot| !Arc::ptr_eq(&slot.run, run) || slot.waiters > 0 || slot.block.is_none());
        }
        run.changed.notify_waiters();
    }

    /// The run has ended: what did not arrive is nobody's any more.
    pub(super) fn ended(&self, run: &Arc<Run>) {
        {
            let mut slots = self.slots.lock();
            let keep = |slot: &Slot| slot.block.is_some() && slot.waiters > 0;
            slots.retain(|_, slot| !Arc::ptr_eq(&slot.run, run) || keep(slot));
        }
        run.changed.notify_waiters();
    }

    fn remove_slots(&self, slots: &mut HashMap<u32, Slot>, run: &Arc<Run>, which: impl Fn(u32) -> bool) {
        for block in run.blocks.clone().filter(|block| which(*block)) {
            if slots.get(&block).is_some_and(|slot| Arc::ptr_eq(&slot.run, run)) {
                slots.remove(&block);
            }
        }
    }
}
