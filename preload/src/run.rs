//! All workers load what is selected, each its share.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_client::Client;
use forebay_protocol::{
    DatasetId, DatasetPath,
    errors::chain,
    table::{MemberState, WorkerTable},
    worker::{LoadProgress, LoadRequest, LoadTerms, Selection},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::mpsc,
    time::{interval, sleep, timeout},
};
use tonic::{Code, Status};
use tracing::{info, warn};

/// How long a worker may say nothing, or workers may be missing: as long as a pod takes to be replaced on another node.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long a worker that loads may say nothing: it tells its progress five times a second.
const SILENCE: Duration = Duration::from_secs(30);
/// Pause before a worker is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked whether the table is still the same.
const LOOK: Duration = Duration::from_millis(250);
/// Messages that wait to be told.
const QUEUE: usize = 64;
/// Reasons that are kept of all workers together.
const REASONS: usize = 10;

/// What to load, and under which name.
#[derive(Clone, Debug)]
pub struct Request {
    /// The Dataset.
    pub dataset: DatasetId,
    /// Name of the run, at most 64 bytes: who gives the same goes on where another one was.
    pub run: String,
    /// A file or directory of it.
    pub path: DatasetPath,
    /// Which files below the path.
    pub selection: Selection,
    /// How they are loaded.
    pub terms: LoadTerms,
}

/// Why a run is not complete.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Files could not be loaded.
    #[error("{files} of {total} files were not loaded: {}", reasons.join("; "))]
    Files {
        /// Files that failed.
        files: u64,
        /// Files that are selected.
        total: u64,
        /// The first reasons, with paths.
        reasons: Vec<String>,
    },
    /// There was no room for all of it.
    #[error("{bytes} of {total} bytes were not stored: the Dataset's quota or the workers' tiers are full")]
    Full {
        /// Bytes that were not stored.
        bytes: u64,
        /// Bytes that are selected.
        total: u64,
    },
    /// A worker does not do it.
    #[error("worker {worker}: {reason}")]
    Worker {
        /// Its name in the table.
        worker: String,
        /// What it says, or that it says nothing.
        reason: String,
    },
    /// There was nobody to load anything.
    #[error("there was no worker for {PATIENCE:?}")]
    NoWorkers,
}

/// Has every worker load its share, until all of them have; `tell` hears the sums. When the workers change, those that
/// are then there load their new shares; what is held counts at once.
pub async fn run(
    client: &Client,
    request: &Request,
    mut tell: impl FnMut(&LoadProgress),
) -> Result<LoadProgress, RunError> {
    loop {
        let table = with_workers(client).await?;
        let Some(sum) = round(client, &table, request, &mut tell).await? else {
            info!(epoch = client.members().epoch, "the workers changed; their shares are loaded anew");
            continue;
        };
        tell(&sum);
        return judge(sum);
    }
}

/// Whether everything is loaded, by the sum of all shares, which are finished.
pub fn judge(sum: LoadProgress) -> Result<LoadProgress, RunError> {
    if sum.failed_files > 0 {
        return Err(RunError::Files { files: sum.failed_files, total: sum.total_files, reasons: sum.failures });
    }
    if sum.bypassed_bytes > 0 {
        return Err(RunError::Full { bytes: sum.bypassed_bytes, total: sum.total_bytes });
    }
    Ok(sum)
}

/// Shares of workers, added up: listed and finished when all of them are.
pub fn sum<'a>(shares: impl IntoIterator<Item = &'a LoadProgress>) -> LoadProgress {
    let mut sum = LoadProgress { listed: true, finished: true, ..LoadProgress::default() };
    for share in shares {
        sum.total_files += share.total_files;
        sum.total_bytes += share.total_bytes;
        sum.done_files += share.done_files;
        sum.done_bytes += share.done_bytes;
        sum.failed_files += share.failed_files;
        sum.bypassed_bytes += share.bypassed_bytes;
        sum.failures.extend(share.failures.iter().cloned());
        sum.listed &= share.listed;
        sum.finished &= share.finished;
        sum.epoch = sum.epoch.max(share.epoch);
    }
    sum.failures.truncate(REASONS);
    sum
}

fn serving(table: &WorkerTable) -> impl Iterator<Item = &str> {
    table.members.iter().filter(|member| member.state == MemberState::Serving).map(|member| member.name.as_str())
}

/// A table in which somebody serves.
async fn with_workers(client: &Client) -> Result<Arc<WorkerTable>, RunError> {
    let found = timeout(PATIENCE, async {
        let mut look = interval(LOOK);
        loop {
            look.tick().await;
            let table = client.members();
            if serving(&table).next().is_some() {
                return table;
            }
        }
    });
    found.await.map_err(|_| RunError::NoWorkers)
}

/// All shares by one table. `None`: there is another one.
async fn round(
    client: &Client,
    table: &Arc<WorkerTable>,
    request: &Request,
    tell: &mut impl FnMut(&LoadProgress),
) -> Result<Option<LoadProgress>, RunError> {
    let (sender, mut heard) = mpsc::channel(QUEUE);
    let mut shares: BTreeMap<&str, LoadProgress> = BTreeMap::new();
    let mut working: FuturesUnordered<BoxFuture<'_, Result<(), RunError>>> = FuturesUnordered::new();
    for name in serving(table) {
        shares.insert(name, LoadProgress::default());
        working.push(follow(client, table.epoch, name, request, sender.clone()).boxed());
    }
    let mut look = interval(LOOK);
    loop {
        tokio::select! {
            biased;
            Some((name, progress)) = heard.recv() => {
                shares.insert(name, progress);
                tell(&sum(shares.values()));
            }
            ended = working.next() => match ended {
                Some(ended) => ended?,
                // The last messages were heard before.
                None => return Ok(Some(sum(shares.values()))),
            },
            _ = look.tick() => {
                if client.members().epoch != table.epoch {
                    return Ok(None);
                }
            }
        }
    }
}

/// The share of one worker, asked for again when the worker goes away meanwhile.
async fn follow<'a>(
    client: &Client,
    epoch: u64,
    name: &'a str,
    request: &Request,
    heard: mpsc::Sender<(&'a str, LoadProgress)>,
) -> Result<(), RunError> {
    let fail = |reason: String| RunError::Worker { worker: name.to_owned(), reason };
    let mut last_heard = Instant::now();
    loop {
        let reason = match ask(client, epoch, name, request, &heard, &mut last_heard).await {
            Ok(counted) if counted == epoch => return Ok(()),
            Ok(_) => "its share was counted while the workers changed".to_owned(),
            Err(status) if is_final(status.code()) => return Err(fail(status.message().to_owned())),
            Err(status) => status.message().to_owned(),
        };
        if last_heard.elapsed() > PATIENCE {
            return Err(fail(format!("nothing was heard for {PATIENCE:?}: {reason}")));
        }
        warn!(worker = name, %reason, "a worker is asked again");
        sleep(AGAIN).await;
    }
}

/// Whether asking again gives no other answer.
fn is_final(code: Code) -> bool {
    matches!(code, Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented | Code::Unauthenticated)
}

/// The epoch by which a worker counted its share, once it is loaded.
async fn ask<'a>(
    client: &Client,
    epoch: u64,
    name: &'a str,
    request: &Request,
    heard: &mpsc::Sender<(&'a str, LoadProgress)>,
    last_heard: &mut Instant,
) -> Result<u64, Status> {
    let Request { dataset, run, path, selection, terms } = request;
    let silent = |_| Status::deadline_exceeded(format!("no word for {SILENCE:?}"));
    let mut control = client.control(name).await.map_err(|error| Status::unavailable(chain(&error)))?;
    let load = LoadRequest {
        dataset: dataset.to_bytes(),
        path: path.to_bytes(),
        selection: Some(selection.clone()),
        run: run.clone(),
        epoch,
        terms: Some(*terms),
    };
    let mut answers = timeout(SILENCE, control.load(load)).await.map_err(silent)??.into_inner();
    while let Some(progress) = timeout(SILENCE, answers.message()).await.map_err(silent)?? {
        *last_heard = Instant::now();
        client.note_epoch(progress.epoch);
        let ended = progress.finished.then_some(progress.epoch);
        // Whoever receives lives as long as this.
        let _ = heard.send((name, progress)).await;
        if let Some(epoch) = ended {
            return Ok(epoch);
        }
    }
    Err(Status::unavailable("it broke off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_finished_when_all_are_and_complete_when_nothing_is_missing() {
        let share = |failed_files, bypassed_bytes, finished| LoadProgress {
            total_files: 2,
            total_bytes: 20,
            done_files: 2 - failed_files,
            done_bytes: 20,
            failed_files,
            bypassed_bytes,
            failures: vec!["/a: gone".to_owned(); failed_files as usize],
            listed: true,
            finished,
            epoch: 3,
        };
        let all = sum(&[share(0, 0, true), share(0, 0, true)]);
        assert_eq!((all.total_files, all.done_bytes, all.finished, all.epoch), (4, 40, true, 3));
        assert!(judge(all).is_ok());
        assert!(!sum(&[share(0, 0, true), share(0, 0, false)]).finished);
        let failed = judge(sum(&[share(0, 0, true), share(1, 0, true)])).map_err(|error| error.to_string());
        assert_eq!(failed, Err("1 of 4 files were not loaded: /a: gone".to_owned()));
        let full = judge(sum(&[share(0, 7, true), share(0, 0, true)])).map_err(|error| error.to_string());
        assert!(full.is_err_and(|error| error.contains("7 of 40 bytes")));
    }
}
