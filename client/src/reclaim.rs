//! Who gives memory back when a reader's own request must wait for it: readers that hold blocks which nobody took yet.
//!
//! Those that were not read for a second give everything first, the longest idle first; then the active ones give what
//! is furthest ahead, one segment in turn.
//!
//! Lock order: the list's lock is never held while a reader's is taken.

use std::{
    collections::HashMap,
    sync::{
        Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{budget::Budget, reader::Shared};

const IDLE: Duration = Duration::from_secs(1);

/// The readers that hold segments.
#[derive(Default)]
pub(crate) struct Holders {
    next: AtomicU64,
    list: Mutex<HashMap<u64, Weak<Shared>>>,
}

impl Holders {
    /// A number for a new reader.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn add(&self, number: u64, reader: Weak<Shared>) {
        self.list.lock().insert(number, reader);
    }

    pub(crate) fn remove(&self, number: u64) {
        self.list.lock().remove(&number);
    }

    /// Frees what the first who waits needs, as far as somebody can spare it.
    pub(crate) fn relieve(&self, budget: &Budget) {
        let wanted = budget.shortage();
        if wanted == 0 {
            return;
        }
        let freed = self.shed_idle(wanted);
        if freed < wanted {
            self.shed_active(wanted - freed);
        }
    }

    /// Takes from readers that are idle; gives what was freed.
    pub(crate) fn shed_idle(&self, wanted: usize) -> usize {
        let now = Instant::now();
        let mut idle: Vec<_> = self
            .readers()
            .into_iter()
            .map(|reader| (now.saturating_duration_since(reader.touched()), reader))
            .filter(|(idle, _)| *idle >= IDLE)
            .collect();
        idle.sort_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        let mut freed = 0;
        for (_, reader) in idle {
            while freed < wanted {
                match reader.shed() {
                    0 => break,
                    bytes => freed += bytes,
                }
            }
        }
        freed
    }

    fn shed_active(&self, wanted: usize) {
        let mut readers = self.readers();
        let mut freed = 0;
        while freed < wanted && !readers.is_empty() {
            readers.retain(|reader| {
                let bytes = if freed < wanted { reader.shed() } else { 0 };
                freed += bytes;
                bytes > 0
            });
        }
    }

    fn readers(&self) -> Vec<std::sync::Arc<Shared>> {
        self.list.lock().values().filter_map(Weak::upgrade).collect()
    }
}
