//! Forgets directories: those that a scan has not met, and those for which another source answers now.

use std::{future::Future, sync::Arc};

use bytes::Bytes;
use forebay_protocol::{DatasetPath, FileVersion};
use redb::ReadTransaction;

use crate::{
    changes::Changes,
    dataset::Inner,
    error::{IndexError, MetadataError},
    index::{DIRECTORIES, ENTRIES, GARBAGE, Hold},
    namespace::Mounts,
    query::{self, rows_after},
    record::{DirectoryRecord, EntryRecord, directory_key, path_of_key},
};

/// Records looked at, or rows read, in one transaction.
const BATCH: usize = 1024;

/// Which directories are to be forgotten.
pub(crate) enum Unwanted {
    /// Those that are listed under an older generation only.
    OlderThan(u64),
    /// Those for which another source answers now, unless they were first listed after the change.
    Moved {
        before: Mounts,
        after: Mounts,
        /// The least id that a directory has that was listed since.
        first_new: u64,
    },
}

impl Unwanted {
    fn is(&self, path: &DatasetPath, record: &DirectoryRecord) -> bool {
        match self {
            Self::OlderThan(generation) => {
                record.complete.is_none_or(|complete| complete.generation < *generation)
                    && record.running.as_ref().is_none_or(|running| running.generation < *generation)
            }
            Self::Moved { before, after, first_new } => {
                record.id < *first_new && before.source_of(path) != after.source_of(path)
            }
        }
    }
}

/// A directory that may be unwanted.
struct Found {
    path: DatasetPath,
    id: u64,
}

/// A directory that is forgotten; its files can be read for as long as this is there.
pub(crate) struct Pruned {
    path: DatasetPath,
    id: u64,
    _hold: Hold,
}

impl Inner {
    pub(crate) async fn prune(self: &Arc<Self>, generation: u64, path: &DatasetPath) -> Result<u64, MetadataError> {
        let unwanted = Arc::new(Unwanted::OlderThan(generation));
        self.prune_below(path, &unwanted, |directory| self.supersede_files(directory)).await
    }

    /// Forgets the unwanted directories at or below `path`, each of which `done` then gets. Gives their number.
    pub(crate) async fn prune_below<F: Future<Output = Result<(), MetadataError>>>(
        self: &Arc<Self>,
        path: &DatasetPath,
        unwanted: &Arc<Unwanted>,
        mut done: impl FnMut(Pruned) -> F,
    ) -> Result<u64, MetadataError> {
        // Where the records of the path and of what is below it begin. Between them others may sort ("/a", "/a b",
        // "/a/b"), so these are two ranges.
        let own = directory_key(self.id, path);
        let mut below = own.clone();
        if !path.is_root() {
            below.push(b'/');
        }
        let here = self.prune_range(unwanted, own.into(), true, &mut done).await?;
        Ok(here + self.prune_range(unwanted, below.into(), false, &mut done).await?)
    }

    /// Records that begin with `prefix` (or are just that, when `exact`).
    async fn prune_range<F: Future<Output = Result<(), MetadataError>>>(
        self: &Arc<Self>,
        unwanted: &Arc<Unwanted>,
        prefix: Bytes,
        exact: bool,
        done: &mut impl FnMut(Pruned) -> F,
    ) -> Result<u64, MetadataError> {
        let mut pruned = 0;
        let mut from = prefix.clone();
        loop {
            if self.closed.is_cancelled() {
                return Err(MetadataError::Closed);
            }
            let (start, within, which) = (from.clone(), prefix.clone(), unwanted.clone());
            let (found, next) = self.index.read(move |txn| find(txn, &which, &start, &within, exact)).await?;
            for directory in found {
                if let Some(directory) = self.prune_one(unwanted, directory).await? {
                    pruned += 1;
                    done(directory).await?;
                }
            }
            match next {
                Some(next) => from = next,
                None => return Ok(pruned),
            }
        }
    }

    async fn prune_one(
        self: &Arc<Self>,
        unwanted: &Arc<Unwanted>,
        directory: Found,
    ) -> Result<Option<Pruned>, MetadataError> {
        let Found { path, id } = directory;
        // A listing under way brings it up to date, unless it is of another source.
        if matches!(**unwanted, Unwanted::OlderThan(_)) && self.running_listing(&path).is_some() {
            return Ok(None);
        }
        let key = self.directory_key(&path);
        // Its rows are read after they became unreachable, and before the sweep may have them.
        let hold = self.index.hold(id);
        let (at, which) = (path.clone(), unwanted.clone());
        let removed = self
            .index
            .write(false, move |txn| {
                let mut directories = txn.open_table(DIRECTORIES)?;
                match query::directory(&directories, &key)? {
                    Some(record) if record.id == id && which.is(&at, &record) => {}
                    _ => return Ok(false),
                }
                directories.remove(&*key)?;
                txn.open_table(GARBAGE)?.insert(id.to_be_bytes().as_slice(), [].as_slice())?;
                Ok(true)
            })
            .await?;
        if !removed {
            return Ok(None);
        }
        self.log.push(path.clone(), Vec::new());
        Ok(Some(Pruned { path, id, _hold: hold }))
    }

    pub(crate) async fn supersede_files(&self, directory: Pruned) -> Result<(), MetadataError> {
        let Pruned { path, id, _hold } = directory;
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
                None => return Ok(()),
            }
        }
    }
}

type Page = (Vec<Found>, Option<Bytes>);

fn find(txn: &ReadTransaction, which: &Unwanted, from: &[u8], prefix: &[u8], exact: bool) -> Result<Page, IndexError> {
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
        if let Some(Ok(path)) = path_of_key(key).map(DatasetPath::parse)
            && which.is(&path, &record)
        {
            found.push(Found { path, id: record.id });
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
