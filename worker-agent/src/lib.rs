//! The agent of a cache worker in a pod: it watches the Kubernetes API and writes the two files that the worker reads,
//! `table.json` and `datasets.json`.
//!
//! - `watch`: the Datasets of the namespace and the one CacheRuntime, in memory;
//! - `secrets`: the credentials that the Datasets name, read by name, never listed;
//! - `plan`: from these to the contents of the files, pure;
//! - `files`: replacing them whole, readable by their owner only.
//!
//! Invariants: a file is written only from what is complete (both watches have begun, every Secret was asked for), so a
//! worker never forgets a Dataset because the API server was slow; while the API server is away the files stay as they
//! are, and a container that is started again serves what they say.
//!
//! Not handled here: what changes a worker's options (capacity, watermarks): that is a roll-out of the StatefulSet.

mod agent;
mod files;
mod plan;
mod secrets;
mod watch;

pub use agent::{AgentOptions, run, run_with};
pub use plan::{policy, replicas, request_budget, shape};

/// The worker table, below the state directory.
pub const TABLE: &str = "table.json";
/// The datasets, below the state directory.
pub const DATASETS: &str = "datasets.json";
