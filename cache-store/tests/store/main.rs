//! The chunk store through its public interface, on real directories.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod disk_full;
mod faults;
mod model;
mod stress;
mod support;
