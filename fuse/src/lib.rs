//! A dataset as a read-only file system: the logic, its `fuser` adapter, and the daemon that serves mounts.
//!
//! | module | knows | does |
//! |---|---|---|
//! | [`fs`] | [`tree`], the keeper's tables | requests: plain types in, plain types or an [`errno`] out |
//! | [`tree`] | nobody | the seam to names and bytes; [`remote`] (workers) and [`memory`] are its implementations |
//! | [`invalidation`], [`notices`] | [`fs`] | changes at the source to what the kernel must forget |
//! | [`node_cache`], `local` | the keeper's open table | files on this node: large ones the kernel reads itself |
//! | [`adapter`] | `fuser`, [`fs`] | translates, counts, decides where a request runs |
//! | [`session`] | `fuser`, [`adapter`] | attaches to a descriptor that is already past INIT |
//! | [`daemon`] | all, the keeper's hand-over | stands by, attaches, detaches |
//!
//! What programs see is fixed in `docs/semantics.md`; what every module must keep in `docs/architecture.md`, "The mount
//! that survives".

pub mod adapter;
pub mod config;
pub mod daemon;
pub mod errno;
pub mod fs;
pub mod invalidation;
mod limit;
mod local;
pub mod memory;
pub mod metrics;
pub mod node_cache;
pub mod notices;
pub mod remote;
pub mod session;
pub mod table_file;
mod throttle;
pub mod tree;

pub use config::{DatasetRef, KeySource, TableSource, VolumeConfig};
pub use daemon::{DaemonError, DaemonOptions};
pub use limit::default_memory_budget;
pub use node_cache::NodeCacheOptions;
