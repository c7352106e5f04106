//! Taking a mount down. Each step is a system call that can hang, so each has a thread and a deadline.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use super::mountinfo::{self, Device};
use super::{MountMode, fusectl};
use crate::{deadline, sys};

/// For one system call or one run of `fusermount3`.
const STEP: Duration = Duration::from_secs(5);
/// Between attempts while files are open.
const RETRY: Duration = Duration::from_millis(100);

/// How a mount went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum TakenDown {
    /// Nobody used it.
    Clean,
    /// It was in use until the end of the grace: taken out of the tree, and its connection aborted.
    Aborted,
    /// It was in use until the end of the grace: taken out of the tree.
    Detached,
    /// It was not there.
    Absent,
}

/// Unmounts, trying for `grace` while it is in use; after that takes it out of the tree and aborts the connection.
///
/// `fuse` tells whether the connection goes on although it is not mounted here (any more), and so whether the device number
/// still means it. Without that, what is not mounted here is let be.
pub(crate) fn unmount(
    target: &Path,
    device: Device,
    mode: MountMode,
    grace: Duration,
    fuse: Option<OwnedFd>,
) -> io::Result<TakenDown> {
    let end = Instant::now() + grace;
    let present = until_busy(target, device, mode, end)?;
    if !is_mounted(target, device)? {
        // Gone from here; bind mounts and other namespaces may still use it.
        let goes_on = || fuse.as_ref().is_some_and(|fuse| !sys::fuse_ended(fuse));
        while goes_on() && Instant::now() < end {
            std::thread::sleep(RETRY.min(end.saturating_duration_since(Instant::now())));
        }
        if !goes_on() {
            return Ok(if present { TakenDown::Clean } else { TakenDown::Absent });
        }
        fusectl::abort(device, target)?;
        return Ok(TakenDown::Aborted);
    }
    // Aborted first: requests in flight end, so taking it out of the tree waits for nothing.
    let aborted = fusectl::abort(device, target);
    detach(target, device, mode)?;
    aborted.map(|()| TakenDown::Aborted)
}

/// Unmounts this one mount, by mount(2)'s counterpart, and lets the connection be.
pub(crate) fn remove(target: &Path, device: Device, grace: Duration) -> io::Result<TakenDown> {
    let present = until_busy(target, device, MountMode::Kernel, Instant::now() + grace)?;
    if is_mounted(target, device)? {
        detach(target, device, MountMode::Kernel)?;
        return Ok(TakenDown::Detached);
    }
    Ok(if present { TakenDown::Clean } else { TakenDown::Absent })
}

/// Unmounts, again and again until it is done or `end` has passed. Whether there was anything.
fn until_busy(target: &Path, device: Device, mode: MountMode, end: Instant) -> io::Result<bool> {
    let mut present = false;
    while is_mounted(target, device)? {
        present = true;
        match plain(target, mode) {
            Ok(()) => continue,
            Err(error) if Instant::now() >= end => {
                tracing::info!(target = %target.display(), %error, "mount is in use after its grace");
                break;
            }
            Err(_) => std::thread::sleep(RETRY.min(end.saturating_duration_since(Instant::now()))),
        }
    }
    Ok(present)
}

/// Takes a mount out of the tree at once, whoever uses it. Only if it is the one of that device number.
pub(crate) fn detach(target: &Path, device: Device, mode: MountMode) -> io::Result<()> {
    if !is_mounted(target, device)? {
        return Ok(());
    }
    let path = target.to_owned();
    let result = deadline::run(
        "detach",
        STEP,
        move || match mode {
            MountMode::Kernel => Ok(rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?),
            MountMode::Fusermount => fusermount(&path, true),
        },
        |()| (),
    );
    if is_mounted(target, device)? { result } else { Ok(()) }
}

fn plain(target: &Path, mode: MountMode) -> io::Result<()> {
    let path = target.to_owned();
    deadline::run(
        "unmount",
        STEP,
        move || match mode {
            MountMode::Kernel => Ok(rustix::mount::unmount(&path, UnmountFlags::NOFOLLOW)?),
            MountMode::Fusermount => fusermount(&path, false),
        },
        |()| (),
    )
}

fn fusermount(target: &Path, lazy: bool) -> io::Result<()> {
    let mut command = Command::new(super::FUSERMOUNT);
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(target);
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

pub(crate) fn is_mounted(target: &Path, device: Device) -> io::Result<bool> {
    Ok(mountinfo::read()?.iter().any(|entry| entry.target == target && entry.device == device))
}
