//! The files of one volume that are on this node: small ones are read here, large ones by the kernel itself.
//!
//! A small file is kept when a read brought all of it. The first open of a complete file gets it a backing id, which only the keeper can make; the id stays registered between
//! opens, recorded in the open table, for a round trip to the keeper costs more than an open. Idle ids beyond a bound are
//! closed, those that were idle longest first.
//!
//! - An id is closed only while no handle has it and nobody is about to take it: every step from seeing an id to recording
//!   a handle, and from forgetting an id to telling the keeper, is made under one lock.
//! - A file is fetched once an eighth of it was read and nobody has it open any more: a look at its header fetches nothing,
//!   and while it is open it could not be passed through.
//! - Who is told too late, or not at all, opens the file through the page cache. The keeper remembers what it opened, and
//!   gives the same id when it is asked again.
//! - An inode that is open through the page cache stays so until the last handle is closed: the kernel wants it.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use forebay_keeper::{
    daemon::Backings,
    tables::{OpenMode, OpenTable, TableFull},
};
use forebay_protocol::{DatasetId, DatasetPath, FileVersion};
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::{
    node_cache::{Key, NodeCache, SMALLEST},
    throttle::Throttle,
    tree::Reader,
};

/// How long an open waits for the node cache's disk and the keeper; then it goes through the page cache.
const PATIENCE: Duration = Duration::from_millis(200);
/// Backing ids of a volume that stay registered while nobody has the file open. Each holds a file of the node cache open.
const MAX_IDLE: usize = 1024;

/// Part of a file that has to be read until it is fetched whole.
const ENOUGH: u64 = 8;
/// Files of which is remembered how much was read.
const REMEMBERED: usize = 4096;

/// What the keeper answers: the id, or why there is none.
type Answer = Result<u32, String>;
/// Who waits for an answer.
type Askers = Vec<oneshot::Sender<Answer>>;

/// Asks the keeper for backing ids, for all volumes of the daemon; clones are the same.
#[derive(Clone)]
pub(crate) struct Desk {
    backings: Backings,
    /// By volume and node.
    waiting: Arc<Mutex<HashMap<(String, u64), Askers>>>,
}

impl Desk {
    pub(crate) fn new(backings: Backings) -> Self {
        Self { backings, waiting: Arc::default() }
    }

    /// The keeper's answer came. Whoever does not wait any more opens the file again one day.
    pub(crate) fn answered(&self, volume: String, node: u64, answer: &Answer) {
        for asker in self.waiting.lock().remove(&(volume, node)).into_iter().flatten() {
            let _ = asker.send(answer.clone());
        }
    }

    /// `None`: there is no keeper, or it did not answer in time.
    async fn ask(&self, volume: &str, node: u64, file: File, deadline: Instant) -> Option<Answer> {
        let (sender, answer) = oneshot::channel();
        let place = (volume.to_owned(), node);
        // Several opens at once are several questions, of which the first answer is everybody's.
        self.waiting.lock().entry(place.clone()).or_default().push(sender);
        let asked = self.backings.open(volume, node, file);
        let answer = match asked {
            Ok(()) => timeout_at(deadline, answer).await.ok().and_then(Result::ok),
            Err(_) => None,
        };
        if answer.is_none()
            && let Some(askers) = self.waiting.lock().get_mut(&place)
        {
            askers.retain(|asker| !asker.is_closed());
        }
        answer
    }
}

/// The files of one volume.
pub(crate) struct LocalFiles {
    volume: String,
    cache: NodeCache,
    desk: Desk,
    complaints: Throttle,
    /// Bytes that were read of nodes through the page cache.
    read: Cache<u64, u64>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whose files they are, as soon as it is known.
    dataset: Option<DatasetId>,
    /// Nodes with an id that no handle has, idle longest first.
    idle: VecDeque<u64>,
    /// Nodes for which an id is asked for, and how many ask.
    asking: HashMap<u64, usize>,
}

impl LocalFiles {
    /// Of a volume by its keeper's name. `opens` has the ids that a predecessor left.
    pub(crate) fn new(volume: String, cache: NodeCache, desk: Desk, opens: &OpenTable) -> Self {
        let idle = opens.backings().into_iter().map(|(node, _)| node);
        let idle = idle.filter(|node| opens.inode_mode(*node).is_none()).collect();
        let state = State { idle, ..State::default() };
        Self {
            volume,
            cache,
            desk,
            complaints: Throttle::default(),
            read: Cache::new(REMEMBERED),
            state: Mutex::new(state),
        }
    }

    /// The volume shows this dataset: its files stay in the node cache from now on. Called within the runtime; only the
    /// first call counts.
    pub(crate) fn is_of(&self, dataset: DatasetId) {
        let mut state = self.state.lock();
        if state.dataset.is_none() {
            state.dataset = Some(dataset);
            drop(state);
            self.cache.mounted(dataset);
        }
    }

    /// What a file is called in the node cache, if it may be kept there; `None` while the dataset is not known.
    pub(crate) fn key(&self, file: Asked<'_>) -> Option<Key> {
        Some(file.key(self.state.lock().dataset?))
    }

    /// Whether a file is here.
    pub(crate) fn has(&self, file: Asked<'_>) -> bool {
        self.key(file).is_some_and(|key| self.cache.has(&key))
    }

    /// Bytes of a small file that is here.
    pub(crate) async fn read(&self, key: Key, offset: u64, len: usize) -> Option<Bytes> {
        self.cache.read(key, offset, len).await
    }

    /// A read brought these bytes of a small file: all of them are kept. Called within the runtime.
    pub(crate) fn was_read(&self, key: Key, offset: u64, pieces: &[Bytes], len: usize) {
        if offset == 0 && len as u64 == key.size {
            self.cache.offer(key, pieces);
        }
    }

    /// Records a handle of a file, in the mode that its reply is to have. `reader` makes one of its bytes, for a file that a
    /// predecessor left and that turns out to be damaged.
    pub(crate) async fn open<R: Reader>(
        &self,
        opens: &OpenTable,
        request: Request<'_>,
        reader: impl FnOnce() -> Arc<R> + Send,
    ) -> Result<u64, TableFull> {
        let Request { unique, file } = request;
        let Asked { node, version, .. } = file;
        let dataset = {
            let mut state = self.state.lock();
            if let Some(backing_id) = opens.backing(node) {
                let handle = opens.open(unique, node, OpenMode::Passthrough { backing_id })?;
                self.settle(&mut state, opens, node);
                return Ok(handle);
            }
            let Some(dataset) = state.dataset.filter(|_| version.size >= SMALLEST) else {
                return opens.open(unique, node, OpenMode::Cached);
            };
            *state.asking.entry(node).or_default() += 1;
            dataset
        };
        let _asking = Asking { local: self, node };
        let key = file.key(dataset);
        let id = self.id(node, key, reader).await;
        let mut state = self.state.lock();
        let mode = match id {
            Some(id) => OpenMode::Passthrough { backing_id: opens.set_backing(node, id)? },
            None => OpenMode::Cached,
        };
        let handle = opens.open(unique, node, mode)?;
        self.settle(&mut state, opens, node);
        Ok(handle)
    }

    /// Keeps the list of idle nodes after a change of one.
    fn settle(&self, state: &mut State, opens: &OpenTable, node: u64) {
        let was = state.idle.iter().position(|idle| *idle == node);
        let has_id = opens.backing(node).is_some();
        let is_idle = has_id && !matches!(opens.inode_mode(node), Some(OpenMode::Passthrough { .. }));
        match (was, is_idle) {
            (Some(index), false) => {
                state.idle.remove(index);
            }
            (None, true) => state.idle.push_back(node),
            _ => {}
        }
    }

    async fn id<R: Reader>(&self, node: u64, key: Key, reader: impl FnOnce() -> Arc<R> + Send) -> Option<u32> {
        let deadline = Instant::now() + PATIENCE;
        let Some(file) = self.cache.get(key, deadline).await else {
            if self.cache.is_left(&key) {
                self.cache.want(key, reader);
            }
            return None;
        };
        match self.desk.ask(&self.volume, node, file, deadline).await? {
            Ok(id) => Some(id),
            Err(error) => {
                if let Some(suppressed) = self.complaints.allow() {
                    tracing::warn!(volume = self.volume, error, suppressed, "a file is not passed through");
                }
                None
            }
        }
    }

    /// The last handle of a file is closed; `bytes` of it were read through the page cache. If that is enough, it is fetched
    /// through a `reader`. Called within the runtime.
    pub(crate) fn closed<R: Reader>(
        &self,
        opens: &OpenTable,
        file: Asked<'_>,
        bytes: u64,
        reader: impl FnOnce() -> Arc<R>,
    ) {
        self.close_idle(opens, file.node);
        let dataset = self.state.lock().dataset;
        let size = file.version.size;
        if let Some(dataset) = dataset
            && bytes > 0
            && size >= SMALLEST
        {
            let all = self.read.get(&file.node).unwrap_or(0).saturating_add(bytes);
            if all >= size / ENOUGH {
                self.read.remove(&file.node);
                self.cache.want(file.key(dataset), reader);
            } else {
                self.read.insert(file.node, all);
            }
        }
    }

    fn close_idle(&self, opens: &OpenTable, node: u64) {
        let mut state = self.state.lock();
        self.settle(&mut state, opens, node);
        while state.idle.len() > MAX_IDLE {
            let State { idle, asking, .. } = &mut *state;
            // Not one that is about to be open.
            let Some(index) = idle.iter().position(|node| !asking.contains_key(node)) else { break };
            let Some(node) = idle.remove(index) else { break };
            if let Some(id) = opens.clear_backing(node)
                && let Err(error) = self.desk.backings.close(&self.volume, node, id)
            {
                // The kernel keeps it until the mount ends.
                tracing::debug!(volume = self.volume, node, %error, "a backing id stays open");
            }
        }
    }
}

impl Drop for LocalFiles {
    fn drop(&mut self) {
        if let Some(dataset) = self.state.lock().dataset {
            self.cache.unmounted(dataset);
        }
    }
}

/// An OPEN.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) unique: u64,
    pub(crate) file: Asked<'a>,
}

/// A file of the volume.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) node: u64,
    pub(crate) path: &'a DatasetPath,
    pub(crate) version: &'a FileVersion,
}

impl Asked<'_> {
    fn key(&self, dataset: DatasetId) -> Key {
        Key { dataset, file: self.version.identity(dataset, self.path), size: self.version.size }
    }
}

/// Somebody asks for the id of a node, until this is dropped.
struct Asking<'a> {
    local: &'a LocalFiles,
    node: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut state = self.local.state.lock();
        if let Some(count) = state.asking.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                state.asking.remove(&self.node);
            }
        }
    }
}
