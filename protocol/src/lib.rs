//! What Forebay's processes say to each other.
//!
//! - [`identity`]: datasets, paths, file versions, chunks and blocks, and the checksum that binds a block to its place;
//! - [`table`] and [`placement`]: who the workers are, and which of them owns what;
//! - [`handshake`]: how every TCP connection begins;
//! - [`frame`]: the binary frames of a data connection;
//! - [`worker`]: the generated gRPC messages and services of a control connection;
//! - [`errors`]: what went wrong, in one line.
//!
//! Everything that decodes bytes from outside is bounded by the constants beside it and has a fuzz target.

pub mod errors;
pub mod frame;
pub mod handshake;
pub mod identity;
pub mod placement;
pub mod table;

/// Generated from `proto/worker.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod worker {
    tonic::include_proto!("forebay.worker.v1");
}

pub use identity::{
    BLOCK_SIZE, BlockRange, CHUNK_SIZE, ChunkKey, DatasetId, DatasetPath, FileIdentity, FileVersion, InvalidPath,
    VersionKey, block_checksum,
};
