//! Attaching `fuser` to a descriptor that is already past INIT.
//!
//! `fuser` has no constructor for that: it insists on a handshake. So the handshake runs against a socketpair, on which
//! the keeper's INIT is replayed (SEQPACKET keeps message boundaries, like `/dev/fuse`). The reply goes nowhere: the
//! kernel was answered when the volume was mounted. Then `dup3` puts the real descriptor under the number that the
//! session reads from, and what a dead predecessor had taken is asked for again.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
};

use forebay_keeper::{notify_expire_entry, notify_resend};
use fuser::{Config, INodeNo, Session, SessionACL};
use rustix::{
    io::DupFlags,
    net::{AddressFamily, SendFlags, SocketFlags, SocketType},
};

use crate::{
    adapter::Adapter,
    fs::FileSystem,
    invalidation::{KernelCache, deliver},
    notices::Notices,
    tree::Tree,
};

/// Threads that receive requests. Two let a request be received while another one's reply is written; more gained
/// nothing on two cores, and what has to wait does so elsewhere.
const RECEIVING_THREADS: usize = 2;

/// A session that runs on threads of its own.
#[derive(Debug)]
pub struct Running {
    /// Ends when the mount is gone.
    pub session: JoinHandle<io::Result<()>>,
    notices: Arc<Notices>,
}

impl Running {
    /// Lets the notifying thread end. The session's threads end with the mount.
    pub fn close(&self) {
        self.notices.close();
    }
}

/// The kernel's caches, by way of the session.
#[derive(Debug)]
pub struct SessionCache {
    notifier: fuser::Notifier,
    fuse: OwnedFd,
}

impl KernelCache for SessionCache {
    fn entry(&self, directory: u64, name: &[u8]) -> io::Result<bool> {
        match notify_expire_entry(&self.fuse, directory, name) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn listing(&self, directory: u64) -> io::Result<()> {
        // From offset 0 with no length: all of it.
        self.notifier.inval_inode(INodeNo(directory), 0, 0)
    }
}

/// Serves `fuse` with `adapter`, over the INIT that the keeper offers. Requests are received when this returns.
///
/// `first` says that nobody served this mount before. Otherwise the kernel is asked to send again what was taken and
/// not answered, and is told to forget all names: which invalidations the predecessor still sent is unknown.
pub fn attach<T: Tree>(
    fs: Arc<FileSystem<T>>,
    adapter: Adapter<T>,
    notices: Arc<Notices>,
    fuse: OwnedFd,
    init: &[u8],
    first: bool,
) -> io::Result<Running> {
    let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let sent = rustix::net::send(&near, init, SendFlags::NOSIGNAL)?;
    if sent != init.len() {
        return Err(io::Error::other("the INIT did not fit into one packet"));
    }
    let session = Session::from_fd(adapter, far, SessionACL::All, config())?;
    // Nothing was received from it yet, and its number stays the session's: what is replaced is the socket.
    put_under(&fuse, &session)?;
    drop(near);
    let cache = SessionCache { notifier: session.notifier(), fuse };
    if !first {
        notify_resend(&cache.fuse)?;
        notices.everything();
    }
    run(fs, session, cache, notices)
}

/// Receives requests, and delivers notices, on threads of their own. For a mount of `fuser`'s own, too.
pub fn run<T: Tree>(
    fs: Arc<FileSystem<T>>,
    session: Session<Adapter<T>>,
    cache: SessionCache,
    notices: Arc<Notices>,
) -> io::Result<Running> {
    let queue = notices.clone();
    std::thread::Builder::new().name("forebay-notify".to_owned()).spawn(move || {
        let tables = fs.tables();
        deliver(&queue, &cache, &tables.nodes, &tables.counters);
    })?;
    let session = std::thread::Builder::new().name("forebay-session".to_owned()).spawn(move || session.run())?;
    Ok(Running { session, notices })
}

/// Settings of every session. No `clone_fd`: requests taken through a clone end with it, and cannot be sent again.
pub fn config() -> Config {
    let mut config = Config::default();
    // Who may use the mount is decided by the kernel, from the mount's options.
    config.acl = SessionACL::All;
    config.n_threads = Some(RECEIVING_THREADS);
    config.clone_fd = false;
    config
}

/// The kernel's caches of a session that made its own mount.
pub fn cache_of<T: Tree>(session: &Session<Adapter<T>>) -> io::Result<SessionCache> {
    Ok(SessionCache { notifier: session.notifier(), fuse: session.as_fd().try_clone_to_owned()? })
}

fn put_under<T: Tree>(fuse: &OwnedFd, session: &Session<Adapter<T>>) -> io::Result<()> {
    use std::os::fd::FromRawFd;
    // SAFETY: the number belongs to the session, which lives through this function; `number` only names it as the
    // target and is forgotten below, so it is never closed here.
    let mut number = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(session.as_fd().as_raw_fd()) });
    rustix::io::dup3(fuse, &mut number, DupFlags::CLOEXEC)?;
    Ok(())
}
