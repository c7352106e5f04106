//! The listing of a directory: one task, page by page from the source into the database.
//!
//! It goes on where the last one stopped, also after a failure or a restart. When the generation rises, it starts over
//! before anything else is answered. Its invalidation is in the log before its outcome is known.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use forebay_protocol::{DatasetPath, FileVersion, identity::MAX_PATH, identity::is_valid_name};
use forebay_under_store::{ItemKind, Page, StoreError};
use parking_lot::Mutex;
use redb::WriteTransaction;
use tokio::{sync::watch, time::Instant};

use crate::{
    apply::{self, PageInput, Step},
    changes::Changes,
    dataset::Inner,
    error::MetadataError,
    index::DIRECTORIES,
    namespace::View,
    query,
    record::{MAX_RESUME, directory_sort_key},
};

/// Directories of one dataset that are listed, or wait for it, at once.
const MAX_LISTINGS: usize = 4_096;

/// Listings under way, by directory.
pub(crate) type Slots = Mutex<HashMap<DatasetPath, watch::Receiver<Progress>>>;

/// How far a listing is; every change of it may make an answer possible.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// Set once, at the end.
    pub(crate) outcome: Option<Outcome>,
}

/// How a listing ended.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// What it was listed under.
    pub(crate) generation: u64,
    /// Serial number of the namespace that said so.
    pub(crate) namespace: u64,
    pub(crate) result: Result<(), MetadataError>,
}

/// What is remembered of a directory that is not in the database.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    /// Serial number of the namespace that said so.
    pub(crate) namespace: u64,
    pub(crate) what: Found,
}

/// What was found of a directory.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// It did not exist under this generation.
    Missing { generation: u64 },
    /// Its listing failed; that is remembered for a while.
    Failed { error: MetadataError, until: Instant },
}

/// Under what a listing goes on.
#[derive(Debug, Clone, Copy, Default)]
struct Terms {
    generation: u64,
    /// Serial number.
    namespace: u64,
}

/// Ends the slot of a listing however its task ends.
struct Slot {
    inner: Arc<Inner>,
    directory: DatasetPath,
    progress: watch::Sender<Progress>,
    outcome: Option<Outcome>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or_else(|| Outcome {
            generation: 0,
            namespace: 0,
            result: Err(MetadataError::Internal("the listing ended without a result".to_owned())),
        });
        // First out of the table, so that whoever learns the outcome can begin another listing.
        self.inner.slots.lock().remove(&self.directory);
        self.progress.send_replace(Progress { outcome: Some(outcome) });
    }
}

impl Inner {
    /// The listing of a directory if it is under way.
    pub(crate) fn running_listing(&self, directory: &DatasetPath) -> Option<watch::Receiver<Progress>> {
        self.slots.lock().get(directory).cloned()
    }

    /// The listing of a directory, begun now if it is not under way. One that failed is not begun again for a while: its
    /// error is the answer, but only for who cannot be answered from what was listed before.
    pub(crate) fn ensure_listing(
        self: &Arc<Self>,
        directory: &DatasetPath,
    ) -> Result<watch::Receiver<Progress>, MetadataError> {
        let mut slots = self.slots.lock();
        if let Some(progress) = slots.get(directory) {
            let mut progress = progress.clone();
            progress.mark_unchanged();
            return Ok(progress);
        }
        // A listing leaves its verdict before it leaves its slot.
        if let Some(Verdict { namespace, what: Found::Failed { error, until } }) = self.verdicts.get(directory)
            && !self.is_replaced(namespace)
            && Instant::now() < until
        {
            return Err(error);
        }
        if slots.len() >= MAX_LISTINGS {
            return Err(MetadataError::Unavailable(format!("{MAX_LISTINGS} directories wait to be listed")));
        }
        let (sender, progress) = watch::channel(Progress::default());
        slots.insert(directory.clone(), progress.clone());
        drop(slots);
        let slot = Slot { inner: self.clone(), directory: directory.clone(), progress: sender, outcome: None };
        self.tasks.spawn(slot.run());
        Ok(progress)
    }
}

impl Slot {
    async fn run(mut self) {
        let inner = self.inner.clone();
        inner.counters.listings.fetch_add(1, Ordering::Relaxed);
        let closed = inner.closed.clone();
        let mut changes = Changes::default();
        let mut terms = Terms::default();
        let result =
            closed.run_until_cancelled(self.list(&mut terms, &mut changes)).await.unwrap_or(Err(MetadataError::Closed));
        if let Some(names) = changes.into_names() {
            inner.log.push(self.directory.clone(), names);
        }
        let Terms { generation, namespace } = terms;
        let what = match &result {
            Ok(()) | Err(MetadataError::Closed) => None,
            Err(MetadataError::NotFound) => Some(Found::Missing { generation }),
            Err(error) => {
                inner.counters.listing_failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(dataset = %inner.id, directory = %self.directory, %error, "listing");
                let until = Instant::now() + inner.options.failure_ttl;
                Some(Found::Failed { error: error.clone(), until })
            }
        };
        match what {
            Some(what) => inner.verdicts.insert(self.directory.clone(), Verdict { namespace, what }),
            None => drop(inner.verdicts.remove(&self.directory)),
        }
        self.outcome = Some(Outcome { generation, namespace, result });
    }

    async fn list(&self, terms: &mut Terms, changes: &mut Changes) -> Result<(), MetadataError> {
        let Self { inner, directory, .. } = self;
        let key = inner.directory_key(directory);
        let mut repairs = 0;
        loop {
            let namespace = inner.namespace();
            *terms = Terms { generation: inner.listing_generation(), namespace: namespace.serial() };
            let view = namespace.view(directory);
            if view.source.is_none() && !view.always {
                return Err(MetadataError::NotFound);
            }
            let (now, at) = (terms.generation, key.clone());
            let planned = inner
                .index
                .read(move |txn| {
                    let record = query::directory(&txn.open_table(DIRECTORIES)?, &at)?;
                    Ok(apply::plan(record.as_ref(), now))
                })
                .await;
            let running = match planned {
                Ok(None) => return Ok(()),
                Ok(Some(running)) => running,
                Err(error) => {
                    inner.repair(directory, error, &mut repairs).await?;
                    continue;
                }
            };
            let fetched = match self.fetch(&view, &running.passed).await {
                // Another source may be there now, or another way to it.
                Err(_) if inner.is_replaced(namespace.serial()) => continue,
                fetched => fetched?,
            };
            let (items, hidden, next) = arrange(directory, &view, &running.passed, fetched.page)?;
            let input = Arc::new(PageInput {
                dataset: inner.id,
                namespace,
                key: key.clone(),
                generation: running.generation,
                after: running.passed,
                next,
                items: items.into(),
                hidden,
                exists: fetched.exists,
            });
            if !self.apply(&input, changes, &mut repairs).await? {
                return Err(MetadataError::NotFound);
            }
        }
    }

    /// Puts a page into the database, in as many steps as it takes; whether the directory exists.
    async fn apply(
        &self,
        input: &Arc<PageInput>,
        changes: &mut Changes,
        repairs: &mut usize,
    ) -> Result<bool, MetadataError> {
        let Self { inner, directory, .. } = self;
        loop {
            let (work, now) = (input.clone(), inner.clone());
            // Sources are replaced in a transaction, too.
            let apply = move |txn: &WriteTransaction| match now.is_replaced(work.namespace.serial()) {
                true => Ok(Step::Stale),
                false => apply::apply(txn, &work),
            };
            let step = match inner.index.write(false, apply).await {
                Ok(step) => step,
                Err(error) => {
                    inner.repair(directory, error, repairs).await?;
                    return Ok(true);
                }
            };
            let (mut new, again, exists) = match step {
                Step::Stale => return Ok(true),
                Step::Again(new) => (new, true, true),
                Step::Passed(new) | Step::Complete(new) => (new, false, true),
                Step::Missing(new) => (new, false, false),
            };
            changes.absorb(&new);
            self.progress.send_modify(|_| {});
            inner.supersede(directory, &mut new).await;
            if !again {
                return Ok(exists);
            }
        }
    }

    /// The next page of the source, if the directory has one.
    async fn fetch(&self, view: &View, after: &[u8]) -> Result<Fetched, MetadataError> {
        let Self { inner, directory, .. } = self;
        let Some(source) = &view.source else { return Ok(Fetched { page: Page::default(), exists: true }) };
        let closed = || MetadataError::Closed;
        let _permit = source.permits.acquire().await.map_err(|_| closed())?;
        let resume = (!after.is_empty()).then_some(after);
        let request = source.store.list(&source.key, resume, inner.options.page);
        let answer = tokio::time::timeout(inner.options.page_deadline, request).await.unwrap_or_else(|_| {
            let seconds = inner.options.page_deadline.as_secs();
            Err(StoreError::Unavailable(format!("no page of the listing within {seconds} s")))
        });
        match answer {
            Ok(page) => Ok(Fetched { page, exists: view.always || source.store.has_directories() }),
            // The top of a source must be there: a bucket that is gone is no empty dataset.
            Err(StoreError::NotFound(message)) if source.key.is_empty() => {
                Err(MetadataError::Unavailable(format!("the source at {directory} does not exist: {message}")))
            }
            Err(StoreError::NotFound(_)) if after.is_empty() => {
                Ok(Fetched { page: Page::default(), exists: view.always })
            }
            Err(StoreError::NotFound(_)) => {
                // It went away in mid-listing: what was passed is no longer true.
                let key = inner.directory_key(directory);
                inner.index.write(false, move |txn| apply::start_over(txn, &key)).await?;
                Err(MetadataError::Unavailable("the directory went away while it was listed".to_owned()))
            }
            Err(error) => Err(MetadataError::from_store(&error)),
        }
    }
}

struct Fetched {
    page: Page,
    exists: bool,
}

type Arranged = (Vec<(Bytes, Option<FileVersion>)>, u64, Option<Bytes>);

/// A source's page with the mount points that fall into it: sort keys with versions, hidden keys, the resume point.
/// What a source must not say (out of order, no progress) is an error: the rest of the listing would be wrong.
fn arrange(directory: &DatasetPath, view: &View, after: &[u8], page: Page) -> Result<Arranged, MetadataError> {
    let wrong = |what: &str| Err(MetadataError::Unavailable(format!("the source's listing {what}")));
    let Page { items, next, mut hidden } = page;
    let mut mounts: BTreeSet<Vec<u8>> = view
        .mounts
        .iter()
        .map(|name| directory_sort_key(name))
        .filter(|key| key.as_slice() > after && next.as_ref().is_none_or(|next| key <= next))
        .collect();
    let room = MAX_PATH.saturating_sub(directory.as_bytes().len() + 1);
    let mut arranged = Vec::with_capacity(items.len() + mounts.len());
    let mut last = after.to_vec();
    for item in items {
        let sort_key = item.sort_key();
        if sort_key <= last {
            return wrong("is out of order");
        }
        while mounts.first().is_some_and(|mount| *mount < sort_key) {
            arranged.extend(mounts.pop_first().map(|mount| (mount.into(), None)));
        }
        mounts.remove(&sort_key);
        last.clone_from(&sort_key);
        if !is_valid_name(&item.name) || item.name.len() > room {
            hidden += 1;
            continue;
        }
        let version = match item.kind {
            ItemKind::Directory => None,
            ItemKind::File { size, mtime_ns, version } => Some(FileVersion { size, mtime_ns, key: version }),
        };
        arranged.push((sort_key.into(), version));
    }
    arranged.extend(mounts.into_iter().map(|mount| (mount.into(), None)));
    match &next {
        Some(next) if next.as_slice() <= after => return wrong("makes no progress"),
        Some(next) if *next < last => return wrong("resumes before its last entry"),
        Some(next) if next.len() > MAX_RESUME => return wrong("resumes at an over-long key"),
        _ => {}
    }
    Ok((arranged, hidden, next.map(Bytes::from)))
}

#[cfg(test)]
mod tests {
    use forebay_protocol::VersionKey;
    use forebay_under_store::Item;

    use super::*;

    fn file(name: &str) -> Item {
        let version = VersionKey::new("v").unwrap();
        Item { name: name.into(), kind: ItemKind::File { size: 1, mtime_ns: 0, version } }
    }

    fn dir(name: &str) -> Item {
        Item { name: name.into(), kind: ItemKind::Directory }
    }

    fn run(mounts: &[&'static str], after: &str, items: Vec<Item>, next: Option<&str>) -> Option<(Vec<String>, u64)> {
        let mounts = mounts.iter().map(|m| Bytes::from_static(m.as_bytes())).collect();
        let view = View { source: None, mounts, always: true };
        let page = Page { items, next: next.map(|n| n.into()), hidden: 1 };
        let (items, hidden, _) = arrange(&DatasetPath::root(), &view, after.as_bytes(), page).ok()?;
        Some((items.into_iter().map(|(key, _)| String::from_utf8(key.to_vec()).unwrap()).collect(), hidden))
    }

    #[test]
    fn mount_points_are_merged_in_order_and_once() {
        let names = |keys: &[&str]| Some((keys.iter().map(|k| (*k).to_owned()).collect(), 1));
        assert_eq!(
            run(&["b", "m", "z"], "", vec![file("a"), dir("b"), file("c")], None),
            names(&["a", "b/", "c", "m/", "z/"])
        );
        assert_eq!(run(&["b", "m", "z"], "b/", vec![file("c")], Some("n")), names(&["c", "m/"]));
        assert_eq!(run(&["m"], "", vec![file("m"), file("m0")], None), names(&["m", "m/", "m0"]));
        assert_eq!(run(&[], "", vec![], Some("zzz")), names(&[]));
    }

    #[test]
    fn names_that_cannot_be_shown_are_hidden() {
        let long = "x".repeat(256);
        let items = vec![file(".."), dir("."), file("a\0"), file(&long)];
        assert_eq!(run(&[], "", items, None), Some((vec![], 5)));
    }

    #[test]
    fn a_source_that_contradicts_itself_is_refused() {
        assert_eq!(run(&[], "", vec![file("b"), file("a")], None), None);
        assert_eq!(run(&[], "", vec![file("a"), file("a")], None), None);
        assert_eq!(run(&[], "a", vec![file("a")], None), None);
        assert_eq!(run(&[], "a", vec![], Some("a")), None);
        assert_eq!(run(&[], "a", vec![file("c")], Some("b")), None);
    }
}
