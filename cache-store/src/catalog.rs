//! Every chunk that the store holds, in memory, and the open ones among them.
//!
//! Memory per chunk: a key of 20 bytes and an entry of 28 (6 of them its place in the order of use) in a B-tree with
//! nodes of 11, on average 69 % full after random insertion: 544 bytes for 7.6 chunks in a leaf are 72, and inner nodes,
//! which hold chunks too, and the allocator's rounding make it 76 (measured; 70 without the order of use); so 0.8 GB for
//! ten million chunks (640 TB of full ones). A chunk that changed waits in a set for the index: 20 bytes and 1 of control
//! at a load of 44 to 87 %, so at most 48 bytes each, at most [`MAX_DIRTY`] of them (12 MB).
//!
//! Invariant: an entry and the ledger change together, by [`Catalog::apply`] only; but for [`Entry::used`] and
//! [`Entry::hits`], which nobody is charged for.
//! Lock order: shard, ledger. Nothing else is locked and no I/O is done under either. No [`Chunk`] may be dropped
//! under a shard's lock: its drop takes it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use forebay_protocol::{ChunkKey, DatasetId, FileIdentity};
use parking_lot::Mutex;

use crate::chunk::Chunk;
use crate::error::Refusal;
use crate::ledger::{Charge, Ledger};
use crate::policy::Candidate;
use crate::root::DIRECTORIES;

/// Never evicted.
pub(crate) const PINNED: u8 = 1;
/// The source has a newer version.
pub(crate) const SUPERSEDED: u8 = 2;
/// Other workers have it, so it goes first. Never leaves memory.
pub(crate) const SPARE: u8 = 0x40;
/// Every valid block was written or verified in this process. Never leaves memory.
pub(crate) const TRUSTED: u8 = 0x80;

/// Changed chunks that wait for the index at most; beyond, the index is written anew.
pub(crate) const MAX_DIRTY: usize = 262_144;

/// By the first byte of the identity, so that a directory's chunks are neighbours in one shard.
const SHARDS: usize = 256;

/// A chunk's key in the order of the directories on disk: identity, then index, both big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(pub(crate) [u8; 20]);

impl From<ChunkKey> for Name {
    fn from(key: ChunkKey) -> Self {
        let mut name = [0; 20];
        name[..16].copy_from_slice(&key.file.0.to_be_bytes());
        name[16..].copy_from_slice(&key.index.to_be_bytes());
        Self(name)
    }
}

impl From<Name> for ChunkKey {
    fn from(name: Name) -> Self {
        let [f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, f14, f15, i0, i1, i2, i3] = name.0;
        let file = [f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, f14, f15];
        Self { file: FileIdentity(u128::from_be_bytes(file)), index: u32::from_be_bytes([i0, i1, i2, i3]) }
    }
}

/// A time on the clock of admission and use. In 6 bytes, so that an [`Entry`] takes 28: at 100,000 uses a second they
/// last for 89 years, whatever the restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tick([u8; 6]);

impl Tick {
    pub(crate) const MAX: u64 = (1 << 48) - 1;

    /// The time `ticks`, at most [`Self::MAX`].
    pub(crate) fn new(ticks: u64) -> Self {
        let [_, _, rest @ ..] = ticks.min(Self::MAX).to_be_bytes();
        Self(rest)
    }

    pub(crate) fn get(self) -> u64 {
        let [t0, t1, t2, t3, t4, t5] = self.0;
        u64::from_be_bytes([0, 0, t0, t1, t2, t3, t4, t5])
    }
}

/// What is known of a chunk without its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its place in the order of admission; unique, so it also tells one file of a chunk from its successor.
    pub(crate) order: Tick,
    /// Its place in the order of use, on the same clock; an open chunk may know a later one. Never leaves memory.
    pub(crate) used: Tick,
    /// How often it was used, as far as not forgotten; an open chunk may know of more. Never leaves memory.
    pub(crate) hits: u8,
    /// Its dataset, in the ledger.
    pub(crate) slot: u32,
    /// Bytes of the blocks held or being written.
    pub(crate) data: u32,
    /// Bytes of the chunk.
    pub(crate) len: u32,
    /// Bytes on disk beside those.
    pub(crate) overhead: u16,
    pub(crate) flags: u8,
}

impl Entry {
    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn charge(&self) -> Charge {
        let full = u64::from(self.len) + u64::from(self.overhead);
        let pinned = self.has(PINNED);
        Charge {
            used: if pinned { full } else { u64::from(self.data) + u64::from(self.overhead) },
            data: u64::from(self.data),
            pinned: if pinned { full } else { 0 },
            pinned_data: if pinned { u64::from(self.len) } else { 0 },
            spare: if self.has(SPARE) && !pinned { u64::from(self.data) + u64::from(self.overhead) } else { 0 },
            chunks: 1,
        }
    }
}

/// An entry as the index keeps it; `None` is a chunk that is gone.
pub(crate) type Row = (Name, Option<(DatasetId, Entry)>);

#[derive(Default)]
struct Shard {
    entries: BTreeMap<Name, Entry>,
    live: HashMap<Name, Weak<Chunk>>,
    dirty: HashSet<Name>,
}

pub(crate) struct Catalog {
    shards: Box<[Mutex<Shard>]>,
    ledger: Mutex<Ledger>,
    order: AtomicU64,
    dirty: AtomicUsize,
    /// The index must be written anew: not every change waits in a set.
    overflow: AtomicBool,
}

impl Catalog {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect(),
            ledger: Mutex::new(ledger),
            order: AtomicU64::new(1),
            dirty: AtomicUsize::new(0),
            overflow: AtomicBool::new(false),
        }
    }

    /// Looks at or changes the ledger. `with` must not call back into the catalog.
    pub(crate) fn ledger<T>(&self, with: impl FnOnce(&mut Ledger) -> T) -> T {
        with(&mut self.ledger.lock())
    }

    /// Ticks the clock of admission and use.
    pub(crate) fn next_order(&self) -> Tick {
        Tick::new(self.order.fetch_add(1, Ordering::Relaxed))
    }

    /// What the next one will tell.
    pub(crate) fn uses(&self) -> u64 {
        self.order.load(Ordering::Relaxed)
    }

    pub(crate) fn get(&self, name: Name) -> Option<Entry> {
        self.shard(name).lock().entries.get(&name).copied()
    }

    /// Replaces an entry and its charge. With `limited`, growth must fit quota and watermark. Returns the entry before.
    pub(crate) fn apply(
        &self,
        name: Name,
        limited: bool,
        change: impl FnOnce(Option<Entry>) -> Option<Entry>,
    ) -> Result<Option<Entry>, Refusal> {
        let mut shard = self.shard(name).lock();
        let before = shard.entries.get(&name).copied();
        let after = change(before);
        if before == after {
            return Ok(before);
        }
        {
            let mut ledger = self.ledger.lock();
            match (before, after) {
                (Some(from), Some(to)) if from.slot == to.slot => {
                    ledger.exchange(to.slot, from.charge(), to.charge(), limited)?;
                }
                _ => {
                    if let Some(to) = after {
                        ledger.exchange(to.slot, Charge::default(), to.charge(), limited)?;
                    }
                    if let Some(from) = before {
                        ledger.exchange(from.slot, from.charge(), Charge::default(), false)?;
                    }
                }
            }
        }
        match after {
            Some(entry) => shard.entries.insert(name, entry),
            None => shard.entries.remove(&name),
        };
        const IN_MEMORY: u8 = TRUSTED | SPARE;
        let only_in_memory = matches!((before, after), (Some(b), Some(a))
            if Entry { flags: a.flags | IN_MEMORY, ..a } == Entry { flags: b.flags | IN_MEMORY, ..b });
        if !only_in_memory {
            self.mark(&mut shard, name);
        }
        Ok(before)
    }

    /// Takes an entry as the index had it.
    pub(crate) fn restore(&self, name: Name, dataset: DatasetId, entry: Entry) {
        let mut shard = self.shard(name).lock();
        let mut ledger = self.ledger.lock();
        let slot = ledger.slot(dataset);
        let entry = Entry { slot, ..entry };
        let before = shard.entries.insert(name, entry).map_or(Charge::default(), |before| before.charge());
        // Unlimited, and the slot was just made: it cannot be refused.
        let _ = ledger.exchange(slot, before, entry.charge(), false);
        self.order.fetch_max(entry.order.get() + 1, Ordering::Relaxed);
    }

    /// The open chunk of this name.
    pub(crate) fn live(&self, name: Name) -> Option<Arc<Chunk>> {
        self.shard(name).lock().live.get(&name).and_then(Weak::upgrade)
    }

    pub(crate) fn set_live(&self, name: Name, chunk: &Arc<Chunk>) {
        self.shard(name).lock().live.insert(name, Arc::downgrade(chunk));
    }

    /// Forgets an open chunk, but not its uses, unless another one took its name.
    pub(crate) fn clear_live(&self, name: Name, chunk: &Chunk) {
        let mut shard = self.shard(name).lock();
        if shard.live.get(&name).is_some_and(|live| std::ptr::eq(live.as_ptr(), chunk)) {
            shard.live.remove(&name);
            if let Some(entry) = shard.entries.get_mut(&name) {
                entry.used = Tick::new(entry.used.get().max(chunk.used()));
                entry.hits = entry.hits.saturating_add(chunk.take_hits());
            }
        }
    }

    /// Forgets uses of the chunks of a dataset: `left` says how many are left, of how many, for an order of admission.
    pub(crate) fn forget_uses(&self, slot: u32, left: impl Fn(u64, u8) -> u8) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            let Shard { entries, live, dirty: _ } = &mut *shard;
            let opened = |name: &Name| live.get(name).and_then(Weak::upgrade);
            let mut open = Vec::new();
            for (name, entry) in entries.iter_mut().filter(|(_, entry)| entry.slot == slot) {
                let chunk = opened(name);
                let hits = entry.hits.saturating_add(chunk.as_ref().map_or(0, |chunk| chunk.take_hits()));
                entry.hits = left(entry.order.get(), hits);
                open.extend(chunk);
            }
            // A chunk that was closed meanwhile is dropped here.
            drop(shard);
        }
    }

    /// The chunks of a file.
    pub(crate) fn of_file(&self, file: FileIdentity) -> Vec<Name> {
        let bound = |index| Name::from(ChunkKey { file, index });
        let shard = self.shard(bound(0)).lock();
        shard.entries.range(bound(0)..=bound(u32::MAX)).map(|(name, _)| *name).collect()
    }

    /// The chunks whose files are in a directory, ascending.
    pub(crate) fn of_directory(&self, directory: u16) -> Vec<Name> {
        let bound = |directory: u16| {
            let file = FileIdentity(u128::from(directory) << 116);
            Name::from(ChunkKey { file, index: 0 })
        };
        let shard = self.shard(bound(directory)).lock();
        let names = shard.entries.range(bound(directory)..).map(|(name, _)| *name);
        names.take_while(|name| directory + 1 == DIRECTORIES || *name < bound(directory + 1)).collect()
    }

    /// The chunks with a matching entry, shard by shard: memory is bounded by a shard's.
    pub(crate) fn select<'a, T: 'a>(
        &'a self,
        pick: impl Fn(Name, &Entry) -> Option<T> + 'a,
    ) -> impl Iterator<Item = T> + 'a {
        self.shards.iter().flat_map(move |shard| {
            shard.lock().entries.iter().filter_map(|(name, entry)| pick(*name, entry)).collect::<Vec<_>>()
        })
    }

    /// What may go of the chunks `of` which it is asked: the unpinned ones that `may`, by name and as they are open.
    pub(crate) fn candidates<'a>(
        &'a self,
        of: impl Fn(&Entry) -> bool + 'a,
        may: impl Fn(Name, Option<&Arc<Chunk>>) -> bool + 'a,
    ) -> impl Iterator<Item = Candidate> + 'a {
        let free = move |entry: &Entry| of(entry) && !entry.has(PINNED);
        let found = self.shards.iter().flat_map(move |shard| {
            let Shard { entries, live, dirty: _ } = &*shard.lock();
            let free = entries.iter().filter(|(_, entry)| free(entry));
            let opened = |name: &Name| live.get(name).and_then(Weak::upgrade);
            free.map(|(name, entry)| (*name, *entry, opened(name))).collect::<Vec<_>>()
        });
        // Here the shard is not locked: a chunk that was closed meanwhile is dropped.
        let found = found.filter(move |(name, _, chunk)| may(*name, chunk.as_ref()));
        found.map(|(name, entry, chunk)| Candidate {
            key: name.into(),
            order: entry.order.get(),
            slot: entry.slot,
            used: entry.used.get().max(chunk.as_ref().map_or(0, |chunk| chunk.used())),
            hits: entry.hits.saturating_add(chunk.as_ref().map_or(0, |chunk| chunk.hits())),
            spare: entry.has(SPARE),
            bytes: entry.charge().used,
        })
    }

    /// Changes that wait for the index.
    pub(crate) fn waiting(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Takes at most about `max` waiting changes, as they are now. The second is whether the whole catalog must be
    /// written anew instead; then nothing waits any more.
    pub(crate) fn take_waiting(&self, max: usize) -> (Vec<Row>, bool) {
        if self.overflow.swap(false, Ordering::AcqRel) {
            // From here on changes wait again, and what they change is read after this.
            for shard in &self.shards {
                let taken = std::mem::take(&mut shard.lock().dirty);
                self.dirty.fetch_sub(taken.len(), Ordering::Relaxed);
            }
            return (Vec::new(), true);
        }
        let mut rows = Vec::new();
        for shard in &self.shards {
            if rows.len() >= max {
                break;
            }
            let mut shard = shard.lock();
            let names = std::mem::take(&mut shard.dirty);
            self.dirty.fetch_sub(names.len(), Ordering::Relaxed);
            let ledger = self.ledger.lock();
            rows.extend(names.into_iter().map(|name| row(&shard, &ledger, name)));
        }
        (rows, false)
    }

    /// All entries of one shard, as the index keeps them; `None` after the last shard.
    pub(crate) fn shard_rows(&self, shard: usize) -> Option<Vec<Row>> {
        let shard = self.shards.get(shard)?.lock();
        let ledger = self.ledger.lock();
        Some(shard.entries.keys().map(|name| row(&shard, &ledger, *name)).collect())
    }

    /// The index is lost or could not be written: all of it must be written anew.
    pub(crate) fn rewrite(&self) {
        self.overflow.store(true, Ordering::Release);
    }

    pub(crate) fn must_rewrite(&self) -> bool {
        self.overflow.load(Ordering::Acquire)
    }

    fn mark(&self, shard: &mut Shard, name: Name) {
        if self.dirty.load(Ordering::Relaxed) >= MAX_DIRTY {
            self.rewrite();
        } else if shard.dirty.insert(name) {
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn shard(&self, name: Name) -> &Mutex<Shard> {
        // A byte is below the number of shards.
        &self.shards[usize::from(name.0[0])]
    }
}

fn row(shard: &Shard, ledger: &Ledger, name: Name) -> Row {
    let entry = shard.entries.get(&name).copied();
    let owned = entry.and_then(|entry| ledger.accounts.get(entry.slot as usize).map(|account| (account.id, entry)));
    (name, owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(file: u128, index: u32) -> Name {
        ChunkKey { file: FileIdentity(file), index }.into()
    }

    fn entry(order: u64) -> Entry {
        let order = Tick::new(order);
        Entry { order, used: order, hits: 0, slot: 0, data: 10, len: 100, overhead: 5, flags: 0 }
    }

    #[test]
    fn entries_are_small() {
        assert_eq!((std::mem::size_of::<Name>(), std::mem::size_of::<Entry>()), (20, 28));
    }

    #[test]
    fn ticks_come_back_and_end() {
        for ticks in [0, 1, 0x0102_0304_0506, Tick::MAX] {
            assert_eq!(Tick::new(ticks).get(), ticks);
        }
        assert_eq!(Tick::new(u64::MAX).get(), Tick::MAX);
    }

    #[test]
    fn keys_keep_their_order_and_come_back() {
        let key = ChunkKey { file: FileIdentity(0x1234 << 100 | 5), index: 77 };
        assert_eq!(ChunkKey::from(Name::from(key)), key);
        assert!(name(1, 9) < name(2, 0) && name(2, 255) < name(2, 256));
    }

    #[test]
    fn files_and_directories_are_ranges() {
        let catalog = Catalog::new(Ledger::new(1 << 40, 90, 80));
        catalog.ledger(|ledger| ledger.slot(DatasetId::local("n", "a")));
        let names = [name(0xabc << 116, 0), name(0xabc << 116, 1), name(0xabd << 116, 0), name(u128::MAX, 3)];
        for (order, name) in names.iter().enumerate() {
            catalog.apply(*name, true, |_| Some(entry(order as u64))).unwrap();
        }
        assert_eq!(catalog.of_file(FileIdentity(0xabc << 116)), names[..2]);
        assert_eq!(catalog.of_directory(0xabc), names[..2]);
        assert_eq!(catalog.of_directory(0xabd), names[2..3]);
        assert_eq!(catalog.of_directory(0xfff), names[3..]);
        assert_eq!(catalog.select(|name, _| Some(name)).count(), 4);
        assert_eq!(catalog.ledger(|ledger| ledger.total.used), 60);
    }

    #[test]
    fn changes_wait_once_and_pins_are_charged_in_full() {
        let catalog = Catalog::new(Ledger::new(1000, 90, 80));
        catalog.ledger(|ledger| ledger.slot(DatasetId::local("n", "a")));
        let name = name(1, 0);
        catalog.apply(name, true, |_| Some(entry(1))).unwrap();
        catalog.apply(name, true, |e| e.map(|e| Entry { flags: PINNED, ..e })).unwrap();
        assert_eq!(catalog.ledger(|ledger| ledger.total).used, 105);
        assert_eq!(catalog.waiting(), 1);
        let (rows, rewrite) = catalog.take_waiting(10);
        assert!(!rewrite && rows.len() == 1 && rows[0].1.is_some_and(|(_, e)| e.flags == PINNED));
        catalog.apply(name, true, |e| e.map(|e| Entry { flags: e.flags | TRUSTED, ..e })).unwrap();
        assert_eq!(catalog.waiting(), 0);
        catalog.apply(name, false, |_| None).unwrap();
        assert_eq!(catalog.ledger(|ledger| ledger.total), Charge::default());
        assert_eq!(catalog.take_waiting(10).0, [(name, None)]);
        catalog.rewrite();
        assert!(catalog.take_waiting(10).1 && !catalog.must_rewrite());
    }
}
