//! The daemon's side of the hand-over.
//!
//! ```text
//! let mut link = DaemonLink::connect(&socket, options)?;
//! while let Some(message) = link.next_message(None) {
//!     match message {
//!         Message::Attach(attach) => {
//!             let tables = attach.tables.open()?;
//!             // fuser's handshake over a socketpair with attach.init; dup3(attach.fuse, the session's descriptor);
//!             // notify_resend unless attach.first; then the session runs on threads of its own
//!             link.attached(&attach.volume, attach.generation);
//!         }
//!         ...
//!     }
//! }
//! ```
//!
//! A keeper that ends is no reason to do anything: the daemon serves on. It holds all that is needed to serve each volume,
//! whether it serves it or stands by, and gives that to the next keeper. So a mount ends only when the keeper and all
//! daemons are gone at once; neither goes willingly before the other has confirmed that it holds everything and stays
//! ([`DaemonLink::leave`], [`crate::Keeper::leave`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::PollFlags;

use crate::handover::socket::{self, Received};
use crate::handover::{MAX_FDS, Role, ToDaemon, ToKeeper, WireError};
use crate::health::Health;
use crate::tables::{AttachError, Counters, NodeTable, OpenTable};

pub use crate::notify::{notify_expire_entry, notify_resend};

/// How often a daemon says that it makes progress.
pub const HEARTBEAT: Duration = Duration::from_millis(200);
/// How long a message may wait for a keeper that does not read.
const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// Between attempts to connect: readers notice nothing of a keeper's absence, but nobody takes over meanwhile.
const RECONNECT: Duration = Duration::from_millis(20);
/// A keeper that is not back after this is not expected any more. Longer than it takes to replace one (an image is pulled,
/// a pod is started), and no longer than a reader may hang when the daemon that serves dies in that time.
const LET_GO: Duration = Duration::from_secs(300);

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

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The keeper did not listen in time.
    #[error("the keeper cannot be reached")]
    Unreachable(#[source] io::Error),
    /// No thread for the heartbeats.
    #[error("no thread can be started")]
    Thread(#[source] io::Error),
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
    /// Serve this volume. To be answered by [`DaemonLink::attached`] or [`DaemonLink::attach_failed`].
    Attach(Attach),
    /// The volume is gone; its descriptor can be closed.
    Detach {
        /// Name.
        volume: String,
    },
    /// Exit.
    Stop,
    /// Exit, if you asked to ([`DaemonLink::leave`]): the keeper holds everything.
    Go,
    /// The answer to [`Backings::open`].
    Backing {
        /// Name of the volume.
        volume: String,
        /// The node.
        node: u64,
        /// The id, or why there is none.
        result: Result<u32, String>,
    },
}

/// Asks the keeper, who alone may, to have the kernel read nodes from local files. For any thread.
#[derive(Clone)]
pub struct Backings {
    socket: Arc<Mutex<Option<Arc<OwnedFd>>>>,
}

impl Backings {
    /// Asks for the backing id of a node of a volume that this daemon serves; [`Message::Backing`] is the answer, which
    /// does not come when the keeper goes. `file` is a regular file, open for reading only, that never changes.
    /// `NotConnected` when there is no keeper.
    pub fn open(&self, volume: &str, node: u64, file: impl AsFd) -> io::Result<()> {
        self.send(&ToKeeper::OpenBacking { volume: volume.to_owned(), node }, &[file.as_fd()])
    }

    /// Gives an id back. Nothing may have the node open.
    pub fn close(&self, volume: &str, node: u64, id: u32) -> io::Result<()> {
        self.send(&ToKeeper::CloseBacking { volume: volume.to_owned(), node, id }, &[])
    }

    fn send(&self, message: &ToKeeper, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = self.socket.lock().clone().ok_or(io::ErrorKind::NotConnected)?;
        socket::send(&socket, &message.encode(), fds)
    }
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

/// A connection to the keeper, for as long as the process lives: when the keeper is gone, the daemon goes on serving, and
/// the link connects to the next one and gives back what was given. Heartbeats go on until it is dropped.
pub struct DaemonLink {
    path: PathBuf,
    name: String,
    socket: Option<Arc<OwnedFd>>,
    /// The same, for the heartbeats.
    beating: Arc<Mutex<Option<Arc<OwnedFd>>>>,
    buffer: Vec<u8>,
    held: BTreeMap<String, Kept>,
    leaving: bool,
    /// Since when there has been no keeper.
    lost: Instant,
    stop: Arc<AtomicBool>,
    heart: Option<JoinHandle<()>>,
}

/// What the keeper gave of one volume.
struct Kept {
    /// Of the attachment that is served; 0: none is.
    generation: u64,
    init: Vec<u8>,
    config: Vec<u8>,
    /// How it is, as was last said.
    health: Option<Health>,
    /// FUSE, nodes, opens, counters.
    fds: [OwnedFd; MAX_FDS],
}

impl DaemonLink {
    /// Connects and says hello. The heartbeat thread starts here.
    pub fn connect(path: &Path, options: DaemonOptions) -> Result<Self, LinkError> {
        let DaemonOptions { name, progress, deadline } = options;
        let end = Instant::now() + deadline;
        let (stop, beating) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut link = Self {
            path: path.to_owned(),
            name,
            socket: None,
            beating: Arc::clone(&beating),
            buffer: Vec::new(),
            held: BTreeMap::new(),
            leaving: false,
            lost: Instant::now(),
            stop: Arc::clone(&stop),
            heart: None,
        };
        while let Err(error) = link.reconnect() {
            if Instant::now() >= end {
                return Err(LinkError::Unreachable(error));
            }
            // Not there yet, or its backlog is full.
            std::thread::sleep(RECONNECT);
        }
        let heart = std::thread::Builder::new().name("keeper-heartbeat".to_owned());
        let heart = heart.spawn(move || beat(&beating, &stop, progress.as_ref())).map_err(LinkError::Thread)?;
        link.heart = Some(heart);
        Ok(link)
    }

    /// The next message; `None` when `timeout` has passed without one. While there is no keeper, there is no message.
    pub fn next_message(&mut self, timeout: Option<Duration>) -> Option<Message> {
        let end = timeout.map(|timeout| Instant::now() + timeout);
        let left = || end.map(|end| end.saturating_duration_since(Instant::now()));
        loop {
            let Some(socket) = self.socket.clone() else {
                if let Err(error) = self.reconnect() {
                    tracing::trace!(%error, "no keeper");
                    self.let_go();
                    std::thread::sleep(left().unwrap_or(RECONNECT).min(RECONNECT));
                }
                if left().is_some_and(|left| left.is_zero()) {
                    return None;
                }
                continue;
            };
            match socket::wait(&socket, PollFlags::IN, left()) {
                Ok(false) => return None,
                Ok(true) => {}
                Err(error) => {
                    self.disconnect(&error.to_string());
                    continue;
                }
            }
            let message = match socket::receive(&socket, &mut self.buffer) {
                Ok(Received::Packet(packet, fds)) => self.take(&packet, fds),
                Ok(Received::Empty) => continue,
                Ok(Received::Closed) => {
                    self.disconnect("it closed the connection");
                    continue;
                }
                Ok(Received::Oversized) => Err(WireError::Length),
                Err(error) => {
                    self.disconnect(&error.to_string());
                    continue;
                }
            };
            match message {
                Ok(Some(message)) => return Some(message),
                Ok(None) => {}
                Err(error) => {
                    // Of another version, perhaps: the next one may not be.
                    self.disconnect(&error.to_string());
                    std::thread::sleep(RECONNECT);
                }
            }
        }
    }

    /// For whoever passes files through.
    pub fn backings(&self) -> Backings {
        Backings { socket: Arc::clone(&self.beating) }
    }

    /// Whether there is a keeper.
    pub fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    /// The volume is served: its descriptor is under a session, and what a predecessor had taken is asked for again.
    pub fn attached(&mut self, volume: &str, generation: u64) {
        if let Some(kept) = self.held.get_mut(volume) {
            kept.generation = generation;
        }
        self.send(&ToKeeper::Attached { volume: volume.to_owned(), generation });
    }

    /// The volume can not be served by this daemon: it does not read the descriptor.
    pub fn attach_failed(&mut self, volume: &str, generation: u64, error: &str) {
        self.send(&ToKeeper::AttachFailed { volume: volume.to_owned(), generation, error: error.to_owned() });
    }

    /// How a volume that this daemon serves is. To be told when that changes, and after each attachment.
    pub fn health(&mut self, volume: &str, health: &Health) {
        // Its fields are public: whatever is in them, the packet is bounded.
        let health = Health::new(health.state, &health.reason, &health.message);
        if let Some(kept) = self.held.get_mut(volume) {
            kept.health = Some(health.clone());
        }
        self.send(&ToKeeper::Health { volume: volume.to_owned(), health });
    }

    /// The mount of this volume is gone: there is nothing left to hold.
    pub fn gone(&mut self, volume: &str) {
        self.held.remove(volume);
    }

    /// This daemon would like to exit. True when it may at once, because it holds nothing; otherwise it goes on until
    /// [`Message::Go`], which a keeper sends that has all of what is held here and is not about to end itself.
    pub fn leave(&mut self) -> bool {
        if !self.leaving {
            self.leaving = true;
            self.send(&ToKeeper::Leaving);
        }
        self.held.is_empty()
    }

    /// Connects, and gives back what is held.
    fn reconnect(&mut self) -> io::Result<()> {
        let socket = socket::connect(&self.path)?;
        let held = self.held.len() as u64;
        send(&socket, &ToKeeper::Hello { name: self.name.clone(), held, leaving: self.leaving }, &[])?;
        for (volume, Kept { generation, init, config, health, fds }) in &self.held {
            let (init, config) = (init.clone(), config.clone());
            let message = ToKeeper::Held { volume: volume.clone(), generation: *generation, init, config };
            send(&socket, &message, &fds.each_ref().map(AsFd::as_fd))?;
            if let (Some(health), 1..) = (health.clone(), *generation) {
                send(&socket, &ToKeeper::Health { volume: volume.clone(), health }, &[])?;
            }
        }
        let socket = Arc::new(socket);
        *self.beating.lock() = Some(Arc::clone(&socket));
        self.socket = Some(socket);
        Ok(())
    }

    fn disconnect(&mut self, reason: &str) {
        tracing::warn!(reason, held = self.held.len(), "the keeper is gone; serving goes on without it");
        *self.beating.lock() = None;
        self.socket = None;
        self.lost = Instant::now();
    }

    /// A standby that nobody calls to serve must not keep the kernel waiting for ever.
    fn let_go(&mut self) {
        if self.lost.elapsed() >= LET_GO && self.held.values().any(|kept| kept.generation == 0) {
            tracing::warn!("no keeper within {LET_GO:?}: what is held and not served is let go");
            self.held.retain(|_, kept| kept.generation > 0);
        }
    }

    /// What is lost with a keeper need not arrive: the next one is told what counts when it is connected to.
    fn send(&mut self, message: &ToKeeper) {
        if let Some(socket) = &self.socket
            && let Err(error) = send(socket, message, &[])
        {
            self.disconnect(&error.to_string());
        }
    }

    /// Understands a packet, and keeps what it gives.
    fn take(&mut self, packet: &[u8], fds: Vec<OwnedFd>) -> Result<Option<Message>, WireError> {
        let (message, expected) = ToDaemon::decode(packet)?;
        if fds.len() != expected {
            return Err(WireError::Descriptors);
        }
        let fds = <[OwnedFd; MAX_FDS]>::try_from(fds);
        Ok(Some(match (message, fds) {
            (ToDaemon::Prepare { volume, init, config }, Ok(fds)) => {
                // One that is served stays so.
                let (generation, health) =
                    self.held.remove(&volume).map_or((0, None), |kept| (kept.generation, kept.health));
                self.held.insert(volume.clone(), Kept { generation, init, config: config.clone(), health, fds });
                self.send(&ToKeeper::Holding { volume: volume.clone() });
                Message::Prepare { volume, config }
            }
            (ToDaemon::Attach { volume, generation, first, init, config }, Ok(fds)) => {
                let copies = fds.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
                let copies = copies.map(<[OwnedFd; MAX_FDS]>::try_from);
                let Ok(Ok(kept)) = copies else {
                    // Out of descriptors: perhaps another daemon is not.
                    self.attach_failed(&volume, generation, "no descriptors are left");
                    return Ok(None);
                };
                let (init_kept, config_kept) = (init.clone(), config.clone());
                let kept = Kept { generation: 0, init: init_kept, config: config_kept, health: None, fds: kept };
                self.held.insert(volume.clone(), kept);
                let [fuse, nodes, opens, counters] = fds;
                let tables = TableDescriptors { nodes, opens, counters };
                Message::Attach(Attach { volume, generation, first, fuse, init, config, tables })
            }
            (ToDaemon::Detach { volume }, _) => {
                self.held.remove(&volume);
                Message::Detach { volume }
            }
            (ToDaemon::Role(role), _) => Message::Role(role),
            (ToDaemon::Stop, _) => Message::Stop,
            (ToDaemon::Go, _) => Message::Go,
            (ToDaemon::Backing { volume, node, result }, _) => Message::Backing { volume, node, result },
            (ToDaemon::Prepare { .. } | ToDaemon::Attach { .. }, Err(_)) => return Err(WireError::Descriptors),
        }))
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

fn send(socket: &OwnedFd, message: &ToKeeper, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let packet = message.encode();
    let end = Instant::now() + SEND_DEADLINE;
    loop {
        match socket::send(socket, &packet, fds) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                socket::wait(socket, PollFlags::OUT, Some(Duration::from_millis(100)))?;
            }
            // As many descriptors as one user may have on their way at once: the keeper takes them off.
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn beat(socket: &Mutex<Option<Arc<OwnedFd>>>, stop: &AtomicBool, progress: &(dyn Fn() -> u64 + Send)) {
    let mut last = None;
    while !stop.load(Ordering::Relaxed) {
        let now = progress();
        let socket = socket.lock().clone();
        if last != Some(now)
            && let Some(socket) = socket
            // A keeper that does not read just now has enough beats to find; one that is gone is found to be by the link.
            && socket::send(&socket, &ToKeeper::Heartbeat { progress: now }.encode(), &[]).is_ok()
        {
            last = Some(now);
        }
        std::thread::park_timeout(HEARTBEAT);
    }
}
