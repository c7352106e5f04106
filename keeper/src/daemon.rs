//! The daemon's side of the hand-over.
//!
//! ```text
//! let mut link = DaemonLink::connect(&socket, options)?;
//! while let Some(message) = link.next_message(None)? {
//!     match message {
//!         Message::Attach(attach) => {
//!             let tables = attach.tables.open()?;
//!             // fuser's handshake over a socketpair with attach.init; dup3(attach.fuse, the session's descriptor);
//!             // notify_resend unless attach.first; then the session runs on threads of its own
//!             link.sender().attached(&attach.volume, attach.generation)?;
//!         }
//!         ...
//!     }
//! }
//! ```
//!
//! When the link ends ([`LinkError::Closed`]) the keeper is dead and the mounts with it: the daemon exits.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::handover::socket::{self, Received};
use crate::handover::{Role, ToDaemon, ToKeeper, WireError};
use crate::tables::{AttachError, Counters, NodeTable, OpenTable};

pub use crate::notify::{notify_expire_entry, notify_resend};

/// How often a daemon says that it makes progress.
pub const HEARTBEAT: Duration = Duration::from_millis(200);
/// How long a message may wait for a keeper that does not read.
const SEND_DEADLINE: Duration = Duration::from_secs(5);

/// What a daemon tells about itself.
pub struct DaemonOptions {
    /// For status and logs.
    pub name: String,
    /// A number that changes at least every second while the daemon is able to serve: counted up by a task of the
    /// runtime, not by the thread that asks. The daemon is killed when it stands still.
    pub progress: Box<dyn Fn() -> u64 + Send>,
    /// How long to try to connect: the keeper may be about to listen.
    pub deadline: Duration,
}

/// Why the link is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The keeper is gone.
    #[error("the keeper closed the connection")]
    Closed,
    /// It did not answer, or never listened.
    #[error("the keeper cannot be reached")]
    Io(#[from] io::Error),
    /// It speaks another version.
    #[error("the keeper sent something that is no message")]
    Wire(#[from] WireError),
}

/// What the keeper says.
pub enum Message {
    /// Serve, or stand by.
    Role(Role),
    /// A volume that this standby may have to serve: what can be made ready now is not waited for later.
    Prepare {
        /// Name.
        volume: String,
        /// As given to the keeper.
        config: Vec<u8>,
    },
    /// Serve this volume. To be answered by [`LinkSender::attached`] or [`LinkSender::attach_failed`].
    Attach(Attach),
    /// The volume is gone; its descriptor can be closed.
    Detach {
        /// Name.
        volume: String,
    },
    /// Exit.
    Stop,
}

/// All that is needed to serve a volume.
pub struct Attach {
    /// Name.
    pub volume: String,
    /// Counts the attachments of this volume, from 1.
    pub generation: u64,
    /// Nobody has served it before, so there is nothing to send again.
    pub first: bool,
    /// `/dev/fuse`, after INIT.
    pub fuse: OwnedFd,
    /// An INIT request for a library's handshake: it offers exactly what the kernel was told is accepted. The reply to it
    /// goes nowhere.
    pub init: Vec<u8>,
    /// As given to the keeper.
    pub config: Vec<u8>,
    /// The shared tables.
    pub tables: TableDescriptors,
}

/// The memfds of a volume.
pub struct TableDescriptors {
    /// Of the [`NodeTable`].
    pub nodes: OwnedFd,
    /// Of the [`OpenTable`].
    pub opens: OwnedFd,
    /// Of the [`Counters`].
    pub counters: OwnedFd,
}

/// The tables of a volume, attached.
pub struct Tables {
    /// Node ids.
    pub nodes: NodeTable,
    /// Open handles.
    pub opens: OpenTable,
    /// Counters.
    pub counters: Counters,
}

impl TableDescriptors {
    /// Maps them, after checking that they are what they should be.
    pub fn open(self) -> Result<Tables, AttachError> {
        let Self { nodes, opens, counters } = self;
        Ok(Tables {
            nodes: NodeTable::attach(nodes)?,
            opens: OpenTable::attach(opens)?,
            counters: Counters::attach(counters)?,
        })
    }
}

/// A connection to the keeper. Heartbeats go on until it is dropped.
pub struct DaemonLink {
    socket: Arc<OwnedFd>,
    buffer: Vec<u8>,
    stop: Arc<AtomicBool>,
    heart: Option<JoinHandle<()>>,
}

/// The sending half, for any thread.
#[derive(Clone)]
pub struct LinkSender {
    socket: Arc<OwnedFd>,
}

impl DaemonLink {
    /// Connects and says hello. The heartbeat thread starts here.
    pub fn connect(path: &Path, options: DaemonOptions) -> Result<Self, LinkError> {
        let DaemonOptions { name, progress, deadline } = options;
        let end = Instant::now() + deadline;
        let socket = loop {
            match socket::connect(path) {
                Ok(socket) => break Arc::new(socket),
                Err(error) if Instant::now() >= end => return Err(error.into()),
                // Not there yet, or its backlog is full.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let sender = LinkSender { socket: Arc::clone(&socket) };
        sender.send(&ToKeeper::Hello { name })?;
        let stop = Arc::new(AtomicBool::new(false));
        let heart = {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new()
                .name("keeper-heartbeat".to_owned())
                .spawn(move || beat(&sender.socket, &stop, progress.as_ref()))?
        };
        Ok(Self { socket, buffer: Vec::new(), stop, heart: Some(heart) })
    }

    /// For answers, from any thread.
    pub fn sender(&self) -> LinkSender {
        LinkSender { socket: Arc::clone(&self.socket) }
    }

    /// The next message; `None` when `timeout` has passed without one.
    pub fn next_message(&mut self, timeout: Option<Duration>) -> Result<Option<Message>, LinkError> {
        let end = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if !socket::wait(&self.socket, PollFlags::IN, left)? {
                return Ok(None);
            }
            match socket::receive(&self.socket, &mut self.buffer)? {
                Received::Packet(packet, fds) => return Ok(Some(message(&packet, fds)?)),
                Received::Closed => return Err(LinkError::Closed),
                Received::Oversized => return Err(WireError::Length.into()),
                Received::Empty => {}
            }
        }
    }
}

impl Drop for DaemonLink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(heart) = self.heart.take() {
            heart.thread().unpark();
            // It does nothing that can block.
            let _ = heart.join();
        }
    }
}

impl LinkSender {
    /// The volume is served: its descriptor is under a session, and what a predecessor had taken is asked for again.
    pub fn attached(&self, volume: &str, generation: u64) -> Result<(), LinkError> {
        self.send(&ToKeeper::Attached { volume: volume.to_owned(), generation })
    }

    /// The volume can not be served by this daemon.
    pub fn attach_failed(&self, volume: &str, generation: u64, error: &str) -> Result<(), LinkError> {
        self.send(&ToKeeper::AttachFailed { volume: volume.to_owned(), generation, error: error.to_owned() })
    }

    fn send(&self, message: &ToKeeper) -> Result<(), LinkError> {
        let packet = message.encode();
        let end = Instant::now() + SEND_DEADLINE;
        loop {
            match socket::send(&self.socket, &packet, &[]) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    socket::wait(&self.socket, PollFlags::OUT, Some(Duration::from_millis(100)))?;
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(LinkError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn beat(socket: &OwnedFd, stop: &AtomicBool, progress: &(dyn Fn() -> u64 + Send)) {
    let mut last = None;
    while !stop.load(Ordering::Relaxed) {
        let now = progress();
        if last != Some(now) {
            match socket::send(socket, &ToKeeper::Heartbeat { progress: now }.encode(), &[]) {
                Ok(()) => last = Some(now),
                // A keeper that does not read just now has enough beats to find.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
        std::thread::park_timeout(HEARTBEAT);
    }
}

fn message(packet: &[u8], fds: Vec<OwnedFd>) -> Result<Message, WireError> {
    let (message, expected) = ToDaemon::decode(packet)?;
    if fds.len() != expected {
        return Err(WireError::Descriptors);
    }
    Ok(match message {
        ToDaemon::Role(role) => Message::Role(role),
        ToDaemon::Prepare { volume, config } => Message::Prepare { volume, config },
        ToDaemon::Detach { volume } => Message::Detach { volume },
        ToDaemon::Stop => Message::Stop,
        ToDaemon::Attach { volume, generation, first, init, config } => {
            let [fuse, nodes, opens, counters] = <[OwnedFd; 4]>::try_from(fds).map_err(|_| WireError::Descriptors)?;
            let tables = TableDescriptors { nodes, opens, counters };
            Message::Attach(Attach { volume, generation, first, fuse, init, config, tables })
        }
    })
}
