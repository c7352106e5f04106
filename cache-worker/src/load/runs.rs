//! Loads that go on without the connection that asked for them, each under the name of its run.
//!
//! Who asks for a run that is there joins it: it goes on while somebody follows it, and for [`ALONE`] without anybody.
//! Its progress is kept afterwards, for who asks later. A run whose share is no longer what the worker owns, or that did
//! not load everything, begins again when it is asked for; what is held counts at once.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use forebay_protocol::{DatasetPath, worker::LoadRun};
use parking_lot::Mutex;
use tokio::{
    sync::SetOnce,
    time::{interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Progress, Selection, Terms, load, to_status};
use crate::{dataset::Dataset, worker::Worker};

/// Longest name of a run, in bytes: a UID has 36.
const MAX_NAME: usize = 64;
/// Runs that are kept of a dataset.
const KEPT: usize = 16;
/// How long a run goes on that nobody follows: as long as a pod may take to be replaced.
const ALONE: Duration = Duration::from_secs(60);
/// How long a run waits for the table that its caller knows.
const TABLE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(100);

/// What is asked for.
pub(crate) struct Wanted {
    /// Name of the run.
    pub(crate) run: String,
    /// Epoch of the table that the caller knows.
    pub(crate) epoch: u64,
    pub(crate) path: DatasetPath,
    pub(crate) selection: Selection,
    pub(crate) terms: Terms,
}

/// A run, while it is known.
struct Run {
    name: String,
    epoch: u64,
    progress: Arc<Progress>,
    followers: AtomicUsize,
    ended: SetOnce<Result<(), Status>>,
    cancel: CancellationToken,
}

impl Run {
    /// Whether joining it gives the whole share of this epoch.
    fn serves(&self, epoch: u64) -> bool {
        let sound = match self.ended.get() {
            None => !self.cancel.is_cancelled(),
            Some(Ok(())) => self.progress.is_sound() && self.progress.epoch() == epoch,
            Some(Err(_)) => false,
        };
        self.epoch == epoch && sound
    }

    /// Ends when nobody has followed for a while.
    async fn alone(&self) {
        let mut look = interval(LOOK);
        let mut since = Instant::now();
        while since.elapsed() < ALONE {
            look.tick().await;
            if self.followers.load(Ordering::Acquire) > 0 {
                since = Instant::now();
            }
        }
    }
}

/// Somebody follows a run.
pub(crate) struct Follower(Arc<Run>);

impl Follower {
    fn new(run: Arc<Run>) -> Self {
        run.followers.fetch_add(1, Ordering::AcqRel);
        Self(run)
    }

    pub(crate) fn progress(&self) -> Arc<Progress> {
        self.0.progress.clone()
    }

    /// How it ended.
    pub(crate) async fn ended(&self) -> Result<(), Status> {
        self.0.ended.wait().await.clone()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.followers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The runs of a dataset, the latest last.
#[derive(Default)]
pub(crate) struct Runs(Mutex<VecDeque<Arc<Run>>>);

impl Runs {
    /// Begins a run, or joins it.
    pub(crate) fn follow(worker: &Arc<Worker>, dataset: &Arc<Dataset>, wanted: Wanted) -> Result<Follower, Status> {
        if wanted.run.len() > MAX_NAME {
            return Err(Status::invalid_argument(format!("the name of a run has at most {MAX_NAME} bytes")));
        }
        let mut runs = dataset.runs.0.lock();
        if let Some(place) = runs.iter().position(|run| run.name == wanted.run) {
            if runs[place].serves(wanted.epoch) {
                return Ok(Follower::new(runs[place].clone()));
            }
            if let Some(old) = runs.remove(place) {
                old.cancel.cancel();
            }
        }
        // One that goes on is not forgotten for a newer one.
        let ended = runs.iter().position(|run| run.ended.get().is_some());
        if runs.len() >= KEPT {
            match ended {
                Some(place) => drop(runs.remove(place)),
                None => return Err(Status::resource_exhausted(format!("{KEPT} loads of the dataset are under way"))),
            }
        }
        let run = Arc::new(Run {
            name: wanted.run.clone(),
            epoch: wanted.epoch,
            progress: Arc::default(),
            followers: AtomicUsize::new(0),
            ended: SetOnce::new(),
            cancel: CancellationToken::new(),
        });
        runs.push_back(run.clone());
        let follower = Follower::new(run.clone());
        worker.tasks.spawn(carry_out(worker.clone(), dataset.clone(), run, wanted));
        Ok(follower)
    }

    /// As `Status` says them.
    pub(crate) fn to_wire(&self) -> Vec<LoadRun> {
        let message = |run: &Arc<Run>| LoadRun {
            run: run.name.clone(),
            error: match run.ended.get() {
                Some(Err(status)) => status.message().to_owned(),
                _ => String::new(),
            },
            progress: Some(run.progress.message(matches!(run.ended.get(), Some(Ok(()))))),
        };
        self.0.lock().iter().map(message).collect()
    }
}

async fn carry_out(worker: Arc<Worker>, dataset: Arc<Dataset>, run: Arc<Run>, wanted: Wanted) {
    let Wanted { run: _, epoch, path, selection, terms } = wanted;
    let work = async {
        let known = timeout(TABLE, async {
            let mut look = interval(LOOK);
            while worker.members.table().epoch < epoch {
                look.tick().await;
            }
        });
        known.await.map_err(|_| Status::unavailable(format!("table {epoch} is not known here yet")))?;
        load(&worker, &dataset, &path, &selection, terms, &run.progress).await.map_err(to_status)
    };
    let ended = tokio::select! {
        ended = work => ended,
        () = run.alone() => Err(Status::cancelled("nobody followed the load any more")),
        () = run.cancel.cancelled() => Err(Status::aborted("the load began again")),
        () = dataset.closed() => Err(Status::unavailable("the dataset is no longer served like this")),
        () = worker.stop.cancelled() => Err(Status::unavailable("the worker is stopping")),
    };
    // Nobody else says so.
    let _ = run.ended.set(ended);
}
