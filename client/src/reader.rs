//! Reading one version of one file.
//!
//! A read takes what it finds in segments (read ahead, or a small file that somebody fetches already) and asks workers
//! for the rest, in requests that are aligned to blocks and stay within chunks. Memory for the rest is taken first and
//! at once, while nothing is held. When a segment does not deliver, the whole read is made again without segments.
//!
//! Lock order: a reader's state, then the list of holders. No lock is held across an await.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use forebay_protocol::{BLOCK_SIZE, BlockRange, FileVersion, frame::Purpose};
use futures::future::{BoxFuture, try_join_all};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    budget::{Permit, until},
    client::Inner,
    error::ClientError,
    fetch::{FetchError, Order, Piece, Target, cost, fetch, requests},
    members::count,
    segment::{Segment, Unhelpful},
    streams::{Advice, Streams},
};

/// Files up to this size are fetched whole by the first read.
const SMALL_FILE: u64 = 1 << 20;
/// Bytes at the beginning of a larger file that are fetched ahead of its first read, where that is announced: read-ahead
/// goes on from there.
const AHEAD: u64 = 4 << 20;
/// What lies so far behind a stream's end is not waited for any more.
const BEHIND: u64 = 4 << 20;

/// One version of one file, to be read at any offsets by any number of readers at once.
pub struct FileReader {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    client: Arc<Inner>,
    target: Arc<Target>,
    number: u64,
    this: Weak<Shared>,
    state: Mutex<State>,
}

struct State {
    streams: Streams,
    /// By first block; they do not overlap.
    segments: BTreeMap<u64, Arc<Segment>>,
    touched: Instant,
}

/// What came of fetching ahead.
pub enum Ahead {
    /// There is no memory for it now.
    NoMemory,
    /// It is there, or somebody fetches it.
    There,
    /// It is fetched, until this ends.
    UnderWay(BoxFuture<'static, ()>),
}

/// Where a part of a read comes from.
enum Part {
    Segment(Taker, BlockRange),
    Own(BlockRange, Permit),
}

/// A read that waits for a segment.
struct Taker {
    segment: Arc<Segment>,
    reader: Arc<Shared>,
    served: bool,
}

impl Drop for Taker {
    fn drop(&mut self) {
        // Only this one and the table hold it: nobody waits for a small file any more.
        let alone = self.segment.stream.is_none() && Arc::strong_count(&self.segment) <= 2;
        if alone && !self.served && !self.segment.is_finished() {
            self.reader.forget(&self.segment);
        }
    }
}

impl FileReader {
    pub(crate) fn new(client: Arc<Inner>, target: Target) -> Arc<Self> {
        let number = client.holders.number();
        let state = State { streams: Streams::default(), segments: BTreeMap::new(), touched: Instant::now() };
        let shared = Arc::new_cyclic(|this| Shared {
            client,
            target: Arc::new(target),
            number,
            this: this.clone(),
            state: Mutex::new(state),
        });
        Arc::new(Self { shared })
    }

    /// The version that is read.
    pub fn version(&self) -> &FileVersion {
        &self.shared.target.version
    }

    /// The bytes from `offset`, at most `len` of them and at most to the end of the file, in order. The parts hold
    /// their share of the client's memory budget until they are dropped.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, ClientError> {
        let shared = &self.shared;
        let size = shared.target.version.size;
        let len = (len as u64).min(size.saturating_sub(offset));
        if len == 0 {
            return Ok(Vec::new());
        }
        let blocks = BlockRange::covering(offset, len);
        let total = shared.client.budget.total();
        if len > total as u64 || cost(blocks, size) > total {
            return Err(ClientError::Invalid(format!("a read of {len} bytes, with a memory budget of {total}")));
        }
        let deadline = shared.client.deadline();
        let advice = shared.observe(offset, len);
        let pieces = match shared.read_shared(blocks, offset, len, advice, deadline).await {
            Ok(pieces) => pieces,
            Err(Unhelpful::Stuck) => shared.read_alone(blocks, true, deadline).await?,
            Err(Unhelpful::Starved) => shared.read_alone(blocks, false, deadline).await?,
            Err(Unhelpful::Failed(error)) => return Err(error),
        };
        Ok(cut(pieces, offset, len))
    }

    /// Begins to fetch the beginning of the file, all of a small one, ahead of its first read, which will find it here.
    pub fn fetch_ahead(&self) -> Ahead {
        let shared = &self.shared;
        let range = BlockRange::covering(0, shared.size().min(if shared.is_small() { SMALL_FILE } else { AHEAD }));
        let mut state = shared.state.lock();
        if range.count == 0 || overlaps(&state.segments, range) {
            return Ahead::There;
        }
        let Some(permit) = shared.client.budget.try_hint(cost(range, shared.size())) else { return Ahead::NoMemory };
        let deadline = shared.client.deadline();
        let segment = shared.begin(&mut state, range, None, Purpose::ReadAhead, permit, deadline);
        Ahead::UnderWay(Box::pin(async move { segment.ended().await }))
    }
}

/// Exactly the bytes that were asked for, of blocks that cover them.
fn cut(pieces: Vec<Piece>, offset: u64, len: u64) -> Vec<Bytes> {
    let end = offset + len;
    pieces
        .into_iter()
        .filter_map(|Piece { first, bytes }| {
            let start = first * BLOCK_SIZE;
            let from = offset.max(start) - start;
            let to = end.min(start + bytes.len() as u64).saturating_sub(start);
            (from < to).then(|| bytes.slice(from as usize..to as usize))
        })
        .collect()
}

impl Shared {
    pub(crate) fn touched(&self) -> Instant {
        self.state.lock().touched
    }

    fn size(&self) -> u64 {
        self.target.version.size
    }

    fn is_small(&self) -> bool {
        self.size() <= SMALL_FILE
    }

    /// Memory for requests of this cost.
    async fn memory(&self, bytes: usize, deadline: Instant) -> Result<Permit, ClientError> {
        let budget = &self.client.budget;
        let pressure = || self.client.holders.relieve(budget);
        let granted = until(deadline, budget.demand(bytes, pressure)).await;
        granted.ok_or_else(|| {
            ClientError::Unavailable(format!("no memory was free within {:?}", self.client.config.deadline))
        })
    }

    /// Notes the read and says what to read ahead.
    fn observe(&self, offset: u64, len: u64) -> Option<Advice> {
        let mut state = self.state.lock();
        state.touched = Instant::now();
        if self.is_small() {
            return None;
        }
        let observed = state.streams.observe(offset, len, self.size(), self.client.config.max_read_ahead);
        // What nobody will take: of forgotten streams, and what lies far behind its reader.
        let State { streams, segments, .. } = &mut *state;
        segments.retain(|_, segment| {
            let Some(stream) = segment.stream else { return true };
            let end = if observed.forgotten == Some(stream) { None } else { streams.end(stream) };
            let keep = end.is_some_and(|end| segment.end() * BLOCK_SIZE + BEHIND > end);
            if !keep {
                self.wasted(segment);
                if end.is_some() {
                    streams.shrink(stream, u64::MAX);
                }
            }
            keep
        });
        if segments.is_empty() {
            self.client.holders.remove(self.number);
        }
        observed.advice
    }

    fn wasted(&self, segment: &Segment) {
        if segment.stream.is_some() {
            count(&self.client.counters.read_ahead_wasted_bytes, segment.unused());
        }
    }

    async fn read_shared(
        self: &Arc<Self>,
        blocks: BlockRange,
        offset: u64,
        len: u64,
        advice: Option<Advice>,
        deadline: Instant,
    ) -> Result<Vec<Piece>, Unhelpful> {
        let mut wanted = self.missing(blocks);
        let parts = loop {
            let permit = match wanted {
                0 => None,
                _ => Some(self.memory(wanted, deadline).await.map_err(Unhelpful::Failed)?),
            };
            match self.plan(blocks, permit, deadline) {
                Ok(parts) => break parts,
                // Segments vanished meanwhile; grows to the whole read at most.
                Err(more) => wanted = more.max(wanted),
            }
        };
        if let Some(advice) = advice {
            self.read_ahead(&advice);
        }
        let gather = parts.into_iter().map(|part| async move {
            match part {
                Part::Segment(mut taker, range) => {
                    let pieces = taker.segment.blocks(range, deadline).await?;
                    taker.served = true;
                    let from = offset.max(range.first * BLOCK_SIZE);
                    let to = (offset + len).min((range.first + range.count) * BLOCK_SIZE);
                    self.consume(&taker.segment, to.saturating_sub(from));
                    Ok(pieces)
                }
                Part::Own(range, permit) => {
                    self.fetch(range, permit, true, deadline).await.map_err(|error| match error {
                        FetchError::Starved => Unhelpful::Starved,
                        FetchError::Failed(error) => Unhelpful::Failed(error),
                    })
                }
            }
        });
        Ok(try_join_all(gather).await?.concat())
    }

    /// All blocks by requests of its own.
    async fn read_alone(
        &self,
        blocks: BlockRange,
        mut may_park: bool,
        deadline: Instant,
    ) -> Result<Vec<Piece>, ClientError> {
        loop {
            let mut permit = self.memory(cost(blocks, self.size()), deadline).await?;
            let parts: Vec<_> = requests(blocks).map(|range| (range, permit.split(cost(range, self.size())))).collect();
            let gather = parts.into_iter().map(|(range, permit)| self.fetch(range, permit, may_park, deadline));
            match try_join_all(gather).await {
                Ok(pieces) => return Ok(pieces.concat()),
                Err(FetchError::Starved) => may_park = false,
                Err(FetchError::Failed(error)) => return Err(error),
            }
        }
    }

    async fn fetch(
        &self,
        range: BlockRange,
        permit: Permit,
        may_park: bool,
        deadline: Instant,
    ) -> Result<Vec<Piece>, FetchError> {
        let mut pieces = Vec::new();
        let mut sink = |piece| pieces.push(piece);
        let order = Order { range, purpose: Purpose::Demand, may_park, deadline };
        fetch(&self.client, &self.target, order, permit, &mut sink).await?;
        Ok(pieces)
    }

    fn whole(&self) -> BlockRange {
        BlockRange::covering(0, self.size())
    }

    /// Cost of what no segment has.
    fn missing(&self, blocks: BlockRange) -> usize {
        let state = self.state.lock();
        let holes = split(&state.segments, blocks).into_iter().filter(|(_, segment)| segment.is_none());
        if self.is_small() {
            return if holes.count() > 0 { cost(self.whole(), self.size()) } else { 0 };
        }
        holes.map(|(range, _)| cost(range, self.size())).sum()
    }

    /// Says where each part comes from; `Err` with the cost when `permit` does not cover it.
    fn plan(
        self: &Arc<Self>,
        blocks: BlockRange,
        permit: Option<Permit>,
        deadline: Instant,
    ) -> Result<Vec<Part>, usize> {
        let size = self.size();
        let mut state = self.state.lock();
        let mut found = split(&state.segments, blocks);
        let paid = permit.as_ref().map_or(0, Permit::bytes);
        let holes: Vec<BlockRange> =
            found.iter().filter(|(_, segment)| segment.is_none()).map(|(range, _)| *range).collect();
        let mut permit = permit;
        if self.is_small() && !holes.is_empty() {
            let wanted = cost(self.whole(), size);
            match permit.take() {
                Some(permit) if paid >= wanted => {
                    let segment = self.begin(&mut state, self.whole(), None, Purpose::Demand, permit, deadline);
                    found = vec![(blocks, Some(segment))];
                }
                _ => return Err(wanted),
            }
        } else {
            let wanted: usize = holes.iter().map(|range| cost(*range, size)).sum();
            if paid < wanted {
                return Err(wanted);
            }
        }
        let mut parts = Vec::with_capacity(found.len());
        for (range, segment) in found {
            match (segment, &mut permit) {
                (Some(segment), _) => {
                    parts.push(Part::Segment(Taker { segment, reader: self.clone(), served: false }, range))
                }
                (None, Some(permit)) => {
                    for request in requests(range) {
                        parts.push(Part::Own(request, permit.split(cost(request, size))));
                    }
                }
                // A hole without a permit costs more than nothing, which was refused above.
                (None, None) => return Err(cost(range, size)),
            }
        }
        Ok(parts)
    }

    /// Starts a segment that overlaps no other.
    fn begin(
        &self,
        state: &mut State,
        range: BlockRange,
        stream: Option<u64>,
        purpose: Purpose,
        permit: Permit,
        deadline: Instant,
    ) -> Arc<Segment> {
        let segment = Segment::new(range, range.len(self.size()), stream, deadline);
        let order = Order { range, purpose, may_park: stream.is_none(), deadline };
        let (client, target, reader) = (self.client.clone(), self.target.clone(), self.this.clone());
        let held = Arc::downgrade(&segment);
        let task = tokio::spawn(async move {
            let mut sink = |piece| {
                if let Some(segment) = held.upgrade() {
                    segment.push(piece);
                }
            };
            let outcome = fetch(&client, &target, order, permit, &mut sink).await;
            let Some(segment) = held.upgrade() else { return };
            match outcome {
                Ok(()) => segment.finish(Ok(())),
                Err(error) => {
                    if let Some(reader) = reader.upgrade() {
                        reader.forget(&segment);
                    }
                    segment.finish(Err(match error {
                        FetchError::Starved => None,
                        FetchError::Failed(error) => Some(error),
                    }));
                }
            }
        });
        segment.run_by(task.abort_handle());
        if state.segments.is_empty() {
            self.client.holders.add(self.number, self.this.clone());
        }
        state.segments.insert(range.first, segment.clone());
        segment
    }

    /// Starts what is advised, as far as memory is free.
    fn read_ahead(&self, advice: &Advice) {
        let budget = &self.client.budget;
        for range in advice.segments() {
            let bytes = cost(range, self.size());
            let permit = budget.try_read_ahead(bytes).or_else(|| {
                self.client.holders.shed_idle(bytes);
                budget.try_read_ahead(bytes)
            });
            let mut state = self.state.lock();
            let Some(permit) = permit else {
                return state.streams.shrink(advice.stream, range.first);
            };
            // Reads that came meanwhile may have asked for these blocks themselves.
            let Some(end) = state.streams.end(advice.stream) else { return };
            if (range.first + range.count) * BLOCK_SIZE <= end || overlaps(&state.segments, range) {
                continue;
            }
            count(&self.client.counters.read_ahead_bytes, range.len(self.size()));
            let deadline = self.client.deadline();
            self.begin(&mut state, range, Some(advice.stream), Purpose::ReadAhead, permit, deadline);
        }
    }

    fn consume(&self, segment: &Arc<Segment>, bytes: u64) {
        if segment.stream.is_some() {
            count(&self.client.counters.read_ahead_used_bytes, bytes.min(segment.unused()));
        }
        if segment.consume(bytes) {
            self.remove(&mut self.state.lock(), segment);
        }
    }

    /// A segment that failed, or that nobody waits for.
    fn forget(&self, segment: &Arc<Segment>) {
        let mut state = self.state.lock();
        if self.remove(&mut state, segment) {
            self.wasted(segment);
            if let Some(stream) = segment.stream {
                state.streams.reset(stream, segment.range.first);
            }
        }
    }

    fn remove(&self, state: &mut State, segment: &Arc<Segment>) -> bool {
        let there = state.segments.get(&segment.range.first).is_some_and(|other| Arc::ptr_eq(other, segment));
        if there {
            state.segments.remove(&segment.range.first);
            if state.segments.is_empty() {
                self.client.holders.remove(self.number);
            }
        }
        there
    }

    /// Gives up the segment furthest ahead that no read waits for; the bytes that this frees, 0 if there is none.
    pub(crate) fn shed(&self) -> usize {
        let mut state = self.state.lock();
        let spare = state.segments.values().rev().find(|segment| Arc::strong_count(segment) == 1).cloned();
        let Some(segment) = spare else { return 0 };
        self.remove(&mut state, &segment);
        self.wasted(&segment);
        if let Some(stream) = segment.stream {
            state.streams.shrink(stream, segment.range.first);
        }
        segment.len as usize
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.client.holders.remove(self.number);
        for segment in self.state.get_mut().segments.values() {
            if segment.stream.is_some() {
                count(&self.client.counters.read_ahead_wasted_bytes, segment.unused());
            }
        }
    }
}

fn overlaps(segments: &BTreeMap<u64, Arc<Segment>>, range: BlockRange) -> bool {
    segments.range(..range.first + range.count).next_back().is_some_and(|(_, segment)| segment.end() > range.first)
}

/// A range in parts, each with the segment that covers it.
fn split(segments: &BTreeMap<u64, Arc<Segment>>, range: BlockRange) -> Vec<(BlockRange, Option<Arc<Segment>>)> {
    let end = range.first + range.count;
    let mut parts = Vec::new();
    let mut next = range.first;
    let before = segments.range(..=range.first).next_back().map(|(first, _)| *first).unwrap_or(range.first);
    for (first, segment) in segments.range(before..end) {
        if segment.end() <= next {
            continue;
        }
        if *first > next {
            parts.push((BlockRange { first: next, count: first - next }, None));
            next = *first;
        }
        let stop = segment.end().min(end);
        parts.push((BlockRange { first: next, count: stop - next }, Some(segment.clone())));
        next = stop;
    }
    if next < end {
        parts.push((BlockRange { first: next, count: end - next }, None));
    }
    parts
}
