//! What the workers say of themselves and of their Datasets, asked every few seconds.
//!
//! One task a CacheRuntime that has workers. What came in last is in [`Observations`]; reconcilers read it, and are
//! told when it says something new. A worker that does not answer once is away: its pod may be gone, and the next
//! question is soon.

mod book;
mod counters;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_api::{CacheRuntime, Dataset, WorkerMember};
use forebay_client::{ControlClient, transport};
use forebay_protocol::{DatasetId, handshake::RuntimeKey, worker::StatusRequest};
use futures::{StreamExt as _, stream};
use kube::runtime::reflector::ObjectRef;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore},
    task::{AbortHandle, JoinSet},
    time::{interval, sleep, timeout},
};
use tonic::transport::Channel;
use tracing::debug;

use self::book::{Answer, Book};
pub use self::book::{DatasetSeen, RunSeen, RuntimeSeen, ScanState};
#[cfg(test)]
pub use self::book::{Problem, ScanSeen, WorkerSeen};
use crate::{context::Context, labels::Owner};

/// How often workers are asked, and how much more of it each worker costs: 300 are asked every 3 s, 1,000 every 10 s.
const EVERY: (Duration, Duration) = (Duration::from_secs(3), Duration::from_millis(10));
/// How often while something is expected to change, in runtimes of up to so many workers.
const EAGER: (Duration, usize) = (Duration::from_secs(1), 64);
/// How often a runtime without workers is looked at: a new table wakes its task.
const ALONE: Duration = Duration::from_secs(30);
/// How long a worker may take: with the interval, what it does not say is known within 5 s.
const DEADLINE: Duration = Duration::from_millis(1500);
/// Questions under way at once, of all runtimes.
const CALLS: usize = 64;
/// Largest answer: 4,096 Datasets of 2 KiB each, twice.
const MAX_ANSWER: usize = 16 << 20;
/// How often it is looked for runtimes that came or went, and for new tables.
const LOOK: Duration = Duration::from_secs(1);

/// The last answers, by UID of the CacheRuntime.
#[derive(Default)]
pub struct Observations(Mutex<HashMap<String, Slot>>);

#[derive(Default)]
struct Slot {
    /// And when they were asked.
    seen: Option<(Instant, Arc<RuntimeSeen>)>,
    wake: Arc<Notify>,
}

impl Observations {
    /// What the workers of a runtime said. `None`: they have not been asked yet.
    pub fn of(&self, runtime: &str) -> Option<Arc<RuntimeSeen>> {
        self.0.lock().get(runtime)?.seen.as_ref().map(|(_, seen)| seen.clone())
    }

    /// What they said when they were asked after this time, if they were.
    pub fn since(&self, runtime: &str, time: Instant) -> Option<Arc<RuntimeSeen>> {
        self.0.lock().get(runtime)?.seen.as_ref().filter(|(asked, _)| *asked > time).map(|(_, seen)| seen.clone())
    }

    /// Has workers asked at once: there are others.
    pub fn wake(&self, runtime: &str) {
        if let Some(slot) = self.0.lock().get(runtime) {
            slot.wake.notify_one();
        }
    }

    fn open(&self, runtime: &str) -> Arc<Notify> {
        self.0.lock().entry(runtime.to_owned()).or_default().wake.clone()
    }

    fn put(&self, runtime: &str, asked: Instant, seen: RuntimeSeen) -> Option<Arc<RuntimeSeen>> {
        self.0.lock().get_mut(runtime)?.seen.replace((asked, Arc::new(seen))).map(|(_, before)| before)
    }

    fn close(&self, runtime: &str) {
        self.0.lock().remove(runtime);
    }
}

/// The identity of a Dataset among workers.
pub fn dataset_id(dataset: &Dataset) -> Option<DatasetId> {
    let uid = uuid::Uuid::try_parse(dataset.metadata.uid.as_deref()?).ok()?;
    DatasetId::from_slice(uid.as_bytes())
}

/// Keeps a task for each runtime.
pub async fn run(context: Arc<Context>) {
    let calls = Arc::new(Semaphore::new(CALLS));
    // Dropping the set ends the tasks.
    let mut tasks = JoinSet::new();
    // And the epoch of the table that each has seen.
    let mut running: BTreeMap<String, (AbortHandle, Option<u64>)> = BTreeMap::new();
    let mut look = interval(LOOK);
    loop {
        look.tick().await;
        while tasks.try_join_next().is_some() {}
        let mut present: BTreeMap<String, (Owner, Option<u64>)> = BTreeMap::new();
        for runtime in context.stores.runtimes.state() {
            if let Some(owner) = Owner::of(&*runtime) {
                let table = runtime.status.as_ref().and_then(|status| status.table.as_ref());
                present.insert(owner.uid.clone(), (owner, table.map(|table| table.epoch)));
            }
        }
        running.retain(|uid, (task, _)| {
            let stays = present.contains_key(uid);
            if !stays {
                task.abort();
                context.observations.close(uid);
            }
            stays
        });
        for (uid, (owner, epoch)) in present {
            let start = || (tasks.spawn(follow(context.clone(), owner, calls.clone())), epoch);
            let (_, seen) = running.entry(uid.clone()).or_insert_with(start);
            if *seen != epoch {
                *seen = epoch;
                context.observations.wake(&uid);
            }
        }
    }
}

/// Asks the workers of a runtime again and again.
async fn follow(context: Arc<Context>, owner: Owner, calls: Arc<Semaphore>) {
    let wake = context.observations.open(&owner.uid);
    let name = ObjectRef::<CacheRuntime>::new(&owner.name).within(&owner.namespace);
    let key = context.master.runtime_key(&owner.namespace, &owner.name);
    let mut book = Book::new(Instant::now());
    let mut channels: HashMap<String, Channel> = HashMap::new();
    loop {
        let members = context
            .stores
            .runtimes
            .get(&name)
            .and_then(|runtime| Some(runtime.status.as_ref()?.table.as_ref()?.members.clone()))
            .unwrap_or_default();
        channels.retain(|address, _| members.iter().any(|member| member.address == *address));
        let asked = Instant::now();
        let answers = ask_all(&members, &key, &mut channels, &calls).await;
        context.metrics.polls.inc_by(answers.len() as u64);
        context.metrics.poll_failures.inc_by(answers.iter().filter(|answer| answer.said.is_err()).count() as u64);

        let datasets = context.stores.datasets_of(&owner.namespace, &owner.name);
        let seen = book.enter(answers, &datasets);
        let pause = match members.len() {
            0 => ALONE,
            members if members <= EAGER.1 && seen.expects_change(&datasets) => EAGER.0,
            members => EVERY.0.max(EVERY.1 * members as u32),
        };
        tell(&context, &owner, &name, &datasets, asked, seen);

        tokio::select! {
            () = sleep(pause) => {}
            () = wake.notified() => {}
        }
    }
}

/// Keeps what was seen, and has looked at whom it concerns.
fn tell(
    context: &Context,
    owner: &Owner,
    name: &ObjectRef<CacheRuntime>,
    datasets: &[Arc<Dataset>],
    asked: Instant,
    seen: RuntimeSeen,
) {
    let before = context.observations.put(&owner.uid, asked, seen);
    let Some(seen) = context.observations.of(&owner.uid) else { return };
    let workers_changed = before.as_ref().is_none_or(|before| before.workers != seen.workers);
    if workers_changed {
        context.queues.runtimes.push(name.clone());
    }
    for dataset in datasets {
        let Some(id) = dataset_id(dataset) else { continue };
        let dataset_changed = before.as_ref().is_none_or(|before| before.datasets.get(&id) != seen.datasets.get(&id));
        let members_changed = before.as_ref().is_none_or(|before| before.reachability() != seen.reachability());
        if dataset_changed || members_changed {
            context.queues.datasets.push(ObjectRef::from_obj(&**dataset));
        }
        let runs = |seen: &RuntimeSeen| seen.datasets.get(&id).map(|seen| seen.runs.clone()).unwrap_or_default();
        if before.as_ref().is_none_or(|before| runs(before) != runs(&seen)) {
            context
                .stores
                .policies_of(&owner.namespace, dataset)
                .for_each(|policy| context.queues.policies.push(policy));
        }
    }
}

async fn ask_all(
    members: &[WorkerMember],
    key: &RuntimeKey,
    channels: &mut HashMap<String, Channel>,
    calls: &Semaphore,
) -> Vec<Answer> {
    let questions = members.iter().map(|member| {
        let channel = channels.remove(&member.address);
        async move {
            // The semaphore is never closed.
            let _place = calls.acquire().await;
            let (said, channel) = match timeout(DEADLINE, ask(&member.address, key, channel)).await {
                Ok(Ok((status, channel))) => (Ok(status), Some(channel)),
                Ok(Err(error)) => (Err(error), None),
                Err(_) => (Err(format!("no answer within {DEADLINE:?}")), None),
            };
            if let Err(error) = &said {
                debug!(worker = %member.name, address = %member.address, %error, "a worker does not answer");
            }
            (Answer { member: member.clone(), said }, member.address.clone(), channel)
        }
    });
    // Collected first: the borrow of `channels` ends before the answers come.
    let questions: Vec<_> = questions.collect();
    let answers: Vec<_> = stream::iter(questions).buffer_unordered(CALLS).collect().await;
    let mut all = Vec::with_capacity(answers.len());
    for (answer, address, channel) in answers {
        if let Some(channel) = channel {
            channels.insert(address, channel);
        }
        all.push(answer);
    }
    all
}

async fn ask(
    address: &str,
    key: &RuntimeKey,
    channel: Option<Channel>,
) -> Result<(forebay_protocol::worker::StatusResponse, Channel), String> {
    let channel = match channel {
        Some(channel) => channel,
        None => transport::channel(address, key).await.map_err(|error| error.to_string())?,
    };
    let mut client = ControlClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER);
    let status = client.status(StatusRequest::default()).await.map_err(|status| status.message().to_owned())?;
    Ok((status.into_inner(), channel))
}
