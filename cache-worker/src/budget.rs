//! The request budgets of a dataset's sources: what all workers together may ask of each.
//!
//! One worker, the first of the dataset's order that lives, lends shares of them; every worker asks it twice a second, says
//! how much it wanted, and gets a share for 2 s. A worker that gets none (the grantor is away) uses its last share to the
//! end, then half of it, until the next in order has noticed, too. That one knows nothing of what was lent: for as long as
//! a lease lasts it gives nobody more than he has.

mod shares;

use std::{collections::HashMap, sync::Arc, time::Duration};

use forebay_protocol::{
    DatasetPath,
    identity::directory_placement_key,
    table::Member,
    worker::{Lease, LeaseRequest, LeaseWant, RequestVerb},
};
use forebay_under_store::{Usage, Verb};
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic::Code;
use tracing::debug;

use self::shares::{LEASE, Shares, Want};
use crate::{
    dataset::{Dataset, Source},
    worker::Worker,
};

/// How often a worker asks for its share: a lease outlives three calls that fail.
const RENEW: Duration = Duration::from_millis(500);
/// How long the grantor may take to answer.
const CALL: Duration = Duration::from_millis(400);

/// One source and kind of request.
type Item = (DatasetPath, Verb);

/// What a grantor knows; empty on workers that are none.
#[derive(Debug, Default)]
pub(crate) struct Lender(Mutex<Option<HashMap<Item, Shares>>>);

impl Lender {
    /// From now on this worker shares out the budgets, or no more.
    fn set(&self, is_grantor: bool) {
        let mut shares = self.0.lock();
        match (is_grantor, shares.is_some()) {
            (true, false) => *shares = Some(HashMap::new()),
            (false, true) => *shares = None,
            _ => {}
        }
    }
}

/// Shares for `borrower`, of those sources that have a budget. `None`: this worker is not the grantor.
pub(crate) fn lend(dataset: &Dataset, borrower: &str, wants: &[LeaseWant]) -> Option<Vec<Lease>> {
    let mut lender = dataset.lender.0.lock();
    let all = lender.as_mut()?;
    let sources = dataset.sources();
    let budget = |path: &DatasetPath, verb| sources.iter().find(|source| source.path == *path)?.budget().of(verb);
    // Of sources that are gone nothing is kept.
    all.retain(|(path, verb), _| budget(path, *verb).is_some());
    let now = Instant::now();
    let leases = wants.iter().filter_map(|want| {
        let path = DatasetPath::parse(want.source.clone()).ok()?;
        let verb = of_wire(want.verb())?;
        let budget = budget(&path, verb)?;
        let shares = all.entry((path, verb)).or_insert_with(|| Shares::new(budget, now));
        shares.set_budget(budget);
        // What no worker of ours says is taken for nothing.
        let sane = |rate: f64| if rate.is_finite() { rate.max(0.0) } else { 0.0 };
        let wanted = Want {
            rate: sane(want.rate),
            waiting: want.waiting,
            held: sane(want.held),
            throttled: want.throttled,
            hold: Duration::from_millis(want.hold_millis).min(Usage::LONGEST_HOLD),
        };
        let (rate, hold) = shares.lend(borrower, wanted, now);
        Some(Lease { source: want.source.clone(), verb: want.verb, rate, hold_millis: millis(hold) })
    });
    Some(leases.collect())
}

/// Keeps this worker's shares of a dataset's budgets. Ends with the dataset.
pub(crate) async fn keep(worker: Arc<Worker>, dataset: Arc<Dataset>) {
    let work = async {
        let mut known = HashMap::new();
        let mut tick = interval(RENEW);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            renew(&worker, &dataset, &mut known).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = dataset.closed() => {}
        () = worker.stop.cancelled() => {}
    }
}

/// How an item was used when it was last asked for.
type Known = HashMap<Item, (Usage, Instant)>;

async fn renew(worker: &Worker, dataset: &Dataset, known: &mut Known) {
    let sources = dataset.sources();
    let now = Instant::now();
    let mut wants = Vec::new();
    let mut seen = Known::new();
    for source in sources.iter() {
        for verb in Verb::ALL {
            let Some(budget) = source.budget().of(verb) else { continue };
            let item = (source.path.clone(), verb);
            let before = known.get(&item);
            if before.is_none() {
                // The grantor may be new, too, and give no more than is held.
                source.allowance.lend(verb, budget * worker.members.part() / 2.0, LEASE);
            }
            let usage = source.allowance.usage(verb);
            wants.push(want(source, verb, &usage, before, now));
            seen.insert(item, (usage, now));
        }
    }
    *known = seen;
    if wants.is_empty() {
        dataset.lender.set(false);
        return;
    }
    for lease in ask(worker, dataset, wants).await {
        let source = sources.iter().find(|source| source.path.as_bytes() == lease.source);
        let (Some(source), Some(verb)) = (source, of_wire(lease.verb())) else { continue };
        // It may have lost its budget since.
        if source.budget().of(verb).is_some() {
            // Counted from when it was asked for, so that it never ends after the grantor thinks it does.
            source.allowance.lend(verb, lease.rate, LEASE.saturating_sub(now.elapsed()));
            source.allowance.hold(verb, Duration::from_millis(lease.hold_millis));
        }
    }
}

fn want(source: &Source, verb: Verb, usage: &Usage, before: Option<&(Usage, Instant)>, now: Instant) -> LeaseWant {
    let (rate, throttled) = before.map_or((0.0, 0), |(before, since)| {
        let seconds = now.saturating_duration_since(*since).as_secs_f64().max(0.001);
        // A source that was replaced counts from zero.
        let wanted = usage.wanted.saturating_sub(before.wanted);
        (wanted as f64 / seconds, usage.throttled.saturating_sub(before.throttled))
    });
    LeaseWant {
        source: source.path.to_bytes(),
        verb: to_wire(verb).into(),
        rate,
        waiting: usage.waiting,
        held: usage.rate.unwrap_or_default(),
        throttled,
        hold_millis: millis(usage.hold),
    }
}

/// Asks the first of the dataset's order that lives, which may be this worker. Nothing: the last share stays.
async fn ask(worker: &Worker, dataset: &Dataset, wants: Vec<LeaseWant>) -> Vec<Lease> {
    let own = &worker.options.name;
    let order = worker.members.order(directory_placement_key(dataset.id, &DatasetPath::root()), usize::MAX);
    for member in &order {
        if worker.members.is_self(member) {
            break;
        }
        let request = LeaseRequest { dataset: dataset.id.to_bytes(), worker: own.clone(), wants: wants.clone() };
        match there(worker, member, request).await {
            Ok(leases) => {
                dataset.lender.set(false);
                return leases;
            }
            // It lives, and knows one before it that does, or will soon know that there is none.
            Err(Code::FailedPrecondition) => {
                dataset.lender.set(false);
                return Vec::new();
            }
            Err(code) => debug!(worker = %member.name, ?code, dataset = %dataset.name, "no lease"),
        }
    }
    // A worker that leaves shares nothing out, but while there is nobody else.
    if order.is_empty() || order.iter().any(|member| worker.members.is_self(member)) {
        dataset.lender.set(true);
        return lend(dataset, own, &wants).unwrap_or_default();
    }
    Vec::new()
}

async fn there(worker: &Worker, member: &Member, request: LeaseRequest) -> Result<Vec<Lease>, Code> {
    let asking = async {
        let mut client = worker.members.control(member).await?;
        client.lease(request).await
    };
    match timeout(CALL, asking).await {
        Ok(answer) => answer.map(|answer| answer.into_inner().leases).map_err(|status| status.code()),
        Err(_) => Err(Code::DeadlineExceeded),
    }
}

fn to_wire(verb: Verb) -> RequestVerb {
    match verb {
        Verb::Get => RequestVerb::Get,
        Verb::List => RequestVerb::List,
        Verb::Head => RequestVerb::Head,
    }
}

fn of_wire(verb: RequestVerb) -> Option<Verb> {
    match verb {
        RequestVerb::Unspecified => None,
        RequestVerb::Get => Some(Verb::Get),
        RequestVerb::List => Some(Verb::List),
        RequestVerb::Head => Some(Verb::Head),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
