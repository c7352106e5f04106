//! Sources that come, go and change, while the dataset is served or while it is not.
//!
//! What is listed of a source is kept for as long as the same source answers for the same directories. The database
//! remembers of which sources its listings are; that is brought up to date last, so a change that is cut short is made
//! again by the next one, or by the next start.
//!
//! A change, in order: the new namespace is in force (from now on, pages of older ones are refused); directories for
//! which another source answers now are forgotten; mount points come and go in the directories around them; watchers
//! are told; the files of what was forgotten are superseded, in the background.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use forebay_protocol::{DatasetId, DatasetPath};
use redb::{ReadTransaction, ReadableTable, WriteTransaction};

use crate::{
    Namespace, apply,
    changes::Changes,
    dataset::Inner,
    error::{IndexError, MetadataError},
    index::{DATASETS, Index, SOURCES, next_id},
    namespace::Mounts,
    prune::{Pruned, Unwanted},
    record::{DatasetRecord, SourceRecord, directory_key, path_of_key},
};

/// Directories of which the files are superseded after a change: about 10 MiB of paths. What was cached of the others
/// stays until it is evicted.
const MAX_SUPERSEDED: usize = 65_536;

/// What the database remembers of a dataset.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// `None`: nothing.
    pub(crate) generation: Option<u64>,
    /// Of which sources its listings are.
    pub(crate) mounts: Mounts,
}

pub(crate) async fn known(index: &Arc<Index>, id: DatasetId) -> Result<Known, IndexError> {
    index
        .read(move |txn| {
            let key = id.as_bytes().as_slice();
            let record = txn.open_table(DATASETS)?.get(key)?.map(|value| DatasetRecord::decode(key, value.value()));
            // A damaged record is none.
            let generation = record.and_then(Result::ok).map(|record| record.generation);
            Ok(Known { generation, mounts: mounts(txn, id)? })
        })
        .await
}

fn mounts(txn: &ReadTransaction, id: DatasetId) -> Result<Mounts, IndexError> {
    let prefix = id.as_bytes().as_slice();
    let mut mounts = Vec::new();
    for row in txn.open_table(SOURCES)?.range(prefix..)? {
        let (key, value) = row?;
        if !key.value().starts_with(prefix) {
            break;
        }
        // A damaged record is of no source: what it listed is forgotten.
        if let (Some(path), Ok(record)) = (path_of_key(key.value()), SourceRecord::decode(key.value(), value.value())) {
            mounts.push((path, record.fingerprint));
        }
    }
    Ok(Mounts::new(mounts))
}

/// The generation of a dataset that the database knows.
pub(crate) fn generation(txn: &WriteTransaction, id: DatasetId) -> Result<Option<u64>, IndexError> {
    let key = id.as_bytes().as_slice();
    let record = txn.open_table(DATASETS)?.get(key)?.map(|value| DatasetRecord::decode(key, value.value()));
    Ok(record.and_then(Result::ok).map(|record| record.generation))
}

/// Remembers a generation; never lowers it.
pub(crate) fn remember_generation(txn: &WriteTransaction, id: DatasetId, new: u64) -> Result<(), IndexError> {
    let known = generation(txn, id)?;
    let key = id.as_bytes().as_slice();
    let record = DatasetRecord { generation: new.max(known.unwrap_or(0)) };
    txn.open_table(DATASETS)?.insert(key, record.encode(key).as_slice())?;
    Ok(())
}

/// Remembers that all listings are of these sources now.
pub(crate) fn settle(txn: &WriteTransaction, id: DatasetId, mounts: &Mounts) -> Result<(), IndexError> {
    clear(txn, id)?;
    let mut table = txn.open_table(SOURCES)?;
    for (path, fingerprint) in mounts.iter() {
        let key = [id.as_bytes().as_slice(), path].concat();
        table.insert(key.as_slice(), SourceRecord { fingerprint }.encode(&key).as_slice())?;
    }
    drop(table);
    remember_generation(txn, id, 0)
}

/// Forgets the sources of a dataset.
pub(crate) fn clear(txn: &WriteTransaction, id: DatasetId) -> Result<(), IndexError> {
    let prefix = id.as_bytes().as_slice();
    let mut table = txn.open_table(SOURCES)?;
    let mut keys = Vec::new();
    for row in table.range(prefix..)? {
        let key = row?.0.value().to_vec();
        if !key.starts_with(prefix) {
            break;
        }
        keys.push(key);
    }
    for key in keys {
        table.remove(key.as_slice())?;
    }
    Ok(())
}

impl Inner {
    /// Puts other sources in force.
    pub(crate) async fn replace(self: &Arc<Self>, namespace: Arc<Namespace>) -> Result<(), MetadataError> {
        let _one_at_a_time = self.replacing.lock().await;
        let before = known(&self.index, self.id).await?.mounts;
        let (inner, new) = (self.clone(), namespace.clone());
        // In a transaction, of which there is one at a time: every page of the old namespace is in or will be refused,
        // and directories that are listed from now on have higher ids.
        let first_new = self
            .index
            .write(false, move |txn| {
                let id = next_id(txn)?;
                *inner.namespace.write() = new;
                Ok(id)
            })
            .await?;
        // What was missing may be there now, and what failed may work.
        self.verdicts.clear();
        self.move_listings(before, &namespace, first_new).await
    }

    /// Makes the listings those of another namespace than the database knows.
    pub(crate) async fn move_listings(
        self: &Arc<Self>,
        before: Mounts,
        namespace: &Arc<Namespace>,
        first_new: u64,
    ) -> Result<(), MetadataError> {
        let after = namespace.mounts();
        let changed = after.differences(&before);
        if !changed.is_empty() {
            let unwanted = Arc::new(Unwanted::Moved { before: before.clone(), after: after.clone(), first_new });
            let mut pruned = Vec::new();
            for path in &changed {
                self.prune_below(path, &unwanted, |directory| {
                    if pruned.len() < MAX_SUPERSEDED {
                        pruned.push(directory);
                    }
                    std::future::ready(Ok(()))
                })
                .await?;
            }
            self.move_mounts(&before, &after, namespace, &changed).await?;
            self.supersede_later(pruned);
        }
        let id = self.id;
        // Not synced: a crash that loses it loses what was forgotten before, too.
        Ok(self.index.write(false, move |txn| settle(txn, id, &after)).await?)
    }

    /// Lets mount points come and go in the directories around them.
    async fn move_mounts(
        self: &Arc<Self>,
        before: &Mounts,
        after: &Mounts,
        namespace: &Namespace,
        changed: &[DatasetPath],
    ) -> Result<(), MetadataError> {
        let mut names: BTreeSet<(DatasetPath, Bytes)> = BTreeSet::new();
        for path in changed {
            let mut at = path.clone();
            while let Some((directory, name)) = at.split() {
                if before.leads_to(&at) != after.leads_to(&at) {
                    names.insert((directory.clone(), name));
                }
                at = directory;
            }
        }
        for (directory, name) in names {
            let key: Arc<[u8]> = directory_key(self.id, &directory).into();
            let view = namespace.view(&directory);
            let came = view.mounts.contains(&name);
            let what = name.clone();
            let mut changes = self
                .index
                .write(false, move |txn| match (came, view.source.is_some()) {
                    (true, _) => apply::put_mount(txn, &key, &what),
                    (false, false) if view.always => apply::remove_mount(txn, &key, &what),
                    (false, false) => apply::forget(txn, &key).map(|()| Changes::default()),
                    // The source around it may have the name, too: only a listing can tell.
                    (false, true) => apply::start_over(txn, &key).map(|()| Changes::default()),
                })
                .await?;
            // Whether or not it is listed here: look-ups of mount points are answered without that.
            self.log.push(directory.clone(), vec![name]);
            self.supersede(&directory, &mut changes).await;
        }
        self.index.sweep_soon();
        Ok(())
    }

    /// Supersedes the files of directories that were forgotten.
    fn supersede_later(self: &Arc<Self>, pruned: Vec<Pruned>) {
        let inner = self.clone();
        self.tasks.spawn(async move {
            let closed = inner.closed.clone();
            let work = async {
                for directory in pruned {
                    inner.supersede_files(directory).await?;
                }
                Ok::<_, MetadataError>(())
            };
            if let Some(Err(error)) = closed.run_until_cancelled(work).await {
                tracing::warn!(dataset = %inner.id, %error, "files of former sources were not superseded");
            }
        });
    }
}
