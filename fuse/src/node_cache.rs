//! The node cache: files on a local disk. Large ones are whole files, which the kernel reads itself; small ones are in
//! packs ([`packs`]), from which the daemon answers.
//!
//! A large file is fetched as a whole, beside the reads that asked for it, and is complete or not there: it is written under
//! another name, synced, and renamed. What is complete never changes and is only ever unlinked, because its descriptors
//! are out with the kernel. Beside it are the checksums of its blocks, by which it is verified before a process hands it
//! out for the first time: whoever wrote it may have died with the machine.
//!
//! ```text
//! DIR/DATASET/FILE         the bytes, nothing else; FILE is the file identity in hexadecimal
//! DIR/DATASET/FILE.sums    crc32c of each block, little-endian
//! DIR/DATASET/packs/...    small files
//! DIR/filling/...          what is being written
//! ```
//!
//! Room: a file is admitted while the quota and the disk have room for it; else what belongs to no volume of this daemon
//! goes, the oldest first; else the file is read without the node cache. Nothing of a volume that is mounted is evicted: for
//! shuffled epochs to replace one file by another gains nothing, and an open file would not give its room back.
//!
//! Two daemons share the directory. Only the one that serves writes; the other one looks through it when it comes to serve.
//!
//! Not handled: versions of files that changed at the source stay until their volume is unmounted.

mod disk;
mod packs;

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_protocol::{BLOCK_SIZE, DatasetId, FileIdentity, block_checksum};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use self::{
    disk::{Disk, Found},
    packs::{Packs, Record, Refused},
};
use crate::{
    throttle::Throttle,
    tree::{Reader, TreeError},
};

/// Smaller files are in packs: an open that is passed through costs more than their reads.
pub const SMALLEST: u64 = 1 << 20;
/// Files that are fetched or verified at once.
const AT_ONCE: usize = 2;
/// Files that wait for that at most; others are asked for again by their next open.
const WAITING: usize = 1024;
/// One request of a fill.
const PIECE: u64 = 1 << 20;
/// Bytes of small files that wait to be written, at most.
const OFFERED: usize = 8 << 20;
/// Small files that are written in one go.
const BATCH: usize = 64;
/// Small files that are read from the disk at once.
const READS: usize = 64;
/// How long a read from a pack may take until the file is read from a worker.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a file that could not be had is left alone.
const LEFT_ALONE: Duration = Duration::from_secs(60);

/// Which file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Its dataset.
    pub dataset: DatasetId,
    /// What it is: path, version and size.
    pub file: FileIdentity,
    /// Its bytes.
    pub size: u64,
}

/// How the cache runs.
#[derive(Clone, Debug)]
pub struct NodeCacheOptions {
    /// Its directory: made if it is missing, now or when somebody removed it.
    pub dir: PathBuf,
    /// Bytes that files may take.
    pub capacity: u64,
    /// Part of the file system that stays free, in percent.
    pub free_percent: u8,
}

/// What the cache holds and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeCacheUsage {
    /// Bytes that files may take.
    pub capacity: u64,
    /// Bytes of files, complete or being fetched.
    pub used: u64,
    /// Small files, complete.
    pub small: u64,
    /// Bytes that were read from small files here.
    pub read: u64,
    /// Files that were fetched.
    pub fetched: u64,
    /// Files for which there was no room.
    pub bypassed: u64,
    /// Files that could not be fetched or written.
    pub failed: u64,
    /// Files that did not match their checksums, and were dropped.
    pub corrupt: u64,
}

/// The cache of one daemon; clones are the same.
#[derive(Clone, Debug)]
pub struct NodeCache {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    disk: Disk,
    capacity: u64,
    state: Mutex<State>,
    /// Held while the directory is looked through.
    looking: Mutex<()>,
    turns: Arc<Semaphore>,
    /// Of datasets of volumes.
    packs: RwLock<HashMap<DatasetId, Arc<Packs>>>,
    /// To who writes packs, and room on the way.
    offers: OnceLock<mpsc::UnboundedSender<Offer>>,
    offered: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    read: AtomicU64,
    fetched: AtomicU64,
    bypassed: AtomicU64,
    failed: AtomicU64,
    corrupt: AtomicU64,
    complaints: Throttle,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of files; `None` until the directory was looked through.
    used: Option<u64>,
    /// Files that a predecessor left, until they are verified.
    left: HashSet<(DatasetId, FileIdentity)>,
    /// Complete, and verified by this process.
    ready: HashSet<Key>,
    /// Being fetched or verified, or waiting for it.
    busy: HashSet<Key>,
    failed: HashMap<Key, Instant>,
    /// When the disk failed, or did not answer in time.
    hung: Option<Instant>,
    /// Datasets of volumes, and how many volumes each has.
    mounted: HashMap<DatasetId, usize>,
}

/// A small file that was read.
#[derive(Debug)]
struct Offer {
    record: Record,
    packs: Arc<Packs>,
    _permit: OwnedSemaphorePermit,
}

/// Writes what is offered, for as long as the cache exists.
async fn write_packs(cache: Weak<Inner>, mut offers: mpsc::UnboundedReceiver<Offer>) {
    loop {
        let mut batch = Vec::new();
        if offers.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        let Some(inner) = cache.upgrade() else { return };
        // A panic there is reported by its hook.
        let _ = tokio::task::spawn_blocking(move || NodeCache { inner }.write(batch)).await;
    }
}

impl State {
    /// The disk is left alone for now.
    fn hangs(&self) -> bool {
        self.hung.is_some_and(|since| since.elapsed() < LEFT_ALONE)
    }
}

impl NodeCache {
    /// The cache in its directory; nothing is looked at yet.
    pub fn new(options: NodeCacheOptions) -> Self {
        let inner = Inner {
            disk: Disk::new(options.dir, options.free_percent),
            capacity: options.capacity,
            state: Mutex::default(),
            looking: Mutex::default(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
            packs: RwLock::default(),
            offers: OnceLock::new(),
            offered: Arc::new(Semaphore::new(OFFERED)),
            reads: Arc::new(Semaphore::new(READS)),
            read: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            bypassed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            complaints: Throttle::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// What it holds and did.
    pub fn usage(&self) -> NodeCacheUsage {
        let inner = &self.inner;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NodeCacheUsage {
            capacity: inner.capacity,
            used: inner.state.lock().used.unwrap_or(0),
            small: inner.packs.read().values().map(|packs| packs.len() as u64).sum(),
            read: count(&inner.read),
            fetched: count(&inner.fetched),
            bypassed: count(&inner.bypassed),
            failed: count(&inner.failed),
            corrupt: count(&inner.corrupt),
        }
    }

    /// A volume of a dataset is served here from now on: its files stay. The first looks through what a predecessor left.
    pub fn mounted(&self, dataset: DatasetId) {
        let first = {
            let mut state = self.inner.state.lock();
            let count = state.mounted.entry(dataset).or_default();
            *count += 1;
            *count == 1
        };
        if first {
            let cache = self.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = cache.look().and_then(|()| cache.open_packs(dataset)) {
                    tracing::warn!(%dataset, %error, "the node cache cannot be looked through: small files are not kept");
                }
            });
        }
    }

    fn open_packs(&self, dataset: DatasetId) -> io::Result<()> {
        let packs = Arc::new(Packs::open(self.inner.disk.packs(dataset))?);
        // Whoever unmounts takes them out under the same lock.
        let state = self.inner.state.lock();
        if state.mounted.contains_key(&dataset) {
            self.inner.packs.write().insert(dataset, packs);
        }
        Ok(())
    }

    /// Once. What is being written belongs to a predecessor, which is dead.
    fn look(&self) -> io::Result<()> {
        let _one = self.inner.looking.lock();
        if self.inner.state.lock().used.is_none() {
            let found = self.inner.disk.look()?;
            let mut state = self.inner.state.lock();
            state.used = Some(found.iter().map(|file| file.size).sum());
            state.left = found.into_iter().filter_map(|found| Some((found.dataset, found.file?))).collect();
        }
        Ok(())
    }

    /// It is not any more.
    pub fn unmounted(&self, dataset: DatasetId) {
        let mut state = self.inner.state.lock();
        if let Some(count) = state.mounted.get_mut(&dataset) {
            *count -= 1;
            if *count == 0 {
                state.mounted.remove(&dataset);
                self.inner.packs.write().remove(&dataset);
            }
        }
    }

    /// The file, if it is complete and this process has verified it. Opens one descriptor, for reading only. When the disk
    /// does not answer until `deadline`, it is left alone for a while.
    pub async fn get(&self, key: Key, deadline: tokio::time::Instant) -> Option<File> {
        {
            let state = self.inner.state.lock();
            if state.hangs() || !state.ready.contains(&key) {
                return None;
            }
        }
        let inner = self.inner.clone();
        let opened = tokio::task::spawn_blocking(move || inner.disk.complete(&key));
        let Ok(opened) = tokio::time::timeout_at(deadline, opened).await else {
            self.hung();
            return None;
        };
        let file = opened.ok()?.ok();
        if file.is_none() && self.inner.state.lock().ready.remove(&key) {
            // Somebody removed it.
            self.give_back(key.size);
        }
        file
    }

    /// Whether a predecessor left the file: [`Self::want`] has it verified, or fetched if it is damaged.
    pub fn is_left(&self, key: &Key) -> bool {
        self.inner.state.lock().left.contains(&(key.dataset, key.file))
    }

    /// Has a file that is not ready made so in the background: verified, if it is there, or fetched through a reader that
    /// `open` makes. Says nothing of what comes of it: the next open of the file finds out.
    pub fn want<R: Reader>(&self, key: Key, open: impl FnOnce() -> Arc<R>) {
        {
            let mut state = self.inner.state.lock();
            let now = Instant::now();
            state.failed.retain(|_, since| now.duration_since(*since) < LEFT_ALONE);
            let known = state.ready.contains(&key) || state.busy.contains(&key) || state.failed.contains_key(&key);
            if known || state.busy.len() >= AT_ONCE + WAITING {
                return;
            }
            state.busy.insert(key);
        }
        let (cache, reader) = (self.clone(), open());
        tokio::spawn(async move {
            let done = cache.make_ready(key, &*reader).await;
            let mut state = cache.inner.state.lock();
            state.busy.remove(&key);
            state.left.remove(&(key.dataset, key.file));
            match done {
                Ok(true) => {
                    state.ready.insert(key);
                }
                Ok(false) => {
                    state.failed.insert(key, Instant::now());
                }
                Err(error) => {
                    state.failed.insert(key, Instant::now());
                    drop(state);
                    cache.inner.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(file = %key.file, %error, "a file is not kept on this node");
                }
            }
        });
    }

    /// Whether it is ready now; false when there is no room.
    async fn make_ready<R: Reader>(&self, key: Key, reader: &R) -> Result<bool, FillError> {
        // The semaphore is never closed.
        let _turn = self.inner.turns.clone().acquire_owned().await;
        let cache = self.clone();
        let there = blocking(move || cache.verify(&key)).await?;
        if there {
            return Ok(true);
        }
        let cache = self.clone();
        if !blocking(move || cache.reserve(key.size)).await? {
            self.inner.bypassed.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        }
        let filled = self.fill(key, reader).await;
        if filled.is_err() {
            self.give_back(key.size);
        } else {
            self.inner.fetched.fetch_add(1, Ordering::Relaxed);
        }
        filled.map(|()| true)
    }

    /// Whether the file is complete and right. A wrong one is dropped.
    fn verify(&self, key: &Key) -> io::Result<bool> {
        let inner = &self.inner;
        let Some(right) = inner.disk.matches(key)? else { return Ok(false) };
        if !right {
            inner.corrupt.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(file = %key.file, "a file of the node cache does not match its checksums: it is dropped");
            inner.disk.remove(key.dataset, key.file)?;
            self.give_back(key.size);
        }
        Ok(right)
    }

    /// Takes room for a file; false when there is none.
    fn reserve(&self, size: u64) -> io::Result<bool> {
        let inner = &self.inner;
        self.look()?;
        loop {
            let (of_quota, of_disk, mounted) = {
                let mut state = inner.state.lock();
                let used = state.used.get_or_insert(0);
                let (of_quota, of_disk) = ((*used + size).saturating_sub(inner.capacity), inner.disk.missing(size)?);
                if of_quota == 0 && of_disk == 0 {
                    *used += size;
                    return Ok(true);
                }
                (of_quota, of_disk, state.mounted.keys().copied().collect::<HashSet<_>>())
            };
            let evicted = inner.disk.evict(of_quota.max(of_disk), &mounted)?;
            if evicted.is_empty() {
                if let Some(suppressed) = inner.complaints.allow() {
                    tracing::info!(size, of_quota, of_disk, suppressed, "no room in the node cache: bytes are missing");
                }
                return Ok(false);
            }
            for Found { dataset, file, size, .. } in evicted {
                if let Some(file) = file {
                    inner.state.lock().ready.remove(&Key { dataset, file, size });
                }
                self.give_back(size);
            }
        }
    }

    /// Whether a file is here, as far as is known without looking: a small one in a pack, a larger one complete.
    pub fn has(&self, key: &Key) -> bool {
        let packed = || self.inner.packs.read().get(&key.dataset).is_some_and(|packs| packs.find(key.file).is_some());
        if key.size < SMALLEST { packed() } else { self.inner.state.lock().ready.contains(key) }
    }

    /// Bytes of a small file that is here. What is not in memory is read where nobody else waits for the disk.
    pub async fn read(&self, key: Key, offset: u64, len: usize) -> Option<Bytes> {
        let inner = &self.inner;
        let packs = inner.packs.read().get(&key.dataset)?.clone();
        let found = packs.find(key.file)?;
        let read = match found.read_now(&key, offset, len) {
            Err(Refused::WouldBlock) => {
                if inner.state.lock().hangs() {
                    return None;
                }
                // The semaphore is never closed.
                let permit = inner.reads.clone().acquire_owned().await;
                let reading = tokio::task::spawn_blocking(move || {
                    let _permit = permit;
                    found.read(&key, offset, len)
                });
                match tokio::time::timeout(PATIENCE, reading).await {
                    Ok(read) => read.ok()?,
                    Err(_) => {
                        self.hung();
                        return None;
                    }
                }
            }
            read => read,
        };
        match read {
            Ok(bytes) => {
                inner.read.fetch_add(len as u64, Ordering::Relaxed);
                Some(bytes)
            }
            Err(Refused::WouldBlock) => None,
            Err(Refused::Broken(error)) => {
                inner.corrupt.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(file = %key.file, %error, "a file of the node cache cannot be used: it is dropped");
                packs.forget(key.file);
                None
            }
        }
    }

    /// Keeps a small file, if there is room for it and somebody has the time. Called within a runtime.
    pub fn offer(&self, key: Key, pieces: &[Bytes]) {
        let inner = &self.inner;
        let Some(packs) = inner.packs.read().get(&key.dataset).cloned() else { return };
        let Ok(size) = u32::try_from(key.size) else { return };
        if size == 0 || packs.find(key.file).is_some() || inner.state.lock().hangs() {
            return;
        }
        let Ok(permit) = inner.offered.clone().try_acquire_many_owned(size) else { return };
        let Some(record) = Record::new(key, pieces) else { return };
        let offers = inner.offers.get_or_init(|| {
            let (sender, offers) = mpsc::unbounded_channel();
            tokio::spawn(write_packs(Arc::downgrade(inner), offers));
            sender
        });
        let _ = offers.send(Offer { record, packs, _permit: permit });
    }

    fn write(&self, offers: Vec<Offer>) {
        for Offer { record, packs, _permit } in offers {
            // Several may have read it at once.
            if packs.find(record.key.file).is_some() {
                continue;
            }
            let size = record.len();
            let written = match self.reserve(size) {
                Ok(true) => packs.append(record).inspect_err(|_| self.give_back(size)),
                Ok(false) => {
                    self.inner.bypassed.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                self.inner.failed.fetch_add(1, Ordering::Relaxed);
                self.inner.state.lock().hung = Some(Instant::now());
                tracing::warn!(%error, "small files are not kept on this node for a while");
                return;
            }
        }
    }

    fn hung(&self) {
        self.inner.state.lock().hung = Some(Instant::now());
        tracing::warn!("the node cache's disk does not answer: files are read without it");
    }

    fn give_back(&self, bytes: u64) {
        if let Some(used) = &mut self.inner.state.lock().used {
            *used = used.saturating_sub(bytes);
        }
    }

    async fn fill<R: Reader>(&self, key: Key, reader: &R) -> Result<(), FillError> {
        let cache = self.clone();
        let mut filling = blocking(move || cache.inner.disk.begin(&key)).await?;
        let mut offset = 0;
        while offset < key.size {
            let len = PIECE.min(key.size - offset) as usize;
            let pieces = reader.read(offset, len).await?;
            let got: usize = pieces.iter().map(bytes::Bytes::len).sum();
            if got != len {
                return Err(FillError::Short);
            }
            filling = blocking(move || {
                filling.write(&key, offset, &pieces)?;
                Ok(filling)
            })
            .await?;
            offset += len as u64;
        }
        blocking(move || filling.finish()).await
    }
}

/// Why a file was not fetched.
#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error("the node cache's disk: {0}")]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Source(#[from] TreeError),
    #[error("a read ended before its range")]
    Short,
}

/// Runs what may wait for a disk where nobody waits for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, FillError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.unwrap_or_else(|error| Err(io::Error::other(error)))?)
}

/// The checksum of a block of a file, as workers know it.
fn checksum(key: &Key, block: u64, bytes: &[u8]) -> u32 {
    block_checksum(key.file, block, bytes)
}

/// Blocks of a file.
fn blocks(size: u64) -> u64 {
    size.div_ceil(BLOCK_SIZE)
}

#[cfg(test)]
mod tests;
