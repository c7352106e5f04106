//! The fill engine: gives the blocks of a chunk to readers, and fetches those that are not held.
//!
//! - [`chunk`]: what is in flight of one chunk; single flight per block.
//! - [`disk`]: the only way to the chunk store's disk, which may hang.
//! - [`run`]: one fetch of neighbouring blocks, and its way into the chunk's file.
//! - [`peers`]: blocks from the workers that held them before, which are asked before the source.
//! - [`pace`]: how fast a load may ask the sources.
//! - [`reader`]: one request's view: the blocks in order, as they become valid.
//!
//! Invariants:
//! - A block that is neither valid in the chunk's file nor in flight is asked of peers and the source; a block in flight
//!   is never asked a second time. Only blocks that somebody asked for are fetched.
//! - Bytes reach a reader with the checksum computed when they arrived from the source (or the stored one, here or at
//!   the peer).
//! - A block in memory holds a permit of the worker's budget, or the one minimum permit of its run: each run can always
//!   have one block in memory, so no set of slow readers stops another one for good.
//! - A run always ends, by its source's deadline at the latest, and its end wakes every waiter.
//! - Nobody waits for the disk longer than [`disk::DEADLINE`]. When it is late, the reader goes on without it: what it
//!   wants comes from the source and is not stored. That is the soonest: the same request goes on, and no other worker
//!   has the blocks either, since this one is asked because it owns them.
//!
//! Lock order: `FillEngine::chunks`, then `ChunkFill::slots`, then locks within the chunk store. None is held over an
//! await or over disk input/output. The disk's state and the peers' are leaves.

mod chunk;
mod disk;
mod pace;
mod peers;
mod reader;
mod run;

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_cache_store::ChunkStore;
use forebay_protocol::{BLOCK_SIZE, CHUNK_SIZE, ChunkKey, DatasetPath, FileVersion, frame::FailureCode, table::Member};
use forebay_under_store::{Allowance, Limits, StoreError, Verb};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use chunk::Block;
use chunk::ChunkFill;
pub(crate) use disk::Disk;
pub(crate) use pace::Pace;
pub(crate) use peers::Peers;
pub(crate) use reader::{BlockReader, Piece, Wanted};

use crate::{dataset::Dataset, metrics::Metrics};

/// Blocks in a chunk.
pub(crate) const CHUNK_BLOCKS: u32 = (CHUNK_SIZE / BLOCK_SIZE) as u32;
/// Blocks that one GET asks for at most: 128 * 64 KiB = 8 MiB, at which a request's latency (tens of milliseconds) is a
/// small part of its transfer (around 100 ms at the usual 80 MB/s of one connection to an object store).
const MAX_RUN_BLOCKS: u32 = 128;
/// GETs that one request for blocks has under way at most, besides those that another reader waits for too.
const RUNS_PER_REQUEST: usize = 4;
/// How long the end of a run that met another version waits for the metadata to learn of it, so that the reader's next
/// look-up finds the new version.
const RECHECK_WAIT: Duration = Duration::from_secs(2);

/// Why blocks cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum FillError {
    /// The source has another version now, or none.
    #[error("{0}")]
    VersionGone(Arc<str>),
    /// The source refuses the credentials.
    #[error("{0}")]
    PermissionDenied(Arc<str>),
    /// The source does not answer in time.
    #[error("{0}")]
    Unavailable(Arc<str>),
    /// The worker is stopping, or no longer serves the dataset.
    #[error("the worker is stopping")]
    Stopping,
    /// Only held blocks were wanted, and they are not held, here or where a copy was to come from.
    #[error("not held")]
    NotHeld,
    /// A chunk that is to be pinned cannot be.
    #[error("{0}")]
    NotPinned(Arc<str>),
    /// A defect.
    #[error("{0}")]
    Internal(Arc<str>),
}

impl FillError {
    /// As the wire says it.
    pub(crate) fn code(&self) -> FailureCode {
        match self {
            Self::VersionGone(_) => FailureCode::VersionGone,
            Self::PermissionDenied(_) => FailureCode::PermissionDenied,
            Self::Unavailable(_) => FailureCode::SourceUnavailable,
            Self::Stopping => FailureCode::Stopping,
            Self::NotHeld => FailureCode::NotHeld,
            // Nobody reads and pins at once.
            Self::NotPinned(_) | Self::Internal(_) => FailureCode::Internal,
        }
    }

    fn internal(message: impl Into<Arc<str>>) -> Self {
        Self::Internal(message.into())
    }
}

impl From<StoreError> for FillError {
    fn from(error: StoreError) -> Self {
        let message: Arc<str> = error.to_string().into();
        match error {
            StoreError::NotFound(_) | StoreError::VersionMismatch(_) => Self::VersionGone(message),
            StoreError::PermissionDenied(_) => Self::PermissionDenied(message),
            StoreError::Unavailable(_) => Self::Unavailable(message),
            StoreError::Invalid(_) => Self::Internal(message),
        }
    }
}

/// A file whose source has another version than the one that was asked for.
#[derive(Debug)]
pub(crate) struct Conflict {
    /// Whose file.
    pub(crate) dataset: Arc<Dataset>,
    /// Which one.
    pub(crate) path: DatasetPath,
    /// Told (or dropped) when the metadata knows.
    pub(crate) done: oneshot::Sender<()>,
}

/// Which pool of source requests a fetch belongs to.
#[derive(Debug, Clone)]
pub(crate) enum Class {
    /// A reader waits.
    Demand,
    /// Nobody waits: read-ahead, load.
    Background,
    /// The same, no faster than this.
    Paced(Arc<Pace>),
    /// A copy: from this worker, and from no source.
    Copy(Arc<Member>),
}

impl Class {
    fn pace(&self) -> Option<Arc<Pace>> {
        match self {
            Self::Paced(pace) => Some(pace.clone()),
            Self::Demand | Self::Background | Self::Copy(_) => None,
        }
    }
}

/// The source requests that one source of a dataset may have under way. Two pools, so that a load or read-ahead that
/// waits for a stalled source leaves room for readers; per source, so that a stalled one holds no other's.
#[derive(Debug)]
pub(crate) struct Pools {
    demand: Arc<Semaphore>,
    background: Arc<Semaphore>,
    /// How long a fetch waits for its turn.
    wait: Duration,
    /// What may be asked of the source in a second.
    allowance: Arc<Allowance>,
}

impl Pools {
    /// Shares out a source's requests: an eighth is left for listings, half of the rest goes to each class. The
    /// background gets no more than fit into half of the source's bytes in flight.
    pub(crate) fn new(limits: &Limits, allowance: Arc<Allowance>) -> Self {
        let share = ((limits.concurrency - limits.concurrency / 8) / 2).max(1);
        let fitting = limits.bytes_in_flight / 2 / (MAX_RUN_BLOCKS as usize * BLOCK_SIZE as usize);
        Self {
            demand: Arc::new(Semaphore::new(share)),
            background: Arc::new(Semaphore::new(share.min(fitting.max(1)))),
            wait: limits.deadline,
            allowance,
        }
    }
}

/// Everything that is being filled by this worker.
#[derive(Clone)]
pub(crate) struct FillEngine {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<ChunkStore>,
    disk: Arc<Disk>,
    peers: Peers,
    chunks: Mutex<HashMap<ChunkKey, Weak<ChunkFill>>>,
    /// In blocks.
    budget: Arc<Semaphore>,
    conflicts: mpsc::Sender<Conflict>,
    metrics: Arc<Metrics>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl FillEngine {
    /// `memory` is the budget for blocks in flight, in bytes. Fetches end when `stop` is cancelled.
    pub(crate) fn new(
        store: Arc<ChunkStore>,
        peers: Peers,
        memory: u64,
        conflicts: mpsc::Sender<Conflict>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        let permits = usize::try_from(memory / BLOCK_SIZE).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        Self {
            inner: Arc::new(Inner {
                store,
                disk: Disk::new(metrics.clone()),
                peers,
                chunks: Mutex::new(HashMap::new()),
                budget: Arc::new(Semaphore::new(permits)),
                conflicts,
                metrics,
                tasks: TaskTracker::new(),
                stop,
            }),
        }
    }

    /// The chunk store that is filled.
    pub(crate) fn store(&self) -> &Arc<ChunkStore> {
        &self.inner.store
    }

    /// The disk below it.
    pub(crate) fn disk(&self) -> &Arc<Disk> {
        &self.inner.disk
    }

    /// A client knows this epoch of the worker table, which is newer than ours.
    pub(crate) fn saw_epoch(&self, epoch: u64) {
        self.inner.peers.saw_epoch(epoch);
    }

    /// Chunks of which something is in flight or waited for.
    pub(crate) fn chunks_in_flight(&self) -> usize {
        self.inner.chunks.lock().len()
    }

    /// Blocks' permits that are free.
    pub(crate) fn budget_available(&self) -> u64 {
        self.inner.budget.available_permits() as u64 * BLOCK_SIZE
    }

    /// Waits until every fetch has ended; `stop` must have been cancelled.
    pub(crate) async fn drained(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn chunk_fill(
        &self,
        dataset: &Arc<Dataset>,
        path: &DatasetPath,
        version: &FileVersion,
        key: ChunkKey,
    ) -> Arc<ChunkFill> {
        let mut chunks = self.inner.chunks.lock();
        if let Some(fill) = chunks.get(&key).and_then(Weak::upgrade) {
            return fill;
        }
        let fill = Arc::new(ChunkFill::new(self.clone(), dataset.clone(), path.clone(), version.clone(), key));
        chunks.insert(key, Arc::downgrade(&fill));
        fill
    }

    /// Called when the last holder of a [`ChunkFill`] is gone.
    fn forget(&self, key: ChunkKey) {
        let mut chunks = self.inner.chunks.lock();
        // A successor may have taken the place meanwhile.
        if chunks.get(&key).is_some_and(|fill| fill.strong_count() == 0) {
            chunks.remove(&key);
        }
    }
}
