//! A range of blocks of one chunk, from whichever worker gives it, verified.
//!
//! Blocks come in order, so what was received is a prefix: when a worker fails in the middle, the next one is asked for
//! the rest. Every block is checked against the checksum that came with it, which is seeded with the file identity and
//! the block's place. A frame that does not continue the prefix, a block that fails, or an End before the last block
//! makes the worker a liar for this range: it is counted, and asked once more at once, to verify what it holds first:
//! what rotted on its disk since it wrote it, it does not find by itself. If it does not help, it is asked again only
//! when nobody else is left, and always to verify.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use forebay_protocol::{
    BLOCK_SIZE, BlockRange, CHUNK_SIZE, ChunkKey, DatasetId, DatasetPath, FileIdentity, FileVersion, block_checksum,
    frame::{FailureCode, MAX_READ_BLOCKS, Purpose, Read},
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    budget::{Permit, until},
    client::Inner,
    connection::{Event, Room},
    error::ClientError,
    failover::Rotation,
    members::{Member, count},
};

/// Blocks in a chunk.
pub(crate) const CHUNK_BLOCKS: u64 = CHUNK_SIZE / BLOCK_SIZE;
/// How long a request keeps its memory while nothing comes and others wait for memory.
const PARK_AFTER: std::time::Duration = std::time::Duration::from_millis(250);

/// The file whose blocks are fetched.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) dataset: DatasetId,
    pub(crate) path: DatasetPath,
    pub(crate) version: FileVersion,
    pub(crate) identity: FileIdentity,
    pub(crate) generation: Arc<AtomicU64>,
}

/// Verified blocks that follow each other.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) first: u64,
    pub(crate) bytes: Bytes,
}

#[derive(Debug)]
pub(crate) enum FetchError {
    /// It gave its memory to others while a source stalled: make the read again, with fresh memory for all of it.
    Starved,
    Failed(ClientError),
}

/// Bytes of the budget that the answer to a request takes: its blocks, and a frame head (12 bytes and a checksum) for
/// each, should every block come in a frame of its own.
pub(crate) fn cost(range: BlockRange, size: u64) -> usize {
    range.len(size) as usize + 16 * range.count as usize
}

/// Splits a range so that each part is one request: within one chunk and at most [`MAX_READ_BLOCKS`].
pub(crate) fn requests(range: BlockRange) -> impl Iterator<Item = BlockRange> {
    let end = range.first + range.count;
    let mut first = range.first;
    std::iter::from_fn(move || {
        (first < end).then(|| {
            let chunk_end = (first / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
            let part = BlockRange { first, count: (end.min(chunk_end) - first).min(u64::from(MAX_READ_BLOCKS)) };
            first += part.count;
            part
        })
    })
}

/// What became of asking one member.
enum Attempt {
    /// Ask the next.
    Next(String),
    /// Its source is away.
    SourceAway(String),
    /// It gave something else than was asked.
    Lied(String),
    Starved,
    Expired,
    Final(ClientError),
}

/// What is asked for, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    /// Within one chunk and at most [`MAX_READ_BLOCKS`].
    pub(crate) range: BlockRange,
    pub(crate) purpose: Purpose,
    /// Whether its memory goes to others while nothing comes. Not the second time: who was starved once gets there.
    pub(crate) may_park: bool,
    pub(crate) deadline: Instant,
}

/// Fetches one request's worth of blocks; `sink` gets them in order. `permit` holds at least [`cost`] of the range.
pub(crate) async fn fetch(
    client: &Inner,
    target: &Target,
    order: Order,
    permit: Permit,
    sink: &mut (dyn FnMut(Piece) + Send),
) -> Result<(), FetchError> {
    let Order { range, purpose, may_park, deadline } = order;
    let key = ChunkKey { file: target.identity, index: (range.first / CHUNK_BLOCKS) as u32 }.placement_key();
    let room = Room::new(permit);
    let mut rotation = Rotation::new(client, key, deadline).in_turns(client.hot.workers(key));
    let mut job = Job { client, target, key, range, purpose, may_park, deadline, next: range.first, room, sink };
    let mut sources_away = 0;
    loop {
        let member = rotation.next().await.map_err(FetchError::Failed)?;
        let suspected = rotation.distrusts(&member);
        let mut outcome = job.ask(&member, suspected).await;
        if let Err(Attempt::Lied(error)) = &outcome
            && !suspected
            && !job.rest().is_empty()
        {
            tracing::warn!(worker = member.name, path = %target.path, error, "refused what a worker sent; it is to verify");
            rotation.distrust(&member);
            outcome = job.ask(&member, true).await;
        }
        let Err(attempt) = outcome else {
            member.health.mark_ok();
            return Ok(());
        };
        // All blocks came and were verified; whatever went wrong afterwards is the worker's affair.
        if job.rest().is_empty() {
            return Ok(());
        }
        match attempt {
            Attempt::Next(error) => rotation.failed(&member, &error),
            Attempt::SourceAway(error) => {
                member.health.mark_ok();
                sources_away += 1;
                // Another worker may reach the source; a third one will not know better.
                if sources_away == 2 {
                    return Err(FetchError::Failed(ClientError::Unavailable(error)));
                }
                rotation.failed(&member, &error);
            }
            Attempt::Lied(error) => {
                tracing::warn!(worker = member.name, path = %target.path, error, "refused what a worker sent as verified");
                rotation.failed(&member, &error);
            }
            Attempt::Starved => return Err(job.starved()),
            Attempt::Expired => return Err(FetchError::Failed(rotation.expired())),
            Attempt::Final(error) => return Err(FetchError::Failed(error)),
        }
    }
}

struct Job<'a> {
    client: &'a Inner,
    target: &'a Target,
    /// The chunk's, in the placement.
    key: u64,
    range: BlockRange,
    purpose: Purpose,
    may_park: bool,
    deadline: Instant,
    /// The first block that has not come.
    next: u64,
    room: Arc<Mutex<Room>>,
    sink: &'a mut (dyn FnMut(Piece) + Send),
}

impl Job<'_> {
    fn end(&self) -> u64 {
        self.range.first + self.range.count
    }

    fn rest(&self) -> BlockRange {
        BlockRange { first: self.next, count: self.end() - self.next }
    }

    fn starved(&self) -> FetchError {
        count(&self.client.counters.starved, 1);
        FetchError::Starved
    }

    /// What a bad answer, or parking, took from the room comes back before the next attempt.
    fn refill_room(&self) -> bool {
        let wanted = cost(self.rest(), self.target.version.size);
        let mut room = self.room.lock();
        let missing = wanted.saturating_sub(room.bytes());
        if missing == 0 {
            return true;
        }
        let permit = match self.purpose {
            Purpose::Demand => self.client.budget.try_demand(missing),
            Purpose::ReadAhead | Purpose::Load | Purpose::Peer => self.client.budget.try_read_ahead(missing),
        };
        match permit {
            Some(permit) => {
                room.add(permit);
                true
            }
            None => false,
        }
    }

    /// Asks for what has not come; with `verify`, to be checked by the worker before it sends it.
    async fn ask(&mut self, member: &Arc<Member>, verify: bool) -> Result<(), Attempt> {
        if !self.refill_room() {
            return Err(Attempt::Starved);
        }
        let broken = |error: Arc<str>| Attempt::Next(error.to_string());
        let connection =
            until(self.deadline, member.pool.get(self.purpose)).await.ok_or(Attempt::Expired)?.map_err(broken)?;
        let read = Read {
            dataset: self.target.dataset,
            epoch: self.client.members.snapshot().table.epoch,
            generation: self.target.generation.load(Ordering::Relaxed),
            path: self.target.path.clone(),
            version: self.target.version.clone(),
            range: self.rest(),
            purpose: self.purpose,
            verify,
        };
        let mut handle = until(self.deadline, connection.request(read, self.room.clone()))
            .await
            .ok_or(Attempt::Expired)?
            .map_err(broken)?;
        count(&self.client.counters.requests, 1);
        count(&self.client.counters.blocks_requested, self.rest().count);
        count(&member.counters.requests, 1);
        loop {
            let patience = (Instant::now() + PARK_AFTER).min(self.deadline);
            let Some(event) = until(patience, handle.next()).await else {
                if Instant::now() >= self.deadline {
                    return Err(Attempt::Expired);
                }
                // Only who holds nothing else may wait for memory again.
                if self.may_park && self.next == self.range.first && self.client.budget.is_short() {
                    self.room.lock().park();
                }
                continue;
            };
            match event {
                Event::Data { first_block, checksums, bytes } => {
                    if let Err(why) = self.accept(member, first_block, &checksums, bytes) {
                        count(&self.client.counters.checksum_failures, 1);
                        count(&member.counters.checksum_failures, 1);
                        return Err(Attempt::Lied(why));
                    }
                }
                Event::End { hit_blocks, miss_blocks, workers } => {
                    self.client.hot.told(self.key, workers);
                    count(&self.client.counters.hit_blocks, u64::from(hit_blocks).min(self.range.count));
                    count(&self.client.counters.miss_blocks, u64::from(miss_blocks).min(self.range.count));
                    if self.next < self.end() {
                        count(&self.client.counters.checksum_failures, 1);
                        count(&member.counters.checksum_failures, 1);
                        return Err(Attempt::Lied(format!("the answer ended before block {}", self.next)));
                    }
                    return Ok(());
                }
                Event::Failure { code, message } => return Err(judge(code, message)),
                Event::Starved => return Err(Attempt::Starved),
                Event::Broken(error) => return Err(broken(error)),
            }
        }
    }

    /// Verifies a frame; the blocks before the first bad one are kept.
    fn accept(&mut self, member: &Member, first: u64, checksums: &[u32], bytes: Bytes) -> Result<(), String> {
        let frame = BlockRange { first, count: checksums.len() as u64 };
        let size = self.target.version.size;
        if first != self.next || frame.count > self.rest().count || bytes.len() as u64 != frame.len(size) {
            return Err(format!(
                "{} blocks from {first} ({} bytes) where block {} of {:?} was due",
                frame.count,
                bytes.len(),
                self.next,
                self.range
            ));
        }
        let bad = bytes
            .chunks(BLOCK_SIZE as usize)
            .zip(checksums)
            .zip(first..)
            .find(|((block, checksum), index)| block_checksum(self.target.identity, *index, block) != **checksum)
            .map(|(_, index)| index);
        let good = bad.unwrap_or(first + frame.count) - first;
        if good > 0 {
            let bytes = bytes.slice(..BlockRange { first, count: good }.len(size) as usize);
            count(&self.client.counters.bytes_from_workers, bytes.len() as u64);
            count(&member.counters.bytes, bytes.len() as u64);
            self.next = first + good;
            (self.sink)(Piece { first, bytes });
        }
        match bad {
            Some(index) => Err(format!("block {index} does not match its checksum")),
            None => Ok(()),
        }
    }
}

fn judge(code: FailureCode, message: String) -> Attempt {
    let text = if message.is_empty() { code.to_string() } else { format!("{code}: {message}") };
    match code {
        FailureCode::VersionGone => Attempt::Final(ClientError::VersionGone),
        FailureCode::PermissionDenied => Attempt::Final(ClientError::PermissionDenied(text)),
        FailureCode::BadRequest => Attempt::Final(ClientError::Invalid(text)),
        FailureCode::SourceUnavailable => Attempt::SourceAway(text),
        FailureCode::UnknownDataset
        | FailureCode::Busy
        | FailureCode::Stopping
        | FailureCode::NotHeld
        | FailureCode::Internal => Attempt::Next(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_within_chunks_and_bounds() {
        let parts: Vec<_> = requests(BlockRange { first: CHUNK_BLOCKS - 300, count: 700 }).collect();
        let ends: Vec<_> = parts.iter().map(|part| (part.first, part.count)).collect();
        assert_eq!(ends, [(724, 256), (980, 44), (1024, 256), (1280, 144)]);
        assert_eq!(requests(BlockRange { first: 5, count: 0 }).count(), 0);
    }
}
