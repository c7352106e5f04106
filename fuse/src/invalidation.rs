//! From changes at the source to what the kernel forgets.
//!
//! A change arrives from the workers ([`follow`]), drops the listing pages that are kept here, and becomes a notice. One
//! thread ([`deliver`]) tells the kernel. Invariants:
//! - only names and directories are invalidated, never a file's pages: a changed file is another node, and a
//!   notification that drops pages waits for reads that wait for the daemon;
//! - names expire, they are not dropped: the kernel looks them up again, and keeps the pages of what is still the same
//!   node. (An epoch step would expire all of them at once, but from Linux 6.18 on it also prunes what is unused, and
//!   with it the pages of the whole data set.)
//! - expiring a name that the kernel knows also tells it that the listing of the directory is old: it begins a new one
//!   when the next reader does. Dropping the listing's pages is only for a directory of which the kernel knows no name
//!   any more: pages that are dropped under a listing in progress leave the kernel unable to cache that directory again
//!   (`fuse_add_dirent_to_cache` looks for the page that it was filling, in vain, for as long as the inode lives);
//! - no listing is dropped before one was asked for in the mount. There is none then, and the root may still wait for
//!   its first attributes: the kernel ignores those that were on their way when an inode is invalidated, and a root
//!   without any has no permission bits, so that who is not root is refused with `EACCES`;
//! - both wait (on the directory's lock in the kernel) for look-ups and listings that were answered before the change;
//!   so nothing old enters the cache afterwards. Looking up again what the kernel knows takes no such lock: there an old
//!   answer is not given with a time to keep it ([`FileSystem::lookup`]), and one that was just on its way to the kernel
//!   is followed by another notice ([`FileSystem::answered`]). What is left is the moment between the kernel's waking
//!   of the program that waits for such an answer and the program's noting it.

use std::{collections::HashSet, io};

use bytes::Bytes;
use forebay_keeper::tables::{Counter, Counters, NodeKind, NodeTable, ROOT_ID};
use futures::{StreamExt, stream::BoxStream};

use crate::{
    fs::FileSystem,
    notices::{Notice, Notices},
    tree::{Change, Tree},
};

/// More names than this are not kept in the queue, but looked up in the node table when their turn comes.
const MAX_NAMES: usize = 1_000;
/// A name that no entry has: invalidating it waits for the directory's lock and does nothing else.
const BARRIER: &[u8] = b".";

/// The kernel's caches of one mount.
pub trait KernelCache: Send + 'static {
    /// Expires a name, present or absent, and with it the listing of its directory; `false` when it is not cached.
    fn entry(&self, directory: u64, name: &[u8]) -> io::Result<bool>;

    /// Drops the listing of a directory, if it is cached.
    fn listing(&self, directory: u64) -> io::Result<()>;
}

/// Turns changes into notices until the changes end. They are to be asked for before the kernel is answered: what
/// changes in between would be missed.
pub async fn follow<T: Tree>(fs: &FileSystem<T>, mut changes: BoxStream<'static, Change>, notices: &Notices) {
    while let Some(change) = changes.next().await {
        match change {
            Change::Names { directory, names } => {
                // A directory that was never looked up is not cached either.
                let Some(id) = fs.tables().nodes.find_directory(&directory) else { continue };
                fs.forget_listing(Some(id));
                if names.is_empty() || names.len() > MAX_NAMES {
                    notices.directory(id);
                } else {
                    notices.names(id, names);
                }
            }
            Change::Everything => {
                fs.forget_listing(None);
                notices.everything();
            }
        }
    }
}

/// Tells the kernel until the queue is closed. Runs on a thread of its own.
pub fn deliver(notices: &Notices, kernel: &impl KernelCache, nodes: &NodeTable, counters: &Counters) {
    let delivery = Delivery { kernel, nodes, counters };
    while let Some(notice) = notices.next() {
        delivery.send(notice);
    }
}

struct Delivery<'a, K> {
    kernel: &'a K,
    nodes: &'a NodeTable,
    counters: &'a Counters,
}

impl<K: KernelCache> Delivery<'_, K> {
    fn send(&self, notice: Notice) {
        match notice {
            Notice::Names { directory, names } => {
                // Every one of them, whether or not those before were known.
                let known = names.iter().filter(|name| self.entry(directory, name)).count();
                if known == 0 {
                    self.listing(directory);
                }
            }
            Notice::Directory(directory) => {
                if !self.expire(Some(directory)).contains(&directory) {
                    self.listing(directory);
                }
            }
            Notice::Everything => {
                let expired = self.expire(None);
                let known = self.nodes.iter().filter(|(_, node)| node.kind == NodeKind::Directory).map(|(id, _)| id);
                for directory in std::iter::once(ROOT_ID).chain(known) {
                    if !expired.contains(&directory) {
                        self.listing(directory);
                    }
                }
            }
        }
    }

    /// Expires all known names, or those of one directory. Absent names expire by themselves, soon. The directories of
    /// which the kernel knew a name.
    fn expire(&self, directory: Option<u64>) -> HashSet<u64> {
        self.counters.add(Counter::Expired, 1);
        let mut expired = HashSet::new();
        for (_, node) in self.nodes.iter() {
            if directory.is_none_or(|directory| directory == node.parent) && self.entry(node.parent, &node.name) {
                expired.insert(node.parent);
            }
        }
        expired
    }

    /// Whether the kernel knew the name.
    fn entry(&self, directory: u64, name: &[u8]) -> bool {
        self.counters.add(Counter::InvalidatedEntries, 1);
        self.kernel.entry(directory, name).unwrap_or_else(|error| {
            tracing::debug!(%error, directory, name = ?Bytes::copy_from_slice(name), "a name was not invalidated");
            false
        })
    }

    fn listing(&self, directory: u64) {
        if self.counters.get(Counter::Readdir) + self.counters.get(Counter::Readdirplus) == 0 {
            return;
        }
        self.entry(directory, BARRIER);
        self.counters.add(Counter::InvalidatedDirectories, 1);
        if let Err(error) = self.kernel.listing(directory) {
            tracing::debug!(%error, directory, "a listing was not invalidated");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use forebay_keeper::tables::OpenTable;
    use forebay_protocol::DatasetPath;
    use parking_lot::Mutex;

    use super::*;
    use crate::{
        fs::{Options, Tables},
        memory::{Contents, MemoryTree},
    };

    /// A kernel that knows some names.
    #[derive(Default)]
    struct Recorder {
        known: Vec<String>,
        log: Mutex<Vec<String>>,
    }

    impl KernelCache for Recorder {
        fn entry(&self, directory: u64, name: &[u8]) -> io::Result<bool> {
            let name = format!("{directory}/{}", String::from_utf8_lossy(name));
            let known = self.known.contains(&name);
            self.log.lock().push(name);
            Ok(known)
        }

        fn listing(&self, directory: u64) -> io::Result<()> {
            self.log.lock().push(format!("listing {directory}"));
            Ok(())
        }
    }

    fn path(text: &str) -> DatasetPath {
        DatasetPath::parse(text.as_bytes().to_vec()).unwrap()
    }

    struct Rig {
        tree: MemoryTree,
        fs: Arc<FileSystem<MemoryTree>>,
        notices: Arc<Notices>,
        kernel: Recorder,
    }

    impl Rig {
        /// Where some directory was listed already.
        fn new() -> Self {
            let rig = Self::unlisted();
            rig.fs.counters().add(Counter::Readdir, 1);
            rig
        }

        fn unlisted() -> Self {
            let tree = MemoryTree::new();
            let tables = Tables {
                nodes: Arc::new(NodeTable::create(1 << 20).unwrap()),
                opens: Arc::new(OpenTable::create(1024).unwrap()),
                counters: Arc::new(Counters::create().unwrap()),
            };
            let notices = Arc::new(Notices::new());
            let options = Options { ttl: std::time::Duration::from_secs(1), directory_time_ns: 0 };
            let fs = Arc::new(FileSystem::new(tree.clone(), tables, notices.clone(), options));
            Self { tree, fs, notices, kernel: Recorder::default() }
        }

        /// Changes that were announced so far, as the kernel hears of them.
        async fn settle(&self, changes: impl FnOnce(&MemoryTree)) -> Vec<String> {
            {
                let follow = follow(&self.fs, self.tree.changes(), &self.notices);
                tokio::pin!(follow);
                changes(&self.tree);
                assert!(futures::poll!(&mut follow).is_pending());
            }
            let tables = self.fs.tables();
            let delivery = Delivery { kernel: &self.kernel, nodes: &tables.nodes, counters: &tables.counters };
            let notices = self.notices.clone();
            while let Some(notice) = notices.try_next() {
                delivery.send(notice);
            }
            std::mem::take(&mut *self.kernel.log.lock())
        }
    }

    #[tokio::test]
    async fn names_and_then_the_listing_if_none_was_known() {
        let mut rig = Rig::new();
        rig.tree.put(&path("/d/f"), Contents::Given(Bytes::new())).unwrap();
        // Nobody looked at it: the kernel knows only the root.
        let log = rig.settle(|tree| drop(tree.put(&path("/d/g"), Contents::Given(Bytes::new())))).await;
        assert!(log.is_empty(), "{log:?}");
        let d = rig.fs.lookup(1, b"d").await.unwrap().attributes.unwrap().id;
        let log = rig.settle(|tree| drop(tree.put(&path("/d/f"), Contents::Given(Bytes::new())))).await;
        assert_eq!(log, [format!("{d}/f"), format!("{d}/."), format!("listing {d}")]);
        rig.kernel.known.push(format!("{d}/g"));
        let log = rig.settle(|tree| tree.remove(&path("/d/g")).unwrap()).await;
        assert_eq!(log, [format!("{d}/g")]);
    }

    #[tokio::test]
    async fn no_listing_is_dropped_before_one_was_asked_for() {
        let rig = Rig::unlisted();
        let log = rig.settle(|tree| drop(tree.put(&path("/f"), Contents::Given(Bytes::new())))).await;
        assert_eq!(log, ["1/f"]);
        assert!(rig.settle(|tree| tree.announce(Change::Everything)).await.is_empty());
        rig.fs.counters().add(Counter::Readdirplus, 1);
        let log = rig.settle(|tree| tree.announce(Change::Everything)).await;
        assert_eq!(log, ["1/.", "listing 1"]);
    }

    #[tokio::test]
    async fn too_many_names_expire_what_is_known_of_the_directory() {
        let names = || (0..=MAX_NAMES).map(|number| Bytes::from(format!("n{number}"))).collect::<Vec<_>>();
        for names in [Vec::new(), names()] {
            let mut rig = Rig::new();
            rig.tree.put(&path("/d/f"), Contents::Given(Bytes::new())).unwrap();
            rig.tree.put(&path("/e"), Contents::Given(Bytes::new())).unwrap();
            let d = rig.fs.lookup(1, b"d").await.unwrap().attributes.unwrap().id;
            rig.fs.lookup(d, b"f").await.unwrap().attributes.unwrap();
            rig.fs.lookup(1, b"e").await.unwrap().attributes.unwrap();
            let change = Change::Names { directory: path("/"), names };
            let log = rig.settle(|tree| tree.announce(change.clone())).await;
            assert_eq!(log, ["1/d", "1/e", "1/.", "listing 1"]);
            rig.kernel.known.push("1/d".to_owned());
            assert_eq!(rig.settle(|tree| tree.announce(change)).await, ["1/d", "1/e"]);
        }
    }

    #[tokio::test]
    async fn everything_is_every_known_name_and_listing() {
        let mut rig = Rig::new();
        rig.tree.put(&path("/d/f"), Contents::Given(Bytes::new())).unwrap();
        rig.tree.put(&path("/e"), Contents::Given(Bytes::new())).unwrap();
        let d = rig.fs.lookup(1, b"d").await.unwrap().attributes.unwrap().id;
        rig.fs.lookup(d, b"f").await.unwrap().attributes.unwrap();
        rig.fs.lookup(1, b"e").await.unwrap().attributes.unwrap();
        let log = rig.settle(|tree| tree.announce(Change::Everything)).await;
        let all = ["1/d", &format!("{d}/f"), "1/e", "1/.", "listing 1", &format!("{d}/."), &format!("listing {d}")];
        assert_eq!(log, all);
        rig.kernel.known.push("1/e".to_owned());
        let log = rig.settle(|tree| tree.announce(Change::Everything)).await;
        let some = ["1/d", &format!("{d}/f"), "1/e", &format!("{d}/."), &format!("listing {d}")];
        assert_eq!(log, some);
    }
}
