//! The data server: frames over a connection whose handshake is done.
//!
//! - [`connection`]: the loop that reads requests, and the task of each request;
//! - [`writer`]: the one writer of a connection;
//! - [`outgoing`]: how bytes get into the socket.
//!
//! Invariants: frames of one request are in order; a request that was cancelled is not answered further; requests of one
//! connection take turns frame by frame, because each waits for its turn at one bounded queue (turns are first come,
//! first served). A client that takes nothing for [`SEND_PROGRESS`] loses its connection.

mod connection;
mod outgoing;
mod writer;

use std::time::Duration;

pub(crate) use connection::serve;

/// How long a client may take nothing.
pub(crate) const SEND_PROGRESS: Duration = Duration::from_secs(30);
