//! The client against workers in this process that speak the real handshake, frames and gRPC, and misbehave on demand.

// All of this is test code; clippy exempts only functions marked as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod budget;
mod discovery;
mod failover;
mod lies;
mod metadata;
mod reader;
mod support;
