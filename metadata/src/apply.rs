//! Puts a page of a listing into the database.
//!
//! The directory's old rows between the page's ends are compared with the page and replaced. Invariants, after every
//! transaction:
//! - rows up to `running.passed` are of the running listing, rows after it are older (none when it is `fresh`);
//! - a file's row is shadowed if and only if a row of a directory of its name exists, except for rows after `passed`;
//! - `running.sums` counts the rows up to `passed`, and the hidden keys of their pages.
//!
//! What must go is deleted first, in transactions of bounded size that leave `passed` where it is; the page itself is one
//! transaction. A page that is applied twice because a crash came between gives the same.

use std::sync::Arc;

use bytes::Bytes;
use forebay_protocol::{DatasetId, FileVersion};
use redb::WriteTransaction;

use crate::{
    Namespace,
    changes::Changes,
    error::IndexError,
    index::{DIRECTORIES, ENTRIES, GARBAGE, SWEEP, next_id},
    query::{self, entry, rows_after},
    record::{Complete, DirectoryRecord, EntryRecord, Running, Sums, directory_sort_key, entry_key, split_sort_key},
    sources,
};

/// A page on its way into the database.
#[derive(Debug, Clone)]
pub(crate) struct PageInput {
    pub(crate) dataset: DatasetId,
    /// What it was asked of.
    pub(crate) namespace: Arc<Namespace>,
    /// Of the directory's record.
    pub(crate) key: Arc<[u8]>,
    pub(crate) generation: u64,
    /// Where the page begins; empty: at the start.
    pub(crate) after: Bytes,
    /// Where the next one begins; `None`: there is none.
    pub(crate) next: Option<Bytes>,
    /// Sort keys, ascending, each once; files have a version.
    pub(crate) items: Arc<[(Bytes, Option<FileVersion>)]>,
    /// Keys of this page that are not shown.
    pub(crate) hidden: u64,
    /// The directory exists even when nothing is in it.
    pub(crate) exists: bool,
}

/// What a step did.
#[derive(Debug)]
pub(crate) enum Step {
    /// Old rows were deleted; more must go.
    Again(Changes),
    /// The page is in.
    Passed(Changes),
    /// It was the last page.
    Complete(Changes),
    /// It was the last page, and the directory does not exist: its record is gone.
    Missing(Changes),
    /// The record is not as it was when the page was asked for: start over from what it says now.
    Stale,
}

/// Where a listing under `generation` starts or goes on. `None`: the directory is listed.
pub(crate) fn plan(record: Option<&DirectoryRecord>, generation: u64) -> Option<Running> {
    let fresh = match record {
        None => true,
        Some(DirectoryRecord { running: Some(running), .. }) if running.generation >= generation => {
            return Some(running.clone());
        }
        Some(DirectoryRecord { running: None, complete: Some(complete), .. }) if complete.generation >= generation => {
            return None;
        }
        // A record stands only for a directory that was listed, so it may have rows.
        Some(_) => false,
    };
    Some(Running { generation, passed: Bytes::new(), sums: Sums::default(), changed: 0, fresh })
}

/// One step.
pub(crate) fn apply(txn: &WriteTransaction, input: &PageInput) -> Result<Step, IndexError> {
    remember_generation(txn, input)?;
    let mut directories = txn.open_table(DIRECTORIES)?;
    let mut entries = txn.open_table(ENTRIES)?;
    let record = query::directory(&directories, &input.key)?;
    let Some(mut running) = plan(record.as_ref(), input.generation) else { return Ok(Step::Stale) };
    if running.generation != input.generation || running.passed != input.after {
        return Ok(Step::Stale);
    }
    let mut record = match record {
        Some(record) => record,
        None => DirectoryRecord { id: next_id(txn)?, complete: None, running: None },
    };
    let mut work = Work { entries: &mut entries, id: record.id, after: &input.after, running: &mut running };
    let mut changes = Changes::default();

    if !work.running.fresh && work.remove_stale(input, &mut changes)? {
        record.running = Some(running);
        directories.insert(&*input.key, record.encode(&input.key).as_slice())?;
        return Ok(Step::Again(changes));
    }
    for (sort_key, version) in input.items.iter() {
        match version {
            Some(version) => work.put_file(sort_key, version, &mut changes)?,
            None => work.put_directory(sort_key, &mut changes)?,
        }
    }
    running.sums.hidden += input.hidden;
    let step = match &input.next {
        Some(next) => {
            running.passed = next.clone();
            record.running = Some(running);
            Step::Passed(changes)
        }
        None if !input.exists && running.sums == Sums::default() => {
            directories.remove(&*input.key)?;
            return Ok(Step::Missing(changes));
        }
        None => {
            let Running { generation, sums, changed, .. } = running;
            record.complete = Some(Complete { generation, sums, changed });
            record.running = None;
            Step::Complete(changes)
        }
    };
    directories.insert(&*input.key, record.encode(&input.key).as_slice())?;
    Ok(step)
}

/// Forgets a directory, so that it is listed again: its record goes, its rows are unreachable and swept.
pub(crate) fn forget(txn: &WriteTransaction, key: &[u8]) -> Result<(), IndexError> {
    let mut directories = txn.open_table(DIRECTORIES)?;
    if let Some(record) = query::directory(&directories, key)? {
        txn.open_table(GARBAGE)?.insert(record.id.to_be_bytes().as_slice(), [].as_slice())?;
    }
    directories.remove(key)?;
    Ok(())
}

/// Whatever is listed under a generation, that generation is known after a restart.
fn remember_generation(txn: &WriteTransaction, input: &PageInput) -> Result<(), IndexError> {
    let known = sources::generation(txn, input.dataset)?;
    if known.is_none() {
        // The database was damaged and begun anew: everything in it will be of these sources.
        sources::settle(txn, input.dataset, &input.namespace.mounts())?;
    }
    if known.is_none_or(|known| known < input.generation) {
        sources::remember_generation(txn, input.dataset, input.generation)?;
    }
    Ok(())
}

/// A mount point came: its name is a directory now, whatever the source around it says.
pub(crate) fn put_mount(txn: &WriteTransaction, key: &[u8], name: &[u8]) -> Result<Changes, IndexError> {
    change_mount(txn, key, name, |work, sort_key, changes| {
        if entry(work.entries, work.id, sort_key)?.is_none() {
            work.put_directory(sort_key, changes)?;
        }
        Ok(())
    })
}

/// A mount point went, from a directory that no source answers for.
pub(crate) fn remove_mount(txn: &WriteTransaction, key: &[u8], name: &[u8]) -> Result<Changes, IndexError> {
    change_mount(txn, key, name, |work, sort_key, changes| {
        if work.entries.remove(entry_key(work.id, sort_key).as_slice())?.is_some() {
            work.running.sums.directories = work.running.sums.directories.saturating_sub(1);
            work.change(name, changes);
        }
        Ok(())
    })
}

/// Changes the row of a mount point as a listing would, if the directory's listing has passed it; otherwise the listing
/// comes to it.
fn change_mount(
    txn: &WriteTransaction,
    key: &[u8],
    name: &[u8],
    change: impl FnOnce(&mut Work<'_, '_>, &[u8], &mut Changes) -> Result<(), IndexError>,
) -> Result<Changes, IndexError> {
    let mut changes = Changes::default();
    let mut directories = txn.open_table(DIRECTORIES)?;
    let Some(mut record) = query::directory(&directories, key)? else { return Ok(changes) };
    let sort_key = directory_sort_key(name);
    let complete = record.complete.filter(|_| record.running.is_none());
    let mut running = match (&record.running, complete) {
        (Some(running), _) if running.passed.as_ref() >= sort_key.as_slice() => running.clone(),
        (None, Some(Complete { generation, sums, changed })) => {
            Running { generation, passed: Bytes::new(), sums, changed, fresh: false }
        }
        _ => return Ok(changes),
    };
    let after = running.passed.clone();
    let mut entries = txn.open_table(ENTRIES)?;
    let mut work = Work { entries: &mut entries, id: record.id, after: &after, running: &mut running };
    change(&mut work, &sort_key, &mut changes)?;
    if complete.is_some() {
        let Running { generation, sums, changed, passed: _, fresh: _ } = running;
        record.complete = Some(Complete { generation, sums, changed });
    } else {
        record.running = Some(running);
    }
    directories.insert(key, record.encode(key).as_slice())?;
    Ok(changes)
}

type Entries<'txn> = redb::Table<'txn, &'static [u8], &'static [u8]>;

struct Work<'a, 'txn> {
    entries: &'a mut Entries<'txn>,
    id: u64,
    /// Where the page begins: rows up to here are counted in the sums.
    after: &'a Bytes,
    running: &'a mut Running,
}

impl Work<'_, '_> {
    /// Deletes rows between the page's ends that are not in it; whether more are left than one transaction takes.
    fn remove_stale(&mut self, input: &PageInput, changes: &mut Changes) -> Result<bool, IndexError> {
        let mut stale = Vec::new();
        let mut more = false;
        let mut items = input.items.iter().peekable();
        for row in rows_after(&*self.entries, self.id, &input.after)? {
            let (sort_key, row) = row?;
            if input.next.as_ref().is_some_and(|next| sort_key.as_slice() > next.as_ref()) {
                break;
            }
            while items.next_if(|(key, _)| key.as_ref() < sort_key.as_slice()).is_some() {}
            if items.peek().is_some_and(|(key, _)| key.as_ref() == sort_key.as_slice()) {
                continue;
            }
            if stale.len() == SWEEP {
                more = true;
                break;
            }
            stale.push((sort_key, row));
        }
        for (sort_key, row) in stale {
            self.entries.remove(entry_key(self.id, &sort_key).as_slice())?;
            let (name, _) = split_sort_key(&sort_key);
            match row {
                EntryRecord::File { shadowed: true, .. } => {}
                EntryRecord::File { version, shadowed: false } => {
                    self.change(name, changes);
                    changes.supersede(name, version);
                }
                EntryRecord::Directory => {
                    self.change(name, changes);
                    self.uncover(name, changes)?;
                }
            }
        }
        Ok(more)
    }

    /// A directory is gone: the file of its name shows, if the listing has passed it (else its own page decides).
    fn uncover(&mut self, name: &[u8], changes: &mut Changes) -> Result<(), IndexError> {
        if name > self.after.as_ref() {
            return Ok(());
        }
        if let Some(EntryRecord::File { version, shadowed: true }) = entry(self.entries, self.id, name)? {
            self.running.sums.add_file(name, &version);
            self.running.sums.hidden = self.running.sums.hidden.saturating_sub(1);
            self.change(name, changes);
            self.put(name, &EntryRecord::File { version, shadowed: false })?;
        }
        Ok(())
    }

    fn put_file(&mut self, name: &[u8], version: &FileVersion, changes: &mut Changes) -> Result<(), IndexError> {
        let (old, shadowed) = if self.running.fresh {
            // No older row is there; a directory of this name comes later, if at all.
            (None, false)
        } else {
            let old = entry(self.entries, self.id, name)?;
            let maybe = !matches!(old, Some(EntryRecord::File { shadowed: false, .. }));
            (old, maybe && entry(self.entries, self.id, &directory_sort_key(name))?.is_some())
        };
        let sums = &mut self.running.sums;
        if shadowed {
            sums.hidden += 1;
        } else {
            sums.add_file(name, version);
        }
        let new = EntryRecord::File { version: version.clone(), shadowed };
        if old.as_ref() == Some(&new) {
            return Ok(());
        }
        self.put(name, &new)?;
        let before = match &old {
            Some(EntryRecord::File { version, shadowed: false }) => Some(version),
            _ => None,
        };
        if let Some(before) = before
            && (before.key != version.key || before.size != version.size)
        {
            changes.supersede(name, before.clone());
        }
        if before.is_some() || !shadowed {
            self.change(name, changes);
        }
        Ok(())
    }

    fn put_directory(&mut self, sort_key: &[u8], changes: &mut Changes) -> Result<(), IndexError> {
        let (name, _) = split_sort_key(sort_key);
        self.running.sums.directories += 1;
        if !self.running.fresh && entry(self.entries, self.id, sort_key)?.is_some() {
            // The file of its name, if any, is shadowed already.
            return Ok(());
        }
        self.put(sort_key, &EntryRecord::Directory)?;
        self.change(name, changes);
        if let Some(EntryRecord::File { version, shadowed: false }) = entry(self.entries, self.id, name)? {
            // Its sort key is smaller, so it is of this listing and counted.
            let sums = &mut self.running.sums;
            sums.remove_file(name, &version);
            sums.hidden += 1;
            self.put(name, &EntryRecord::File { version: version.clone(), shadowed: true })?;
            if !self.running.fresh {
                self.running.changed += 1;
                changes.supersede(name, version);
            }
        }
        Ok(())
    }

    fn put(&mut self, sort_key: &[u8], row: &EntryRecord) -> Result<(), IndexError> {
        let key = entry_key(self.id, sort_key);
        self.entries.insert(key.as_slice(), row.encode(&key).as_slice())?;
        Ok(())
    }

    /// Counts and names a change; the first listing of a directory changes nothing that anybody knew.
    fn change(&mut self, name: &[u8], changes: &mut Changes) {
        if !self.running.fresh {
            self.running.changed += 1;
            changes.name(name);
        }
    }
}

/// Lets the next listing of a directory begin at its start, and compare all rows.
pub(crate) fn start_over(txn: &WriteTransaction, key: &[u8]) -> Result<(), IndexError> {
    let mut directories = txn.open_table(DIRECTORIES)?;
    if let Some(mut record) = query::directory(&directories, key)? {
        record.running = None;
        record.complete = None;
        directories.insert(key, record.encode(key).as_slice())?;
    }
    Ok(())
}
