//! When a dataset's sources were last listed, and when they are to be listed again.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How much earlier than it has to a listing begins: what it finds is told to others after it.
const MARGIN: Duration = Duration::from_secs(1);
/// Shortest pause between listings.
const LEAST: Duration = Duration::from_millis(500);

/// A listing of all sources that came to its end.
#[derive(Clone, Copy, Debug)]
struct Listed {
    began: Instant,
    took: Duration,
}

/// When the sources were last listed, by this worker.
#[derive(Debug, Default)]
pub(crate) struct Sync(Mutex<Option<Listed>>);

impl Sync {
    /// A listing that began then has come to its end.
    pub(crate) fn done(&self, began: Instant) {
        *self.0.lock() = Some(Listed { began, took: began.elapsed() });
    }

    /// How old what is seen of the sources is at most; `None` before the first listing.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.0.lock().map(|listed| listed.began.elapsed())
    }

    /// How long until the next listing is to begin. Without an interval there is none.
    pub(crate) fn pause(&self, interval: Option<Duration>) -> Duration {
        let Some(interval) = interval else { return Duration::MAX };
        let Some(Listed { began, took }) = *self.0.lock() else { return Duration::ZERO };
        // What changes as a listing begins is seen when the next one ends.
        let wait = interval.saturating_sub(took + MARGIN).max(2 * took).max(took + LEAST);
        wait.saturating_sub(began.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_next_listing_ends_within_the_interval() {
        let sync = Sync::default();
        let interval = Some(Duration::from_secs(60));
        assert_eq!((sync.pause(None), sync.pause(interval)), (Duration::MAX, Duration::ZERO));
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(10)).await;
        sync.done(began);
        // Begun after 49 s, it ends after 59 s.
        assert_eq!(sync.pause(interval), Duration::from_secs(39));
        tokio::time::advance(Duration::from_secs(39)).await;
        assert_eq!(sync.pause(interval), Duration::ZERO);
        assert_eq!(sync.age(), Some(Duration::from_secs(49)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_listing_that_takes_long_leaves_a_pause() {
        let sync = Sync::default();
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(50)).await;
        sync.done(began);
        assert_eq!(sync.pause(Some(Duration::from_secs(60))), Duration::from_secs(50));
        // An edit of the interval counts at once.
        assert_eq!(sync.pause(Some(Duration::from_secs(3600))), Duration::from_secs(3600 - 51 - 50));
    }
}
