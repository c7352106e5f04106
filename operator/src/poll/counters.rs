//! Sums of counters that begin again with every worker.

use std::collections::HashMap;

/// Bytes that workers count of a Dataset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Readers found them.
    pub hits: u64,
    /// They had to be fetched.
    pub misses: u64,
    /// Dropped to make room.
    pub evicted: u64,
    /// Dropped because nobody used them.
    pub expired: u64,
}

impl Counts {
    fn with(self, other: Self, each: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            hits: each(self.hits, other.hits),
            misses: each(self.misses, other.misses),
            evicted: each(self.evicted, other.evicted),
            expired: each(self.expired, other.expired),
        }
    }

    fn add(self, other: Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    fn max(self, other: Self) -> Self {
        self.with(other, u64::max)
    }

    /// What came since; `None` when something is less than it was.
    fn since(self, before: Self) -> Option<Self> {
        (self.max(before) == self).then(|| self.with(before, u64::saturating_sub))
    }
}

/// The sums of one Dataset over its workers, which never go down.
#[derive(Debug, Default)]
pub struct Counters {
    total: Counts,
    /// By worker: its incarnation, and what it said last.
    workers: HashMap<String, (u64, Counts)>,
}

impl Counters {
    /// Goes on from what was published before.
    pub fn new(published: Counts) -> Self {
        Self { total: published, workers: HashMap::new() }
    }

    /// Takes what a worker says. `counted`: the worker is older than this process, so what it counted until now is in
    /// what was published, but for the last seconds.
    pub fn say(&mut self, worker: &str, incarnation: u64, said: Counts, counted: bool) {
        let grown = match self.workers.get(worker) {
            None if counted => Counts::default(),
            None => said,
            // Or it began again.
            Some((same, last)) => {
                Some(incarnation).filter(|now| now == same).and_then(|_| said.since(*last)).unwrap_or(said)
            }
        };
        self.total = self.total.add(grown);
        self.workers.insert(worker.to_owned(), (incarnation, said));
    }

    /// The sums. At least what the workers say now: the last seconds before this process are in that.
    pub fn total(&mut self) -> Counts {
        let said = self.workers.values().fold(Counts::default(), |sum, (_, said)| sum.add(*said));
        self.total = self.total.max(said);
        self.total
    }

    /// Forgets workers that are no more; what they counted stays in the sums.
    pub fn retain(&mut self, is_member: impl Fn(&str) -> bool) {
        self.workers.retain(|worker, _| is_member(worker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(hits: u64, misses: u64) -> Counts {
        Counts { hits, misses, evicted: hits, expired: misses }
    }

    #[test]
    fn restarts_of_workers_do_not_take_away() {
        let mut counters = Counters::new(Counts::default());
        counters.say("a", 1, reads(10, 5), false);
        counters.say("b", 1, reads(1, 1), false);
        assert_eq!(counters.total(), reads(11, 6));
        counters.say("a", 1, reads(12, 5), false);
        assert_eq!(counters.total(), reads(13, 6));
        // Another incarnation begins at zero, and what it says is new.
        counters.say("a", 2, reads(3, 0), false);
        assert_eq!(counters.total(), reads(16, 6));
        // So does a dataset that a worker began anew.
        counters.say("a", 2, reads(1, 0), false);
        assert_eq!(counters.total(), reads(17, 6));
    }

    #[test]
    fn another_operator_goes_on_from_what_was_published() {
        let mut counters = Counters::new(reads(100, 10));
        // Counted while nobody looked: 4 hits. They are seen only where the sum of the workers exceeds what was published.
        counters.say("a", 7, reads(104, 10), true);
        assert_eq!(counters.total(), reads(104, 10));
        counters.say("a", 7, reads(105, 10), true);
        assert_eq!(counters.total(), reads(105, 10));
        // A worker that began after this operator brings only what is new.
        counters.say("b", 1, reads(5, 5), false);
        assert_eq!(counters.total(), reads(110, 15));
    }

    #[test]
    fn workers_that_are_gone_stay_in_the_sums() {
        let mut counters = Counters::new(Counts::default());
        counters.say("a", 1, reads(10, 5), false);
        counters.retain(|_| false);
        assert_eq!(counters.total(), reads(10, 5));
        counters.say("a", 2, reads(1, 0), false);
        assert_eq!(counters.total(), reads(11, 5));
    }
}
