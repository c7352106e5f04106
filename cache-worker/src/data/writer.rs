//! The one writer of a connection.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use forebay_protocol::frame::{ALIVE_INTERVAL, Answer, encode_answer};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    SEND_PROGRESS,
    outgoing::{FilePart, Outgoing, Part, Pumped},
};
use crate::fill::{Block, Disk};

/// Frames that wait for the writer at most, besides those that it sends: two, so that the next is there when one is out.
pub(super) const QUEUE: usize = 2;

/// A frame to send.
pub(super) struct Frame {
    /// Header and fixed fields; everything for frames without blocks.
    pub(super) head: Bytes,
    /// The blocks.
    pub(super) body: Body,
    /// Counts the body's bytes when they are out.
    pub(super) served: Option<(Counter, u64)>,
}

/// Blocks of a frame.
pub(super) enum Body {
    /// None.
    Empty,
    /// From memory.
    Blocks(Vec<Block>),
    /// From a chunk's file.
    File(FilePart),
}

impl Frame {
    /// A frame without blocks.
    pub(super) fn of(number: u64, answer: &Answer) -> Self {
        let mut head = BytesMut::new();
        encode_answer(&mut head, number, answer);
        Self { head: head.freeze(), body: Body::Empty, served: None }
    }
}

/// Sends frames until the queue is closed and empty, or the connection fails. While `open` requests are, it shows every
/// [`ALIVE_INTERVAL`] that the worker lives.
pub(super) async fn run(
    socket: Arc<TcpStream>,
    mut queue: mpsc::Receiver<Frame>,
    open: Arc<AtomicUsize>,
    disk: Arc<Disk>,
) -> io::Result<()> {
    let mut alive = interval(ALIVE_INTERVAL);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut outgoing = Outgoing::default();
        let served = tokio::select! {
            frame = queue.recv() => {
                let Some(frame) = frame else { return Ok(()) };
                outgoing.push(Part::Bytes(frame.head));
                match frame.body {
                    Body::Empty => {}
                    Body::Blocks(blocks) => blocks.into_iter().for_each(|block| outgoing.push(Part::Block(block))),
                    Body::File(file) => outgoing.push(Part::File(file)),
                }
                frame.served
            }
            _ = alive.tick() => {
                if open.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                let mut head = BytesMut::new();
                encode_answer(&mut head, 0, &Answer::Alive);
                outgoing.push(Part::Bytes(head.freeze()));
                None
            }
        };
        send(&socket, &disk, outgoing).await?;
        alive.reset();
        if let Some((counter, bytes)) = served {
            counter.inc_by(bytes);
        }
    }
}

async fn send(socket: &Arc<TcpStream>, disk: &Arc<Disk>, mut outgoing: Outgoing) -> io::Result<()> {
    loop {
        let pumped = if outgoing.touches_disk() {
            let socket = socket.clone();
            let pump = move || {
                let pumped = outgoing.pump(&socket);
                (outgoing, pumped)
            };
            // The head is out already: without an answer the connection is lost, and the client asks for the rest anew.
            let answer = disk.call(pump).await.map_err(io::Error::other)?;
            let (back, pumped) = answer.ok_or_else(|| io::Error::other("the cache disk does not answer"))?;
            outgoing = back;
            pumped?
        } else {
            outgoing.pump(socket)?
        };
        match pumped {
            Pumped::All => return Ok(()),
            Pumped::Full => timeout(SEND_PROGRESS, socket.writable())
                .await
                .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))??,
        }
    }
}
