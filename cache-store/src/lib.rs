//! The chunk store of a cache worker.
//!
//! A chunk (64 MiB of a file version, or all of a small file) is one sparse file: its plain bytes, then a trailer with
//! whose bytes they are, which blocks are valid, and a checksum for each (see [`trailer`]). The store knows every chunk
//! in memory and, in batches, in an index on disk; it admits by quota and watermark, evicts off the read path, and
//! hands out open files for `sendfile`. It never fetches: it is told bytes, and asked for them.
//!
//! It is a cache: every failure of the disk ends in "not held". What it returns is right or nothing: blocks that a
//! former process wrote are verified before their first use, and whoever receives a block can check it.
//!
//! Synchronous, and of moderate cost: no call waits for a lock that is held over another chunk's I/O, except for the
//! 1 in 1,024 that share a name stripe. [`ChunkStore::pin`] waits for a commit.
//!
//! What rots while the process that wrote it lives is not looked for: whoever receives it finds it out, and has it
//! checked by [`Chunk::verify_again`].

mod blocks;
mod catalog;
mod chunk;
mod disk;
mod error;
mod evictor;
mod expiry;
mod files;
mod index;
mod ledger;
mod policy;
mod root;
mod shared;
mod store;
mod superblock;
mod sweep;
#[cfg(test)]
mod tests;
pub mod trailer;

pub use blocks::{BlockSet, Run};
pub use chunk::{Chunk, ChunkSpec, Extent};
pub use error::{OpenError, PinError, PinRefused, ReadError, Refusal, WriteError};
pub use ledger::DatasetPolicy;
pub use policy::Policy;
pub use shared::Tuning;
pub use store::{ChunkStore, DatasetUsage, Held, Removed, StoreOptions, Totals};
