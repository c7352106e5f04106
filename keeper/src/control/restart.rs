//! Keepers end, daemons end, and the mounts go on.
//!
//! Life of a restart: the volumes of the earlier keeper are *returning*, the daemons that it had told to serve and that
//! live are *awaited* -> daemons connect and give back what they hold -> those that serve go on serving, and nothing is
//! offered to anybody before all that are awaited have said so, died, or been killed because they were too late.
//!
//! Leaving: a keeper goes when daemons that stay hold everything, a daemon when a keeper that stays does. Each counts only
//! what the other has confirmed, and one that is leaving itself does not count.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::losses::{Dying, kill};
use super::volume::{Means, State};
use super::{Control, End, Succession, Volume};
use crate::handover::{Role, ToDaemon};
use crate::keeper::{Event, LossCause};
use crate::mount::MountInfo;

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

impl Legacy {
    /// Whom to wait for before anybody is told to serve.
    pub(super) fn awaited(&mut self, rejoin: Duration) -> Vec<Awaited> {
        let until = Instant::now() + rejoin;
        let known = std::mem::take(&mut self.servers).into_iter();
        let known = known.map(|process| Awaited { process: Some(process), until });
        let unknown = self.unknown_servers.then_some(Awaited { process: None, until });
        // Where there is nothing to serve, nobody serves.
        if self.volumes.is_empty() { Vec::new() } else { known.chain(unknown).collect() }
    }
}

/// A daemon that was told to serve by an earlier keeper.
pub(super) struct Awaited {
    /// `None`: any.
    pub(super) process: Option<(i32, OwnedFd)>,
    pub(super) until: Instant,
}

/// Whoever asked this keeper to leave.
pub(super) struct Leave {
    pub(super) deadline: Instant,
    pub(super) reply: mpsc::SyncSender<Vec<String>>,
}

impl Control {
    /// A daemon holds a volume since before this connection; `generation`: and serves it, unless 0.
    pub(super) fn take_back(&mut self, id: u64, name: &str, generation: u64, means: Means) {
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
        if !found.is_of(&means) {
            // The record of that one was lost, and its name was taken. Whoever settles is told to hold the new one.
            tracing::warn!(volume, pid, "a daemon holds an earlier mount of a volume: it lets go of it");
            return connection.push(&ToDaemon::Detach { volume }, None);
        }
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
    pub(super) fn settle(&mut self, id: u64) {
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

    /// Daemons that have not come back in time are stopped or stuck.
    pub(super) fn expire_awaited(&mut self, now: Instant) {
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

    /// Lets daemons go, and goes: one only when the other holds everything and stays.
    pub(super) fn part(&mut self) {
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
}
