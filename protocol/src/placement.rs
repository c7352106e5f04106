//! Weighted rendezvous hashing (HRW): which workers own a key, best first.
//!
//! The score of a member is `weight / -ln(u)` with `u` uniform in (0, 1) from a hash of (key, member name), so shares
//! follow weights, a change of membership moves only the keys it must, and the keys of a lost worker spread evenly.
//! Source: Thaler and Ravishankar 1998; weights as in Schindelhauer and Schomaker 2005.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::table::{Member, MemberState, WorkerTable};

/// A table prepared for look-ups: member names are hashed once.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    members: Vec<Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    index: usize,
    seed: u64,
    weight: f64,
}

impl Placement {
    /// Members that are `Serving`; draining ones own nothing.
    pub fn new(table: &WorkerTable) -> Self {
        Self::of(table, |member| member.state == MemberState::Serving)
    }

    /// All members, as if the draining ones still served: the order says who owned a key before they drained.
    pub fn with_draining(table: &WorkerTable) -> Self {
        Self::of(table, |_| true)
    }

    fn of(table: &WorkerTable, counts: impl Fn(&Member) -> bool) -> Self {
        let members = table
            .members
            .iter()
            .enumerate()
            .filter(|(_, member)| counts(member))
            .map(|(index, member)| Slot {
                index,
                seed: xxh3_64(member.name.as_bytes()),
                weight: f64::from(member.weight.clamp(1, 1000)),
            })
            .collect();
        Self { members }
    }

    /// Indexes into the table's members in the order of preference for `key`: the owner first, then whoever serves when
    /// it is away. At most `limit`.
    pub fn order(&self, key: u64, limit: usize) -> Vec<usize> {
        let mut scored: Vec<(f64, u64, usize)> =
            self.members.iter().map(|slot| (score(key, slot), slot.seed, slot.index)).collect();
        // Scores are finite and never NaN; ties are broken by the name's hash so that all agree.
        scored.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        scored.truncate(limit);
        scored.into_iter().map(|(_, _, index)| index).collect()
    }

    /// The owner's index into the table's members; `None` when nobody serves.
    pub fn owner(&self, key: u64) -> Option<usize> {
        self.members
            .iter()
            .map(|slot| (score(key, slot), slot.seed, slot.index))
            .max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
            .map(|(_, _, index)| index)
    }
}

fn score(key: u64, slot: &Slot) -> f64 {
    let hash = xxh3_64_with_seed(&key.to_le_bytes(), slot.seed);
    // 53 random bits, moved off 0 and below 1.
    let uniform = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    slot.weight / -uniform.ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(weights: &[u32]) -> WorkerTable {
        WorkerTable {
            epoch: 1,
            members: weights
                .iter()
                .enumerate()
                .map(|(i, weight)| Member {
                    name: format!("worker-{i}"),
                    address: String::new(),
                    weight: *weight,
                    state: MemberState::Serving,
                })
                .collect(),
        }
    }

    #[test]
    fn shares_follow_weights() {
        let placement = Placement::new(&table(&[1, 2, 1]));
        let mut counts = [0u32; 3];
        for key in 0..40_000u64 {
            counts[placement.owner(xxh3_64(&key.to_le_bytes())).unwrap()] += 1;
        }
        for (count, share) in counts.iter().zip([0.25, 0.5, 0.25]) {
            let measured = f64::from(*count) / 40_000.0;
            assert!((measured - share).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn draining_owns_nothing() {
        let mut table = table(&[1, 1]);
        table.members[0].state = MemberState::Draining;
        let placement = Placement::new(&table);
        assert!((0..1000).all(|key| placement.owner(key) == Some(1)));
        let before = Placement::with_draining(&table);
        assert!((0..1000).any(|key| before.owner(key) == Some(0)));
    }

    proptest! {
        /// Removing a member moves only that member's keys, and each goes to the next in its old order.
        #[test]
        fn removal_moves_only_its_own(key: u64, n in 2usize..40, removed in 0usize..40) {
            let removed = removed % n;
            let full = table(&vec![1; n]);
            let mut fewer = full.clone();
            fewer.members.remove(removed);
            let order: Vec<String> =
                Placement::new(&full).order(key, n).into_iter().map(|i| full.members[i].name.clone()).collect();
            let rest: Vec<String> =
                Placement::new(&fewer).order(key, n).into_iter().map(|i| fewer.members[i].name.clone()).collect();
            let expected: Vec<String> =
                order.iter().filter(|name| **name != full.members[removed].name).cloned().collect();
            prop_assert_eq!(rest, expected);
            prop_assert_eq!(Placement::new(&full).owner(key), Placement::new(&full).order(key, 1).first().copied());
        }
    }
}
