//! What can go wrong, by what the caller can do.

use std::io;
use std::path::PathBuf;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The options contradict themselves: correct them.
    #[error("cache store options: {0}")]
    Options(String),
    /// Another process has the directory: stop it, or choose another directory.
    #[error("cache directory {} is in use by another process", .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The directory holds something that no cache store wrote: choose another one. Nothing was touched.
    #[error("{} is not empty and no cache of forebay; choose another directory, or empty it", .path.display())]
    NotACache {
        /// The directory.
        path: PathBuf,
    },
    /// The file system refuses.
    #[error("cannot {action} cache directory {}: {source}", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Why something is not admitted. Stream it without storing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The dataset's quota.
    #[error("quota: {wanted} bytes wanted, {available} of {quota} free")]
    Quota {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left.
        available: u64,
        /// The quota.
        quota: u64,
    },
    /// The tier's high watermark.
    #[error("watermark: {wanted} bytes wanted, {available} of {limit} free")]
    Watermark {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left.
        available: u64,
        /// The high watermark, in bytes.
        limit: u64,
    },
    /// More would be pinned than can be guaranteed.
    #[error(transparent)]
    Pin(#[from] PinRefused),
    /// The dataset was not announced by `set_dataset`, or was forgotten.
    #[error("the dataset is not served")]
    Dataset,
    /// The disk: nearly full, failing, or its directory gone. Retried after a pause.
    #[error("{0}")]
    Disk(String),
    /// The store is closed.
    #[error("the cache store is closed")]
    Closed,
}

/// Why a pin is refused: a pin is a guarantee, so what is pinned must fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} bytes cannot be pinned: {available} of the {limit} of {limited_by} are free for pins")]
pub struct PinRefused {
    /// Bytes asked for.
    pub wanted: u64,
    /// Bytes left for pins.
    pub available: u64,
    /// Bytes that may be pinned in all.
    pub limit: u64,
    /// Whose limit: `"the dataset's quota"` or `"the cache's low watermark"`.
    pub limited_by: &'static str,
}

/// Why a chunk is not pinned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// It is not in the cache: write a block of it first, or ask for it with `create`.
    #[error("the chunk is not in the cache")]
    Absent,
    /// It does not fit, or no room can be made for it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The index could not be written, so the pin would not survive a restart; it was taken back.
    #[error("the pin could not be made durable: {0}")]
    NotDurable(String),
}

/// Why blocks were not stored. The bytes are as good as before: send them on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Not whole blocks of this chunk; a defect of the caller.
    #[error("write with a bad {0}")]
    Shape(&'static str),
    /// Not admitted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The disk failed; `problem` says so.
    #[error("{0}")]
    Disk(String),
    /// The chunk was evicted or replaced meanwhile: ask the store for it again.
    #[error("the chunk was evicted or replaced")]
    Gone,
}

/// Why blocks were not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Not all of them are held.
    #[error("the blocks are not in the cache")]
    NotHeld,
    /// At least one failed its checksum or could not be read, and was dropped: fetch what is no longer held.
    #[error("blocks in the cache were damaged and have been dropped")]
    Corrupt,
}
