//! One request's view of a chunk: its blocks in order, as they become valid.

use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_cache_store::{Chunk, ChunkSpec, Extent};
use forebay_protocol::{BLOCK_SIZE, ChunkKey, DatasetPath, FileVersion, frame::MAX_DATA_BLOCKS};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    CHUNK_BLOCKS, Class, FillEngine, FillError,
    chunk::{Block, ChunkFill, Place},
    run::{Run, block_of_file},
};
use crate::dataset::Dataset;

/// Blocks that are copied out of the page cache rather than sent from their file: another thread, which a file needs
/// because it may wait for the disk, costs more than this copy of at most 256 KiB.
const COPIED_BLOCKS: u32 = 4;
/// How often blocks may vanish under a reader (evicted, or found damaged) before it is told that something is wrong.
const ATTEMPTS: u32 = 8;
/// How long a pin may take: the store gives up after 30 s, when it cannot make room or its index cannot be written.
const PIN_DEADLINE: Duration = Duration::from_secs(35);
/// How long it may take to read a chunk again: at 2 MB/s.
const VERIFY_DEADLINE: Duration = Duration::from_secs(35);

/// Neighbouring blocks, at most [`MAX_DATA_BLOCKS`].
pub(crate) enum Piece {
    /// On disk.
    Stored {
        /// First block, relative to the file.
        first: u64,
        /// Where.
        extent: Extent,
        /// Whose; to be told when the file does not hold what it must.
        chunk: Arc<Chunk>,
        /// First block, relative to the chunk.
        first_in_chunk: u32,
    },
    /// In memory.
    Memory {
        /// First block, relative to the file.
        first: u64,
        /// The blocks.
        blocks: Vec<Block>,
    },
}

/// Gives the blocks of a range within one chunk, in order.
pub(crate) struct BlockReader {
    engine: FillEngine,
    dataset: Arc<Dataset>,
    path: DatasetPath,
    version: FileVersion,
    key: ChunkKey,
    class: Class,
    chunk: Option<Arc<Chunk>>,
    /// What is still wanted, relative to the chunk.
    blocks: Range<u32>,
    /// Found on disk, not yet given.
    ready: VecDeque<Piece>,
    /// Made when the first block is missing.
    fill: Option<Arc<ChunkFill>>,
    /// For each of `blocks` the run that the reader waits for.
    attached: VecDeque<Option<Arc<Run>>>,
    attempts: u32,
    /// The disk did not answer in time: this reader takes nothing from it any more.
    without_disk: bool,
    /// Whether blocks that vanish are fetched.
    fetch: bool,
    /// Blocks that were valid when the request came.
    pub(crate) hits: u32,
    /// The others.
    pub(crate) misses: u32,
}

impl Drop for BlockReader {
    fn drop(&mut self) {
        if let Some(fill) = &self.fill {
            fill.detach(self.blocks.start, self.attached.make_contiguous());
        }
    }
}

/// What is asked of a chunk.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Whose.
    pub(crate) dataset: Arc<Dataset>,
    /// Of which file.
    pub(crate) path: DatasetPath,
    /// Of which version of it.
    pub(crate) version: FileVersion,
    /// Which chunk; it belongs to the three above.
    pub(crate) key: ChunkKey,
    /// Which blocks, relative to the chunk; not empty, within the file.
    pub(crate) blocks: Range<u32>,
}

/// What a request found at once.
#[derive(Default)]
struct Found {
    chunk: Option<Arc<Chunk>>,
    /// Blocks that are held.
    hits: u32,
    /// The first of them.
    ready: VecDeque<Piece>,
}

impl Wanted {
    fn spec(&self) -> ChunkSpec {
        ChunkSpec { dataset: self.dataset.id, path: self.path.clone(), version: self.version.clone(), key: self.key }
    }

    fn count(&self) -> u32 {
        self.blocks.end - self.blocks.start
    }
}

impl FillEngine {
    /// A reader of blocks, of which the missing ones are fetched. With `verify`, those that are held are checked first,
    /// also if this process wrote them, and the damaged ones are missing.
    pub(crate) async fn read(&self, wanted: Wanted, class: Class, verify: bool) -> Result<BlockReader, FillError> {
        self.open(wanted, class, true, verify).await
    }

    /// A reader of blocks that are held, up to the first that is not; [`FillError::NotHeld`] when the first one is not.
    /// Nothing is fetched.
    pub(crate) async fn read_held(&self, wanted: Wanted, verify: bool) -> Result<BlockReader, FillError> {
        self.open(wanted, Class::Background, false, verify).await
    }

    async fn open(
        &self,
        mut wanted: Wanted,
        class: Class,
        fetch: bool,
        verify: bool,
    ) -> Result<BlockReader, FillError> {
        let found = match self.at_hand(&wanted, verify) {
            Some(found) => Some(found),
            None => {
                let (engine, wanted) = (self.clone(), wanted.clone());
                self.inner.disk.call(move || engine.look(&wanted, fetch, verify)).await?
            }
        };
        let without_disk = found.is_none();
        let Found { chunk, hits, ready } = found.unwrap_or_default();
        let count = wanted.count();
        let ready_count = ready_blocks(&ready);
        let held = ready_count == count;
        if !fetch {
            if ready_count == 0 {
                return Err(FillError::NotHeld);
            }
            wanted.blocks.end = wanted.blocks.start + ready_count;
        }
        let mut reader = BlockReader::new(self, wanted, class, chunk, ready);
        (reader.hits, reader.misses) = (hits, count - hits);
        reader.without_disk = without_disk;
        reader.fetch = fetch;
        if fetch && !held {
            reader.attach();
        }
        Ok(reader)
    }

    /// Few blocks of a chunk whose file is open, if they are in memory: without waiting for the disk.
    fn at_hand(&self, wanted: &Wanted, verify: bool) -> Option<Found> {
        let count = wanted.count();
        if verify || count > COPIED_BLOCKS || self.inner.disk.is_hung() {
            return None;
        }
        let chunk = self.store().open_chunk(&wanted.spec())?;
        let extent = chunk.send_trusted(wanted.blocks.start, count)?;
        let permit = self.room_for(count)?;
        let piece = copied(wanted, &extent, extent.read_at_hand()?, permit);
        Some(Found { chunk: Some(chunk), hits: count, ready: VecDeque::from([piece]) })
    }

    /// What the store holds, up to the first block that it does not. May wait for the disk.
    fn look(&self, wanted: &Wanted, create: bool, verify: bool) -> Found {
        let (blocks, count) = (wanted.blocks.clone(), wanted.count());
        let Some(chunk) = self.store().chunk(&wanted.spec(), create) else { return Found::default() };
        if verify {
            chunk.verify_again(blocks.start, count);
        }
        let mut ready = stored_pieces(&chunk, wanted.key, blocks.clone());
        if count <= COPIED_BLOCKS
            && let [Piece::Stored { extent, .. }] = ready.make_contiguous()
            && extent.checksums.len() as u32 == count
            && let Some(permit) = self.room_for(count)
        {
            match extent.read() {
                Ok(bytes) => ready = VecDeque::from([copied(wanted, extent, bytes, permit)]),
                Err(_) => {
                    chunk.invalidate(blocks.start, count);
                    ready.clear();
                }
            }
        }
        let hits = blocks.filter(|block| chunk.is_valid(*block)).count() as u32;
        Found { chunk: Some(chunk), hits, ready }
    }

    /// A share of the memory budget, if it is free at once.
    fn room_for(&self, blocks: u32) -> Option<OwnedSemaphorePermit> {
        self.inner.budget.clone().try_acquire_many_owned(blocks).ok()
    }

    /// Makes blocks valid on disk and gives how many of them could not be stored. What the tier does not admit is not
    /// fetched. With `pinned`, the chunk is pinned first, so that its place is kept.
    pub(crate) async fn load(&self, wanted: Wanted, pinned: bool, class: Class) -> Result<u32, FillError> {
        let (store, spec) = (self.store().clone(), wanted.spec());
        let disk = &self.inner.disk;
        let chunk = if pinned {
            let pinning =
                disk.call_within(PIN_DEADLINE, move || store.pinned_chunk(&spec).map_err(|error| error.to_string()));
            let late = || Err(disk.problem().unwrap_or_else(|| "the cache disk does not answer".to_owned()));
            let chunk = pinning.await?.unwrap_or_else(late);
            Some(chunk.map_err(|problem| FillError::NotPinned(problem.into()))?)
        } else {
            disk.call(move || store.chunk(&spec, true)).await?.flatten()
        };
        let Some(chunk) = chunk else { return Ok(wanted.count()) };
        let mut reader = BlockReader::new(self, wanted, class, Some(chunk), VecDeque::new());
        reader.attach();
        reader.settle().await
    }

    /// Reads what is held of the blocks, and drops what is damaged: how many are not held then. `None`: the disk does not
    /// answer.
    pub(crate) async fn verify(&self, wanted: Wanted) -> Result<Option<u32>, FillError> {
        let store = self.store().clone();
        self.inner
            .disk
            .call_within(VERIFY_DEADLINE, move || {
                let chunk = store.chunk(&wanted.spec(), false);
                let count = wanted.count();
                let Some(chunk) = chunk else { return count };
                chunk.verify_again(wanted.blocks.start, count);
                wanted.blocks.clone().filter(|block| !chunk.is_valid(*block)).count() as u32
            })
            .await
    }
}

impl BlockReader {
    fn new(
        engine: &FillEngine,
        wanted: Wanted,
        class: Class,
        chunk: Option<Arc<Chunk>>,
        ready: VecDeque<Piece>,
    ) -> Self {
        let Wanted { dataset, path, version, key, blocks } = wanted;
        Self {
            engine: engine.clone(),
            dataset,
            path,
            version,
            key,
            class,
            chunk,
            blocks,
            ready,
            fill: None,
            attached: VecDeque::new(),
            attempts: 0,
            without_disk: false,
            fetch: true,
            hits: 0,
            misses: 0,
        }
    }

    /// Starts to fetch what is missing and in nobody's hands.
    fn attach(&mut self) {
        let fill = self
            .fill
            .get_or_insert_with(|| self.engine.chunk_fill(&self.dataset, &self.path, &self.version, self.key))
            .clone();
        self.attached.resize((self.blocks.end - self.blocks.start) as usize, None);
        let attached = self.attached.make_contiguous();
        fill.attach(self.blocks.clone(), self.chunk.as_ref(), &self.class, attached);
    }

    /// The next blocks; `None` at the end. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, FillError> {
        loop {
            if self.blocks.is_empty() {
                return Ok(None);
            }
            if !self.ready.is_empty() && self.engine.inner.disk.is_hung() {
                self.leave_disk();
            }
            if let Some(piece) = self.ready.pop_front() {
                self.advance(piece_blocks(&piece));
                return Ok(Some(piece));
            }
            if let Some(piece) = self.take_memory() {
                return Ok(Some(piece));
            }
            if self.look_on_disk().await? {
                continue;
            }
            self.wait(true).await?;
        }
    }

    /// Waits until everything is valid on disk, without reading it. Gives the blocks that are not: at the first block
    /// that the tier refuses, the rest is given up.
    async fn settle(mut self) -> Result<u32, FillError> {
        while !self.blocks.is_empty() {
            if self.chunk.as_ref().is_some_and(|chunk| chunk.is_valid(self.blocks.start)) {
                self.advance(1);
                continue;
            }
            if self.attached.front().and_then(Option::as_ref).is_some_and(|run| run.bypasses()) {
                break;
            }
            self.wait(false).await?;
        }
        let held = |block: &u32| self.chunk.as_ref().is_some_and(|chunk| chunk.is_valid(*block));
        Ok(self.blocks.clone().filter(|block| !held(block)).count() as u32)
    }

    /// Passes `count` blocks.
    fn advance(&mut self, count: u32) {
        if let Some(fill) = &self.fill
            && !self.attached.is_empty()
        {
            let passed = (count as usize).min(self.attached.len());
            fill.detach(self.blocks.start, &mut self.attached.make_contiguous()[..passed]);
            self.attached.drain(..passed);
        }
        self.blocks.start += count;
        self.attempts = 0;
    }

    fn take_memory(&mut self) -> Option<Piece> {
        let fill = self.fill.as_ref()?;
        let taken = fill.take(self.blocks.start, MAX_DATA_BLOCKS as usize, self.attached.make_contiguous());
        if taken.is_empty() {
            return None;
        }
        let first = self.first_in_file();
        self.advance(taken.len() as u32);
        Some(Piece::Memory { first, blocks: taken })
    }

    fn first_in_file(&self) -> u64 {
        block_of_file(self.key.index, self.blocks.start)
    }

    /// Finds pieces on disk, from the next block on.
    async fn look_on_disk(&mut self) -> Result<bool, FillError> {
        let Some(chunk) = self.valid_chunk() else { return Ok(false) };
        let end = self.blocks.clone().find(|block| !chunk.is_valid(*block)).unwrap_or(self.blocks.end);
        let (key, range) = (self.key, self.blocks.start..end);
        let look = move || stored_pieces(&chunk, key, range);
        let Some(ready) = self.engine.inner.disk.call(look).await? else {
            self.leave_disk();
            return Ok(false);
        };
        self.ready = ready;
        if self.ready.is_empty() {
            // Found damaged just now: it is no longer valid and must be fetched.
            self.try_again()?;
        }
        Ok(!self.ready.is_empty())
    }

    /// From now on everything comes from the source.
    fn leave_disk(&mut self) {
        self.without_disk = true;
        self.chunk = None;
        self.ready.clear();
    }

    /// The chunk in which the next block is valid: the reader's own, or the one that its run has written to.
    fn valid_chunk(&self) -> Option<Arc<Chunk>> {
        if self.without_disk {
            return None;
        }
        let valid = |chunk: &&Arc<Chunk>| chunk.is_valid(self.blocks.start);
        let run = self.attached.front().and_then(Option::as_ref);
        self.chunk.as_ref().filter(valid).or(run.and_then(|run| run.chunk.as_ref()).filter(valid)).cloned()
    }

    fn try_again(&mut self) -> Result<(), FillError> {
        if !self.fetch {
            return Err(FillError::NotHeld);
        }
        self.attempts += 1;
        if self.attempts > ATTEMPTS {
            return Err(FillError::internal("blocks vanish as fast as they are fetched"));
        }
        if let Some(fill) = &self.fill {
            fill.forget_absent(self.blocks.start, self.attached.make_contiguous());
        }
        self.attach();
        Ok(())
    }

    /// Waits until the next block has changed its place. A block that is on its way from memory to disk counts as arrived
    /// only if `memory_will_do`.
    async fn wait(&mut self, memory_will_do: bool) -> Result<(), FillError> {
        let (Some(fill), Some(Some(run))) = (self.fill.clone(), self.attached.front().cloned()) else {
            return self.try_again();
        };
        let changed = run.changed.notified();
        tokio::pin!(changed);
        // From here on no notification is lost; then look once more.
        changed.as_mut().enable();
        match fill.place(self.blocks.start, &run) {
            Place::InFlight => changed.await,
            Place::Arrived if memory_will_do || run.bypasses() => {}
            Place::Arrived => changed.await,
            Place::Absent => {
                if self.valid_chunk().is_some() {
                    return Ok(());
                }
                match run.outcome() {
                    // A copy that did not come, for which this reader came to wait too late to have the source asked.
                    Some(Err(FillError::NotHeld)) if !matches!(self.class, Class::Copy(_)) => return self.try_again(),
                    Some(Err(error)) => return Err(error.clone()),
                    // Written, and already evicted or invalidated.
                    Some(Ok(())) | None => return self.try_again(),
                }
            }
        }
        Ok(())
    }
}

/// All that is wanted, in memory.
fn copied(wanted: &Wanted, extent: &Extent, bytes: Vec<u8>, permit: OwnedSemaphorePermit) -> Piece {
    let (mut bytes, permit) = (Bytes::from(bytes), Arc::new(permit));
    let block = |checksum: &u32| {
        let len = bytes.len().min(BLOCK_SIZE as usize);
        Block { bytes: bytes.split_to(len), checksum: *checksum, _permit: permit.clone() }
    };
    let blocks = extent.checksums.iter().map(block).collect();
    Piece::Memory { first: block_of_file(wanted.key.index, wanted.blocks.start), blocks }
}

/// Pieces of what is valid of `blocks`, from its start to the first block that is not.
fn stored_pieces(chunk: &Arc<Chunk>, key: ChunkKey, blocks: Range<u32>) -> VecDeque<Piece> {
    let mut pieces = VecDeque::new();
    let mut at = blocks.start;
    while at < blocks.end {
        let valid =
            (at..blocks.end.min(at + MAX_DATA_BLOCKS)).take_while(|block| chunk.is_valid(*block)).count() as u32;
        if valid == 0 {
            break;
        }
        let Some(extent) = chunk.send(at, valid) else { break };
        let first = block_of_file(key.index, at);
        pieces.push_back(Piece::Stored { first, extent, chunk: chunk.clone(), first_in_chunk: at });
        at += valid;
    }
    pieces
}

fn piece_blocks(piece: &Piece) -> u32 {
    match piece {
        Piece::Stored { extent, .. } => extent.checksums.len() as u32,
        Piece::Memory { blocks, .. } => blocks.len() as u32,
    }
}

fn ready_blocks(pieces: &VecDeque<Piece>) -> u32 {
    pieces.iter().map(piece_blocks).sum()
}

const _: () = assert!(BLOCK_SIZE * CHUNK_BLOCKS as u64 == forebay_protocol::CHUNK_SIZE);
