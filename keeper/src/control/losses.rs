//! Daemons that are lost, until they are gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use rustix::process::Signal;

use super::volume::State;
use super::{Command, Control};
use crate::handover::Role;
use crate::keeper::{self, Event, LossCause};
use crate::mount::{MountInfo, fusectl, teardown};
use crate::notify::notify_resend;
use crate::sys;

/// A daemon that was killed and is not known to be gone.
pub(super) struct Dying {
    pub(super) pidfd: OwnedFd,
    pub(super) pid: i32,
    /// Until then its successor waits.
    pub(super) deadline: Instant,
    pub(super) lingers: bool,
    /// The volumes that it may hold requests of.
    pub(super) volumes: Vec<String>,
}

impl Control {
    /// Ends a connection. A daemon on it is killed for certain, and its volumes are vacant.
    pub(super) fn lose(&mut self, id: u64, cause: LossCause) {
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
        if connection.let_go {
            tracing::info!(pid, ?role, "a daemon has left");
        } else {
            tracing::warn!(pid, ?role, ?cause, "a daemon is lost");
        }
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

    /// Finds daemons that die, killed ones that are gone, and those that take too long for that.
    pub(super) fn reap(&mut self) {
        let now = Instant::now();
        let dying = self.connections.iter().filter(|(_, c)| c.is_suspect() && sys::is_dying(c.pid));
        for id in dying.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.lose(id, LossCause::HungUp);
        }
        self.awaited.retain(|awaited| awaited.process.as_ref().is_none_or(|(_, pidfd)| !sys::is_readable(pidfd)));
        let mut index = 0;
        while index < self.dying.len() {
            let dying = &mut self.dying[index];
            if sys::is_readable(&dying.pidfd) {
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
}

pub(super) fn kill(pid: i32, pidfd: &OwnedFd) {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        // Dead already, most of the time.
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => tracing::error!(pid, %error, "cannot kill a daemon"),
    }
}

/// Aborts on a thread of its own (which has a deadline) and reports.
pub(super) fn abort(info: MountInfo, fuse: Option<OwnedFd>, sender: mpsc::Sender<Command>, wake: Arc<OwnedFd>) {
    let report = move || {
        // One that was unmounted meanwhile is as good as aborted, and its device number may mean another one.
        let aborted = match (fuse, teardown::is_mounted(&info.target, info.device)) {
            (Some(fuse), _) if sys::fuse_ended(&fuse) => Ok(()),
            (Some(_), _) | (None, Ok(true)) => fusectl::abort(info.device, &info.target),
            (None, Ok(false)) => Ok(()),
            (None, Err(error)) => Err(error),
        };
        let error = aborted.err().map(|error| error.to_string());
        // Fails when the keeper has ended.
        let _ = sender.send(Command::AbortDone { volume: info.volume, connection: info.connection, error });
        keeper::wake(&wake);
    };
    if let Err(error) = std::thread::Builder::new().name("keeper-abort".to_owned()).spawn(report) {
        tracing::error!(%error, "cannot start a thread to abort a connection");
    }
}
