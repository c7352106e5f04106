//! The index on disk: which chunks there are, so that a start opens no chunk file.
//!
//! ```text
//! chunks-1   identity [16] and chunk index [4], big-endian
//!            -> dataset [16], order u64, data u32, length u32, overhead u16, flags u8, crc32c u32 of key and all before
//! meta       "clean" 0 or 1; "uuid-high", "uuid-low": the directory's
//! ```
//!
//! The catalog in memory is the truth; a writer thread commits what changed, in batches. A commit is durable, so the
//! writer takes at most a tenth of the time for it: after a commit of 50 ms the next one comes 500 ms later. What a
//! crash loses of it, the sweep finds in the directory tree. A pin waits for its commit.
//!
//! A file that cannot be read (also when the database panics over it) is set aside and written anew from what the sweep
//! finds. One that cannot be written is closed, tried again after a pause, and then written anew from memory; until
//! then nothing but pins fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_protocol::DatasetId;
use parking_lot::{Condvar, Mutex};
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::catalog::{Catalog, Entry, Name, PINNED, Row, SUPERSEDED, Tick};
use crate::root::Root;

const ROW: usize = 16 + 8 + 4 + 4 + 2 + 1 + 4;
const CHUNKS: TableDefinition<'static, &[u8; 20], &[u8; ROW]> = TableDefinition::new("chunks-1");
const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");
const CLEAN: &str = "clean";
const UUID_HIGH: &str = "uuid-high";
const UUID_LOW: &str = "uuid-low";

/// Pages that the database keeps in memory.
const DATABASE_CACHE: usize = 16 * 1024 * 1024;
/// Rows of one commit, about.
const BATCH: usize = 16_384;
/// A commit is followed by this many times its duration without one, at most [`MAX_INTERVAL`].
const REST: u32 = 9;
const MAX_INTERVAL: Duration = Duration::from_secs(10);

/// How the writer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Writes what waits and, when the catalog is known to be complete, that it is.
    Clean {
        /// Whether catalog and directory tree agree.
        complete: bool,
    },
    /// Leaves it as a crash would.
    Abandon,
}

/// What was found at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// All of it, as a clean end left it.
    Complete,
    /// A part or nothing: the directory tree must be swept.
    Partial,
}

/// The way to the writer thread.
#[derive(Debug, Default)]
pub(crate) struct Index {
    control: Mutex<Control>,
    wake: Condvar,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Control {
    stop: Option<Stop>,
    reopen: bool,
    requested: u64,
    completed: u64,
    failure: Option<String>,
}

/// Why the database cannot be used.
#[derive(Debug)]
enum Trouble {
    /// What is in it is damaged or none of ours.
    Damaged(String),
    /// It could not be read or written.
    Unavailable(String),
}

impl From<redb::Error> for Trouble {
    fn from(error: redb::Error) -> Self {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        match &error {
            redb::Error::Io(io) if !matches!(io.kind(), InvalidData | UnexpectedEof) => {
                Self::Unavailable(error.to_string())
            }
            redb::Error::PreviousIo | redb::Error::DatabaseAlreadyOpen => Self::Unavailable(error.to_string()),
            _ => Self::Damaged(error.to_string()),
        }
    }
}

/// Opens the index and loads the catalog from it. A damaged one is set aside. With no database at all the writer tries
/// again later. The catalog that is returned is `empty()`, filled.
pub(crate) fn open(root: &Root, empty: impl Fn() -> Catalog) -> (Catalog, Option<Database>, Found) {
    for _ in 0..2 {
        let catalog = empty();
        match guarded(|| load(root, &catalog)) {
            Ok((database, found)) => return (catalog, Some(database), found),
            Err(Trouble::Damaged(reason)) => {
                tracing::warn!(path = %root.path().display(), reason, "the cache index is damaged; rebuilding it");
                if let Err(error) = root.set_index_aside() {
                    tracing::warn!(path = %root.path().display(), %error, "cannot set the cache index aside");
                    break;
                }
            }
            Err(Trouble::Unavailable(reason)) => {
                tracing::warn!(path = %root.path().display(), reason, "cannot open the cache index");
                break;
            }
        }
    }
    let catalog = empty();
    catalog.rewrite();
    (catalog, None, Found::Partial)
}

impl Index {
    /// Waits until everything that changed before this call is durable.
    pub(crate) fn flush(&self, deadline: Duration) -> Result<(), String> {
        let until = Instant::now() + deadline;
        let mut control = self.control.lock();
        control.requested += 1;
        let mine = control.requested;
        self.wake.notify_one();
        while control.completed < mine {
            if control.stop.is_some() {
                return Err("the cache store is closed".into());
            }
            if self.done.wait_until(&mut control, until).timed_out() {
                return Err(format!("the cache index was not written within {deadline:?}"));
            }
        }
        control.failure.clone().map_or(Ok(()), Err)
    }

    /// The directory is another one now: start an index in it.
    pub(crate) fn reopen(&self) {
        self.control.lock().reopen = true;
        self.wake.notify_one();
    }

    pub(crate) fn stop(&self, stop: Stop) {
        self.control.lock().stop.get_or_insert(stop);
        self.wake.notify_one();
        self.done.notify_all();
    }

    /// The writer thread's body: returns after [`Self::stop`].
    pub(crate) fn run(
        &self,
        catalog: &Catalog,
        root: impl Fn() -> Option<Arc<Root>>,
        mut database: Option<Database>,
        interval: Duration,
        pause: Duration,
    ) {
        let mut rest = interval;
        let mut retry = Instant::now();
        loop {
            let (stop, reopen, requested) = self.wait(rest);
            if stop == Some(Stop::Abandon) {
                return;
            }
            if reopen {
                // The old one lies in a directory that is gone.
                database = None;
                catalog.rewrite();
                retry = Instant::now();
            }
            let started = Instant::now();
            if database.is_none() && started >= retry {
                database = root().and_then(|root| reopened(&root));
            }
            let complete = match stop {
                Some(Stop::Clean { complete }) => complete,
                _ => false,
            };
            let result = match &database {
                Some(database) => write_all(database, catalog, root().map(|root| root.uuid()), complete),
                None => Err("the cache index cannot be opened".into()),
            };
            if let Err(reason) = &result {
                if database.take().is_some() {
                    tracing::warn!(reason, "cannot write the cache index");
                }
                catalog.rewrite();
                retry = retry.max(started + pause);
            }
            rest = (started.elapsed() * REST).clamp(interval, MAX_INTERVAL.max(interval));
            let mut control = self.control.lock();
            control.completed = requested;
            control.failure = result.err();
            self.done.notify_all();
            drop(control);
            if stop.is_some() {
                return;
            }
        }
    }

    /// Waits for a request, at most `rest`.
    fn wait(&self, rest: Duration) -> (Option<Stop>, bool, u64) {
        let until = Instant::now() + rest;
        let mut control = self.control.lock();
        while control.stop.is_none() && !control.reopen && control.requested == control.completed {
            if self.wake.wait_until(&mut control, until).timed_out() {
                break;
            }
        }
        (control.stop, std::mem::take(&mut control.reopen), control.requested)
    }
}

/// Runs what calls the database, which may panic over a damaged file.
fn guarded<T>(call: impl FnOnce() -> Result<T, Trouble>) -> Result<T, Trouble> {
    // Unwind safe: what a panic leaves behind (a database, a catalog that is being filled) is dropped by the caller.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err(Trouble::Damaged("the database panicked".into())))
}

fn load(root: &Root, catalog: &Catalog) -> Result<(Database, Found), Trouble> {
    let file = root.open_index().map_err(|error| Trouble::Unavailable(error.to_string()))?;
    let database = database(file)?;
    let found = read(&database, root, catalog)?;
    begin(&database, root)?;
    Ok((database, found))
}

fn database(file: std::fs::File) -> Result<Database, Trouble> {
    let backend = FileBackend::new(file).map_err(redb::Error::from)?;
    let database = Database::builder().set_cache_size(DATABASE_CACHE).create_with_backend(backend);
    Ok(database.map_err(redb::Error::from)?)
}

fn read(database: &Database, root: &Root, catalog: &Catalog) -> Result<Found, Trouble> {
    let read = database.begin_read().map_err(redb::Error::from)?;
    let meta = match read.open_table(META) {
        Ok(meta) => meta,
        // Just created.
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Found::Partial),
        Err(error) => return Err(redb::Error::from(error).into()),
    };
    let get = |key| meta.get(key).map(|value| value.map(|value| value.value())).map_err(redb::Error::from);
    let (high, low) = root.uuid().as_u64_pair();
    if (get(UUID_HIGH)?, get(UUID_LOW)?) != (Some(high), Some(low)) {
        return Err(Trouble::Damaged("it belongs to another directory".into()));
    }
    let clean = get(CLEAN)? == Some(1);
    let chunks = read.open_table(CHUNKS).map_err(redb::Error::from)?;
    for row in chunks.iter().map_err(redb::Error::from)? {
        let (name, row) = row.map_err(redb::Error::from)?;
        let name = Name(*name.value());
        let (dataset, entry) = decode(name, row.value()).ok_or_else(|| Trouble::Damaged("it has a bad row".into()))?;
        catalog.restore(name, dataset, entry);
    }
    Ok(if clean { Found::Complete } else { Found::Partial })
}

/// From here on an end without [`Stop::Clean`] is an unclean one.
fn begin(database: &Database, root: &Root) -> Result<(), Trouble> {
    let write = begin_write(database)?;
    {
        let (high, low) = root.uuid().as_u64_pair();
        let mut meta = write.open_table(META).map_err(redb::Error::from)?;
        for (key, value) in [(CLEAN, 0), (UUID_HIGH, high), (UUID_LOW, low)] {
            meta.insert(key, value).map_err(redb::Error::from)?;
        }
        write.open_table(CHUNKS).map_err(redb::Error::from)?;
    }
    Ok(write.commit().map_err(redb::Error::from)?)
}

fn begin_write(database: &Database) -> Result<redb::WriteTransaction, Trouble> {
    let mut write = database.begin_write().map_err(redb::Error::from)?;
    // A start after a crash must not read the whole file.
    write.set_quick_repair(true);
    Ok(write)
}

/// An index to be written anew; what it holds does not matter.
fn reopened(root: &Root) -> Option<Database> {
    let open = || {
        let file = root.open_index().map_err(|error| Trouble::Unavailable(error.to_string()))?;
        let database = database(file)?;
        begin(&database, root)?;
        Ok(database)
    };
    match guarded(open) {
        Ok(database) => Some(database),
        Err(Trouble::Damaged(_)) => root.set_index_aside().ok().and_then(|()| guarded(open).ok()),
        Err(Trouble::Unavailable(_)) => None,
    }
}

/// Writes everything that waits, batch by batch, and marks a clean end with the last one.
fn write_all(database: &Database, catalog: &Catalog, uuid: Option<uuid::Uuid>, clean: bool) -> Result<(), String> {
    loop {
        let (rows, anew) = catalog.take_waiting(BATCH);
        let last = catalog.waiting() == 0 && !catalog.must_rewrite();
        let mark = clean && last && uuid.is_some();
        if rows.is_empty() && !anew && !mark {
            return Ok(());
        }
        let written = guarded(|| write_batch(database, catalog, &rows, anew, mark));
        if let Err(Trouble::Damaged(reason) | Trouble::Unavailable(reason)) = written {
            return Err(reason);
        }
        if last {
            return Ok(());
        }
    }
}

fn write_batch(database: &Database, catalog: &Catalog, rows: &[Row], anew: bool, mark: bool) -> Result<(), Trouble> {
    let write = begin_write(database)?;
    if anew {
        write.delete_table(CHUNKS).map_err(redb::Error::from)?;
    }
    {
        let mut chunks = write.open_table(CHUNKS).map_err(redb::Error::from)?;
        let mut put = |rows: &[Row]| -> Result<(), redb::Error> {
            for (name, row) in rows {
                match row {
                    Some((dataset, entry)) => drop(chunks.insert(&name.0, &encode(*name, *dataset, entry))?),
                    None => drop(chunks.remove(&name.0)?),
                }
            }
            Ok(())
        };
        put(rows)?;
        let mut shard = 0;
        while anew && let Some(rows) = catalog.shard_rows(shard) {
            put(&rows)?;
            shard += 1;
        }
        if mark {
            let mut meta = write.open_table(META).map_err(redb::Error::from)?;
            meta.insert(CLEAN, 1).map_err(redb::Error::from)?;
        }
    }
    Ok(write.commit().map_err(redb::Error::from)?)
}

fn encode(name: Name, dataset: DatasetId, entry: &Entry) -> [u8; ROW] {
    let Entry { order, used: _, hits: _, slot: _, data, len, overhead, flags } = *entry;
    let mut row = [0; ROW];
    row[..16].copy_from_slice(dataset.as_bytes());
    row[16..24].copy_from_slice(&order.get().to_le_bytes());
    row[24..28].copy_from_slice(&data.to_le_bytes());
    row[28..32].copy_from_slice(&len.to_le_bytes());
    row[32..34].copy_from_slice(&overhead.to_le_bytes());
    row[34] = flags & (PINNED | SUPERSEDED);
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&name.0), &row[..35]);
    row[35..].copy_from_slice(&checksum.to_le_bytes());
    row
}

fn decode(name: Name, row: &[u8; ROW]) -> Option<(DatasetId, Entry)> {
    let (body, checksum) = row.split_last_chunk::<4>()?;
    if crc32c::crc32c_append(crc32c::crc32c(&name.0), body).to_le_bytes() != *checksum {
        return None;
    }
    let (dataset, rest) = body.split_first_chunk::<16>()?;
    let (order, rest) = rest.split_first_chunk::<8>()?;
    let (data, rest) = rest.split_first_chunk::<4>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let (overhead, flags) = rest.split_first_chunk::<2>()?;
    let ticks = u64::from_le_bytes(*order);
    let order = Tick::new(ticks);
    let entry = Entry {
        order,
        used: order,
        hits: 0,
        slot: 0,
        data: u32::from_le_bytes(*data),
        len: u32::from_le_bytes(*len),
        overhead: u16::from_le_bytes(*overhead),
        flags: *flags.first()?,
    };
    // Nothing that was ever written; sums of such entries cannot overflow.
    let sound = entry.data <= entry.len
        && u64::from(entry.len) <= forebay_protocol::CHUNK_SIZE
        && entry.flags & !(PINNED | SUPERSEDED) == 0
        && ticks < Tick::MAX;
    sound.then_some((DatasetId::from_slice(dataset)?, entry))
}

#[cfg(test)]
mod tests {
    use forebay_protocol::{ChunkKey, FileIdentity};

    use super::*;
    use crate::ledger::Ledger;

    fn empty() -> Catalog {
        Catalog::new(Ledger::new(1 << 50, 90, 80))
    }

    fn fill(catalog: &Catalog, chunks: u32) {
        let slot = catalog.ledger(|ledger| ledger.slot(DatasetId::local("n", "a")));
        for index in 0..chunks {
            let file = FileIdentity(u128::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c834));
            let name = ChunkKey { file, index: 0 }.into();
            let order = catalog.next_order();
            let entry = Entry { order, used: order, hits: 0, slot, data: 7, len: 9, overhead: 4096, flags: 0 };
            catalog.apply(name, true, |_| Some(entry)).unwrap();
        }
    }

    /// A row as `format 1` of the superblock has it. When this fails, that format must change.
    #[test]
    fn a_row_is_as_version_1_has_it() {
        let name = Name::from(ChunkKey { file: FileIdentity(0x0102), index: 3 });
        let dataset = DatasetId::local("default", "golden");
        let entry = Entry {
            order: Tick::new(5),
            used: Tick::new(5),
            hits: 0,
            slot: 0,
            data: 6,
            len: 7,
            overhead: 4096,
            flags: PINNED,
        };
        let row = encode(name, dataset, &entry);
        assert_eq!(crate::superblock::FORMAT, 1);
        assert_eq!(hex::encode(name.0), "0000000000000000000000000000010200000003");
        assert_eq!(hex::encode(row), GOLDEN);
        assert_eq!(decode(name, &row), Some((dataset, entry)));
        for bit in 0..ROW * 8 {
            let mut flipped = row;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(name, &flipped), None);
        }
        assert_eq!(decode(Name([1; 20]), &row), None);
    }

    const GOLDEN: &str = "f4951f4669a158b3a7958f970182e3d605000000000000000600000007000000001001f54a765b";

    #[test]
    fn a_clean_end_is_told_from_an_unclean_one() {
        let dir = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(dir.path(), "a").unwrap());
        let run = |stop| {
            let (catalog, database, found) = open(&root, empty);
            let before = catalog.ledger(|ledger| ledger.total.chunks);
            let index = Index::default();
            let step = Duration::from_millis(1);
            std::thread::scope(|scope| {
                scope.spawn(|| index.run(&catalog, || Some(Arc::clone(&root)), database, step, step));
                fill(&catalog, 10);
                index.flush(Duration::from_secs(10)).unwrap();
                index.stop(stop);
            });
            (found, before)
        };
        assert_eq!(run(Stop::Abandon), (Found::Partial, 0));
        assert_eq!(run(Stop::Clean { complete: false }), (Found::Partial, 10));
        assert_eq!(run(Stop::Clean { complete: true }), (Found::Partial, 10));
        assert_eq!(run(Stop::Clean { complete: true }), (Found::Complete, 10));
        assert_eq!(run(Stop::Abandon), (Found::Complete, 10));
        assert_eq!(run(Stop::Abandon), (Found::Partial, 10));
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path(), "a").unwrap();
        let (catalog, database, _) = open(&root, empty);
        fill(&catalog, 2000);
        write_all(database.as_ref().unwrap(), &catalog, Some(root.uuid()), true).unwrap();
        drop(database);
        let path = dir.path().join(crate::root::INDEX);
        let good = std::fs::read(&path).unwrap();
        type Damage = dyn Fn(&mut Vec<u8>);
        let damages: [&Damage; 5] = [
            &|bytes| bytes.truncate(100),
            &|bytes| bytes[0] ^= 1,
            &|bytes| bytes.fill(0x55),
            &|bytes| bytes[4096..].fill(0),
            &|bytes| *bytes = b"not a database".to_vec(),
        ];
        for (n, damage) in damages.iter().enumerate() {
            let mut bytes = good.clone();
            damage(&mut bytes);
            std::fs::write(&path, &bytes).unwrap();
            let (catalog, database, found) = open(&root, empty);
            assert_eq!(found, Found::Partial, "damage {n}");
            assert_eq!(catalog.ledger(|ledger| ledger.total.chunks), 0);
            assert!(database.is_some() && dir.path().join(crate::root::INDEX_DAMAGED).exists());
        }
    }

    #[test]
    fn what_did_not_fit_the_queue_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path(), "a").unwrap();
        let (catalog, database, _) = open(&root, empty);
        fill(&catalog, 1000);
        catalog.rewrite();
        write_all(database.as_ref().unwrap(), &catalog, Some(root.uuid()), true).unwrap();
        drop(database);
        let (catalog, _database, found) = open(&root, empty);
        assert_eq!((catalog.ledger(|ledger| ledger.total.chunks), found), (1000, Found::Complete));
    }
}
