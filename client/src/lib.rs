//! Placement-aware access to cache workers.
//!
//! A [`Client`] knows the workers of one runtime from its worker table and spreads what it asks over them: metadata of
//! a directory to the directory's owner, blocks of a chunk to the chunk's owner, both with fail-over along the order of
//! preference that [`forebay_protocol::placement`] gives.
//!
//! What holds for every call:
//!
//! - it ends by the deadline of [`ClientConfig`], whatever the workers do;
//! - bytes that are returned were verified block by block; bytes that fail are counted and fetched from another worker;
//! - every buffer of file contents is taken from one memory budget, and goes back to it when its last [`bytes::Bytes`]
//!   is dropped: callers drop, or copy, what they keep for long;
//! - dropping its future cancels what it asked of workers, unless somebody else waits for the same bytes.
//!
//! | module | does |
//! |---|---|
//! | `transport` | TCP and the handshake; gRPC channels over it |
//! | `discovery` | the worker table by way of a service's name |
//! | `health`, `members`, `failover` | which workers exist, which of them answer, and whom to ask next |
//! | `probe` | asks workers how they are: for people, and for datasets known by name |
//! | `connection`, `pool` | frames of many requests over one connection; connections by worker and lane |
//! | `memory`, `budget`, `reclaim` | the memory budget, and who gives back when it is short |
//! | `fetch` | a range of blocks from whoever has it, verified |
//! | `streams`, `segment`, `reader` | sequential streams, what is read ahead for them, and reads |
//! | `dataset`, `watch`, `walk` | names: look-ups, listings, changes, trees |

mod budget;
mod buffers;
mod client;
mod connection;
mod dataset;
mod discovery;
mod error;
mod failover;
mod fetch;
mod health;
mod hot;
mod members;
mod memory;
mod metrics;
mod pool;
mod probe;
mod reader;
mod reclaim;
mod segment;
mod streams;
pub mod transport;
mod walk;
mod watch;

pub use client::{Client, ClientConfig};
pub use dataset::{DatasetClient, Entry, EntryKind, Inspection, ListPage, MAX_PAGE};
pub use error::ClientError;
pub use forebay_protocol::worker::{control_client::ControlClient, metadata_client::MetadataClient};
pub use memory::{MIN_BUDGET, MemoryBudget, MemoryUsage};
pub use metrics::{ClientMetrics, MemberMetrics};
pub use probe::{Probe, ProbedMember};
pub use reader::{Ahead, FileReader};
pub use walk::{Walk, WalkEntry};
pub use watch::{Event, Watch};
