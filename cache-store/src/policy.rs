//! What goes when room is needed.
//!
//! A policy orders, and says whether a dataset gives way to what is new; the store decides when room is needed, and
//! never offers a pinned chunk. Admission is not a policy's: nobody is admitted past quota or watermark.

use std::collections::BinaryHeap;

use forebay_protocol::ChunkKey;
use serde::{Deserialize, Serialize};

/// Chunks that one call names at most: bounds the memory of a round; the evictor calls again.
pub(crate) const MAX_VICTIMS: usize = 16_384;

/// Mean of the counts of uses above which all are halved: what was popular once goes one day.
const MEAN_COUNT: u64 = 8;
/// Bits of a place in an order.
const ORDER_BITS: u32 = 48;

/// The policies that a dataset can have. All but [`Self::Hold`] give way: what is new takes the place of what the policy
/// gives up, of the same dataset or of others when the tier is full, whatever their policies: it is there to be replaced.
/// Pinned chunks and those in use stay.
///
/// Sent, read and verified count as used. Orders and counts of use are not kept on disk: after a restart they are those
/// of admission until a chunk is used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Policy {
    /// Admits until the quota and keeps what it has, which gives way to nobody's new chunks; what is over the quota goes
    /// newest first.
    ///
    /// For shuffled epochs nothing that does not know the order does better: every chunk is equally far from its next
    /// use, so to replace one by another gains nothing and costs a fetch.
    #[default]
    #[serde(rename = "Hold")]
    Hold,
    /// What was used longest ago goes first: for a hot set that moves.
    Lru,
    /// What was used least often goes first, of those what was used longest ago: for a hot set that stays, beside scans
    /// that pass. Counts are halved when they have grown.
    Lfu,
    /// A hand goes from the oldest to the newest, and around: what was used since it passed is passed over once more, the
    /// first that was not goes. For a hot set beside scans, if the hot set moves.
    Sieve,
    /// What was admitted first goes first, used or not.
    Fifo,
}

/// A chunk that may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    /// Which.
    pub(crate) key: ChunkKey,
    /// Of which dataset.
    pub(crate) slot: u32,
    /// Its place in the order of admission: higher is newer.
    pub(crate) order: u64,
    /// Its place in the order of use: higher was used later.
    pub(crate) used: u64,
    /// How often it was used, at most and as far as not forgotten.
    pub(crate) hits: u8,
    /// Others have it.
    pub(crate) spare: bool,
    /// Bytes that its going frees.
    pub(crate) bytes: u64,
}

impl Policy {
    /// Whether a dataset's chunks make room for new ones, its own and others'.
    pub(crate) fn gives_way(self) -> bool {
        match self {
            Self::Hold => false,
            Self::Lru | Self::Lfu | Self::Sieve | Self::Fifo => true,
        }
    }

    /// Which of the candidates go, first to go first, until at least `bytes` are free or [`MAX_VICTIMS`] are named. `hand`
    /// is the place in the order of admission of who went last.
    pub(crate) fn victims(self, candidates: impl Iterator<Item = Candidate>, bytes: u64, hand: u64) -> Vec<Candidate> {
        // The candidates of the lowest ranks that together free `bytes`; the last of them to go is on top, and leaves as
        // soon as the others suffice.
        let mut first: BinaryHeap<((bool, u64), Candidate)> = BinaryHeap::new();
        let mut sum = 0u64;
        for candidate in candidates {
            first.push((self.rank(&candidate, hand), candidate));
            sum += candidate.bytes;
            while let Some((_, last)) = first.peek() {
                if sum - last.bytes < bytes && first.len() <= MAX_VICTIMS {
                    break;
                }
                sum -= last.bytes;
                first.pop();
            }
        }
        first.into_sorted_vec().into_iter().map(|(_, candidate)| candidate).collect()
    }

    /// The lower, the sooner. Spare copies go before all others, whatever the policy; those that were used longest ago
    /// first.
    fn rank(self, candidate: &Candidate, hand: u64) -> (bool, u64) {
        if candidate.spare {
            return (false, candidate.used);
        }
        let rank = match self {
            Self::Hold => u64::MAX - candidate.order,
            Self::Lru => candidate.used,
            Self::Lfu => u64::from(candidate.hits) << ORDER_BITS | candidate.used,
            Self::Sieve => u64::from(candidate.hits > 0) << ORDER_BITS | ahead(hand, candidate.order),
            Self::Fifo => candidate.order,
        };
        (true, rank)
    }

    /// What is left of a count of uses, of a chunk that was admitted at `order`, once `last` went as the last of a round
    /// that began at `hand`; `mean` is the mean of the counts.
    pub(crate) fn left(self, hits: u8, order: u64, hand: u64, last: &Candidate, mean: u64) -> u8 {
        match self {
            Self::Sieve if last.hits > 0 || ahead(hand, order) < ahead(hand, last.order) => 0,
            Self::Lfu if mean > MEAN_COUNT => hits / 2,
            _ => hits,
        }
    }
}

/// How far the hand goes to come from one place in the order of admission to another; all around to come to its own.
fn ahead(hand: u64, order: u64) -> u64 {
    order.wrapping_sub(hand).wrapping_sub(1) & ((1 << ORDER_BITS) - 1)
}

#[cfg(test)]
mod tests {
    use forebay_protocol::FileIdentity;

    use super::*;

    /// Candidates of 10 bytes by their orders of admission and use, and how often they were used; the indices of the chunks
    /// that go.
    fn pick(policy: Policy, of: &[(u64, u64, u8)], bytes: u64, hand: u64) -> Vec<u32> {
        let candidates = of.iter().map(|(order, used, hits)| Candidate {
            spare: false,
            key: ChunkKey { file: FileIdentity(1), index: *order as u32 },
            slot: 0,
            order: *order,
            used: *used,
            hits: *hits,
            bytes: 10,
        });
        policy.victims(candidates, bytes, hand).into_iter().map(|candidate| candidate.key.index).collect()
    }

    const ALL: [Policy; 5] = [Policy::Hold, Policy::Lru, Policy::Lfu, Policy::Sieve, Policy::Fifo];

    #[test]
    fn each_policy_gives_up_its_first_and_no_more_than_needed() {
        let of = [(3, 13, 1), (1, 15, 2), (5, 11, 1), (2, 12, 0), (4, 14, 0)];
        let firsts = [[5, 4, 3], [5, 2, 3], [2, 4, 5], [2, 4, 1], [1, 2, 3]];
        for (policy, first) in ALL.into_iter().zip(firsts) {
            assert_eq!(pick(policy, &of, 20, 0), first[..2], "{policy:?}");
            assert_eq!(pick(policy, &of, 21, 0), first, "{policy:?}");
            assert_eq!(pick(policy, &of, 100, 0).len(), of.len());
            assert!(pick(policy, &of, 0, 0).is_empty());
            let many: Vec<_> = (0..MAX_VICTIMS as u64 + 10).map(|n| (n, n, 0)).collect();
            assert_eq!(pick(policy, &many, u64::MAX, 0).len(), MAX_VICTIMS);
        }
    }

    #[test]
    fn the_hand_goes_on_and_around() {
        let of = [(1, 1, 0), (2, 2, 1), (3, 3, 0), (4, 4, 0), (5, 5, 1)];
        assert_eq!(pick(Policy::Sieve, &of, 50, 0), [1, 3, 4, 2, 5]);
        assert_eq!(pick(Policy::Sieve, &of, 50, 3), [4, 1, 3, 5, 2]);
        assert_eq!(pick(Policy::Sieve, &of, 50, u64::MAX >> 16), [1, 3, 4, 2, 5]);
    }

    #[test]
    fn uses_are_forgotten_where_the_hand_passed_and_when_there_are_many() {
        let last = |order, hits| Candidate {
            spare: false,
            key: ChunkKey { file: FileIdentity(1), index: 0 },
            slot: 0,
            order,
            used: order,
            hits,
            bytes: 1,
        };
        let left = |order, last| Policy::Sieve.left(3, order, 10, &last, 0);
        assert_eq!(
            (left(11, last(20, 0)), left(19, last(20, 0)), left(21, last(20, 0)), left(9, last(20, 0))),
            (0, 0, 3, 3)
        );
        assert_eq!((left(9, last(5, 0)), left(21, last(5, 0)), left(4, last(5, 0))), (3, 0, 0), "around");
        assert_eq!(left(21, last(20, 1)), 0, "all around");
        let left = |mean| Policy::Lfu.left(9, 1, 0, &last(2, 0), mean);
        assert_eq!((left(MEAN_COUNT), left(MEAN_COUNT + 1)), (9, 4));
        assert_eq!(Policy::Lru.left(9, 1, 0, &last(2, 0), 200), 9);
    }
}
