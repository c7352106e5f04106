//! How many requests a second a source may get from this process, as whoever shares out its budget says from moment to
//! moment, and how long it wants to be left alone.

use std::{
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Mutex as Turn, Notify},
    time::{Instant, timeout_at},
};

use crate::requests::Verb;

/// How far requests may run ahead of their rate, so that they do not wait for single ticks; one may at least.
const BURST: f64 = 0.1;

/// Token buckets, one for each kind of request: what a lease gives, and after its end half of that, until there is
/// another one. Without any lease there is no limit. Who waits is served in the order of coming.
#[derive(Debug, Default)]
pub struct Allowance {
    get: Bucket,
    list: Bucket,
    head: Bucket,
}

/// How a kind of request is used. What is counted is counted from the start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Requests that were wanted.
    pub wanted: u64,
    /// Whether one waits for its turn now.
    pub waiting: bool,
    /// Requests that the source turned away because they were too many (429 and 503).
    pub throttled: u64,
    /// How long the source wants to be left alone from now on.
    pub hold: Duration,
    /// Requests per second that may go out now; `None`: as many as can be.
    pub rate: Option<f64>,
}

impl Usage {
    /// The longest that a source is left alone because it said so.
    pub const LONGEST_HOLD: Duration = Duration::from_secs(30);
}

impl Allowance {
    /// So many requests a second may go out for `time`, and half of them after that. With the first lease comes one request
    /// that need not wait.
    pub fn lend(&self, verb: Verb, rate: f64, time: Duration) {
        let bucket = self.bucket(verb);
        bucket.refill(|state, now| {
            let before = state.lease.replace(Lease { rate: rate.max(0.0), until: now + time });
            if before.is_none() {
                (state.tokens, state.kept) = (1.0, 0);
            }
        });
    }

    /// As many requests as can be may go out.
    pub fn unlimited(&self, verb: Verb) {
        self.bucket(verb).refill(|state, _| state.lease = None);
    }

    /// Nothing goes out for `time`, at most 30 s.
    pub fn hold(&self, verb: Verb, time: Duration) {
        let until = Instant::now() + time.min(Usage::LONGEST_HOLD);
        let mut state = self.bucket(verb).state.lock();
        state.hold = Some(state.hold.map_or(until, |known| known.max(until)));
    }

    /// How it is used.
    pub fn usage(&self, verb: Verb) -> Usage {
        let bucket = self.bucket(verb);
        let state = bucket.state.lock();
        let now = Instant::now();
        Usage {
            wanted: bucket.wanted.load(Ordering::Relaxed),
            // The first in a line holds these for as long as it waits.
            waiting: bucket.turn.try_lock().is_err() || bucket.spare.try_lock().is_err(),
            throttled: bucket.throttled.load(Ordering::Relaxed),
            hold: state.hold.map_or(Duration::ZERO, |until| until.saturating_duration_since(now)),
            rate: state.rate(now),
        }
    }

    /// The source turned a request away, and perhaps said for how long.
    pub(crate) fn throttled(&self, verb: Verb, hold: Option<Duration>) {
        self.bucket(verb).throttled.fetch_add(1, Ordering::Relaxed);
        if let Some(time) = hold {
            self.hold(verb, time);
        }
    }

    /// Waits until a request may go out for which nobody is in a hurry: after all for which somebody is. Its place is kept for
    /// whichever request comes next. There is no deadline: it takes as long as it takes.
    pub async fn wait_spare(&self, verb: Verb) {
        let bucket = self.bucket(verb);
        let _next = bucket.spare.lock().await;
        loop {
            let changed = bucket.changed.notified();
            // Held for a moment only: who is in a hurry holds it while it waits.
            let turn = bucket.turn.lock().await;
            let wait = bucket.try_take();
            match wait {
                Ok(()) => return bucket.state.lock().keep(),
                Err(at) => {
                    drop(turn);
                    wait_until(at, changed).await;
                }
            }
        }
    }

    /// Waits until a request may go out.
    pub(crate) async fn take(&self, verb: Verb) {
        let bucket = self.bucket(verb);
        bucket.wanted.fetch_add(1, Ordering::Relaxed);
        let _turn = bucket.turn.lock().await;
        loop {
            let changed = bucket.changed.notified();
            match bucket.try_take() {
                Ok(()) => return,
                Err(at) => wait_until(at, changed).await,
            }
        }
    }

    fn bucket(&self, verb: Verb) -> &Bucket {
        match verb {
            Verb::Get => &self.get,
            Verb::List => &self.list,
            Verb::Head => &self.head,
        }
    }
}

/// Waits for a time, or for a change.
async fn wait_until(at: Option<Instant>, changed: impl Future<Output = ()>) {
    match at {
        Some(at) => drop(timeout_at(at, changed).await),
        None => changed.await,
    }
}

#[derive(Debug, Default)]
struct Bucket {
    wanted: AtomicU64,
    throttled: AtomicU64,
    state: Mutex<State>,
    /// Whoever has it is the next to go; tokio's lock is fair.
    turn: Turn<()>,
    /// The same for those that are in no hurry.
    spare: Turn<()>,
    /// The rate changed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    lease: Option<Lease>,
    /// What may go out at once, as of `at`.
    tokens: f64,
    at: Option<Instant>,
    /// Tokens that were taken for requests that are still to come.
    kept: u32,
    hold: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    rate: f64,
    until: Instant,
}

impl State {
    fn rate(&self, now: Instant) -> Option<f64> {
        self.lease.map(|Lease { rate, until }| if now < until { rate } else { rate / 2.0 })
    }

    /// Keeps a token that was taken for whoever comes next.
    fn keep(&mut self) {
        // Without a limit there is nothing to keep.
        self.kept += u32::from(self.lease.is_some());
    }

    /// Adds what came since the last time.
    fn refill(&mut self, now: Instant) {
        let since = self.at.replace(now);
        let Some(rate) = self.rate(now) else { return };
        let came = since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64() * rate);
        self.tokens = (self.tokens + came).min((rate * BURST).max(1.0));
    }
}

impl Bucket {
    /// Changes the rate. What came by the old one is kept.
    fn refill(&self, change: impl FnOnce(&mut State, Instant)) {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.refill(now);
        change(&mut state, now);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Takes one, or says when to come back; `None`: when the rate has changed.
    fn try_take(&self) -> Result<(), Option<Instant>> {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.refill(now);
        if let Some(until) = state.hold.filter(|until| *until > now) {
            return Err(Some(until));
        }
        let Some(rate) = state.rate(now) else { return Ok(()) };
        if state.kept > 0 {
            state.kept -= 1;
            return Ok(());
        }
        if state.tokens >= 1.0 {
            state.tokens -= 1.0;
            return Ok(());
        }
        if rate <= 0.0 {
            return Err(None);
        }
        let mut wait = (1.0 - state.tokens) / rate;
        // From the lease's end on it takes twice as long; looking again then is simpler than reckoning with it.
        if let Some(Lease { until, .. }) = state.lease
            && until > now
        {
            wait = wait.min((until - now).as_secs_f64());
        }
        // A moment more than it takes, so that rounding does not make it come too early.
        Err(Some(now + Duration::from_secs_f64(wait.min(3600.0)) + Duration::from_micros(1)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use tokio::time::{advance, sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    async fn in_time(allowance: &Allowance, time: Duration) -> u32 {
        let mut taken = 0;
        let taking = async {
            loop {
                allowance.take(Verb::Get).await;
                taken += 1;
                // Without a limit it would never end.
                sleep(Duration::from_millis(1)).await;
            }
        };
        let _end = timeout(time, taking).await;
        taken
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_gives_its_rate_and_half_of_it_afterwards() {
        let allowance = Allowance::default();
        assert!(in_time(&allowance, SECOND).await > 900);
        allowance.lend(Verb::Get, 20.0, SECOND * 10);
        assert!((199..=203).contains(&in_time(&allowance, SECOND * 10).await));
        assert!((98..=102).contains(&in_time(&allowance, SECOND * 10).await));
        allowance.lend(Verb::Get, 0.5, HOUR);
        assert!((9..=11).contains(&in_time(&allowance, SECOND * 20).await));
        // Another kind is another matter.
        assert_eq!(allowance.usage(Verb::List), Usage::default());
        allowance.unlimited(Verb::Get);
        assert!(in_time(&allowance, SECOND).await > 900);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_earns_no_more_than_a_burst() {
        let allowance = Allowance::default();
        allowance.lend(Verb::Get, 10.0, HOUR);
        sleep(SECOND * 60).await;
        assert!((10..=12).contains(&in_time(&allowance, SECOND).await));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_learns_of_a_new_rate() {
        let allowance = Arc::new(Allowance::default());
        allowance.lend(Verb::Get, 0.0, HOUR);
        // There is one at first.
        allowance.take(Verb::Get).await;
        let waiting = tokio::spawn({
            let allowance = allowance.clone();
            async move { allowance.take(Verb::Get).await }
        });
        advance(HOUR).await;
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert!(allowance.usage(Verb::Get).waiting);
        allowance.lend(Verb::Get, 10.0, HOUR);
        timeout(SECOND, waiting).await.unwrap().unwrap();
        let usage = allowance.usage(Verb::Get);
        assert_eq!((usage.wanted, usage.waiting, usage.rate), (2, false, Some(10.0)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_in_no_hurry_waits_for_all_others() {
        let allowance = Arc::new(Allowance::default());
        allowance.lend(Verb::Get, 10.0, HOUR);
        let loading = tokio::spawn({
            let allowance = allowance.clone();
            async move {
                let mut taken = 0;
                while taken < 60 {
                    allowance.wait_spare(Verb::Get).await;
                    allowance.take(Verb::Get).await;
                    taken += 1;
                }
            }
        });
        // A reader is never behind more than one of them, however many wait; together they keep the rate.
        let begin = Instant::now();
        for _ in 0..20 {
            sleep(Duration::from_millis(150)).await;
            let came = Instant::now();
            allowance.take(Verb::Get).await;
            assert!(came.elapsed() <= Duration::from_millis(210), "{:?}", came.elapsed());
        }
        loading.await.unwrap();
        assert!((7.7..=8.1).contains(&begin.elapsed().as_secs_f64()), "{:?}", begin.elapsed());
        // Readers that take all leave nothing.
        let waiting = {
            let allowance = allowance.clone();
            tokio::spawn(async move { allowance.wait_spare(Verb::Get).await })
        };
        let readers = (0..30).map(|_| allowance.take(Verb::Get));
        futures::future::join_all(readers).await;
        assert!(!waiting.is_finished() && allowance.usage(Verb::Get).waiting);
        timeout(SECOND, waiting).await.unwrap().unwrap();
        // What was kept for it is not lost; without a limit nothing is kept.
        let now = Instant::now();
        allowance.take(Verb::Get).await;
        assert_eq!(now.elapsed(), Duration::ZERO);
        allowance.unlimited(Verb::Get);
        for _ in 0..100 {
            allowance.wait_spare(Verb::Get).await;
        }
        allowance.lend(Verb::Get, 10.0, HOUR);
        assert!((10..=12).contains(&in_time(&allowance, SECOND).await));
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_is_left_alone_when_it_says_so() {
        let allowance = Allowance::default();
        allowance.throttled(Verb::Get, None);
        allowance.throttled(Verb::Get, Some(SECOND * 3));
        allowance.throttled(Verb::Get, Some(SECOND));
        let usage = allowance.usage(Verb::Get);
        assert_eq!((usage.throttled, usage.hold), (3, SECOND * 3));
        let begin = Instant::now();
        allowance.take(Verb::Get).await;
        assert!(begin.elapsed() >= SECOND * 3);
        allowance.hold(Verb::Get, HOUR);
        timeout(Usage::LONGEST_HOLD + SECOND, allowance.take(Verb::Get)).await.unwrap();
    }
}
