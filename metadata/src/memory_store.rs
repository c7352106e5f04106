//! A store in memory for tests: an object store or a file system, with pages, latency and faults.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::{Bound, Range},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use forebay_protocol::VersionKey;
use forebay_under_store::{ByteStream, Item, ItemKind, Page, Requests, StoreError, StoreFuture, UnderStore};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

/// A fault for one request.
#[derive(Clone)]
pub(crate) enum Fault {
    Error(StoreError),
    Hang,
    /// The page is replaced.
    Page(Page),
}

#[derive(Default)]
struct State {
    objects: BTreeMap<Vec<u8>, (u64, i64, VersionKey)>,
    /// Directories that exist of themselves; with any, this is a file system.
    directories: BTreeSet<Vec<u8>>,
    page: Option<usize>,
    latency: Duration,
    /// By directory, for the requests to come.
    faults: HashMap<Vec<u8>, Vec<Fault>>,
    head_faults: Vec<Fault>,
    requests: Requests,
    listed: HashMap<Vec<u8>, u64>,
    /// Names that the store itself hides.
    hide: BTreeSet<Vec<u8>>,
}

pub(crate) struct MemoryStore {
    state: Mutex<State>,
    /// Listings wait for a permit when gated.
    gate: Mutex<Option<Arc<Semaphore>>>,
}

impl MemoryStore {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), gate: Mutex::new(None) })
    }

    pub(crate) fn put(&self, key: impl AsRef<[u8]>, size: u64, version: &str) {
        let version = VersionKey::new(version.to_owned()).unwrap();
        self.state.lock().objects.insert(key.as_ref().to_vec(), (size, 1_000_000_000, version));
    }

    pub(crate) fn delete(&self, key: impl AsRef<[u8]>) {
        self.state.lock().objects.remove(key.as_ref());
    }

    pub(crate) fn make_directory(&self, key: impl AsRef<[u8]>) {
        self.state.lock().directories.insert(key.as_ref().to_vec());
    }

    pub(crate) fn hide(&self, key: impl AsRef<[u8]>) {
        self.state.lock().hide.insert(key.as_ref().to_vec());
    }

    /// At most this many keys per page, whatever is asked for.
    pub(crate) fn set_page(&self, page: usize) {
        self.state.lock().page = Some(page);
    }

    pub(crate) fn set_latency(&self, latency: Duration) {
        self.state.lock().latency = latency;
    }

    pub(crate) fn fault(&self, directory: impl AsRef<[u8]>, fault: Fault) {
        self.state.lock().faults.entry(directory.as_ref().to_vec()).or_default().push(fault);
    }

    pub(crate) fn fault_head(&self, fault: Fault) {
        self.state.lock().head_faults.push(fault);
    }

    /// From now on every listing takes a permit of the semaphore.
    pub(crate) fn gate(&self) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        *self.gate.lock() = Some(gate.clone());
        gate
    }

    pub(crate) fn ungate(&self) {
        if let Some(gate) = self.gate.lock().take() {
            gate.add_permits(1_000_000);
        }
    }

    pub(crate) fn listed(&self, directory: impl AsRef<[u8]>) -> u64 {
        self.state.lock().listed.get(directory.as_ref()).copied().unwrap_or(0)
    }

    fn page(&self, directory: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Page, StoreError> {
        let state = self.state.lock();
        let mut prefix = directory.to_vec();
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        if !state.directories.is_empty() && !directory.is_empty() && !state.directories.contains(directory) {
            return Err(StoreError::NotFound("directory".to_owned()));
        }
        let limit = state.page.unwrap_or(limit).min(limit);
        let mut page = Page::default();
        let mut last: Option<Vec<u8>> = None;
        let mut taken = 0;
        let mut from = Bound::Included(prefix.clone());
        if let Some(after) = after {
            let mut start = [prefix.as_slice(), after].concat();
            // After a common prefix comes what is not below it.
            if start.ends_with(b"/") {
                start.pop();
                start.push(b'/' + 1);
                from = Bound::Included(start);
            } else {
                from = Bound::Excluded(start);
            }
        }
        loop {
            let key = state.objects.range((from.clone(), Bound::Unbounded)).next();
            let key = key.map(|(key, _)| key.clone()).filter(|key| key.starts_with(&prefix));
            // An empty directory of a file system has no key.
            let own = state.directories.range((from.clone(), Bound::Unbounded)).next();
            let own = own.filter(|key| key.starts_with(&prefix) && key.len() > prefix.len()).map(|key| {
                let mut key = key.clone();
                key.push(b'/');
                key
            });
            let Some(key) = key.into_iter().chain(own).min() else { return Ok(page) };
            if taken == limit {
                page.next = last;
                return Ok(page);
            }
            taken += 1;
            let rest = &key[prefix.len()..];
            if let Some(slash) = rest.iter().position(|b| *b == b'/') {
                page.items.push(Item { name: rest[..slash].to_vec(), kind: ItemKind::Directory });
                last = Some(rest[..=slash].to_vec());
                let mut start = [prefix.as_slice(), &rest[..slash]].concat();
                start.push(b'/' + 1);
                from = Bound::Included(start);
            } else {
                last = Some(rest.to_vec());
                if state.hide.contains(&key) {
                    page.hidden += 1;
                } else if let Some((size, mtime_ns, version)) = state.objects.get(&key) {
                    let kind = ItemKind::File { size: *size, mtime_ns: *mtime_ns, version: version.clone() };
                    page.items.push(Item { name: rest.to_vec(), kind });
                }
                from = Bound::Excluded(key);
            }
        }
    }
}

impl UnderStore for MemoryStore {
    fn list<'a>(&'a self, directory: &'a [u8], after: Option<&'a [u8]>, limit: usize) -> StoreFuture<'a, Page> {
        Box::pin(async move {
            let (latency, fault) = {
                let mut state = self.state.lock();
                state.requests.lists += 1;
                *state.listed.entry(directory.to_vec()).or_default() += 1;
                let faults = state.faults.get_mut(directory);
                let fault = faults.and_then(|faults| (!faults.is_empty()).then(|| faults.remove(0)));
                (state.latency, fault)
            };
            if !latency.is_zero() {
                tokio::time::sleep(latency).await;
            }
            let gate = self.gate.lock().clone();
            if let Some(gate) = gate {
                gate.acquire().await.unwrap().forget();
            }
            match fault {
                None => self.page(directory, after, limit),
                Some(Fault::Error(error)) => Err(error),
                Some(Fault::Page(page)) => Ok(page),
                Some(Fault::Hang) => std::future::pending().await,
            }
        })
    }

    fn head<'a>(&'a self, key: &'a [u8]) -> StoreFuture<'a, Item> {
        Box::pin(async move {
            let fault = {
                let mut state = self.state.lock();
                state.requests.heads += 1;
                (!state.head_faults.is_empty()).then(|| state.head_faults.remove(0))
            };
            if let Some(Fault::Error(error)) = fault {
                return Err(error);
            }
            let state = self.state.lock();
            let name = key.rsplit(|b| *b == b'/').next().unwrap_or_default().to_vec();
            match state.objects.get(key) {
                Some((size, mtime_ns, version)) => {
                    let kind = ItemKind::File { size: *size, mtime_ns: *mtime_ns, version: version.clone() };
                    Ok(Item { name, kind })
                }
                None => Err(StoreError::NotFound("object".to_owned())),
            }
        })
    }

    fn get<'a>(&'a self, _: &'a [u8], _: &'a VersionKey, _: u64, _: Range<u64>) -> StoreFuture<'a, ByteStream> {
        let stream: ByteStream = Box::pin(futures::stream::once(async { Ok(Bytes::new()) }));
        Box::pin(async move { Ok(stream) })
    }

    fn check(&self) -> StoreFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn problem(&self) -> Option<StoreError> {
        None
    }

    fn requests(&self) -> Requests {
        self.state.lock().requests
    }

    fn has_directories(&self) -> bool {
        !self.state.lock().directories.is_empty()
    }
}
