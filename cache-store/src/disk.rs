//! Whether the disk takes bytes.
//!
//! Three things stop admission: a write that failed (for a pause, then writes are tried again), a file system that is
//! nearly full (until it no longer is), and a directory that is gone (until one is there again). None of them stops
//! reading.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::Refusal;
use crate::root::{Root, Space};

/// Free bytes that are left to others: 2 % of the file system, at least one write, at most 256 MiB.
const RESERVE_PERCENT: u64 = 2;
const MIN_RESERVE: u64 = 64 * 1024;
const MAX_RESERVE: u64 = 256 * 1024 * 1024;
/// Least time between two looks at the file system; what is admitted between them is subtracted.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Disk {
    pause: Duration,
    watch_space: bool,
    state: Mutex<State>,
    /// Whether anything is wrong: the fast path of [`Self::succeeded`].
    failing: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    failure: Option<(String, Instant)>,
    /// Why, and how many bytes were refused: as many must be free before it ends.
    full: Option<(String, u64)>,
    lost: Option<String>,
    headroom: u64,
    looked: Option<Instant>,
}

impl Disk {
    pub(crate) fn new(pause: Duration, watch_space: bool) -> Self {
        Self { pause, watch_space, state: Mutex::new(State::default()), failing: AtomicBool::new(false) }
    }

    /// Whether `bytes` more may be written now.
    pub(crate) fn admit(&self, root: &Root, bytes: u64) -> Result<(), Refusal> {
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(problem) = &state.lost {
            return Err(Refusal::Disk(problem.clone()));
        }
        if let Some((problem, until)) = &state.failure
            && now < *until
        {
            return Err(Refusal::Disk(problem.clone()));
        }
        if !self.watch_space {
            return Ok(());
        }
        let stale = state.looked.is_none_or(|looked| now - looked >= LOOK_INTERVAL);
        if stale && (state.full.is_some() || state.headroom < bytes) {
            // One system call that asks memory, not the disk.
            Self::look(&mut state, root, now);
        }
        match (&state.full, state.headroom.checked_sub(bytes)) {
            (None, Some(rest)) => {
                state.headroom = rest;
                Ok(())
            }
            (Some((problem, _)), _) => Err(Refusal::Disk(problem.clone())),
            (None, None) => {
                tracing::warn!(path = %root.path().display(), "the cache disk is nearly full");
                let problem = format!("{} is nearly full", root.path().display());
                state.full = Some((problem.clone(), bytes));
                Err(Refusal::Disk(problem))
            }
        }
    }

    /// Looks at the file system, as the evictor does now and then.
    pub(crate) fn refresh(&self, root: &Root) {
        if self.watch_space {
            Self::look(&mut self.state.lock(), root, Instant::now());
        }
    }

    /// A write or a creation failed: no more of them for a while.
    pub(crate) fn failed(&self, root: &Root, doing: &'static str, error: &io::Error) -> String {
        let problem = format!("cannot {doing} in {}: {error}", root.path().display());
        let mut state = self.state.lock();
        if state.failure.as_ref().is_none_or(|(before, _)| *before != problem) {
            tracing::warn!(path = %root.path().display(), %error, "cannot {doing}; caching pauses");
        }
        state.failure = Some((problem.clone(), Instant::now() + self.pause));
        self.failing.store(true, Ordering::Release);
        problem
    }

    /// A write succeeded.
    pub(crate) fn succeeded(&self) {
        if self.failing.load(Ordering::Acquire) {
            let mut state = self.state.lock();
            if state.failure.take().is_some() {
                tracing::info!("the cache disk takes writes again");
            }
            self.failing.store(false, Ordering::Release);
        }
    }

    /// Sets or clears the problem of a directory that is not there.
    pub(crate) fn set_lost(&self, problem: Option<String>) {
        self.state.lock().lost = problem;
    }

    /// What is wrong, for people.
    pub(crate) fn problem(&self) -> Option<String> {
        let State { failure, full, lost, headroom: _, looked: _ } = &*self.state.lock();
        let failure = failure.as_ref().map(|(problem, _)| problem);
        lost.as_ref().or(failure).or(full.as_ref().map(|(problem, _)| problem)).cloned()
    }

    fn look(state: &mut State, root: &Root, now: Instant) {
        let Ok(Space { available, total }) = root.space() else { return };
        let reserve = (total / 100 * RESERVE_PERCENT).clamp(MIN_RESERVE, MAX_RESERVE);
        state.looked = Some(now);
        state.headroom = available.saturating_sub(reserve);
        // Once full, it stays so until a quarter more than the reserve is free: no flapping around the limit.
        if let Some((problem, wanted)) = &mut state.full {
            let path = root.path().display();
            *problem = format!("{path} is nearly full: {available} bytes free, {reserve} are left to others");
            if state.headroom >= (*wanted).max(reserve / 4) {
                state.full = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_stops_admission_for_a_pause_and_success_clears_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path(), "a").unwrap();
        let disk = Disk::new(Duration::from_millis(50), true);
        assert_eq!(disk.admit(&root, 1), Ok(()));
        disk.failed(&root, "write", &io::Error::from_raw_os_error(5));
        assert!(matches!(disk.admit(&root, 1), Err(Refusal::Disk(_))));
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(disk.admit(&root, 1), Ok(()));
        assert!(disk.problem().is_some_and(|problem| problem.contains("cannot write in")));
        disk.succeeded();
        assert_eq!(disk.problem(), None);
        disk.set_lost(Some("gone".into()));
        assert_eq!(disk.admit(&root, 1), Err(Refusal::Disk("gone".into())));
    }

    #[test]
    fn more_than_the_disk_has_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path(), "a").unwrap();
        let disk = Disk::new(Duration::from_secs(1), true);
        assert!(matches!(disk.admit(&root, u64::MAX), Err(Refusal::Disk(_))));
        assert!(disk.problem().is_some_and(|problem| problem.contains("nearly full")));
        disk.refresh(&root);
        assert!(disk.problem().is_some_and(|problem| problem.contains("bytes free")));
        disk.state.lock().full = Some((String::new(), 1));
        disk.refresh(&root);
        assert_eq!((disk.problem(), disk.admit(&root, 1)), (None, Ok(())));
    }
}
