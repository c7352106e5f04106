//! The real driver process, driven over its socket as the kubelet does, with its real keeper, real mounts, and FUSE daemons
//! that are child processes (this binary again) without privileges.
//!
//! Most tests have trees in memory, the same in each daemon; `workers` has real workers and a real store. Without root
//! and `/dev/fuse` there is nothing to test here.

// clippy.toml allows them in test functions; here helpers are test code, too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod daemon;
mod dead;
mod inline;
mod lifecycle;
mod process;
mod refused;
mod rig;
mod sanity;
mod workers;
