//! What a store's handle, its chunks and its threads share.
//!
//! Lock order: gate, evicting, name stripe, `Chunk::trailer`, `Chunk::state`, catalog shard, ledger. The disk's state,
//! the index's control and the evictor's signals are leaves.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forebay_protocol::ChunkKey;
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use quick_cache::sync::Cache;

use crate::catalog::{Catalog, Entry, Name, Tick};
use crate::chunk::Chunk;
use crate::disk::Disk;
use crate::error::Refusal;
use crate::evictor::Signals;
use crate::index::Index;
use crate::ledger::Deficit;
use crate::root::Root;

/// Locks over names: two chunks share one with a probability of 1/1,024.
const STRIPES: usize = 1024;

/// Times and bounds; the defaults are what a worker uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Least time between two commits of the index.
    pub commit_interval: Duration,
    /// How long a superseded chunk stays for those who still read it.
    pub supersede_grace: Duration,
    /// How long no write is tried after one failed.
    pub retry_pause: Duration,
    /// How often the evictor looks by itself.
    pub tick: Duration,
    /// Chunk files that are kept open; more only while a caller holds them.
    pub open_files: usize,
    /// Whether admission stops when the file system is nearly full.
    pub watch_space: bool,
    /// Uses of a chunk within this time after one that counted, or after the chunk was made, do not count again.
    pub one_use: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            commit_interval: Duration::from_millis(200),
            supersede_grace: Duration::from_secs(60),
            retry_pause: Duration::from_secs(10),
            tick: Duration::from_secs(1),
            open_files: 1024,
            watch_space: true,
            one_use: Duration::from_secs(10),
        }
    }
}

/// What happened since the start.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) corrupt_blocks: AtomicU64,
    pub(crate) dropped_files: AtomicU64,
    pub(crate) write_failures: AtomicU64,
}

pub(crate) struct Shared {
    pub(crate) owner: String,
    pub(crate) tuning: Tuning,
    pub(crate) catalog: Catalog,
    pub(crate) disk: Disk,
    pub(crate) index: Index,
    pub(crate) signals: Signals,
    pub(crate) events: Events,
    /// One eviction round at a time.
    pub(crate) evicting: Mutex<()>,
    /// Open chunks that are kept so; never looked at under another lock.
    pub(crate) open: Cache<Name, Arc<Chunk>>,
    /// The sweep runs, or ended early: files may exist that the catalog does not know.
    pub(crate) unswept: AtomicBool,
    pub(crate) sweeping: AtomicBool,
    pub(crate) stopping: AtomicBool,
    root: RwLock<Option<Arc<Root>>>,
    stripes: Box<[Mutex<()>]>,
    /// Closed when true; held for reading by whatever changes the catalog.
    gate: RwLock<bool>,
    start: Instant,
}

impl Shared {
    pub(crate) fn new(owner: String, tuning: Tuning, catalog: Catalog, root: Arc<Root>) -> Self {
        Self {
            owner,
            tuning,
            catalog,
            disk: Disk::new(tuning.retry_pause, tuning.watch_space),
            index: Index::default(),
            signals: Signals::default(),
            events: Events::default(),
            evicting: Mutex::new(()),
            open: Cache::new(tuning.open_files.max(1)),
            unswept: AtomicBool::new(false),
            sweeping: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            root: RwLock::new(Some(root)),
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            gate: RwLock::new(false),
            start: Instant::now(),
        }
    }

    /// Milliseconds on the store's clock; never 0.
    pub(crate) fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64 + 1
    }

    /// The directory; `None` once the store is closed.
    pub(crate) fn root(&self) -> Option<Arc<Root>> {
        self.root.read().clone()
    }

    pub(crate) fn set_root(&self, root: Option<Arc<Root>>) {
        *self.root.write() = root;
    }

    /// Serialises opening, creating, replacing and unlinking of the file of this name, and pinning it.
    pub(crate) fn stripe(&self, name: Name) -> MutexGuard<'_, ()> {
        // The identity is a hash: any of its bytes will do, except the one that selects the shard.
        let stripe = usize::from(name.0[14]) << 8 | usize::from(name.0[15] ^ name.0[19]);
        self.stripes[stripe % STRIPES].lock()
    }

    /// Begins something that changes the catalog; closing waits for it.
    pub(crate) fn enter(&self) -> Result<RwLockReadGuard<'_, bool>, Refusal> {
        // Recursive: a read that finds damage enters again.
        let gate = self.gate.read_recursive();
        if *gate { Err(Refusal::Closed) } else { Ok(gate) }
    }

    /// Lets nobody enter any more, and waits for those inside. Whether this call closed it.
    pub(crate) fn shut(&self) -> bool {
        !std::mem::replace(&mut *self.gate.write(), true)
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Reserves bytes for blocks of a chunk's file.
    pub(crate) fn grow(&self, slot: u32, name: Name, order: Tick, bytes: u64) -> Result<(), crate::WriteError> {
        let root = self.root().ok_or(Refusal::Closed)?;
        if let Err(refusal) = self.disk.admit(&root, bytes) {
            return Err(self.refused(slot, name, refusal).into());
        }
        let mut found = false;
        let grown = self.catalog.apply(name, true, |entry| {
            let entry = entry.filter(|entry| entry.order == order).inspect(|_| found = true).or(entry);
            // At most a chunk, and what writers of a replaced file have not given back yet: far below 4 GiB.
            entry.map(|entry| if found { Entry { data: entry.data + bytes as u32, ..entry } } else { entry })
        });
        match grown {
            Ok(_) if found => Ok(()),
            Ok(_) => Err(crate::WriteError::Gone),
            Err(refusal) => Err(self.refused(slot, name, refusal).into()),
        }
    }

    /// Gives bytes of a chunk's file back; nothing when that file is no longer the chunk's.
    pub(crate) fn shrink(&self, name: Name, order: Tick, bytes: u64) {
        self.amend(name, order, |entry| Entry { data: entry.data.saturating_sub(bytes as u32), ..entry });
    }

    /// Changes the entry of a chunk's file without adding to it.
    pub(crate) fn amend(&self, name: Name, order: Tick, change: impl FnOnce(Entry) -> Entry) {
        // Never refused: nothing grows.
        let _ = self.catalog.apply(name, false, |entry| match entry {
            Some(entry) if entry.order == order => Some(change(entry)),
            other => other,
        });
    }

    /// Counts a refusal, and calls the evictor when there may be something to free.
    pub(crate) fn refused(&self, slot: u32, name: Name, refusal: Refusal) -> Refusal {
        self.catalog.ledger(|ledger| {
            if let Some(account) = ledger.account(slot) {
                account.bypassed += 1;
            }
        });
        match &refusal {
            Refusal::Quota { wanted, .. } | Refusal::Watermark { wanted, .. } => {
                let asks = self.ceded(slot, *wanted, name) != Deficit::default();
                self.signals.press(asks.then_some((slot, *wanted, name)));
            }
            Refusal::Disk(_) => self.signals.press(None),
            Refusal::Pin(_) | Refusal::Dataset | Refusal::Closed => {}
        }
        refusal
    }

    /// Notes that the disk failed; returns the problem in words.
    pub(crate) fn disk_failed(&self, doing: &'static str, error: &io::Error) -> String {
        self.events.write_failures.fetch_add(1, Ordering::Relaxed);
        let Some(root) = self.root() else { return Refusal::Closed.to_string() };
        if error.kind() == io::ErrorKind::NotFound {
            // Perhaps the directory is gone: the evictor looks.
            self.signals.kick();
        }
        self.disk.failed(&root, doing, error)
    }

    pub(crate) fn found_corrupt(&self, slot: u32, key: ChunkKey, blocks: u32) {
        tracing::warn!(file = %key.file, chunk = key.index, blocks, "damaged blocks in the cache; dropping them");
        self.events.corrupt_blocks.fetch_add(u64::from(blocks), Ordering::Relaxed);
        self.catalog.ledger(|ledger| {
            if let Some(account) = ledger.account(slot) {
                account.corrupt_blocks += u64::from(blocks);
            }
        });
    }
}
