//! The store's handle: opening, asking for chunks, pins, numbers, closing.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use forebay_protocol::{BLOCK_SIZE, ChunkKey, DatasetId, FileIdentity};
use parking_lot::Mutex;

use crate::catalog::{Catalog, Entry, Name, PINNED, SPARE, SUPERSEDED};
use crate::chunk::{Chunk, ChunkSpec};
use crate::error::{OpenError, PinError, PinRefused, Refusal, WriteError};
use crate::evictor::{Outcome, Why, needs_room};
use crate::files::Load;
use crate::index::{self, Found, Stop};
use crate::ledger::{Account, DatasetPolicy, Ledger};
use crate::root::Root;
use crate::shared::{Shared, Tuning};
use crate::superblock;
use crate::trailer::{Header, Layout, PAGE};

/// How long a pin waits for the index.
const PIN_DEADLINE: Duration = Duration::from_secs(30);
/// Attempts of a pin to get the room that was made for it before others do.
const PIN_ATTEMPTS: usize = 4;

/// Where a store is, whose, and how large.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// The cache directory: empty, missing, or a store's.
    pub dir: PathBuf,
    /// `<runtime>/<worker>`; what another owner cached in the directory is deleted.
    pub owner: String,
    /// Bytes on disk.
    pub capacity: u64,
    /// Admission ends here, and the evictor begins: percent of the capacity.
    pub high_percent: u8,
    /// The evictor ends here, and pins do: percent of the capacity.
    pub low_percent: u8,
}

/// What went by [`ChunkStore::remove`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Bytes of blocks that are gone.
    pub bytes: u64,
    /// The chunk is pinned, so it stays.
    pub kept_pinned: bool,
}

/// What is held of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// All of its bytes are held, or being written.
    pub whole: bool,
    /// It is never evicted.
    pub pinned: bool,
}

/// A dataset's part of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetUsage {
    /// Bytes of blocks held.
    pub cached_bytes: u64,
    /// Bytes on disk: blocks, trailers, rounding, and what pinned chunks have yet to receive. The quota limits these.
    pub used_bytes: u64,
    /// Bytes of the pinned chunks, held or yet to be.
    pub pinned_bytes: u64,
    /// Bytes on disk of spare copies.
    pub spare_bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// The quota.
    pub quota: Option<u64>,
    /// Bytes of blocks that were evicted since the start.
    pub evicted_bytes: u64,
    /// Bytes dropped because nobody used them.
    pub expired_bytes: u64,
    /// Chunks and writes that were not admitted since the start.
    pub bypassed: u64,
    /// Blocks found damaged since the start.
    pub corrupt_blocks: u64,
}

/// The store as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes that it may use on disk.
    pub capacity: u64,
    /// Bytes that it uses, as in [`DatasetUsage::used_bytes`].
    pub used: u64,
    /// Bytes of blocks held.
    pub cached_bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Chunk files kept open.
    pub open_files: u64,
    /// Changes that wait for the index.
    pub index_waiting: u64,
    /// Blocks found damaged since the start.
    pub corrupt_blocks: u64,
    /// Chunk files that were damaged, another's, or did not fit, and were deleted since the start.
    pub dropped_files: u64,
    /// Failures of the disk since the start.
    pub write_failures: u64,
    /// The directory tree is being compared with the index: after an unclean end, or when the directory was away.
    pub sweeping: bool,
    /// Why nothing is cached at the moment, for people.
    pub problem: Option<String>,
}

/// The chunks of one cache directory. Shared by reference count; dropped without [`Self::close`], it leaves the
/// directory as a crash would, and the next start sweeps it.
pub struct ChunkStore {
    pub(crate) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl ChunkStore {
    /// Opens the store of a directory. Takes time (microseconds) and memory (76 bytes) in proportion to the number of
    /// chunks, and opens none of their files.
    pub fn open(options: StoreOptions) -> Result<Arc<Self>, OpenError> {
        Self::open_tuned(options, Tuning::default())
    }

    /// The same with other times and bounds.
    pub fn open_tuned(options: StoreOptions, tuning: Tuning) -> Result<Arc<Self>, OpenError> {
        let StoreOptions { dir, owner, capacity, high_percent: high, low_percent: low } = options;
        if !superblock::is_owner(&owner) {
            let limit = superblock::MAX_OWNER;
            return Err(OpenError::Options(format!("the owner must be one line of 1 to {limit} bytes")));
        }
        if capacity == 0 || low == 0 || low > high || high > 100 {
            let reason = format!("capacity {capacity} must be above 0, and 0 < low {low} <= high {high} <= 100");
            return Err(OpenError::Options(reason));
        }
        let root = Arc::new(Root::open(&dir, &owner)?);
        let (catalog, database, found) = index::open(&root, || Catalog::new(Ledger::new(capacity, high, low)));
        let shared = Arc::new(Shared::new(owner, tuning, catalog, root));
        shared.unswept.store(found == Found::Partial, Ordering::Release);
        shared.sweeping.store(found == Found::Partial, Ordering::Release);
        shared.requeue_superseded();

        type Body = Box<dyn FnOnce(&Shared) + Send>;
        let spawn = |name: &str, body: Body| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || body(&shared));
            thread.map_err(|source| OpenError::Io { path: dir.clone(), action: "start the threads of", source })
        };
        // From the first thread on, an early return must stop them: dropping the store does.
        let store = Arc::new(Self { shared: Arc::clone(&shared), threads: Mutex::default(), writer: Mutex::default() });
        let write = move |shared: &Shared| {
            let Tuning { commit_interval, retry_pause, .. } = shared.tuning;
            shared.index.run(&shared.catalog, || shared.root(), database, commit_interval, retry_pause);
        };
        *store.writer.lock() = Some(spawn("cache-index", Box::new(write))?);
        let evictor = spawn("cache-evictor", Box::new(|shared| shared.evict_until_stopped()))?;
        store.threads.lock().push(evictor);
        let sweeper = spawn("cache-sweep", Box::new(|shared| shared.sweep_until_stopped()))?;
        store.threads.lock().push(sweeper);
        Ok(store)
    }

    /// Announces a dataset, or changes its terms. Only announced ones are admitted.
    pub fn set_dataset(&self, id: DatasetId, policy: DatasetPolicy) {
        self.shared.catalog.ledger(|ledger| {
            let slot = ledger.slot(id);
            if let Some(account) = ledger.account(slot) {
                (account.served, account.forgotten, account.terms) = (true, false, policy);
            }
        });
        // A smaller quota may have to be enforced.
        self.shared.signals.kick();
    }

    /// Drops a dataset's chunks in the background, the pinned ones too.
    pub fn forget_dataset(&self, id: DatasetId) {
        self.shared.catalog.ledger(|ledger| {
            let slot = ledger.slot(id);
            if let Some(account) = ledger.account(slot) {
                (account.served, account.forgotten) = (false, true);
            }
        });
        self.shared.signals.forget();
    }

    /// The datasets that have chunks here or were announced. After a start: whoever is no longer served is to be
    /// forgotten.
    pub fn datasets(&self) -> Vec<DatasetId> {
        self.shared.catalog.ledger(|ledger| {
            let present = |account: &&Account| account.served || account.sum.chunks > 0;
            ledger.accounts.iter().filter(present).map(|account| account.id).collect()
        })
    }

    /// The chunk, if its file is open. This does not look at the disk.
    pub fn open_chunk(&self, spec: &ChunkSpec) -> Option<Arc<Chunk>> {
        self.attached(&Name::from(spec.key)).filter(|chunk| chunk.matches(spec))
    }

    /// The chunk, if it is present or, with `create`, would be admitted now. `None` is a bypass: quota, watermark or
    /// disk; stream without storing. A chunk that is created takes no place before its first block is written. One that
    /// is present is given to be read, so whether it takes more blocks shows only in [`Chunk::write`].
    pub fn chunk(&self, spec: &ChunkSpec, create: bool) -> Option<Arc<Chunk>> {
        let name = Name::from(spec.key);
        if let Some(chunk) = self.attached(&name) {
            return chunk.matches(spec).then_some(chunk);
        }
        let _entered = self.shared.enter().ok()?;
        let (chunk, keep) = {
            let _name = self.shared.stripe(name);
            let chunk = self.find(spec, create)?;
            let keep = chunk.has_body();
            (chunk, keep)
        };
        if keep {
            self.shared.open.insert(name, Arc::clone(&chunk));
        }
        Some(chunk)
    }

    /// A chunk that is open, and still the one of its name.
    fn attached(&self, name: &Name) -> Option<Arc<Chunk>> {
        self.shared.open.get(name).filter(|chunk| !chunk.is_detached())
    }

    /// Drops a chunk unless it is pinned.
    pub fn remove(&self, key: ChunkKey) -> Removed {
        match self.shared.evict(key.into(), Why::Asked) {
            Outcome::Gone(bytes) => Removed { bytes, kept_pinned: false },
            Outcome::Pinned => Removed { bytes: 0, kept_pinned: true },
            Outcome::Absent | Outcome::Kept => Removed::default(),
        }
    }

    /// The source has a newer version of this file: its chunks go soon, but not under those who still read them.
    pub fn supersede(&self, file: FileIdentity) {
        if let Ok(_entered) = self.shared.enter() {
            self.shared.supersede_file(file);
        }
    }

    /// Pins or unpins a chunk that is held, or that a caller has from [`Self::chunk`]. A pinned chunk is never evicted
    /// and its place is reserved in full: unpinned chunks make room for it. Durable when this returns.
    pub fn pin(&self, key: ChunkKey, pinned: bool) -> Result<(), PinError> {
        let _entered = self.shared.enter()?;
        let name = Name::from(key);
        let before = if pinned { self.set_pin(name)? } else { self.clear_pin(name) };
        let Err(reason) = self.shared.index.flush(PIN_DEADLINE) else { return Ok(()) };
        if pinned && !before {
            self.clear_pin(name);
        }
        Err(PinError::NotDurable(reason))
    }

    /// The chunk, pinned, also when the cache is full of what is not pinned. Durable when this returns.
    pub fn pinned_chunk(&self, spec: &ChunkSpec) -> Result<Arc<Chunk>, PinError> {
        let _entered = self.shared.enter()?;
        let found = {
            let _name = self.shared.stripe(spec.key.into());
            self.find_or_new(spec)
        };
        let chunk = found.ok_or(PinError::Absent)?;
        self.pin(spec.key, true)?;
        self.shared.open.insert(spec.key.into(), Arc::clone(&chunk));
        Ok(chunk)
    }

    /// Whether a chunk is pinned.
    pub fn is_pinned(&self, key: ChunkKey) -> bool {
        self.shared.catalog.get(key.into()).is_some_and(|entry| entry.has(PINNED))
    }

    /// Whether a chunk is held whole, and whether it is pinned; `None` when nothing is held of it.
    pub fn holds(&self, key: ChunkKey) -> Option<Held> {
        let entry = self.shared.catalog.get(key.into())?;
        Some(Held { whole: entry.data == entry.len, pinned: entry.has(PINNED) })
    }

    /// Says of each chunk, by its dataset, its key and the bytes of it that are held, whether it is spare: others have it,
    /// so it goes first when room is needed, whatever the dataset's policy. Until it is said again; not after a restart.
    pub fn mark_spare(&self, mut is_spare: impl FnMut(DatasetId, ChunkKey, u64) -> bool) {
        let Ok(_entered) = self.shared.enter() else { return };
        let ids: Vec<DatasetId> =
            self.shared.catalog.ledger(|ledger| ledger.accounts.iter().map(|account| account.id).collect());
        for (name, entry) in self.shared.catalog.select(|name, entry| Some((name, *entry))) {
            // One of a dataset that came since is looked at the next time.
            let Some(id) = ids.get(entry.slot as usize) else { continue };
            let spare = is_spare(*id, name.into(), u64::from(entry.data));
            if spare != entry.has(SPARE) {
                let flags = |flags: u8| if spare { flags | SPARE } else { flags & !SPARE };
                self.shared.amend(name, entry.order, |entry| Entry { flags: flags(entry.flags), ..entry });
            }
        }
    }

    /// Whether `bytes` more of a dataset could be pinned: what is pinned must fit its quota and the low watermark.
    /// Nothing is set aside; every pin is checked again.
    pub fn reserve_pin(&self, dataset: DatasetId, bytes: u64) -> Result<(), PinRefused> {
        self.shared.catalog.ledger(|ledger| {
            let slot = ledger.slot(dataset);
            ledger.would_pin(slot, bytes)
        })
    }

    /// What a dataset has here.
    pub fn usage(&self, dataset: DatasetId) -> DatasetUsage {
        self.shared.catalog.ledger(|ledger| {
            ledger.find(dataset).map_or_else(DatasetUsage::default, |account| {
                let Account {
                    id: _,
                    served: _,
                    forgotten: _,
                    hand: _,
                    ages: _,
                    terms,
                    sum,
                    evicted_bytes,
                    expired_bytes,
                    bypassed,
                    corrupt_blocks,
                } = account.clone();
                DatasetUsage {
                    cached_bytes: sum.data,
                    used_bytes: sum.used,
                    pinned_bytes: sum.pinned_data,
                    spare_bytes: sum.spare,
                    chunks: sum.chunks,
                    quota: terms.quota,
                    evicted_bytes,
                    expired_bytes,
                    bypassed,
                    corrupt_blocks,
                }
            })
        })
    }

    /// The store as a whole.
    pub fn totals(&self) -> Totals {
        let (capacity, sum) = self.shared.catalog.ledger(|ledger| (ledger.capacity, ledger.total));
        let events = &self.shared.events;
        Totals {
            capacity,
            used: sum.used,
            cached_bytes: sum.data,
            chunks: sum.chunks,
            open_files: self.shared.open.len() as u64,
            index_waiting: self.shared.catalog.waiting() as u64,
            corrupt_blocks: events.corrupt_blocks.load(Ordering::Relaxed),
            dropped_files: events.dropped_files.load(Ordering::Relaxed),
            write_failures: events.write_failures.load(Ordering::Relaxed),
            sweeping: self.shared.sweeping.load(Ordering::Acquire),
            problem: self.shared.disk.problem(),
        }
    }

    /// Makes all the room that is due: the store's own thread does the same soon after it is due. For programs that have no
    /// time between two reads, as a network and a source take it.
    pub fn make_due_room(&self) {
        self.shared.round();
    }

    /// Ends cleanly: waits for writes in flight, writes the index, and releases the directory. Whoever holds a chunk or
    /// an extent can still read it. Afterwards nothing is found or admitted.
    pub fn close(&self) {
        self.end(true);
    }

    fn end(&self, clean: bool) {
        if !self.shared.shut() {
            return;
        }
        self.shared.stop_threads();
        for thread in self.threads.lock().drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        let complete = !self.shared.unswept.load(Ordering::Acquire);
        self.shared.index.stop(if clean { Stop::Clean { complete } } else { Stop::Abandon });
        if let Some(writer) = self.writer.lock().take() {
            let _ = writer.join();
        }
        self.shared.open.clear();
        self.shared.set_root(None);
    }

    /// The open chunk, or the one on disk, or a new one. The stripe is held.
    fn find(&self, spec: &ChunkSpec, create: bool) -> Option<Arc<Chunk>> {
        let shared = &self.shared;
        let name = Name::from(spec.key);
        let live = shared.catalog.live(name).filter(|chunk| !chunk.is_detached());
        if let Some(chunk) = &live
            && chunk.has_body()
        {
            return live.filter(|chunk| chunk.matches(spec));
        }
        if live.is_none()
            && (shared.catalog.get(name).is_some() || shared.unswept.load(Ordering::Acquire))
            && let Some(chunk) = self.load(spec)?
        {
            return Some(chunk);
        }
        if !create {
            return None;
        }
        let chunk = match live {
            Some(chunk) => Some(chunk).filter(|chunk| chunk.matches(spec))?,
            None => self.fresh(spec)?,
        };
        // A place that a pinned chunk keeps needs no admission.
        if !shared.catalog.get(name).is_some_and(|entry| entry.has(PINNED)) {
            let least = u64::from(chunk.layout().overhead()) + chunk.bytes_of(0, 1).min(BLOCK_SIZE);
            let fits = shared.catalog.ledger(|ledger| ledger.would_admit(chunk.slot(), least));
            let admitted = fits.and_then(|()| shared.disk.admit(&*shared.root().ok_or(Refusal::Closed)?, 0));
            if let Err(refusal) = admitted {
                shared.refused(chunk.slot(), name, refusal);
                return None;
            }
        }
        shared.catalog.set_live(name, &chunk);
        Some(chunk)
    }

    /// As [`Self::find`], without asking for admission.
    fn find_or_new(&self, spec: &ChunkSpec) -> Option<Arc<Chunk>> {
        if let Some(chunk) = self.find(spec, false) {
            return Some(chunk);
        }
        let name = Name::from(spec.key);
        if let Some(chunk) = self.shared.catalog.live(name).filter(|chunk| !chunk.is_detached()) {
            return Some(chunk).filter(|chunk| chunk.matches(spec));
        }
        let chunk = self.fresh(spec)?;
        self.shared.catalog.set_live(name, &chunk);
        Some(chunk)
    }

    /// The chunk on disk; `Some(None)` when there is none, `None` when it cannot be opened now.
    fn load(&self, spec: &ChunkSpec) -> Option<Option<Arc<Chunk>>> {
        let shared = &self.shared;
        let (header, layout) = described(spec)?;
        match shared.load(&*shared.root()?, spec.key, Some(&header)) {
            Load::Good(loaded) => {
                let chunk = Arc::new(Chunk::new(shared, spec.key, header, layout, Some(*loaded)));
                shared.catalog.set_live(spec.key.into(), &chunk);
                Some(Some(chunk))
            }
            Load::Absent => Some(None),
            Load::Unavailable(error) => {
                shared.disk_failed("open a chunk", &error);
                None
            }
        }
    }

    fn fresh(&self, spec: &ChunkSpec) -> Option<Arc<Chunk>> {
        let (header, layout) = described(spec)?;
        Some(Arc::new(Chunk::new(&self.shared, spec.key, header, layout, None)))
    }

    /// Whether it was pinned before.
    fn set_pin(&self, name: Name) -> Result<bool, PinError> {
        for _ in 0..PIN_ATTEMPTS {
            let (slot, missing) = match self.try_pin(name)? {
                Ok(before) => return Ok(before),
                Err(missing) => missing,
            };
            if !self.shared.make_room(slot, missing, name) {
                break;
            }
        }
        // The last refusal says by how much.
        match self.try_pin(name)? {
            Ok(before) => Ok(before),
            Err((slot, missing)) => {
                let refusal = self.shared.catalog.ledger(|ledger| ledger.would_admit(slot, missing));
                Err(refusal.err().unwrap_or(Refusal::Dataset).into())
            }
        }
    }

    /// Pins, or says how many bytes of which dataset have no room yet.
    fn try_pin(&self, name: Name) -> Result<Result<bool, (u32, u64)>, PinError> {
        let shared = &self.shared;
        let _name = shared.stripe(name);
        let live = shared.catalog.live(name);
        if shared.catalog.get(name).is_none() {
            let chunk = live.as_ref().filter(|chunk| !chunk.is_detached()).ok_or(PinError::Absent)?;
            match chunk.create_body(0) {
                Ok(()) => {}
                Err(WriteError::Refused(refusal)) if needs_room(&refusal) => {
                    let full = chunk.size() + u64::from(chunk.layout().overhead());
                    // In vain if it could not be pinned at all.
                    shared.catalog.ledger(|ledger| ledger.would_pin(chunk.slot(), full)).map_err(Refusal::from)?;
                    return Ok(Err((chunk.slot(), full)));
                }
                Err(WriteError::Refused(refusal)) => return Err(refusal.into()),
                Err(WriteError::Disk(problem)) => return Err(Refusal::Disk(problem).into()),
                Err(WriteError::Gone | WriteError::Shape(_)) => return Err(PinError::Absent),
            }
        }
        let pinned = shared.catalog.apply(name, true, |entry| entry.map(|e| Entry { flags: e.flags | PINNED, ..e }));
        match pinned {
            Ok(Some(before)) => {
                shared.mark_pinned(name.into(), true);
                Ok(Ok(before.has(PINNED)))
            }
            Ok(None) => Err(PinError::Absent),
            Err(refusal) if needs_room(&refusal) => {
                let entry = shared.catalog.get(name).ok_or(PinError::Absent)?;
                Ok(Err((entry.slot, u64::from(entry.len.saturating_sub(entry.data)))))
            }
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Whether it was pinned before.
    fn clear_pin(&self, name: Name) -> bool {
        let shared = &self.shared;
        let _name = shared.stripe(name);
        // Never refused: nothing grows.
        let before = shared
            .catalog
            .apply(name, false, |entry| entry.map(|entry| Entry { flags: entry.flags & !PINNED, ..entry }));
        let before = before.ok().flatten();
        match before {
            // Perhaps only a place, without a file: then it is given up with the pin.
            Some(entry) if entry.data == 0 => {
                let live = shared.catalog.live(name);
                if !live.is_some_and(|chunk| chunk.has_body()) {
                    let _ = shared.root().map(|root| root.unlink_chunk(name.into()));
                    shared.discard(name, Some(entry.order));
                }
            }
            Some(_) => shared.mark_pinned(name.into(), false),
            None => {}
        }
        if before.is_some_and(|entry| entry.has(PINNED) && entry.has(SUPERSEDED)) {
            shared.signals.supersede(ChunkKey::from(name).file, std::time::Instant::now());
        }
        before.is_some_and(|entry| entry.has(PINNED))
    }
}

impl Drop for ChunkStore {
    fn drop(&mut self) {
        self.end(false);
    }
}

/// The chunk's header and layout; `None` when it lies beyond the end of its file, or its name is not its own.
fn described(spec: &ChunkSpec) -> Option<(Header, Layout)> {
    let ChunkSpec { dataset, path, version, key } = spec;
    let header = Header {
        dataset: *dataset,
        path: path.clone(),
        key: version.key.clone(),
        size: version.size,
        index: key.index,
    };
    let layout = Layout::of(&header)?;
    debug_assert!(layout.trailer.is_multiple_of(PAGE));
    (header.chunk_key() == *key).then_some((header, layout))
}
