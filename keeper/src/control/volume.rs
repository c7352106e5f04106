//! One volume: its descriptors, and who serves it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::VolumeState;
use crate::handover::ToDaemon;
use crate::keeper::{Event, KeeperOptions, VolumeStatus};
use crate::mount::{MountInfo, Mounted};
use crate::tables::{Counters, NodeTable, OpenTable};

/// Who serves a volume. `since`: since when nobody has served it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Vacant {
        since: Instant,
    },
    /// A daemon said that it can not; the next one is asked.
    Failed {
        since: Instant,
    },
    Attaching {
        connection: u64,
        sent: Instant,
        since: Instant,
    },
    Served {
        connection: u64,
    },
    Aborting,
    Aborted,
    /// Somebody else ended the connection.
    Vanished,
}

pub(crate) struct Volume {
    pub(super) info: MountInfo,
    pub(super) fuse: OwnedFd,
    init: Vec<u8>,
    pub(super) config: Vec<u8>,
    pub(super) nodes: NodeTable,
    pub(super) opens: OpenTable,
    pub(super) counters: Counters,
    pub(super) state: State,
    /// Attachments sent.
    generation: u64,
    /// Whether one was ever answered, or may have been at work.
    served: bool,
    takeovers: u64,
    last_takeover: Option<Duration>,
    pub(super) late_resends: u64,
}

impl Volume {
    pub(crate) fn new(
        mounted: Mounted,
        config: Vec<u8>,
        nodes: NodeTable,
        opens: OpenTable,
        counters: Counters,
    ) -> Self {
        let Mounted { info, fuse, init } = mounted;
        let state = State::Vacant { since: Instant::now() };
        Self {
            info,
            fuse,
            init,
            config,
            nodes,
            opens,
            counters,
            state,
            generation: 0,
            served: false,
            takeovers: 0,
            last_takeover: None,
            late_resends: 0,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.info.volume
    }

    /// When something is due although nothing happens.
    pub(super) fn deadline(&self, options: &KeeperOptions) -> Option<Instant> {
        match self.state {
            State::Vacant { since } | State::Failed { since } => Some(since + options.abort_after),
            State::Attaching { sent, since, .. } => {
                Some((sent + options.attach_timeout).min(since + options.abort_after))
            }
            State::Served { .. } | State::Aborting | State::Aborted | State::Vanished => None,
        }
    }

    /// The daemon that was told to attach too long ago.
    pub(super) fn attach_overdue(&self, now: Instant, options: &KeeperOptions) -> Option<u64> {
        match self.state {
            State::Attaching { connection, sent, .. } if now >= sent + options.attach_timeout => Some(connection),
            _ => None,
        }
    }

    /// Whether nobody has served it for too long.
    pub(super) fn abort_due(&self, now: Instant, options: &KeeperOptions) -> bool {
        match self.state {
            State::Vacant { since } | State::Failed { since } | State::Attaching { since, .. } => {
                now >= since + options.abort_after
            }
            State::Served { .. } | State::Aborting | State::Aborted | State::Vanished => false,
        }
    }

    /// The message for a daemon that is to serve it, when nobody does.
    pub(super) fn attach_to(&mut self, connection: u64) -> Option<ToDaemon> {
        let State::Vacant { since } = self.state else { return None };
        self.generation += 1;
        self.state = State::Attaching { connection, sent: Instant::now(), since };
        Some(ToDaemon::Attach {
            volume: self.info.volume.clone(),
            generation: self.generation,
            // From the second attachment on: the first may have died after it took requests and before it said so.
            first: self.generation == 1,
            init: self.init.clone(),
            config: self.config.clone(),
        })
    }

    /// A daemon says that it serves; `None` when it is not the one that was asked last.
    pub(super) fn attached(&mut self, connection: u64, pid: i32, generation: u64) -> Option<Event> {
        let State::Attaching { connection: asked, since, .. } = self.state else { return None };
        if asked != connection || generation != self.generation {
            return None;
        }
        self.state = State::Served { connection };
        let volume = self.info.volume.clone();
        if !self.served {
            self.served = true;
            return Some(Event::Attached { volume, pid });
        }
        let took = since.elapsed();
        self.takeovers += 1;
        self.last_takeover = Some(took);
        Some(Event::TakenOver { volume, pid, generation, millis: millis(took) })
    }

    /// A daemon says that it can not; false when it was not asked.
    pub(super) fn failed(&mut self, connection: u64, generation: u64) -> bool {
        let State::Attaching { connection: asked, since, .. } = self.state else { return false };
        let asked = asked == connection && generation == self.generation;
        if asked {
            self.state = State::Failed { since };
        }
        asked
    }

    /// The daemon on this connection is lost; true when it served this volume or was about to.
    pub(super) fn vacate(&mut self, connection: u64, now: Instant) -> bool {
        match self.state {
            State::Served { connection: by } if by == connection => {
                self.state = State::Vacant { since: now };
                true
            }
            State::Attaching { connection: by, since, .. } if by == connection => {
                self.state = State::Vacant { since };
                true
            }
            _ => false,
        }
    }

    /// Another daemon is active: it is asked for what its predecessor could not do.
    pub(super) fn forgive(&mut self) {
        if let State::Failed { since } = self.state {
            self.state = State::Vacant { since };
        }
    }

    /// The name, when somebody else has ended the connection since the last look.
    pub(super) fn probe(&mut self) -> Option<String> {
        if matches!(self.state, State::Aborting | State::Aborted | State::Vanished) {
            return None;
        }
        // Asked for nothing but errors, and not waiting: a waiting poll would be woken by every request.
        let mut fds = [PollFd::new(&self.fuse, PollFlags::empty())];
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended =
            matches!(rustix::event::poll(&mut fds, Some(&zero)), Ok(1..)) && fds[0].revents().contains(PollFlags::ERR);
        if ended {
            self.state = State::Vanished;
        }
        ended.then(|| self.info.volume.clone())
    }

    pub(super) fn status(&self, pid_of: impl Fn(u64) -> Option<i32>) -> VolumeStatus {
        let (state, connection) = match self.state {
            State::Vacant { .. } | State::Failed { .. } => (VolumeState::Vacant, None),
            State::Attaching { connection, .. } => (VolumeState::Attaching, Some(connection)),
            State::Served { connection } => (VolumeState::Served, Some(connection)),
            State::Aborting | State::Aborted | State::Vanished => (VolumeState::Aborted, None),
        };
        VolumeStatus {
            mount: self.info.clone(),
            state,
            daemon: connection.and_then(pid_of),
            generation: self.generation,
            takeovers: self.takeovers,
            last_takeover_millis: self.last_takeover.map(millis),
            late_resends: self.late_resends,
            waiting: None,
            counters: self.counters.snapshot(),
            nodes: self.nodes.stats(),
            handles_high_water: self.opens.high_water(),
        }
    }
}

/// Saturates after half a billion years.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
