//! Who may make how many of the requests that a source may get a second.
//!
//! What is lent at one moment is never more than the budget: whoever is to have more waits until the others have come and
//! got less. All of it is lent, as far as those who come want it, and what nobody wants is spread evenly, so that who
//! suddenly wants some has some.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// How long a share may be used. Whoever is gone keeps its share from the others for so long.
pub(super) const LEASE: Duration = Duration::from_secs(2);
/// Above what it wanted lately a worker gets so much, so that it can grow.
const GROWTH: f64 = 1.25;
/// Part of the budget that is for those who want nothing now.
const IDLE: f64 = 0.05;
/// After a source turned requests away, the budget is so much of what it was, but for the least part.
const CUT: f64 = 0.7;
const LEAST: f64 = 0.05;
/// How often it is cut at most: what was under way at the time of a cut is turned away for the same reason.
const CUT_PAUSE: Duration = Duration::from_secs(1);
/// How much of the whole budget comes back in a second in which nothing is turned away.
const RECOVERY: f64 = 0.02;

/// What a worker wants.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Want {
    /// Requests per second that it wanted lately.
    pub(super) rate: f64,
    /// Some wait for their turn now, so it wants as many as it can get.
    pub(super) waiting: bool,
    /// What it may do at this moment.
    pub(super) held: f64,
    /// Requests that the source turned away since it last came.
    pub(super) throttled: u64,
    /// How long the source wants to be left alone.
    pub(super) hold: Duration,
}

/// The shares of one source's budget for one kind of request.
#[derive(Debug)]
pub(super) struct Shares {
    budget: f64,
    /// The part of the budget that the source takes.
    part: f64,
    /// When the part was last cut, and last looked at.
    cut: Option<Instant>,
    looked: Instant,
    hold: Instant,
    /// Until then who comes gets no more than it has: others may have leases of a grantor before this one.
    learning: Instant,
    last: Instant,
    leases: BTreeMap<String, Lease>,
}

#[derive(Debug)]
struct Lease {
    want: Want,
    rate: f64,
    until: Instant,
}

impl Shares {
    /// `budget` is in requests per second.
    pub(super) fn new(budget: f64, now: Instant) -> Self {
        Self {
            budget,
            part: 1.0,
            cut: None,
            looked: now,
            hold: now,
            learning: now + LEASE,
            last: now,
            leases: BTreeMap::new(),
        }
    }

    /// Another budget; what is lent stays lent until its end.
    pub(super) fn set_budget(&mut self, budget: f64) {
        self.budget = budget;
    }

    /// A share for `worker`, until [`LEASE`] from now, and how long the source is to be left alone.
    pub(super) fn lend(&mut self, worker: &str, want: Want, now: Instant) -> (f64, Duration) {
        if now.saturating_duration_since(self.last) > LEASE {
            // This worker was asleep: somebody else may have lent since.
            self.learning = now + LEASE;
        }
        self.last = now;
        self.obey(&want, now);
        self.leases.retain(|_, lease| lease.until > now);
        let others: f64 = self.leases.iter().filter(|(name, _)| *name != worker).map(|(_, lease)| lease.rate).sum();
        self.leases.insert(worker.to_owned(), Lease { want, rate: 0.0, until: now + LEASE });
        let budget = self.budget * self.part;
        let mut rate = self.share(worker, budget).min(budget - others).max(0.0);
        if now < self.learning {
            rate = rate.min(want.held);
        }
        if let Some(lease) = self.leases.get_mut(worker) {
            lease.rate = rate;
        }
        (rate, self.hold.saturating_duration_since(now))
    }

    /// Does what the source says.
    fn obey(&mut self, want: &Want, now: Instant) {
        self.hold = self.hold.max(now + want.hold);
        let since = now.saturating_duration_since(self.looked).as_secs_f64();
        self.looked = now;
        if self.cut.is_some_and(|cut| now.saturating_duration_since(cut) < CUT_PAUSE) {
            return;
        }
        if want.throttled == 0 {
            self.part = (self.part + RECOVERY * since).min(1.0);
        } else {
            self.part = (self.part * CUT).max(LEAST);
            self.cut = Some(now);
        }
    }

    /// What a worker is to have when all have come: who wants less than an even part gets what it wants, and what is left
    /// is spread over the others, or over all when nobody wants more.
    fn share(&self, worker: &str, budget: f64) -> f64 {
        let idle = budget * IDLE / self.leases.len() as f64;
        let wants = |lease: &Lease| match lease.want.waiting {
            true => f64::INFINITY,
            false => lease.want.rate * GROWTH + idle,
        };
        let mut sorted: Vec<f64> = self.leases.values().map(wants).collect();
        sorted.sort_by(f64::total_cmp);
        let (mut left, mut level) = (budget, None);
        for (index, want) in sorted.iter().enumerate() {
            let even = left / (sorted.len() - index) as f64;
            if *want > even {
                level = Some(even);
                break;
            }
            left -= want;
        }
        let own = self.leases.get(worker).map_or(0.0, wants);
        level.map_or(own + left / sorted.len() as f64, |level| own.min(level))
    }

    /// What is lent at this moment.
    #[cfg(test)]
    fn lent(&self, now: Instant) -> f64 {
        self.leases.values().filter(|lease| lease.until > now).map(|lease| lease.rate).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUND: Duration = Duration::from_millis(500);

    fn waiting(held: f64) -> Want {
        Want { waiting: true, held, ..Want::default() }
    }

    /// Rounds in which each of `workers` comes with its want; what each has at the end.
    fn rounds(shares: &mut Shares, now: &mut Instant, count: u32, workers: &[(&str, Want)]) -> Vec<f64> {
        let mut held: Vec<f64> = workers.iter().map(|(_, want)| want.held).collect();
        for _ in 0..count {
            for ((name, want), held) in workers.iter().zip(&mut held) {
                *held = shares.lend(name, Want { held: *held, ..*want }, *now).0;
            }
            *now += ROUND;
        }
        held
    }

    fn is_all(held: &[f64]) -> bool {
        (held.iter().sum::<f64>() - 100.0).abs() < 1e-6
    }

    #[test]
    fn all_is_lent_to_who_wants_it() {
        let mut now = Instant::now();
        let mut shares = Shares::new(100.0, now);
        let three = [("a", waiting(16.0)), ("b", waiting(16.0)), ("c", waiting(16.0))];
        // What was held before, until all must have come.
        assert_eq!(rounds(&mut shares, &mut now, 4, &three), [16.0; 3]);
        let held = rounds(&mut shares, &mut now, 3, &three);
        assert!(held.iter().all(|held| (held - 100.0 / 3.0).abs() < 1e-6), "{held:?}");
        // One that wants little leaves the rest to the others.
        let little = Want { rate: 4.0, ..Want::default() };
        let held = rounds(&mut shares, &mut now, 4, &[("a", waiting(0.0)), ("b", waiting(0.0)), ("c", little)]);
        assert!((held[2] - (5.0 + 5.0 / 3.0)).abs() < 1e-6 && is_all(&held), "{held:?}");
        // One that is gone keeps what it had for as long as its lease lasts.
        let held = rounds(&mut shares, &mut now, 8, &[("a", waiting(0.0)), ("c", waiting(0.0))]);
        assert!(is_all(&held), "{held:?}");
        // Nobody wants anything: everybody has some.
        let held = rounds(&mut shares, &mut now, 4, &[("a", Want::default()), ("c", Want::default())]);
        assert!(held.iter().all(|held| (held - 50.0).abs() < 1e-6), "{held:?}");
    }

    #[test]
    fn a_source_that_turns_away_gets_less_for_a_while() {
        let mut now = Instant::now();
        let mut shares = Shares::new(100.0, now);
        rounds(&mut shares, &mut now, 8, &[("a", waiting(50.0))]);
        let away = Want { throttled: 3, hold: Duration::from_secs(7), ..waiting(100.0) };
        let (rate, hold) = shares.lend("a", away, now);
        assert!((rate - 70.0).abs() < 1e-6 && hold == Duration::from_secs(7), "{rate} {hold:?}");
        // The other worker is told, too.
        now += Duration::from_secs(1);
        assert_eq!(shares.lend("b", Want::default(), now).1, Duration::from_secs(6));
        for _ in 0..100 {
            now += ROUND;
            shares.lend("a", away, now);
        }
        let (rate, _) = shares.lend("a", away, now);
        assert!((4.9..=5.1).contains(&rate), "{rate}");
        let held = rounds(&mut shares, &mut now, 110, &[("a", waiting(5.0))]);
        assert!((held[0] - 100.0).abs() < 1e-6, "{held:?}");
    }

    #[test]
    fn who_slept_lends_nothing_new_at_first() {
        let mut now = Instant::now();
        let mut shares = Shares::new(100.0, now);
        assert!((rounds(&mut shares, &mut now, 8, &[("a", waiting(50.0))])[0] - 100.0).abs() < 1e-6);
        now += Duration::from_secs(10);
        assert!((shares.lend("a", waiting(50.0), now).0 - 50.0).abs() < 1e-6);
        assert!((shares.lend("b", waiting(20.0), now).0 - 20.0).abs() < 1e-6);
    }

    proptest! {
        /// Whoever comes and goes, and whatever they want, never more than the budget is lent.
        #[test]
        fn never_more_than_the_budget(
            budget in 1.0..1000.0f64,
            steps in prop::collection::vec((0..6usize, any::<bool>(), 0.0..500.0f64, 0..3u64, 0..1500u64), 1..200),
        ) {
            let mut now = Instant::now();
            let mut shares = Shares::new(budget, now);
            let names = ["a", "b", "c", "d", "e", "f"];
            // What each may do: what its last lease said, and half of that when it is over.
            let mut held = [(budget / 12.0, now); 6];
            for (worker, waiting, rate, throttled, pause) in steps {
                now += Duration::from_millis(pause);
                let mine = if now < held[worker].1 { held[worker].0 } else { held[worker].0 / 2.0 };
                let want = Want { rate, waiting, held: mine, throttled: throttled / 2, hold: Duration::ZERO };
                let (lent, hold) = shares.lend(names[worker], want, now);
                held[worker] = (lent, now + LEASE);
                prop_assert!(lent.is_finite() && lent >= 0.0 && hold == Duration::ZERO);
                prop_assert!(shares.lent(now) <= budget + 1e-6, "{} of {budget}", shares.lent(now));
            }
        }
    }
}
