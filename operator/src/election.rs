//! One of several operators works: the one whose name is in the Lease.
//!
//! As in client-go, no clocks of two machines are compared: a Lease is over when its holder has not touched it for as
//! long as it promised, by the clock of who looks. A holder gives up well before that, so that two never work at once.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use rand::RngExt as _;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::{
    args::RunArgs,
    context::{CallError, jitter, within},
    labels::MANAGER,
};

/// Name of the Lease.
const NAME: &str = "forebay-operator";
/// How long a holder may be silent before others take over.
const PROMISE: Duration = Duration::from_secs(15);
/// How long a holder tries to renew before it gives up; 5 s before others may begin.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How often a holder renews, and others look; up to half of it more is jitter.
const EVERY: Duration = Duration::from_secs(2);
/// How long one call may take: two fit into the time before a holder gives up.
const CALL: Duration = Duration::from_secs(4);

/// Takes part in the election.
pub struct Election {
    api: Api<Lease>,
    identity: String,
    /// The Lease as it was written last, while it is held.
    held: Arc<Mutex<Option<Lease>>>,
}

/// A Lease as it was seen, since when it has not changed.
#[derive(Clone, Debug, PartialEq)]
struct Observed {
    spec: LeaseSpec,
    since: Instant,
}

impl Observed {
    /// What is known after another look.
    fn after(before: Option<Self>, spec: &LeaseSpec, now: Instant) -> Self {
        match before {
            Some(before) if before.spec == *spec => before,
            _ => Self { spec: spec.clone(), since: now },
        }
    }

    /// Whether nobody holds it.
    fn is_free(&self, identity: &str, now: Instant) -> bool {
        let holder = self.spec.holder_identity.as_deref().unwrap_or_default();
        let seconds = self.spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let promise = seconds.map_or(PROMISE, Duration::from_secs);
        holder.is_empty() || holder == identity || now.duration_since(self.since) >= promise
    }
}

/// The spec with which `identity` takes a Lease, or keeps the one that it has.
fn claim(before: Option<&LeaseSpec>, identity: &str, now: Timestamp) -> LeaseSpec {
    let same = before.filter(|before| before.holder_identity.as_deref() == Some(identity));
    let transitions = before.and_then(|before| before.lease_transitions).unwrap_or_default();
    LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: Some(PROMISE.as_secs() as i32),
        acquire_time: same.and_then(|same| same.acquire_time.clone()).or(Some(MicroTime(now))),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(if same.is_some() || before.is_none() { transitions } else { transitions + 1 }),
        ..LeaseSpec::default()
    }
}

impl Election {
    pub fn new(client: Client, args: &RunArgs) -> Self {
        // A restarted container is somebody else: its predecessor may still be at work.
        let identity = format!("{}_{:016x}", args.identity, rand::rng().random::<u64>());
        Self { api: Api::namespaced(client, &args.namespace), identity, held: Arc::default() }
    }

    /// Waits until it is this operator's turn.
    pub async fn win(&self) {
        info!(identity = %self.identity, "waiting to lead");
        let mut observed = None;
        loop {
            match self.look(&mut observed).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => warn!(%error, "the Lease could not be taken"),
            }
            sleep(jitter(EVERY)).await;
        }
    }

    /// Looks once, and takes the Lease if nobody holds it.
    async fn look(&self, observed: &mut Option<Observed>) -> Result<bool, CallError> {
        let Some(lease) = call(self.api.get_opt(NAME)).await? else {
            let metadata = ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() };
            let spec = Some(claim(None, &self.identity, Timestamp::now()));
            let created = call(self.api.create(&params(), &Lease { metadata, spec })).await;
            return self.taken(created);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let now = Instant::now();
        let seen = Observed::after(observed.take(), &spec, now);
        let free = seen.is_free(&self.identity, now);
        *observed = Some(seen);
        if !free {
            return Ok(false);
        }
        self.taken(self.write(lease, claim(Some(&spec), &self.identity, Timestamp::now())).await)
    }

    fn taken(&self, written: Result<Lease, CallError>) -> Result<bool, CallError> {
        match written {
            Ok(lease) => {
                *self.held.lock() = Some(lease);
                Ok(true)
            }
            // Another one was faster.
            Err(error) if error.is(409) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Keeps the Lease, and ends with the reason when it is lost.
    pub async fn keep(&self) -> String {
        let mut renewed = Instant::now();
        loop {
            sleep(EVERY).await;
            match self.renew().await {
                Ok(true) => renewed = Instant::now(),
                Ok(false) => return "another operator has the Lease".into(),
                Err(error) => warn!(%error, "the Lease could not be renewed"),
            }
            if renewed.elapsed() >= GIVE_UP {
                return format!("the Lease could not be renewed for {GIVE_UP:?}");
            }
        }
    }

    async fn renew(&self) -> Result<bool, CallError> {
        let known = self.held.lock().clone();
        // After a write whose fate is unknown, what is there decides.
        let lease = match known {
            Some(lease) => lease,
            None => match call(self.api.get_opt(NAME)).await? {
                Some(lease) => lease,
                None => return Ok(false),
            },
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(self.identity.as_str()) {
            return Ok(false);
        }
        *self.held.lock() = None;
        let written = self.write(lease, claim(Some(&spec), &self.identity, Timestamp::now())).await?;
        *self.held.lock() = Some(written);
        Ok(true)
    }

    /// With the resource version that was seen: of two that write, one fails.
    async fn write(&self, mut lease: Lease, spec: LeaseSpec) -> Result<Lease, CallError> {
        lease.spec = Some(spec);
        call(self.api.replace(NAME, &params(), &lease)).await
    }

    /// Gives the Lease up, so that another one need not wait. Nothing of this operator may be at work any more.
    pub async fn resign(&self) {
        let Some(lease) = self.held.lock().take() else { return };
        let mut spec = lease.spec.clone().unwrap_or_default();
        spec.holder_identity = None;
        if let Err(error) = self.write(lease, spec).await {
            warn!(%error, "the Lease could not be given up");
        }
    }
}

fn params() -> PostParams {
    PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() }
}

async fn call<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    timeout(CALL, within(call)).await.unwrap_or(Err(CallError::Deadline))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(holder: &str, second: i64) -> LeaseSpec {
        claim(None, holder, Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn a_lease_is_free_when_its_holder_is_silent_for_as_long_as_it_promised() {
        let start = Instant::now();
        let first = Observed::after(None, &held("a", 0), start);
        assert!(!first.is_free("b", start + PROMISE / 2));
        assert!(first.is_free("a", start));
        // Renewed: the time begins anew, by the clock of who looks.
        let renewed = Observed::after(Some(first.clone()), &held("a", 3), start + PROMISE / 2);
        assert!(!renewed.is_free("b", start + PROMISE));
        assert!(renewed.is_free("b", start + PROMISE / 2 + PROMISE));
        // Not renewed, however often one looks.
        let same = Observed::after(Some(first), &held("a", 0), start + PROMISE / 2);
        assert!(same.is_free("b", start + PROMISE));
    }

    #[test]
    fn a_lease_that_was_given_up_is_free_at_once() {
        let start = Instant::now();
        let given_up = LeaseSpec { holder_identity: None, ..held("a", 0) };
        assert!(Observed::after(None, &given_up, start).is_free("b", start));
    }

    #[test]
    fn transitions_are_counted_and_renewals_keep_their_beginning() {
        let first = held("a", 0);
        assert_eq!(first.lease_transitions, Some(0));
        let renewed = claim(Some(&first), "a", Timestamp::from_second(9).unwrap());
        assert_eq!((renewed.lease_transitions, &renewed.acquire_time), (Some(0), &first.acquire_time));
        assert_ne!(renewed.renew_time, first.renew_time);
        let other = claim(Some(&renewed), "b", Timestamp::from_second(30).unwrap());
        assert_eq!(other.lease_transitions, Some(1));
        assert_ne!(other.acquire_time, first.acquire_time);
    }

    #[test]
    fn a_holder_gives_up_before_others_begin() {
        // The last renewal that counts may have left just before it succeeded: one call more.
        assert!(GIVE_UP + CALL < PROMISE);
        assert!(EVERY + CALL < GIVE_UP);
    }
}
