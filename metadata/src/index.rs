//! The database of a worker: one redb file for all its datasets.
//!
//! It is a cache of the sources. So most commits are not synced: a crash loses the last second of listings, in whole
//! transactions, and they are done again. A thread syncs once a second and deletes the entries of forgotten directories
//! in small batches. A file that is damaged, foreign or of another format is set aside and a new one is begun, also
//! while the process runs.
//!
//! Blocking work runs on the runtime's blocking threads: reads bounded by a semaphore, writes one at a time.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use forebay_protocol::DatasetId;
use parking_lot::{Condvar, Mutex, RwLock};
use redb::{Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use tokio::sync::Semaphore;

use self::file::{Refused, open_file, set_aside};
use crate::{
    error::{IndexError, OpenError},
    sources,
};

mod file;

pub(crate) type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;

pub(crate) const META: Definition = TableDefinition::new("meta");
pub(crate) const DATASETS: Definition = TableDefinition::new("datasets");
pub(crate) const SOURCES: Definition = TableDefinition::new("sources");
pub(crate) const DIRECTORIES: Definition = TableDefinition::new("directories");
pub(crate) const ENTRIES: Definition = TableDefinition::new("entries");
pub(crate) const GARBAGE: Definition = TableDefinition::new("garbage");

const NEXT_ID_KEY: &[u8] = b"next-id";

const FILE_NAME: &str = "metadata.redb";

/// Reads at once: more than cores, for those that wait for the disk.
const READS: usize = 32;
/// Rows that one transaction of a sweep deletes: about 10 ms of the write lock.
pub(crate) const SWEEP: usize = 4096;
/// How long the syncer sweeps before it pauses for a sync interval.
const SWEEP_TIME: Duration = Duration::from_millis(200);

/// Settings of an [`Index`].
#[derive(Debug, Clone)]
pub struct IndexOptions {
    /// Memory for pages of the database, in bytes.
    pub cache_bytes: usize,
    /// How often commits are synced, and forgotten directories swept.
    pub sync_interval: Duration,
}

impl Default for IndexOptions {
    fn default() -> Self {
        Self { cache_bytes: 64 * 1024 * 1024, sync_interval: Duration::from_secs(1) }
    }
}

/// The database of a worker.
pub struct Index {
    shared: Arc<Shared>,
    reads: Semaphore,
    writes: Semaphore,
    syncer: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    options: IndexOptions,
    database: RwLock<Arc<Database>>,
    /// Commits since the last sync.
    dirty: AtomicBool,
    /// Forgotten directories may have entries left.
    garbage: AtomicBool,
    /// Forgotten directories whose entries somebody still reads.
    held: Mutex<HashSet<u64>>,
    rebuilt: AtomicU64,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Index {
    /// Opens or creates the database in `directory`, with default settings. Blocks while the file is checked.
    pub fn open(directory: &Path) -> Result<Arc<Self>, OpenError> {
        Self::open_with(directory, IndexOptions::default())
    }

    /// Opens or creates the database in `directory`. What is no good is set aside.
    pub fn open_with(directory: &Path, options: IndexOptions) -> Result<Arc<Self>, OpenError> {
        let path = directory.join(FILE_NAME);
        let io = |path: &Path, error: &dyn std::fmt::Display| OpenError::Io {
            path: path.to_path_buf(),
            message: error.to_string(),
        };
        fs::create_dir_all(directory).map_err(|error| io(directory, &error))?;
        let mut rebuilt = 0;
        let database = match open_file(&path, options.cache_bytes) {
            Ok(database) => database,
            Err(Refused::InUse) => return Err(OpenError::InUse(path)),
            Err(Refused::Io(error)) => return Err(io(&path, &error)),
            Err(Refused::Damaged(why)) => {
                let aside = set_aside(&path).map_err(|error| io(&path, &error))?;
                tracing::warn!(file = %path.display(), aside = %aside.display(), why, "metadata index rebuilt");
                rebuilt = 1;
                open_file(&path, options.cache_bytes).map_err(|error| match error {
                    Refused::InUse => OpenError::InUse(path.clone()),
                    Refused::Io(error) | Refused::Damaged(error) => io(&path, &error),
                })?
            }
        };
        let shared = Arc::new(Shared {
            path,
            options,
            database: RwLock::new(Arc::new(database)),
            dirty: AtomicBool::new(true),
            garbage: AtomicBool::new(true),
            held: Mutex::default(),
            rebuilt: AtomicU64::new(rebuilt),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        let syncer = std::thread::Builder::new()
            .name("metadata-sync".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.keep_synced()
            })
            .map_err(|error| io(directory, &error))?;
        let (reads, writes) = (Semaphore::new(READS), Semaphore::new(1));
        Ok(Arc::new(Self { shared, reads, writes, syncer: Some(syncer) }))
    }

    /// Databases set aside and begun anew since the start.
    pub fn rebuilt(&self) -> u64 {
        self.shared.rebuilt.load(Ordering::Relaxed)
    }

    /// The datasets of which something is remembered.
    pub async fn datasets(&self) -> Result<Vec<DatasetId>, crate::MetadataError> {
        let found = self.read(|txn| {
            let mut found = Vec::new();
            for row in txn.open_table(DATASETS)?.iter()? {
                found.extend(DatasetId::from_slice(row?.0.value()));
            }
            Ok(found)
        });
        Ok(found.await?)
    }

    /// Forgets everything of a dataset, its generation as well. It must not be open.
    pub async fn forget_dataset(self: &Arc<Self>, id: DatasetId) -> Result<(), crate::MetadataError> {
        self.forget_directories(id).await?;
        self.write(true, move |txn| {
            sources::clear(txn, id)?;
            txn.open_table(DATASETS)?.remove(id.as_bytes().as_slice())?;
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// Forgets the listings of a dataset, in batches; what is left after a crash are whole directories.
    pub(crate) async fn forget_directories(self: &Arc<Self>, id: DatasetId) -> Result<(), IndexError> {
        loop {
            let more = self
                .write(false, move |txn| {
                    let mut directories = txn.open_table(DIRECTORIES)?;
                    let mut garbage = txn.open_table(GARBAGE)?;
                    let first = id.as_bytes().as_slice();
                    let mut keys = Vec::new();
                    for row in directories.range(first..)?.take(SWEEP) {
                        let (key, value) = row?;
                        if !key.value().starts_with(first) {
                            break;
                        }
                        keys.push(key.value().to_vec());
                        // The entries of a damaged record are lost to the sweep: they stay unreachable.
                        if let Ok(record) = crate::record::DirectoryRecord::decode(key.value(), value.value()) {
                            garbage.insert(record.id.to_be_bytes().as_slice(), [].as_slice())?;
                        }
                    }
                    for key in &keys {
                        directories.remove(key.as_slice())?;
                    }
                    Ok(keys.len() == SWEEP)
                })
                .await?;
            self.sweep_soon();
            if !more {
                return Ok(());
            }
        }
    }

    /// Tells the syncer that directories were moved to the garbage.
    pub(crate) fn sweep_soon(&self) {
        self.shared.garbage.store(true, Ordering::Release);
    }

    /// Keeps the entries of a forgotten directory from being swept, until the guard is dropped.
    pub(crate) fn hold(self: &Arc<Self>, id: u64) -> Hold {
        self.shared.held.lock().insert(id);
        Hold { index: self.clone(), id }
    }

    /// Runs `work` on a snapshot, on a blocking thread.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, IndexError> + Send + 'static,
    ) -> Result<T, IndexError> {
        // The semaphore is never closed.
        let _permit = self.reads.acquire().await.map_err(|error| IndexError::Failed(error.to_string()))?;
        self.run(move |database| work(&database.begin_read()?)).await
    }

    /// Runs `work` in a transaction and commits it, on a blocking thread. `sync`: not before it is on disk.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        sync: bool,
        work: impl FnOnce(&WriteTransaction) -> Result<T, IndexError> + Send + 'static,
    ) -> Result<T, IndexError> {
        let _permit = self.writes.acquire().await.map_err(|error| IndexError::Failed(error.to_string()))?;
        let shared = self.shared.clone();
        self.run(move |database| shared.commit(database, sync, work)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, IndexError> + Send + 'static,
    ) -> Result<T, IndexError> {
        let shared = self.shared.clone();
        let task = tokio::task::spawn_blocking(move || {
            let database = shared.database.read().clone();
            let result = work(&database);
            if let Err(IndexError::Damaged(why)) = &result {
                shared.rebuild(&database, why);
            }
            result
        });
        task.await.unwrap_or_else(|error| Err(IndexError::Failed(error.to_string())))
    }

    /// Rows of all entries and the bytes they take on disk, pages included.
    #[cfg(test)]
    pub(crate) async fn entries_on_disk(&self) -> (u64, u64) {
        use redb::ReadableTableMetadata;
        self.read(|txn| {
            let table = txn.open_table(ENTRIES)?;
            let stats = table.stats()?;
            Ok((table.len()?, stats.stored_bytes() + stats.metadata_bytes() + stats.fragmented_bytes()))
        })
        .await
        .unwrap()
    }
}

/// See [`Index::hold`].
pub(crate) struct Hold {
    index: Arc<Index>,
    id: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.index.shared.held.lock().remove(&self.id);
        self.index.sweep_soon();
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        *self.shared.stop.lock() = true;
        self.shared.stopped.notify_all();
        if let Some(syncer) = self.syncer.take()
            && syncer.join().is_err()
        {
            tracing::error!("the syncer of the metadata index panicked");
        }
    }
}

impl Shared {
    fn commit<T>(
        &self,
        database: &Database,
        sync: bool,
        work: impl FnOnce(&WriteTransaction) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        let mut txn = database.begin_write()?;
        if sync {
            // The next start after a crash then reads the allocator's state instead of the whole file.
            txn.set_quick_repair(true);
            self.dirty.store(false, Ordering::Release);
        } else {
            txn.set_durability(Durability::None)?;
            self.dirty.store(true, Ordering::Release);
        }
        let result = match work(&txn) {
            Ok(value) => txn.commit().map(|()| value).map_err(IndexError::from),
            Err(error) => {
                // The first error counts; what an abort adds is the same trouble.
                if let Err(abort) = txn.abort() {
                    tracing::debug!(error = %abort, "abort of a metadata transaction");
                }
                Err(error)
            }
        };
        if result.is_err() {
            self.dirty.store(true, Ordering::Release);
        }
        result
    }

    /// The syncer's thread.
    fn keep_synced(&self) {
        loop {
            let stop = {
                let mut stop = self.stop.lock();
                if !*stop {
                    self.stopped.wait_for(&mut stop, self.options.sync_interval);
                }
                *stop
            };
            let database = self.database.read().clone();
            let pause = Instant::now() + SWEEP_TIME;
            while !stop && Instant::now() < pause && self.garbage.swap(false, Ordering::AcqRel) {
                match self.commit(&database, false, |txn| self.sweep(txn)) {
                    Ok(false) => {}
                    Ok(true) => self.garbage.store(true, Ordering::Release),
                    Err(error) => {
                        tracing::warn!(%error, "sweep of forgotten directories");
                        break;
                    }
                }
            }
            if self.dirty.load(Ordering::Acquire)
                && let Err(error) = self.commit(&database, true, |_| Ok(()))
            {
                tracing::warn!(%error, "sync of the metadata index");
            }
            if stop {
                return;
            }
        }
    }

    /// Deletes a batch of unreachable entries; whether there are more that nobody holds.
    fn sweep(&self, txn: &WriteTransaction) -> Result<bool, IndexError> {
        let mut garbage = txn.open_table(GARBAGE)?;
        let mut entries = txn.open_table(ENTRIES)?;
        let mut left = SWEEP;
        let mut from = Vec::new();
        while left > 0 {
            let next = garbage.range(from.as_slice()..)?.next().transpose()?.map(|(id, _)| id.value().to_vec());
            let Some(id) = next else { return Ok(false) };
            from = [id.as_slice(), &[0]].concat();
            let number = id.as_slice().try_into().map(u64::from_be_bytes);
            if number.is_ok_and(|id| self.held.lock().contains(&id)) {
                continue;
            }
            let mut keys = Vec::new();
            for row in entries.range(id.as_slice()..)?.take(left) {
                let (key, _) = row?;
                if !key.value().starts_with(&id) {
                    break;
                }
                keys.push(key.value().to_vec());
            }
            if keys.len() < left {
                garbage.remove(id.as_slice())?;
            }
            left -= keys.len().max(1);
            for key in keys {
                entries.remove(key.as_slice())?;
            }
        }
        Ok(true)
    }

    /// Sets the file aside and begins a new one, unless somebody did.
    fn rebuild(&self, damaged: &Arc<Database>, why: &str) {
        let mut current = self.database.write();
        if !Arc::ptr_eq(&current, damaged) {
            return;
        }
        let fresh = set_aside(&self.path).map_err(|error| error.to_string()).and_then(|aside| {
            tracing::warn!(file = %self.path.display(), aside = %aside.display(), why, "metadata index rebuilt");
            open_file(&self.path, self.options.cache_bytes).map_err(|error| format!("{error:?}"))
        });
        match fresh {
            Ok(database) => {
                *current = Arc::new(database);
                self.rebuilt.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => tracing::error!(error, why, "damaged metadata index cannot be rebuilt"),
        }
    }
}

/// A directory id that was never used.
pub(crate) fn next_id(txn: &WriteTransaction) -> Result<u64, IndexError> {
    let mut meta = txn.open_table(META)?;
    let id = read_u64(&meta, NEXT_ID_KEY)?.unwrap_or(1);
    meta.insert(NEXT_ID_KEY, (id + 1).to_le_bytes().as_slice())?;
    Ok(id)
}

fn read_u64(table: &impl ReadableTable<&'static [u8], &'static [u8]>, key: &[u8]) -> Result<Option<u64>, IndexError> {
    let Some(value) = table.get(key)? else { return Ok(None) };
    let bytes = value.value().try_into().map_err(|_| IndexError::Damaged("meta".to_owned()))?;
    Ok(Some(u64::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::{
        file::{DAMAGED, FORMAT_KEY},
        *,
    };
    use crate::record::FORMAT;

    fn files(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    async fn mark(index: &Index) {
        index
            .write(false, |txn| {
                txn.open_table(DATASETS)?.insert([1u8; 16].as_slice(), [2u8].as_slice())?;
                Ok(())
            })
            .await
            .unwrap();
    }

    async fn marked(index: &Index) -> bool {
        index.read(|txn| Ok(txn.open_table(DATASETS)?.get([1u8; 16].as_slice())?.is_some())).await.unwrap()
    }

    #[tokio::test]
    async fn what_was_committed_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let index = Index::open(directory.path()).unwrap();
        mark(&index).await;
        assert!(matches!(Index::open(directory.path()), Err(OpenError::InUse(_))));
        drop(index);
        let index = Index::open(directory.path()).unwrap();
        assert!(marked(&index).await);
        assert_eq!(index.rebuilt(), 0);
    }

    #[tokio::test]
    async fn damaged_files_are_set_aside_one_at_most() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        let whole = {
            let index = Index::open(directory.path()).unwrap();
            mark(&index).await;
            drop(index);
            fs::read(&path).unwrap()
        };
        let mut cases: Vec<Vec<u8>> = vec![
            b"garbage".to_vec(),
            vec![0; 100_000],
            vec![0xff; 100_000],
            whole[..whole.len() / 2].to_vec(),
            whole[..100].to_vec(),
        ];
        let mut flipped = whole.clone();
        for byte in &mut flipped[4096..] {
            *byte ^= 0x10;
        }
        cases.push(flipped);
        for (i, bytes) in cases.into_iter().enumerate() {
            fs::write(&path, bytes).unwrap();
            let index = Index::open(directory.path()).unwrap();
            assert_eq!(index.rebuilt(), 1, "case {i}");
            assert!(!marked(&index).await);
            mark(&index).await;
            drop(index);
            assert_eq!(files(directory.path()), [FILE_NAME.to_owned(), format!("{DAMAGED}{}", i + 1)]);
        }
        assert!(marked(&Index::open(directory.path()).unwrap()).await);
    }

    #[tokio::test]
    async fn any_flipped_bit_is_survived() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        {
            let index = Index::open(directory.path()).unwrap();
            mark(&index).await;
        }
        let whole = fs::read(&path).unwrap();
        for position in (0..whole.len()).step_by(whole.len() / 64 + 1) {
            let mut bytes = whole.clone();
            bytes[position] ^= 0x40;
            fs::write(&path, bytes).unwrap();
            let index = Index::open(directory.path()).unwrap();
            // Rebuilt, or not harmed.
            assert!(index.rebuilt() == 1 || marked(&index).await, "position {position}");
        }
    }

    #[tokio::test]
    async fn other_formats_and_strangers_are_rebuilt() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        {
            let database = Database::create(&path).unwrap();
            let txn = database.begin_write().unwrap();
            txn.open_table(META).unwrap().insert(FORMAT_KEY, (FORMAT - 1).to_le_bytes().as_slice()).unwrap();
            txn.commit().unwrap();
        }
        assert_eq!(Index::open(directory.path()).unwrap().rebuilt(), 1);
        fs::remove_file(&path).unwrap();
        {
            let database = Database::create(&path).unwrap();
            let txn = database.begin_write().unwrap();
            txn.open_table(TableDefinition::<u64, u64>::new("meta")).unwrap().insert(1, 2).unwrap();
            txn.commit().unwrap();
        }
        assert_eq!(Index::open(directory.path()).unwrap().rebuilt(), 1);
        fs::remove_file(&path).unwrap();
        {
            let database = Database::create(&path).unwrap();
            let txn = database.begin_write().unwrap();
            txn.open_table(TableDefinition::<u64, u64>::new("theirs")).unwrap().insert(1, 2).unwrap();
            txn.commit().unwrap();
        }
        assert_eq!(Index::open(directory.path()).unwrap().rebuilt(), 1);
    }

    #[tokio::test]
    async fn damage_met_while_running_is_repaired() {
        let directory = tempfile::tempdir().unwrap();
        let index = Index::open(directory.path()).unwrap();
        mark(&index).await;
        let error = index.read(|_| Err::<(), _>(IndexError::Damaged("a page".to_owned()))).await;
        assert!(matches!(error, Err(IndexError::Damaged(_))));
        assert_eq!(index.rebuilt(), 1);
        assert!(!marked(&index).await);
        mark(&index).await;
        assert!(marked(&index).await);
    }
}
