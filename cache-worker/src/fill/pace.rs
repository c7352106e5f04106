//! How fast a load may ask the sources, at most.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// How far requests may run ahead of their rate, so that they do not wait for single ticks of the clock.
const BURST: Duration = Duration::from_millis(100);

/// Two token buckets, kept as the times at which the next byte and the next request are due. What was not used is
/// forgotten, but for a burst. A request larger than the burst goes out whole, and the next ones wait for it.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Seconds.
    of_byte: f64,
    of_request: f64,
    due: Mutex<Due>,
}

#[derive(Debug)]
struct Due {
    bytes: Instant,
    requests: Instant,
}

impl Pace {
    /// Of so many bytes and requests a second; `None`: as many as can be. `None` of both is no pace.
    pub(crate) fn new(bytes: Option<f64>, requests: Option<f64>) -> Option<Self> {
        let of = |rate: Option<f64>| rate.filter(|rate| *rate > 0.0).map_or(0.0, |rate| 1.0 / rate);
        let now = Instant::now();
        let pace =
            Self { of_byte: of(bytes), of_request: of(requests), due: Mutex::new(Due { bytes: now, requests: now }) };
        (pace.of_byte > 0.0 || pace.of_request > 0.0).then_some(pace)
    }

    /// Waits until a request for so many bytes may go out. Who does not wait for the end has its place taken all the same.
    pub(super) async fn wait(&self, bytes: u64) {
        let at = {
            let mut due = self.due.lock();
            let now = Instant::now();
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let Due { bytes: for_bytes, requests } = &mut *due;
            let at = (*for_bytes).max(*requests).max(now);
            *for_bytes = (*for_bytes).max(earliest) + Duration::from_secs_f64(self.of_byte * bytes as f64);
            *requests = (*requests).max(earliest) + Duration::from_secs_f64(self.of_request);
            at
        };
        sleep_until(at).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn taken(pace: &Pace, requests: u32, bytes: u64) -> f64 {
        let begin = Instant::now();
        for _ in 0..requests {
            pace.wait(bytes).await;
        }
        begin.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn the_slower_of_both_decides() {
        let bytes = Pace::new(Some(1000.0), None).unwrap();
        assert!((9.8..=10.1).contains(&taken(&bytes, 101, 100).await));
        let requests = Pace::new(None, Some(20.0)).unwrap();
        assert!((1.8..=2.1).contains(&taken(&requests, 41, 1 << 40).await));
        let both = Pace::new(Some(1000.0), Some(20.0)).unwrap();
        assert!((9.8..=10.1).contains(&taken(&both, 101, 100).await));
        assert!((4.8..=5.1).contains(&taken(&both, 101, 1).await));
        assert!(Pace::new(None, Some(0.0)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_earns_no_more_than_a_burst() {
        let pace = Pace::new(None, Some(10.0)).unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!((0.8..=1.1).contains(&taken(&pace, 11, 0).await));
    }
}
