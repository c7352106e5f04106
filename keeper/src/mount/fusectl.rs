//! fusectl: how many requests wait in a connection, and the switch that ends it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};

use super::mountinfo::{self, Device};
use crate::deadline;

const ROOT: &str = "/sys/fs/fuse/connections";
/// Writing the switch takes a few locks of the connection; nothing there waits for a daemon.
const ABORT_DEADLINE: Duration = Duration::from_secs(5);

/// Mounts fusectl when nobody has (systemd does on most hosts). It stays: others may use it.
pub(crate) fn ensure() -> io::Result<()> {
    if mountinfo::at(Path::new(ROOT))?.is_some_and(|entry| entry.kind == "fusectl") {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("fusectl", ROOT, "fusectl", flags, None)?;
    Ok(())
}

/// Requests of a connection that are not answered; `None` when the connection or fusectl is not there.
pub(crate) fn waiting(device: Device) -> Option<u64> {
    std::fs::read_to_string(directory(device).join("waiting")).ok()?.trim().parse().ok()
}

/// Ends a connection, which the caller knows to have this device number still: every request in it, and every later one, fails. Where fusectl is not to be had, root can do the
/// same by a forced unmount (which also takes an unused mount away).
pub(crate) fn abort(device: Device, target: &Path) -> io::Result<()> {
    let (switch, target) = (directory(device).join("abort"), target.to_owned());
    deadline::run(
        "abort",
        ABORT_DEADLINE,
        move || match std::fs::write(&switch, b"1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if mountinfo::at(Path::new(ROOT))?.is_some_and(|entry| entry.kind == "fusectl") {
                    return Ok(()); // No such connection (any more).
                }
                // Only what is still ours: the device number was recorded when we mounted it.
                if mountinfo::at(&target)?.is_none_or(|entry| entry.device != device) {
                    return Ok(());
                }
                match rustix::mount::unmount(&target, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW) {
                    Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
                    Err(error) => Err(error.into()),
                }
            }
            result => result,
        },
        |()| (),
    )
}

fn directory(device: Device) -> PathBuf {
    Path::new(ROOT).join(device.connection().to_string())
}
