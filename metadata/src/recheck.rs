//! A conditional read failed: the source has another version of the file than its entry says.
//!
//! The file's entry is corrected from a HEAD, as a listing would have done it. The HEAD is repeated when a listing of the
//! directory moved meanwhile, so that it never overwrites what is newer. What a listing under way has not reached is left
//! to it.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use forebay_protocol::{DatasetPath, FileVersion};
use forebay_under_store::{Item, ItemKind, StoreError};
use redb::WriteTransaction;
use tokio::time::Instant;

use crate::{
    changes::Changes,
    dataset::Inner,
    error::{IndexError, MetadataError},
    index::{DIRECTORIES, ENTRIES},
    query::{self, entry},
    record::{DirectoryRecord, EntryRecord, Sums, directory_sort_key, entry_key},
};

/// Files that are rechecked at once or were just now; beyond that a recheck is left out, and the next failed read asks
/// again.
const MAX_RECENT: usize = 1024;
/// How often a HEAD is repeated because the directory's listing moved.
const ATTEMPTS: usize = 3;
/// How long a HEAD may take, its retries included.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// When files were last rechecked.
#[derive(Debug, Default)]
pub(crate) struct Rechecks {
    recent: HashMap<DatasetPath, Instant>,
}

impl Rechecks {
    fn admit(&mut self, path: &DatasetPath, interval: Duration) -> bool {
        let now = Instant::now();
        if self.recent.len() >= MAX_RECENT {
            self.recent.retain(|_, until| *until > now);
        }
        if self.recent.get(path).is_some_and(|until| *until > now) || self.recent.len() >= MAX_RECENT {
            return false;
        }
        self.recent.insert(path.clone(), now + interval.max(HEAD_DEADLINE));
        true
    }

    fn done(&mut self, path: &DatasetPath, interval: Duration) {
        self.recent.insert(path.clone(), Instant::now() + interval);
    }
}

/// What the source has at a path now.
#[derive(Debug, Clone)]
enum Now {
    Nothing,
    Directory,
    File(FileVersion),
}

enum Outcome {
    /// The listing moved since the HEAD was sent.
    Moved,
    Done(Changes),
}

impl Inner {
    /// Whether a file may be rechecked now; the caller then does it.
    pub(crate) fn admit_recheck(&self, path: &DatasetPath) -> bool {
        let admitted = self.rechecks.lock().admit(path, self.options.recheck_interval);
        let counter = if admitted { &self.counters.rechecks } else { &self.counters.rechecks_limited };
        counter.fetch_add(1, Ordering::Relaxed);
        admitted
    }

    pub(crate) async fn recheck(self: &Arc<Self>, path: &DatasetPath) -> Result<bool, MetadataError> {
        let result = self.ask_source(path).await;
        self.rechecks.lock().done(path, self.options.recheck_interval);
        result
    }

    async fn ask_source(self: &Arc<Self>, path: &DatasetPath) -> Result<bool, MetadataError> {
        let Some((directory, name)) = path.split() else { return Ok(false) };
        let namespace = self.namespace();
        let Some(source) = namespace.locate(path) else { return Ok(false) };
        if namespace.is_mount(&directory, &name) {
            return Ok(false);
        }
        let key = self.directory_key(&directory);
        for _ in 0..ATTEMPTS {
            let at = key.clone();
            let before = self.index.read(move |txn| query::directory(&txn.open_table(DIRECTORIES)?, &at)).await?;
            let Some(before) = before else { return Ok(false) };
            let head = source.store.head(&source.key);
            let answer = tokio::time::timeout(HEAD_DEADLINE, head).await.unwrap_or_else(|_| {
                Err(StoreError::Unavailable(format!("no answer within {} s", HEAD_DEADLINE.as_secs())))
            });
            let now = match answer {
                Ok(Item { name: _, kind: ItemKind::Directory }) => Now::Directory,
                Ok(Item { name: _, kind: ItemKind::File { size, mtime_ns, version } }) => {
                    Now::File(FileVersion { size, mtime_ns, key: version })
                }
                Err(StoreError::NotFound(_)) => Now::Nothing,
                // The next failed read asks again.
                Err(_) if self.is_replaced(namespace.serial()) => return Ok(false),
                Err(error) => return Err(MetadataError::from_store(&error)),
            };
            let (at, what, inner, serial) = (key.clone(), name.clone(), self.clone(), namespace.serial());
            let apply = move |txn: &WriteTransaction| match inner.is_replaced(serial) {
                true => Ok(Outcome::Done(Changes::default())),
                false => correct(txn, &at, &before, &what, now),
            };
            match self.index.write(false, apply).await? {
                Outcome::Moved => {}
                Outcome::Done(mut changes) => {
                    self.supersede(&directory, &mut changes).await;
                    let Some(names) = changes.into_names() else { return Ok(false) };
                    self.log.push(directory, names);
                    return Ok(true);
                }
            }
        }
        // The listing that moves so fast will have met the file itself.
        Ok(false)
    }
}

/// Puts what the source has now in the place of an entry.
fn correct(
    txn: &WriteTransaction,
    key: &[u8],
    before: &DirectoryRecord,
    name: &[u8],
    now: Now,
) -> Result<Outcome, IndexError> {
    let mut changes = Changes::default();
    let mut directories = txn.open_table(DIRECTORIES)?;
    let Some(mut record) = query::directory(&directories, key)? else { return Ok(Outcome::Moved) };
    if !same_place(&record, before) {
        return Ok(Outcome::Moved);
    }
    let as_directory = directory_sort_key(name);
    let sums = match (&mut record.running, &mut record.complete) {
        (Some(running), _) if running.passed.as_ref() >= as_directory.as_slice() => &mut running.sums,
        // The listing comes to it.
        (Some(_), _) | (None, None) => return Ok(Outcome::Done(changes)),
        (None, Some(complete)) => &mut complete.sums,
    };
    let mut entries = txn.open_table(ENTRIES)?;
    let shadowed = entry(&entries, record.id, &as_directory)?.is_some();
    let old = match entry(&entries, record.id, name)? {
        Some(EntryRecord::File { version, .. }) => Some(version),
        _ => None,
    };
    let row_key = entry_key(record.id, name);
    let new = match now {
        Now::File(version) => Some(version),
        Now::Nothing => None,
        Now::Directory => {
            if !shadowed {
                let row = entry_key(record.id, &as_directory);
                entries.insert(row.as_slice(), EntryRecord::Directory.encode(&row).as_slice())?;
                sums.directories += 1;
                changes.name(name);
            }
            None
        }
    };
    if old == new {
        directories.insert(key, record.encode(key).as_slice())?;
        return Ok(Outcome::Done(changes));
    }
    count(sums, name, old.as_ref(), new.as_ref(), shadowed);
    match &new {
        Some(version) => {
            let row = EntryRecord::File { version: version.clone(), shadowed };
            entries.insert(row_key.as_slice(), row.encode(&row_key).as_slice())?;
        }
        None => {
            entries.remove(row_key.as_slice())?;
        }
    }
    if !shadowed {
        changes.name(name);
        if let Some(old) = old
            && new.as_ref().is_none_or(|new| new.key != old.key || new.size != old.size)
        {
            changes.supersede(name, old);
        }
    }
    directories.insert(key, record.encode(key).as_slice())?;
    Ok(Outcome::Done(changes))
}

/// Whether no listing moved between two looks at a directory.
fn same_place(a: &DirectoryRecord, b: &DirectoryRecord) -> bool {
    let place = |record: &DirectoryRecord| {
        let running = record.running.as_ref().map(|running| (running.generation, running.passed.clone()));
        (record.id, record.complete.map(|complete| complete.generation), running)
    };
    place(a) == place(b)
}

fn count(sums: &mut Sums, name: &[u8], old: Option<&FileVersion>, new: Option<&FileVersion>, shadowed: bool) {
    if shadowed {
        let (gone, come) = (u64::from(old.is_some()), u64::from(new.is_some()));
        sums.hidden = (sums.hidden + come).saturating_sub(gone);
        return;
    }
    if let Some(old) = old {
        sums.remove_file(name, old);
    }
    if let Some(new) = new {
        sums.add_file(name, new);
    }
}
