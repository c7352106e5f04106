//! Which loads go on: while one of a higher priority is under way on this worker, those of lower ones wait.

use std::collections::BTreeMap;

use tokio::sync::watch;

/// The loads under way, by priority.
#[derive(Default)]
pub(crate) struct Loads(watch::Sender<BTreeMap<i32, usize>>);

/// A load that is under way.
pub(super) struct UnderWay<'a> {
    loads: &'a Loads,
    priority: i32,
}

impl Loads {
    /// A load begins; it has ended when what this gives is dropped.
    pub(super) fn begin(&self, priority: i32) -> UnderWay<'_> {
        self.0.send_modify(|loads| *loads.entry(priority).or_default() += 1);
        UnderWay { loads: self, priority }
    }

    /// Waits until none of a higher priority is under way.
    pub(super) async fn wait(&self, priority: i32) {
        let is_first =
            |loads: &BTreeMap<i32, usize>| loads.keys().next_back().is_none_or(|highest| *highest <= priority);
        // The sender is this one's own.
        let _ = self.0.subscribe().wait_for(is_first).await;
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.loads.0.send_modify(|loads| {
            if let Some(count) = loads.get_mut(&self.priority) {
                *count -= 1;
                if *count == 0 {
                    loads.remove(&self.priority);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn lower_ones_wait_for_higher_ones() {
        let loads = Loads::default();
        let goes_on = |priority| loads.wait(priority).now_or_never().is_some();
        let low = loads.begin(-1);
        assert!(goes_on(-1) && !goes_on(-2));
        let (high, other) = (loads.begin(5), loads.begin(5));
        assert!(goes_on(5) && !goes_on(-1));
        drop(high);
        assert!(!goes_on(-1));
        drop(other);
        assert!(goes_on(-1));
        drop(low);
        assert!(goes_on(i32::MIN));
    }
}
