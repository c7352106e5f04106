//! One volume: its descriptors, and who serves it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::VolumeState;
use crate::handover::ToDaemon;
use crate::health::{Health, VACANT};
use crate::keeper::{Event, KeeperOptions, VolumeStatus};
use crate::mount::{MountInfo, Mounted};
use crate::sys;
use crate::tables::{AttachError, CounterSnapshot, Counters, NodeStats, NodeTable, OpenTable};

/// A volume that every daemon refused is offered again after this, twice this, and so on: what passes (descriptors or
/// memory that ran out, a file that is being replaced) passes in seconds.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest of these pauses.
const PAUSE_MAX: Duration = Duration::from_secs(4);

/// Who serves a volume. `since`: since when nobody has served it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Mounted by an earlier keeper; a daemon may give back what is needed to have it served.
    Returning {
        since: Instant,
    },
    Vacant {
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

/// Who could not serve a volume, since it was served last.
#[derive(Default)]
struct Refusals {
    /// Connections of the daemons that said so, and are not asked again before the others.
    by: BTreeSet<u64>,
    /// All there are have refused: until then nobody is asked.
    until: Option<Instant>,
    /// Such rounds.
    rounds: u32,
}

/// What a daemon needs to serve a volume.
pub(crate) struct Means {
    pub(crate) fuse: OwnedFd,
    pub(crate) init: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) nodes: NodeTable,
    pub(crate) opens: OpenTable,
    pub(crate) counters: Counters,
}

/// Why what a daemon gave back is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum MeansError {
    #[error("no FUSE descriptor: {0}")]
    Fuse(#[from] std::io::Error),
    #[error(transparent)]
    Table(#[from] AttachError),
}

impl Means {
    /// Of what a daemon gave back: it is not trusted with more than what it could do before, which is to serve this volume
    /// badly. Nothing asked here of a descriptor can wait for whoever made it.
    pub(super) fn check(init: Vec<u8>, config: Vec<u8>, fds: [OwnedFd; 4]) -> Result<Self, MeansError> {
        let [fuse, nodes, opens, counters] = fds;
        sys::check_fuse(&fuse)?;
        let (nodes, opens) = (NodeTable::attach(nodes)?, OpenTable::observe(opens)?);
        Ok(Self { fuse, init, config, nodes, opens, counters: Counters::attach(counters)? })
    }

    /// Whether the connection was ended by an unmount or an abort.
    pub(super) fn ended(&self) -> bool {
        sys::fuse_ended(&self.fuse)
    }
}

pub(crate) struct Volume {
    pub(super) info: MountInfo,
    /// `None` only while it is returning, and when it ended without.
    pub(super) means: Option<Means>,
    pub(super) state: State,
    refusals: Refusals,
    /// Attachments sent.
    generation: u64,
    /// Whether one was ever answered, or may have been at work.
    served: bool,
    takeovers: u64,
    last_takeover: Option<Duration>,
    pub(super) late_resends: u64,
    /// What the daemon that serves it, or served it last, said.
    health: Option<Health>,
    /// Open backing ids by node, as far as this keeper opened them. The open table has all that are in use; these are for a
    /// daemon that died before it wrote there.
    backings: BTreeMap<u64, u32>,
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
        let means = Means { fuse, init, config, nodes, opens, counters };
        Self::with(info, Some(means), State::Vacant { since: Instant::now() })
    }

    /// One that an earlier keeper mounted.
    pub(crate) fn returning(info: MountInfo) -> Self {
        Self::with(info, None, State::Returning { since: Instant::now() })
    }

    fn with(info: MountInfo, means: Option<Means>, state: State) -> Self {
        Self {
            info,
            means,
            state,
            refusals: Refusals::default(),
            generation: 0,
            served: false,
            takeovers: 0,
            last_takeover: None,
            late_resends: 0,
            health: None,
            backings: BTreeMap::new(),
        }
    }

    /// The backing id of a node for the daemon that serves this volume: `file`'s, unless there is one.
    pub(super) fn open_backing(&mut self, connection: u64, node: u64, file: &OwnedFd) -> io::Result<u32> {
        let means = self.served_by(connection)?;
        if let Some(id) = self.backings.get(&node) {
            return Ok(*id);
        }
        sys::check_backing(file)?;
        let id = sys::open_backing(&means.fuse, file)?;
        self.backings.insert(node, id);
        Ok(id)
    }

    /// Nothing has the node open any more. What this keeper does not know was opened by the one before.
    pub(super) fn close_backing(&mut self, connection: u64, node: u64, id: u32) -> io::Result<()> {
        let means = self.served_by(connection)?;
        sys::close_backing(&means.fuse, id)?;
        self.backings.remove(&node);
        Ok(())
    }

    fn served_by(&self, connection: u64) -> io::Result<&Means> {
        let serves = self.state == State::Served { connection };
        let means = self.means.as_ref().filter(|_| serves);
        means.ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "another daemon serves the volume"))
    }

    pub(super) fn name(&self) -> &str {
        &self.info.volume
    }

    /// When something is due although nothing happens.
    pub(super) fn deadline(&self, options: &KeeperOptions) -> Option<Instant> {
        match self.state {
            State::Returning { since } => Some(since + options.rejoin),
            State::Vacant { since } => {
                let abort = since + options.abort_after;
                Some(self.refusals.until.map_or(abort, |until| until.min(abort)))
            }
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
            State::Returning { since } => now >= since + options.rejoin,
            State::Vacant { since } | State::Attaching { since, .. } => now >= since + options.abort_after,
            State::Served { .. } | State::Aborting | State::Aborted | State::Vanished => false,
        }
    }

    /// Chooses one of `daemons` (connections, in the order in which they are to be asked) when nobody serves this volume,
    /// and gives the message for it. One that refused is asked after all others, after a pause.
    pub(super) fn offer(&mut self, daemons: &[u64], now: Instant) -> Option<(u64, ToDaemon)> {
        let (State::Vacant { since }, Some(means)) = (self.state, &self.means) else { return None };
        if self.refusals.until.is_some_and(|until| now >= until) {
            self.refusals.until = None;
            self.refusals.by.clear();
        }
        let Some(connection) = daemons.iter().copied().find(|daemon| !self.refusals.by.contains(daemon)) else {
            if !daemons.is_empty() && self.refusals.until.is_none() {
                let pause = PAUSE_MIN.saturating_mul(1 << self.refusals.rounds.min(8)).min(PAUSE_MAX);
                self.refusals.rounds += 1;
                self.refusals.until = Some(now + pause);
            }
            return None;
        };
        self.generation += 1;
        self.state = State::Attaching { connection, sent: now, since };
        let message = ToDaemon::Attach {
            volume: self.info.volume.clone(),
            generation: self.generation,
            // From the second attachment on: the first may have died after it took requests and before it said so.
            first: self.generation == 1,
            init: means.init.clone(),
            config: means.config.clone(),
        };
        Some((connection, message))
    }

    /// Its mount, and its descriptor if there is one.
    pub(super) fn mount(&self) -> (MountInfo, Option<OwnedFd>) {
        let fuse = self.means.as_ref().and_then(|means| means.fuse.try_clone().ok());
        (self.info.clone(), fuse)
    }

    /// The message for a daemon that is to hold it; `None` while there is nothing to hold.
    pub(super) fn prepare(&self) -> Option<ToDaemon> {
        let Means { init, config, .. } = self.means.as_ref()?;
        Some(ToDaemon::Prepare { volume: self.info.volume.clone(), init: init.clone(), config: config.clone() })
    }

    /// Takes back what a daemon holds; false when it is not needed.
    pub(super) fn take_back(&mut self, means: Means) -> bool {
        let State::Returning { since } = self.state else { return false };
        self.means = Some(means);
        self.state = State::Vacant { since };
        // Somebody served it, who may have taken requests: the next one asks for them again.
        self.generation = self.generation.max(1);
        self.served = true;
        true
    }

    /// A daemon says that it serves this volume since before this keeper began. False when another one does.
    pub(super) fn resume(&mut self, connection: u64, generation: u64) -> bool {
        match self.state {
            State::Vacant { .. } => {
                self.generation = self.generation.max(generation);
                self.state = State::Served { connection };
                true
            }
            State::Served { connection: by } | State::Attaching { connection: by, .. } => by == connection,
            // Its end is known, or will be soon.
            State::Returning { .. } | State::Aborting | State::Aborted | State::Vanished => true,
        }
    }

    /// Whether what a daemon gives back is of this mount, and not of an earlier one by the same name: each has its own tables.
    pub(super) fn is_of(&self, given: &Means) -> bool {
        self.means.as_ref().is_none_or(|means| means.nodes.same(&given.nodes).unwrap_or(false))
    }

    /// Whether it needs somebody who holds it.
    pub(super) fn is_live(&self) -> bool {
        match self.state {
            State::Vacant { .. } | State::Attaching { .. } | State::Served { .. } => true,
            State::Returning { .. } | State::Aborting | State::Aborted | State::Vanished => false,
        }
    }

    /// A daemon says that it serves; `None` when it is not the one that was asked last.
    pub(super) fn attached(&mut self, connection: u64, pid: i32, generation: u64) -> Option<Event> {
        let State::Attaching { connection: asked, since, .. } = self.state else { return None };
        if asked != connection || generation != self.generation {
            return None;
        }
        self.state = State::Served { connection };
        self.refusals = Refusals::default();
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

    /// A daemon says that it can not, and so does not read the descriptor; false when it was not asked.
    pub(super) fn failed(&mut self, connection: u64, generation: u64) -> bool {
        let State::Attaching { connection: asked, since, .. } = self.state else { return false };
        let asked = asked == connection && generation == self.generation;
        if asked {
            self.state = State::Vacant { since };
            self.refusals.by.insert(connection);
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

    /// A daemon says how the volume is; true when it serves the volume and says something new.
    pub(super) fn tell_health(&mut self, connection: u64, health: &Health) -> bool {
        let news = self.state == State::Served { connection } && self.health.as_ref() != Some(health);
        if news {
            self.health = Some(health.clone());
        }
        news
    }

    /// What its daemon says, or that it has none. Over a take-over the last word counts.
    fn health(&self, now: Instant) -> Option<Health> {
        match self.state {
            State::Returning { since } | State::Vacant { since } | State::Attaching { since, .. } => {
                let vacant = now.duration_since(since);
                if vacant > VACANT { Some(Health::no_daemon(vacant)) } else { self.health.clone() }
            }
            State::Served { .. } => self.health.clone(),
            State::Aborting | State::Aborted | State::Vanished => Some(Health::ended()),
        }
    }

    /// The name, when somebody else has ended the connection since the last look.
    pub(super) fn probe(&mut self) -> Option<String> {
        if matches!(self.state, State::Aborting | State::Aborted | State::Vanished) {
            return None;
        }
        let ended = self.means.as_ref().is_some_and(Means::ended);
        if ended {
            self.state = State::Vanished;
        }
        ended.then(|| self.info.volume.clone())
    }

    pub(super) fn status(&self, pid_of: impl Fn(u64) -> Option<i32>, holders: u64) -> VolumeStatus {
        let (state, connection) = match self.state {
            State::Returning { .. } => (VolumeState::Returning, None),
            State::Vacant { .. } => (VolumeState::Vacant, None),
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
            holders,
            health: self.health(Instant::now()),
            waiting: None,
            counters: self.means.as_ref().map_or_else(CounterSnapshot::default, |means| means.counters.snapshot()),
            nodes: self.means.as_ref().map_or_else(NodeStats::default, |means| means.nodes.stats()),
            handles_high_water: self.means.as_ref().map_or(0, |means| means.opens.high_water()),
            backings: self.backings.len() as u64,
        }
    }
}

/// Saturates after half a billion years.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
