//! Everything below a directory, as a stream.
//!
//! Bounds: [`WALKERS`] listings at once, [`QUEUE`] directories that wait; a walker that finds more goes down itself, and
//! then holds a page of directories for each level. So memory does not grow with the tree, but with its depth.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use forebay_protocol::DatasetPath;
use futures::{Stream, future::join_all};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    dataset::{DatasetClient, Entry, EntryKind},
    error::ClientError,
};

const WALKERS: usize = 16;
const QUEUE: usize = 4096;
const PAGE: u32 = 1000;
/// Entries that wait to be taken.
const OUTPUT: usize = 1024;

/// An entry that a walk found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalkEntry {
    /// Its path.
    pub path: DatasetPath,
    /// What it is.
    pub entry: Entry,
}

/// A walk under way; dropping it ends it.
pub struct Walk {
    found: mpsc::Receiver<Result<WalkEntry, ClientError>>,
    _task: AbortOnDropHandle<()>,
}

impl Stream for Walk {
    type Item = Result<WalkEntry, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.found.poll_recv(context)
    }
}

pub(crate) fn start(dataset: DatasetClient, directory: DatasetPath) -> Walk {
    let (output, found) = mpsc::channel(OUTPUT);
    let task = tokio::spawn(async move {
        let walk = Arc::new(Shared {
            dataset,
            output,
            root: directory.clone(),
            work: Mutex::new(Work { waiting: vec![directory], busy: 0 }),
            changed: Notify::new(),
        });
        join_all((0..WALKERS).map(|_| walker(walk.clone()))).await;
    });
    Walk { found, _task: AbortOnDropHandle::new(task) }
}

struct Shared {
    dataset: DatasetClient,
    output: mpsc::Sender<Result<WalkEntry, ClientError>>,
    root: DatasetPath,
    work: Mutex<Work>,
    changed: Notify,
}

struct Work {
    waiting: Vec<DatasetPath>,
    busy: usize,
}

/// Nobody takes entries any more.
struct Abandoned;

async fn walker(walk: Arc<Shared>) {
    loop {
        let changed = walk.changed.notified();
        let next = {
            let mut work = walk.work.lock();
            let next = work.waiting.pop();
            match &next {
                Some(_) => work.busy += 1,
                None if work.busy == 0 => return,
                None => {}
            }
            next
        };
        match next {
            None => changed.await,
            Some(directory) => {
                let outcome = descend(&walk, directory).await;
                let mut work = walk.work.lock();
                work.busy -= 1;
                if outcome.is_err() {
                    work.waiting.clear();
                }
                drop(work);
                walk.changed.notify_waiters();
            }
        }
    }
}

async fn descend(walk: &Shared, directory: DatasetPath) -> Result<(), Abandoned> {
    let mut stack = vec![(directory, Bytes::new())];
    while let Some((directory, after)) = stack.pop() {
        let page = match walk.dataset.list(&directory, &after, PAGE).await {
            Ok(page) => page,
            // Removed since its parent was listed.
            Err(ClientError::NotFound) if directory != walk.root => continue,
            Err(error) => {
                walk.output.send(Err(error)).await.map_err(|_| Abandoned)?;
                continue;
            }
        };
        match page.entries.last() {
            Some(last) if !page.end => stack.push((directory.clone(), last.sort_key())),
            None if !page.end => {
                let error = ClientError::Unavailable(format!("an empty page of {directory} that is not the last"));
                walk.output.send(Err(error)).await.map_err(|_| Abandoned)?;
            }
            _ => {}
        }
        for entry in page.entries {
            let path = match directory.join(&entry.name) {
                Ok(path) => path,
                Err(error) => {
                    let error = ClientError::Invalid(error.to_string());
                    walk.output.send(Err(error)).await.map_err(|_| Abandoned)?;
                    continue;
                }
            };
            if entry.kind == EntryKind::Directory {
                let mut work = walk.work.lock();
                if work.waiting.len() < QUEUE {
                    work.waiting.push(path.clone());
                    walk.changed.notify_one();
                } else {
                    drop(work);
                    stack.push((path.clone(), Bytes::new()));
                }
            }
            walk.output.send(Ok(WalkEntry { path, entry })).await.map_err(|_| Abandoned)?;
        }
    }
    Ok(())
}
