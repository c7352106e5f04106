use forebay_keeper::tables::ROOT_ID;

use super::*;
use crate::memory::{Contents, MemoryTree, pattern};

pub(super) fn path(text: &str) -> DatasetPath {
    DatasetPath::parse(text.as_bytes().to_vec()).unwrap()
}

pub(super) fn tables() -> Tables {
    Tables {
        nodes: Arc::new(NodeTable::create(16 << 20).unwrap()),
        opens: Arc::new(OpenTable::create(1024).unwrap()),
        counters: Arc::new(Counters::create().unwrap()),
    }
}

/// The same tables, as a successor maps them.
pub(super) fn handed_over(tables: &Tables) -> Tables {
    let fd = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    Tables {
        nodes: Arc::new(NodeTable::attach(fd(tables.nodes.fd())).unwrap()),
        opens: Arc::new(OpenTable::attach(fd(tables.opens.fd())).unwrap()),
        counters: Arc::new(Counters::attach(fd(tables.counters.fd())).unwrap()),
    }
}

pub(super) fn file_system(tree: &MemoryTree, tables: Tables) -> FileSystem<MemoryTree> {
    let options = Options { ttl: Duration::from_secs(60), directory_time_ns: 7 };
    FileSystem::new(tree.clone(), tables, Arc::new(Notices::new()), options)
}

/// Takes so many entries.
pub(super) struct Buffer {
    pub(super) room: usize,
    pub(super) entries: Vec<(Vec<u8>, u64, Attributes)>,
}

impl EntrySink for Buffer {
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool {
        if self.entries.len() == self.room {
            return false;
        }
        self.entries.push((entry.name.to_vec(), entry.offset, entry.attributes));
        true
    }
}

pub(super) async fn list(
    fs: &FileSystem<MemoryTree>,
    id: u64,
    offset: u64,
    room: usize,
) -> Result<Vec<(Vec<u8>, u64, Attributes)>, Errno> {
    let mut buffer = Buffer { room, entries: Vec::new() };
    fs.readdir(id, offset, &mut buffer).await?;
    Ok(buffer.entries)
}

async fn list_all(fs: &FileSystem<MemoryTree>, id: u64, room: usize) -> Vec<Vec<u8>> {
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let entries = list(fs, id, offset, room).await.unwrap();
        let Some((_, last, _)) = entries.last() else { return names };
        offset = *last;
        names.extend(entries.into_iter().map(|(name, _, _)| name));
    }
}

fn given(text: &'static str) -> Contents {
    Contents::Given(Bytes::from_static(text.as_bytes()))
}

async fn lookup(fs: &FileSystem<MemoryTree>, text: &str) -> Attributes {
    let mut attributes = fs.getattr(ROOT_ID).unwrap();
    for name in path(text).components() {
        attributes = fs.lookup(attributes.id, name).await.unwrap().attributes.unwrap();
    }
    attributes
}

async fn read_all(fs: &FileSystem<MemoryTree>, id: u64) -> Result<Vec<u8>, Errno> {
    Ok(fs.read(id, 0, 1 << 20).await?.concat())
}

#[tokio::test]
async fn names_and_attributes() {
    let tree = MemoryTree::new();
    let version = tree.put(&path("/d/a b\nä"), given("hello")).unwrap();
    let fs = file_system(&tree, tables());
    let directory = lookup(&fs, "/d").await;
    assert_eq!((directory.directory, directory.permissions(), directory.links()), (true, 0o555, 2));
    assert_eq!(directory.time_ns, 7);
    let file = lookup(&fs, "/d/a b\nä").await;
    assert_eq!((file.size, file.permissions(), file.blocks(), file.links()), (5, 0o444, 1, 1));
    assert_eq!(file.time_ns, version.mtime_ns);
    assert_eq!(fs.getattr(file.id), Ok(file));
    assert_eq!(fs.getattr(directory.id), Ok(directory));

    assert_eq!(fs.lookup(ROOT_ID, b"none").await.unwrap().attributes, None);
    assert_eq!(fs.lookup(file.id, b"x").await.unwrap_err(), Errno::ENOTDIR);
    assert_eq!(fs.lookup(999, b"x").await.unwrap_err(), Errno::ESTALE);
    assert_eq!(fs.lookup(ROOT_ID, &[b'x'; 256]).await.unwrap_err(), Errno::ENAMETOOLONG);
    assert_eq!(fs.lookup(ROOT_ID, &[b'x'; 255]).await.unwrap().attributes, None);
    assert_eq!(fs.getattr(999), Err(Errno::ESTALE));
    assert_eq!(fs.readlink(file.id), Err(Errno::EINVAL));
    assert_eq!(fs.access(file.id, libc::R_OK), Ok(()));
    assert_eq!(fs.access(file.id, libc::W_OK), Err(Errno::EROFS));
    assert_eq!(fs.access(file.id, libc::X_OK), Err(Errno::EACCES));
    assert_eq!(fs.access(directory.id, libc::X_OK), Ok(()));
}

#[tokio::test]
async fn a_failing_tree_is_an_errno_and_no_absence() {
    let tree = MemoryTree::new();
    tree.put(&path("/f"), given("x")).unwrap();
    let table = [
        (TreeError::Unavailable("why".to_owned()), Errno::EIO),
        (TreeError::PermissionDenied("why".to_owned()), Errno::EACCES),
        (TreeError::NotDirectory, Errno::ENOTDIR),
    ];
    for (error, errno) in table {
        let fs = file_system(&tree, tables());
        tree.fail([error.clone()]);
        assert_eq!(fs.lookup(ROOT_ID, b"f").await.unwrap_err(), errno);
        tree.fail([error]);
        assert_eq!(list(&fs, ROOT_ID, 2, 10).await, Err(errno));
        assert!(fs.lookup(ROOT_ID, b"f").await.unwrap().attributes.is_some());
    }
}

#[tokio::test]
async fn opening_reads_and_nothing_else() {
    let tree = MemoryTree::new();
    tree.put(&path("/d/f"), given("hello")).unwrap();
    let fs = file_system(&tree, tables());
    let (directory, file) = (lookup(&fs, "/d").await.id, lookup(&fs, "/d/f").await.id);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(fs.open(1, file, flags).await, Err(Errno::EROFS));
    }
    assert_eq!(fs.open(1, directory, libc::O_RDONLY).await, Err(Errno::EISDIR));
    assert_eq!(fs.opendir(file), Err(Errno::ENOTDIR));
    assert_eq!(fs.read(directory, 0, 1).await, Err(Errno::EISDIR));
    let handle = fs.open(8, file, libc::O_RDONLY | libc::O_CLOEXEC).await.unwrap().handle;
    // Sent again to a successor: the same handle.
    let successor = file_system(&tree, handed_over(fs.tables()));
    let resent = 8 | forebay_keeper::tables::RESEND_BIT;
    assert_eq!(successor.open(resent, file, libc::O_RDONLY).await.map(|opened| opened.handle), Ok(handle));
    assert_ne!(successor.open(10, file, libc::O_RDONLY).await.map(|opened| opened.handle), Ok(handle));
    successor.release(handle);
    successor.release(handle);
}

#[tokio::test]
async fn reads_end_at_the_end() {
    let tree = MemoryTree::new();
    tree.put(&path("/f"), Contents::Pattern { seed: 3, size: 10_000 }).unwrap();
    tree.put(&path("/empty"), given("")).unwrap();
    let fs = file_system(&tree, tables());
    let id = lookup(&fs, "/f").await.id;
    let mut whole = vec![0; 10_000];
    pattern(3, 0, &mut whole);
    for (offset, size) in [(0, 10_000), (0, 20_000), (9_999, 5), (5_000, 1), (10_000, 1), (u64::MAX, u32::MAX)] {
        let from = (offset as usize).min(10_000);
        let to = (from + size as usize).min(10_000);
        assert_eq!(fs.read(id, offset, size).await.unwrap().concat(), whole[from..to]);
    }
    let empty = lookup(&fs, "/empty").await;
    assert_eq!((empty.size, empty.blocks()), (0, 0));
    assert_eq!(read_all(&fs, empty.id).await, Ok(Vec::new()));
    assert_eq!(fs.counters().get(Counter::BytesRead), 10_000 + 10_000 + 1 + 1);
}

#[tokio::test]
async fn a_changed_file_is_another_node() {
    let tree = MemoryTree::new();
    tree.put(&path("/f"), given("one")).unwrap();
    let fs = file_system(&tree, tables());
    let old = lookup(&fs, "/f").await;
    tree.put(&path("/f"), given("second")).unwrap();
    assert_eq!(lookup(&fs, "/f").await.id, old.id, "nobody said that it changed");
    fs.forget_listing(None);
    let new = lookup(&fs, "/f").await;
    assert_ne!(old.id, new.id);
    assert_eq!(read_all(&fs, old.id).await.unwrap(), b"one");
    assert_eq!(read_all(&fs, new.id).await.unwrap(), b"second");
    assert_eq!(fs.getattr(old.id).unwrap().size, 3);
    // A successor without readers says the same.
    let successor = file_system(&tree, handed_over(fs.tables()));
    assert_eq!(read_all(&successor, old.id).await.unwrap(), b"one");
    assert_eq!(lookup(&successor, "/f").await, new);
}

#[tokio::test]
async fn a_version_that_is_gone_is_stale_and_asked_for_again() {
    let tree = MemoryTree::new();
    let version = tree.put(&path("/f"), given("one")).unwrap();
    let fs = file_system(&tree, tables());
    let old = lookup(&fs, "/f").await.id;
    let handle = fs.open(1, old, libc::O_RDONLY).await.unwrap().handle;
    tree.drop_version(&path("/f"), &version);
    assert_eq!(read_all(&fs, old).await, Err(Errno::ESTALE));
    assert_eq!(read_all(&fs, old).await, Err(Errno::ESTALE));
    // The kernel is told once that the name must be looked up.
    let notice = crate::notices::Notice::Names { directory: ROOT_ID, names: vec![Bytes::from_static(b"f")] };
    assert_eq!(fs.notices.try_next(), Some(notice));
    assert_eq!(fs.notices.try_next(), None);
    // A name that is still cached is refused, so that the kernel looks it up; also after the handle was closed.
    assert_eq!(fs.open(2, old, libc::O_RDONLY).await, Err(Errno::ESTALE));
    fs.release(handle);
    assert_eq!(fs.open(3, old, libc::O_RDONLY).await, Err(Errno::ESTALE));
    // The directory's owner insists that it is the current version: then it is not refused for ever.
    assert_eq!(lookup(&fs, "/f").await.id, old);
    assert!(fs.open(4, old, libc::O_RDONLY).await.is_ok());
    tree.put(&path("/f"), given("two")).unwrap();
    let new = lookup(&fs, "/f").await.id;
    assert_eq!(read_all(&fs, new).await.unwrap(), b"two");
}

#[tokio::test]
async fn a_tree_that_gives_too_little_is_an_error() {
    let tree = MemoryTree::new();
    tree.put(&path("/f"), given("12345")).unwrap();
    let fs = file_system(&tree, tables());
    // A record that claims more than there is.
    let version = FileVersion { size: 9, ..tree_version(&tree, "f").await };
    let id = fs.tables.nodes.intern(ROOT_ID, b"f", &NodeKind::File { version }).unwrap();
    assert_eq!(fs.read(id, 0, 5).await.unwrap().concat(), b"12345");
    assert_eq!(fs.read(id, 0, 9).await, Err(Errno::EIO));
}

async fn tree_version(tree: &MemoryTree, name: &str) -> FileVersion {
    match tree.lookup(&DatasetPath::root(), name.as_bytes()).await.unwrap().kind {
        EntryKind::File { version } => version,
        EntryKind::Directory => panic!("{name} is a directory"),
    }
}

#[tokio::test]
async fn listings_have_dots_and_all_names_in_order() {
    let tree = MemoryTree::new();
    for name in ["/b", "/a/x", "/a-", "/a0", "/line\nbreak", "/ü"] {
        tree.put(&path(name), given("x")).unwrap();
    }
    let fs = file_system(&tree, tables());
    let expected: Vec<Vec<u8>> =
        [".", "..", "a-", "a", "a0", "b", "line\nbreak", "ü"].iter().map(|name| name.as_bytes().to_vec()).collect();
    for room in [1, 2, 3, 100] {
        assert_eq!(list_all(&fs, ROOT_ID, room).await, expected, "room for {room}");
    }
    let entries = list(&fs, lookup(&fs, "/a").await.id, 0, 10).await.unwrap();
    assert_eq!(entries[1].2.id, ROOT_ID);
    assert_eq!(entries.len(), 3);
    tree.put_directory(&path("/empty")).unwrap();
    assert_eq!(list_all(&fs, lookup(&fs, "/empty").await.id, 10).await.len(), 2);
    // No offsets of this directory.
    let x = entries[2].2.id;
    for offset in [3, 15, 999_999, u64::MAX, x] {
        assert_eq!(list(&fs, ROOT_ID, offset, 10).await, Err(Errno::EINVAL));
    }
}

#[tokio::test]
async fn a_large_directory_is_listed_with_few_requests() {
    let tree = MemoryTree::new();
    let count = 10_000;
    for number in 0..count {
        tree.put(&path(&format!("/d/{number:05}")), Contents::Pattern { seed: 1, size: number }).unwrap();
    }
    let fs = file_system(&tree, tables());
    let id = lookup(&fs, "/d").await.id;
    let (mut names, mut offset, mut replies) = (0, 0, 0);
    let mut server = fs;
    loop {
        let entries = list(&server, id, offset, 200).await.unwrap();
        let Some((_, last, _)) = entries.last() else { break };
        offset = *last;
        for (name, _, attributes) in entries {
            if !name.starts_with(b".") {
                assert_eq!(name, format!("{names:05}").into_bytes());
                assert_eq!(attributes.size, names);
                names += 1;
            }
        }
        replies += 1;
        // A take-over in the middle.
        if replies == 25 {
            server = file_system(&tree, handed_over(server.tables()));
        }
    }
    assert_eq!(names, count);
    assert!(tree.lists() <= count / u64::from(PAGE_ENTRIES) + 2, "{} lists", tree.lists());
}

#[tokio::test]
async fn entries_in_hand_are_given_before_an_error() {
    let tree = MemoryTree::new();
    for number in 0..PAGE_ENTRIES + 10 {
        tree.put(&path(&format!("/{number:05}")), given("")).unwrap();
    }
    let fs = file_system(&tree, tables());
    let first = list(&fs, ROOT_ID, 0, 10_000).await.unwrap();
    assert_eq!(first.len(), PAGE_ENTRIES as usize + 2);
    let offset = first.last().unwrap().1;
    tree.fail([TreeError::Unavailable("why".to_owned())]);
    assert_eq!(list(&fs, ROOT_ID, offset, 10_000).await, Err(Errno::EIO));
    assert_eq!(list(&fs, ROOT_ID, offset, 10_000).await.unwrap().len(), 10);
}

#[tokio::test]
async fn extended_attributes() {
    let tree = MemoryTree::new();
    let version = tree.put(&path("/d/f"), given("hello")).unwrap();
    let fs = file_system(&tree, tables());
    let (directory, file) = (lookup(&fs, "/d").await.id, lookup(&fs, "/d/f").await.id);
    let data = |text: &[u8]| Ok(XattrReply::Data(text.to_vec()));
    assert_eq!(fs.getxattr(file, b"user.forebay.version", 255).await, data(version.key.as_bytes()));
    assert_eq!(fs.getxattr(file, b"user.forebay.cached_bytes", 255).await, data(b"5"));
    assert_eq!(fs.getxattr(file, b"user.forebay.owner", 255).await, data(b"memory"));
    assert_eq!(fs.getxattr(file, b"user.forebay.owner", 0).await, Ok(XattrReply::Size(6)));
    assert_eq!(fs.getxattr(file, b"user.forebay.owner", 5).await, Err(Errno::ERANGE));
    assert_eq!(fs.getxattr(directory, b"user.forebay.owner", 255).await, data(b"memory"));
    for name in ["security.selinux", "system.posix_acl_access", "user.forebay.other", "user.forebay.versio"] {
        assert_eq!(fs.getxattr(file, name.as_bytes(), 0).await, Err(Errno::ENODATA));
    }
    assert_eq!(fs.getxattr(directory, b"user.forebay.version", 0).await, Err(Errno::ENODATA));
    assert_eq!(fs.getxattr(999, b"user.forebay.version", 0).await, Err(Errno::ESTALE));
    let names = b"user.forebay.version\0user.forebay.cached_bytes\0user.forebay.owner\0";
    assert_eq!(fs.listxattr(file, 0), Ok(XattrReply::Size(names.len() as u32)));
    assert_eq!(fs.listxattr(file, 10), Err(Errno::ERANGE));
    assert_eq!(fs.listxattr(file, 1000), data(names));
}

#[tokio::test(start_paused = true)]
async fn sums_are_learned_in_the_background() {
    let tree = MemoryTree::new();
    tree.put(&path("/d/f"), Contents::Pattern { seed: 1, size: 5_000 }).unwrap();
    let fs = file_system(&tree, tables());
    assert_eq!(fs.statfs(), Statistics { blocks: 0, files: 0 });
    let _ = tokio::time::timeout(Duration::from_secs(1), fs.maintain()).await;
    assert_eq!(fs.statfs(), Statistics { blocks: 2, files: 1 });
}

/// A tree whose look-ups are answered at once and arrive when they are let through.
struct Late {
    tree: MemoryTree,
    let_through: tokio::sync::Semaphore,
    asked: std::sync::atomic::AtomicU32,
}

impl Tree for Late {
    type Reader = crate::memory::MemoryReader;

    async fn lookup(&self, directory: &DatasetPath, name: &[u8]) -> Result<Entry, TreeError> {
        let answer = self.tree.lookup(directory, name).await;
        self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.let_through.acquire().await.unwrap().forget();
        answer
    }

    async fn list(
        &self,
        directory: &DatasetPath,
        after: &[u8],
        limit: u32,
    ) -> Result<crate::tree::ListPage, TreeError> {
        self.tree.list(directory, after, limit).await
    }

    fn open(&self, path: DatasetPath, version: FileVersion) -> Arc<Self::Reader> {
        self.tree.open(path, version)
    }

    async fn inspect(&self, path: &DatasetPath, version: &FileVersion) -> Result<Inspection, TreeError> {
        self.tree.inspect(path, version).await
    }

    fn directory_owner(&self, path: &DatasetPath) -> Option<String> {
        self.tree.directory_owner(path)
    }

    fn changes(&self) -> futures::stream::BoxStream<'static, crate::tree::Change> {
        self.tree.changes()
    }

    async fn totals(&self) -> Option<Totals> {
        self.tree.totals().await
    }
}

fn late() -> FileSystem<Late> {
    let tree = MemoryTree::new();
    tree.put(&path("/f"), given("one")).unwrap();
    let late = Late { tree, let_through: tokio::sync::Semaphore::new(0), asked: Default::default() };
    let options = Options { ttl: Duration::from_secs(60), directory_time_ns: 7 };
    FileSystem::new(late, tables(), Arc::new(Notices::new()), options)
}

/// Puts another version, and the news of it goes by.
async fn change(fs: &FileSystem<Late>, changes: &mut futures::stream::BoxStream<'static, crate::tree::Change>) {
    fs.tree.tree.put(&path("/f"), given("second")).unwrap();
    let follow = crate::invalidation::follow(fs, std::mem::replace(changes, fs.tree.changes()), &fs.notices);
    tokio::pin!(follow);
    assert!(futures::poll!(&mut follow).is_pending());
    let notice = crate::notices::Notice::Names { directory: ROOT_ID, names: vec![Bytes::from_static(b"f")] };
    assert_eq!(fs.notices.try_next(), Some(notice));
}

#[tokio::test]
async fn an_answer_that_the_news_overtook_is_not_given() {
    let fs = late();
    let mut changes = fs.tree.changes();
    let lookup = fs.lookup(ROOT_ID, b"f");
    tokio::pin!(lookup);
    assert!(futures::poll!(&mut lookup).is_pending());
    change(&fs, &mut changes).await;
    fs.tree.let_through.add_permits(2);
    let found = lookup.await.unwrap();
    assert_eq!((found.attributes.unwrap().size, found.ttl), (6, Duration::from_secs(60)));
    fs.answered(ROOT_ID, b"f", &found);
    assert_eq!(fs.notices.try_next(), None);
}

#[tokio::test]
async fn an_answer_that_is_overtaken_every_time_is_not_kept() {
    let fs = late();
    let mut changes = fs.tree.changes();
    let lookup = fs.lookup(ROOT_ID, b"f");
    tokio::pin!(lookup);
    for _ in 0..=ASK_AGAIN {
        assert!(futures::poll!(&mut lookup).is_pending());
        change(&fs, &mut changes).await;
        fs.tree.let_through.add_permits(1);
    }
    let found = lookup.await.unwrap();
    assert_eq!((found.attributes.is_some(), found.ttl), (true, Duration::ZERO));
    assert_eq!(fs.tree.asked.load(std::sync::atomic::Ordering::Relaxed), ASK_AGAIN + 1);
    fs.answered(ROOT_ID, b"f", &found);
    assert_eq!(fs.notices.try_next(), None);
}

#[tokio::test]
async fn an_answer_that_is_overtaken_on_its_way_to_the_kernel_is_taken_back() {
    let fs = late();
    let mut changes = fs.tree.changes();
    for name in [b"f".as_slice(), b"none"] {
        fs.tree.let_through.add_permits(1);
        let found = fs.lookup(ROOT_ID, name).await.unwrap();
        assert!(!found.ttl.is_zero());
        change(&fs, &mut changes).await;
        fs.answered(ROOT_ID, name, &found);
        let notice = crate::notices::Notice::Names { directory: ROOT_ID, names: vec![Bytes::copy_from_slice(name)] };
        assert_eq!(fs.notices.try_next(), Some(notice));
    }
}
