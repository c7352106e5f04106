//! The disk below the chunk store, which may stop answering: a read(2) or write(2) that does not return.
//!
//! Each call has a blocking thread, which nothing can end. So a call is counted until it is back, also when its caller
//! has gone, and there are at most [`CALLS`]. The disk is *hung* while one is out beyond its limit; no new call is made
//! then. Those that are stuck are the probe: when they are back, the disk answers again.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::{Instant, timeout, timeout_at},
};
use tracing::{info, warn};

use super::FillError;
use crate::metrics::Metrics;

/// How long a call may take: the most that one reads, 16 MiB, takes 1.6 s at 10 MB/s, and processors that are overloaded
/// are no hung disk. A reader that waits for it, and then for the source, is still far from its deadline of 30 s.
const DEADLINE: Duration = Duration::from_secs(5);
/// Calls at once: half of the 512 blocking threads of a runtime. The rest is for what does not touch this disk.
const CALLS: usize = 256;

pub(crate) struct Disk {
    calls: Arc<Semaphore>,
    state: Mutex<State>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    /// When each call that is out is due, oldest first.
    due: BTreeSet<(Instant, u64)>,
    calls: u64,
    /// Since when it is hung, as far as anybody has looked.
    hung: Option<Instant>,
}

/// A call that is out.
struct Call {
    disk: Arc<Disk>,
    due: (Instant, u64),
    _place: OwnedSemaphorePermit,
}

impl Disk {
    pub(super) fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { calls: Arc::new(Semaphore::new(CALLS)), state: Mutex::default(), metrics })
    }

    /// Runs `work`, which may wait for the disk, off the runtime's threads. `None`: there is no answer within
    /// [`DEADLINE`], or the disk is hung and was not asked. Work that began goes on.
    pub(crate) async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>, FillError> {
        self.call_within(DEADLINE, work).await
    }

    /// The same for work that takes long by itself.
    pub(super) async fn call_within<T: Send + 'static>(
        self: &Arc<Self>,
        limit: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>, FillError> {
        if self.is_hung() {
            return Ok(None);
        }
        // The semaphore is never closed.
        let Ok(Ok(place)) = timeout(limit, self.calls.clone().acquire_owned()).await else { return Ok(self.late()) };
        let call = Call::begin(self.clone(), limit, place);
        let due = call.due.0;
        let working = spawn_blocking(move || {
            let answer = work();
            drop(call);
            answer
        });
        match timeout_at(due, working).await {
            Ok(Ok(answer)) => Ok(Some(answer)),
            Ok(Err(error)) => Err(FillError::internal(format!("a disk task failed: {error}"))),
            Err(_) => Ok(self.late()),
        }
    }

    /// Whether asking it is in vain.
    pub(crate) fn is_hung(&self) -> bool {
        self.look(&mut self.state.lock())
    }

    /// What is wrong, for people.
    pub(crate) fn problem(&self) -> Option<String> {
        let mut state = self.state.lock();
        self.look(&mut state);
        let since = state.hung?.elapsed() + DEADLINE;
        Some(format!("the cache disk has not answered for {} s; nothing is stored or read there", since.as_secs()))
    }

    fn late<T>(&self) -> Option<T> {
        self.metrics.disk_timeouts.inc();
        self.is_hung();
        None
    }

    /// Says it when the disk has hung up, or is back.
    fn look(&self, state: &mut State) -> bool {
        let now = Instant::now();
        let hung = state.due.first().is_some_and(|(due, _)| *due <= now);
        if hung && state.hung.is_none() {
            state.hung = Some(now);
            self.metrics.disk_hung.set(1);
            warn!(calls = state.due.len(), "the cache disk does not answer; blocks come from the sources");
        } else if !hung && let Some(since) = state.hung.take() {
            self.metrics.disk_hung.set(0);
            info!(after = ?since.elapsed(), "the cache disk answers again");
        }
        hung
    }
}

impl Call {
    fn begin(disk: Arc<Disk>, limit: Duration, place: OwnedSemaphorePermit) -> Self {
        let mut state = disk.state.lock();
        let due = (Instant::now() + limit, state.calls);
        state.calls += 1;
        state.due.insert(due);
        drop(state);
        Self { disk, due, _place: place }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = self.disk.state.lock();
        state.due.remove(&self.due);
        self.disk.look(&mut state);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]
mod tests {
    use std::sync::mpsc::channel;

    use futures::future::join_all;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn what_does_not_return_stops_the_calls_until_it_does() {
        let disk = Disk::new(Arc::new(Metrics::new()));
        assert_eq!(disk.call_within(LIMIT, || 1).await.unwrap(), Some(1));
        let (release, hung) = channel::<()>();
        assert_eq!(disk.call_within(LIMIT, move || hung.recv().is_ok()).await.unwrap(), None);
        assert!(disk.is_hung() && disk.problem().unwrap().contains("not answered for 5 s"));
        // Not even begun.
        let (begun, begins) = channel();
        assert_eq!(disk.call_within(LIMIT, move || begun.send(())).await.unwrap(), None);
        assert!(begins.recv().is_err());
        release.send(()).unwrap();
        while disk.is_hung() {
            tokio::time::sleep(LIMIT / 10).await;
        }
        assert_eq!((disk.problem(), disk.call_within(LIMIT, || 2).await.unwrap()), (None, Some(2)));
        assert_eq!(disk.metrics.disk_timeouts.get(), 1);
    }

    #[tokio::test]
    async fn a_call_counts_although_its_caller_has_gone() {
        let disk = Disk::new(Arc::new(Metrics::new()));
        let (release, hung) = channel::<()>();
        let call = disk.call_within(LIMIT, move || hung.recv().is_ok());
        assert!(timeout(LIMIT / 10, call).await.is_err());
        assert!(!disk.is_hung());
        tokio::time::sleep(LIMIT).await;
        assert!(disk.is_hung());
        drop(release);
    }

    #[tokio::test]
    async fn the_calls_that_are_out_are_bounded() {
        let disk = Disk::new(Arc::new(Metrics::new()));
        let mut held = Vec::new();
        let calls = (0..CALLS + 10).map(|_| {
            let (release, hung) = channel::<()>();
            held.push(release);
            disk.call_within(LIMIT, move || hung.recv().is_ok())
        });
        let calls: Vec<_> = calls.collect();
        assert!(join_all(calls).await.into_iter().all(|answer| answer.unwrap().is_none()));
        let out = disk.state.lock().due.len();
        assert!(out <= CALLS, "{out}");
    }
}
