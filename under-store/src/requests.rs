//! Counters of what was asked of a store, and what is wrong with it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{Requests, StoreError, patience::Failure};

/// A failed listing says nothing about reads, and the other way round: credentials may allow only one of them. So an
/// answer to the one ends the problem of the other only when nothing of that has failed for so long; a call that tries
/// again pauses for 5 s at most.
const FRESH: Duration = Duration::from_secs(5);

/// Counters; all are monotonic, and no order between them is promised.
#[derive(Debug, Default)]
pub(crate) struct RequestCounters {
    gets: AtomicU64,
    lists: AtomicU64,
    heads: AtomicU64,
    errors: AtomicU64,
    throttled: AtomicU64,
    bytes: AtomicU64,
    problems: Mutex<Problems>,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Bytes of an object.
    Get,
    /// Names of objects.
    List,
    /// An object's size and version.
    Head,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Get, Self::List, Self::Head];
}

/// Why the last request of a kind failed, and when.
type Problem = Option<(StoreError, Instant)>;

/// Why the last requests failed.
#[derive(Debug, Default)]
struct Problems {
    listing: Problem,
    reading: Problem,
}

impl Problems {
    /// The problem of this verb, and that of the others.
    fn of(&mut self, verb: Verb) -> (&mut Problem, &mut Problem) {
        match verb {
            Verb::List => (&mut self.listing, &mut self.reading),
            Verb::Get | Verb::Head => (&mut self.reading, &mut self.listing),
        }
    }
}

impl RequestCounters {
    pub(crate) fn sent(&self, verb: Verb) {
        let counter = match verb {
            Verb::Get => &self.gets,
            Verb::List => &self.lists,
            Verb::Head => &self.heads,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A request failed. What only says that an object is gone or changed is no problem of the store.
    pub(crate) fn failed(&self, verb: Verb, failure: &Failure) {
        match &failure.error {
            StoreError::NotFound(_) | StoreError::VersionMismatch(_) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
            }
            StoreError::Unavailable(_) | StoreError::PermissionDenied(_) | StoreError::Invalid(_) => {
                self.broken(verb, failure);
            }
        }
    }

    /// A request failed, and not because of what it asked for: there is no bucket or root directory, for one.
    pub(crate) fn broken(&self, verb: Verb, failure: &Failure) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        *self.problems.lock().of(verb).0 = Some((failure.error.clone(), Instant::now()));
    }

    /// A request was answered as it should be.
    pub(crate) fn answered(&self, verb: Verb) {
        let mut problems = self.problems.lock();
        let (own, other) = problems.of(verb);
        own.take();
        other.take_if(|(_, since)| since.elapsed() >= FRESH);
    }

    /// Why the last request failed, if it did.
    pub(crate) fn problem(&self) -> Option<StoreError> {
        let Problems { listing, reading } = &*self.problems.lock();
        listing.as_ref().or(reading.as_ref()).map(|(error, _)| error.clone())
    }

    /// The store turned a request away because it gets too many.
    pub(crate) fn turned_away(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Requests {
        let Self { gets, lists, heads, errors, throttled, bytes, problems: _ } = self;
        Requests {
            gets: gets.load(Ordering::Relaxed),
            lists: lists.load(Ordering::Relaxed),
            heads: heads.load(Ordering::Relaxed),
            errors: errors.load(Ordering::Relaxed),
            throttled: throttled.load(Ordering::Relaxed),
            bytes: bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied() -> Failure {
        Failure::fatal(StoreError::PermissionDenied("no".to_owned()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_problem_stays_until_its_kind_of_request_is_answered_or_no_longer_fails() {
        let requests = RequestCounters::default();
        requests.failed(Verb::Get, &Failure::fatal(StoreError::NotFound("key".to_owned())));
        assert!(requests.problem().is_none());
        requests.failed(Verb::Get, &denied());
        requests.answered(Verb::List);
        assert!(matches!(requests.problem(), Some(StoreError::PermissionDenied(_))));
        requests.answered(Verb::Head);
        assert!(requests.problem().is_none());

        requests.failed(Verb::Get, &denied());
        tokio::time::sleep(FRESH).await;
        assert!(requests.problem().is_some());
        requests.answered(Verb::List);
        assert!(requests.problem().is_none(), "nobody reads any more, and the store answers");

        requests.broken(Verb::List, &Failure::fatal(StoreError::NotFound("bucket".to_owned())));
        requests.answered(Verb::Get);
        assert!(matches!(requests.problem(), Some(StoreError::NotFound(_))));
        assert_eq!(requests.snapshot().errors, 4);
    }
}
