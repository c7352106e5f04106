//! A disk that can hang: a file system in memory, over FUSE, that stops to answer what asks for the medium. What a kernel
//! answers from its caches (look-ups, attributes, free space) it answers always.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags, spawn_mount,
};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

const ROOT: u64 = 1;
/// Nothing is remembered by the kernel: everything asks.
const TTL: Duration = Duration::ZERO;
const BLOCK: u32 = 4096;

/// The cache directory of a worker; what is in its `chunks` is on a disk that can hang. It has no place in the tree of
/// mounts, so that nothing is left of it when the process ends, however that comes.
pub(crate) struct Disk {
    dir: TempDir,
    abort: PathBuf,
    state: Arc<Mutex<State>>,
    _root: OwnedFd,
    _session: BackgroundSession,
}

/// The disk hangs as long as this lives. To be made after whoever uses the disk, so that it ends before them.
pub(crate) struct Hang<'a>(&'a Disk);

impl Disk {
    /// `None` where nothing can be mounted.
    pub(crate) fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (place, chunks) = (dir.path().join("place"), dir.path().join("chunks"));
        std::fs::create_dir(&place).unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        state.lock().unwrap().nodes.insert(ROOT, Node::directory());
        let session = match spawn_mount(Memory(state.clone()), &place, &Config::default()) {
            Ok(session) => session,
            Err(error) => {
                eprintln!("SKIPPED: mounting needs /dev/fuse and root ({error})");
                return None;
            }
        };
        let root: OwnedFd = std::fs::File::open(&place).unwrap().into();
        unmount(&place, UnmountFlags::DETACH).unwrap();
        std::os::unix::fs::symlink(format!("/proc/self/fd/{}", root.as_raw_fd()), &chunks).unwrap();
        // The device has no major number; its minor one is the connection's.
        let connection = rustix::fs::minor(std::fs::metadata(&chunks).unwrap().dev());
        let abort = PathBuf::from(format!("/sys/fs/fuse/connections/{connection}/abort"));
        Some(Self { dir, abort, state, _root: root, _session: session })
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    pub(crate) fn hang(&self) -> Hang<'_> {
        self.state.lock().unwrap().hangs = true;
        Hang(self)
    }

    /// Requests that are not answered, those of the index apart: it has a thread of its own.
    pub(crate) fn stuck(&self) -> usize {
        self.state.lock().unwrap().held.iter().filter(|(of_index, _)| !of_index).count()
    }
}

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        let Ok(mut state) = self.0.state.lock() else { return };
        state.hangs = false;
        for (_, operation) in std::mem::take(&mut state.held) {
            operation(&mut state);
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever still waits gets an error, also where a test ended early.
        let _ = std::fs::write(&self.abort, "1");
    }
}

type Operation = Box<dyn FnOnce(&mut State) + Send>;

#[derive(Default)]
struct State {
    nodes: HashMap<u64, Node>,
    last: u64,
    hangs: bool,
    /// What is not answered, and whether it is about the index.
    held: Vec<(bool, Operation)>,
}

enum Content {
    Directory(BTreeMap<OsString, u64>),
    File(Vec<u8>),
}

struct Node {
    content: Content,
    links: u32,
    is_index: bool,
}

impl Node {
    fn directory() -> Self {
        Self { content: Content::Directory(BTreeMap::new()), links: 2, is_index: false }
    }

    fn kind(&self) -> FileType {
        match self.content {
            Content::Directory(_) => FileType::Directory,
            Content::File(_) => FileType::RegularFile,
        }
    }
}

impl State {
    fn attributes(&self, number: u64) -> Option<FileAttr> {
        let node = self.nodes.get(&number)?;
        let size = match &node.content {
            Content::Directory(_) => 0,
            Content::File(bytes) => bytes.len() as u64,
        };
        let time = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: node.kind(),
            perm: 0o700,
            nlink: node.links,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }

    fn names(&mut self, directory: INodeNo) -> Option<&mut BTreeMap<OsString, u64>> {
        match &mut self.nodes.get_mut(&directory.0)?.content {
            Content::Directory(names) => Some(names),
            Content::File(_) => None,
        }
    }

    fn bytes(&mut self, file: INodeNo) -> Option<&mut Vec<u8>> {
        match &mut self.nodes.get_mut(&file.0)?.content {
            Content::File(bytes) => Some(bytes),
            Content::Directory(_) => None,
        }
    }

    fn find(&mut self, parent: INodeNo, name: &OsStr) -> Option<FileAttr> {
        let number = *self.names(parent)?.get(name)?;
        self.attributes(number)
    }

    fn make(&mut self, parent: INodeNo, name: OsString, node: Node) -> Option<FileAttr> {
        let number = ROOT + 1 + self.last;
        if self.names(parent)?.contains_key(&name) {
            return None;
        }
        self.last += 1;
        self.names(parent)?.insert(name, number);
        self.nodes.insert(number, node);
        self.attributes(number)
    }

    fn unlink(&mut self, parent: INodeNo, name: &OsStr) -> bool {
        let Some(number) = self.names(parent).and_then(|names| names.remove(name)) else { return false };
        if let Some(node) = self.nodes.get_mut(&number) {
            node.links -= 1;
        }
        true
    }
}

struct Memory(Arc<Mutex<State>>);

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Does what asks for the medium, now or when the disk no longer hangs.
    fn on_medium(&self, of_index: bool, operation: impl FnOnce(&mut State) + Send + 'static) {
        let mut state = self.state();
        if state.hangs {
            state.held.push((of_index, Box::new(operation)));
        } else {
            operation(&mut state);
        }
    }

    fn of_index(&self, file: INodeNo) -> bool {
        self.state().nodes.get(&file.0).is_some_and(|node| node.is_index)
    }
}

fn done(reply: ReplyEmpty, done: bool) {
    if done { reply.ok() } else { reply.error(Errno::ENOENT) }
}

fn is_index(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("index"))
}

impl Filesystem for Memory {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.state().find(parent, name) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.state().attributes(ino.0) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = (8 << 30) / u64::from(BLOCK);
        reply.statfs(blocks, blocks, blocks, 1 << 20, 1 << 20, BLOCK, 255, BLOCK);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut state = self.state();
        let Some(names) = state.names(ino).cloned() else { return reply.error(Errno::ENOTDIR) };
        for (at, (name, number)) in names.iter().enumerate().skip(offset as usize) {
            let Some(node) = state.nodes.get(number) else { continue };
            if reply.add(INodeNo(*number), at as u64 + 1, node.kind(), name) {
                break;
            }
        }
        reply.ok();
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.on_medium(self.of_index(ino), move |state| {
            if let (Some(size), Some(bytes)) = (size, state.bytes(ino)) {
                bytes.resize(size as usize, 0);
            }
            match state.attributes(ino.0) {
                Some(attributes) => reply.attr(&TTL, &attributes),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let name = name.to_owned();
        self.on_medium(false, move |state| match state.make(parent, name, Node::directory()) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::EEXIST),
        });
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let (name, is_index) = (name.to_owned(), is_index(name));
        self.on_medium(is_index, move |state| {
            let node = Node { content: Content::File(Vec::new()), links: 1, is_index };
            match state.make(parent, name, node) {
                Some(attributes) => {
                    let flags = FopenFlags::FOPEN_DIRECT_IO;
                    reply.created(&TTL, &attributes, Generation(0), FileHandle(0), flags);
                }
                None => reply.error(Errno::EEXIST),
            }
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // No page stays in the kernel: every read asks.
        self.on_medium(self.of_index(ino), |_| reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO));
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.on_medium(self.of_index(ino), move |state| {
            let Some(bytes) = state.bytes(ino) else { return reply.error(Errno::EISDIR) };
            let from = (offset as usize).min(bytes.len());
            reply.data(&bytes[from..bytes.len().min(from + size as usize)]);
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.on_medium(self.of_index(ino), move |state| {
            let Some(bytes) = state.bytes(ino) else { return reply.error(Errno::EISDIR) };
            let (from, to) = (offset as usize, offset as usize + data.len());
            if bytes.len() < to {
                bytes.resize(to, 0);
            }
            bytes[from..to].copy_from_slice(&data);
            reply.written(data.len() as u32);
        });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.on_medium(self.of_index(ino), |_| reply.ok());
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.on_medium(is_index(&name), move |state| done(reply, state.unlink(parent, &name)));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, to_name) = (name.to_owned(), to_name.to_owned());
        self.on_medium(false, move |state| {
            let Some(number) = state.names(parent).and_then(|names| names.remove(&name)) else {
                return reply.error(Errno::ENOENT);
            };
            state.unlink(to_parent, &to_name);
            done(reply, state.names(to_parent).map(|names| names.insert(to_name, number)).is_some());
        });
    }
}
