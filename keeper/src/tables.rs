//! Tables in shared memory: what a daemon needs to go on where another one stopped.
//!
//! The keeper creates them (memfds), a daemon attaches to them; one daemon writes at a time. Every change is one
//! Release store after everything that it publishes, so a writer may be killed between any two instructions.
//!
//! - [`NodeTable`]: node id to (parent, name, kind, file version), and back;
//! - [`OpenTable`]: open handles, and how each inode is open;
//! - [`Counters`].

mod counters;
mod map;
mod nodes;
mod opens;

pub use counters::{Counter, CounterSnapshot, Counters};
pub use nodes::{DEFAULT_NODE_ARENA, FIRST_ID, Node, NodeKind, NodeStats, NodeTable, ROOT_ID};
pub use opens::{DEFAULT_MAX_HANDLES, OpenHandle, OpenMode, OpenStats, OpenTable, RESEND_BIT, Released, Shape};

/// A table has reached its maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {0} table is full")]
pub struct TableFull(pub &'static str);

/// Why a descriptor is no table of ours.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A system call failed, or it is no sealed memfd.
    #[error("a shared table cannot be mapped")]
    Map(#[from] std::io::Error),
    /// Its header does not describe a table of this version.
    #[error("a shared table has a bad header: {0}")]
    Header(&'static str),
}
