//! One fetch of neighbouring blocks of a chunk, and its way into the chunk's file: from another worker if that is likely
//! to hold them ([`peers`]), and what is missing then by one conditional GET.
//!
//! The receiving half checks nothing but lengths (the store has compared the version); it computes each block's checksum,
//! hands the block to waiters, and queues it for the writing half, which makes neighbouring blocks one write. When the
//! disk refuses, or does not answer, the run goes on in memory.

use std::{
    future::Future,
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use forebay_cache_store::{Chunk, WriteError};
use forebay_protocol::{BLOCK_SIZE, block_checksum, table::Member};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc, oneshot},
    time::timeout,
};
use tracing::{debug, warn};

use super::{
    CHUNK_BLOCKS, Class, Conflict, FillError, Pace, Pools, RECHECK_WAIT, RUNS_PER_REQUEST, Verb,
    chunk::{Block, ChunkFill},
    peers,
};

/// Blocks that one write to the chunk's file takes at most: 1 MiB.
const WRITE_BATCH: usize = 16;

/// A fetch of neighbouring blocks.
pub(super) struct Run {
    /// Relative to the chunk.
    pub(super) blocks: Range<u32>,
    /// Where the blocks go; `None`: nowhere, they are only handed to waiters.
    pub(super) chunk: Option<Arc<Chunk>>,
    /// Something happened to a block of this run.
    pub(super) changed: Notify,
    /// A waiter has gone.
    pub(super) reconsider: Notify,
    /// A reader waits for what another request fetches, perhaps in the background.
    promoted: Notify,
    /// How fast the request that came last may ask the source, if that was a load, and whether another one came.
    pace: Mutex<Option<Arc<Pace>>>,
    paced_anew: Notify,
    demand: AtomicBool,
    /// Of a copy: who is asked for it, instead of the source.
    pub(super) from: Option<Arc<Member>>,
    /// Others than who takes a copy wait for it: then the source is asked, too.
    wanted: AtomicBool,
    bypass: AtomicBool,
    /// The permit that every run has beside the budget.
    minimum: Arc<Semaphore>,
    outcome: OnceLock<Result<(), FillError>>,
}

impl Run {
    pub(super) fn new(blocks: Range<u32>, chunk: Option<Arc<Chunk>>, class: &Class) -> Self {
        Self {
            blocks,
            bypass: AtomicBool::new(chunk.is_none()),
            chunk,
            changed: Notify::new(),
            reconsider: Notify::new(),
            promoted: Notify::new(),
            pace: Mutex::new(class.pace()),
            paced_anew: Notify::new(),
            demand: AtomicBool::new(matches!(class, Class::Demand)),
            from: if let Class::Copy(from) = class { Some(from.clone()) } else { None },
            wanted: AtomicBool::new(!matches!(class, Class::Copy(_))),
            minimum: Arc::new(Semaphore::new(1)),
            outcome: OnceLock::new(),
        }
    }

    /// How it ended; `None` while it goes on.
    pub(super) fn outcome(&self) -> Option<&Result<(), FillError>> {
        self.outcome.get()
    }

    /// Whether its blocks stay in memory until their waiters have them. Changed and read under the slots' lock.
    pub(super) fn bypasses(&self) -> bool {
        self.bypass.load(Ordering::Relaxed)
    }

    pub(super) fn set_bypass(&self) {
        self.bypass.store(true, Ordering::Relaxed);
    }

    /// Another request waits for it now, besides the one that began it, which may end before it does.
    pub(super) fn join(&self, class: &Class) {
        if !matches!(class, Class::Copy(_)) {
            self.wanted.store(true, Ordering::Relaxed);
        }
        // One permit is kept for a waiter that comes later, so this is not lost.
        match class {
            Class::Demand => {
                self.demand.store(true, Ordering::Relaxed);
                self.promoted.notify_one();
            }
            Class::Background | Class::Paced(_) => {
                *self.pace.lock() = class.pace();
                self.paced_anew.notify_one();
            }
            // It takes what comes.
            Class::Copy(_) => {}
        }
    }

    /// Waits for its turn among the runs of its request. A run that somebody else waits for has it at once: who asked
    /// for the end of a chunk does not wait for the load that began at its beginning.
    async fn place<'a>(&self, places: &'a Semaphore) -> Option<SemaphorePermit<'a>> {
        tokio::select! {
            place = places.acquire() => place.ok(),
            () = self.promoted.notified() => None,
        }
    }

    /// Waits until so many bytes may be asked for, by the pace of the load that it belongs to, and until the source may be
    /// asked for what no reader waits for; or until a reader waits for it. `false`: nobody waits for it any more.
    async fn keep_pace(self: &Arc<Self>, fill: &ChunkFill, pools: &Pools, bytes: u64) -> bool {
        loop {
            if self.demand.load(Ordering::Relaxed) {
                return true;
            }
            let pace = self.pace.lock().clone();
            let waiting = async {
                if let Some(pace) = pace {
                    pace.wait(bytes).await;
                }
                pools.allowance.wait_spare(Verb::Get).await;
            };
            let given_up = async {
                loop {
                    self.reconsider.notified().await;
                    if fill.give_up(self) {
                        return;
                    }
                }
            };
            tokio::select! {
                () = waiting => return true,
                () = self.promoted.notified() => return true,
                () = self.paced_anew.notified() => {}
                () = given_up => return false,
            }
        }
    }

    /// Waits for its turn at the source.
    async fn turn(&self, pools: &Pools) -> Result<OwnedSemaphorePermit, FillError> {
        let closed = |_| FillError::Stopping;
        let turn = async {
            if self.demand.load(Ordering::Relaxed) {
                return pools.demand.clone().acquire_owned().await.map_err(closed);
            }
            tokio::select! {
                permit = pools.background.clone().acquire_owned() => permit.map_err(closed),
                () = self.promoted.notified() => pools.demand.clone().acquire_owned().await.map_err(closed),
            }
        };
        timeout(pools.wait, turn)
            .await
            .unwrap_or_else(|_| Err(FillError::Unavailable("no turn at the source within its deadline".into())))
    }

    /// Waits for room for one block in memory.
    pub(super) async fn room(&self, budget: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, FillError> {
        if let Ok(permit) = budget.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let permit = tokio::select! {
            permit = self.minimum.clone().acquire_owned() => permit,
            permit = budget.clone().acquire_owned() => permit,
        };
        permit.map_err(|_| FillError::Stopping)
    }
}

/// Ends its run in any case, also when the task is dropped or panics.
struct Ending {
    fill: Arc<ChunkFill>,
    run: Arc<Run>,
}

impl Ending {
    fn with(self, outcome: Result<(), FillError>) {
        // Only the owner of this guard sets it.
        let _ = self.run.outcome.set(outcome);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.run.outcome.get_or_init(|| Err(FillError::Stopping));
        self.fill.ended(&self.run);
    }
}

/// Fetches runs in order: a few at a time, and those that are promoted. All of them wait here (a chunk has 512 at most,
/// when every second block is held), so that each can hear of its promotion.
pub(super) fn drive(fill: Arc<ChunkFill>, runs: Vec<Arc<Run>>) -> impl Future<Output = ()> + Send {
    // Guards first: a task that never gets to run ends its runs too.
    let endings: Vec<Ending> = runs.into_iter().map(|run| Ending { fill: fill.clone(), run }).collect();
    async move {
        let places = Semaphore::new(RUNS_PER_REQUEST);
        stream::iter(endings).for_each_concurrent(None, |ending| drive_one(ending, &places)).await;
    }
}

async fn drive_one(ending: Ending, places: &Semaphore) {
    let (fill, run) = (ending.fill.clone(), ending.run.clone());
    let fetching = async {
        let _place = run.place(places).await;
        fetch(&fill, &run).await
    };
    let outcome = tokio::select! {
        outcome = fetching => outcome,
        () = fill.engine.inner.stop.cancelled() => Err(FillError::Stopping),
        () = fill.dataset.closed() => Err(FillError::Stopping),
    };
    let metrics = &fill.dataset.metrics;
    match &outcome {
        // What is a copy itself was offered by somebody.
        Ok(()) if run.from.is_none() && run.chunk.as_ref().is_some_and(|chunk| chunk.is_complete()) => {
            fill.dataset.copies.came(&fill.path, &fill.version, fill.key);
        }
        Ok(()) | Err(FillError::Stopping | FillError::NotHeld) => {}
        Err(FillError::VersionGone(message)) => {
            metrics.version_conflicts.inc();
            debug!(dataset = %fill.dataset.name, path = %fill.path, %message, "the source has another version");
            announce_conflict(&fill).await;
        }
        Err(error) => {
            metrics.fill_errors.inc();
            fill.dataset.source_failed(error);
        }
    }
    ending.with(outcome);
}

/// Lets the metadata look again, for a bounded time.
async fn announce_conflict(fill: &Arc<ChunkFill>) {
    let (done, known) = oneshot::channel();
    let conflict = Conflict { dataset: fill.dataset.clone(), path: fill.path.clone(), done };
    match fill.engine.inner.conflicts.try_send(conflict) {
        // Whether it was answered, dropped or late: the reader is told that its version is gone.
        Ok(()) => drop(timeout(RECHECK_WAIT, known).await),
        Err(_) => {
            fill.engine.inner.metrics.rechecks_dropped.inc();
        }
    }
}

async fn fetch(fill: &Arc<ChunkFill>, run: &Arc<Run>) -> Result<(), FillError> {
    let dataset = &fill.dataset;
    if fill.give_up(run) {
        return Ok(());
    }
    let pools = dataset.pools(&fill.path).ok_or_else(|| nowhere(fill))?;
    let (queue, queued) = mpsc::channel(WRITE_BATCH);
    let receiving = async {
        // Its end is the writer's.
        let queue = queue;
        let missing = peers::receive(fill, run, &queue).await?..run.blocks.end;
        if missing.is_empty() {
            return Ok(None);
        }
        if !run.wanted.load(Ordering::Relaxed) {
            return Err(FillError::NotHeld);
        }
        receive(fill, run, missing, &pools, &queue).await
    };
    let (turn, ()) = tokio::join!(receiving, write_behind(fill, run, queued));
    // Only now, so that a slow disk slows the source.
    drop(turn?);
    Ok(())
}

fn nowhere(fill: &ChunkFill) -> FillError {
    FillError::VersionGone(format!("no source holds {}", fill.path).into())
}

/// The number of a chunk's block within its file.
pub(super) fn block_of_file(chunk: u32, block: u32) -> u64 {
    u64::from(chunk) * u64::from(CHUNK_BLOCKS) + u64::from(block)
}

fn offset_of(chunk: u32, block: u32) -> u64 {
    block_of_file(chunk, block) * BLOCK_SIZE
}

/// Gets `blocks`, the last ones of the run, from the source; gives the turn there back when it had one.
async fn receive(
    fill: &Arc<ChunkFill>,
    run: &Arc<Run>,
    blocks: Range<u32>,
    pools: &Pools,
    queue: &mpsc::Sender<(u32, Block)>,
) -> Result<Option<OwnedSemaphorePermit>, FillError> {
    let dataset = &fill.dataset;
    let start = offset_of(fill.key.index, blocks.start);
    let end = fill.version.size.min(offset_of(fill.key.index, blocks.end));
    if !run.keep_pace(fill, pools, end - start).await {
        return Ok(None);
    }
    let turn = run.turn(pools).await?;
    // The wait may have been long.
    if fill.give_up(run) {
        return Ok(None);
    }
    let mut body = dataset.get(&fill.path, &fill.version, start..end).await?.ok_or_else(|| nowhere(fill))?;
    let mut left = end - start;
    let mut pending = Bytes::new();
    for index in blocks {
        let permit = tokio::select! {
            permit = run.room(&fill.engine.inner.budget) => permit?,
            () = nobody_waits(fill, run) => return Ok(None),
        };
        let wanted = left.min(BLOCK_SIZE) as usize;
        // A block that came in one piece is not copied; otherwise it is assembled.
        let mut assembled: Option<BytesMut> = None;
        let bytes = loop {
            let have = assembled.as_ref().map_or(0, BytesMut::len);
            let take = pending.len().min(wanted - have);
            if have == 0 && take == wanted {
                break pending.split_to(wanted);
            }
            if take > 0 {
                assembled
                    .get_or_insert_with(|| BytesMut::with_capacity(wanted))
                    .extend_from_slice(&pending.split_to(take));
            }
            if let Some(block) = assembled.take_if(|block| block.len() == wanted) {
                break block.freeze();
            }
            pending = tokio::select! {
                piece = body.next() => match piece {
                    Some(piece) => piece?,
                    None => return Err(FillError::Unavailable("the source's answer ended early".into())),
                },
                () = nobody_waits(fill, run) => return Ok(None),
            };
        };
        left -= wanted as u64;
        let checksum = block_checksum(fill.key.file, block_of_file(fill.key.index, index), &bytes);
        let block = Block { bytes, checksum, _permit: Arc::new(permit) };
        hand_over(fill, run, index, block, queue).await;
    }
    dataset.source_answered();
    Ok(Some(turn))
}

/// Gives a block to those who wait for it, and to the writer.
pub(super) async fn hand_over(
    fill: &Arc<ChunkFill>,
    run: &Arc<Run>,
    index: u32,
    block: Block,
    queue: &mpsc::Sender<(u32, Block)>,
) {
    fill.arrived(run, index, block.clone());
    if run.bypasses() {
        fill.dataset.metrics.bypassed_bytes.inc_by(block.bytes.len() as u64);
    } else {
        // The writer lives as long as this queue.
        let _ = queue.send((index, block)).await;
    }
}

/// Ready when the run is not stored and nobody waits for it any more. A run that is stored is finished in any case.
pub(super) async fn nobody_waits(fill: &Arc<ChunkFill>, run: &Arc<Run>) {
    loop {
        run.reconsider.notified().await;
        if run.bypasses() && fill.give_up(run) {
            return;
        }
    }
}

/// Writes blocks to the chunk's file in batches.
async fn write_behind(fill: &Arc<ChunkFill>, run: &Arc<Run>, mut queued: mpsc::Receiver<(u32, Block)>) {
    let Some(chunk) = &run.chunk else { return };
    let mut batch: Vec<(u32, Block)> = Vec::with_capacity(WRITE_BATCH);
    // Blocks are queued in order and without gaps, so a batch is one range.
    while queued.recv_many(&mut batch, WRITE_BATCH).await > 0 {
        let first = batch[0].0;
        let range = first..first + batch.len() as u32;
        let blocks: Vec<Block> = batch.drain(..).map(|(_, block)| block).collect();
        let bytes = blocks.iter().map(|block| block.bytes.len() as u64).sum();
        if run.bypasses() {
            fill.dataset.metrics.bypassed_bytes.inc_by(bytes);
            continue;
        }
        let target = chunk.clone();
        let write = move || {
            let checksums: Vec<u32> = blocks.iter().map(|block| block.checksum).collect();
            let bytes: Vec<&[u8]> = blocks.iter().map(|block| &block.bytes[..]).collect();
            target.write_blocks(first, &bytes, &checksums)
        };
        match fill.engine.inner.disk.call(write).await {
            Ok(Some(Ok(()))) => {
                fill.stored(run, range);
                continue;
            }
            // Not admitted any more, and the tier's state says why; or not written in time.
            Ok(Some(Err(WriteError::Refused(_))) | None) => {}
            Ok(Some(Err(error))) => {
                fill.engine.inner.metrics.disk_write_errors.inc();
                debug!(%error, "blocks stay in memory");
            }
            Err(error) => warn!(%error, "writing a chunk failed"),
        }
        // The queue goes on, without the disk: later blocks reach their readers.
        fill.dataset.metrics.bypassed_bytes.inc_by(bytes);
        fill.not_stored(run);
    }
}
