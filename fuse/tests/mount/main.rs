//! Real mounts: a keeper in this process, daemons as child processes (this binary again), trees in memory.
//!
//! The tree of every daemon is made from one script, so that a successor has the tree of its predecessor. Without
//! `/dev/fuse` there is nothing to test here.

// clippy.toml allows them in test functions; here helpers are test code, too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod changes;
mod passthrough;
mod reading;
mod rig;
mod takeover;
