//! What all reconcilers work with.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_protocol::errors::chain;
use kube::Client;
use parking_lot::Mutex;
use rand::RngExt as _;

use crate::{
    apply::Applied,
    args::WorkerArgs,
    events::Events,
    key::Master,
    metrics::Metrics,
    poll::Observations,
    watch::{Queues, Stores},
};

/// How long one call of the API server may take.
pub const CALL: Duration = Duration::from_secs(10);
/// How often an object is looked at although nothing happened; the half of it more is jitter.
const RESYNC: Duration = Duration::from_secs(600);
/// How long numbers rest after they were written; up to half of it more is jitter.
pub const NUMBERS: Duration = Duration::from_secs(30);
/// Pause after a reconciliation that failed, doubled with each further one.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Pause after a conflict.
const CONFLICT: Duration = Duration::from_millis(300);

/// What all reconcilers work with.
pub struct Context {
    pub client: Client,
    pub stores: Arc<Stores>,
    pub queues: Queues,
    pub workers: WorkerArgs,
    pub master: Master,
    pub observations: Observations,
    pub applied: Applied,
    pub events: Events,
    pub metrics: Arc<Metrics>,
    /// By UID: what is remembered of an object between its reconciliations.
    pub memory: Mutex<HashMap<String, Memory>>,
}

/// What is remembered of an object between its reconciliations; it may be lost at any time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Reconciliations that failed, one after another.
    pub failures: u32,
    /// When its numbers were last written, and how long they rest from then.
    pub numbers: Option<(Instant, Duration)>,
    /// When its claim was last touched, and how long it rests from then.
    pub touched: Option<(Instant, Duration)>,
    /// When its claim began to go.
    pub deleting: Option<Instant>,
    /// When the pods that use its claim were last listed.
    pub listed: Option<Instant>,
    /// When workers began to forget it.
    pub forgetting: Option<Instant>,
}

impl Memory {
    /// How much longer numbers rest. What was never written rests for a part of the time, so that an operator that
    /// begins does not write everything at once.
    pub fn rest(&mut self, now: Instant) -> Option<Duration> {
        let (written, rest) =
            *self.numbers.get_or_insert_with(|| (now, rand::rng().random_range(Duration::ZERO..NUMBERS)));
        rest.checked_sub(now.duration_since(written)).filter(|rest| !rest.is_zero())
    }
}

impl Memory {
    /// Whether numbers were written too recently to be written again.
    pub fn is_resting(&self, now: Instant) -> bool {
        self.numbers.is_some_and(|(written, rest)| now.duration_since(written) < rest)
    }

    /// Takes a turn that comes with pauses from the first to the last of `pauses`, each twice as long as the one before.
    /// `Some`: it is not time yet.
    pub fn touch(&mut self, now: Instant, pauses: (Duration, Duration)) -> Option<Duration> {
        let next = match self.touched {
            None => pauses.0,
            Some((at, pause)) => match pause.checked_sub(now.duration_since(at)).filter(|rest| !rest.is_zero()) {
                Some(rest) => return Some(rest),
                None => (pause * 2).min(pauses.1),
            },
        };
        self.touched = Some((now, next));
        None
    }
}

impl Context {
    /// Changes what is remembered of an object, or looks at it.
    pub fn remember<T>(&self, uid: &str, change: impl FnOnce(&mut Memory) -> T) -> T {
        change(self.memory.lock().entry(uid.to_owned()).or_default())
    }

    /// How long to wait before the next try after an error, which is counted.
    pub fn backoff(&self, uid: &str, error: &impl ReconcileError) -> Duration {
        if error.is_conflict() {
            return CONFLICT;
        }
        let failures = self.remember(uid, |memory| {
            memory.failures = memory.failures.saturating_add(1);
            memory.failures
        });
        let pause = RETRY.0.saturating_mul(1 << (failures - 1).min(10)).min(RETRY.1);
        jitter(pause)
    }

    /// Forgets objects that are no more.
    pub fn sweep(&self) {
        let datasets = self.stores.datasets.state();
        let runtimes = self.stores.runtimes.state();
        let uids = datasets.iter().filter_map(|object| object.metadata.uid.as_deref());
        let policies = self.stores.policies.state();
        let uids = uids.chain(runtimes.iter().filter_map(|o| o.metadata.uid.as_deref()));
        let uids: HashSet<&str> = uids.chain(policies.iter().filter_map(|o| o.metadata.uid.as_deref())).collect();
        self.memory.lock().retain(|uid, _| uids.contains(uid.as_str()));
        self.applied.retain(&uids);
        self.metrics.datasets.set(i64::try_from(datasets.len()).unwrap_or(i64::MAX));
        self.metrics.runtimes.set(i64::try_from(runtimes.len()).unwrap_or(i64::MAX));
    }
}

/// `time` and up to half of it more.
pub fn jitter(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(1.0..1.5))
}

/// When to look again at an object that is as it should be.
pub fn resync() -> Duration {
    jitter(RESYNC)
}

/// Why a call of the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It said so, or was not reached.
    #[error("{}", said(.0))]
    Api(kube::Error),
    /// Nobody answered.
    #[error("the API server did not answer within {CALL:?}")]
    Deadline,
}

impl CallError {
    /// What the API server answered.
    pub fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api(kube::Error::Api(status)) => Some(status),
            _ => None,
        }
    }

    /// Whether the namespace is on its way out, so that nothing can be made in it any more.
    pub fn is_end_of_namespace(&self) -> bool {
        let causes = self.status().and_then(|status| status.details.as_ref()).map(|details| &details.causes);
        causes.is_some_and(|causes| causes.iter().any(|cause| cause.reason == "NamespaceTerminating"))
    }

    /// Whether it is this HTTP code.
    pub fn is(&self, code: u16) -> bool {
        self.status().is_some_and(|status| status.code == code)
    }
}

/// An error of a reconciliation.
pub trait ReconcileError: std::error::Error + 'static {
    /// Whether the object changed, or went, while it was looked at: the change is on its way to us.
    fn is_conflict(&self) -> bool;
}

/// What the API server said, or why it said nothing.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => chain(other),
    }
}

/// A call of the API server with a deadline.
pub async fn within<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => answer.map_err(CallError::Api),
        Err(_) => Err(CallError::Deadline),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_less_and_less_often() {
        let pauses = (Duration::from_secs(1), Duration::from_secs(3));
        let start = Instant::now();
        let mut memory = Memory::default();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(memory.touch(at(0), pauses), None);
        assert_eq!(memory.touch(at(0), pauses), Some(Duration::from_secs(1)));
        assert_eq!(memory.touch(at(1), pauses), None);
        assert_eq!(memory.touch(at(2), pauses), Some(Duration::from_secs(1)));
        assert_eq!(memory.touch(at(3), pauses), None);
        assert_eq!(memory.touch(at(3), pauses), Some(Duration::from_secs(3)));
    }

    #[test]
    fn numbers_rest_after_they_were_written() {
        let start = Instant::now();
        let mut memory = Memory { numbers: Some((start, NUMBERS)), ..Memory::default() };
        assert_eq!(memory.rest(start), Some(NUMBERS));
        assert_eq!(memory.rest(start + NUMBERS), None);
        // An operator that begins does not write all at once.
        let first = Memory::default().rest(start);
        assert!(first.is_none_or(|rest| rest <= NUMBERS));
    }
}
