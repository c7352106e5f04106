//! How long a call waits for its store, and when it tries again.
//!
//! A call has one [`Patience`]: its deadline, spent by waiting for the store, for the limits and between attempts, but
//! not by a reader who takes his time with a body. Attempts are not counted: the deadline ends them, and the back-off
//! keeps them rare (full jitter: <https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::StoreError;

/// The longest first pause between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause; reached by the 8th attempt (50 ms * 2^7 = 6.4 s).
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why an attempt failed, and whether another one may succeed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: StoreError,
    pub(crate) retry: Retry,
}

/// What to do about a [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// It stands.
    Never,
    /// It may pass.
    Later,
    /// The store said when.
    After(Duration),
}

impl Failure {
    /// One that stands.
    pub(crate) fn fatal(error: StoreError) -> Self {
        Self { error, retry: Retry::Never }
    }

    /// One that may pass.
    pub(crate) fn passing(why: impl Into<String>) -> Self {
        Self { error: StoreError::Unavailable(why.into()), retry: Retry::Later }
    }
}

/// What is left of a call's time.
#[derive(Debug)]
pub(crate) struct Patience {
    left: Duration,
    attempts: u32,
}

impl Patience {
    pub(crate) fn new(deadline: Duration) -> Self {
        Self { left: deadline, attempts: 0 }
    }

    /// What is left.
    pub(crate) fn left(&self) -> Duration {
        self.left
    }

    /// Waits for `future`, at most `limit` and what is left. `None`: it took too long.
    pub(crate) async fn wait<F: Future>(&mut self, limit: Duration, future: F) -> Option<F::Output> {
        let start = Instant::now();
        let output = timeout(limit.min(self.left), future).await.ok();
        self.left = self.left.saturating_sub(start.elapsed());
        output
    }

    /// Pauses before the next attempt; the error when there is none.
    pub(crate) async fn pause(&mut self, failure: Failure) -> Result<(), StoreError> {
        let Failure { error, retry } = failure;
        let jitter = || {
            let longest = FIRST_PAUSE.saturating_mul(1 << self.attempts.min(16)).min(LONGEST_PAUSE);
            longest.mul_f64(rand::random::<f64>())
        };
        let pause = match retry {
            Retry::Never => return Err(error),
            Retry::Later => jitter(),
            // The jitter on top keeps those who were told the same apart.
            Retry::After(time) => time.saturating_add(jitter()),
        };
        if pause >= self.left {
            return Err(error);
        }
        tracing::debug!(%error, pause_ms = pause.as_millis() as u64, "store request failed, trying again");
        self.attempts += 1;
        self.left -= pause;
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// The store works: the next failure begins with a short pause again.
    pub(crate) fn progressed(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_attempts() {
        let mut patience = Patience::new(Duration::from_secs(20));
        let start = Instant::now();
        let mut attempts = 0;
        while patience.pause(Failure::passing("down")).await.is_ok() {
            attempts += 1;
            assert!(attempts < 10_000);
        }
        assert!(attempts >= 3 && start.elapsed() < Duration::from_secs(20));
    }

    #[tokio::test(start_paused = true)]
    async fn the_store_says_when() {
        let mut patience = Patience::new(Duration::from_secs(20));
        let start = Instant::now();
        let after = |seconds| Failure {
            error: StoreError::Unavailable(String::new()),
            retry: Retry::After(Duration::from_secs(seconds)),
        };
        assert!(patience.pause(after(3)).await.is_ok());
        assert!(start.elapsed() >= Duration::from_secs(3));
        assert!(patience.pause(after(30)).await.is_err());
        assert!(start.elapsed() < Duration::from_secs(4), "beyond the deadline it does not wait at all");
        assert!(patience.pause(Failure::fatal(StoreError::NotFound(String::new()))).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_is_spent() {
        let mut patience = Patience::new(Duration::from_secs(3));
        let second = Duration::from_secs(1);
        assert_eq!(patience.wait(second * 5, tokio::time::sleep(second)).await, Some(()));
        assert_eq!(patience.wait(second, std::future::pending::<()>()).await, None);
        tokio::time::sleep(second * 5).await;
        assert_eq!(patience.wait(second * 5, std::future::pending::<()>()).await, None);
        assert!(patience.left().is_zero());
    }
}
