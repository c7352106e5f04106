//! Which source answers for a path.
//!
//! Sources are mounted at paths; the deepest one wins. A mount point shadows an entry of the same name in the source
//! around it, and the ancestors of a mount point exist even where no source has them.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use forebay_protocol::DatasetPath;
use forebay_under_store::UnderStore;
use tokio::sync::Semaphore;
use xxhash_rust::xxh3::Xxh3;

/// Listings that run at once on one source: 32 pages of 1,000 entries, a few hundred bytes each, are under 16 MiB. What
/// waits for a stalled source holds nobody else.
const LISTINGS_PER_SOURCE: usize = 32;

/// A store and where it appears.
#[derive(Clone)]
pub struct Source {
    /// Where it is mounted.
    pub path: DatasetPath,
    /// The store, below its prefix.
    pub store: Arc<dyn UnderStore>,
    /// A number that changes when other objects are meant (a URI, options): listings of others are forgotten.
    pub fingerprint: u64,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Why sources make no namespace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    /// Two sources at one path.
    #[error("two sources are mounted at {0}")]
    DuplicatePath(DatasetPath),
}

/// The sources of a dataset, by path.
pub struct Namespace {
    /// Another value for each namespace of this process.
    serial: u64,
    mounts: BTreeMap<Bytes, Mount>,
}

struct Mount {
    store: Arc<dyn UnderStore>,
    permits: Arc<Semaphore>,
    fingerprint: u64,
}

/// What of a namespace decides which objects are listed where: the sources' fingerprints by path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mounts(BTreeMap<Bytes, u64>);

/// What is known of a directory without asking a source.
pub(crate) struct View {
    /// The source that answers for it, if any.
    pub(crate) source: Option<Located>,
    /// Names in it that are mount points or lead to one, sorted.
    pub(crate) mounts: Vec<Bytes>,
    /// Whether it exists whatever the source says: the root, mount points, and what leads to them.
    pub(crate) always: bool,
}

/// A place in a source.
pub(crate) struct Located {
    pub(crate) store: Arc<dyn UnderStore>,
    pub(crate) key: Vec<u8>,
    /// Limits the listings that run at once on this source.
    pub(crate) permits: Arc<Semaphore>,
}

impl Namespace {
    /// Mounts sources; nesting is allowed, the same path twice is not.
    pub fn new(sources: Vec<Source>) -> Result<Self, NamespaceError> {
        static NAMESPACES: AtomicU64 = AtomicU64::new(1);
        let mut mounts = BTreeMap::new();
        for Source { path, store, fingerprint } in sources {
            let mount = Mount { store, permits: Arc::new(Semaphore::new(LISTINGS_PER_SOURCE)), fingerprint };
            if mounts.insert(path.to_bytes(), mount).is_some() {
                return Err(NamespaceError::DuplicatePath(path));
            }
        }
        Ok(Self { serial: NAMESPACES.fetch_add(1, Ordering::Relaxed), mounts })
    }

    /// The store that answers for a path, and the key relative to it (empty at the mount point). `None` where only
    /// mount points are.
    pub fn resolve(&self, path: &DatasetPath) -> Option<(Arc<dyn UnderStore>, Vec<u8>)> {
        self.locate(path).map(|located| (located.store, located.key))
    }

    /// The stores, for their counters.
    pub fn stores(&self) -> impl Iterator<Item = &Arc<dyn UnderStore>> {
        self.mounts.values().map(|mount| &mount.store)
    }

    /// A number that changes when a source does, so that a listing is not counted as one of other sources.
    pub fn fingerprint(&self) -> u64 {
        self.mounts().fingerprint()
    }

    /// Names it among the namespaces of this process.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    pub(crate) fn mounts(&self) -> Mounts {
        Mounts(self.mounts.iter().map(|(path, mount)| (path.clone(), mount.fingerprint)).collect())
    }

    pub(crate) fn locate(&self, path: &DatasetPath) -> Option<Located> {
        let mut at = path.clone();
        loop {
            if let Some(mount) = self.mounts.get(at.as_bytes()) {
                let below = if at.is_root() { 1 } else { at.as_bytes().len() + 1 };
                let key = path.as_bytes().get(below..).unwrap_or_default().to_vec();
                return Some(Located { store: mount.store.clone(), key, permits: mount.permits.clone() });
            }
            at = at.split()?.0;
        }
    }

    pub(crate) fn view(&self, directory: &DatasetPath) -> View {
        let mut prefix = directory.as_bytes().to_vec();
        if !directory.is_root() {
            prefix.push(b'/');
        }
        let mut mounts: Vec<Bytes> = Vec::new();
        for path in self.mounts.range(Bytes::copy_from_slice(&prefix)..).map(|(path, _)| path) {
            let Some(rest) = path.strip_prefix(prefix.as_slice()) else { break };
            let end = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
            // The root's own mount leaves nothing after the prefix.
            if end > 0 {
                mounts.push(path.slice(prefix.len()..prefix.len() + end));
            }
        }
        mounts.sort_unstable();
        mounts.dedup();
        let always = directory.is_root() || !mounts.is_empty() || self.mounts.contains_key(directory.as_bytes());
        View { source: self.locate(directory), mounts, always }
    }

    /// Whether `name` in `directory` is a mount point or leads to one: a directory that exists without asking.
    pub(crate) fn is_mount(&self, directory: &DatasetPath, name: &[u8]) -> bool {
        directory.join(name).is_ok_and(|path| leads_to_mount(&self.mounts, &path))
    }
}

/// Whether `path` is a mount point or leads to one.
fn leads_to_mount<T>(mounts: &BTreeMap<Bytes, T>, path: &DatasetPath) -> bool {
    if mounts.contains_key(path.as_bytes()) {
        return true;
    }
    let mut prefix = path.as_bytes().to_vec();
    prefix.push(b'/');
    let prefix = Bytes::from(prefix);
    mounts.range(prefix.clone()..).next().is_some_and(|(path, _)| path.starts_with(&prefix))
}

impl Mounts {
    pub(crate) fn new(mounts: impl IntoIterator<Item = (Bytes, u64)>) -> Self {
        Self(mounts.into_iter().collect())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Bytes, u64)> {
        self.0.iter().map(|(path, fingerprint)| (path, *fingerprint))
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = Xxh3::new();
        for (path, fingerprint) in &self.0 {
            hasher.update(path);
            // No path holds a NUL.
            hasher.update(&[0]);
            hasher.update(&fingerprint.to_le_bytes());
        }
        hasher.digest()
    }

    /// The source that answers for a path: where it is mounted, and its fingerprint.
    pub(crate) fn source_of(&self, path: &DatasetPath) -> Option<(DatasetPath, u64)> {
        let mut at = path.clone();
        loop {
            if let Some(fingerprint) = self.0.get(at.as_bytes()) {
                return Some((at, *fingerprint));
            }
            at = at.split()?.0;
        }
    }

    /// Whether `path` is a mount point or leads to one.
    pub(crate) fn leads_to(&self, path: &DatasetPath) -> bool {
        leads_to_mount(&self.0, path)
    }

    /// Mount points that only one of them has, or whose sources differ.
    pub(crate) fn differences(&self, other: &Self) -> Vec<DatasetPath> {
        let changed = |(path, fingerprint): (&Bytes, &u64)| {
            let same = other.0.get(path) == Some(fingerprint);
            (!same).then(|| path.clone())
        };
        let gone = other.0.keys().filter(|path| !self.0.contains_key(*path)).cloned();
        let paths = self.0.iter().filter_map(changed).chain(gone);
        // They were paths before they were keys.
        paths.filter_map(|path| DatasetPath::parse(path).ok()).collect()
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.mounts.keys().map(|path| String::from_utf8_lossy(path))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_store::MemoryStore;

    fn path(text: &str) -> DatasetPath {
        DatasetPath::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    fn namespace(paths: &[&str]) -> (Namespace, Vec<Arc<dyn UnderStore>>) {
        let stores: Vec<Arc<dyn UnderStore>> =
            paths.iter().map(|_| MemoryStore::new() as Arc<dyn UnderStore>).collect();
        let sources =
            paths.iter().zip(&stores).map(|(p, store)| Source { path: path(p), store: store.clone(), fingerprint: 0 });
        (Namespace::new(sources.collect()).unwrap(), stores)
    }

    #[test]
    fn the_deepest_source_wins() {
        let (namespace, stores) = namespace(&["/", "/a", "/a/b/c"]);
        for (p, store, key) in [
            ("/", 0, ""),
            ("/x/y", 0, "x/y"),
            ("/a", 1, ""),
            ("/ab", 0, "ab"),
            ("/a/b", 1, "b"),
            ("/a/b/c", 2, ""),
            ("/a/b/c/d/e", 2, "d/e"),
        ] {
            let (found, found_key) = namespace.resolve(&path(p)).unwrap();
            assert!(Arc::ptr_eq(&found, &stores[store]), "{p}");
            assert_eq!(found_key, key.as_bytes(), "{p}");
        }
    }

    #[test]
    fn ancestors_of_mount_points_exist() {
        let (namespace, _) = namespace(&["/a/b", "/a/c/d", "/a/b/x", "/e"]);
        assert!(namespace.resolve(&path("/")).is_none());
        assert!(namespace.resolve(&path("/a")).is_none());
        let view = namespace.view(&path("/"));
        assert_eq!(view.mounts, ["a", "e"]);
        assert!(view.always && view.source.is_none());
        let view = namespace.view(&path("/a"));
        assert_eq!(view.mounts, ["b", "c"]);
        assert!(view.always);
        let view = namespace.view(&path("/a/b"));
        assert_eq!(view.mounts, ["x"]);
        assert!(view.source.is_some());
        assert!(!namespace.view(&path("/z")).always);
        assert!(!namespace.view(&path("/a/b/y")).always);
        assert!(namespace.is_mount(&path("/a"), b"c"));
        assert!(namespace.is_mount(&path("/a"), b"b"));
        assert!(!namespace.is_mount(&path("/"), b"a/b"));
        assert!(!namespace.is_mount(&path("/a"), b"d"));
    }

    #[test]
    fn differences_are_paths_of_other_sources() {
        let mounts = |mounts: &[(&str, u64)]| {
            Mounts::new(
                mounts.iter().map(|(path, fingerprint)| (Bytes::copy_from_slice(path.as_bytes()), *fingerprint)),
            )
        };
        let before = mounts(&[("/", 1), ("/a", 2), ("/b/c", 3)]);
        let after = mounts(&[("/", 1), ("/a", 9), ("/d", 4)]);
        let mut paths: Vec<String> = after.differences(&before).iter().map(ToString::to_string).collect();
        paths.sort();
        assert_eq!(paths, ["/a", "/b/c", "/d"]);
        assert!(before.differences(&before).is_empty());
        assert_eq!(before.source_of(&path("/b/c/d")).unwrap(), (path("/b/c"), 3));
        assert_eq!(before.source_of(&path("/b")).unwrap(), (path("/"), 1));
        assert!(before.leads_to(&path("/b")) && before.leads_to(&path("/b/c")) && !after.leads_to(&path("/b")));
        assert_ne!(before.fingerprint(), after.fingerprint());
    }

    #[test]
    fn one_path_twice_is_refused() {
        let source = || Source { path: path("/a"), store: MemoryStore::new(), fingerprint: 0 };
        assert_eq!(Namespace::new(vec![source(), source()]).err(), Some(NamespaceError::DuplicatePath(path("/a"))));
    }
}
