//! The control thread: the one place that decides who serves.
//!
//! It owns every descriptor, table and connection, so nothing is locked. It waits in poll(2) for daemons, commands and
//! the ends of killed processes, and makes no call that can block: sends and receives are non-blocking, aborts have a
//! thread of their own. (One small file is written when another daemon begins to serve.)
//!
//! Life of a hand-over: a connection is lost (hung up, dying, silent, garbage) -> SIGKILL through its pidfd, whatever the
//! reason, so that "lost" always means "dead" -> its volumes are vacant -> the pidfd becomes readable, or `kill_wait`
//! passes -> the oldest standby is active and is sent every vacant volume -> it says `Attached`.
//!
//! A daemon that says `AttachFailed` is lost for that volume only: the volume is offered to the next one, and when all
//! have refused, to the active one again after a pause. So a standby may come to serve a volume.
//!
//! What happens when this keeper, or the one before it, ends is in [`restart`].

mod connection;
mod losses;
mod restart;
mod succession;
mod volume;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::SocketFlags;
use tokio::sync::mpsc as events;

use crate::handover::socket::{self, Received};
use crate::handover::{Role, ToDaemon, ToKeeper, WireError};
use crate::keeper::{Event, KeeperOptions, KeeperStatus, LossCause, VolumeState};
use crate::mount::MountInfo;

use connection::Connection;
use losses::{Dying, abort};
pub(crate) use restart::Legacy;
use restart::{Awaited, Leave};
pub(crate) use succession::Succession;
pub(crate) use volume::Volume;
use volume::{Means, State};

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
/// How often a daemon that has been silent for a moment is looked at.
const SUSPECT_TICK: Duration = Duration::from_millis(50);
/// How often mounts are looked at for having been taken away by somebody else.
const PROBE: Duration = Duration::from_secs(5);

/// What the handle asks for.
pub(crate) enum Command {
    Add(Box<Volume>),
    Remove {
        volume: String,
    },
    Find {
        volume: String,
        reply: mpsc::SyncSender<Option<(MountInfo, Option<OwnedFd>)>>,
    },
    Status {
        reply: mpsc::SyncSender<KeeperStatus>,
    },
    AbortDone {
        volume: String,
        connection: u64,
        error: Option<String>,
    },
    /// To end as soon as daemons hold everything, or at the deadline; the reply names what nobody holds.
    Leave {
        deadline: Instant,
        reply: mpsc::SyncSender<Vec<String>>,
    },
    Stop,
}

/// Commands, and how the thread is told of them.
pub(crate) struct Inbox {
    pub(crate) wake: Arc<OwnedFd>,
    pub(crate) receiver: mpsc::Receiver<Command>,
    /// For the threads that this one starts.
    pub(crate) sender: mpsc::Sender<Command>,
}

/// How the thread ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The daemons are told to end, too.
    Stop,
    /// They go on.
    Leave,
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
    awaited: Vec<Awaited>,
    succession: Option<Succession>,
    leave: Option<Leave>,
    totals: KeeperStatus,
    probed: Instant,
    buffer: Vec<u8>,
    end: Option<End>,
}

impl Control {
    pub(crate) fn new(
        options: KeeperOptions,
        listener: OwnedFd,
        inbox: Inbox,
        events: events::Sender<Event>,
        mut legacy: Legacy,
    ) -> Self {
        let awaited = legacy.awaited(options.rejoin);
        let volumes = legacy.volumes.into_iter().map(|info| (info.volume.clone(), Volume::returning(info))).collect();
        Self {
            options,
            listener,
            inbox,
            events,
            connections: BTreeMap::new(),
            next_connection: 1,
            active: None,
            volumes,
            dying: Vec::new(),
            awaited,
            succession: legacy.succession,
            leave: None,
            totals: KeeperStatus::default(),
            probed: Instant::now(),
            buffer: Vec::new(),
            end: None,
        }
    }

    pub(crate) fn run(mut self) {
        while self.end.is_none() {
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
            self.part();
            self.flush();
        }
        for connection in self.connections.values_mut() {
            if self.end == Some(End::Stop) {
                connection.push(&ToDaemon::Stop, None);
            }
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
        // Whose end is looked for in `reap`.
        let dying = self.dying.iter().map(|dying| &dying.pidfd);
        let awaited = self.awaited.iter().filter_map(|awaited| Some(&awaited.process.as_ref()?.1));
        fds.extend(dying.chain(awaited).map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
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
        let suspect = self.connections.values().any(Connection::is_suspect).then(|| Instant::now() + SUSPECT_TICK);
        let dying = self.dying.iter().filter(|dying| !dying.lingers);
        let dying = dying.map(|dying| dying.deadline.min(Instant::now() + DYING_TICK));
        let volumes = self.volumes.values().filter_map(|volume| volume.deadline(&self.options));
        let awaited = self.awaited.iter().map(|awaited| awaited.until);
        let leave = self.leave.iter().map(|leave| leave.deadline);
        connections
            .chain(suspect)
            .chain(dying)
            .chain(volumes)
            .chain(awaited)
            .chain(leave)
            .min()
            .unwrap_or_else(|| Instant::now() + TICK)
    }

    fn commands(&mut self) {
        while let Ok(command) = self.inbox.receiver.try_recv() {
            match command {
                Command::Add(volume) => {
                    let name = volume.name().to_owned();
                    self.volumes.insert(name.clone(), *volume);
                    self.prepare(&name);
                }
                Command::Remove { volume } => {
                    if self.volumes.remove(&volume).is_some() {
                        let detach = ToDaemon::Detach { volume: volume.clone() };
                        for connection in self.connections.values_mut().filter(|c| c.hello.is_some()) {
                            connection.holds.remove(&volume);
                            connection.push(&detach, None);
                        }
                    }
                }
                // The one who asked may have given up.
                Command::Find { volume, reply } => {
                    let _ = reply.send(self.volumes.get(&volume).map(Volume::mount));
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
                Command::Leave { deadline, reply } => self.leave = Some(Leave { deadline, reply }),
                Command::Stop => self.end = Some(End::Stop),
            }
        }
    }

    /// Has every standby hold a volume that it does not hold yet.
    fn prepare(&mut self, volume: &str) {
        let Some(message) = self.volumes.get(volume).and_then(Volume::prepare) else { return };
        for (id, connection) in &mut self.connections {
            if connection.settled() && Some(*id) != self.active && !connection.holds.contains(volume) {
                connection.push(&message, Some(volume.to_owned()));
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
            let (packet, fds) = match socket::receive(&connection.socket, &mut self.buffer) {
                Ok(Received::Packet(packet, fds)) => (packet, fds),
                Ok(Received::Empty) => return,
                Ok(Received::Closed) => return self.lose(id, LossCause::HungUp),
                Ok(Received::Oversized) => return self.lose(id, LossCause::Garbage),
                Err(error) => {
                    tracing::debug!(%error, "cannot receive from a daemon");
                    return self.lose(id, LossCause::HungUp);
                }
            };
            let message = match ToKeeper::decode(&packet) {
                Ok((message, expected)) if expected == fds.len() => Ok(message),
                Ok(_) => Err(WireError::Descriptors),
                Err(error) => Err(error),
            };
            match message {
                Ok(message) => self.handle(id, message, fds),
                Err(error) => {
                    tracing::warn!(%error, pid = connection.pid, "not a daemon's message");
                    return self.lose(id, LossCause::Garbage);
                }
            }
        }
    }

    fn handle(&mut self, id: u64, message: ToKeeper, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.heard = Instant::now();
        let pid = connection.pid;
        match message {
            ToKeeper::Hello { name, held, leaving } if connection.hello.is_none() => {
                tracing::info!(pid, name, held, leaving, "a daemon joined");
                connection.hello = Some(name);
                connection.to_come = held;
                connection.leaving = leaving;
                connection.push(&ToDaemon::Role(Role::Standby), None);
                if held == 0 {
                    self.settle(id);
                }
            }
            _ if connection.hello.is_none() => self.lose(id, LossCause::Garbage),
            ToKeeper::Hello { .. } => self.lose(id, LossCause::Garbage),
            ToKeeper::Heartbeat { progress: _ } => {}
            ToKeeper::Held { volume, generation, init, config } => {
                let (Some(to_come), Ok(fds)) = (connection.to_come.checked_sub(1), fds.try_into()) else {
                    return self.lose(id, LossCause::Garbage);
                };
                connection.to_come = to_come;
                match Means::check(init, config, fds) {
                    Ok(means) => self.take_back(id, &volume, generation, means),
                    Err(error) => tracing::warn!(volume, pid, %error, "a daemon gives back what is not taken"),
                }
                if to_come == 0 {
                    self.settle(id);
                }
            }
            ToKeeper::Holding { volume } => {
                if self.volumes.contains_key(&volume) {
                    connection.holds.insert(volume);
                }
            }
            ToKeeper::Leaving => connection.leaving = true,
            ToKeeper::Attached { volume, generation } => {
                if self.volumes.contains_key(&volume) {
                    connection.holds.insert(volume.clone());
                }
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
            ToKeeper::OpenBacking { volume, node } => {
                let [file] = fds.as_slice() else { return self.lose(id, LossCause::Garbage) };
                let result = match self.volumes.get_mut(&volume) {
                    Some(found) => found.open_backing(id, node, file).map_err(|error| error.to_string()),
                    None => Err("no such volume".to_owned()),
                };
                connection.push(&ToDaemon::Backing { volume, node, result }, None);
            }
            ToKeeper::CloseBacking { volume, node, id: backing } => {
                if let Some(found) = self.volumes.get_mut(&volume)
                    && let Err(error) = found.close_backing(id, node, backing)
                {
                    tracing::warn!(volume, node, backing, %error, "a backing id cannot be closed");
                }
            }
            ToKeeper::Health { volume, health } => {
                if let Some(found) = self.volumes.get_mut(&volume)
                    && found.tell_health(id, &health)
                {
                    tracing::info!(volume, ?health, "the health of a volume changed");
                }
            }
        }
    }

    fn activate(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        tracing::info!(pid = connection.pid, "a daemon is active");
        connection.push(&ToDaemon::Role(Role::Active), None);
        self.active = Some(id);
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
        self.expire_awaited(now);
        let mut stuck = Vec::new();
        for volume in self.volumes.values_mut() {
            if let Some(connection) = volume.attach_overdue(now, &self.options) {
                stuck.push(connection);
            }
            if volume.abort_due(now, &self.options) {
                volume.state = State::Aborting;
                let (info, fuse) = volume.mount();
                abort(info, fuse, self.inbox.sender.clone(), Arc::clone(&self.inbox.wake));
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

    /// Makes a standby active when there is no active daemon, and offers what nobody serves.
    fn schedule(&mut self) {
        let unsure = !self.awaited.is_empty() || self.dying.iter().any(|dying| !dying.lingers);
        let daemons = if unsure { Vec::new() } else { self.candidates() };
        let now = Instant::now();
        for volume in self.volumes.values_mut() {
            if let Some((id, message)) = volume.offer(&daemons, now)
                && let Some(connection) = self.connections.get_mut(&id)
            {
                // Before it is told: the packet leaves at the end of this round.
                if let Some(succession) = &mut self.succession {
                    succession.add(connection.pid);
                }
                connection.push(&message, Some(volume.name().to_owned()));
            }
        }
    }

    /// The daemons in the order in which they are asked to serve: the active one (made so now, if there is none), then
    /// the others.
    fn candidates(&mut self) -> Vec<u64> {
        // The oldest first: it has had the most time to make itself ready.
        let able = self.connections.iter().filter(|(_, connection)| connection.settled() && !connection.leaving);
        let mut daemons: Vec<u64> = able.map(|(id, _)| *id).collect();
        if self.active.is_none()
            && let Some(id) = daemons.first()
        {
            self.activate(*id);
        }
        daemons.sort_by_key(|id| self.active != Some(*id));
        daemons
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
        let holders = |volume: &Volume| {
            self.connections.values().filter(|connection| connection.holds.contains(volume.name())).count() as u64
        };
        status.volumes = self.volumes.values().map(|volume| volume.status(pid_of, holders(volume))).collect();
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
