//! Pauses after a watch that failed.

use std::time::Duration;

use kube::runtime::utils::Backoff;

use crate::context::jitter;

/// The first pause, and the longest: an API server that is back is noticed within 5 s.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(3300));

/// Each pause is twice as long as the one before, until something works again.
#[derive(Clone, Debug)]
pub struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(PAUSES.0)
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSES.1);
        Some(jitter(pause))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_five_seconds_and_begin_anew() {
        let mut pauses = Pauses::default();
        let first = pauses.next().unwrap();
        assert!(first < Duration::from_millis(300));
        assert!(pauses.by_ref().take(20).all(|pause| pause < Duration::from_secs(5)));
        assert!(pauses.next().unwrap() > Duration::from_secs(3));
        pauses.reset();
        assert!(pauses.next().unwrap() < Duration::from_millis(300));
    }
}
