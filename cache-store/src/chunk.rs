//! One chunk: its file, what of it is valid, and how blocks go in and out.
//!
//! Order of a write: bytes, then checksums, then the validity bit on disk, then the bit in memory, which is what
//! readers see. No step is synced: after a power cut any subset of pages may be there, and a block whose bytes and
//! checksum do not match is dropped at its first use.
//!
//! Invariants:
//! - a valid block's bytes never change in its file. A damaged block is not repaired in place: the good blocks are
//!   copied into a fresh file under the same name, and the old one, unlinked, stays with whoever has it open;
//! - a block is written by one thread at a time (`writing`), and only while it is not valid;
//! - a chunk whose file lost its name is *detached*: it still reads, it never again creates, unlinks or accounts.
//!
//! Lock order: name stripe of the store, `trailer`, `state`, catalog shard. `state` is never held during I/O;
//! `trailer` is held while validity bits are written and while the file is replaced, never by a reader.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use forebay_protocol::{BLOCK_SIZE, ChunkKey, DatasetId, DatasetPath, FileVersion, block_checksum};
use parking_lot::Mutex;
use rustix::io::{ReadWriteFlags, preadv2, pwritev};

use crate::blocks::BlockSet;
use crate::catalog::{Entry, Name, PINNED, TRUSTED, Tick};
use crate::error::{ReadError, WriteError};
use crate::files::Loaded;
use crate::root::is_unlinked;
use crate::shared::Shared;
use crate::trailer::{self, Header, Layout, Trailer};

/// Which chunk of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSpec {
    /// Whose file.
    pub dataset: DatasetId,
    /// Which file.
    pub path: DatasetPath,
    /// Which version of it.
    pub version: FileVersion,
    /// Its name: the identity of the three above, and the chunk's index.
    pub key: ChunkKey,
}

/// Slices of one write: as many as the kernel takes (IOV_MAX).
const MAX_SLICES: usize = 1024;

/// Valid blocks in their file, for `sendfile`. Stays readable whatever happens to the chunk.
#[derive(Clone, Debug)]
pub struct Extent {
    /// The chunk's file. Not to be written.
    pub file: Arc<File>,
    /// Where the first block begins.
    pub offset: u64,
    /// Bytes of the blocks.
    pub len: u64,
    /// One per block.
    pub checksums: Vec<u32>,
}

impl Extent {
    /// The bytes, as they are in the file.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(bytes)
    }

    /// The bytes, if all of them are in the kernel's memory: this does not wait for a disk.
    pub fn read_at_hand(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; self.len as usize];
        let room = &mut [IoSliceMut::new(&mut bytes)];
        let read = preadv2(&self.file, room, self.offset, ReadWriteFlags::NOWAIT).ok()?;
        (read as u64 == self.len).then_some(bytes)
    }
}

/// An open chunk. Cheap to share; see the module for what it promises.
pub struct Chunk {
    shared: Arc<Shared>,
    key: ChunkKey,
    name: Name,
    header: Header,
    layout: Layout,
    slot: u32,
    /// Its place in the order of use since it was opened; 0 before its first one.
    used: AtomicU64,
    /// Uses since it was opened, of those that are told apart.
    hits: AtomicU8,
    /// When it was made, or the last of those was, on the store's clock; 0 before.
    counted: AtomicU64,
    detached: AtomicBool,
    trailer: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// `None` until the first write of a new chunk.
    body: Option<Body>,
    /// Counts the files that this chunk has had.
    epoch: u32,
    /// The good blocks are being copied into a new file: nothing is written.
    replacing: bool,
    valid: BlockSet,
    /// Valid, but written by another process and not yet verified in this one.
    suspect: BlockSet,
    writing: BlockSet,
    checksums: Vec<u32>,
}

#[derive(Clone)]
struct Body {
    file: Arc<File>,
    /// Of the entry that accounts for this file.
    order: Tick,
}

/// Blocks of a file that were written by another process and not yet verified in this one.
struct Suspect {
    file: Arc<File>,
    epoch: u32,
    blocks: BlockSet,
}

/// Blocks that one call of [`Chunk::write`] has for itself.
struct Claim {
    blocks: BlockSet,
    bytes: u64,
    body: Body,
    epoch: u32,
}

impl Chunk {
    /// A chunk without a file, or with the one that was loaded.
    pub(crate) fn new(
        shared: &Arc<Shared>,
        key: ChunkKey,
        header: Header,
        layout: Layout,
        body: Option<Loaded>,
    ) -> Self {
        let none = BlockSet::new(layout.blocks);
        let state = match body {
            Some(Loaded { trailer: Trailer { header: _, pinned: _, valid, checksums }, file, order, trusted }) => {
                State {
                    body: Some(Body { file: Arc::new(file), order }),
                    epoch: 0,
                    replacing: false,
                    suspect: if trusted { none.clone() } else { valid.clone() },
                    valid,
                    writing: none,
                    checksums,
                }
            }
            None => State {
                body: None,
                epoch: 0,
                replacing: false,
                suspect: none.clone(),
                valid: none.clone(),
                writing: none,
                checksums: Vec::new(),
            },
        };
        let slot = shared.catalog.ledger(|ledger| ledger.slot(header.dataset));
        Self {
            shared: Arc::clone(shared),
            key,
            name: key.into(),
            header,
            layout,
            slot,
            used: AtomicU64::new(0),
            hits: AtomicU8::new(0),
            counted: AtomicU64::new(0),
            detached: AtomicBool::new(false),
            trailer: Mutex::new(()),
            state: Mutex::new(state),
        }
    }

    /// The chunk's name.
    pub fn key(&self) -> ChunkKey {
        self.key
    }

    /// Blocks of the chunk.
    pub fn blocks(&self) -> u32 {
        self.layout.blocks
    }

    /// Bytes of the chunk.
    pub fn size(&self) -> u64 {
        self.layout.len
    }

    /// Bytes of `count` blocks from `first`: the last block of a file may be short.
    pub fn bytes_of(&self, first: u32, count: u32) -> u64 {
        self.layout.bytes_of(first, count)
    }

    /// Which of `count` blocks from `first` are valid.
    pub fn held(&self, first: u32, count: u32) -> BlockSet {
        self.state.lock().valid.within(first, count)
    }

    /// Whether a block can be sent.
    pub fn is_valid(&self, block: u32) -> bool {
        self.state.lock().valid.contains(block)
    }

    /// Whether every block is valid.
    pub fn is_complete(&self) -> bool {
        self.state.lock().valid.is_full()
    }

    /// Bytes of the valid blocks.
    pub fn cached_bytes(&self) -> u64 {
        self.layout.bytes_in(&self.state.lock().valid)
    }

    /// Stores whole blocks from the chunk-relative block `first` on (the chunk's last block may be short), and makes
    /// them valid. `checksums`: one per block, as by [`block_checksum`] (they are trusted), or none, and they are
    /// computed here. Blocks that are valid already, or that another call is writing, are left alone.
    ///
    /// An error stores nothing and harms nothing: the bytes can be sent on without.
    pub fn write(&self, first: u32, bytes: &[u8], checksums: &[u32]) -> Result<(), WriteError> {
        let blocks: Vec<&[u8]> = bytes.chunks(BLOCK_SIZE as usize).collect();
        self.write_blocks(first, &blocks, checksums)
    }

    /// The same of bytes that are not in one piece: one slice a block.
    pub fn write_blocks(&self, first: u32, blocks: &[&[u8]], checksums: &[u32]) -> Result<(), WriteError> {
        let len: usize = blocks.iter().map(|block| block.len()).sum();
        let count = self.whole_blocks(first, len)?;
        let whole = blocks.iter().rev().skip(1).all(|block| block.len() as u64 == BLOCK_SIZE);
        if !whole || blocks.len() != count as usize {
            return Err(WriteError::Shape("length"));
        }
        if !checksums.is_empty() && checksums.len() != count as usize {
            return Err(WriteError::Shape("number of checksums"));
        }
        let _entered = self.shared.enter()?;
        self.ensure_body(len as u64)?;
        let Some(claim) = self.claim(first, count)? else { return Ok(()) };
        let result = self.store(&claim, first, blocks, checksums);
        if result.is_err() {
            let mut state = self.state.lock();
            if state.epoch == claim.epoch {
                state.writing.remove_all(&claim.blocks);
            }
        }
        result
    }

    /// The blocks in their file, when all of them are valid. What a former process wrote is verified first, once.
    pub fn send(&self, first: u32, count: u32) -> Option<Extent> {
        // The second round finds what the first one verified.
        for _ in 0..2 {
            match self.at_hand(first, count)? {
                Ok(extent) => return Some(extent),
                Err(Suspect { file, epoch, blocks }) => {
                    if !self.verify(&file, epoch, &blocks) {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// The same without a look at the disk: only what was written or verified in this process.
    pub fn send_trusted(&self, first: u32, count: u32) -> Option<Extent> {
        self.at_hand(first, count)?.ok()
    }

    /// The blocks in their file, or which of them must be verified first. `None` unless all are valid.
    fn at_hand(&self, first: u32, count: u32) -> Option<Result<Extent, Suspect>> {
        if count == 0 {
            return None;
        }
        let state = self.state.lock();
        let file = Arc::clone(&state.body.as_ref()?.file);
        if !state.valid.contains_run(first, count) {
            return None;
        }
        let blocks = state.suspect.within(first, count);
        if !blocks.is_empty() {
            return Some(Err(Suspect { file, epoch: state.epoch, blocks }));
        }
        let checksums = state.checksums[first as usize..(first + count) as usize].to_vec();
        drop(state);
        self.hit();
        let offset = u64::from(first) * BLOCK_SIZE;
        Some(Ok(Extent { file, offset, len: self.bytes_of(first, count), checksums }))
    }

    /// Reads the blocks into `buf` (replacing what it held) and checks every one. On an error `buf` is empty, and what
    /// was damaged is no longer held.
    pub fn read_verified(&self, first: u32, count: u32, buf: &mut Vec<u8>) -> Result<(), ReadError> {
        buf.clear();
        let (file, epoch, blocks, checksums) = {
            let state = self.state.lock();
            let Some(body) = &state.body else { return Err(ReadError::NotHeld) };
            if count == 0 || !state.valid.contains_run(first, count) {
                return Err(ReadError::NotHeld);
            }
            let checksums = state.checksums[first as usize..(first + count) as usize].to_vec();
            (Arc::clone(&body.file), state.epoch, state.valid.within(first, count), checksums)
        };
        buf.resize(self.bytes_of(first, count) as usize, 0);
        let read = file.read_exact_at(buf, u64::from(first) * BLOCK_SIZE);
        let mut found = buf.chunks(BLOCK_SIZE as usize).zip(&checksums).zip(first..);
        if read.is_ok() && found.all(|((bytes, checksum), block)| self.checksum(block, bytes) == *checksum) {
            self.settle(epoch, &blocks);
            self.hit();
            return Ok(());
        }
        buf.clear();
        self.verify(&file, epoch, &blocks);
        Err(ReadError::Corrupt)
    }

    /// Checks what is held of the blocks, also if this process wrote it, and drops what is damaged: for when a receiver
    /// got something else than was written. Takes the time to read them, and when one is bad to copy the chunk.
    pub fn verify_again(&self, first: u32, count: u32) {
        let (file, epoch, blocks) = {
            let state = self.state.lock();
            let Some(body) = &state.body else { return };
            (Arc::clone(&body.file), state.epoch, state.valid.within(first, count))
        };
        self.verify(&file, epoch, &blocks);
    }

    /// Drops blocks that a reader found damaged. The other valid blocks are verified and kept, in a fresh file.
    pub fn invalidate(&self, first: u32, count: u32) {
        let (epoch, blocks) = {
            let state = self.state.lock();
            (state.epoch, state.valid.within(first, count))
        };
        self.replace(epoch, &blocks);
    }

    /// Makes the file of a chunk that has none, if it and so many bytes of blocks fit. The name's stripe is held.
    pub(crate) fn create_body(&self, first_write: u64) -> Result<(), WriteError> {
        if self.state.lock().body.is_some() {
            return Ok(());
        }
        if self.is_detached() {
            return Err(WriteError::Gone);
        }
        let (file, order) = self.shared.create(self.slot, self.key, &self.header, &self.layout, first_write)?;
        self.counted.store(self.shared.now(), Ordering::Relaxed);
        let mut state = self.state.lock();
        state.checksums = vec![0; self.layout.blocks as usize];
        state.body = Some(Body { file: Arc::new(file), order });
        Ok(())
    }

    /// Notes in the file whether the chunk is pinned: for when the index is lost, so a failure does not matter.
    pub(crate) fn mark_pinned(&self, pinned: bool) {
        let file = self.state.lock().body.as_ref().map(|body| Arc::clone(&body.file));
        if let Some(file) = file {
            let _ = file.write_all_at(&trailer::marks(pinned), self.layout.marks);
        }
    }

    pub(crate) fn matches(&self, spec: &ChunkSpec) -> bool {
        let ChunkSpec { dataset, path, version, key } = spec;
        self.key == *key
            && self.header.dataset == *dataset
            && self.header.size == version.size
            && self.header.key == version.key
            && self.header.path == *path
    }

    pub(crate) fn has_body(&self) -> bool {
        self.state.lock().body.is_some()
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }

    /// The file has no name any more. The name's stripe is held.
    pub(crate) fn detach(&self) {
        self.detached.store(true, Ordering::Release);
    }

    pub(crate) fn hits(&self) -> u8 {
        self.hits.load(Ordering::Relaxed)
    }

    /// The same; from now on they count from 0.
    pub(crate) fn take_hits(&self) -> u8 {
        self.hits.swap(0, Ordering::Relaxed)
    }

    /// The chunk is read. On the read path: a few atomic operations, no lock. A pass over it is many reads, and one use.
    fn hit(&self) {
        self.touch();
        let (now, counted) = (self.shared.now(), self.counted.load(Ordering::Relaxed));
        if counted == 0 || now.saturating_sub(counted) >= self.shared.tuning.one_use.as_millis() as u64 {
            // Of two at once one is lost.
            self.counted.store(now, Ordering::Relaxed);
            self.hits.store(self.hits().saturating_add(1), Ordering::Relaxed);
        }
    }

    /// The chunk is used: read or written.
    fn touch(&self) {
        self.used.store(self.shared.catalog.next_order().get(), Ordering::Relaxed);
    }

    fn checksum(&self, block: u32, bytes: &[u8]) -> u32 {
        block_checksum(self.key.file, self.layout.first_block + u64::from(block), bytes)
    }

    /// Blocks that `len` bytes from block `first` are, when they are whole.
    fn whole_blocks(&self, first: u32, len: usize) -> Result<u32, WriteError> {
        let len = len as u64;
        if first >= self.layout.blocks || len == 0 {
            return Err(WriteError::Shape("block"));
        }
        let end = u64::from(first) * BLOCK_SIZE + len;
        if end > self.layout.len || (end < self.layout.len && !len.is_multiple_of(BLOCK_SIZE)) {
            return Err(WriteError::Shape("length"));
        }
        // At most 1,024.
        Ok(len.div_ceil(BLOCK_SIZE) as u32)
    }

    fn ensure_body(&self, first_write: u64) -> Result<(), WriteError> {
        if self.state.lock().body.is_some() {
            return Ok(());
        }
        let _name = self.shared.stripe(self.name);
        self.create_body(first_write)
    }

    /// Takes what can be written of the blocks; `None` when there is nothing to do.
    fn claim(&self, first: u32, count: u32) -> Result<Option<Claim>, WriteError> {
        let mut state = self.state.lock();
        let mut blocks = BlockSet::new(self.layout.blocks);
        for block in (first..first + count).filter(|b| !state.valid.contains(*b) && !state.writing.contains(*b)) {
            blocks.insert(block);
        }
        if blocks.is_empty() {
            return Ok(None);
        }
        if self.is_detached() || state.replacing {
            return Err(WriteError::Gone);
        }
        let Some(body) = state.body.clone() else { return Err(WriteError::Gone) };
        state.writing.insert_all(&blocks);
        let bytes = self.layout.bytes_in(&blocks);
        Ok(Some(Claim { blocks, bytes, body, epoch: state.epoch }))
    }

    /// Reserves, writes, and makes valid what was claimed; a failure takes the reservation back.
    fn store(&self, claim: &Claim, first: u32, blocks: &[&[u8]], checksums: &[u32]) -> Result<(), WriteError> {
        self.shared.grow(self.slot, self.name, claim.body.order, claim.bytes)?;
        let computed: Vec<u32>;
        let checksums = if checksums.is_empty() {
            computed = blocks.iter().zip(first..).map(|(bytes, block)| self.checksum(block, bytes)).collect();
            &computed
        } else {
            checksums
        };
        let stored = self.write_claimed(claim, first, blocks, checksums);
        let result = match stored {
            Ok(true) => {
                self.touch();
                return Ok(());
            }
            Ok(false) => WriteError::Gone,
            Err(error) => WriteError::Disk(self.shared.disk_failed("write", &error)),
        };
        self.shared.shrink(self.name, claim.body.order, claim.bytes);
        Err(result)
    }

    /// `false` when the file was replaced or lost its name meanwhile.
    fn write_claimed(&self, claim: &Claim, first: u32, given: &[&[u8]], checksums: &[u32]) -> io::Result<bool> {
        let Claim { blocks, bytes: _, body: Body { file, order }, epoch } = claim;
        for run in blocks.runs() {
            let skip = (run.first - first) as usize;
            let part = &given[skip..skip + run.count as usize];
            write_all_vectored_at(file, part, u64::from(run.first) * BLOCK_SIZE)?;
            let part = &checksums[skip..skip + run.count as usize];
            let part: Vec<u8> = part.iter().flat_map(|checksum| checksum.to_le_bytes()).collect();
            file.write_all_at(&part, self.layout.checksums + u64::from(run.first) * 4)?;
        }
        if is_unlinked(file) && !self.is_detached() {
            self.shared.vanished(self, *order, *epoch);
            return Ok(false);
        }
        let _trailer = self.trailer.lock();
        let mut valid = {
            let state = self.state.lock();
            if state.epoch != *epoch || self.is_detached() {
                return Ok(false);
            }
            state.valid.clone()
        };
        valid.insert_all(blocks);
        // The validity map is at most 128 bytes, in one page or two.
        file.write_all_at(&valid.to_bytes(), self.layout.validity)?;
        let mut state = self.state.lock();
        for block in blocks.iter() {
            state.checksums[block as usize] = checksums[(block - first) as usize];
        }
        state.valid = valid;
        state.writing.remove_all(blocks);
        drop(state);
        self.shared.disk.succeeded();
        Ok(true)
    }

    /// Reads blocks and checks them; drops those that fail. Whether all are good.
    fn verify(&self, file: &File, epoch: u32, blocks: &BlockSet) -> bool {
        let (good, bad) = self.judge(file, blocks, |_, _| true);
        self.settle(epoch, &good);
        if !bad.is_empty() {
            self.replace(epoch, &bad);
        }
        bad.is_empty()
    }

    /// Reads blocks and tells the good ones from the bad; `keep` sees every good one, and may call it bad.
    fn judge(&self, file: &File, blocks: &BlockSet, mut keep: impl FnMut(u32, &[u8]) -> bool) -> (BlockSet, BlockSet) {
        let checksums = self.state.lock().checksums.clone();
        let (mut good, mut bad) = (BlockSet::new(self.layout.blocks), BlockSet::new(self.layout.blocks));
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        for block in blocks.iter() {
            let bytes = &mut buffer[..self.bytes_of(block, 1) as usize];
            let read = file.read_exact_at(bytes, u64::from(block) * BLOCK_SIZE);
            let sound = read.is_ok()
                && checksums.get(block as usize).is_some_and(|checksum| self.checksum(block, bytes) == *checksum)
                && keep(block, bytes);
            if sound { good.insert(block) } else { bad.insert(block) }
        }
        (good, bad)
    }

    /// These blocks have been verified.
    fn settle(&self, epoch: u32, good: &BlockSet) {
        let order = {
            let mut state = self.state.lock();
            if state.epoch != epoch || state.suspect.is_empty() {
                return;
            }
            state.suspect.remove_all(good);
            state.body.as_ref().filter(|_| state.suspect.is_empty()).map(|body| body.order)
        };
        if let Some(order) = order {
            self.trust(order);
        }
    }

    /// Everything valid is verified: the chunk may be closed and opened again without doing so anew.
    fn trust(&self, order: Tick) {
        self.shared.amend(self.name, order, |entry| Entry { flags: entry.flags | TRUSTED, ..entry });
    }

    /// Drops bad blocks: what else is valid moves to a fresh file.
    fn replace(&self, epoch: u32, bad: &BlockSet) {
        let entered = self.shared.enter();
        let _name = self.shared.stripe(self.name);
        let _trailer = self.trailer.lock();
        let (body, good, bad_bytes, corrupt) = {
            let mut state = self.state.lock();
            if state.epoch != epoch {
                return;
            }
            let before = state.valid.clone();
            state.valid.remove_all(bad);
            state.suspect.remove_all(bad);
            let corrupt = before.count() - state.valid.count();
            let Some(body) = state.body.clone() else { return };
            if corrupt == 0 || self.is_detached() || entered.is_err() {
                return;
            }
            state.replacing = true;
            (body, state.valid.clone(), self.layout.bytes_in(&before) - self.layout.bytes_in(&state.valid), corrupt)
        };
        self.shared.found_corrupt(self.slot, self.key, corrupt);
        let copied = self.copy(&body.file, &good);
        let mut state = self.state.lock();
        state.replacing = false;
        // Whoever is writing into the old file finds another epoch and gives up.
        state.epoch += 1;
        state.writing.clear();
        let Ok((file, kept)) = copied else {
            drop(state);
            self.shared.vanish(self.name, Some(body.order));
            return;
        };
        let lost = self.layout.bytes_in(&good) - self.layout.bytes_in(&kept);
        let more = good.count() - kept.count();
        state.valid = kept;
        state.suspect.clear();
        state.body = Some(Body { file: Arc::new(file), order: body.order });
        drop(state);
        if more > 0 {
            // Nobody had read them yet.
            self.shared.found_corrupt(self.slot, self.key, more);
        }
        self.shared.shrink(self.name, body.order, bad_bytes + lost);
        self.trust(body.order);
    }

    /// A fresh file under the chunk's name, with those of the blocks that are good.
    fn copy(&self, old: &File, blocks: &BlockSet) -> std::io::Result<(File, BlockSet)> {
        let root = self.shared.root().ok_or(std::io::ErrorKind::NotFound)?;
        root.unlink_chunk(self.key)?;
        let file = root.create_chunk(self.key)?;
        let mut failure = None;
        let (kept, _) = self.judge(old, blocks, |block, bytes| {
            let written = file.write_all_at(bytes, u64::from(block) * BLOCK_SIZE);
            written.map_err(|error| failure = Some(error)).is_ok()
        });
        let trailer = Trailer {
            header: self.header.clone(),
            pinned: self.shared.catalog.get(self.name).is_some_and(|entry| entry.has(PINNED)),
            valid: kept.clone(),
            checksums: self.state.lock().checksums.clone(),
        };
        let written = match (failure, trailer::encode(&trailer)) {
            (Some(error), _) => Err(error),
            (None, Some(bytes)) => file.write_all_at(&bytes, self.layout.trailer),
            (None, None) => Err(std::io::ErrorKind::InvalidData.into()),
        };
        if let Err(error) = written {
            let _ = root.unlink_chunk(self.key);
            self.shared.disk_failed("replace a chunk", &error);
            return Err(error);
        }
        Ok((file, kept))
    }

    pub(crate) fn epoch_is(&self, epoch: u32) -> bool {
        self.state.lock().epoch == epoch
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.shared.catalog.clear_live(self.name, self);
    }
}

/// Writes slices one after the other, all of them.
fn write_all_vectored_at(file: &File, slices: &[&[u8]], mut offset: u64) -> io::Result<()> {
    for slices in slices.chunks(MAX_SLICES) {
        let mut slices: Vec<IoSlice<'_>> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            match pwritev(file, left, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut left, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.state.lock().valid.count();
        write!(f, "Chunk({}-{}, {held}/{} blocks)", self.key.file, self.key.index, self.layout.blocks)
    }
}
