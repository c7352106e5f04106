//! What goes when room is needed.
//!
//! A policy orders, and says whether a dataset gives way to what is new; the store decides when room is needed, and
//! never offers a pinned chunk. Admission is not a policy's: nobody is admitted past quota or watermark.

use std::collections::BinaryHeap;

use forebay_protocol::ChunkKey;

/// Chunks that one call names at most: bounds the memory of a round; the evictor calls again.
pub(crate) const MAX_VICTIMS: usize = 16_384;

/// The policies that a dataset can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Admits until the quota and keeps what it has; what is over the quota goes newest first.
    ///
    /// For shuffled epochs nothing that does not know the order does better: every chunk is equally far from its next
    /// use, so to replace one by another gains nothing and costs a fetch.
    #[default]
    Hold,
    /// What is new takes the place of what was used longest ago: for a hot set that moves. Sent, read and written count
    /// as used. The order is not kept on disk: after a restart it is that of admission until a chunk is used again.
    ///
    /// It also gives way to what is new of others when the tier is full, whatever their policies: it is there to be
    /// replaced. What [`Self::Hold`] keeps is not, and gives way to nobody's new chunks. Pinned chunks and those in use
    /// stay.
    Lru,
}

/// A chunk that may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Which.
    pub(crate) key: ChunkKey,
    /// Its place in the order of admission: higher is newer.
    pub(crate) order: u64,
    /// Its place in the order of use: higher was used later.
    pub(crate) used: u64,
    /// Bytes that its going frees.
    pub(crate) bytes: u64,
}

impl Policy {
    /// Whether a dataset's chunks make room for new ones, its own and others'.
    pub(crate) fn gives_way(self) -> bool {
        match self {
            Self::Hold => false,
            Self::Lru => true,
        }
    }

    /// Which of the candidates go, first to go first, until at least `bytes` are free or [`MAX_VICTIMS`] are named.
    pub(crate) fn victims(self, candidates: impl Iterator<Item = Candidate>, bytes: u64) -> Vec<ChunkKey> {
        // The candidates of the lowest ranks that together free `bytes`; the last of them to go is on top, and leaves as
        // soon as the others suffice.
        let mut first: BinaryHeap<(u64, u64, ChunkKey)> = BinaryHeap::new();
        let mut sum = 0u64;
        for Candidate { key, order, used, bytes: size } in candidates {
            let rank = match self {
                Self::Hold => u64::MAX - order,
                Self::Lru => used,
            };
            first.push((rank, size, key));
            sum += size;
            while let Some((_, last, _)) = first.peek() {
                if sum - last < bytes && first.len() <= MAX_VICTIMS {
                    break;
                }
                sum -= last;
                first.pop();
            }
        }
        first.into_sorted_vec().into_iter().map(|(_, _, key)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use forebay_protocol::FileIdentity;

    use super::*;

    /// Candidates of 10 bytes by their orders of admission and use; the indices of the chunks that go.
    fn pick(policy: Policy, orders: &[(u64, u64)], bytes: u64) -> Vec<u32> {
        let candidates = orders.iter().map(|(order, used)| Candidate {
            key: ChunkKey { file: FileIdentity(1), index: *order as u32 },
            order: *order,
            used: *used,
            bytes: 10,
        });
        policy.victims(candidates, bytes).into_iter().map(|key| key.index).collect()
    }

    #[test]
    fn each_policy_gives_up_its_first_and_no_more_than_needed() {
        let orders = [(3, 13), (1, 15), (5, 11), (2, 12), (4, 14)];
        assert_eq!(pick(Policy::Hold, &orders, 20), [5, 4]);
        assert_eq!(pick(Policy::Hold, &orders, 21), [5, 4, 3]);
        assert_eq!(pick(Policy::Lru, &orders, 20), [5, 2]);
        assert_eq!(pick(Policy::Lru, &orders, 21), [5, 2, 3]);
        for policy in [Policy::Hold, Policy::Lru] {
            assert_eq!(pick(policy, &orders, 100).len(), orders.len());
            assert!(pick(policy, &orders, 0).is_empty());
            let many: Vec<_> = (0..MAX_VICTIMS as u64 + 10).map(|n| (n, n)).collect();
            assert_eq!(pick(policy, &many, u64::MAX).len(), MAX_VICTIMS);
        }
    }
}
