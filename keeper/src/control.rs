//! The control thread: the one place that decides who serves.
//!
//! It owns every descriptor, table and connection, so nothing is locked. It waits in poll(2) for daemons, commands and
//! the ends of killed processes, and makes no call that can block: sends and receives are non-blocking, aborts have a
//! thread of their own. (One small file is written when another daemon begins to serve.)
//!
//! Life of a hand-over: a connection is lost (hung up, silent, garbage) -> SIGKILL through its pidfd, whatever the
//! reason, so that "lost" always means "dead" -> its volumes are vacant -> the pidfd becomes readable, or `kill_wait`
//! passes -> the oldest standby is active and is sent every vacant volume -> it says `Attached`.
//!
//! A daemon that says `AttachFailed` is lost for that volume only: the volume is offered to the next one, and when all
//! have refused, to the active one again after a pause. So a standby may come to serve a volume.
//!
//! Life of a restart: the volumes of the earlier keeper are *returning*, the daemons that it had told to serve and that
//! live are *awaited* -> daemons connect and give back what they hold -> those that serve go on serving, and nothing is
//! offered to anybody before all that are awaited have said so, died, or been killed because they were too late.

mod connection;
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
use rustix::process::Signal;
use tokio::sync::mpsc as events;

use crate::handover::socket::{self, Received};
use crate::handover::{Role, ToDaemon, ToKeeper, WireError};
use crate::keeper::{self, Event, KeeperOptions, KeeperStatus, LossCause, VolumeState};
use crate::mount::{MountInfo, fusectl};
use crate::notify::notify_resend;
use crate::sys;

use connection::Connection;
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
        reply: mpsc::SyncSender<Option<MountInfo>>,
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

/// What an earlier keeper left.
#[derive(Default)]
pub(crate) struct Legacy {
    pub(crate) volumes: Vec<MountInfo>,
    /// Where it is recorded who serves; `None`: nowhere.
    pub(crate) succession: Option<Succession>,
    /// Daemons that may serve these volumes: process and pidfd.
    pub(crate) servers: Vec<(i32, OwnedFd)>,
    /// There may be others: it was not recorded, or the record is lost.
    pub(crate) unknown_servers: bool,
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

/// A daemon that was told to serve by an earlier keeper.
struct Awaited {
    /// `None`: any.
    process: Option<(i32, OwnedFd)>,
    until: Instant,
}

/// Whoever asked this keeper to leave.
struct Leave {
    deadline: Instant,
    reply: mpsc::SyncSender<Vec<String>>,
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
        legacy: Legacy,
    ) -> Self {
        let Legacy { volumes, succession, servers, unknown_servers } = legacy;
        let until = Instant::now() + options.rejoin;
        let known = servers.into_iter().map(|process| Awaited { process: Some(process), until });
        let unknown = unknown_servers.then_some(Awaited { process: None, until });
        // Where there is nothing to serve, nobody serves.
        let awaited = if volumes.is_empty() { Vec::new() } else { known.chain(unknown).collect() };
        let volumes = volumes.into_iter().map(|info| (info.volume.clone(), Volume::returning(info))).collect();
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
            succession,
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
        for dying in &self.dying {
            fds.push(PollFd::new(&dying.pidfd, PollFlags::IN));
        }
        for (_, pidfd) in self.awaited.iter().filter_map(|awaited| awaited.process.as_ref()) {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
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
        let awaited = self.awaited.iter().map(|awaited| awaited.until);
        let leave = self.leave.iter().map(|leave| leave.deadline);
        connections
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
            ToKeeper::Health { volume, health } => {
                if let Some(found) = self.volumes.get_mut(&volume)
                    && found.tell_health(id, &health)
                {
                    tracing::info!(volume, ?health, "the health of a volume changed");
                }
            }
        }
    }

    /// A daemon holds a volume since before this connection; `generation`: and serves it, unless 0.
    fn take_back(&mut self, id: u64, name: &str, generation: u64, means: Means) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (pid, volume) = (connection.pid, name.to_owned());
        let Some(found) = self.volumes.get_mut(name) else {
            if means.ended() {
                connection.push(&ToDaemon::Detach { volume }, None);
            } else {
                tracing::warn!(volume, pid, "a daemon holds a volume that is not on record");
                connection.unclaimed = true;
                self.tell(Event::Unclaimed { volume, pid });
            }
            return;
        };
        connection.holds.insert(volume.clone());
        let taken = found.take_back(means);
        if generation > 0 {
            let before = found.state;
            if !found.resume(id, generation) {
                return self.lose(id, LossCause::Rival);
            }
            if found.state != before {
                tracing::info!(volume, pid, "a volume is served as before");
                self.tell(Event::Resumed { volume, pid });
            }
        }
        if taken {
            self.prepare(name);
        }
    }

    /// A daemon has said all that it begins with.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let pid = connection.pid;
        for volume in self.volumes.values() {
            if !connection.holds.contains(volume.name())
                && let Some(message) = volume.prepare()
            {
                connection.push(&message, Some(volume.name().to_owned()));
            }
        }
        // A process id means another process only when this one is gone, and then its descriptor says so.
        self.awaited.retain(|awaited| awaited.process.as_ref().is_none_or(|(awaited, _)| *awaited != pid));
        let serves = |volume: &Volume| volume.state == State::Served { connection: id };
        if self.active.is_none() && self.volumes.values().any(serves) {
            self.activate(id);
        }
        let role = if self.active.is_none_or(|active| active == id) { Role::Active } else { Role::Standby };
        self.tell(Event::DaemonJoined { pid, role });
    }

    fn activate(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        tracing::info!(pid = connection.pid, "a daemon is active");
        connection.push(&ToDaemon::Role(Role::Active), None);
        self.active = Some(id);
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
            LossCause::AttachTimeout | LossCause::Garbage | LossCause::Backlog | LossCause::Rival => {
                self.totals.kills_other += 1;
            }
        }
        tracing::warn!(pid, ?role, ?cause, "a daemon is lost");
        kill(pid, &connection.pidfd);
        let now = Instant::now();
        let mut volumes = Vec::new();
        for volume in self.volumes.values_mut() {
            if volume.vacate(id, now) {
                volumes.push(volume.name().to_owned());
            }
        }
        if self.active == Some(id) {
            self.active = None;
        }
        if role == Role::Active || !volumes.is_empty() {
            let deadline = now + self.options.kill_wait;
            self.dying.push(Dying { pidfd: connection.pidfd, pid, deadline, lingers: false, volumes });
        }
        self.tell(Event::DaemonLost { pid, role, cause });
    }

    /// Finds killed daemons that are gone, and those that take too long.
    fn reap(&mut self) {
        let now = Instant::now();
        self.awaited.retain(|awaited| awaited.process.as_ref().is_none_or(|(_, pidfd)| !is_gone(pidfd)));
        let mut index = 0;
        while index < self.dying.len() {
            let dying = &mut self.dying[index];
            if is_gone(&dying.pidfd) {
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
                let Some(means) = &volume.means else { continue };
                match notify_resend(&means.fuse) {
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
        self.expire_awaited(now);
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

    /// Daemons that have not come back in time are stopped or stuck.
    fn expire_awaited(&mut self, now: Instant) {
        let (late, awaited) = std::mem::take(&mut self.awaited).into_iter().partition(|awaited| awaited.until <= now);
        self.awaited = awaited;
        let late: Vec<Awaited> = late;
        for (pid, pidfd) in late.into_iter().filter_map(|awaited| awaited.process) {
            tracing::warn!(pid, "a daemon that served has not come back");
            kill(pid, &pidfd);
            self.totals.kills_silent += 1;
            let volumes = self.volumes.keys().cloned().collect();
            self.dying.push(Dying { pidfd, pid, deadline: now + self.options.kill_wait, lingers: false, volumes });
            self.tell(Event::DaemonLost { pid, role: Role::Active, cause: LossCause::Silent });
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

    /// Lets daemons go, and goes: one only when the other holds everything and stays.
    fn part(&mut self) {
        if let Some(Leave { deadline, reply }) = &self.leave {
            let unheld = self.unheld();
            if unheld.is_empty() || Instant::now() >= *deadline {
                // Whoever asked may have given up.
                let _ = reply.send(unheld);
                self.end = Some(End::Leave);
            }
            return;
        }
        let held_here =
            |volume: &String| self.volumes.get(volume).is_none_or(|volume| volume.means.is_some() || !volume.is_live());
        for connection in self.connections.values_mut().filter(|c| c.leaving && !c.let_go && c.settled()) {
            if !connection.unclaimed && connection.holds.iter().all(held_here) {
                tracing::info!(pid = connection.pid, "a daemon may go");
                connection.let_go = true;
                connection.push(&ToDaemon::Go, None);
            }
        }
    }

    /// Volumes that would end with this keeper.
    fn unheld(&self) -> Vec<String> {
        let staying = || self.connections.values().filter(|connection| connection.settled() && !connection.leaving);
        let live = self.volumes.values().filter(|volume| volume.is_live()).map(Volume::name);
        live.filter(|name| !staying().any(|connection| connection.holds.contains(*name))).map(str::to_owned).collect()
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

fn kill(pid: i32, pidfd: &OwnedFd) {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        // Dead already, most of the time.
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => tracing::error!(pid, %error, "cannot kill a daemon"),
    }
}

/// Whether every thread of the process has ended.
fn is_gone(pidfd: &OwnedFd) -> bool {
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&zero)), Ok(1..))
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
