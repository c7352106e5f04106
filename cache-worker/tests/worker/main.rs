//! Real workers in this process, a real S3 server, the real client; all on 127.0.0.1.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test stops where it cannot go on")]

mod budget;
mod control;
mod copies;
mod disk;
mod faults;
mod garbage;
mod harness;
mod hung;
mod lru;
mod manifests;
mod peers;
mod reads;
mod restarts;
mod runs;
mod sources;
mod sync;
mod terms;
mod wiping;
