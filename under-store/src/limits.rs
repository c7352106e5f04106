//! What a store is spared: requests at a time, requests per second, bytes in flight.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    Allowance, StoreError,
    patience::{Failure, Patience},
    requests::Verb,
};

/// Bytes in flight are counted in units of 1 KiB: a semaphore hands out at most 2^32 permits at once.
const UNIT: usize = 1024;
/// Most units: 2^22 KiB = 4 TiB would be absurd, and it fits the semaphore.
const MAX_UNITS: usize = u32::MAX as usize;
/// How far requests may run ahead of their rate, so that a burst does not wait for single ticks.
const BURST: Duration = Duration::from_millis(100);

/// Limits of the requests to one store.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Limits {
    /// Requests at a time; one counts until its body has been read or dropped.
    pub concurrency: usize,
    /// Requests per second, retries included; `None`: no limit.
    pub requests_per_second: Option<u32>,
    /// Sum of the ranges that are being read. One request always passes, however large.
    pub bytes_in_flight: usize,
    /// How long a call may wait for the store in all, retries included.
    pub deadline: Duration,
    /// How long the store may be silent before the request is given up and made again.
    pub progress_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // 64 requests of 4 MiB fill the bytes in flight; at 20 ms each they move 12 GB/s.
            concurrency: 64,
            requests_per_second: None,
            bytes_in_flight: 256 << 20,
            deadline: Duration::from_secs(60),
            progress_timeout: Duration::from_secs(10),
        }
    }
}

impl Limits {
    pub(crate) fn validate(&self) -> Result<(), StoreError> {
        let Self { concurrency, requests_per_second, bytes_in_flight, deadline, progress_timeout } = self;
        let positive = *concurrency > 0
            && *requests_per_second != Some(0)
            && *bytes_in_flight > 0
            && !deadline.is_zero()
            && !progress_timeout.is_zero();
        if positive { Ok(()) } else { Err(StoreError::Invalid("the limits of a store must be positive".to_owned())) }
    }
}

/// Enforces [`Limits`], and an [`Allowance`]; waits are first come, first served.
#[derive(Debug)]
pub(crate) struct Limiter {
    allowance: Arc<Allowance>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    units: usize,
    rate: Option<Rate>,
}

/// A request that may go out; it counts until dropped.
#[derive(Debug)]
pub(crate) struct Grant {
    _bytes: Option<OwnedSemaphorePermit>,
    _request: OwnedSemaphorePermit,
}

impl Limiter {
    pub(crate) fn new(limits: &Limits, allowance: Arc<Allowance>) -> Self {
        let units = (limits.bytes_in_flight / UNIT).clamp(1, MAX_UNITS.min(Semaphore::MAX_PERMITS));
        Self {
            allowance,
            requests: Arc::new(Semaphore::new(limits.concurrency.clamp(1, Semaphore::MAX_PERMITS))),
            bytes: Arc::new(Semaphore::new(units)),
            units,
            rate: limits.requests_per_second.map(Rate::new),
        }
    }

    /// What others say of the rate.
    pub(crate) fn allowance(&self) -> &Allowance {
        &self.allowance
    }

    /// Waits until a request for `bytes` may go out.
    pub(crate) async fn grant(&self, patience: &mut Patience, verb: Verb, bytes: u64) -> Result<Grant, Failure> {
        let grant = self.admit(patience, bytes).await?;
        if let Some(rate) = &self.rate {
            let wait = rate.reserve(patience.left()).ok_or_else(|| busy("the rate of requests"))?;
            patience.wait(Duration::MAX, tokio::time::sleep(wait)).await;
        }
        // Last, so that what is lent for this moment goes out in this moment.
        let taken = patience.wait(Duration::MAX, self.allowance.take(verb)).await;
        taken.ok_or_else(|| busy("its share of the source's request budget"))?;
        Ok(grant)
    }

    /// Waits until `bytes` more may be in flight, for a request that was counted.
    pub(crate) async fn admit(&self, patience: &mut Patience, bytes: u64) -> Result<Grant, Failure> {
        // Bytes first: what waits for them must not hold a request that a listing could use.
        let in_flight = match bytes {
            0 => None,
            _ => {
                let units = usize::try_from(bytes.div_ceil(UNIT as u64)).unwrap_or(usize::MAX).clamp(1, self.units);
                // At most MAX_UNITS, which is u32::MAX.
                let acquired = patience.wait(Duration::MAX, self.bytes.clone().acquire_many_owned(units as u32)).await;
                Some(acquired.and_then(Result::ok).ok_or_else(|| busy("bytes in flight"))?)
            }
        };
        let request = patience.wait(Duration::MAX, self.requests.clone().acquire_owned()).await;
        let request = request.and_then(Result::ok).ok_or_else(|| busy("other requests"))?;
        Ok(Grant { _bytes: in_flight, _request: request })
    }
}

fn busy(what: &str) -> Failure {
    Failure::fatal(StoreError::Unavailable(format!("deadline passed while waiting for {what}")))
}

/// A token bucket, kept as the time at which the next request is due.
#[derive(Debug)]
struct Rate {
    interval: Duration,
    due: Mutex<Instant>,
}

impl Rate {
    fn new(per_second: u32) -> Self {
        Self { interval: Duration::from_secs(1) / per_second.max(1), due: Mutex::new(Instant::now()) }
    }

    /// Takes the next place, and says how long to wait for it. `None`: longer than `most`; nothing is taken.
    fn reserve(&self, most: Duration) -> Option<Duration> {
        let mut due = self.due.lock();
        let now = Instant::now();
        // What was not used is forgotten, but for a burst.
        let place = (*due).max(now.checked_sub(BURST).unwrap_or(now));
        let wait = place.saturating_duration_since(now);
        if wait > most {
            return None;
        }
        *due = place + self.interval;
        Some(wait)
    }
}

#[cfg(test)]
impl Limits {
    /// For what must succeed, however busy the machine is.
    pub(crate) fn patient() -> Self {
        Self { deadline: Duration::from_secs(30), ..Self::default() }
    }

    /// Fails fast, so that tests do, but not because the machine is busy: requests are counted.
    pub(crate) fn hasty() -> Self {
        Self { deadline: Duration::from_secs(6), progress_timeout: Duration::from_secs(1), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn limits() -> Limits {
        Limits { concurrency: 2, bytes_in_flight: 10 << 10, deadline: Duration::from_secs(5), ..Limits::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_and_bytes_bound_and_large_requests_pass() {
        let limiter = Limiter::new(&limits(), Arc::default());
        let second = Duration::from_secs(1);
        let large = limiter.grant(&mut Patience::new(second), Verb::Get, 1 << 40).await.unwrap();
        assert!(limiter.grant(&mut Patience::new(second), Verb::Get, 1).await.is_err());
        let other = limiter.grant(&mut Patience::new(second), Verb::Get, 0).await.unwrap();
        assert!(limiter.grant(&mut Patience::new(second), Verb::Get, 0).await.is_err());
        drop(large);
        let _small = limiter.grant(&mut Patience::new(second), Verb::Get, 1).await.unwrap();
        drop(other);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_keep_their_rate() {
        let limiter = Limiter::new(&Limits { requests_per_second: Some(20), ..limits() }, Arc::default());
        let start = Instant::now();
        for _ in 0..41 {
            drop(limiter.grant(&mut Patience::new(Duration::from_secs(60)), Verb::Get, 0).await.unwrap());
        }
        let taken = start.elapsed();
        assert!((1900..=2100).contains(&taken.as_millis()), "{taken:?}");
        assert!(limiter.grant(&mut Patience::new(Duration::ZERO), Verb::Get, 0).await.is_err());
    }

    #[test]
    fn zeros_are_refused() {
        assert!(Limits::default().validate().is_ok());
        assert!(Limits { concurrency: 0, ..Limits::default() }.validate().is_err());
        assert!(Limits { requests_per_second: Some(0), ..Limits::default() }.validate().is_err());
    }
}
