//! One dataset on one worker: what is asked of it, and its generation.
//!
//! Every answer comes from the database. A question that the database cannot answer yet starts the directory's listing
//! (one at a time per directory) and is asked again whenever the listing has moved, until its deadline.
//!
//! The generation is adopted from whoever knows a higher one. It is stored with the first page that is listed under it,
//! and by [`DatasetIndex::raise_generation`] before that returns: a restart never answers with what was listed under an
//! older one as if it were new.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use forebay_protocol::{DatasetId, DatasetPath, FileVersion, identity::is_valid_name};
use forebay_under_store::Requests;
use futures::{Stream, future::BoxFuture};
use parking_lot::{Mutex, RwLock};
use quick_cache::sync::Cache;
use redb::ReadTransaction;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Index, Namespace,
    changes::Changes,
    error::{IndexError, MetadataError},
    listing::{Found, Slots, Verdict},
    query::{self, Answer},
    recheck::Rechecks,
    record::directory_key,
    scan::{DirectoryScan, ScanDirectories},
    sources::{self, Known},
    watch::{Invalidation, Log},
};

/// Entries in one page of [`DatasetIndex::list`]: with the longest names and version keys 2.2 MiB, under the 4 MiB of
/// a gRPC message.
const MAX_LIST: usize = 4096;
/// Superseded versions that wait for their consumer: about 4 MiB.
const SUPERSEDED: usize = 16 * 1024;
/// How long a listing waits for that consumer before it drops (and counts) what it has: the bytes then stay until they
/// are evicted.
const SUPERSEDED_PATIENCE: Duration = Duration::from_secs(5);
/// Directories that are remembered as missing or failed.
const VERDICTS: usize = 4096;
/// The highest generation: far beyond any number of refreshes, far below an overflow.
const MAX_GENERATION: u64 = 1 << 48;
/// Damaged rows of one directory that are met in answering one question before it is given up.
pub(crate) const REPAIRS: usize = 3;

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name within the directory.
    pub name: Bytes,
    /// What it is.
    pub kind: EntryKind,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A file, and its current version.
    File {
        /// Size, time and version key.
        version: FileVersion,
    },
    /// A directory.
    Directory,
}

impl Entry {
    /// The key by which listings are ordered and paged: the name, with `/` appended for directories.
    pub fn sort_key(&self) -> Vec<u8> {
        match self.kind {
            EntryKind::File { .. } => self.name.to_vec(),
            EntryKind::Directory => crate::record::directory_sort_key(&self.name),
        }
    }
}

/// A page of a directory, in the order of sort keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPage {
    /// The entries; may be fewer than asked for, and none only at the end.
    pub entries: Vec<Entry>,
    /// There are no more.
    pub end: bool,
}

/// Settings of a [`DatasetIndex`].
#[derive(Debug, Clone)]
pub struct DatasetOptions {
    /// How long a question waits; a scan of a directory waits so long for each step of its listing.
    pub deadline: Duration,
    /// How long one page may take a source, its retries included.
    pub page_deadline: Duration,
    /// Entries asked of a source at once.
    pub page: usize,
    /// How long a failed listing is remembered: questions in that time fail at once.
    pub failure_ttl: Duration,
    /// How soon the same file is asked for again after a recheck.
    pub recheck_interval: Duration,
    /// Events that the log of invalidations keeps.
    pub log: usize,
    /// How often subscribers hear something.
    pub heartbeat: Duration,
}

impl Default for DatasetOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            page_deadline: Duration::from_secs(60),
            page: 1_000,
            failure_ttl: Duration::from_secs(1),
            recheck_interval: Duration::from_secs(1),
            log: 4_096,
            heartbeat: Duration::from_secs(2),
        }
    }
}

/// Counters of a [`DatasetIndex`] since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DatasetStats {
    /// Listings begun.
    pub listings: u64,
    /// Listings that failed.
    pub listing_failures: u64,
    /// Files asked for again after a failed conditional read.
    pub rechecks: u64,
    /// Rechecks left out because the file, or too many others, were just asked for.
    pub rechecks_limited: u64,
    /// Superseded versions that nobody took in time.
    pub superseded_dropped: u64,
    /// Questions that met their deadline.
    pub deadlines: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) listings: AtomicU64,
    pub(crate) listing_failures: AtomicU64,
    pub(crate) rechecks: AtomicU64,
    pub(crate) rechecks_limited: AtomicU64,
    pub(crate) superseded_dropped: AtomicU64,
    pub(crate) deadlines: AtomicU64,
}

/// The metadata of one dataset. Dropping it ends its listings; [`DatasetIndex::close`] waits for their end.
pub struct DatasetIndex {
    inner: Arc<Inner>,
    superseded: Mutex<Option<mpsc::Receiver<(DatasetPath, FileVersion)>>>,
}

pub(crate) struct Inner {
    pub(crate) index: Arc<Index>,
    pub(crate) id: DatasetId,
    /// In force; who asks a source notes its serial number.
    pub(crate) namespace: RwLock<Arc<Namespace>>,
    pub(crate) options: DatasetOptions,
    generation: AtomicU64,
    /// What directories are listed under, if it is higher: ahead of the generation that is answered.
    ahead: AtomicU64,
    /// Held while the generation is raised, so that every caller gets a number of its own.
    raising: tokio::sync::Mutex<()>,
    /// Held while sources are replaced.
    pub(crate) replacing: tokio::sync::Mutex<()>,
    pub(crate) log: Arc<Log>,
    superseded: mpsc::Sender<(DatasetPath, FileVersion)>,
    pub(crate) slots: Slots,
    pub(crate) verdicts: Cache<DatasetPath, Verdict>,
    pub(crate) rechecks: Mutex<Rechecks>,
    pub(crate) counters: Counters,
    pub(crate) closed: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl DatasetIndex {
    /// Takes up a dataset. What was listed before is answered at once, but for what was of other sources.
    pub async fn open(
        index: Arc<Index>,
        id: DatasetId,
        namespace: Arc<Namespace>,
        options: DatasetOptions,
    ) -> Result<Arc<Self>, MetadataError> {
        let Known { generation, mounts } = sources::known(&index, id).await?;
        if generation.is_none() {
            // Whatever is there is of nobody knows what.
            index.forget_directories(id).await?;
        }
        let generation = generation.unwrap_or(0);
        let (superseded, receiver) = mpsc::channel(SUPERSEDED);
        let inner = Arc::new(Inner {
            log: Arc::new(Log::new(options.log, generation)),
            index,
            id,
            namespace: RwLock::new(namespace.clone()),
            options,
            generation: AtomicU64::new(generation),
            ahead: AtomicU64::new(0),
            raising: tokio::sync::Mutex::new(()),
            replacing: tokio::sync::Mutex::new(()),
            superseded,
            slots: Mutex::new(HashMap::new()),
            verdicts: Cache::new(VERDICTS),
            rechecks: Mutex::default(),
            counters: Counters::default(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        if mounts != namespace.mounts() {
            inner.move_listings(mounts, &namespace, u64::MAX).await?;
        }
        Ok(Arc::new(Self { inner, superseded: Mutex::new(Some(receiver)) }))
    }

    /// Whose metadata this is.
    pub fn id(&self) -> DatasetId {
        self.inner.id
    }

    /// The namespace, for those who read what is named here.
    pub fn namespace(&self) -> Arc<Namespace> {
        self.inner.namespace()
    }

    /// Puts other sources in force. What is listed of those that stay is kept, and answered all the while; watchers are
    /// told of every directory of the others, and of mount points that came or went. After an error the new sources are
    /// in force already, and calling this again completes the change.
    pub async fn replace(&self, namespace: Arc<Namespace>) -> Result<(), MetadataError> {
        self.inner.replace(namespace).await
    }

    /// One entry of a directory, as of `generation` or later.
    pub async fn lookup(&self, generation: u64, dir: &DatasetPath, name: &[u8]) -> Result<Entry, MetadataError> {
        self.adopt_generation(generation);
        if !is_valid_name(name) {
            return Err(MetadataError::NotFound);
        }
        let name = Bytes::copy_from_slice(name);
        if self.inner.namespace().is_mount(dir, &name) {
            return Ok(Entry { name, kind: EntryKind::Directory });
        }
        let wanted = name.clone();
        let kind = self
            .inner
            .ask(dir, 0, false, move |txn, key, generation| query::lookup(txn, key, generation, &wanted))
            .await?
            .ok_or(MetadataError::NotFound)?;
        Ok(Entry { name, kind })
    }

    /// Entries of a directory after the sort key `after` (empty: from the start), as of `generation` or later. `limit` is
    /// taken between 1 and 4,096. While the directory is listed, a page is answered as soon as it has one entry.
    pub async fn list(
        &self,
        generation: u64,
        dir: &DatasetPath,
        after: &[u8],
        limit: usize,
    ) -> Result<ListPage, MetadataError> {
        self.adopt_generation(generation);
        let limit = limit.clamp(1, MAX_LIST);
        let after = Bytes::copy_from_slice(after);
        self.inner
            .ask(dir, 0, false, move |txn, key, generation| query::page(txn, key, generation, &after, limit))
            .await
    }

    /// Lists a directory to its end, if it is not listed under `generation` or a later one, and gives its sums (with
    /// the first page, when `after` is empty) and its subdirectories, 1,000 per page. Every change that it found is in
    /// the log of invalidations by then.
    pub async fn scan_directory(
        &self,
        generation: u64,
        dir: &DatasetPath,
        after: &[u8],
    ) -> Result<DirectoryScan, MetadataError> {
        self.adopt_generation(generation);
        let after = Bytes::copy_from_slice(after);
        self.inner.ask(dir, 0, true, move |txn, key, generation| query::scan(txn, key, generation, &after)).await
    }

    /// As [`Self::scan_directory`], ahead of need: the directory is listed under `generation`, which is not adopted, so
    /// that look-ups and listings are answered meanwhile, from what is known, however long the source takes.
    pub async fn scan_ahead(
        &self,
        generation: u64,
        dir: &DatasetPath,
        after: &[u8],
    ) -> Result<DirectoryScan, MetadataError> {
        let generation = generation.min(MAX_GENERATION);
        self.adopt_ahead(generation);
        let after = Bytes::copy_from_slice(after);
        self.inner
            .ask(dir, generation, true, move |txn, key, generation| query::scan(txn, key, generation, &after))
            .await
    }

    /// The highest generation that is known here.
    pub fn generation(&self) -> u64 {
        self.inner.generation()
    }

    /// The highest generation under which anything was listed here, or that [`Self::adopt_ahead`] was told: one above it is
    /// new to every directory.
    pub fn listing_generation(&self) -> u64 {
        self.inner.listing_generation()
    }

    /// Takes over a generation under which somebody else lists ahead of need. Nobody waits for it.
    pub fn adopt_ahead(&self, generation: u64) {
        self.inner.ahead.fetch_max(generation.min(MAX_GENERATION), Ordering::AcqRel);
    }

    /// Takes over a generation that somebody else knows, if it is higher. Directories listed under older ones are listed
    /// again before they are answered.
    pub fn adopt_generation(&self, generation: u64) {
        self.inner.adopt(generation);
    }

    /// Raises the generation; the new one is on disk when it is returned.
    pub async fn raise_generation(&self) -> Result<u64, MetadataError> {
        let inner = &self.inner;
        let _raising = inner.raising.lock().await;
        loop {
            let known = inner.generation();
            let generation = known + 1;
            if generation > MAX_GENERATION {
                return Err(MetadataError::Internal("the generation is exhausted".to_owned()));
            }
            let id = inner.id;
            inner.index.write(true, move |txn| sources::remember_generation(txn, id, generation)).await?;
            // Somebody may have told of a higher one: what was listed under that is older than this call.
            let raised = inner.generation.compare_exchange(known, generation, Ordering::AcqRel, Ordering::Acquire);
            if raised.is_ok() {
                inner.log.generation(generation);
                return Ok(generation);
            }
        }
    }

    /// Forgets directories at or below `path` that are listed under an older generation: a scan of everything there has
    /// not met them, so they do not exist. Their files are superseded. Gives their number.
    pub async fn prune(&self, generation: u64, path: &DatasetPath) -> Result<u64, MetadataError> {
        self.inner.prune(generation, path).await
    }

    /// A conditional read of this file failed: asks the source for it, in the background, and corrects the entry. Once
    /// per file and interval, however often it is called.
    pub fn recheck(&self, path: &DatasetPath) {
        if !self.inner.admit_recheck(path) {
            return;
        }
        let inner = self.inner.clone();
        let path = path.clone();
        self.inner.tasks.spawn(async move {
            let closed = inner.closed.clone();
            let work = closed.run_until_cancelled(inner.recheck(&path));
            if let Some(Err(error)) = work.await {
                tracing::warn!(dataset = %inner.id, %path, %error, "recheck of a file");
            }
        });
    }

    /// The same, done when it returns; whether the entry was corrected (false as well when it was just rechecked).
    pub async fn recheck_now(&self, path: &DatasetPath) -> Result<bool, MetadataError> {
        if !self.inner.admit_recheck(path) {
            return Ok(false);
        }
        self.inner.recheck(path).await
    }

    /// Invalidations after the one numbered `after` of `incarnation` (zeros at the first call). The first message is a
    /// reset or the continuation. Ends when the dataset is closed.
    pub fn watch(&self, incarnation: u64, after: u64) -> impl Stream<Item = Invalidation> + Send + use<> {
        let inner = &self.inner;
        inner.log.clone().subscribe(incarnation, after, inner.options.heartbeat, inner.closed.clone())
    }

    /// Whose numbers [`DatasetIndex::watch`] gives.
    pub fn incarnation(&self) -> u64 {
        self.inner.log.incarnation()
    }

    /// File versions that listings and rechecks found to be no longer current. `None` when somebody has taken it.
    pub fn take_superseded(&self) -> Option<mpsc::Receiver<(DatasetPath, FileVersion)>> {
        self.superseded.lock().take()
    }

    /// Requests made to the sources since the start.
    pub fn requests(&self) -> Requests {
        self.inner.namespace().stores().fold(Requests::default(), |sum, store| sum + store.requests())
    }

    /// Counters since the start.
    pub fn stats(&self) -> DatasetStats {
        let Counters { listings, listing_failures, rechecks, rechecks_limited, superseded_dropped, deadlines } =
            &self.inner.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DatasetStats {
            listings: get(listings),
            listing_failures: get(listing_failures),
            rechecks: get(rechecks),
            rechecks_limited: get(rechecks_limited),
            superseded_dropped: get(superseded_dropped),
            deadlines: get(deadlines),
        }
    }

    /// Ends listings, rechecks and subscriptions, and waits for their end.
    pub async fn close(&self) {
        self.inner.closed.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// Whether a directory is being listed.
    #[cfg(test)]
    pub(crate) fn is_listing(&self) -> bool {
        !self.inner.slots.lock().is_empty()
    }
}

impl Drop for DatasetIndex {
    fn drop(&mut self) {
        self.inner.closed.cancel();
    }
}

impl ScanDirectories for DatasetIndex {
    fn scan<'a>(
        &'a self,
        generation: u64,
        directory: &'a DatasetPath,
        after: &'a [u8],
    ) -> BoxFuture<'a, Result<DirectoryScan, MetadataError>> {
        Box::pin(self.scan_directory(generation, directory, after))
    }
}

impl Inner {
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn namespace(&self) -> Arc<Namespace> {
        self.namespace.read().clone()
    }

    /// Whether a namespace is in force no longer.
    pub(crate) fn is_replaced(&self, serial: u64) -> bool {
        self.namespace.read().serial() != serial
    }

    fn adopt(&self, generation: u64) {
        let generation = generation.min(MAX_GENERATION);
        if self.generation.fetch_max(generation, Ordering::AcqRel) < generation {
            self.log.generation(generation);
        }
    }

    pub(crate) fn directory_key(&self, directory: &DatasetPath) -> Arc<[u8]> {
        directory_key(self.id, directory).into()
    }

    /// What directories are listed under.
    pub(crate) fn listing_generation(&self) -> u64 {
        self.generation().max(self.ahead.load(Ordering::Acquire))
    }

    /// Asks the database, and again whenever the directory's listing has moved. `least`: the generation that is wanted, if
    /// it is above the dataset's. `settled`: not while it is listed, and the deadline is for each step.
    async fn ask<T, F>(
        self: &Arc<Self>,
        dir: &DatasetPath,
        least: u64,
        settled: bool,
        question: F,
    ) -> Result<T, MetadataError>
    where
        T: Send + 'static,
        F: Fn(&ReadTransaction, &[u8], u64) -> Result<Answer<T>, IndexError> + Send + Sync + 'static,
    {
        let key = self.directory_key(dir);
        let question = Arc::new(question);
        let mut deadline = Instant::now() + self.options.deadline;
        let mut listing = if settled { self.running_listing(dir) } else { None };
        let mut repairs = 0;
        loop {
            if self.closed.is_cancelled() {
                return Err(MetadataError::Closed);
            }
            let generation = self.generation().max(least);
            let verdict = self.verdicts.get(dir).filter(|verdict| !self.is_replaced(verdict.namespace));
            if let Some(Verdict { what: Found::Missing { generation: of }, .. }) = verdict
                && of >= generation
            {
                return Err(MetadataError::NotFound);
            }
            if !(settled && listing.is_some()) {
                let (question, key) = (question.clone(), key.clone());
                let answer = self.index.read(move |txn| question(txn, &key, generation));
                match tokio::time::timeout_at(deadline, answer).await {
                    Err(_) => return Err(self.deadline()),
                    Ok(Ok(Answer::Ready(answer))) => return Ok(answer),
                    Ok(Ok(Answer::Wait)) => {}
                    Ok(Err(error)) => self.repair(dir, error, &mut repairs).await?,
                }
            }
            let Some(progress) = &mut listing else {
                // Whatever the listing does from now on is seen; what it did before, the question asked again sees.
                listing = Some(self.ensure_listing(dir)?);
                if Instant::now() >= deadline {
                    return Err(self.deadline());
                }
                continue;
            };
            match tokio::time::timeout_at(deadline, progress.changed()).await {
                Err(_) => return Err(self.deadline()),
                // The task is gone; its outcome was seen or is in the database.
                Ok(Err(_)) => listing = None,
                Ok(Ok(())) => {
                    if settled {
                        deadline = Instant::now() + self.options.deadline;
                    }
                    let outcome = progress.borrow_and_update().outcome.clone();
                    match outcome {
                        None => {}
                        Some(outcome) => {
                            listing = None;
                            match outcome.result {
                                Err(MetadataError::Closed) => return Err(MetadataError::Closed),
                                Err(_) if self.is_replaced(outcome.namespace) => {}
                                Err(MetadataError::NotFound) if outcome.generation < self.generation().max(least) => {}
                                Err(error) => return Err(error),
                                Ok(()) => {}
                            }
                        }
                    }
                }
            }
        }
    }

    fn deadline(&self) -> MetadataError {
        self.counters.deadlines.fetch_add(1, Ordering::Relaxed);
        MetadataError::Deadline
    }

    /// After an error of the database: what can be done again is done again, a few times.
    pub(crate) async fn repair(
        &self,
        dir: &DatasetPath,
        error: IndexError,
        repairs: &mut usize,
    ) -> Result<(), MetadataError> {
        *repairs += 1;
        if *repairs > REPAIRS {
            return Err(error.into());
        }
        match error {
            // The database was rebuilt by whoever met the damage.
            IndexError::Damaged(_) => Ok(()),
            IndexError::Record(_) => {
                tracing::warn!(dataset = %self.id, directory = %dir, %error, "listing the directory again");
                let key = self.directory_key(dir);
                self.index.write(false, move |txn| crate::apply::forget(txn, &key)).await?;
                self.index.sweep_soon();
                Ok(())
            }
            IndexError::Failed(_) => Err(error.into()),
        }
    }

    /// Hands superseded versions over; what nobody takes in time is dropped and counted.
    pub(crate) async fn supersede(&self, dir: &DatasetPath, changes: &mut Changes) {
        let give_up = Instant::now() + SUPERSEDED_PATIENCE;
        for (name, version) in changes.superseded.drain(..) {
            // A name that makes no path was never given out.
            let Ok(path) = dir.join(&name) else { continue };
            let sent = match self.superseded.try_send((path, version)) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Closed(_)) => false,
                Err(mpsc::error::TrySendError::Full(event)) => {
                    tokio::time::timeout_at(give_up, self.superseded.send(event)).await.is_ok_and(|sent| sent.is_ok())
                }
            };
            if !sent {
                self.counters.superseded_dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
