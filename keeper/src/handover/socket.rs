//! The socket below the messages: SOCK_SEQPACKET, descriptors by SCM_RIGHTS, paths of any length.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::{MAX_FDS, MAX_PACKET};

/// What a receive gave.
pub(crate) enum Received {
    /// A packet, and the descriptors that came with it.
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// The other end is closed.
    Closed,
    /// Nothing yet.
    Empty,
    /// A packet longer than any message, or with more descriptors than any message: not one of ours.
    Oversized,
}

/// Listens at `path`, replacing what is there: the caller owns the directory.
pub(crate) fn listen(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    let (directory, address) = address(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, backlog)?;
    drop(directory);
    Ok(socket)
}

/// Connects to a listener at `path`. The socket does not block.
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let (directory, address) = address(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &address)?;
    drop(directory);
    Ok(socket)
}

/// The address of a path of any length: an address has 108 bytes, a path under a pod's directory often more, so the
/// directory is named by its descriptor (to be kept open until the address was used).
fn address(path: &Path) -> io::Result<(File, SocketAddrUnix)> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    short.push(name);
    Ok((File::from(directory), SocketAddrUnix::new(&short)?))
}

/// Sends one packet without waiting; `WouldBlock` when the other end does not read.
pub(crate) fn send(socket: impl AsFd, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let packet = [IoSlice::new(packet)];
    rustix::io::retry_on_intr(|| rustix::net::sendmsg(&socket, &packet, &mut control, flags))?;
    Ok(())
}

/// Receives one packet without waiting. Descriptors are close-on-exec from the start.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut Vec<u8>) -> io::Result<Received> {
    buffer.resize(MAX_PACKET, 0);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = loop {
        match rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Received::Empty),
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Received::Closed),
            Err(error) => return Err(error.into()),
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Ok(Received::Oversized);
    }
    if message.bytes == 0 {
        // No message of ours is empty, so this is the end.
        return Ok(Received::Closed);
    }
    Ok(Received::Packet(buffer[..message.bytes].to_vec(), fds))
}

/// Waits until there is something to receive, at most `timeout` (for ever when `None`). False when it has passed.
pub(crate) fn wait(socket: impl AsFd, flags: PollFlags, timeout: Option<std::time::Duration>) -> io::Result<bool> {
    let deadline = timeout.map(|timeout| std::time::Instant::now() + timeout);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(std::time::Instant::now()));
        let left = left.map(timespec);
        match rustix::event::poll(&mut [PollFd::new(&socket, flags)], left.as_ref()) {
            Ok(0) if deadline.is_some_and(|deadline| std::time::Instant::now() >= deadline) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A duration for poll; one that does not fit waits for about a day, and the caller waits again.
pub(crate) fn timespec(duration: std::time::Duration) -> rustix::event::Timespec {
    rustix::event::Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(86_400),
        tv_nsec: i64::from(duration.subsec_nanos()) as _,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_and_long_paths() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("keeper.sock");
        let listener = listen(&path, 4).unwrap();
        let client = connect(&path).unwrap();
        let server = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
        let file = File::open("/dev/null").unwrap();
        send(&client, b"one", &[file.as_fd(), file.as_fd()]).unwrap();
        send(&client, &vec![0; MAX_PACKET + 1], &[]).unwrap();
        send(&client, b"x", &[]).unwrap();
        let mut buffer = Vec::new();
        let Received::Packet(bytes, fds) = receive(&server, &mut buffer).unwrap() else { panic!() };
        assert_eq!((bytes.as_slice(), fds.len()), (b"one".as_slice(), 2));
        assert!(rustix::io::fcntl_getfd(&fds[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert!(matches!(receive(&server, &mut buffer).unwrap(), Received::Oversized));
        assert!(matches!(receive(&server, &mut buffer).unwrap(), Received::Packet(_, _)));
        assert!(matches!(receive(&server, &mut buffer).unwrap(), Received::Empty));
        drop(client);
        assert!(matches!(receive(&server, &mut buffer).unwrap(), Received::Closed));
        // A socket that a killed predecessor left is replaced.
        drop(listener);
        listen(&path, 4).unwrap();
    }
}
