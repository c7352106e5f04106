//! System calls that rustix has no safe form of.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::event::{PollFd, PollFlags};

/// A pidfd of the process at the other end of a connected Unix socket, as it was when it connected (SO_PEERPIDFD,
/// Linux 6.5): unlike a process id it can not come to mean another process.
pub(crate) fn peer_pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut pidfd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is one int, `len` says so, and both live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if pidfd < 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: the kernel just made this descriptor (with close-on-exec) for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Lets the child that `command` will start have a descriptor, under the same number. Ours stays close-on-exec, so no
/// other child gets it; it is closed with `command`.
pub(crate) fn inherit(command: &mut Command, fd: OwnedFd) {
    let keep = move || Ok(rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?);
    // SAFETY: between fork and exec this makes one system call, and neither allocates nor locks.
    unsafe { command.pre_exec(keep) };
}

/// `include/uapi/asm-generic/socket.h`.
const SO_PEERPIDFD: libc::c_int = 77;

/// Whether a process is dying: it was sent SIGKILL, or its first thread has ended. Its descriptors are closed, and its pidfd
/// says so, only when its last thread has ended, and that one may sleep uninterruptibly until a successor answers what it
/// waits for. (A pidfd of the first thread is no help: from Linux 6.15 on it waits for all threads, too.) `false` when that
/// can not be told.
pub(crate) fn is_dying(pid: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    // Signals sent to the process, as a mask of which bit 0 is signal 1.
    let pending = field("ShdPnd:").and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    pending & (1 << (libc::SIGKILL - 1)) != 0 || field("State:").is_some_and(|state| state.starts_with(['Z', 'X']))
}

/// Whether a descriptor has something to read now; of a pidfd: whether what it means has ended.
pub(crate) fn is_readable(fd: impl AsFd) -> bool {
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&zero)), Ok(1..))
}

/// Checks that a descriptor that another process gave is of `/dev/fuse`, without asking anything of a file system that it
/// may be of instead: its attributes are those that the kernel knows.
pub(crate) fn check_fuse(fd: impl AsFd) -> io::Result<()> {
    use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
    // A path-only descriptor would be a FUSE device by its attributes.
    let path_only = rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::PATH);
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&fd, "", flags, StatxFlags::TYPE)?;
    let character = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::CharacterDevice;
    if path_only || !character || (stat.stx_rdev_major, stat.stx_rdev_minor) != FUSE_DEVICE {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    Ok(())
}

/// Whether the connection of a FUSE descriptor was ended by an unmount or an abort. As long as it was not, its device number
/// means it; after that the number soon means another mount.
pub(crate) fn fuse_ended(fuse: impl AsFd) -> bool {
    // Asked for nothing but errors, and not waiting: a waiting poll would be woken by every request.
    let mut fds = [PollFd::new(&fuse, PollFlags::empty())];
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&zero)), Ok(1..)) && fds[0].revents().contains(PollFlags::ERR)
}

/// `struct fuse_backing_map` of `include/uapi/linux/fuse.h`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `_IOW(229, 1, struct fuse_backing_map)`.
const BACKING_OPEN: libc::c_ulong = 0x4010_e501;
/// `_IOW(229, 2, uint32_t)`.
const BACKING_CLOSE: libc::c_ulong = 0x4004_e502;

/// Registers a file with a connection: the id by which opens are passed through to it. `EPERM` without CAP_SYS_ADMIN, or
/// when passing through was not accepted at INIT.
pub(crate) fn open_backing(fuse: impl AsFd, file: impl AsFd) -> io::Result<u32> {
    let map = BackingMap { fd: file.as_fd().as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the kernel reads one `fuse_backing_map`, which lives until the call returns.
    let id = unsafe { libc::ioctl(fuse.as_fd().as_raw_fd(), BACKING_OPEN, &raw const map) };
    u32::try_from(id).map_err(|_| io::Error::last_os_error())
}

/// Takes a registration back. What is open through it stays so.
pub(crate) fn close_backing(fuse: impl AsFd, id: u32) -> io::Result<()> {
    // SAFETY: the kernel reads one u32, which lives until the call returns.
    let result = unsafe { libc::ioctl(fuse.as_fd().as_raw_fd(), BACKING_CLOSE, &raw const id) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Checks that a descriptor that a daemon gave can be read in place of a node: it is of a regular file, and for reading
/// only. Whoever serves a volume decides about its bytes anyhow.
pub(crate) fn check_backing(file: impl AsFd) -> io::Result<()> {
    use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
    let flags = rustix::fs::fcntl_getfl(&file)?;
    let stat = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    let regular = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
    if !regular || flags.contains(OFlags::PATH) || flags & OFlags::RWMODE != OFlags::RDONLY {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file that is open for reading only"));
    }
    Ok(())
}

/// MISC_MAJOR and FUSE_MINOR of the kernel.
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// Whether a process is held by threads in uninterruptible sleep, and all its others are dead. One that was sent SIGKILL
/// executes nothing of its own any more then: a thread that wakes up ends on its way out of the kernel. `false` when that
/// can not be told.
pub(crate) fn only_sleeps(pid: i32) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut sleeps = false;
    for task in tasks {
        let Ok(task) = task else { return false };
        match std::fs::read_to_string(task.path().join("stat")) {
            // The name, in parentheses, may hold anything; the state follows the last one.
            Ok(stat) => match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
                Some('D') => sleeps = true,
                Some('Z' | 'X') => {}
                _ => return false,
            },
            // Gone in between.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(_) => return false,
        }
    }
    sleeps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let pidfd = peer_pidfd(&a).unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
        assert!(info.contains(&format!("Pid:\t{}\n", std::process::id())), "{info}");
        assert!(peer_pidfd(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn who_is_dying() {
        assert!(!is_dying(std::process::id() as i32) && !is_dying(i32::MAX));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!is_dying(child.id() as i32));
        child.kill().unwrap();
        // Killed, or a zombie already.
        assert!(is_dying(child.id() as i32));
        child.wait().unwrap();
    }

    #[test]
    fn only_fuse_is_fuse() {
        for path in ["/dev/null", "/proc/self/exe", "/"] {
            assert!(check_fuse(std::fs::File::open(path).unwrap()).is_err(), "{path}");
        }
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(check_fuse(a).is_err());
        if let Ok(fuse) = std::fs::File::open("/dev/fuse") {
            check_fuse(fuse).unwrap();
            let path = rustix::fs::open("/dev/fuse", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
            assert!(check_fuse(path).is_err());
        }
    }

    #[test]
    fn a_running_process_does_not_only_sleep() {
        assert!(!only_sleeps(std::process::id() as i32));
        assert!(!only_sleeps(i32::MAX));
    }
}
