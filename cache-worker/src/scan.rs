//! Scans of whole datasets: in the background, by whoever is first in a dataset's order of workers and alive; and after
//! `forebay refresh`, by whoever was asked.
//!
//! A dataset that is synchronised periodically is listed ahead of need: under the generation after the one that is
//! answered, which everybody adopts when all of it is listed. So nobody waits for it, and while a source is away what is
//! known is answered. It begins early enough that what changes at a source is seen within the interval, if a listing takes
//! no longer than half of it; one that takes longer is followed by a pause of the same length.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_metadata::{
    DirectoryScan, MetadataError, ScanDirectories, ScanHandle, ScanOptions, ScanProgress, ScanState, Scanner,
};
use forebay_protocol::{
    DatasetPath,
    identity::directory_placement_key,
    table::Member,
    worker::{self as wire, PruneRequest, RecheckRequest, ScanDirectoryRequest, StatusRequest},
};
use futures::{StreamExt, future::BoxFuture, stream};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::{debug, info, warn};

use crate::{dataset::Dataset, members::Candidate, worker::Worker};

/// How long another worker may take for one page of a scan: above the deadline of its own listing steps.
const SCAN_PAGE: Duration = Duration::from_secs(120);
/// How long another worker may take to show that it lives.
const ALIVE: Duration = Duration::from_secs(1);
/// How long another worker may take to forget directories.
const PRUNE: Duration = Duration::from_secs(60);
/// How long an owner may take to ask its source about one file.
const RECHECK: Duration = Duration::from_secs(5);
/// How often a worker looks whether there is something to scan.
const LOOK: Duration = Duration::from_secs(2);
/// Pauses after scans that failed, from the first to the last; each is twice the one before.
const AFTER_FAILURE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(16));
/// How often the sources are asked whether they are there though nobody reads, by whoever scans: a request of the class
/// LIST, some ten dollars a year at Amazon.
const CHECK: Duration = Duration::from_secs(15);
/// Workers asked for the same thing at once.
const FAN_OUT: usize = 16;

/// Scans each directory where it is owned.
struct AtOwners {
    worker: Arc<Worker>,
    dataset: Arc<Dataset>,
    /// Without making anybody wait for it.
    ahead: bool,
}

impl ScanDirectories for AtOwners {
    fn scan<'a>(
        &'a self,
        generation: u64,
        directory: &'a DatasetPath,
        after: &'a [u8],
    ) -> BoxFuture<'a, Result<DirectoryScan, MetadataError>> {
        Box::pin(async move {
            let mut last = MetadataError::Closed;
            for candidate in self.worker.members.directory_order(self.dataset.id, directory) {
                let answer = match &candidate {
                    Candidate::Here if self.ahead => self.dataset.index.scan_ahead(generation, directory, after).await,
                    Candidate::Here => self.dataset.index.scan_directory(generation, directory, after).await,
                    Candidate::There(member) => self.ask(member, generation, directory, after).await,
                };
                match answer {
                    // The source says so, or the owner cannot be asked; in both cases the next one may know better.
                    Err(error @ (MetadataError::Closed | MetadataError::Deadline | MetadataError::Unavailable(_))) => {
                        debug!(%directory, %error, ?candidate, "scanning a directory elsewhere");
                        last = error;
                    }
                    answer => return answer,
                }
            }
            Err(last)
        })
    }
}

impl AtOwners {
    async fn ask(
        &self,
        member: &Member,
        generation: u64,
        directory: &DatasetPath,
        after: &[u8],
    ) -> Result<DirectoryScan, MetadataError> {
        let request = ScanDirectoryRequest {
            dataset: self.dataset.id.to_bytes(),
            generation,
            directory: directory.to_bytes(),
            after: Bytes::copy_from_slice(after),
            sources: self.dataset.namespace().fingerprint(),
            ahead: self.ahead,
        };
        let asking = async {
            let mut client = self.worker.members.metadata(member).await?;
            client.scan_directory(request).await
        };
        let answer = timeout(SCAN_PAGE, asking)
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("worker {}", member.name))))
            .map_err(|status| from_status(&status))?
            .into_inner();
        self.dataset.index.adopt_generation(answer.generation);
        let wire::ScanDirectoryResponse { generation: _, files, bytes, hidden, changed, digest, subdirectories, end } =
            answer;
        Ok(DirectoryScan { files, bytes, hidden, changed, digest, subdirectories, end })
    }
}

/// What another worker's refusal means.
fn from_status(status: &Status) -> MetadataError {
    match status.code() {
        Code::NotFound => MetadataError::NotFound,
        Code::PermissionDenied => MetadataError::PermissionDenied(status.message().to_owned()),
        Code::DeadlineExceeded => MetadataError::Deadline,
        Code::Internal => MetadataError::Internal(status.message().to_owned()),
        _ => MetadataError::Unavailable(status.message().to_owned()),
    }
}

/// Starts to scan everything at and below `path`; `ahead`: under a generation that is not adopted.
pub(crate) fn start(
    worker: &Arc<Worker>,
    dataset: &Arc<Dataset>,
    generation: u64,
    ahead: bool,
    path: DatasetPath,
    cancel: CancellationToken,
) -> ScanHandle {
    let directories = Arc::new(AtOwners { worker: worker.clone(), dataset: dataset.clone(), ahead });
    Scanner::start(directories, generation, path, ScanOptions::default(), cancel)
}

/// As the wire says it.
pub(crate) fn to_wire(progress: &ScanProgress) -> wire::ScanProgress {
    let ScanProgress { state, generation, files, bytes, directories, hidden, changed, digest, error } =
        progress.clone();
    let state = match state {
        ScanState::Running => wire::ScanState::Running,
        ScanState::Complete => wire::ScanState::Complete,
        ScanState::Failed => wire::ScanState::Failed,
    };
    wire::ScanProgress {
        state: state.into(),
        generation,
        files,
        bytes,
        directories,
        hidden,
        changed,
        digest,
        error: error.unwrap_or_default(),
        synced_ms: None,
    }
}

/// Learns the highest generations that any worker knows, so that one above them is new to all.
pub(crate) async fn learn_generation(worker: &Arc<Worker>, dataset: &Arc<Dataset>) {
    let id = dataset.id;
    stream::iter(worker.members.others())
        .for_each_concurrent(FAN_OUT, |member| async move {
            let asking = async {
                let mut client = worker.members.control(&member).await?;
                client.status(StatusRequest { dataset: id.to_bytes() }).await
            };
            if let Ok(Ok(status)) = timeout(ALIVE, asking).await {
                for known in status.into_inner().datasets {
                    dataset.index.adopt_generation(known.generation);
                    dataset.index.adopt_ahead(known.listing_generation);
                }
            }
        })
        .await;
}

/// Lets all workers forget the directories at and below `path` that the scan of `generation` did not meet.
pub(crate) async fn prune(worker: &Arc<Worker>, dataset: &Arc<Dataset>, generation: u64, path: &DatasetPath) {
    let request = PruneRequest { dataset: dataset.id.to_bytes(), generation, path: path.to_bytes() };
    stream::iter(worker.members.others())
        .for_each_concurrent(FAN_OUT, |member| {
            let request = request.clone();
            async move {
                let asking = async {
                    let mut client = worker.members.control(&member).await?;
                    client.prune(request).await
                };
                let pruned =
                    timeout(PRUNE, asking).await.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
                if let Err(status) = pruned {
                    warn!(worker = %member.name, %status, "a worker did not forget old directories");
                }
            }
        })
        .await;
    if let Err(error) = dataset.index.prune(generation, path).await {
        warn!(dataset = %dataset.name, %error, "old directories were not forgotten");
    }
}

/// Keeps this dataset scanned while this worker is the first of its order that lives. Ends with the dataset.
pub(crate) async fn coordinate(worker: Arc<Worker>, dataset: Arc<Dataset>) {
    let work = async {
        let mut failures = 0;
        let mut checked = Instant::now();
        loop {
            // A scan that is dropped is cancelled.
            let looked = tokio::select! {
                looked = look(&worker, &dataset) => looked,
                () = dataset.rescan.notified() => continue,
            };
            let pause = match looked {
                Look::Nothing(pause) => LOOK.min(pause),
                Look::Scanned => {
                    failures = 0;
                    Duration::ZERO
                }
                Look::Failed => {
                    failures += 1;
                    AFTER_FAILURE.0.saturating_mul(1 << (failures - 1).min(8)).min(AFTER_FAILURE.1)
                }
            };
            if dataset.scan.borrow().is_some() && checked.elapsed() >= CHECK {
                checked = Instant::now();
                dataset.check_sources();
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = dataset.rescan.notified() => {}
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = dataset.closed() => {}
        () = worker.stop.cancelled() => {}
    }
}

/// What a look came to.
enum Look {
    /// It is not this worker's turn, or everything is scanned; nothing is due for so long.
    Nothing(Duration),
    Scanned,
    Failed,
}

/// Scans if it is this worker's turn and something is to be scanned.
async fn look(worker: &Arc<Worker>, dataset: &Arc<Dataset>) -> Look {
    let is_done = |progress: &Option<wire::ScanProgress>| {
        progress.as_ref().is_some_and(|progress| {
            progress.state() == wire::ScanState::Complete && progress.generation >= dataset.index.generation()
        })
    };
    if !coordinates(worker, dataset).await {
        dataset.scan.send_if_modified(|progress| progress.take().is_some());
        return Look::Nothing(LOOK);
    }
    if !is_done(&dataset.scan.borrow()) {
        return count(worker, dataset).await;
    }
    match dataset.sync.pause(dataset.config().sync_interval) {
        Duration::ZERO => synchronise(worker, dataset).await,
        pause => Look::Nothing(pause),
    }
}

/// Scans what is not counted under the present generation; what is listed is not asked of the sources.
async fn count(worker: &Arc<Worker>, dataset: &Arc<Dataset>) -> Look {
    learn_generation(worker, dataset).await;
    let cancel = CancellationToken::new();
    let _end = cancel.clone().drop_guard();
    let handle = start(worker, dataset, dataset.index.generation(), false, DatasetPath::root(), cancel);
    let mut watching = handle.progress.clone();
    let showing = async {
        while watching.changed().await.is_ok() {
            let progress = to_wire(&watching.borrow_and_update());
            dataset.scan.send_replace(Some(progress));
            // Every directory is a change; status is asked for a few times per second at most.
            sleep(Duration::from_millis(100)).await;
        }
    };
    let (finished, ()) = tokio::join!(handle.finished(), showing);
    dataset.scan.send_replace(Some(to_wire(&finished)));
    match &finished.error {
        None => {
            let ScanProgress { files, bytes, directories, generation, .. } = finished;
            info!(dataset = %dataset.name, files, bytes, directories, generation, "scanned");
            Look::Scanned
        }
        Some(error) => {
            warn!(dataset = %dataset.name, %error, "the scan failed; it is started again");
            Look::Failed
        }
    }
}

/// Lists everything again, under the next generation, which is adopted when all of it is listed.
async fn synchronise(worker: &Arc<Worker>, dataset: &Arc<Dataset>) -> Look {
    learn_generation(worker, dataset).await;
    // New to all: what a listing met that was not brought to its end may have changed since.
    let generation = dataset.index.listing_generation() + 1;
    let (began, root) = (Instant::now(), DatasetPath::root());
    let cancel = CancellationToken::new();
    let _end = cancel.clone().drop_guard();
    let finished = start(worker, dataset, generation, true, root.clone(), cancel).finished().await;
    if let Some(error) = &finished.error {
        // Numbers stay those of the last one; that a source is away is said by those who ask it.
        warn!(dataset = %dataset.name, %error, "the sources were not listed; it is tried again");
        return Look::Failed;
    }
    dataset.index.adopt_generation(generation);
    prune(worker, dataset, generation, &root).await;
    dataset.sync.done(began);
    let ScanProgress { files, changed, .. } = finished;
    debug!(dataset = %dataset.name, files, changed, generation, "synchronised");
    dataset.scan.send_replace(Some(to_wire(&finished)));
    Look::Scanned
}

/// Whether no worker before this one in the dataset's order answers.
async fn coordinates(worker: &Arc<Worker>, dataset: &Arc<Dataset>) -> bool {
    let order = worker.members.order(directory_placement_key(dataset.id, &DatasetPath::root()), usize::MAX);
    for member in &order {
        if worker.members.is_self(member) {
            return true;
        }
        if lives(worker, member, dataset).await {
            return false;
        }
    }
    // Not a member: the table is empty, or this worker drains.
    false
}

async fn lives(worker: &Arc<Worker>, member: &Member, dataset: &Arc<Dataset>) -> bool {
    let asking = async {
        let mut client = worker.members.control(member).await.ok()?;
        client.status(StatusRequest { dataset: dataset.id.to_bytes() }).await.ok()
    };
    // One that does not serve the dataset cannot coordinate it.
    matches!(timeout(ALIVE, asking).await, Ok(Some(status)) if !status.get_ref().datasets.is_empty())
}

/// Lets the owner of a file's directory ask the source about the file.
pub(crate) async fn recheck(worker: &Arc<Worker>, dataset: &Arc<Dataset>, path: &DatasetPath) {
    let directory = path.split().map_or_else(DatasetPath::root, |(directory, _)| directory);
    for candidate in worker.members.directory_order(dataset.id, &directory) {
        let done = match &candidate {
            Candidate::Here => dataset.index.recheck_now(path).await.map(drop).map_err(|error| error.to_string()),
            Candidate::There(member) => {
                let request = RecheckRequest { dataset: dataset.id.to_bytes(), path: path.to_bytes() };
                let asking = async {
                    let mut client = worker.members.metadata(member).await?;
                    client.recheck(request).await
                };
                match timeout(RECHECK, asking).await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(status)) => Err(status.to_string()),
                    Err(_) => Err(format!("no answer from worker {}", member.name)),
                }
            }
        };
        match done {
            Ok(()) => return,
            Err(error) => debug!(%path, error, ?candidate, "rechecking a file elsewhere"),
        }
    }
}
