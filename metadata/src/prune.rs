//! Forgets directories that a scan has not met.

use std::sync::Arc;

use bytes::Bytes;
use forebay_protocol::{DatasetPath, FileVersion};
use redb::ReadTransaction;

use crate::{
    changes::Changes,
    dataset::Inner,
    error::{IndexError, MetadataError},
    index::{DIRECTORIES, ENTRIES, GARBAGE},
    query::{self, rows_after},
    record::{DirectoryRecord, EntryRecord, directory_key},
};

/// Records looked at, or rows read, in one transaction.
const BATCH: usize = 1024;

/// A directory that is listed under an older generation only.
struct Outdated {
    path: DatasetPath,
    id: u64,
}

impl Inner {
    pub(crate) async fn prune(self: &Arc<Self>, generation: u64, path: &DatasetPath) -> Result<u64, MetadataError> {
        let mut pruned = 0;
        // Where the records of the path and of what is below it begin. Between them others may sort ("/a", "/a b",
        // "/a/b"), so these are two ranges.
        let own = directory_key(self.id, path);
        let mut below = own.clone();
        if !path.is_root() {
            below.push(b'/');
        }
        pruned += self.prune_range(generation, own.clone().into(), own.into(), true).await?;
        pruned += self.prune_range(generation, below.clone().into(), below.into(), false).await?;
        Ok(pruned)
    }

    /// Records from `from` on that begin with `prefix` (or are just that, when `exact`).
    async fn prune_range(
        self: &Arc<Self>,
        generation: u64,
        mut from: Bytes,
        prefix: Bytes,
        exact: bool,
    ) -> Result<u64, MetadataError> {
        let mut pruned = 0;
        loop {
            if self.closed.is_cancelled() {
                return Err(MetadataError::Closed);
            }
            let (start, within) = (from.clone(), prefix.clone());
            let (outdated, next) = self.index.read(move |txn| find(txn, generation, &start, &within, exact)).await?;
            for directory in outdated {
                // A listing under way brings it up to date.
                if self.running_listing(&directory.path).is_none() && self.prune_one(generation, directory).await? {
                    pruned += 1;
                }
            }
            match next {
                Some(next) => from = next,
                None => return Ok(pruned),
            }
        }
    }

    async fn prune_one(self: &Arc<Self>, generation: u64, directory: Outdated) -> Result<bool, MetadataError> {
        let Outdated { path, id } = directory;
        let key = self.directory_key(&path);
        // Its rows are read after they became unreachable, and before the sweep may have them.
        let _hold = self.index.hold(id);
        let removed = self
            .index
            .write(false, move |txn| {
                let mut directories = txn.open_table(DIRECTORIES)?;
                match query::directory(&directories, &key)? {
                    Some(record) if record.id == id && is_outdated(&record, generation) => {}
                    _ => return Ok(false),
                }
                directories.remove(&*key)?;
                txn.open_table(GARBAGE)?.insert(id.to_be_bytes().as_slice(), [].as_slice())?;
                Ok(true)
            })
            .await?;
        if !removed {
            return Ok(false);
        }
        self.log.push(path.clone(), Vec::new());
        let mut after = Bytes::new();
        loop {
            let from = after.clone();
            let (files, next) = self.index.read(move |txn| files_after(txn, id, &from)).await?;
            let mut changes = Changes::default();
            for (name, version) in files {
                changes.supersede(&name, version);
            }
            self.supersede(&path, &mut changes).await;
            match next {
                Some(next) => after = next,
                None => return Ok(true),
            }
        }
    }
}

fn is_outdated(record: &DirectoryRecord, generation: u64) -> bool {
    record.complete.is_none_or(|complete| complete.generation < generation)
        && record.running.as_ref().is_none_or(|running| running.generation < generation)
}

type Found = (Vec<Outdated>, Option<Bytes>);

fn find(txn: &ReadTransaction, generation: u64, from: &[u8], prefix: &[u8], exact: bool) -> Result<Found, IndexError> {
    let mut found = Vec::new();
    for (looked_at, row) in txn.open_table(DIRECTORIES)?.range(from..)?.enumerate() {
        let (key, value) = row?;
        let key = key.value();
        if !key.starts_with(prefix) || (exact && key.len() != prefix.len()) {
            break;
        }
        if looked_at == BATCH {
            return Ok((found, Some(Bytes::copy_from_slice(key))));
        }
        // A damaged record goes when its directory is asked for.
        let Ok(record) = DirectoryRecord::decode(key, value.value()) else { continue };
        if is_outdated(&record, generation)
            && let Ok(path) = DatasetPath::parse(Bytes::copy_from_slice(key.get(16..).unwrap_or_default()))
        {
            found.push(Outdated { path, id: record.id });
        }
    }
    Ok((found, None))
}

type Files = (Vec<(Bytes, FileVersion)>, Option<Bytes>);

fn files_after(txn: &ReadTransaction, id: u64, after: &[u8]) -> Result<Files, IndexError> {
    let mut files = Vec::new();
    let table = txn.open_table(ENTRIES)?;
    for (read, row) in rows_after(&table, id, after)?.enumerate() {
        // A damaged row names no version.
        let Ok((sort_key, row)) = row else { continue };
        if let EntryRecord::File { version, shadowed: false } = row {
            files.push((Bytes::from(sort_key.clone()), version));
        }
        if read + 1 == BATCH {
            return Ok((files, Some(sort_key.into())));
        }
    }
    Ok((files, None))
}
