//! The keeper's handle: mounts, unmounts, status, events. What decides is in `control`.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use serde::Serialize;
use tokio::sync::mpsc as events;

use crate::control::{Command, Control, Inbox, Legacy, Succession, Volume};
use crate::handover::{MAX_CONFIG, MAX_VOLUME, Role, socket};
use crate::health::Health;
use crate::mount::state::{Record, StateFile, succession_path};
use crate::mount::{self, Cleaned, Loss, MountError, MountInfo, MountSpec, TakenDown, check_target, fusectl, teardown};
use crate::tables::{
    CounterSnapshot, Counters, DEFAULT_MAX_HANDLES, DEFAULT_NODE_ARENA, NodeStats, NodeTable, OpenTable,
};

/// Events that wait for their receiver; more are dropped and counted.
const EVENTS: usize = 1024;
/// The control thread does nothing that blocks; an answer takes microseconds.
const ANSWER: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// How a keeper behaves.
#[derive(Clone, Debug)]
pub struct KeeperOptions {
    /// Where daemons connect. The directory is the caller's; what is at the path is replaced.
    pub socket: PathBuf,
    /// Who may be a daemon, beside this process's own user.
    pub allowed_uids: Vec<u32>,
    /// The record of what is mounted, by which the next keeper cleans up after one that was killed, or goes on where that
    /// one stopped. `None`: no record. It means nothing after a reboot: best in a file system in memory.
    pub state_file: Option<PathBuf>,
    /// What to do with mounts of an earlier keeper that are on record: take them over from daemons that have outlived it,
    /// or (false) take them down.
    pub resume: bool,
    /// How long daemons that have outlived an earlier keeper have to come back. A mount that none of them holds is aborted
    /// then, and one that served and does not come back is killed. They try every 20 ms.
    pub rejoin: Duration,
    /// A daemon from which nothing is heard for so long is stopped or stuck: it is killed, and a standby takes over.
    pub heartbeat_timeout: Duration,
    /// A daemon that has not attached a volume after so long is stuck, too.
    pub attach_timeout: Duration,
    /// How long a killed daemon may take to be gone. After that it is in uninterruptible sleep, where it executes nothing,
    /// and its successor does not wait for it.
    pub kill_wait: Duration,
    /// A volume that nobody serves for so long is aborted: readers get an error.
    pub abort_after: Duration,
    /// Address space for each volume's node records, in bytes.
    pub node_arena: u64,
    /// Most open handles of a volume.
    pub max_handles: u64,
}

impl KeeperOptions {
    /// With the usual deadlines.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            allowed_uids: Vec::new(),
            state_file: None,
            resume: false,
            rejoin: Duration::from_secs(10),
            heartbeat_timeout: Duration::from_secs(3),
            attach_timeout: Duration::from_secs(15),
            kill_wait: Duration::from_secs(2),
            abort_after: Duration::from_secs(60),
            node_arena: DEFAULT_NODE_ARENA,
            max_handles: DEFAULT_MAX_HANDLES,
        }
    }
}

/// Why a keeper does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A volume of that name is mounted, or being mounted.
    #[error("volume '{0}' is mounted already")]
    Exists(String),
    /// No such volume.
    #[error("no volume '{0}' is mounted")]
    Unknown(String),
    /// The mount was not made.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The keeper's own thread is gone.
    #[error("the keeper has ended")]
    Ended,
    /// It is about to end: the next one mounts.
    #[error("the keeper is leaving")]
    Leaving,
    /// It has ended, and no daemon holds these volumes: their mounts have ended with it.
    #[error("nobody holds {0:?}")]
    Unheld(Vec<String>),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> KeeperError {
    move |source| KeeperError::System { what, source }
}

/// Why a daemon is not one any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LossCause {
    /// Its connection was closed: it died or left.
    HungUp,
    /// Nothing was heard from it: it was stopped or stuck, and was killed.
    Silent,
    /// It did not attach a volume in time, and was killed.
    AttachTimeout,
    /// It sent something that is no message, and was killed.
    Garbage,
    /// It did not read what was sent to it, and was killed.
    Backlog,
    /// It said that it serves what another one serves, and was killed.
    Rival,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Event {
    /// A daemon said hello.
    DaemonJoined {
        /// Process id, as seen from here.
        pid: i32,
        /// Active or standby.
        role: Role,
    },
    /// A daemon is gone.
    DaemonLost {
        /// Process id.
        pid: i32,
        /// What it was.
        role: Role,
        /// Why.
        cause: LossCause,
    },
    /// A volume is served for the first time.
    Attached {
        /// Which.
        volume: String,
        /// By whom.
        pid: i32,
    },
    /// A volume of an earlier keeper is served by the same daemon as before.
    Resumed {
        /// Which.
        volume: String,
        /// By whom.
        pid: i32,
    },
    /// A daemon holds a volume that is not on record: it is left as it is.
    Unclaimed {
        /// Which.
        volume: String,
        /// Who.
        pid: i32,
    },
    /// A volume is served again.
    TakenOver {
        /// Which.
        volume: String,
        /// By whom.
        pid: i32,
        /// Attachments of this volume so far.
        generation: u64,
        /// From the loss of the old daemon to the word of the new one.
        millis: u64,
    },
    /// A daemon says that it can not serve a volume.
    AttachFailed {
        /// Which.
        volume: String,
        /// Who.
        pid: i32,
        /// Why.
        error: String,
    },
    /// A killed daemon was not gone in time; its successor started without waiting.
    PredecessorLingers {
        /// Who.
        pid: i32,
    },
    /// It is gone now, and what it had taken was asked for again.
    PredecessorGone {
        /// Who.
        pid: i32,
    },
    /// Nobody served a volume for too long: readers get errors now. It has to be unmounted.
    Aborted {
        /// Which.
        volume: String,
        /// The abort itself failed.
        error: Option<String>,
    },
    /// Somebody else unmounted or aborted a volume.
    Vanished {
        /// Which.
        volume: String,
    },
}

/// What a volume is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum VolumeState {
    /// An earlier keeper mounted it, and no daemon has given it back yet.
    Returning,
    /// Nobody serves it: requests wait.
    Vacant,
    /// A daemon was told to serve it.
    Attaching,
    /// A daemon serves it.
    Served,
    /// Its connection was aborted.
    Aborted,
}

/// One volume.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    /// The mount.
    #[serde(flatten)]
    pub mount: MountInfo,
    /// What it is doing.
    pub state: VolumeState,
    /// The daemon that serves it, or is about to.
    pub daemon: Option<i32>,
    /// Attachments so far.
    pub generation: u64,
    /// Times that another daemon took over, under this keeper.
    pub takeovers: u64,
    /// How long the last one took.
    pub last_takeover_millis: Option<u64>,
    /// Times the keeper itself asked for requests again, after a predecessor that lingered.
    pub late_resends: u64,
    /// Daemons that hold its descriptors: what keeps the mount alive without this keeper.
    pub holders: u64,
    /// How it is; `None` while its daemon has not said so.
    pub health: Option<Health>,
    /// Requests that wait for an answer; `None` when fusectl is not to be had.
    pub waiting: Option<u64>,
    /// Requests by operation, over all daemons.
    pub counters: CounterSnapshot,
    /// Size of the node table.
    pub nodes: NodeStats,
    /// Most handles that were ever open at once.
    pub handles_high_water: u64,
    /// Nodes that this keeper had the kernel read from local files, and still has.
    pub backings: u64,
}

/// One daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonStatus {
    /// Process id, as seen from here.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// What it calls itself.
    pub name: String,
    /// Active or standby.
    pub role: Role,
    /// Milliseconds since it was last heard.
    pub silent_millis: u64,
}

/// Everything.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeeperStatus {
    /// By name.
    pub volumes: Vec<VolumeStatus>,
    /// In the order they joined.
    pub daemons: Vec<DaemonStatus>,
    /// Daemons that were killed because nothing was heard from them.
    pub kills_silent: u64,
    /// Daemons that were killed for other reasons of their own (no attach, garbage, backlog).
    pub kills_other: u64,
    /// Connections that were refused: user not allowed, or too many.
    pub refused: u64,
    /// Connections that were closed because they sent no message of ours.
    pub garbage: u64,
    /// Events that nobody received in time.
    pub events_dropped: u64,
}

/// The owner of mounts, descriptors and tables. Its methods block (on other threads' system calls, each with a deadline),
/// so asynchronous callers call them from a blocking thread.
///
/// It ends in one of three ways: [`Self::shutdown`] takes everything down; [`Self::leave`] leaves everything to the daemons
/// and the next keeper; dropping it tells the daemons to stop and closes its descriptors, but unmounts nothing.
pub struct Keeper {
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    control: Mutex<Option<JoinHandle<()>>>,
    state: Mutex<Option<StateFile>>,
    mounting: Mutex<BTreeSet<String>>,
    leaving: AtomicBool,
    options: KeeperOptions,
}

impl Keeper {
    /// Takes over from a keeper that has ended, or cleans up after it, listens, and starts the control thread. The receiver
    /// may be dropped.
    pub fn start(options: KeeperOptions) -> Result<(Self, events::Receiver<Event>, Vec<Cleaned>), KeeperError> {
        let state = options.state_file.as_deref().map(StateFile::open).transpose();
        let mut state = state.map_err(system("cannot take the record of mounts"))?;
        let (legacy, cleaned) = match &mut state {
            Some(state) => inherit(state, &options).map_err(system("cannot clean up after the last keeper"))?,
            None => (Legacy::default(), Vec::new()),
        };
        let listener = socket::listen(&options.socket, BACKLOG).map_err(system("cannot listen for daemons"))?;
        set_mode(&options).map_err(system("cannot set the mode of the socket"))?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| system("cannot make an eventfd")(error.into()))?;
        let wake = Arc::new(wake);
        let (commands, receiver) = mpsc::channel();
        let (events, event_receiver) = events::channel(EVENTS);
        let inbox = Inbox { wake: Arc::clone(&wake), receiver, sender: commands.clone() };
        let control = Control::new(options.clone(), listener, inbox, events, legacy);
        let control = std::thread::Builder::new()
            .name("keeper-control".to_owned())
            .spawn(move || control.run())
            .map_err(system("cannot start a thread"))?;
        let state = Mutex::new(state);
        let control = Mutex::new(Some(control));
        let (mounting, leaving) = (Mutex::default(), AtomicBool::new(false));
        let handle = Self { commands, wake, control, state, mounting, leaving, options };
        Ok((handle, event_receiver, cleaned))
    }

    /// Mounts a volume and has it served as soon as a daemon is there. Returns when the kernel's INIT is answered: within
    /// half a minute, with or without a daemon.
    pub fn mount(&self, spec: MountSpec) -> Result<MountInfo, KeeperError> {
        if spec.volume.is_empty() || spec.volume.len() > MAX_VOLUME || spec.volume.contains('\0') {
            return Err(MountError::Invalid("a volume's name has 1 to 255 bytes".to_owned()).into());
        }
        if spec.config.len() > MAX_CONFIG {
            return Err(MountError::Invalid(format!("a volume's configuration has at most {MAX_CONFIG} bytes")).into());
        }
        if !self.mounting.lock().insert(spec.volume.clone()) {
            return Err(KeeperError::Exists(spec.volume));
        }
        let volume = spec.volume.clone();
        let result = self.mount_reserved(spec);
        self.mounting.lock().remove(&volume);
        result
    }

    fn mount_reserved(&self, spec: MountSpec) -> Result<MountInfo, KeeperError> {
        if self.leaving.load(Ordering::Relaxed) {
            return Err(KeeperError::Leaving);
        }
        if self.find(&spec.volume)?.is_some() {
            return Err(KeeperError::Exists(spec.volume));
        }
        let nodes = NodeTable::create(self.options.node_arena).map_err(system("cannot make a shared table"))?;
        let opens = OpenTable::create(self.options.max_handles).map_err(system("cannot make a shared table"))?;
        let counters = Counters::create().map_err(system("cannot make a shared table"))?;
        let target = check_target(&spec)?;
        let mut record = Record {
            volume: spec.volume.clone(),
            target: target.clone(),
            source: spec.fsname.clone(),
            device: None,
            mode: spec.mode,
            losses: Vec::new(),
        };
        // Before the mount: a keeper killed in between leaves a record that leads to nothing, not a mount without one.
        self.record(|state| state.put(record.clone()))?;
        let mounted = match mount::mount(&spec, target.clone()) {
            Ok(mounted) => mounted,
            Err(error) => {
                self.record(|state| state.remove(&target))?;
                return Err(error.into());
            }
        };
        record.device = Some(mounted.info.device);
        record.losses.clone_from(&mounted.info.losses);
        self.record(|state| state.put(record))?;
        let info = mounted.info.clone();
        if let Err(error) = self.send(Command::Add(Box::new(Volume::new(mounted, spec.config, nodes, opens, counters))))
        {
            // The keeper has ended meanwhile. Its record still has the mount, if it cannot be taken down now.
            let unmounted = teardown::unmount(&target, info.device, info.mode, Duration::ZERO, None);
            unmounted.map_err(system("cannot unmount"))?;
            self.record(|state| state.remove(&target))?;
            return Err(error);
        }
        Ok(info)
    }

    /// Unmounts. While files are open it tries again for `grace`, and the volume is served; after that the mount is taken
    /// out of the tree and its connection aborted, so that what still reads gets an error.
    pub fn unmount(&self, volume: &str, grace: Duration) -> Result<TakenDown, KeeperError> {
        let (MountInfo { target, device, mode, .. }, fuse) =
            self.find(volume)?.ok_or_else(|| KeeperError::Unknown(volume.to_owned()))?;
        let taken = teardown::unmount(&target, device, mode, grace, fuse).map_err(system("cannot unmount"))?;
        self.send(Command::Remove { volume: volume.to_owned() })?;
        self.record(|state| state.remove(&target))?;
        Ok(taken)
    }

    /// The state of everything, now.
    pub fn status(&self) -> Result<KeeperStatus, KeeperError> {
        let mut status = self.ask(|reply| Command::Status { reply })?;
        for volume in &mut status.volumes {
            volume.waiting = fusectl::waiting(volume.mount.device);
        }
        Ok(status)
    }

    /// Unmounts everything (each with the same grace, all at once), tells the daemons to stop, and ends. The record of
    /// mounts is removed, unless something could not be unmounted: that is left to the next keeper.
    pub fn shutdown(&self, grace: Duration) -> Result<(), KeeperError> {
        let volumes: Vec<String> = self.status()?.volumes.into_iter().map(|volume| volume.mount.volume).collect();
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> =
                volumes.iter().map(|volume| scope.spawn(|| self.unmount(volume, grace).map(|_| ()))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(Err(KeeperError::Ended))).collect::<Vec<_>>()
        });
        self.stop();
        if let Some(state) = self.state.lock().take() {
            state.finish().map_err(system("cannot remove the record of mounts"))?;
        }
        results.into_iter().collect()
    }

    /// Ends and leaves every mount to the daemons, who serve on, and to the next keeper, who resumes with the same record.
    /// Waits until each volume is held by a daemon that is not about to end itself, at most for `patience`: after that it
    /// ends all the same, and [`KeeperError::Unheld`] names what ends with it.
    pub fn leave(&self, patience: Duration) -> Result<(), KeeperError> {
        self.leaving.store(true, Ordering::Relaxed);
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Command::Leave { deadline: Instant::now() + patience, reply })?;
        let unheld = answer.recv_timeout(patience + ANSWER).map_err(|_| KeeperError::Ended)?;
        self.stop();
        // The lock goes with it; the record stays.
        drop(self.state.lock().take());
        if unheld.is_empty() { Ok(()) } else { Err(KeeperError::Unheld(unheld)) }
    }

    fn stop(&self) {
        // Fails only when the thread has ended.
        let _ = self.send(Command::Stop);
        if let Some(control) = self.control.lock().take() {
            let _ = control.join();
            let _ = std::fs::remove_file(&self.options.socket);
        }
    }

    fn find(&self, volume: &str) -> Result<Option<(MountInfo, Option<OwnedFd>)>, KeeperError> {
        self.ask(|reply| Command::Find { volume: volume.to_owned(), reply })
    }

    fn ask<T>(&self, command: impl FnOnce(mpsc::SyncSender<T>) -> Command) -> Result<T, KeeperError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(command(reply))?;
        answer.recv_timeout(ANSWER).map_err(|_| KeeperError::Ended)
    }

    fn send(&self, command: Command) -> Result<(), KeeperError> {
        self.commands.send(command).map_err(|_| KeeperError::Ended)?;
        wake(&self.wake);
        Ok(())
    }

    fn record(&self, change: impl FnOnce(&mut StateFile) -> io::Result<()>) -> Result<(), KeeperError> {
        match &mut *self.state.lock() {
            Some(state) => change(state).map_err(system("cannot write the record of mounts")),
            None => Ok(()),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What is on record: to be taken over, or taken down.
fn inherit(state: &mut StateFile, options: &KeeperOptions) -> io::Result<(Legacy, Vec<Cleaned>)> {
    let (Some(path), true) = (&options.state_file, options.resume) else {
        return Ok((Legacy::default(), state.clean()?));
    };
    let (volumes, cleaned) = state.resume()?;
    let (succession, known) = Succession::open(succession_path(path));
    let servers = succession.alive();
    Ok((Legacy { volumes, servers, unknown_servers: !known, succession: Some(succession) }, cleaned))
}

/// A full counter means that the thread will wake anyway.
pub(crate) fn wake(wake: &OwnedFd) {
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

/// Other users may connect only when one of them is allowed; each connection is checked for its user.
fn set_mode(options: &KeeperOptions) -> io::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let others = options.allowed_uids.iter().any(|uid| *uid != own);
    let mode = if others { 0o666 } else { 0o600 };
    std::fs::set_permissions(&options.socket, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

impl KeeperStatus {
    /// Volume and loss, for each.
    pub fn losses(&self) -> impl Iterator<Item = (&str, &Loss)> {
        self.volumes
            .iter()
            .flat_map(|volume| volume.mount.losses.iter().map(|loss| (volume.mount.volume.as_str(), loss)))
    }

    /// The process id of the active daemon.
    pub fn active(&self) -> Option<i32> {
        self.daemons.iter().find(|daemon| daemon.role == Role::Active).map(|daemon| daemon.pid)
    }

    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<&VolumeStatus> {
        self.volumes.iter().find(|volume| volume.mount.volume == name)
    }
}
