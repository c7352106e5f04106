//! What goes when room is needed.
//!
//! A policy only orders; the store decides when room is needed, and never offers a pinned chunk. Admission is not a
//! policy's: nobody is admitted past quota or watermark.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;

use forebay_protocol::ChunkKey;

/// Chunks that one call names at most: bounds the memory of a round; the evictor calls again.
pub const MAX_VICTIMS: usize = 16_384;

/// The policies that a dataset can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// See [`Hold`].
    #[default]
    Hold,
}

impl Policy {
    pub(crate) fn eviction(self) -> &'static dyn EvictionPolicy {
        match self {
            Self::Hold => &Hold,
        }
    }
}

/// A chunk that may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub key: ChunkKey,
    /// Its place in the order of admission: higher is newer.
    pub order: u64,
    /// Bytes that its going frees.
    pub bytes: u64,
}

/// Orders the chunks of datasets for eviction.
pub trait EvictionPolicy: Send + Sync + fmt::Debug {
    /// A reader was given blocks of this chunk. On the read path: must not block.
    fn accessed(&self, key: ChunkKey);

    /// Which of the candidates go, first to go first, until at least `bytes` are free or [`MAX_VICTIMS`] are named.
    fn victims(&self, candidates: &mut dyn Iterator<Item = Candidate>, bytes: u64) -> Vec<ChunkKey>;
}

/// Admits until the quota and keeps what it has; what is over the quota goes newest first.
///
/// For shuffled epochs nothing that does not know the order does better: every chunk is equally far from its next use,
/// so to replace one by another gains nothing and costs a fetch.
#[derive(Clone, Copy, Debug)]
pub struct Hold;

impl EvictionPolicy for Hold {
    fn accessed(&self, _key: ChunkKey) {}

    fn victims(&self, candidates: &mut dyn Iterator<Item = Candidate>, bytes: u64) -> Vec<ChunkKey> {
        // The newest candidates that together free `bytes`; the oldest of them is on top, and leaves as soon as the
        // others suffice.
        let mut newest: BinaryHeap<Reverse<(u64, u64, ChunkKey)>> = BinaryHeap::new();
        let mut sum = 0u64;
        for Candidate { key, order, bytes: size } in candidates {
            newest.push(Reverse((order, size, key)));
            sum += size;
            while let Some(Reverse((_, oldest, _))) = newest.peek() {
                if sum - oldest < bytes && newest.len() <= MAX_VICTIMS {
                    break;
                }
                sum -= oldest;
                newest.pop();
            }
        }
        // Ascending by `Reverse` is newest first.
        newest.into_sorted_vec().into_iter().map(|Reverse((_, _, key))| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use forebay_protocol::FileIdentity;

    use super::*;

    #[test]
    fn hold_gives_up_the_newest_and_no_more_than_needed() {
        let key = |index| ChunkKey { file: FileIdentity(1), index };
        let candidates = |orders: &[u64]| {
            orders
                .iter()
                .map(|order| Candidate { key: key(*order as u32), order: *order, bytes: 10 })
                .collect::<Vec<_>>()
        };
        let pick = |orders: &[u64], bytes| {
            let keys = Hold.victims(&mut candidates(orders).into_iter(), bytes);
            keys.into_iter().map(|key| key.index).collect::<Vec<_>>()
        };
        assert_eq!(pick(&[3, 1, 5, 2, 4], 20), [5, 4]);
        assert_eq!(pick(&[3, 1, 5, 2, 4], 21), [5, 4, 3]);
        assert_eq!(pick(&[3, 1], 100), [3, 1]);
        assert!(pick(&[3, 1], 0).is_empty());
        let many: Vec<u64> = (0..MAX_VICTIMS as u64 + 10).collect();
        assert_eq!(pick(&many, u64::MAX).len(), MAX_VICTIMS);
    }
}
