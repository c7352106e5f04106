//! One operation at a time for each volume.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::OwnedMutexGuard, time::timeout};

use crate::error::VolumeError;

/// Locks by volume; those that nobody holds or waits for are forgotten.
#[derive(Default)]
pub struct Locks(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

/// The right to work on a volume. It is given to the work itself, which may go on when its caller has gone.
pub type Held = OwnedMutexGuard<()>;

impl Locks {
    /// Waits for the operation before, but not for ever.
    pub async fn hold(&self, volume: &str, patience: Duration) -> Result<Held, VolumeError> {
        let lock = {
            let mut locks = self.0.lock();
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(volume.to_owned()).or_default())
        };
        timeout(patience, lock.lock_owned()).await.map_err(|_| VolumeError::Pending(volume.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_and_nothing_is_kept() {
        let locks = Locks::default();
        let short = Duration::from_millis(10);
        let held = locks.hold("a", short).await.unwrap();
        let other = locks.hold("b", short).await.unwrap();
        assert!(matches!(locks.hold("a", short).await, Err(VolumeError::Pending(volume)) if volume == "a"));
        drop(held);
        let again = locks.hold("a", short).await.unwrap();
        drop((again, other));
        let _last = locks.hold("c", short).await.unwrap();
        assert_eq!(locks.0.lock().len(), 1);
    }
}
