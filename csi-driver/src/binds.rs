//! The pods' mounts: bind mounts of a volume's stage mount, made and taken down without asking anything of the file
//! system, which may be dead.
//!
//! What is about to be bound is looked at before it is put in its place: if the stage mount goes in between, the directory
//! below it (a directory of the node) must never be seen by a pod.

use std::{
    fs::DirBuilder,
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use forebay_keeper::mount::{self, Device, FUSE_KIND, MountedAt};
use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    io::Errno,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use crate::{
    bounded,
    error::{VolumeError, system},
};

/// For one system call.
const STEP: Duration = Duration::from_secs(5);
/// Mounts on one place that are taken down at once; more is somebody else at work.
const MAX_STACKED: usize = 32;
/// Of directories that are made: as the kubelet's.
const DIRECTORY_MODE: u32 = 0o750;

/// `path` without symbolic links, but for its last component, which may be a mount and is not touched. `None` when the
/// directory it is in is not there.
pub fn resolve(path: &Path) -> Result<Option<PathBuf>, VolumeError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(VolumeError::Invalid(format!("'{}' cannot be a mount point", path.display())));
    };
    let parent = parent.to_owned();
    match bounded::run("resolve", STEP, move || std::fs::canonicalize(parent), |_| ()) {
        Ok(parent) => Ok(Some(parent.join(name))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(system(format!("cannot resolve {}", path.display()))(error)),
    }
}

/// The same, where a directory is made when there is nothing.
pub fn prepare(path: &Path) -> Result<PathBuf, VolumeError> {
    let directory = path.to_owned();
    let make = move || match DirBuilder::new().mode(DIRECTORY_MODE).create(&directory) {
        // Whatever it is, perhaps a dead mount.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(&directory)
        }
        result => result,
    };
    let failed = || format!("cannot make the directory {}", path.display());
    bounded::run("mkdir", STEP, make, |()| ()).map_err(system(failed()))?;
    resolve(path)?.ok_or_else(|| system(failed())(io::ErrorKind::NotFound.into()))
}

/// What is on top at `path`.
pub fn look(path: &Path) -> Result<Option<MountedAt>, VolumeError> {
    mount::mounted_at(path).map_err(system("cannot read the mount table"))
}

/// Whether a mount is of a volume, of this keeper or of one before it.
pub fn is_ours(mounted: &MountedAt) -> bool {
    mounted.kind == FUSE_KIND
}

/// Mounts the stage mount, which must be `device`, at `target`.
pub fn bind(stage: &Path, device: Device, target: &Path, noexec: bool) -> Result<(), VolumeError> {
    attach(stage, device, target, MoveMountFlags::empty())
        .and_then(|()| if noexec { forbid_exec(target) } else { Ok(()) })
        .map_err(system(format!("cannot mount on {}", target.display())))
}

/// The same in the place of dead mounts of ours. Whoever looks meanwhile sees the old one or the new one.
pub fn replace(stage: &Path, device: Device, target: &Path, noexec: bool) -> Result<(), VolumeError> {
    match attach(stage, device, target, MoveMountFlags::MOVE_MOUNT_BENEATH) {
        Ok(()) => {}
        // Not possible with every form of propagation: first one goes, then the other comes.
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            tracing::debug!(%error, target = %target.display(), "cannot mount beneath a dead mount");
        }
        Err(error) => return Err(system(format!("cannot mount on {}", target.display()))(error)),
    }
    for _ in 0..MAX_STACKED {
        match look(target)? {
            Some(top) if top.device == device => {
                let noexec = if noexec { forbid_exec(target) } else { Ok(()) };
                return noexec.map_err(system(format!("cannot mount on {}", target.display())));
            }
            Some(top) if is_ours(&top) => {
                take_down_top(target)?;
            }
            Some(top) => return Err(foreign(target, &top)),
            None => return bind(stage, device, target, noexec),
        }
    }
    Err(stacked(target))
}

/// Takes down all that is ours at `target`, whoever uses it; to be found out by the mount table when done.
pub fn take_down(target: &Path) -> Result<bool, VolumeError> {
    let mut any = false;
    for _ in 0..MAX_STACKED {
        match look(target)? {
            None => return Ok(any),
            Some(top) if is_ours(&top) => {
                take_down_top(target)?;
                any = true;
            }
            Some(top) => return Err(foreign(target, &top)),
        }
    }
    Err(stacked(target))
}

/// Removes the directory that a mount was on.
pub fn remove(target: &Path) -> Result<(), VolumeError> {
    let directory = target.to_owned();
    match bounded::run("rmdir", STEP, move || std::fs::remove_dir(directory), |()| ()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(system(format!("cannot remove {}", target.display()))(error))
        }
        _ => Ok(()),
    }
}

fn attach(stage: &Path, device: Device, target: &Path, how: MoveMountFlags) -> io::Result<()> {
    let (stage, target) = (stage.to_owned(), target.to_owned());
    let work = move || {
        let tree =
            rustix::mount::open_tree(CWD, &stage, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
        if device_of(&tree)? != device {
            return Err(io::Error::other(format!("the stage mount at {} is gone", stage.display())));
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | how;
        rustix::mount::move_mount(&tree, "", CWD, &target, flags)?;
        Ok(target)
    };
    // Nobody waits any more: it must not stay.
    let undo = |target: PathBuf| {
        let _ = rustix::mount::unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    };
    bounded::run("bind", STEP, work, undo).map(|_| ())
}

/// The device number, as the kernel has it: no request to whoever serves the file system.
fn device_of(tree: &OwnedFd) -> io::Result<Device> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(tree, "", flags, StatxFlags::empty())?;
    Ok(Device { major: statx.stx_dev_major, minor: statx.stx_dev_minor })
}

/// Adds `noexec` to what every mount has.
fn forbid_exec(target: &Path) -> io::Result<()> {
    let path = target.to_owned();
    let remount = move || {
        let flags = MountFlags::BIND
            | MountFlags::RDONLY
            | MountFlags::NOSUID
            | MountFlags::NODEV
            | MountFlags::NOATIME
            | MountFlags::NOEXEC;
        Ok(rustix::mount::mount_remount(&path, flags, "")?)
    };
    let done = bounded::run("remount", STEP, remount, |()| ());
    if done.is_err() {
        let _ = take_down_top(target);
    }
    done
}

/// Whoever uses it keeps it.
fn take_down_top(target: &Path) -> Result<(), VolumeError> {
    let taken = mount::take_down(target, Duration::ZERO);
    taken.map(|_| ()).map_err(system(format!("cannot unmount {}", target.display())))
}

/// Something that is not ours is not touched.
pub fn foreign(target: &Path, mounted: &MountedAt) -> VolumeError {
    VolumeError::Precondition(format!("something else ({}) is mounted on {}", mounted.kind, target.display()))
}

fn stacked(target: &Path) -> VolumeError {
    VolumeError::Unavailable(format!("mounts on {} keep on coming", target.display()))
}
