//! A dataset's metadata: its namespace over the sources, the index of its directories, and what changed in them.
//!
//! - [`namespace`]: which source answers for a path; mount points as directories;
//! - [`index`]: the database of all datasets of a worker: opened, rebuilt when damaged, flushed;
//! - [`dataset`]: one dataset: lookups, pages, scans of directories, generations, pruning, rechecks, other sources;
//! - [`record`]: what stands in the database, byte by byte;
//! - [`watch`]: the numbered invalidations;
//! - [`scan`]: the walk of a whole tree through the owners of its directories.
//!
//! Invariants:
//! - A listing is complete or an error, never silently short.
//! - An entry is given out only when the listing has passed its name + `/`: a name that is both file and directory is a
//!   directory, always.
//! - Nothing listed under an older generation is given out once a newer one is known. While a directory is listed again,
//!   what the new listing has passed is answered, and the rest waits.
//! - The database is a cache of the sources: every loss (a crash, damage) costs listings, never a wrong answer.
//!
//! Lock order: the table of running listings, then nothing; the log of invalidations, then nothing. No lock is held over
//! an await.

pub mod dataset;
pub mod index;
pub mod namespace;
pub mod record;
pub mod scan;
pub mod watch;

mod apply;
mod changes;
mod error;
mod listing;
mod prune;
mod query;
mod recheck;
mod sources;

#[cfg(test)]
mod memory_store;
#[cfg(test)]
mod tests;

pub use dataset::{DatasetIndex, DatasetOptions, DatasetStats, Entry, EntryKind, ListPage};
pub use error::{MetadataError, OpenError};
pub use index::{Index, IndexOptions};
pub use namespace::{Namespace, NamespaceError, Source};
pub use scan::{DirectoryScan, ScanDirectories, ScanHandle, ScanOptions, ScanProgress, ScanState, Scanner};
pub use watch::{Invalidation, InvalidationKind};
