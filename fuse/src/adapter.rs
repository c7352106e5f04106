//! From `fuser` to [`FileSystem`] and back. It translates, counts, and decides where a request runs.
//!
//! - What the tables answer is answered on the thread that received it.
//! - Anything else is polled once on that thread (what is in memory is answered without waking another one), and goes on
//!   in the runtime if it has to wait. So the receiving threads never wait.
//! - Look-ups and reads have lanes of their own: reads that wait for a stalled worker hold no look-up. What waits for
//!   its lane is bounded by the kernel: a request for every thread that waits, and `max_background` beside them; each is
//!   about 1 KiB.
//! - A request that is dropped (a panic, or the time limit that no request should ever reach) is answered with `EIO` by
//!   its reply.
//! - Replies come from memory that was just written, never from a mapped file: a page fault in the middle of a reply is
//!   an `EIO` for the reader when the daemon is killed there.
//!
//! Every change is refused with `EROFS`. Locks are left to the kernel (they are not negotiated). `ENOSYS` is the answer
//! only where the kernel then does the right thing by itself for ever: flush, lseek (no holes are known), poll, bmap; and,
//! in a mount for small files, open and opendir.

use std::{
    cell::RefCell,
    ffi::OsStr,
    future::Future,
    io,
    os::unix::ffi::OsStrExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use forebay_keeper::tables::{Counter, OpenMode, RESEND_BIT, Shape};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use tokio::{runtime::Handle, sync::Semaphore};

use crate::{
    errno::Errno,
    fs::{Attributes, DirectoryEntry, EntrySink, FileSystem, Opened, PREFERRED_READ, STATFS_BLOCK, XattrReply},
    tree::Tree,
};

/// Requests of a lane that run at once. A read holds at most its 1 MiB of the client's budget, which is the bound that
/// counts; this one keeps the runtime's queues short.
const LANE: usize = 512;
/// Beyond the deadline of the tree's calls, which end by themselves.
const GRACE: Duration = Duration::from_secs(10);
/// Background requests (read-ahead) that the kernel may have under way.
const MAX_BACKGROUND: u16 = 64;
/// Longest name that statfs(2) tells.
const NAME_MAX: u32 = 255;

/// What the kernel is asked for where it has it. A mount of a keeper is already past this: its INIT offers what was
/// accepted.
const WANTED: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_ASYNC_DIO)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_EXPLICIT_INVAL_DATA)
    .union(InitFlags::FUSE_HAS_RESEND)
    .union(InitFlags::FUSE_ALLOW_IDMAP)
    .union(InitFlags::FUSE_PASSTHROUGH);

/// The ioctl of a directory that takes hints: `_IOW(0xFB, 1, char[N])` of asm-generic/ioctl.h, for any N up to 16,383.
const IOC_HINT: u32 = 1 << 30 | 0xFB << 8 | 1;
/// The bits of N.
const IOC_SIZE: u32 = 0x3FFF << 16;

/// Nodes are never reused, so all are of one generation.
const GENERATION: Generation = Generation(0);

/// A volume as `fuser` sees it.
pub struct Adapter<T: Tree> {
    fs: Arc<FileSystem<T>>,
    runtime: Handle,
    metadata: Arc<Semaphore>,
    data: Arc<Semaphore>,
    limit: Duration,
}

impl<T: Tree> Adapter<T> {
    /// Serves `fs`; what waits does so in `runtime`. `deadline` is that of one call of the tree.
    pub fn new(fs: Arc<FileSystem<T>>, runtime: Handle, deadline: Duration) -> Self {
        let lane = || Arc::new(Semaphore::new(LANE));
        Self { fs, runtime, metadata: lane(), data: lane(), limit: deadline + GRACE }
    }

    fn count(&self, counter: Counter, request: &Request) {
        let counters = self.fs.counters();
        counters.add(counter, 1);
        if request.unique().0 & RESEND_BIT != 0 {
            counters.add(Counter::Resent, 1);
        }
    }

    fn refuse(&self, errno: Errno) -> fuser::Errno {
        refuse(&self.fs, errno)
    }

    /// Runs a request: here if it can be answered at once, in the runtime if not.
    fn run(&self, lane: &Arc<Semaphore>, request: impl Future<Output = ()> + Send + 'static) {
        let _context = self.runtime.enter();
        let limit = self.limit;
        let mut request: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(request);
        let Ok(permit) = lane.clone().try_acquire_owned() else {
            let lane = lane.clone();
            self.runtime.spawn(tokio::time::timeout(limit, async move {
                // The lane is never closed.
                let _permit = lane.acquire_owned().await;
                request.await;
            }));
            return;
        };
        let poll = || request.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(Poll::Ready(())) => {}
            // Its waker is set when the runtime polls it again.
            Ok(Poll::Pending) => {
                self.runtime.spawn(async move {
                    let _permit = permit;
                    let _ = tokio::time::timeout(limit, request).await;
                });
            }
            // The panic was reported by its hook; the reply answers when it is dropped.
            Err(_) => self.fs.counters().add(Counter::Errors, 1),
        }
    }
}

fn refuse<T: Tree>(fs: &FileSystem<T>, errno: Errno) -> fuser::Errno {
    // Answers that programs ask for are no errors; these are the file system's fault.
    if matches!(errno, Errno::EIO | Errno::ESTALE | Errno::ENOMEM | Errno::ENFILE) {
        fs.counters().add(Counter::Errors, 1);
    }
    fuser::Errno::from_i32(errno.code())
}

/// The kernel opens files (or directories) by itself from now on, with what is cached of them kept.
fn unneeded() -> fuser::Errno {
    fuser::Errno::from_i32(Errno::ENOSYS.code())
}

fn reply_opened(reply: ReplyOpen, opened: Opened) {
    let handle = FileHandle(opened.handle);
    match opened.mode {
        // Pages of a node never become stale, and there is nothing to flush.
        OpenMode::Cached => reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH),
        OpenMode::Direct => reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH),
        OpenMode::Passthrough { backing_id } => {
            // SAFETY: the id is the open table's, which has it as long as it is open; the keeper alone closes it, so it is
            // taken out again before it is dropped.
            let backing = unsafe { reply.wrap_backing(backing_id) };
            reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &backing);
            let _ = backing.into_raw();
        }
    }
}

fn system_time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    let time = system_time(attributes.time_ns);
    FileAttr {
        ino: INodeNo(attributes.id),
        size: attributes.size,
        blocks: attributes.blocks(),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes),
        perm: attributes.permissions(),
        nlink: attributes.links(),
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PREFERRED_READ,
        flags: 0,
    }
}

fn file_type(attributes: &Attributes) -> FileType {
    if attributes.directory { FileType::Directory } else { FileType::RegularFile }
}

/// The entry of a name that does not exist: node id 0, which the kernel remembers.
fn absent() -> FileAttr {
    file_attr(&Attributes { id: 0, directory: false, size: 0, time_ns: 0 })
}

struct Plain<'a>(&'a mut ReplyDirectory);

impl EntrySink for Plain<'_> {
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool {
        let DirectoryEntry { attributes, offset, name } = entry;
        !self.0.add(INodeNo(attributes.id), *offset, file_type(attributes), OsStr::from_bytes(name))
    }
}

struct Plus<'a> {
    reply: &'a mut ReplyDirectoryPlus,
    ttl: Duration,
}

impl EntrySink for Plus<'_> {
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool {
        let DirectoryEntry { attributes, offset, name } = entry;
        let attr = file_attr(attributes);
        !self.reply.add(attr.ino, *offset, OsStr::from_bytes(name), &self.ttl, &attr, GENERATION)
    }
}

thread_local! {
    /// Where the pieces of a read are put together; at most one request (1 MiB) for each thread of the runtime.
    static WHOLE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Answers a read. The pieces go back to the client's budget before the kernel copies, where there are several.
fn reply_data(reply: ReplyData, pieces: Vec<Bytes>) {
    if let [] | [_] = pieces.as_slice() {
        reply.data(pieces.first().map_or(&[], AsRef::as_ref));
        return;
    }
    WHOLE.with_borrow_mut(|whole| {
        whole.clear();
        for piece in pieces {
            whole.extend_from_slice(&piece);
        }
        reply.data(whole);
    });
}

fn reply_xattr<T: Tree>(fs: &FileSystem<T>, reply: ReplyXattr, answer: Result<XattrReply, Errno>) {
    match answer {
        Ok(XattrReply::Size(size)) => reply.size(size),
        Ok(XattrReply::Data(data)) => reply.data(&data),
        Err(errno) => reply.error(refuse(fs, errno)),
    }
}

/// Methods that refuse every change, each with its counter and a reply that has `error`.
macro_rules! read_only {
    ($($name:ident($($argument:ident: $type:ty),*) -> $reply:ty;)*) => {
        $(fn $name(&self, request: &Request, $($argument: $type,)* reply: $reply) {
            $(let _ = $argument;)*
            self.count(Counter::Other, request);
            reply.error(self.refuse(Errno::EROFS));
        })*
    };
}

/// The same for what the kernel goes on without.
macro_rules! not_needed {
    ($($name:ident($($argument:ident: $type:ty),*) -> $reply:ty, $counter:ident;)*) => {
        $(fn $name(&self, request: &Request, $($argument: $type,)* reply: $reply) {
            $(let _ = $argument;)*
            self.count(Counter::$counter, request);
            reply.error(self.refuse(Errno::ENOSYS));
        })*
    };
}

impl<T: Tree> Filesystem for Adapter<T> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        // What is not offered is left out, so this is never refused.
        let _ = config.add_capabilities(WANTED & offered);
        let _ = config.set_max_background(MAX_BACKGROUND);
        // Passthrough is refused without it; and it is not offered where it was not agreed.
        let _ = config.set_max_stack_depth(1);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.count(Counter::Lookup, request);
        let (fs, name) = (self.fs.clone(), name.as_bytes().to_vec());
        self.run(&self.metadata, async move {
            match fs.lookup(parent.0, &name).await {
                Ok(found) => {
                    let attr = found.attributes.as_ref().map_or_else(absent, file_attr);
                    reply.entry(&found.ttl, &attr, GENERATION);
                    fs.answered(parent.0, &name, &found);
                }
                Err(errno) => reply.error(refuse(&fs, errno)),
            }
        });
    }

    // Ids mean the same for ever, so nothing is counted for them here.
    fn forget(&self, _request: &Request, _ino: INodeNo, _nlookup: u64) {
        self.fs.counters().add(Counter::Forget, 1);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.count(Counter::Getattr, request);
        match self.fs.getattr(ino.0) {
            Ok(attributes) => reply.attr(&self.fs.ttl(), &file_attr(&attributes)),
            Err(errno) => reply.error(self.refuse(errno)),
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        self.count(Counter::Readlink, request);
        match self.fs.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(self.refuse(errno)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.count(Counter::Open, request);
        let (fs, unique) = (self.fs.clone(), request.unique().0);
        self.run(&self.metadata, async move {
            match fs.shape().await {
                Shape::Small => reply.error(unneeded()),
                Shape::Large => match fs.open(unique, ino.0, flags.0).await {
                    Ok(opened) => reply_opened(reply, opened),
                    Err(errno) => reply.error(refuse(&fs, errno)),
                },
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.count(Counter::Read, request);
        let fs = self.fs.clone();
        self.run(&self.data, async move {
            match fs.read(ino.0, offset, size).await {
                Ok(pieces) => reply_data(reply, pieces),
                Err(errno) => reply.error(refuse(&fs, errno)),
            }
        });
    }

    fn release(
        &self,
        request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.count(Counter::Release, request);
        let _context = self.runtime.enter();
        self.fs.release(fh.0);
        reply.ok();
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.count(Counter::Opendir, request);
        let fs = self.fs.clone();
        self.run(&self.metadata, async move {
            match fs.shape().await {
                Shape::Small => reply.error(unneeded()),
                Shape::Large => match fs.opendir(ino.0) {
                    Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE),
                    Err(errno) => reply.error(refuse(&fs, errno)),
                },
            }
        });
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.count(Counter::Readdir, request);
        let fs = self.fs.clone();
        self.run(&self.metadata, async move {
            match fs.readdir(ino.0, offset, &mut Plain(&mut reply)).await {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(refuse(&fs, errno)),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.count(Counter::Readdirplus, request);
        let fs = self.fs.clone();
        self.run(&self.metadata, async move {
            let ttl = fs.ttl();
            match fs.readdir(ino.0, offset, &mut Plus { reply: &mut reply, ttl }).await {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(refuse(&fs, errno)),
            }
        });
    }

    fn releasedir(&self, request: &Request, _ino: INodeNo, _fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.count(Counter::Releasedir, request);
        reply.ok();
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.count(Counter::Statfs, request);
        let statistics = self.fs.statfs();
        reply.statfs(statistics.blocks, 0, 0, statistics.files, 0, STATFS_BLOCK, NAME_MAX, STATFS_BLOCK);
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.count(Counter::Getxattr, request);
        let (fs, name) = (self.fs.clone(), name.as_bytes().to_vec());
        self.run(&self.metadata, async move {
            let answer = fs.getxattr(ino.0, &name, size).await;
            reply_xattr(&fs, reply, answer);
        });
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.count(Counter::Listxattr, request);
        reply_xattr(&self.fs, reply, self.fs.listxattr(ino.0, size));
    }

    fn access(&self, request: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        self.count(Counter::Access, request);
        match self.fs.access(ino.0, mask.bits()) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(self.refuse(errno)),
        }
    }

    fn fsync(&self, request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.count(Counter::Other, request);
        reply.ok();
    }

    fn fsyncdir(&self, request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.count(Counter::Other, request);
        reply.ok();
    }

    fn ioctl(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        self.count(Counter::Ioctl, request);
        let hinted = match cmd & !IOC_SIZE {
            IOC_HINT if flags.contains(IoctlFlags::FUSE_IOCTL_DIR) => self.fs.hint(ino.0, in_data),
            _ => Err(Errno::ENOTTY),
        };
        match hinted {
            // At most as many as there are bytes.
            Ok(taken) => reply.ioctl(taken as i32, &[]),
            Err(errno) => reply.error(self.refuse(errno)),
        }
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        self.count(Counter::Other, request);
        reply.error(self.refuse(Errno::EOPNOTSUPP));
    }

    not_needed! {
        flush(ino: INodeNo, fh: FileHandle, lock_owner: LockOwner) -> ReplyEmpty, Flush;
        lseek(ino: INodeNo, fh: FileHandle, offset: i64, whence: i32) -> ReplyLseek, Other;
        bmap(ino: INodeNo, blocksize: u32, idx: u64) -> ReplyBmap, Other;
        poll(ino: INodeNo, fh: FileHandle, ph: PollNotifier, events: PollEvents, flags: PollFlags) -> ReplyPoll, Other;
        getlk(ino: INodeNo, fh: FileHandle, lock_owner: LockOwner, start: u64, end: u64, typ: i32, pid: u32)
            -> ReplyLock, Other;
        setlk(ino: INodeNo, fh: FileHandle, lock_owner: LockOwner, start: u64, end: u64, typ: i32, pid: u32,
            sleep: bool) -> ReplyEmpty, Other;
    }

    read_only! {
        setattr(ino: INodeNo, mode: Option<u32>, uid: Option<u32>, gid: Option<u32>, size: Option<u64>,
            atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>, ctime: Option<SystemTime>, fh: Option<FileHandle>,
            crtime: Option<SystemTime>, chgtime: Option<SystemTime>, bkuptime: Option<SystemTime>,
            flags: Option<BsdFileFlags>) -> ReplyAttr;
        mknod(parent: INodeNo, name: &OsStr, mode: u32, umask: u32, rdev: u32) -> ReplyEntry;
        mkdir(parent: INodeNo, name: &OsStr, mode: u32, umask: u32) -> ReplyEntry;
        unlink(parent: INodeNo, name: &OsStr) -> ReplyEmpty;
        rmdir(parent: INodeNo, name: &OsStr) -> ReplyEmpty;
        symlink(parent: INodeNo, link_name: &OsStr, target: &Path) -> ReplyEntry;
        rename(parent: INodeNo, name: &OsStr, newparent: INodeNo, newname: &OsStr, flags: RenameFlags) -> ReplyEmpty;
        link(ino: INodeNo, newparent: INodeNo, newname: &OsStr) -> ReplyEntry;
        write(ino: INodeNo, fh: FileHandle, offset: u64, data: &[u8], write_flags: WriteFlags, flags: OpenFlags,
            lock_owner: Option<LockOwner>) -> ReplyWrite;
        setxattr(ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, position: u32) -> ReplyEmpty;
        removexattr(ino: INodeNo, name: &OsStr) -> ReplyEmpty;
        create(parent: INodeNo, name: &OsStr, mode: u32, umask: u32, flags: i32) -> ReplyCreate;
        copy_file_range(ino_in: INodeNo, fh_in: FileHandle, offset_in: u64, ino_out: INodeNo, fh_out: FileHandle,
            offset_out: u64, len: u64, flags: CopyFileRangeFlags) -> ReplyWrite;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use forebay_keeper::tables::{Counters, NodeTable, OpenTable};
    use tokio::sync::watch;

    use super::*;
    use crate::{
        fs::{Options, Tables},
        memory::MemoryTree,
        notices::Notices,
    };

    fn adapter() -> Adapter<MemoryTree> {
        let tables = Tables {
            nodes: Arc::new(NodeTable::create(1 << 20).unwrap()),
            opens: Arc::new(OpenTable::create(16).unwrap()),
            counters: Arc::new(Counters::create().unwrap()),
        };
        let options = Options { ttl: Duration::from_secs(1), directory_time_ns: 0 };
        let fs = Arc::new(FileSystem::new(MemoryTree::new(), tables, Arc::new(Notices::new()), options));
        Adapter::new(fs, Handle::current(), Duration::from_secs(5))
    }

    /// Counts how often it was dropped before it ended: where a reply would answer with an error.
    struct Reply(Arc<AtomicU64>, bool);

    impl Reply {
        fn send(mut self) {
            self.1 = true;
        }
    }

    impl Drop for Reply {
        fn drop(&mut self) {
            if !self.1 {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_reads_hold_no_look_up() {
        let adapter = adapter();
        let (open, gate) = watch::channel(false);
        let (done, dropped) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let read = || {
            let (mut gate, done, reply) = (gate.clone(), done.clone(), Reply(dropped.clone(), false));
            async move {
                gate.wait_for(|open| *open).await.unwrap();
                reply.send();
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        let total = LANE as u64 + 100;
        for _ in 0..total {
            adapter.run(&adapter.data, read());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(adapter.data.available_permits(), 0);
        // A look-up is answered while this call runs.
        let answered = Arc::new(AtomicU64::new(0));
        let lookup = answered.clone();
        adapter.run(&adapter.metadata, async move { lookup.store(1, Ordering::Relaxed) });
        assert_eq!(answered.load(Ordering::Relaxed), 1);
        // When the worker comes back, so do all that waited.
        open.send_replace(true);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((done.load(Ordering::Relaxed), dropped.load(Ordering::Relaxed)), (total, 0));
        assert_eq!(adapter.data.available_permits(), LANE);
    }

    #[tokio::test(start_paused = true)]
    async fn no_request_waits_for_ever() {
        let adapter = adapter();
        let dropped = Arc::new(AtomicU64::new(0));
        // So many that some never reach their lane.
        for _ in 0..LANE + 10 {
            let reply = Reply(dropped.clone(), false);
            adapter.run(&adapter.data, async move {
                std::future::pending::<()>().await;
                drop(reply);
            });
        }
        tokio::time::sleep(Duration::from_secs(5) + GRACE - Duration::from_millis(10)).await;
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(dropped.load(Ordering::Relaxed), LANE as u64 + 10);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_of_one_request() {
        let adapter = adapter();
        let dropped = Arc::new(AtomicU64::new(0));
        let reply = Reply(dropped.clone(), false);
        adapter.run(&adapter.metadata, async move {
            let _reply = reply;
            panic!("as a test");
        });
        assert_eq!(dropped.load(Ordering::Relaxed), 1);
        assert_eq!(adapter.metadata.available_permits(), LANE);
        assert_eq!(adapter.fs.counters().get(Counter::Errors), 1);
    }

    #[test]
    fn times_before_the_epoch() {
        assert_eq!(system_time(-1_500_000_000), UNIX_EPOCH - Duration::from_millis(1500));
        assert_eq!(system_time(5), UNIX_EPOCH + Duration::from_nanos(5));
        // The extremes do not overflow.
        system_time(i64::MIN);
        system_time(i64::MAX);
    }

    #[test]
    fn attributes_are_read_only() {
        let file = file_attr(&Attributes { id: 20, directory: false, size: 513, time_ns: 1 });
        assert_eq!((file.ino, file.perm, file.nlink, file.blocks), (INodeNo(20), 0o444, 1, 2));
        let directory = file_attr(&Attributes { id: 1, directory: true, size: 0, time_ns: 1 });
        assert_eq!((directory.perm, directory.nlink, directory.kind), (0o555, 2, FileType::Directory));
        assert_eq!(absent().ino, INodeNo(0));
    }
}
