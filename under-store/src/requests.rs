//! Counters of what was asked of a store.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::{Requests, StoreError, patience::Failure};

/// Counters; all are monotonic, and no order between them is promised.
#[derive(Debug, Default)]
pub(crate) struct RequestCounters {
    gets: AtomicU64,
    lists: AtomicU64,
    heads: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    problem: Mutex<Option<String>>,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Get,
    List,
    Head,
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
    pub(crate) fn failed(&self, failure: &Failure) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        match &failure.error {
            StoreError::Unavailable(why) | StoreError::PermissionDenied(why) => {
                *self.problem.lock() = Some(why.clone())
            }
            StoreError::NotFound(_) | StoreError::VersionMismatch(_) | StoreError::Invalid(_) => {}
        }
    }

    /// A request was answered as it should be.
    pub(crate) fn answered(&self) {
        self.problem.lock().take();
    }

    /// Why the last request failed, if it did.
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Requests {
        let Self { gets, lists, heads, errors, bytes, problem: _ } = self;
        Requests {
            gets: gets.load(Ordering::Relaxed),
            lists: lists.load(Ordering::Relaxed),
            heads: heads.load(Ordering::Relaxed),
            errors: errors.load(Ordering::Relaxed),
            bytes: bytes.load(Ordering::Relaxed),
        }
    }
}
