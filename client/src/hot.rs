//! Chunks that several workers are asked for in turns, because one of them said that it is busy with them.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long what a worker said holds: then the first of the order is asked again, and says it again if it is so.
const HOLDS: Duration = Duration::from_secs(30);
/// Chunks that are remembered: 64 KB.
const MOST: usize = 1024;

/// What owners of chunks said lately.
#[derive(Default)]
pub(crate) struct Hot {
    known: Mutex<HashMap<u64, (u8, Instant)>>,
    /// Usually there are none, and nobody takes the lock.
    count: AtomicUsize,
}

impl Hot {
    /// An answer about the chunk of this placement key said that so many workers hold it; 1: nothing special.
    pub(crate) fn told(&self, key: u64, workers: u8) {
        // Others than the owner do not know.
        if workers < 2 {
            return;
        }
        let now = Instant::now();
        let mut known = self.known.lock();
        if known.len() >= MOST && !known.contains_key(&key) {
            known.retain(|_, (_, until)| *until > now);
            if known.len() >= MOST {
                return;
            }
        }
        known.insert(key, (workers, now + HOLDS));
        self.count.store(known.len(), Ordering::Relaxed);
    }

    /// How many workers are asked for it in turns.
    pub(crate) fn workers(&self, key: u64) -> usize {
        if self.count.load(Ordering::Relaxed) == 0 {
            return 1;
        }
        let mut known = self.known.lock();
        let Some((workers, until)) = known.get(&key).copied() else { return 1 };
        if until <= Instant::now() {
            known.remove(&key);
            self.count.store(known.len(), Ordering::Relaxed);
            return 1;
        }
        workers.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_said_holds_for_a_while_and_is_bounded() {
        let hot = Hot::default();
        assert_eq!(hot.workers(7), 1);
        hot.told(7, 3);
        hot.told(8, 1);
        assert_eq!((hot.workers(7), hot.workers(8)), (3, 1));
        for key in 100..100 + 2 * MOST as u64 {
            hot.told(key, 2);
        }
        assert_eq!(hot.known.lock().len(), MOST);
        assert_eq!(hot.workers(7), 3);
        tokio::time::advance(HOLDS).await;
        assert_eq!(hot.workers(7), 1);
        hot.told(9, 2);
        hot.told(10, 2);
        assert_eq!((hot.workers(9), hot.workers(10)), (2, 2));
        assert_eq!(hot.known.lock().len(), 2, "what is over makes room");
    }
}
