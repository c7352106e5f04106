//! Which readers of a file are sequential, and how far ahead of them to read.
//!
//! A stream is a run of requests each of which begins within [`SLACK`] of where the run ends: the kernel sends several
//! requests of 1 MiB at once, and they arrive in any order. A run whose requests cover less than three quarters of
//! what it spans, or later less than half, is no stream (strides, random reads nearby). The window begins at 1 MiB with the second request, doubles each time
//! that half of it was read, and halves when memory is short or when what was read ahead is thrown away.
//!
//! Pure: no clock, no lock, no I/O.

use forebay_protocol::{BLOCK_SIZE, BlockRange};

use crate::fetch::CHUNK_BLOCKS;

/// How far from a stream's end a request may begin: two requests of the kernel.
const SLACK: u64 = 2 << 20;
/// Streams of one file at most.
const MAX_STREAMS: usize = 32;
/// Of these, runs of a single request: random reads push each other out, and not a stream.
const MAX_SINGLE: usize = 16;
const FIRST_WINDOW: u64 = 1 << 20;
/// Parts in which a window is fetched: small enough that the first is there soon.
const SEGMENT: (u64, u64) = (1 << 20, 4 << 20);
/// A run's history counts for this many bytes.
const HISTORY: u64 = 64 << 20;

#[derive(Debug, Default)]
pub(crate) struct Streams {
    list: Vec<Stream>,
    next: u64,
    clock: u64,
}

#[derive(Debug)]
struct Stream {
    id: u64,
    start: u64,
    end: u64,
    requested: u64,
    window: u64,
    grown_at: u64,
    /// First block that was not asked for ahead of the reader.
    ahead: u64,
    used: u64,
    single: bool,
}

/// What to read ahead.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Advice {
    pub(crate) stream: u64,
    pub(crate) blocks: BlockRange,
    /// In parts of so many blocks.
    pub(crate) segment: u64,
}

/// What a request means for its file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) advice: Option<Advice>,
    /// A stream that was forgotten: what was read ahead for it will not be used.
    pub(crate) forgotten: Option<u64>,
}

impl Streams {
    /// A read of `len` > 0 bytes at `offset` of a file of `size` bytes; windows have `max` bytes at most.
    pub(crate) fn observe(&mut self, offset: u64, len: u64, size: u64, max: u64) -> Observed {
        self.clock += 1;
        let clock = self.clock;
        let near = self
            .list
            .iter_mut()
            .filter(|stream| offset <= stream.end + SLACK && stream.end <= offset + SLACK.max(len))
            .min_by_key(|stream| stream.end.abs_diff(offset));
        match near {
            Some(stream) => {
                stream.used = clock;
                Observed { advice: stream.advance(offset, len, size, max), forgotten: None }
            }
            None => Observed { advice: None, forgotten: self.begin(offset, len) },
        }
    }

    fn begin(&mut self, offset: u64, len: u64) -> Option<u64> {
        let singles = self.list.iter().filter(|stream| stream.single).count();
        let victim = if singles >= MAX_SINGLE {
            self.list.iter().filter(|stream| stream.single).min_by_key(|stream| stream.used)
        } else if self.list.len() >= MAX_STREAMS {
            self.list.iter().min_by_key(|stream| stream.used)
        } else {
            None
        };
        let forgotten = victim.map(|stream| stream.id);
        self.list.retain(|stream| Some(stream.id) != forgotten);
        self.next += 1;
        self.list.push(Stream {
            id: self.next,
            start: offset,
            end: offset + len,
            requested: len,
            window: 0,
            grown_at: offset + len,
            ahead: 0,
            used: self.clock,
            single: true,
        });
        forgotten
    }

    fn find(&mut self, id: u64) -> Option<&mut Stream> {
        self.list.iter_mut().find(|stream| stream.id == id)
    }

    /// Where a stream ends: what lies before was asked for by its reader.
    pub(crate) fn end(&mut self, id: u64) -> Option<u64> {
        self.find(id).map(|stream| stream.end)
    }

    /// From `block` on, nothing is read ahead for this stream (any more): memory was short, or it was thrown away.
    pub(crate) fn shrink(&mut self, id: u64, block: u64) {
        if let Some(stream) = self.find(id) {
            stream.window = (stream.window / 2).max(FIRST_WINDOW);
            stream.grown_at = stream.end;
            stream.ahead = stream.ahead.min(block);
        }
    }

    /// Reading ahead failed: the stream begins anew, at its reader's own pace.
    pub(crate) fn reset(&mut self, id: u64, block: u64) {
        if let Some(stream) = self.find(id) {
            stream.window = 0;
            stream.grown_at = stream.end;
            stream.ahead = stream.ahead.min(block);
        }
    }
}

impl Stream {
    fn advance(&mut self, offset: u64, len: u64, size: u64, max: u64) -> Option<Advice> {
        let end = offset + len;
        let forward = end > self.end;
        self.single = false;
        self.start = self.start.min(offset);
        self.end = self.end.max(end);
        self.requested = (self.requested + len).min(self.end - self.start);
        if self.end - self.start > HISTORY {
            self.start += (self.end - self.start) / 2;
            self.requested /= 2;
        }
        // To begin, nearly all that lies between must have been asked for; to go on, half of it.
        let span = self.end - self.start;
        let dense = if self.window == 0 { self.requested * 4 >= span * 3 } else { self.requested * 2 >= span };
        if !dense || max == 0 {
            self.window = 0;
            return None;
        }
        if !forward {
            return None;
        }
        if self.window == 0 {
            self.window = FIRST_WINDOW.min(max);
            self.grown_at = self.end;
        } else if self.end - self.grown_at >= self.window / 2 {
            self.window = (self.window * 2).min(max);
            self.grown_at = self.end;
        }
        let segment = (self.window / 4).clamp(SEGMENT.0, SEGMENT.1) / BLOCK_SIZE;
        let first = self.ahead.max(self.end / BLOCK_SIZE);
        let last = size.min(self.end + self.window).div_ceil(BLOCK_SIZE);
        let count = last.saturating_sub(first);
        let at_end = last == size.div_ceil(BLOCK_SIZE);
        if count == 0 || (count < segment && !at_end) {
            return None;
        }
        // Whole segments, but for the end of the file.
        let count = if at_end { count } else { count - count % segment };
        self.ahead = first + count;
        Some(Advice { stream: self.id, blocks: BlockRange { first, count }, segment })
    }
}

impl Advice {
    /// The parts, each within one chunk.
    pub(crate) fn segments(&self) -> Vec<BlockRange> {
        let end = self.blocks.first + self.blocks.count;
        let mut parts = Vec::new();
        let mut first = self.blocks.first;
        while first < end {
            let chunk_end = (first / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
            let count = self.segment.min(end - first).min(chunk_end - first);
            parts.push(BlockRange { first, count });
            first += count;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 10 << 30;
    const MAX: u64 = 32 << 20;

    fn feed(streams: &mut Streams, offset: u64, len: u64) -> Option<BlockRange> {
        streams.observe(offset, len, SIZE, MAX).advice.map(|advice| advice.blocks)
    }

    /// Bytes that are read ahead beyond the end of the last request.
    fn window(streams: &mut Streams) -> u64 {
        streams.list.last().map_or(0, |stream| stream.window)
    }

    #[test]
    fn the_window_grows_to_its_limit() {
        let mut streams = Streams::default();
        assert_eq!(feed(&mut streams, 0, MIB), None, "one request is no stream");
        assert_eq!(feed(&mut streams, MIB, MIB), Some(BlockRange { first: 32, count: 16 }));
        assert_eq!(feed(&mut streams, 2 * MIB, MIB), Some(BlockRange { first: 48, count: 32 }));
        let mut furthest = 0;
        for i in 3..200 {
            if let Some(blocks) = feed(&mut streams, i * MIB, MIB) {
                furthest = blocks.first + blocks.count;
            }
            assert!(furthest * BLOCK_SIZE <= (i + 1) * MIB + MAX, "never more than the window");
        }
        assert_eq!(window(&mut streams), MAX);
        assert!(furthest * BLOCK_SIZE >= 200 * MIB + MAX - 4 * MIB);
    }

    #[test]
    fn requests_out_of_order_are_one_stream() {
        let mut streams = Streams::default();
        for i in [1u64, 0, 3, 2, 5, 4, 7, 6, 8, 10, 9] {
            feed(&mut streams, i * MIB, MIB);
        }
        assert_eq!(streams.list.len(), 1);
        assert!(window(&mut streams) >= 4 * MIB);
    }

    #[test]
    fn strides_and_reads_backwards_are_no_streams() {
        let mut streams = Streams::default();
        let ahead: u64 = (0..100).filter_map(|i| feed(&mut streams, i * MIB, 4096)).map(|blocks| blocks.count).sum();
        assert_eq!(ahead, 0);
        let mut streams = Streams::default();
        for i in (0..100).rev() {
            assert_eq!(feed(&mut streams, i * MIB, MIB), None);
        }
    }

    #[test]
    fn random_reads_do_not_push_out_a_stream() {
        let mut streams = Streams::default();
        let mut place = 17u64;
        for i in 0..50 {
            feed(&mut streams, i * MIB, MIB);
            for _ in 0..10 {
                place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                feed(&mut streams, (1 << 30) + place % (8 << 30), 4096);
            }
        }
        let best = streams.list.iter().map(|stream| stream.window).max();
        assert_eq!(best, Some(MAX));
        assert!(streams.list.len() <= MAX_STREAMS);
    }

    #[test]
    fn interleaved_streams_have_windows_of_their_own() {
        let mut streams = Streams::default();
        for i in 0..40 {
            for reader in 0..6u64 {
                feed(&mut streams, reader * (1 << 30) + i * MIB, MIB);
            }
        }
        assert_eq!(streams.list.iter().filter(|stream| stream.window == MAX).count(), 6);
    }

    #[test]
    fn the_window_ends_with_the_file() {
        let mut streams = Streams::default();
        let size = 3 * MIB + 10;
        assert_eq!(streams.observe(0, MIB, size, MAX).advice, None);
        streams.observe(MIB, MIB, size, MAX);
        let last = streams.observe(2 * MIB, MIB, size, MAX).advice.map(|advice| advice.blocks);
        assert_eq!(last, Some(BlockRange { first: 48, count: 1 }));
        assert_eq!(streams.observe(3 * MIB, 10, size, MAX).advice, None);
    }

    #[test]
    fn segments_stay_within_chunks() {
        let advice = Advice { stream: 1, blocks: BlockRange { first: CHUNK_BLOCKS - 40, count: 200 }, segment: 64 };
        let parts: Vec<_> = advice.segments().iter().map(|part| (part.first, part.count)).collect();
        assert_eq!(parts, [(984, 40), (1024, 64), (1088, 64), (1152, 32)]);
    }

    proptest! {
        /// Nothing is advised twice to one sequential reader, nothing beyond the file, nothing that was read before.
        #[test]
        fn advice_is_disjoint(lens in prop::collection::vec(1u64..3 * MIB, 1..120), max in 0u64..64 * MIB) {
            let mut streams = Streams::default();
            let size: u64 = lens.iter().sum();
            let (mut offset, mut reached) = (0, 0);
            for len in lens {
                let observed = streams.observe(offset, len, size, max);
                offset += len;
                if let Some(advice) = observed.advice {
                    prop_assert!(advice.blocks.first >= reached);
                    prop_assert!(advice.blocks.first >= offset / BLOCK_SIZE);
                    reached = advice.blocks.first + advice.blocks.count;
                    prop_assert!(reached <= size.div_ceil(BLOCK_SIZE));
                    prop_assert!(reached * BLOCK_SIZE <= offset + max + BLOCK_SIZE);
                    let parts: u64 = advice.segments().iter().map(|part| part.count).sum();
                    prop_assert_eq!(parts, advice.blocks.count);
                }
            }
        }
    }
}
