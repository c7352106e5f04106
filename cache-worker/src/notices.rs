//! What workers tell each other: version conflicts to the owner of the directory, and outdated versions to all.

use std::{collections::HashMap, sync::Arc, time::Duration};

use forebay_protocol::{
    DatasetId, DatasetPath, FileVersion,
    worker::{self as wire, SupersedeRequest},
};
use futures::{StreamExt, stream};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tonic::Status;
use tracing::debug;

use crate::{dataset::Dataset, fill::Conflict, scan, worker::Worker};

/// Conflicts that wait; beyond them a conflict is only answered to its reader.
pub(crate) const CONFLICTS: usize = 1024;
/// Rechecks at once.
const RECHECKS: usize = 16;
/// Outdated versions in one message: with the longest paths and keys 1,000 * 4.4 KiB, under the 8 MiB limit of messages.
const SUPERSEDE_BATCH: usize = 1000;
/// How long a worker may take for one message.
const SUPERSEDE: Duration = Duration::from_secs(5);
/// Workers told at once.
const FAN_OUT: usize = 16;

/// Lets the metadata recheck files whose fetches met another version; one recheck per file at a time.
pub(crate) async fn rechecks(worker: Arc<Worker>, mut conflicts: mpsc::Receiver<Conflict>) {
    let mut waiting: HashMap<(DatasetId, DatasetPath), Vec<oneshot::Sender<()>>> = HashMap::new();
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            conflict = conflicts.recv(), if running.len() < RECHECKS => {
                let Some(Conflict { dataset, path, done }) = conflict else { return };
                let waiters = waiting.entry((dataset.id, path.clone())).or_default();
                waiters.push(done);
                if waiters.len() == 1 {
                    let worker = worker.clone();
                    running.spawn(async move {
                        scan::recheck(&worker, &dataset, &path).await;
                        (dataset.id, path)
                    });
                }
            }
            Some(finished) = running.join_next() => {
                // A recheck that panicked leaves its waiters to their own deadline.
                if let Ok(key) = finished {
                    for done in waiting.remove(&key).unwrap_or_default() {
                        let _ = done.send(());
                    }
                }
            }
            () = worker.stop.cancelled() => return,
        }
    }
}

/// Tells all workers which file versions the listings found outdated. Ends with the dataset.
pub(crate) async fn supersedes(worker: Arc<Worker>, dataset: Arc<Dataset>) {
    let Some(mut outdated) = dataset.index.take_superseded() else { return };
    let mut batch: Vec<(DatasetPath, FileVersion)> = Vec::new();
    loop {
        let received = tokio::select! {
            received = outdated.recv_many(&mut batch, SUPERSEDE_BATCH) => received,
            () = dataset.closed() => return,
            () = worker.stop.cancelled() => return,
        };
        if received == 0 {
            return;
        }
        let files: Vec<(DatasetPath, FileVersion)> = std::mem::take(&mut batch);
        let request = SupersedeRequest {
            dataset: dataset.id.to_bytes(),
            files: files.iter().map(|(path, version)| to_wire(path, version)).collect(),
        };
        let count = files.len() as u64;
        here(&worker, &dataset, files).await;
        stream::iter(worker.members.others())
            .for_each_concurrent(FAN_OUT, |member| {
                let (worker, request) = (&worker, request.clone());
                async move {
                    let telling = async {
                        let mut client = worker.members.control(&member).await?;
                        client.supersede(request).await
                    };
                    let told = timeout(SUPERSEDE, telling)
                        .await
                        .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
                    if let Err(status) = told {
                        worker.metrics.supersedes_dropped.inc_by(count);
                        debug!(worker = %member.name, %status, "outdated versions were not told");
                    }
                }
            })
            .await;
    }
}

/// These versions are no longer current: their chunks go first when room is needed.
pub(crate) async fn here(worker: &Arc<Worker>, dataset: &Arc<Dataset>, files: Vec<(DatasetPath, FileVersion)>) {
    let store = worker.store.clone();
    let id = dataset.id;
    let marked = tokio::task::spawn_blocking(move || {
        for (path, version) in files {
            store.supersede(version.identity(id, &path));
        }
    })
    .await;
    if let Err(error) = marked {
        debug!(%error, "marking outdated versions failed");
    }
}

pub(crate) fn to_wire(path: &DatasetPath, version: &FileVersion) -> wire::FileVersion {
    wire::FileVersion {
        path: path.to_bytes(),
        size: version.size,
        mtime_ns: version.mtime_ns,
        version_key: version.key.to_bytes(),
    }
}
