//! Chunks that nobody used for a while go.
//!
//! The order of use is a count, not a time: so the count is noted now and then, and a chunk whose last use is below what it
//! was a lifetime ago is over. A lifetime has [`NOTES`] notes, so a chunk goes at most a part of that later. After a
//! restart nothing is noted yet: every chunk has a lifetime from then on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::catalog::Name;
use crate::chunk::Chunk;
use crate::evictor::{Outcome, Why};
use crate::shared::Shared;

/// Notes of a lifetime.
const NOTES: u32 = 32;

/// What the count of uses was at which time, the oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ages {
    notes: VecDeque<(Instant, u64)>,
    /// All chunks that were used last before this count are gone, or could not go.
    done: u64,
}

impl Ages {
    /// Notes the count as it is `now`; gives the one below which chunks are over, when it is a new one.
    fn note(&mut self, now: Instant, count: u64, lifetime: Duration) -> Option<u64> {
        if self.notes.back().is_none_or(|(at, _)| now.duration_since(*at) >= lifetime / NOTES) {
            self.notes.push_back((now, count));
        }
        // The newest one that is old enough comes first.
        let over = |note: Option<&(Instant, u64)>| note.is_some_and(|(at, _)| now.duration_since(*at) >= lifetime);
        while over(self.notes.get(1)) {
            self.notes.pop_front();
        }
        let first = *self.notes.front().filter(|note| over(Some(note)))?;
        (first.1 > self.done).then(|| {
            self.done = first.1;
            first.1
        })
    }
}

impl Shared {
    /// Drops what nobody used for the lifetime of its dataset, but for what is pinned or in use.
    pub(crate) fn expire(&self, now: Instant) {
        let count = self.catalog.uses();
        let over: BTreeMap<u32, u64> = self.catalog.ledger(|ledger| {
            let accounts = (0..).zip(&mut ledger.accounts);
            accounts
                .filter_map(|(slot, account)| {
                    let Some(lifetime) = account.terms.ttl else {
                        account.ages = Ages::default();
                        return None;
                    };
                    Some((slot, account.ages.note(now, count, lifetime)?))
                })
                .collect()
        });
        if over.is_empty() {
            return;
        }
        let idle = |name: Name, chunk: Option<&Arc<Chunk>>| !chunk.is_some_and(|chunk| self.in_use(name, chunk));
        let old: Vec<Name> = self
            .catalog
            .candidates(|entry| over.contains_key(&entry.slot), idle)
            .filter(|candidate| over.get(&candidate.slot).is_some_and(|count| candidate.used < *count))
            .map(|candidate| candidate.key.into())
            .collect();
        let gone = old
            .into_iter()
            .filter(|name| !self.stopping() && matches!(self.evict(*name, Why::Expired), Outcome::Gone(_)));
        let gone = gone.count();
        if gone > 0 {
            tracing::debug!(chunks = gone, "nobody used them for their lifetime: they are dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_before_a_lifetime_ago_is_over() {
        let (begin, lifetime) = (Instant::now(), Duration::from_secs(320));
        let mut ages = Ages::default();
        let mut note = |second: u64, count| ages.note(begin + Duration::from_secs(second), count, lifetime);
        assert_eq!((note(0, 5), note(5, 6), note(10, 7), note(319, 90)), (None, None, None, None));
        assert_eq!(note(320, 91), Some(5));
        assert_eq!((note(321, 92), note(329, 93)), (None, None));
        assert_eq!(note(330, 94), Some(7), "the note of the fifth second was too soon after the first");
        assert_eq!(note(5000, 95), Some(93));
        assert_eq!(note(6000, 95), Some(95));
        assert_eq!(note(7000, 95), None, "nothing was used since");
    }

    #[test]
    fn notes_are_bounded() {
        let (begin, lifetime) = (Instant::now(), Duration::from_secs(320));
        let mut ages = Ages::default();
        for second in 0..10_000 {
            ages.note(begin + Duration::from_secs(second), second, lifetime);
        }
        assert!(ages.notes.len() <= NOTES as usize + 2, "{}", ages.notes.len());
    }
}
