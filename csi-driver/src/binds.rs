//! The pods' mounts: bind mounts of a volume's stage mount, made and taken down without asking anything of the file
//! system, which may be dead.
//!
//! What is about to be bound is looked at before it is put in its place: if the stage mount goes in between, the directory
//! below it (a directory of the node) must never be seen by a pod.

use std::{
    fs::DirBuilder,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use forebay_keeper::mount::{self, Device, FUSE_KIND, MountedAt};
use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
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
    attach(stage, device, target, noexec, MoveMountFlags::empty())
        .map_err(system(format!("cannot mount on {}", target.display())))
}

/// The same in the place of a dead mount of ours. Whoever looks meanwhile sees the old one or the new one.
pub fn replace(stage: &Path, device: Device, target: &Path, noexec: bool) -> Result<(), VolumeError> {
    let failed = || system(format!("cannot mount on {}", target.display()));
    match attach(stage, device, target, noexec, MoveMountFlags::MOVE_MOUNT_BENEATH) {
        // The mount table is in the order in which mounts were made, so it cannot tell that the old one is on top.
        Ok(()) => detach_top(target).map_err(failed()),
        // Not possible with every form of propagation: first one goes, then the other comes.
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            tracing::debug!(%error, target = %target.display(), "cannot mount beneath a dead mount");
            take_down(target)?;
            attach(stage, device, target, noexec, MoveMountFlags::empty()).map_err(failed())
        }
        Err(error) => Err(failed()(error)),
    }
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

fn attach(stage: &Path, device: Device, target: &Path, noexec: bool, how: MoveMountFlags) -> io::Result<()> {
    let (stage, target) = (stage.to_owned(), target.to_owned());
    let work = move || {
        let tree =
            rustix::mount::open_tree(CWD, &stage, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
        if device_of(&tree)? != device {
            return Err(io::Error::other(format!("the stage mount at {} is gone", stage.display())));
        }
        if noexec {
            forbid_exec(&tree)?;
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

/// Adds `noexec` to what every mount has, before the mount is anywhere: a later change would be seen in this process's mount
/// namespace only.
fn forbid_exec(tree: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_NOEXEC, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the descriptor is open, the path is a C string, and the kernel reads as many bytes as it is told are there.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn detach_top(target: &Path) -> io::Result<()> {
    let path = target.to_owned();
    let work = move || Ok(rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?);
    bounded::run("detach", STEP, work, |()| ())
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
