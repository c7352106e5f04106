//! The control thread: the one place that decides who serves.
//!
//! It owns every descriptor, table and connection, so nothing is locked. It waits in poll(2) for daemons, commands and
//! the ends of killed processes, and never makes a call that can block: sends and receives are non-blocking, aborts have
//! a thread of their own.
//!
//! Life of a hand-over: a connection is lost (hung up, silent, garbage) -> SIGKILL through its pidfd, whatever the
//! reason, so that "lost" always means "dead" -> its volumes are vacant -> the pidfd becomes readable, or `kill_wait`
//! passes -> the oldest standby is active and is sent every vacant volume -> it says `Attached`.

mod connection;
mod volume;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::SocketFlags;
use rustix::process::Signal;
use tokio::sync::mpsc as events;

use crate::handover::socket::{self, Received};
use crate::handover::{Role, ToDaemon, ToKeeper};
use crate::keeper::{self, Event, KeeperOptions, KeeperStatus, LossCause, VolumeState};
use crate::mount::{MountInfo, fusectl};
use crate::notify::notify_resend;
use crate::sys;

use connection::Connection;
use volume::State;
pub(crate) use volume::Volume;

/// Connections at once: two daemons, and what is between accept and hello.
const MAX_CONNECTIONS: usize = 64;
/// A connection that has not said hello by then is no daemon.
const HELLO: Duration = Duration::from_secs(5);
/// Messages taken from one connection before the others get their turn.
const BURST: usize = 64;
/// Longest wait in poll.
const TICK: Duration = Duration::from_secs(1);
/// How often a killed daemon that is not gone yet is looked at.
const DYING_TICK: Duration = Duration::from_millis(10);
/// A wait that took so much longer than it should: this process was stopped, or starved, and the silence was its own.
const STALLED: Duration = Duration::from_millis(500);
/// How often mounts are looked at for having been taken away by somebody else.
const PROBE: Duration = Duration::from_secs(5);

/// What the handle asks for.
pub(crate) enum Command {
    Add(Box<Volume>),
    Remove { volume: String },
    Find { volume: String, reply: mpsc::SyncSender<Option<MountInfo>> },
    Status { reply: mpsc::SyncSender<KeeperStatus> },
    AbortDone { volume: String, connection: u64, error: Option<String> },
    Stop,
}

/// Commands, and how the thread is told of them.
pub(crate) struct Inbox {
    pub(crate) wake: Arc<OwnedFd>,
    pub(crate) receiver: mpsc::Receiver<Command>,
    /// For the threads that this one starts.
    pub(crate) sender: mpsc::Sender<Command>,
}

/// A daemon that was killed and is not known to be gone.
struct Dying {
    pidfd: OwnedFd,
    pid: i32,
    /// Until then its successor waits.
    deadline: Instant,
    lingers: bool,
    /// The volumes that it may hold requests of.
    volumes: Vec<String>,
}

pub(crate) struct Control {
    options: KeeperOptions,
    listener: OwnedFd,
    inbox: Inbox,
    events: events::Sender<Event>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    /// The connection of the daemon that serves.
    active: Option<u64>,
    volumes: BTreeMap<String, Volume>,
    dying: Vec<Dying>,
    totals: KeeperStatus,
    probed: Instant,
    buffer: Vec<u8>,
    stop: bool,
}

impl Control {
    pub(crate) fn new(options: KeeperOptions, listener: OwnedFd, inbox: Inbox, events: events::Sender<Event>) -> Self {
        Self {
            options,
            listener,
            inbox,
            events,
            connections: BTreeMap::new(),
            next_connection: 1,
            active: None,
            volumes: BTreeMap::new(),
            dying: Vec::new(),
            totals: KeeperStatus::default(),
            probed: Instant::now(),
            buffer: Vec::new(),
            stop: false,
        }
    }

    pub(crate) fn run(mut self) {
        while !self.stop {
            let timeout = self.next_deadline().saturating_duration_since(Instant::now()).min(TICK);
            let before = Instant::now();
            let ready = self.poll(timeout);
            if before.elapsed() > timeout + STALLED {
                tracing::warn!(late = ?before.elapsed(), "keeper was stalled: silence of daemons is forgiven");
                for connection in self.connections.values_mut() {
                    connection.heard = Instant::now();
                }
            }
            self.commands();
            for id in ready {
                self.receive(id);
            }
            self.accept();
            self.reap();
            self.expire();
            self.schedule();
            self.flush();
        }
        for connection in self.connections.values_mut() {
            connection.push(&ToDaemon::Stop, None);
            // What does not fit into the socket now is not needed: the socket closes.
            let _ = connection.flush(&self.volumes);
        }
    }

    /// Waits; returns the connections that have something to say.
    fn poll(&mut self, timeout: Duration) -> Vec<u64> {
        let mut fds = vec![PollFd::new(&*self.inbox.wake, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for connection in self.connections.values() {
            let out = if connection.wants_to_send() { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::new(&connection.socket, PollFlags::IN | out));
        }
        for dying in &self.dying {
            fds.push(PollFd::new(&dying.pidfd, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, Some(&socket::timespec(timeout))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                // Out of memory, at most: everything is tried without waiting, soon again.
                tracing::warn!(%error, "poll failed");
                std::thread::sleep(Duration::from_millis(20));
                return ids;
            }
        }
        let ready = fds[2..].iter().zip(ids).filter(|(fd, _)| !fd.revents().is_empty()).map(|(_, id)| id).collect();
        let mut drain = [0; 8];
        let _ = rustix::io::read(&*self.inbox.wake, &mut drain);
        ready
    }

    /// When something has to be done although nothing was heard.
    fn next_deadline(&self) -> Instant {
        let connections = self.connections.values().map(|connection| connection.deadline(&self.options));
        let dying = self.dying.iter().filter(|dying| !dying.lingers);
        let dying = dying.map(|dying| dying.deadline.min(Instant::now() + DYING_TICK));
        let volumes = self.volumes.values().filter_map(|volume| volume.deadline(&self.options));
        connections.chain(dying).chain(volumes).min().unwrap_or_else(|| Instant::now() + TICK)
    }

    fn commands(&mut self) {
        while let Ok(command) = self.inbox.receiver.try_recv() {
            match command {
                Command::Add(volume) => {
                    let prepare = ToDaemon::Prepare { volume: volume.name().to_owned(), config: volume.config.clone() };
                    for (id, connection) in &mut self.connections {
                        if connection.hello.is_some() && Some(*id) != self.active {
                            connection.push(&prepare, None);
                        }
                    }
                    self.volumes.insert(volume.name().to_owned(), *volume);
                }
                Command::Remove { volume } => {
                    if self.volumes.remove(&volume).is_some() {
                        let detach = ToDaemon::Detach { volume };
                        for connection in self.connections.values_mut().filter(|c| c.hello.is_some()) {
                            connection.push(&detach, None);
                        }
                    }
                }
                // The one who asked may have given up.
                Command::Find { volume, reply } => {
                    let _ = reply.send(self.volumes.get(&volume).map(|volume| volume.info.clone()));
                }
                Command::Status { reply } => {
                    let _ = reply.send(self.status());
                }
                Command::AbortDone { volume, connection, error } => {
                    // It may have been unmounted and mounted again meanwhile.
                    if let Some(found) = self.volumes.get_mut(&volume)
                        && found.info.connection == connection
                    {
                        tracing::warn!(volume, ?error, "nobody served the volume: its connection is aborted");
                        found.state = State::Aborted;
                        self.tell(Event::Aborted { volume, error });
                    }
                }
                Command::Stop => self.stop = true,
            }
        }
    }

    fn accept(&mut self) {
        // A handful each time: whoever floods the socket does not starve the daemons.
        for _ in 0..BURST {
            let socket = match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a daemon");
                    return;
                }
            };
            if self.connections.len() >= MAX_CONNECTIONS {
                self.totals.refused += 1;
                continue;
            }
            match Connection::new(socket, &self.options.allowed_uids) {
                Ok(Some(connection)) => {
                    self.connections.insert(self.next_connection, connection);
                    self.next_connection += 1;
                }
                Ok(None) => self.totals.refused += 1,
                Err(error) => tracing::debug!(%error, "a daemon was gone before it was accepted"),
            }
        }
    }

    fn receive(&mut self, id: u64) {
        for _ in 0..BURST {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            let packet = match socket::receive(&connection.socket, &mut self.buffer) {
                Ok(Received::Packet(packet, fds)) if fds.is_empty() => packet,
                Ok(Received::Empty) => return,
                Ok(Received::Closed) => return self.lose(id, LossCause::HungUp),
                Ok(Received::Packet(..) | Received::Oversized) => return self.lose(id, LossCause::Garbage),
                Err(error) => {
                    tracing::debug!(%error, "cannot receive from a daemon");
                    return self.lose(id, LossCause::HungUp);
                }
            };
            match ToKeeper::decode(&packet) {
                Ok(message) => self.handle(id, message),
                Err(error) => {
                    tracing::warn!(%error, pid = connection.pid, "not a daemon's message");
                    return self.lose(id, LossCause::Garbage);
                }
            }
        }
    }

    fn handle(&mut self, id: u64, message: ToKeeper) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.heard = Instant::now();
        let pid = connection.pid;
        match message {
            ToKeeper::Hello { name } if connection.hello.is_none() => {
                tracing::info!(pid, name, "a daemon joined");
                connection.hello = Some(name);
                connection.push(&ToDaemon::Role(Role::Standby), None);
                for volume in self.volumes.values() {
                    let (volume, config) = (volume.name().to_owned(), volume.config.clone());
                    connection.push(&ToDaemon::Prepare { volume, config }, None);
                }
                let role = if self.active.is_none() { Role::Active } else { Role::Standby };
                self.tell(Event::DaemonJoined { pid, role });
            }
            _ if connection.hello.is_none() => self.lose(id, LossCause::Garbage),
            ToKeeper::Hello { .. } => self.lose(id, LossCause::Garbage),
            ToKeeper::Heartbeat { progress: _ } => {}
            ToKeeper::Attached { volume, generation } => {
                if let Some(found) = self.volumes.get_mut(&volume)
                    && let Some(event) = found.attached(id, pid, generation)
                {
                    tracing::info!(?event, "a volume is served");
                    self.tell(event);
                }
            }
            ToKeeper::AttachFailed { volume, generation, error } => {
                if let Some(found) = self.volumes.get_mut(&volume)
                    && found.failed(id, generation)
                {
                    tracing::warn!(volume, pid, error, "a daemon cannot serve a volume");
                    self.tell(Event::AttachFailed { volume, pid, error });
                }
            }
        }
    }

    /// Ends a connection. A daemon on it is killed for certain, and its volumes are vacant.
    fn lose(&mut self, id: u64, cause: LossCause) {
        let Some(connection) = self.connections.remove(&id) else { return };
        if cause == LossCause::Garbage {
            self.totals.garbage += 1;
        }
        if connection.hello.is_none() {
            // Whoever it was, it never had anything; it is not ours to kill.
            return;
        }
        let (pid, role) = (connection.pid, if self.active == Some(id) { Role::Active } else { Role::Standby });
        match cause {
            LossCause::HungUp => {}
            LossCause::Silent => self.totals.kills_silent += 1,
            LossCause::AttachTimeout | LossCause::Garbage | LossCause::Backlog => self.totals.kills_other += 1,
        }
        tracing::warn!(pid, ?role, ?cause, "a daemon is lost");
        match rustix::process::pidfd_send_signal(&connection.pidfd, Signal::KILL) {
            // Dead already, most of the time.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(pid, %error, "cannot kill a daemon"),
        }
        let now = Instant::now();
        let mut volumes = Vec::new();
        for volume in self.volumes.values_mut() {
            if volume.vacate(id, now) {
                volumes.push(volume.name().to_owned());
            }
        }
        if self.active == Some(id) {
            self.active = None;
            let deadline = now + self.options.kill_wait;
            self.dying.push(Dying { pidfd: connection.pidfd, pid, deadline, lingers: false, volumes });
        }
        self.tell(Event::DaemonLost { pid, role, cause });
    }

    /// Finds killed daemons that are gone, and those that take too long.
    fn reap(&mut self) {
        let now = Instant::now();
        let mut index = 0;
        while index < self.dying.len() {
            let dying = &mut self.dying[index];
            let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let gone =
                matches!(rustix::event::poll(&mut [PollFd::new(&dying.pidfd, PollFlags::IN)], Some(&zero)), Ok(1..));
            if gone {
                let Dying { pid, lingers, volumes, .. } = self.dying.swap_remove(index);
                if lingers {
                    self.resend_late(&volumes);
                    self.tell(Event::PredecessorGone { pid });
                }
                continue;
            }
            if !dying.lingers && (now >= dying.deadline || sys::only_sleeps(dying.pid)) {
                dying.lingers = true;
                let pid = dying.pid;
                tracing::warn!(pid, "a killed daemon is not gone, but executes nothing: its successor does not wait");
                self.tell(Event::PredecessorLingers { pid });
            }
            index += 1;
        }
    }

    /// What a lingering daemon had taken and not answered only comes back when it is gone.
    fn resend_late(&mut self, volumes: &[String]) {
        for name in volumes {
            if let Some(volume) = self.volumes.get_mut(name)
                && let State::Served { .. } | State::Attaching { .. } = volume.state
            {
                match notify_resend(&volume.fuse) {
                    Ok(()) => volume.late_resends += 1,
                    Err(error) => tracing::warn!(%error, volume = name, "cannot ask for requests again"),
                }
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.deadline(&self.options) <= now)
            .map(|(id, connection)| (*id, connection.backlogged()))
            .collect();
        for (id, backlogged) in late {
            // It may have spoken while this thread was busy: its socket decides.
            self.receive(id);
            if self.connections.get(&id).is_some_and(|connection| connection.deadline(&self.options) <= now) {
                self.lose(id, if backlogged { LossCause::Backlog } else { LossCause::Silent });
            }
        }
        let mut stuck = Vec::new();
        for volume in self.volumes.values_mut() {
            if let Some(connection) = volume.attach_overdue(now, &self.options) {
                stuck.push(connection);
            }
            if volume.abort_due(now, &self.options) {
                volume.state = State::Aborting;
                abort(volume.info.clone(), self.inbox.sender.clone(), Arc::clone(&self.inbox.wake));
            }
        }
        for id in stuck {
            self.lose(id, LossCause::AttachTimeout);
        }
        if now.duration_since(self.probed) >= PROBE {
            self.probed = now;
            let gone: Vec<_> = self.volumes.values_mut().filter_map(Volume::probe).collect();
            for volume in gone {
                tracing::warn!(volume, "the volume was unmounted or aborted by somebody else");
                self.tell(Event::Vanished { volume });
            }
        }
    }

    /// Makes a standby active when there is no active daemon, and gives it what nobody serves.
    fn schedule(&mut self) {
        if self.active.is_none() {
            if self.dying.iter().any(|dying| !dying.lingers) {
                return;
            }
            // The oldest: it has had the most time to make itself ready.
            let standby = self.connections.iter_mut().find(|(_, connection)| connection.hello.is_some());
            let Some((id, connection)) = standby else { return };
            tracing::info!(pid = connection.pid, "a daemon is active");
            connection.push(&ToDaemon::Role(Role::Active), None);
            self.active = Some(*id);
            for volume in self.volumes.values_mut() {
                volume.forgive();
            }
        }
        let Some(id) = self.active else { return };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        for volume in self.volumes.values_mut() {
            if let Some(message) = volume.attach_to(id) {
                connection.push(&message, Some(volume.name().to_owned()));
            }
        }
    }

    fn flush(&mut self) {
        let mut broken = Vec::new();
        for (id, connection) in &mut self.connections {
            match connection.flush(&self.volumes) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!(%error, pid = connection.pid, "cannot send to a daemon");
                    broken.push(*id);
                }
            }
        }
        for id in broken {
            self.lose(id, LossCause::HungUp);
        }
    }

    fn status(&self) -> KeeperStatus {
        let mut status = self.totals.clone();
        let pid_of = |id: u64| self.connections.get(&id).map(|connection| connection.pid);
        status.volumes = self.volumes.values().map(|volume| volume.status(pid_of)).collect();
        status.daemons = self
            .connections
            .iter()
            .filter_map(|(id, connection)| {
                let role = if self.active == Some(*id) { Role::Active } else { Role::Standby };
                connection.status(role)
            })
            .collect();
        status
    }

    fn tell(&mut self, event: Event) {
        match self.events.try_send(event) {
            // Nobody listening is a choice.
            Ok(()) | Err(events::error::TrySendError::Closed(_)) => {}
            Err(events::error::TrySendError::Full(_)) => self.totals.events_dropped += 1,
        }
    }
}

/// Aborts on a thread of its own (which has a deadline) and reports.
fn abort(info: MountInfo, sender: mpsc::Sender<Command>, wake: Arc<OwnedFd>) {
    let report = move || {
        let error = fusectl::abort(info.device, &info.target).err().map(|error| error.to_string());
        // Fails when the keeper has ended.
        let _ = sender.send(Command::AbortDone { volume: info.volume, connection: info.connection, error });
        keeper::wake(&wake);
    };
    if let Err(error) = std::thread::Builder::new().name("keeper-abort".to_owned()).spawn(report) {
        tracing::error!(%error, "cannot start a thread to abort a connection");
    }
}
