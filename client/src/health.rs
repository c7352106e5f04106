//! Whether a member answers.
//!
//! A member is *down* from the moment anybody's connection to it fails until a probe in the background, or a request
//! of somebody who had no better choice, succeeds. Readers never pay for probing. The back-off of probes grows from
//! 100 ms to 5 s; a handshake makes the member usable again, but only an answered request resets the back-off, so that
//! a worker that greets and then breaks is avoided for longer each time.
//!
//! One task for each member that is down; it ends when the member is up, removed, or forgotten.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_protocol::{
    errors::chain,
    handshake::{ConnectionPurpose, RuntimeKey},
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::transport;

const FIRST_PROBE: Duration = Duration::from_millis(100);
const LAST_PROBE: Duration = Duration::from_secs(5);
/// 100 ms * 2^6 is above 5 s.
const MAX_LEVEL: u32 = 6;

/// What is known of a member.
#[derive(Clone, Debug, Default)]
pub(crate) struct Condition {
    /// Avoid it.
    pub(crate) down: bool,
    /// How often it went down.
    pub(crate) downs: u64,
    /// Why, the last time.
    pub(crate) error: Arc<str>,
    level: u32,
}

/// The health of one member at one address.
#[derive(Debug)]
pub(crate) struct Health {
    address: String,
    key: RuntimeKey,
    condition: watch::Sender<Condition>,
    closed: CancellationToken,
    /// Woken when any member of the runtime comes up.
    recovered: Arc<Notify>,
}

impl Health {
    pub(crate) fn new(
        address: String,
        key: RuntimeKey,
        closed: CancellationToken,
        recovered: Arc<Notify>,
    ) -> Arc<Self> {
        Arc::new(Self { address, key, condition: watch::Sender::new(Condition::default()), closed, recovered })
    }

    pub(crate) fn is_down(&self) -> bool {
        self.condition.borrow().down
    }

    pub(crate) fn condition(&self) -> Condition {
        self.condition.borrow().clone()
    }

    /// Resolves when the member goes down after it did so `downs` times.
    pub(crate) async fn goes_down(&self, downs: u64) -> Arc<str> {
        let mut receiver = self.condition.subscribe();
        // The sender lives in self, so the wait cannot end with its loss.
        let found =
            receiver.wait_for(|condition| condition.downs > downs).await.map(|condition| condition.error.clone());
        match found {
            Ok(error) => error,
            Err(_) => std::future::pending().await,
        }
    }

    /// Its connection failed: everybody avoids it from now on.
    pub(crate) fn mark_down(self: &Arc<Self>, error: &str) {
        if self.closed.is_cancelled() {
            return;
        }
        let mut probe = None;
        self.condition.send_modify(|condition| {
            condition.error = error.into();
            condition.downs += 1;
            if !condition.down {
                condition.down = true;
                probe = Some(condition.level);
                condition.level = (condition.level + 1).min(MAX_LEVEL);
            }
        });
        if let Some(level) = probe {
            tracing::warn!(address = %self.address, error, "worker is avoided");
            tokio::spawn(probe_until_up(Arc::downgrade(self), self.closed.clone(), level));
        }
    }

    /// It answered a request.
    pub(crate) fn mark_ok(&self) {
        {
            let condition = self.condition.borrow();
            if !condition.down && condition.level == 0 {
                return;
            }
        }
        self.up(true);
    }

    fn up(&self, answered: bool) {
        let mut changed = false;
        self.condition.send_modify(|condition| {
            changed = condition.down;
            condition.down = false;
            if answered {
                condition.level = 0;
            }
        });
        if changed {
            tracing::info!(address = %self.address, "worker is used again");
            self.recovered.notify_waiters();
        }
    }
}

/// A random part of `delay`, between its half and the whole, so that clients do not move in step.
pub(crate) fn jittered(delay: Duration) -> Duration {
    delay.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

async fn probe_until_up(health: Weak<Health>, closed: CancellationToken, level: u32) {
    let mut delay = (FIRST_PROBE * 2u32.pow(level)).min(LAST_PROBE);
    let probing = async {
        loop {
            tokio::time::sleep(jittered(delay)).await;
            let Some(health) = health.upgrade() else { return };
            if !health.is_down() {
                return;
            }
            match transport::connect(&health.address, &health.key, ConnectionPurpose::Data).await {
                Ok(_) => return health.up(false),
                Err(error) => {
                    tracing::debug!(address = %health.address, error = chain(&error), "probe failed")
                }
            }
            delay = (delay * 2).min(LAST_PROBE);
        }
    };
    tokio::select! {
        () = closed.cancelled() => {}
        () = probing => {}
    }
}
