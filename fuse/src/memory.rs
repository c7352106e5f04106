//! A tree in memory: the other implementation of [`Tree`], for tests of the file system and of whole mounts, and for
//! trying a mount without workers.
//!
//! Files are given as bytes, or as a seed and a size from which [`pattern`] makes the bytes, so that large trees take no
//! memory and every byte can be verified without having been stored. Old versions stay readable until they are dropped,
//! as at a source that keeps versions.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use forebay_keeper::tables::Shape;
use forebay_protocol::{DatasetPath, FileVersion, VersionKey};
use futures::{StreamExt, stream::BoxStream};
use parking_lot::{Mutex, RwLock};
use tokio::sync::broadcast;

use crate::tree::{Change, Entry, EntryKind, Inspection, ListPage, Reader, Totals, Tree, TreeError, sort_key};

/// Bytes of a file.
#[derive(Clone, Debug)]
pub enum Contents {
    /// These.
    Given(Bytes),
    /// As many as `size`, made by [`pattern`].
    Pattern {
        /// Different seeds, different bytes.
        seed: u64,
        /// Number of bytes.
        size: u64,
    },
}

impl Contents {
    fn size(&self) -> u64 {
        match self {
            Self::Given(bytes) => bytes.len() as u64,
            Self::Pattern { size, .. } => *size,
        }
    }

    fn read(&self, offset: u64, len: usize) -> Bytes {
        let end = self.size().min(offset.saturating_add(len as u64));
        if offset >= end {
            return Bytes::new();
        }
        match self {
            Self::Given(bytes) => bytes.slice(offset as usize..end as usize),
            Self::Pattern { seed, .. } => {
                let mut buffer = vec![0; (end - offset) as usize];
                pattern(*seed, offset, &mut buffer);
                buffer.into()
            }
        }
    }
}

/// The bytes of the pattern `seed` from `offset` on: a function of the two, so that any range can be checked alone.
pub fn pattern(seed: u64, offset: u64, buffer: &mut [u8]) {
    // SplitMix64 of (seed, index of the 8-byte word).
    let word = |index: u64| {
        let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    };
    let mut done = 0;
    while done < buffer.len() {
        let at = offset + done as u64;
        let bytes = word(at / 8);
        let within = (at % 8) as usize;
        let take = (8 - within).min(buffer.len() - done);
        buffer[done..done + take].copy_from_slice(&bytes[within..within + take]);
        done += take;
    }
}

type Directory = BTreeMap<Bytes, Entry>;

#[derive(Debug, Default)]
struct State {
    directories: HashMap<DatasetPath, Directory>,
    contents: HashMap<(DatasetPath, VersionKey), Contents>,
    versions: u64,
}

/// The tree. Clones share everything.
#[derive(Clone, Debug)]
pub struct MemoryTree {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: RwLock<State>,
    changes: broadcast::Sender<Change>,
    faults: Mutex<VecDeque<TreeError>>,
    latency_us: AtomicU64,
    small: AtomicBool,
    lists: AtomicU64,
}

impl Default for MemoryTree {
    fn default() -> Self {
        let state = State { directories: HashMap::from([(DatasetPath::root(), Directory::new())]), ..State::default() };
        Self {
            inner: Arc::new(Inner {
                state: RwLock::new(state),
                changes: broadcast::channel(1024).0,
                faults: Mutex::default(),
                latency_us: AtomicU64::new(0),
                small: AtomicBool::new(false),
                lists: AtomicU64::new(0),
            }),
        }
    }
}

impl MemoryTree {
    /// An empty root.
    pub fn new() -> Self {
        Self::default()
    }

    /// Mounts that do not have a shape yet become small.
    pub fn suits_small(&self) {
        self.inner.small.store(true, Ordering::Relaxed);
    }

    /// Adds or replaces a file, with the directories above it, and announces it. `None` when a directory has that name
    /// or a file that of a directory above it.
    pub fn put(&self, path: &DatasetPath, contents: Contents) -> Option<FileVersion> {
        let mut state = self.inner.state.write();
        let (directory, name) = path.split()?;
        self.make_directory(&mut state, &directory)?;
        if state.directories.contains_key(path) {
            return None;
        }
        state.versions += 1;
        let number = state.versions;
        let version = FileVersion {
            size: contents.size(),
            mtime_ns: 1_700_000_000_000_000_000 + number as i64,
            // A number in decimal is far below the limit of a version key.
            key: VersionKey::new(format!("v{number}").into_bytes())?,
        };
        state.contents.insert((path.clone(), version.key.clone()), contents);
        let entry = Entry { name: name.clone(), kind: EntryKind::File { version: version.clone() } };
        state.directories.get_mut(&directory)?.insert(entry.sort_key(), entry);
        drop(state);
        self.announce(Change::Names { directory, names: vec![name] });
        Some(version)
    }

    /// Adds an empty directory, with those above it.
    pub fn put_directory(&self, path: &DatasetPath) -> Option<()> {
        self.make_directory(&mut self.inner.state.write(), path)
    }

    fn make_directory(&self, state: &mut State, path: &DatasetPath) -> Option<()> {
        if state.directories.contains_key(path) {
            return Some(());
        }
        let (above, name) = path.split()?;
        self.make_directory(state, &above)?;
        let listing = state.directories.get_mut(&above)?;
        if listing.contains_key(&name) {
            return None;
        }
        listing.insert(sort_key(&name, true), Entry { name: name.clone(), kind: EntryKind::Directory });
        state.directories.insert(path.clone(), Directory::new());
        self.announce(Change::Names { directory: above, names: vec![name] });
        Some(())
    }

    /// Removes a file; its versions stay readable.
    pub fn remove(&self, path: &DatasetPath) -> Option<()> {
        let (directory, name) = path.split()?;
        self.inner.state.write().directories.get_mut(&directory)?.remove(&name)?;
        self.announce(Change::Names { directory, names: vec![name] });
        Some(())
    }

    /// Forgets the bytes of a version: who reads it from now on is told that it is gone.
    pub fn drop_version(&self, path: &DatasetPath, version: &FileVersion) {
        self.inner.state.write().contents.remove(&(path.clone(), version.key.clone()));
    }

    /// The next calls fail like this, one each.
    pub fn fail(&self, errors: impl IntoIterator<Item = TreeError>) {
        self.inner.faults.lock().extend(errors);
    }

    /// Every call takes this long from now on.
    pub fn set_latency(&self, latency: Duration) {
        self.inner.latency_us.store(latency.as_micros() as u64, Ordering::Relaxed);
    }

    /// Listing pages asked for so far.
    pub fn lists(&self) -> u64 {
        self.inner.lists.load(Ordering::Relaxed)
    }

    /// Tells whoever listens.
    pub fn announce(&self, change: Change) {
        // Nobody listening is fine.
        let _ = self.inner.changes.send(change);
    }

    async fn enter(&self) -> Result<(), TreeError> {
        let latency = self.inner.latency_us.load(Ordering::Relaxed);
        if latency > 0 {
            tokio::time::sleep(Duration::from_micros(latency)).await;
        }
        match self.inner.faults.lock().pop_front() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// Reads one version of a file of a [`MemoryTree`].
#[derive(Debug)]
pub struct MemoryReader {
    tree: MemoryTree,
    key: (DatasetPath, VersionKey),
}

impl Reader for MemoryReader {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TreeError> {
        self.tree.enter().await?;
        let contents = self.tree.inner.state.read().contents.get(&self.key).cloned().ok_or(TreeError::VersionGone)?;
        let bytes = contents.read(offset, len);
        // Two pieces, as a read across blocks gives them.
        let half = bytes.len() / 2;
        Ok(vec![bytes.slice(..half), bytes.slice(half..)])
    }
}

impl Tree for MemoryTree {
    type Reader = MemoryReader;

    async fn lookup(&self, directory: &DatasetPath, name: &[u8]) -> Result<Entry, TreeError> {
        self.enter().await?;
        let state = self.inner.state.read();
        let listing = state.directories.get(directory).ok_or(TreeError::NotFound)?;
        let name = Bytes::copy_from_slice(name);
        listing.get(&sort_key(&name, true)).or_else(|| listing.get(&name)).cloned().ok_or(TreeError::NotFound)
    }

    async fn list(&self, directory: &DatasetPath, after: &[u8], limit: u32) -> Result<ListPage, TreeError> {
        self.enter().await?;
        self.inner.lists.fetch_add(1, Ordering::Relaxed);
        let state = self.inner.state.read();
        let listing = state.directories.get(directory).ok_or(TreeError::NotFound)?;
        let from = Bytes::copy_from_slice(after);
        let mut rest = listing.range((std::ops::Bound::Excluded(from), std::ops::Bound::Unbounded));
        let entries: Vec<Entry> = rest.by_ref().take(limit as usize).map(|(_, entry)| entry.clone()).collect();
        Ok(ListPage { entries, end: rest.next().is_none() })
    }

    fn open(&self, path: DatasetPath, version: FileVersion) -> Arc<MemoryReader> {
        Arc::new(MemoryReader { tree: self.clone(), key: (path, version.key) })
    }

    async fn inspect(&self, path: &DatasetPath, version: &FileVersion) -> Result<Inspection, TreeError> {
        self.enter().await?;
        let known = self.inner.state.read().contents.contains_key(&(path.clone(), version.key.clone()));
        Ok(Inspection { cached_bytes: if known { version.size } else { 0 }, pinned: false, owner: "memory".to_owned() })
    }

    fn directory_owner(&self, _path: &DatasetPath) -> Option<String> {
        Some("memory".to_owned())
    }

    async fn shape(&self) -> Option<Shape> {
        Some(if self.inner.small.load(Ordering::Relaxed) { Shape::Small } else { Shape::Large })
    }

    fn changes(&self) -> BoxStream<'static, Change> {
        let receiver = self.inner.changes.subscribe();
        futures::stream::unfold(receiver, |mut receiver| async move {
            match receiver.recv().await {
                Ok(change) => Some((change, receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((Change::Everything, receiver)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        })
        .boxed()
    }

    async fn totals(&self) -> Option<Totals> {
        let state = self.inner.state.read();
        let mut totals = Totals::default();
        for entry in state.directories.values().flat_map(BTreeMap::values) {
            if let EntryKind::File { version } = &entry.kind {
                totals.files += 1;
                totals.bytes += version.size;
            }
        }
        Some(totals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_of_a_pattern_is_the_same() {
        let mut whole = vec![0; 1000];
        pattern(7, 0, &mut whole);
        for (from, to) in [(0, 1), (3, 17), (8, 16), (999, 1000), (5, 5)] {
            let mut part = vec![0; to - from];
            pattern(7, from as u64, &mut part);
            assert_eq!(part, whole[from..to]);
        }
        let mut other = vec![0; 1000];
        pattern(8, 0, &mut other);
        assert_ne!(whole, other);
    }
}
