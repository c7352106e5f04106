//! Loading, pinning and freeing of this worker's share of a tree.
//!
//! The share is the chunks that placement gives to this worker. A file is counted by the owner of its first chunk, so
//! that the sums over all workers are exact. The walk runs ahead of the loading, up to [`AHEAD`] chunks.

mod manifest;
mod priority;
mod queue;
mod runs;
mod selection;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use forebay_client::{ClientError, EntryKind};
use forebay_protocol::{
    BLOCK_SIZE, CHUNK_SIZE, ChunkKey, DatasetPath, FileVersion,
    worker::{self as wire, LoadProgress},
};
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tonic::Status;

use self::manifest::Named;
pub(crate) use self::{
    priority::Loads,
    runs::{Runs, Wanted as WantedRun},
    selection::Selection,
};
use crate::{
    dataset::Dataset,
    fill::{Class, FillError, Pace, Wanted},
    members::Members,
    worker::Worker,
};

/// Chunks loaded at once; how many of their fetches run at once is bounded by the source's background pool.
const AT_ONCE: usize = 32;
/// Chunks read again at once: readers want the disk too.
const VERIFIED_AT_ONCE: usize = 2;
/// Chunks found that wait to be loaded: at 200 bytes each 13 MB. Beyond, the walk waits.
const AHEAD: usize = 65_536;
/// Reasons kept.
const FAILURES: usize = 10;
/// How often progress is told.
pub(crate) const TICK: Duration = Duration::from_millis(200);
/// Chunks removed in one go.
const FREE_BATCH: usize = 256;

/// A file found by a walk.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) path: DatasetPath,
    pub(crate) version: FileVersion,
}

/// Why a walk found nothing, or not everything.
pub(crate) fn to_status(error: ClientError) -> Status {
    match error {
        ClientError::NotFound => Status::not_found("no such file or directory"),
        ClientError::NotDirectory => Status::failed_precondition("not a directory"),
        ClientError::PermissionDenied(message) => Status::permission_denied(message),
        ClientError::Invalid(message) => Status::invalid_argument(message),
        ClientError::VersionGone => Status::aborted("changed at the source meanwhile"),
        ClientError::Unavailable(message) => Status::unavailable(message),
    }
}

/// The files at or below a path, through the owners of the directories.
pub(crate) async fn files(
    worker: &Worker,
    dataset: &Dataset,
    path: &DatasetPath,
) -> Result<impl Stream<Item = Result<Found, ClientError>> + Send + Unpin + use<>, ClientError> {
    let names = worker.client.dataset(dataset.id);
    if let Some((directory, name)) = path.split() {
        let entry = names.lookup(&directory, &name).await?;
        if let EntryKind::File { version } = entry.kind {
            return Ok(stream::iter([Ok(Found { path: path.clone(), version })]).boxed());
        }
    }
    let walk = names.walk(path.clone());
    Ok(walk
        .filter_map(|found| async move {
            match found {
                Ok(found) => match found.entry.kind {
                    EntryKind::File { version } => Some(Ok(Found { path: found.path, version })),
                    EntryKind::Directory => None,
                },
                Err(error) => Some(Err(error)),
            }
        })
        .boxed())
}

/// The chunks of a file, all of them.
pub(crate) fn chunks(dataset: &Dataset, file: &Found) -> impl Iterator<Item = ChunkKey> + Send + use<> {
    let identity = dataset.identity(&file.path, &file.version);
    let count = u32::try_from(file.version.size.div_ceil(CHUNK_SIZE)).unwrap_or(u32::MAX);
    (0..count).map(move |index| ChunkKey { file: identity, index })
}

/// Counters of a load.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    total_files: AtomicU64,
    total_bytes: AtomicU64,
    done_files: AtomicU64,
    done_bytes: AtomicU64,
    failed_files: AtomicU64,
    bypassed_bytes: AtomicU64,
    failures: Mutex<Vec<String>>,
    listed: AtomicBool,
    /// Of the table by which everything was listed; 0: of none.
    epoch: AtomicU64,
}

impl Progress {
    /// Whether everything is held.
    fn is_sound(&self) -> bool {
        self.failed_files.load(Ordering::Acquire) == 0 && self.bypassed_bytes.load(Ordering::Acquire) == 0
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// As the wire says it.
    pub(crate) fn message(&self, finished: bool) -> LoadProgress {
        let get = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        LoadProgress {
            // Before the totals: once it is true they do not change.
            listed: self.listed.load(Ordering::Acquire),
            done_files: get(&self.done_files),
            done_bytes: get(&self.done_bytes),
            bypassed_bytes: get(&self.bypassed_bytes),
            failed_files: get(&self.failed_files),
            failures: self.failures.lock().clone(),
            total_files: get(&self.total_files),
            total_bytes: get(&self.total_bytes),
            epoch: get(&self.epoch),
            finished,
        }
    }

    /// A file failed.
    fn fail(&self, reason: String) {
        add(&self.failed_files, 1);
        let mut failures = self.failures.lock();
        if failures.len() < FAILURES {
            failures.push(reason);
        }
    }
}

fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::AcqRel);
}

/// The part of a file that is this worker's.
struct Share {
    file: Found,
    /// Chunks that are not done.
    left: AtomicU32,
    failed: AtomicBool,
    /// Whether this worker counts the file.
    counts: bool,
}

struct Work {
    share: Arc<Share>,
    key: ChunkKey,
}

/// Which files come first.
#[derive(Debug, Clone, Copy, Default)]
enum Order {
    /// As they are found, or a manifest names them.
    #[default]
    Listed,
    Name,
    /// The smallest.
    Size,
}

/// How each chunk of the share is loaded.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Terms {
    order: Order,
    /// It waits for those of a higher one.
    priority: i32,
    /// It is pinned.
    pub(crate) pin: bool,
    /// It is read again afterwards.
    pub(crate) verify: bool,
    /// Workers that are to hold it; fewer than the dataset says are not.
    replicas: u32,
    /// Of all workers together, in a second.
    bytes: Option<u64>,
    requests: Option<u64>,
}

impl Terms {
    /// As asked for.
    pub(crate) fn new(asked: &wire::LoadTerms) -> Self {
        let wire::LoadTerms { pin, verify, bytes_per_second, requests_per_second, replicas, order: _, priority } =
            *asked;
        let limit = |limit| (limit > 0).then_some(limit);
        let (bytes, requests) = (limit(bytes_per_second), limit(requests_per_second));
        let order = match asked.order() {
            wire::LoadOrder::Unspecified => Order::Listed,
            wire::LoadOrder::Name => Order::Name,
            wire::LoadOrder::Size => Order::Size,
        };
        Self { order, priority, pin, verify, replicas, bytes, requests }
    }

    /// Pinned, and as fast as can be.
    pub(crate) fn pinned() -> Self {
        Self { pin: true, ..Self::default() }
    }

    /// The class of a load's fetches, of which this worker has its part of the limits.
    fn class(&self, members: &Members) -> Class {
        let part = |limit: Option<u64>| limit.map(|limit| limit as f64 * members.part());
        Pace::new(part(self.bytes), part(self.requests)).map_or(Class::Background, |pace| Class::Paced(Arc::new(pace)))
    }
}

/// A load while it is carried out.
struct Loading<'a> {
    worker: &'a Arc<Worker>,
    dataset: &'a Arc<Dataset>,
    terms: Terms,
    class: Class,
    verifying: Semaphore,
    progress: &'a Progress,
}

/// Loads this worker's share of what is selected at or below `path`. Fails as a whole only when the tree cannot be listed.
pub(crate) async fn load(
    worker: &Arc<Worker>,
    dataset: &Arc<Dataset>,
    path: &DatasetPath,
    selection: &Selection,
    terms: Terms,
    progress: &Progress,
) -> Result<(), ClientError> {
    let epoch = worker.members.table().epoch;
    let class = terms.class(&worker.members);
    let loading = Loading { worker, dataset, terms, class, verifying: Semaphore::new(VERIFIED_AT_ONCE), progress };
    let mut found = match selection.manifest() {
        Some(manifest) => manifest::named(worker, dataset, manifest, path).await?.boxed(),
        None => files(worker, dataset, path).await?.map(|found| found.map(Named::File)).boxed(),
    };
    let (queue, queued) = queue::queue(AHEAD, !matches!(terms.order, Order::Listed));
    let _under_way = worker.loads.begin(terms.priority);
    let listing = async {
        while let Some(file) = found.next().await {
            match file? {
                Named::File(file) if selection.holds(&file) => {
                    list_share(worker, dataset, file, progress, terms.order, &queue).await;
                }
                Named::Missing(path) if manifest::counts(worker, dataset, &path) => {
                    add(&progress.total_files, 1);
                    progress.fail(format!("{path}: the manifest names it, and it is not there"));
                }
                Named::File(_) | Named::Missing(_) => {}
            }
        }
        if worker.members.table().epoch == epoch {
            progress.epoch.store(epoch, Ordering::Release);
        }
        progress.listed.store(true, Ordering::Release);
        drop(queue);
        Ok(())
    };
    let carrying_out = queued.for_each_concurrent(AT_ONCE, |work| async {
        worker.loads.wait(terms.priority).await;
        loading.load_chunk(work).await;
    });
    // A tree that cannot be listed ends the load at once.
    let (listed, ()) = tokio::try_join!(listing, async {
        carrying_out.await;
        Ok::<(), ClientError>(())
    })?;
    let () = listed;
    Ok(())
}

async fn list_share(
    worker: &Worker,
    dataset: &Dataset,
    file: Found,
    progress: &Progress,
    order: Order,
    queue: &queue::Sender<Work>,
) {
    let owns = |key: &ChunkKey| worker.members.owns(key.placement_key());
    let first = ChunkKey { file: dataset.identity(&file.path, &file.version), index: 0 };
    let counts = owns(&first);
    let (mut mine, mut bytes) = (0, 0);
    for key in chunks(dataset, &file).filter(owns) {
        mine += 1;
        bytes += key.len(file.version.size);
    }
    if counts {
        add(&progress.total_files, 1);
    }
    add(&progress.total_bytes, bytes);
    if mine == 0 {
        // An empty file, or one of which nothing is here.
        if counts {
            add(&progress.done_files, 1);
        }
        return;
    }
    let keys = chunks(dataset, &file);
    let share = Arc::new(Share { file, left: AtomicU32::new(mine), failed: AtomicBool::new(false), counts });
    for key in keys {
        // A table that changed in between would make the count wrong: the first answer counts.
        if mine > 0 && owns(&key) {
            mine -= 1;
            let Found { path, version } = &share.file;
            let place = match order {
                Order::Listed => Bytes::new(),
                Order::Name => path.to_bytes(),
                Order::Size => Bytes::copy_from_slice(&version.size.to_be_bytes()),
            };
            queue.send(place, Work { share: share.clone(), key }).await;
        }
    }
    if mine > 0 && share.left.fetch_sub(mine, Ordering::AcqRel) == mine && counts {
        add(&progress.done_files, 1);
    }
}

impl Loading<'_> {
    async fn load_chunk(&self, work: Work) {
        let Work { share, key } = work;
        let (Found { path, version }, progress) = (&share.file, self.progress);
        let bytes = key.len(version.size);
        // A chunk has 1,024 blocks at most.
        let blocks = 0..bytes.div_ceil(BLOCK_SIZE) as u32;
        let (dataset, path, version) = (self.dataset.clone(), path.clone(), version.clone());
        let loaded = match self.hold(Wanted { dataset, path, version, key, blocks }).await {
            Ok(unstored) if self.terms.pin && unstored > 0 => Err(format!("{unstored} blocks could not be stored")),
            Ok(0) => self.copy(&share.file, key).await,
            Ok(unstored) => {
                add(&progress.bypassed_bytes, bytes.min(u64::from(unstored) * BLOCK_SIZE));
                Ok(())
            }
            Err(error) => Err(describe(&error)),
        };
        match loaded {
            Ok(()) => add(&progress.done_bytes, bytes),
            Err(reason) => {
                if !share.failed.swap(true, Ordering::AcqRel) {
                    progress.fail(format!("{}: {reason}", share.file.path));
                }
            }
        }
        if share.left.fetch_sub(1, Ordering::AcqRel) == 1 && share.counts && !share.failed.load(Ordering::Acquire) {
            add(&progress.done_files, 1);
        }
    }

    /// Has others hold a chunk that is held.
    async fn copy(&self, file: &Found, key: ChunkKey) -> Result<(), String> {
        let copies = &self.dataset.copies;
        match self.terms.replicas.max(copies.min()) {
            0 | 1 => Ok(()),
            count => copies.ensure(file, key, count, self.terms.pin).await,
        }
    }

    /// Has a chunk held, and gives how many of its blocks could not be stored.
    async fn hold(&self, wanted: Wanted) -> Result<u32, FillError> {
        let (engine, pin) = (&self.worker.engine, self.terms.pin);
        let unstored = engine.load(wanted.clone(), pin, self.class.clone()).await?;
        if !self.terms.verify || unstored > 0 {
            return Ok(unstored);
        }
        // The semaphore is never closed.
        let permit = self.verifying.acquire().await;
        let missing = engine.verify(wanted.clone()).await?;
        drop(permit);
        match missing {
            Some(0) => Ok(0),
            // Damaged, or evicted meanwhile.
            Some(_) => engine.load(wanted, pin, self.class.clone()).await,
            None => Err(FillError::Unavailable("the cache disk does not answer".into())),
        }
    }
}

fn describe(error: &FillError) -> String {
    match error {
        FillError::VersionGone(_) => "changed at the source meanwhile".to_owned(),
        other => other.to_string(),
    }
}

/// Calls `each` with batches of the chunks, of everything at or below `path`, that `which` selects; off the runtime's
/// threads.
pub(crate) async fn for_chunks<F>(
    worker: &Arc<Worker>,
    dataset: &Arc<Dataset>,
    path: &DatasetPath,
    which: impl Fn(&ChunkKey) -> bool,
    each: F,
) -> Result<(), Status>
where
    F: Fn(Vec<(ChunkKey, u64)>) -> Result<(), Status> + Send + Sync + 'static,
{
    let each = Arc::new(each);
    let mut found = files(worker, dataset, path).await.map_err(to_status)?;
    let mut batch: Vec<(ChunkKey, u64)> = Vec::with_capacity(FREE_BATCH);
    loop {
        let file = found.next().await.transpose().map_err(to_status)?;
        let last = file.is_none();
        if let Some(file) = file {
            let size = file.version.size;
            batch.extend(chunks(dataset, &file).filter(&which).map(|key| (key, key.len(size))));
        }
        if batch.len() >= FREE_BATCH || (last && !batch.is_empty()) {
            let (each, full) = (each.clone(), std::mem::take(&mut batch));
            tokio::task::spawn_blocking(move || each(full))
                .await
                .map_err(|error| Status::internal(error.to_string()))??;
        }
        if last {
            return Ok(());
        }
    }
}

/// The path of a request.
pub(crate) fn path_of(bytes: Bytes) -> Result<DatasetPath, Status> {
    DatasetPath::parse(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}
