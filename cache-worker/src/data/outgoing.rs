//! Bytes on their way into a socket: from memory, or from a file by `sendfile`.
//!
//! The socket does not block. Files may (a page that is not in memory), so a queue that holds a file is pumped on a
//! blocking thread; it comes back as soon as the socket takes no more.

use std::{collections::VecDeque, fs::File, io, os::fd::AsFd, sync::Arc};

use bytes::{Buf, Bytes};
use forebay_cache_store::Chunk;
use rustix::{
    fs::sendfile,
    net::{SendFlags, send},
};
use tokio::{io::Interest, net::TcpStream};

use crate::fill::Block;

/// Bytes that one `sendfile` moves at most.
const SENDFILE_MAX: u64 = 1 << 20;

/// A piece of what is to be sent.
pub(super) enum Part {
    /// From memory.
    Bytes(Bytes),
    /// From memory that counts against the budget.
    Block(Block),
    /// From a file.
    File(FilePart),
}

/// A range of a chunk's file.
pub(super) struct FilePart {
    /// The file.
    pub(super) file: Arc<File>,
    /// Where the next byte is.
    pub(super) offset: u64,
    /// Bytes left.
    pub(super) len: u64,
    /// Whose bytes: told when the file does not hold them.
    pub(super) chunk: Arc<Chunk>,
    /// First of the blocks that these bytes are.
    pub(super) first: u32,
    /// How many.
    pub(super) count: u32,
}

/// What pumping achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Everything is in the socket.
    All,
    /// The socket is full.
    Full,
}

/// Parts in the order in which they go out.
#[derive(Default)]
pub(super) struct Outgoing {
    parts: VecDeque<Part>,
    /// Bytes that went out so far.
    pub(super) sent: u64,
}

impl Outgoing {
    pub(super) fn push(&mut self, part: Part) {
        self.parts.push_back(part);
    }

    /// Whether pumping may wait for a disk.
    pub(super) fn touches_disk(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::File(_)))
    }

    /// Sends until everything is out or the socket takes no more.
    pub(super) fn pump(&mut self, socket: &TcpStream) -> io::Result<Pumped> {
        while !self.parts.is_empty() {
            // What follows in the queue shares packets with what goes out now.
            let more = self.parts.len() > 1;
            let Some(part) = self.parts.front_mut() else { break };
            let (sent, done) = match part {
                Part::Bytes(bytes) => send_memory(socket, bytes, more),
                Part::Block(block) => send_memory(socket, &mut block.bytes, more),
                Part::File(file) => file.send(socket),
            }
            .or_else(|error| if is_full(&error) { Ok((0, false)) } else { Err(error) })?;
            self.sent += sent;
            if done {
                self.parts.pop_front();
            } else if sent == 0 {
                return Ok(Pumped::Full);
            }
        }
        Ok(Pumped::All)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Gives the bytes sent, and whether none are left.
fn send_memory(socket: &TcpStream, bytes: &mut Bytes, more: bool) -> io::Result<(u64, bool)> {
    if bytes.is_empty() {
        return Ok((0, true));
    }
    let more = if more { SendFlags::MORE } else { SendFlags::empty() };
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL | more;
    let sent = socket.try_io(Interest::WRITABLE, || Ok(send(socket.as_fd(), bytes, flags)?))?;
    bytes.advance(sent);
    Ok((sent as u64, bytes.is_empty()))
}

impl FilePart {
    /// Gives the bytes sent, and whether none are left.
    fn send(&mut self, socket: &TcpStream) -> io::Result<(u64, bool)> {
        if self.len == 0 {
            return Ok((0, true));
        }
        let count = self.len.min(SENDFILE_MAX) as usize;
        let mut offset = self.offset;
        let result = socket
            .try_io(Interest::WRITABLE, || Ok(sendfile(socket.as_fd(), self.file.as_fd(), Some(&mut offset), count)?));
        let failure = match result {
            Ok(0) => io::Error::new(io::ErrorKind::UnexpectedEof, "a chunk's file is shorter than its blocks"),
            Ok(sent) => {
                let sent = sent as u64;
                self.offset += sent;
                self.len -= sent;
                return Ok((sent, self.len == 0));
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => error,
            Err(error) => return Err(error),
        };
        // The head is out already: the connection is lost, the blocks are fetched again.
        self.chunk.invalidate(self.first, self.count);
        Err(failure)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncReadExt,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[tokio::test]
    async fn order_is_kept_over_a_full_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut receiver = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (sender, _) = listener.accept().await.unwrap();
        let expected: Vec<u8> = (0..6_000_000u32).map(|i| (i % 251) as u8).collect();
        let mut outgoing = Outgoing::default();
        for part in expected.chunks(700_000) {
            outgoing.push(Part::Bytes(Bytes::copy_from_slice(part)));
        }
        outgoing.push(Part::Bytes(Bytes::new()));
        let total = expected.len() as u64;
        let sending = async {
            let mut full = 0;
            while outgoing.pump(&sender).unwrap() == Pumped::Full {
                full += 1;
                sender.writable().await.unwrap();
            }
            assert_eq!(outgoing.sent, total);
            full
        };
        let receiving = async {
            let mut got = vec![0; expected.len()];
            receiver.read_exact(&mut got).await.unwrap();
            got
        };
        let (full, got) = tokio::join!(sending, receiving);
        assert!(full > 0, "the test must meet a full socket");
        assert!(got == expected);
    }
}
