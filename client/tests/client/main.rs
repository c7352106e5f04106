//! The client against workers in this process that speak the real handshake, frames and gRPC, and misbehave on demand.

mod budget;
mod failover;
mod lies;
mod metadata;
mod reader;
mod support;
