//! Answers from the database: pure functions of a snapshot.

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable};

use crate::{
    dataset::{Entry, EntryKind, ListPage},
    error::IndexError,
    index::{DIRECTORIES, ENTRIES},
    record::{DirectoryRecord, EntryRecord, directory_sort_key, entry_key, path_of_key, split_sort_key},
    scan::DirectoryScan,
};

/// Subdirectories in one page of a scan.
pub(crate) const SCAN_PAGE: usize = 1_000;

/// What a snapshot says.
pub(crate) enum Answer<T> {
    /// This.
    Ready(T),
    /// Nothing yet: the listing must go on first.
    Wait,
}

/// How far a directory is listed under a generation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Listed {
    /// To its end.
    Completely,
    /// Up to this sort key; empty: not at all.
    Until(Bytes),
}

impl Listed {
    /// Whether everything up to `sort_key` is known.
    pub(crate) fn covers(&self, sort_key: &[u8]) -> bool {
        match self {
            Self::Completely => true,
            Self::Until(passed) => passed.as_ref() >= sort_key,
        }
    }
}

impl DirectoryRecord {
    pub(crate) fn listed(&self, generation: u64) -> Listed {
        match (&self.running, &self.complete) {
            // Perhaps listed again ahead of need: some rows are newer then, and none is missing.
            (_, Some(complete)) if complete.generation >= generation => Listed::Completely,
            (Some(running), _) if running.generation >= generation => Listed::Until(running.passed.clone()),
            _ => Listed::Until(Bytes::new()),
        }
    }
}

/// The record of a directory. One that is damaged is taken for none: the directory is listed again, under a new id.
pub(crate) fn directory(
    directories: &impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &[u8],
) -> Result<Option<DirectoryRecord>, IndexError> {
    let Some(value) = directories.get(key)? else { return Ok(None) };
    match DirectoryRecord::decode(key, value.value()) {
        Ok(record) => Ok(Some(record)),
        Err(error) => {
            tracing::warn!(%error, "record of a directory; listing it again");
            Ok(None)
        }
    }
}

/// The row at `sort_key`.
pub(crate) fn entry(
    entries: &impl ReadableTable<&'static [u8], &'static [u8]>,
    id: u64,
    sort_key: &[u8],
) -> Result<Option<EntryRecord>, IndexError> {
    let key = entry_key(id, sort_key);
    let Some(value) = entries.get(key.as_slice())? else { return Ok(None) };
    EntryRecord::decode(&key, value.value()).map(Some).map_err(|_| IndexError::Record(id))
}

/// One name; `None`: it does not exist.
pub(crate) fn lookup(
    txn: &ReadTransaction,
    key: &[u8],
    generation: u64,
    name: &[u8],
) -> Result<Answer<Option<EntryKind>>, IndexError> {
    let Some(record) = directory(&txn.open_table(DIRECTORIES)?, key)? else { return Ok(Answer::Wait) };
    let as_directory = directory_sort_key(name);
    if !record.listed(generation).covers(&as_directory) {
        return Ok(Answer::Wait);
    }
    let entries = txn.open_table(ENTRIES)?;
    if entry(&entries, record.id, &as_directory)?.is_some() {
        return Ok(Answer::Ready(Some(EntryKind::Directory)));
    }
    Ok(Answer::Ready(match entry(&entries, record.id, name)? {
        Some(EntryRecord::File { version, shadowed: false }) => Some(EntryKind::File { version }),
        _ => None,
    }))
}

/// At most `limit` entries after the sort key `after`. An empty page is the end; before that, the caller waits.
pub(crate) fn page(
    txn: &ReadTransaction,
    key: &[u8],
    generation: u64,
    after: &[u8],
    limit: usize,
) -> Result<Answer<ListPage>, IndexError> {
    let Some(record) = directory(&txn.open_table(DIRECTORIES)?, key)? else { return Ok(Answer::Wait) };
    let listed = record.listed(generation);
    let mut page = ListPage { entries: Vec::new(), end: false };
    let table = txn.open_table(ENTRIES)?;
    for row in rows_after(&table, record.id, after)? {
        let (sort_key, row) = row?;
        let (name, is_directory) = split_sort_key(&sort_key);
        // A file is known only when the listing has passed what a directory of its name would be.
        let known = if is_directory { listed.covers(&sort_key) } else { listed.covers(&directory_sort_key(name)) };
        if !known {
            return Ok(if page.entries.is_empty() { Answer::Wait } else { Answer::Ready(page) });
        }
        let kind = match row {
            EntryRecord::Directory => EntryKind::Directory,
            EntryRecord::File { shadowed: true, .. } => continue,
            EntryRecord::File { version, shadowed: false } => EntryKind::File { version },
        };
        if page.entries.len() == limit {
            return Ok(Answer::Ready(page));
        }
        page.entries.push(Entry { name: Bytes::copy_from_slice(name), kind });
    }
    page.end = listed == Listed::Completely;
    Ok(if page.entries.is_empty() && !page.end { Answer::Wait } else { Answer::Ready(page) })
}

/// Sums and a page of subdirectories, of a complete listing only.
pub(crate) fn scan(
    txn: &ReadTransaction,
    key: &[u8],
    generation: u64,
    after: &[u8],
) -> Result<Answer<DirectoryScan>, IndexError> {
    let Some(record) = directory(&txn.open_table(DIRECTORIES)?, key)? else { return Ok(Answer::Wait) };
    if record.listed(generation) != Listed::Completely {
        return Ok(Answer::Wait);
    }
    let Some(complete) = record.complete else { return Ok(Answer::Wait) };
    let first = after.is_empty();
    let mut scan = DirectoryScan { end: true, ..DirectoryScan::default() };
    if first {
        scan.files = complete.sums.files;
        scan.bytes = complete.sums.bytes;
        scan.hidden = complete.sums.hidden;
        scan.changed = complete.changed;
        scan.digest = complete.sums.digest_at(path_of_key(key).unwrap_or_default().as_ref());
    }
    if complete.sums.directories == 0 {
        return Ok(Answer::Ready(scan));
    }
    let table = txn.open_table(ENTRIES)?;
    for row in rows_after(&table, record.id, after)? {
        // All were found: the files that follow need not be looked at.
        if first && scan.subdirectories.len() as u64 == complete.sums.directories {
            break;
        }
        let (sort_key, row) = row?;
        if row != EntryRecord::Directory {
            continue;
        }
        if scan.subdirectories.len() == SCAN_PAGE {
            scan.end = false;
            break;
        }
        scan.subdirectories.push(Bytes::copy_from_slice(split_sort_key(&sort_key).0));
    }
    Ok(Answer::Ready(scan))
}

/// Rows after a sort key, in order.
pub(crate) fn rows_after<'a>(
    entries: &'a impl ReadableTable<&'static [u8], &'static [u8]>,
    id: u64,
    after: &[u8],
) -> Result<impl Iterator<Item = Result<(Vec<u8>, EntryRecord), IndexError>> + 'a, IndexError> {
    use std::ops::Bound;
    let from = entry_key(id, after);
    // Ids are far from u64::MAX: they are counted up from 1.
    let to = entry_key(id + 1, b"");
    let range = entries.range::<&[u8]>((Bound::Excluded(from.as_slice()), Bound::Excluded(to.as_slice())))?;
    Ok(range.map(move |row| {
        let (key, value) = row?;
        let record = EntryRecord::decode(key.value(), value.value()).map_err(|_| IndexError::Record(id))?;
        Ok((key.value().get(8..).unwrap_or_default().to_vec(), record))
    }))
}
