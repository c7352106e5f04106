//! The memory that one client works in, or several share: the budget, and who gives back when it is short.

use std::sync::Arc;

use crate::{budget::Budget, reclaim::Holders};

/// The smallest memory budget that a client works with: a request of a reader, one more, and what is read ahead.
pub const MIN_BUDGET: usize = 4 << 20;

/// Memory for file contents: in flight, read ahead, and returned to callers. Clones are the same memory, so the clients
/// that they are given to keep within it together, and idle read-ahead of one makes room for the reads of another.
#[derive(Clone)]
pub struct MemoryBudget {
    pub(crate) budget: Budget,
    pub(crate) holders: Arc<Holders>,
}

/// How much of it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// The budget, in bytes.
    pub total: u64,
    /// Bytes of it in use.
    pub used: u64,
    /// The most that was ever in use.
    pub peak: u64,
    /// Reads that had to wait for memory.
    pub waits: u64,
}

impl MemoryBudget {
    /// So many bytes, but at least [`MIN_BUDGET`].
    pub fn new(bytes: usize) -> Self {
        Self { budget: Budget::new(bytes.max(MIN_BUDGET)), holders: Arc::default() }
    }

    /// What of it is in use.
    pub fn usage(&self) -> MemoryUsage {
        let usage = self.budget.usage();
        MemoryUsage { total: usage.total as u64, used: usage.used as u64, peak: usage.peak as u64, waits: usage.waits }
    }
}

impl std::fmt::Debug for MemoryBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.usage().fmt(f)
    }
}
