//! What a client counts. Counters only grow; whoever exports them decides on names.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a whole client.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes_from_workers: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) blocks_requested: AtomicU64,
    pub(crate) hit_blocks: AtomicU64,
    pub(crate) miss_blocks: AtomicU64,
    pub(crate) checksum_failures: AtomicU64,
    pub(crate) failovers: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) read_ahead_bytes: AtomicU64,
    pub(crate) read_ahead_used_bytes: AtomicU64,
    pub(crate) read_ahead_wasted_bytes: AtomicU64,
    pub(crate) starved: AtomicU64,
    pub(crate) metadata_calls: AtomicU64,
}

/// A snapshot of what a client counted since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientMetrics {
    /// Bytes of file contents that arrived and passed their checks.
    pub bytes_from_workers: u64,
    /// Reads sent to workers, those repeated elsewhere included.
    pub requests: u64,
    /// Blocks asked for by them.
    pub blocks_requested: u64,
    /// Blocks that workers held already.
    pub hit_blocks: u64,
    /// Blocks that workers had to fetch.
    pub miss_blocks: u64,
    /// Blocks or frames that did not match what was asked: flipped, swapped, missing or repeated. Never delivered.
    pub checksum_failures: u64,
    /// Times that a request went from one worker to the next.
    pub failovers: u64,
    /// Times that all workers were tried in vain and a request waited for the next round.
    pub retries: u64,
    /// Bytes asked for ahead of readers.
    pub read_ahead_bytes: u64,
    /// Of these, bytes that were then read.
    pub read_ahead_used_bytes: u64,
    /// Of these, bytes that were thrown away unread.
    pub read_ahead_wasted_bytes: u64,
    /// Requests that gave their memory back while a source stalled, and were made again later.
    pub starved: u64,
    /// Look-ups and pages of listings asked of workers.
    pub metadata_calls: u64,
    /// The memory budget, in bytes.
    pub budget_total: u64,
    /// Bytes of it in use: in flight, read ahead, or held by callers.
    pub budget_used: u64,
    /// The most that was ever in use.
    pub budget_peak: u64,
    /// Reads that had to wait for memory.
    pub budget_waits: u64,
    /// Epoch of the worker table in use.
    pub table_epoch: u64,
    /// Highest epoch that anybody mentioned.
    pub highest_epoch: u64,
    /// By worker, in the order of the table.
    pub members: Vec<MemberMetrics>,
}

/// What a client counted of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberMetrics {
    /// Its name.
    pub name: String,
    /// Whether it is used; else it is avoided and probed.
    pub up: bool,
    /// How often it was found dead.
    pub downs: u64,
    /// Why, the last time; "" if never.
    pub last_error: String,
    /// Reads sent to it.
    pub requests: u64,
    /// Verified bytes from it.
    pub bytes: u64,
    /// Requests that went on to another worker.
    pub failovers: u64,
    /// Blocks or frames from it that did not match what was asked.
    pub checksum_failures: u64,
}

pub(crate) fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
