//! Mounting: `/dev/fuse`, mount(2) or `fusermount3`, INIT, read-ahead; and taking mounts down.
//!
//! A mount's device number is read from mountinfo, never by stat: a stat is a request to a daemon that may not be there.

pub(crate) mod fusectl;
mod init;
pub(crate) mod mountinfo;
pub(crate) mod state;
pub(crate) mod teardown;

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use crate::handover::socket::{self, Received};
use crate::{deadline, sys};

pub use init::InitError;
pub use mountinfo::Device;
pub use state::Cleaned;
pub use teardown::TakenDown;

/// The type of our mounts in the mount table.
pub const FUSE_KIND: &str = "fuse.forebay";
/// The type that is given to mount(2) and `fusermount3`.
const SUBTYPE: &str = "forebay";
/// The helper of the package fuse3.
const FUSERMOUNT: &str = "fusermount3";
/// For each step of mounting that can hang.
const STEP: Duration = Duration::from_secs(10);
/// FUSE_MIN_READ_BUFFER: the kernel refuses a smaller read.
const READ_BUFFER: usize = 8192;

/// Who calls mount(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MountMode {
    /// This process; it has CAP_SYS_ADMIN.
    Kernel,
    /// The set-user-id helper `fusermount3`, for a user without privileges.
    Fusermount,
}

impl MountMode {
    /// `Kernel` for root, else `Fusermount`.
    pub fn suitable() -> Self {
        if rustix::process::geteuid().is_root() { Self::Kernel } else { Self::Fusermount }
    }
}

/// What to mount.
#[derive(Clone, Debug)]
pub struct MountSpec {
    /// The volume's name, unique in a keeper; at most 255 bytes.
    pub volume: String,
    /// An existing directory that nothing is mounted on.
    pub target: PathBuf,
    /// Who mounts.
    pub mode: MountMode,
    /// Whether other users than the mounting one get in.
    pub allow_other: bool,
    /// Read-ahead of the mount, in KiB: the size of a sequential reader's requests (at most 1024).
    pub read_ahead_kib: u32,
    /// What the mount table shows as the source, as in `forebay:default/imagenet`. No commas or backslashes.
    pub fsname: String,
    /// For the daemon: how to serve this volume. Opaque to the keeper; at most 96 KiB.
    pub config: Vec<u8>,
}

impl MountSpec {
    /// With the usual settings: for all users when mounted by the kernel, read-ahead of 1 MiB.
    pub fn new(volume: impl Into<String>, target: impl Into<PathBuf>, config: Vec<u8>) -> Self {
        let volume = volume.into();
        let mode = MountMode::suitable();
        Self {
            fsname: format!("forebay:{volume}"),
            volume,
            target: target.into(),
            mode,
            allow_other: mode == MountMode::Kernel,
            read_ahead_kib: 1024,
            config,
        }
    }
}

/// What this mount has to do without.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "camelCase")]
pub enum Loss {
    /// The read-ahead stays at the kernel's default, so requests are smaller.
    ReadAhead {
        /// Read-ahead in force, in KiB.
        kib: u32,
        /// Why.
        reason: String,
    },
    /// Only the mounting user gets in.
    AllowOther {
        /// Why.
        reason: String,
    },
    /// fusectl is not to be had: no count of waiting requests, and aborting needs root.
    Control {
        /// Why.
        reason: String,
    },
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ReadAhead { kib, reason } => {
                write!(f, "read-ahead stays at {kib} KiB, so sequential reads are requests of that size ({reason})")
            }
            Self::AllowOther { reason } => write!(f, "only the user who mounted gets in ({reason})"),
            Self::Control { reason } => {
                write!(f, "no count of waiting requests, and a hung mount cannot be aborted directly ({reason})")
            }
        }
    }
}

/// A mount that was made.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MountInfo {
    /// Its volume.
    pub volume: String,
    /// Where it is, without symbolic links.
    pub target: PathBuf,
    /// Its device number, `major:minor` in the mount table.
    pub device: Device,
    /// The connection's name under fusectl.
    pub connection: u64,
    /// Who mounted.
    pub mode: MountMode,
    /// What it has to do without.
    pub losses: Vec<Loss>,
}

/// Why a mount was not made. Nothing is left mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The specification is wrong: correct it.
    #[error("{0}")]
    Invalid(String),
    /// Something is mounted there: unmount it, or choose another target.
    #[error("{} is a mount point already ({kind})", target.display())]
    Busy {
        /// Where.
        target: PathBuf,
        /// File system type of what is there.
        kind: String,
    },
    /// A system call failed.
    #[error("{what}")]
    System {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's FUSE is not what is needed.
    #[error(transparent)]
    Kernel(#[from] InitError),
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> MountError {
    let what = what.into();
    move |source| MountError::System { what, source }
}

/// A mount with its descriptor.
pub(crate) struct Mounted {
    pub(crate) info: MountInfo,
    pub(crate) fuse: OwnedFd,
    pub(crate) init: Vec<u8>,
}

/// Takes down what keepers that were killed left, according to their record, and forgets it. Refused while the keeper of
/// that record lives. [`crate::Keeper::start`] does this by itself.
pub fn clean_stale(state_file: &Path) -> io::Result<Vec<Cleaned>> {
    let mut state = state::StateFile::open(state_file)?;
    let cleaned = state.clean()?;
    state.finish()?;
    Ok(cleaned)
}

/// What is mounted on a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedAt {
    /// Its device number: bind mounts of one volume have the same.
    pub device: Device,
    /// Type of the file system; [`FUSE_KIND`] when it is a volume of a keeper.
    pub kind: String,
    /// As given when it was mounted.
    pub source: String,
}

/// What is on top at `target` (a path without symbolic links), by the mount table: nothing is touched, so this does not
/// wait for anybody.
pub fn mounted_at(target: &Path) -> io::Result<Option<MountedAt>> {
    let entry = mountinfo::at(target)?;
    Ok(entry.map(|mountinfo::Entry { device, target: _, kind, source }| MountedAt {
        device,
        kind,
        source: source.to_string_lossy().into_owned(),
    }))
}

/// Unmounts what is on top at `target`, if it is a volume of a keeper or a bind mount of one: tries for `grace` while it is
/// in use, then takes it out of the tree, where who uses it keeps it. The volume itself goes on; its own mount is taken down
/// by [`crate::Keeper::unmount`].
pub fn take_down(target: &Path, grace: Duration) -> io::Result<TakenDown> {
    match mountinfo::at(target)? {
        Some(entry) if entry.kind == FUSE_KIND => teardown::remove(target, entry.device, grace),
        Some(entry) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is a mount of type {}, not of a volume", target.display(), entry.kind),
        )),
        None => Ok(TakenDown::Absent),
    }
}

/// The target without symbolic links, found to be a directory that nothing is mounted on.
pub(crate) fn check_target(spec: &MountSpec) -> Result<PathBuf, MountError> {
    if spec.fsname.is_empty() || spec.fsname.contains([',', '\\', '\n', '\0']) {
        return Err(MountError::Invalid(format!("'{}' cannot be the source of a mount", spec.fsname)));
    }
    // By name first: even to resolve a dead mount's own path can hang.
    let busy = |target: &Path| match mountinfo::at(target) {
        Ok(Some(entry)) => Err(MountError::Busy { target: target.to_owned(), kind: entry.kind }),
        Ok(None) => Ok(()),
        Err(error) => Err(system("cannot read the mount table")(error)),
    };
    let absolute = std::path::absolute(&spec.target).map_err(system("cannot tell the current directory"))?;
    busy(&absolute)?;
    let path = absolute.clone();
    let target = deadline::run("resolve", STEP, move || std::fs::canonicalize(path), |_| ())
        .map_err(system(format!("cannot resolve {}", absolute.display())))?;
    busy(&target)?;
    let path = target.clone();
    let metadata = deadline::run("stat", STEP, move || std::fs::metadata(path), |_| ())
        .map_err(system(format!("cannot stat {}", target.display())))?;
    if !metadata.is_dir() {
        return Err(MountError::Invalid(format!("{} is no directory", target.display())));
    }
    Ok(target)
}

/// Mounts at `target` (from [`check_target`]) and answers INIT. On an error nothing stays mounted.
pub(crate) fn mount(spec: &MountSpec, target: PathBuf) -> Result<Mounted, MountError> {
    let mut losses = Vec::new();
    if let Err(error) = fusectl::ensure() {
        losses.push(Loss::Control { reason: error.to_string() });
    }
    let fuse = match spec.mode {
        MountMode::Kernel => mount_kernel(spec, &target)?,
        MountMode::Fusermount => mount_fusermount(spec, &target, &mut losses)?,
    };
    let entry = mountinfo::at(&target).map_err(system("cannot read the mount table"))?;
    let device = match entry {
        Some(entry) if entry.kind == FUSE_KIND => entry.device,
        _ => {
            let error = io::Error::from(io::ErrorKind::NotFound);
            return Err(system(format!("{} is not in the mount table", target.display()))(error));
        }
    };
    match answer_init(&fuse, spec.mode == MountMode::Kernel) {
        Ok(negotiated) => {
            // After the reply, which sets it to what the kernel offered (128 KiB) at most.
            if let Err(error) = set_read_ahead(device, spec.read_ahead_kib) {
                let kib = negotiated.max_readahead / 1024;
                losses.push(Loss::ReadAhead { kib, reason: error.to_string() });
            }
            let info = MountInfo {
                volume: spec.volume.clone(),
                target,
                device,
                connection: device.connection(),
                mode: spec.mode,
                losses,
            };
            Ok(Mounted { info, fuse, init: negotiated.offered })
        }
        Err(error) => {
            drop(fuse); // Ends the connection: nobody else has the descriptor.
            if let Err(error) = teardown::detach(&target, device, spec.mode) {
                tracing::warn!(%error, target = %target.display(), "failed mount not taken down");
            }
            Err(error)
        }
    }
}

fn mount_kernel(spec: &MountSpec, target: &Path) -> Result<OwnedFd, MountError> {
    let fuse = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/fuse")
        .map_err(system("cannot open /dev/fuse"))?;
    // Non-blocking only until INIT was read: the flag belongs to the open file, which daemons share.
    let mut options = format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions", fuse.as_raw_fd());
    if spec.allow_other {
        options.push_str(",allow_other");
    }
    let invalid = |_| MountError::Invalid("a NUL in a mount option".to_owned());
    let options = CString::new(options).map_err(invalid)?;
    let (source, path) = (spec.fsname.clone(), target.to_owned());
    deadline::run(
        "mount",
        STEP,
        move || {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
            rustix::mount::mount(&source, &path, FUSE_KIND, flags, options.as_c_str())?;
            Ok((fuse, path))
        },
        // Nobody waits any more: it must not stay.
        |(fuse, path): (std::fs::File, PathBuf)| {
            drop(fuse);
            let _ = rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH);
        },
    )
    .map(|(fuse, _)| OwnedFd::from(fuse))
    .map_err(system(format!("cannot mount on {}", target.display())))
}

fn mount_fusermount(spec: &MountSpec, target: &Path, losses: &mut Vec<Loss>) -> Result<OwnedFd, MountError> {
    if spec.allow_other {
        match run_fusermount(spec, target, true) {
            Ok(fuse) => return Ok(fuse),
            // The usual reason; the second attempt shows whether it was this one.
            Err(error) => {
                let fuse = run_fusermount(spec, target, false)?;
                let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                losses.push(Loss::AllowOther { reason });
                return Ok(fuse);
            }
        }
    }
    run_fusermount(spec, target, false)
}

/// `fusermount3` mounts, and sends the descriptor over the socket whose number is in `_FUSE_COMMFD`.
fn run_fusermount(spec: &MountSpec, target: &Path, allow_other: bool) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| system("cannot make a socket pair")(error.into()))?;
    let mut options = format!("ro,nosuid,nodev,noatime,default_permissions,subtype={SUBTYPE},fsname={}", spec.fsname);
    if allow_other {
        options.push_str(",allow_other");
    }
    let mut command = Command::new(FUSERMOUNT);
    command.arg("-o").arg(options).arg("--").arg(target).env("_FUSE_COMMFD", theirs.as_raw_fd().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    sys::inherit(&mut command, theirs);
    let work = move || {
        let child = command.spawn()?;
        drop(command); // With it our copy of the helper's end, so that its exit is seen as the end of the stream.
        let mut buffer = Vec::new();
        let received = match socket::wait(&ours, PollFlags::IN, Some(STEP)) {
            Ok(true) => socket::receive(&ours, &mut buffer),
            Ok(false) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            Err(error) => Err(error),
        };
        let output = child.wait_with_output()?;
        match received? {
            Received::Packet(_, mut fds) if output.status.success() && fds.len() == 1 => Ok(fds.pop()),
            _ => {
                let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                Err(io::Error::other(if text.is_empty() { output.status.to_string() } else { text }))
            }
        }
    };
    let fuse = deadline::run("fusermount", 2 * STEP, work, |_| ())
        .map_err(system(format!("{FUSERMOUNT} (of the package fuse3) cannot mount on {}", target.display())))?;
    fuse.ok_or_else(|| MountError::Invalid("no descriptor came from fusermount3".to_owned()))
}

fn answer_init(fuse: &OwnedFd, passthrough: bool) -> Result<init::Negotiated, MountError> {
    let timeout = || io::Error::new(io::ErrorKind::TimedOut, format!("no FUSE_INIT within {STEP:?}"));
    match socket::wait(fuse, PollFlags::IN, Some(STEP)) {
        Ok(true) => {}
        Ok(false) => return Err(system("the kernel does not start the connection")(timeout())),
        Err(error) => return Err(system("cannot wait for the connection")(error)),
    }
    let mut buffer = vec![0; READ_BUFFER];
    let read = rustix::io::retry_on_intr(|| rustix::io::read(fuse, &mut buffer[..]))
        .map_err(|error| system("cannot read FUSE_INIT")(error.into()))?;
    let negotiated = init::negotiate(&buffer[..read], true, passthrough)?;
    let flags = rustix::fs::fcntl_getfl(fuse).map_err(|error| system("cannot read descriptor flags")(error.into()))?;
    rustix::fs::fcntl_setfl(fuse, flags - rustix::fs::OFlags::NONBLOCK)
        .map_err(|error| system("cannot set descriptor flags")(error.into()))?;
    rustix::io::retry_on_intr(|| rustix::io::write(fuse, &negotiated.reply))
        .map_err(|error| system("the kernel refuses the reply to FUSE_INIT")(error.into()))?;
    Ok(negotiated)
}

/// The read-ahead of a mount is the kernel's, by device number, and writable by root. It holds for files opened later.
fn set_read_ahead(device: Device, kib: u32) -> io::Result<()> {
    std::fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), kib.to_string())
}
