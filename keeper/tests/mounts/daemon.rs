//! The daemon of the tests: a small read-only file system that attaches as every daemon does.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use forebay_keeper::daemon::{Attach, DaemonLink, DaemonOptions, Message, Tables, notify_expire_entry, notify_resend};
use forebay_keeper::tables::{Counter, NodeKind, OpenMode, RESEND_BIT, ROOT_ID};
use forebay_protocol::{FileVersion, VersionKey};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, Request, Session,
    SessionACL,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

/// The socket that this process connects to, when it is a daemon.
pub(crate) const SOCKET: &str = "FOREBAY_TEST_DAEMON";

/// What the keeper passes on.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) read_delay_ms: u64,
    pub(crate) attach_delay_ms: u64,
    pub(crate) refuse: Refuse,
}

/// Which attachments a daemon refuses.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Refuse {
    #[default]
    Never,
    Always,
    /// The first so many of a volume.
    Times(u32),
    /// All, in one process: the first that is asked.
    OneProcess,
}

impl Refuse {
    fn refuses(self, generation: u64) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Times(times) => generation <= u64::from(times),
            Self::OneProcess => {
                let own = std::process::id().to_string();
                match std::fs::File::create_new(mark("refuser")) {
                    Ok(mut file) => std::io::Write::write_all(&mut file, own.as_bytes()).is_ok(),
                    Err(_) => std::fs::read_to_string(mark("refuser")).unwrap() == own,
                }
            }
        }
    }
}

/// A file that the daemons of a test have in common.
fn mark(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(SOCKET).unwrap()).with_file_name(name)
}

/// A name whose first look-up is not answered, by a daemon that has a thread then which waits for the directory's lock.
pub(crate) const HANG: &str = "hang";

/// Contents of every file: words by a mixing function of their position.
pub(crate) fn fill(offset: u64, buffer: &mut [u8]) {
    let mut at = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let word = mix(at / 8).to_le_bytes();
        let skip = (at % 8) as usize;
        let len = rest.len().min(8 - skip);
        rest[..len].copy_from_slice(&word[skip..skip + len]);
        at += len as u64;
        rest = &mut rest[len..];
    }
}

fn mix(index: u64) -> u64 {
    let mut z = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Serves until told to stop, or until the keeper is gone.
pub(crate) fn run(socket: PathBuf) {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let ticks = Arc::new(AtomicU64::new(0));
    let progress = Arc::clone(&ticks);
    std::thread::spawn(move || {
        loop {
            ticks.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut link = DaemonLink::connect(
        &socket,
        DaemonOptions {
            name: format!("test-{}", std::process::id()),
            progress: Box::new(move || progress.load(Ordering::Relaxed)),
            deadline: Duration::from_secs(5),
        },
    )
    .unwrap();
    loop {
        match link.next_message(None) {
            Some(Message::Attach(attach)) => {
                let (volume, generation) = (attach.volume.clone(), attach.generation);
                match serve(attach) {
                    Ok(()) => link.attached(&volume, generation),
                    Err(error) => link.attach_failed(&volume, generation, &error),
                }
            }
            Some(Message::Role(_) | Message::Prepare { .. } | Message::Detach { .. } | Message::Backing { .. })
            | None => {}
            Some(Message::Stop | Message::Go) => std::process::exit(0),
        }
    }
}

/// The attach recipe: the handshake runs on a socket pair, then the real descriptor takes the session's number.
fn serve(attach: Attach) -> Result<(), String> {
    let Attach { generation, first, fuse, init, config, tables, .. } = attach;
    let config: Config = serde_json::from_slice(&config).unwrap();
    if config.refuse.refuses(generation) {
        return Err("refused as told".to_owned());
    }
    let tables = Arc::new(tables.open().unwrap());
    let files = Files { tables: Arc::clone(&tables), config, fuse: fuse.try_clone().unwrap() };
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::io::write(&ours, &init).unwrap();
    let mut options = fuser::Config::default();
    options.n_threads = Some(2);
    options.acl = SessionACL::All;
    let session = Session::from_fd(files, theirs, SessionACL::All, options).unwrap();
    std::thread::sleep(Duration::from_millis(config.attach_delay_ms));
    place(&fuse, session.as_fd().as_raw_fd());
    if !first {
        notify_resend(&fuse).unwrap();
    }
    drop(fuse);
    std::thread::spawn(move || session.run());
    Ok(())
}

fn place(fuse: &OwnedFd, number: i32) {
    // SAFETY: `number` is the session's own descriptor, which stays open under that number; only what it refers to
    // changes.
    assert_eq!(unsafe { libc::dup3(fuse.as_raw_fd(), number, libc::O_CLOEXEC) }, number);
}

pub(crate) const DATA_SIZE: u64 = 24 * 1024 * 1024 + 777;
pub(crate) const SMALL_FILES: u64 = 40;

pub(crate) fn small_size(index: u64) -> u64 {
    1000 + 977 * index
}

/// `/data`, and `/d/f0` to `/d/f39`.
struct Files {
    tables: Arc<Tables>,
    config: Config,
    fuse: OwnedFd,
}

impl Files {
    /// Takes a look-up that is never answered; whether it did.
    fn hang(&self, name: &OsStr) -> bool {
        if name != HANG || std::fs::File::create_new(mark(HANG)).is_err() {
            return false;
        }
        let fuse = self.fuse.try_clone().unwrap();
        std::thread::spawn(move || notify_expire_entry(fuse, ROOT_ID, b"x"));
        true
    }

    fn count(&self, request: &Request, counter: Counter) {
        self.tables.counters.add(counter, 1);
        if request.unique().0 & RESEND_BIT != 0 {
            self.tables.counters.add(Counter::Resent, 1);
        }
    }

    fn child(&self, parent: u64, name: &[u8]) -> Option<u64> {
        let file = |size| NodeKind::File {
            version: FileVersion { size, mtime_ns: 1, key: VersionKey::new(Bytes::from_static(b"v1")).unwrap() },
        };
        let kind = match (self.tables.nodes.path(parent)?.as_bytes(), name) {
            (b"/", b"data") => file(DATA_SIZE),
            (b"/", b"d") => NodeKind::Directory,
            (b"/d", name) => {
                let index: u64 = std::str::from_utf8(name.strip_prefix(b"f")?).ok()?.parse().ok()?;
                if index >= SMALL_FILES {
                    return None;
                }
                file(small_size(index))
            }
            _ => return None,
        };
        Some(self.tables.nodes.intern(parent, name, &kind).unwrap())
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let (size, kind, perm) = match self.tables.nodes.resolve(ino)?.kind {
            NodeKind::Directory => (4096, FileType::Directory, 0o555),
            NodeKind::File { version } => (version.size, FileType::RegularFile, 0o444),
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn names(&self, ino: u64) -> Vec<String> {
        match self.tables.nodes.path(ino).unwrap().as_bytes() {
            b"/" => vec!["data".to_owned(), "d".to_owned()],
            _ => (0..SMALL_FILES).map(|index| format!("f{index}")).collect(),
        }
    }
}

const NO_TTL: Duration = Duration::ZERO;

impl Filesystem for Files {
    fn init(&mut self, _request: &Request, config: &mut fuser::KernelConfig) -> std::io::Result<()> {
        // Everything that is offered was accepted: the reply of every generation is the same.
        config.add_capabilities(config.capabilities()).unwrap();
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.count(request, Counter::Lookup);
        if self.hang(name) {
            // Dropped, it would be answered.
            return std::mem::forget(reply);
        }
        match self.child(parent.0, name.as_bytes()).and_then(|id| self.attr(id)) {
            Some(attr) => reply.entry(&NO_TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.count(request, Counter::Getattr);
        match self.attr(ino.0) {
            Some(attr) => reply.attr(&NO_TTL, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.count(request, Counter::Open);
        match self.tables.opens.open(request.unique().0, ino.0, OpenMode::Cached) {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH),
            Err(_) => reply.error(Errno::ENFILE),
        }
    }

    fn release(
        &self,
        request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.count(request, Counter::Release);
        self.tables.opens.release(fh.0);
        reply.ok();
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.count(request, Counter::Read);
        std::thread::sleep(Duration::from_millis(self.config.read_delay_ms));
        // Not even a handle of a dead daemon may be unknown.
        let handle = self.tables.opens.handle(fh.0).filter(|handle| handle.node == ino.0);
        let (Some(_), Some(attr)) = (handle, self.attr(ino.0)) else { return reply.error(Errno::EBADF) };
        let mut bytes = vec![0; u64::from(size).min(attr.size.saturating_sub(offset)) as usize];
        fill(offset, &mut bytes);
        self.tables.counters.add(Counter::BytesRead, bytes.len() as u64);
        reply.data(&bytes);
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.count(request, Counter::Readdir);
        for (index, name) in self.names(ino.0).iter().enumerate().skip(offset as usize) {
            let id = self.child(ino.0, name.as_bytes()).unwrap();
            let kind = self.attr(id).unwrap().kind;
            if reply.add(INodeNo(id), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.count(request, Counter::Readdirplus);
        for (index, name) in self.names(ino.0).iter().enumerate().skip(offset as usize) {
            let id = self.child(ino.0, name.as_bytes()).unwrap();
            let attr = self.attr(id).unwrap();
            if reply.add(INodeNo(id), index as u64 + 1, name, &NO_TTL, &attr, Generation(0)) {
                break;
            }
        }
        reply.ok();
    }
}
