//! PreloadPolicies: from what is due to a Job, and from what workers say to a status.
//!
//! Everything that is known of runs is in the status and at the workers; the Job's pod keeps nothing, and neither does
//! this. A Job has the same name however often its run is tried to be started.

mod job;
mod progress;
mod status;

use std::{sync::Arc, time::Duration};

use forebay_api::{
    ConcurrencyPolicy, Dataset, PreloadPolicy, PreloadPolicyStatus, Run, RunPhase, calendar::CalendarError,
};
use forebay_preload::{
    due::{self, Due, Past, Present},
    progress::{end, since},
};
use k8s_openapi::{api::batch::v1::Job, apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, ResourceExt as _,
    api::PostParams,
    runtime::{controller::Action, reflector::ObjectRef},
};

use self::{
    job::Start,
    status::{Trouble, publish},
};
use crate::{
    apply::delete,
    conditions::{self, READY},
    context::{CallError, Context, ReconcileError, resync, within},
    labels::{MANAGER, Owner},
    poll::{RunSeen, dataset_id},
    views::JobView,
};

/// Annotation of a policy: each new value starts a run.
pub const REQUESTED: &str = "forebay.io/requestedAt";
/// How often a run that is under way is looked at, at least.
const ACTIVE: Duration = Duration::from_secs(5);

/// Why a PreloadPolicy is looked at again.
#[derive(Debug, thiserror::Error)]
#[error("{doing} failed")]
pub struct PolicyError {
    doing: &'static str,
    #[source]
    source: CallError,
}

fn doing(doing: &'static str) -> impl Fn(CallError) -> PolicyError {
    move |source| PolicyError { doing, source }
}

impl ReconcileError for PolicyError {
    fn is_conflict(&self) -> bool {
        self.source.is(409) || self.source.is(404)
    }
}

/// When a PreloadPolicy whose reconciliation failed is looked at again.
pub fn failed(policy: Arc<PreloadPolicy>, error: &PolicyError, context: Arc<Context>) -> Action {
    Action::requeue(context.backoff(&policy.uid().unwrap_or_default(), error))
}

/// What there is of a PreloadPolicy, besides itself.
struct Found {
    dataset: Option<Arc<Dataset>>,
    jobs: Vec<Arc<JobView>>,
}

impl Found {
    fn new(policy: &PreloadPolicy, owner: &Owner, context: &Context) -> Self {
        let name = ObjectRef::new(&policy.spec.dataset_ref.name).within(&owner.namespace);
        let stores = &context.stores;
        Self {
            dataset: stores.datasets.get(&name).filter(|dataset| dataset.metadata.deletion_timestamp.is_none()),
            jobs: stores.jobs.state_filter(|job| owner.owns(&job.metadata)),
        }
    }

    fn job(&self, uid: &str) -> Option<&JobView> {
        self.jobs.iter().find(|job| job.metadata.uid.as_deref() == Some(uid)).map(|job| &**job)
    }

    /// What workers say of a run.
    fn seen(&self, run: &str, context: &Context) -> Option<RunSeen> {
        let dataset = self.dataset.as_ref()?;
        let name = ObjectRef::new(&dataset.spec.runtime_ref.name).within(dataset.metadata.namespace.as_deref()?);
        let runtime = context.stores.runtimes.get(&name)?;
        let seen = context.observations.of(runtime.metadata.uid.as_deref()?)?;
        seen.datasets.get(&dataset_id(dataset)?)?.runs.get(run).cloned()
    }

    /// What the Dataset's files are, if they have been counted.
    fn revision(&self) -> Option<&str> {
        self.dataset.as_ref()?.status.as_ref()?.revision.as_deref()
    }

    /// UID of the Dataset, if it is there and Ready.
    fn ready(&self, name: &str) -> Result<(&Dataset, &str), Trouble> {
        let dataset = self.dataset.as_ref().ok_or_else(|| Trouble::NoDataset(name.to_owned()))?;
        let uid = dataset.metadata.uid.as_deref().unwrap_or_default();
        let ready = dataset.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, READY));
        if ready { Ok((dataset, uid)) } else { Err(Trouble::NotReady(name.to_owned())) }
    }
}

/// Starts what is due, and says how far it is.
pub async fn reconcile(policy: Arc<PreloadPolicy>, context: Arc<Context>) -> Result<Action, PolicyError> {
    let Some(owner) = Owner::of(&*policy) else { return Ok(Action::await_change()) };
    if policy.metadata.deletion_timestamp.is_some() {
        // The garbage collector removes its Jobs; workers end what nobody follows.
        return Ok(Action::await_change());
    }
    let found = Found::new(&policy, &owner, &context);
    let now = Timestamp::now();
    let spec = &policy.spec;
    let before = policy.status.clone().unwrap_or_default();
    let mut after = before.clone();
    after.observed_generation = policy.metadata.generation;
    // What is seen first is what changes are told from.
    after.revision = after.revision.or_else(|| found.revision().map(str::to_owned));
    if let Some(run) = &mut after.last_run {
        let (job, seen) = (found.job(&run.uid), found.seen(&run.uid, &context));
        progress::update(run, job, seen.as_ref(), now);
    }
    let due = match look(&policy, &found, &before, now) {
        Ok(due) => due,
        Err(trouble) => {
            return finish(&context, &policy, &found, &before, after, Some(trouble), now).await;
        }
    };
    let active = after.last_run.as_ref().filter(|run| !run.has_ended()).cloned();
    let goes = active.is_none() || spec.concurrency_policy == ConcurrencyPolicy::Replace;
    if let Some(Due { trigger, past }) = due.filter(|_| goes)
        && let Ok((dataset, uid)) = found.ready(&spec.dataset_ref.name)
    {
        if let (Some(_), Some(run)) = (&active, &mut after.last_run) {
            if let Some(job) = found.job(&run.uid) {
                delete(&jobs(&context, &owner), &job.metadata)
                    .await
                    .map_err(doing("deleting the Job of the run before"))?;
            }
            end(run, RunPhase::Failed, Some("another run took its place".into()), now);
        }
        let runtime = &dataset.spec.runtime_ref.name;
        let last = after.last_run.as_ref().map(|run| run.uid.as_str());
        let start = Start { owner: &owner, spec, dataset: uid, runtime, trigger, past: &past, before: last, now };
        let job = create(&context, &owner, &job::build(&start, &context.workers)).await?;
        let started = job.creation_timestamp().unwrap_or(Time(now));
        let run = Run::new(job.name_any(), job.uid().unwrap_or_default(), trigger, started);
        progress::begin(&mut after, run);
        after.last_schedule_time = past.schedule.map(Time);
        after.ready_dataset = past.dataset;
        after.last_request = past.request;
        after.revision = past.revision;
    }
    finish(&context, &policy, &found, &before, after, None, now).await
}

/// The run that is to start, if one is.
fn look(
    policy: &PreloadPolicy,
    found: &Found,
    before: &PreloadPolicyStatus,
    now: Timestamp,
) -> Result<Option<Due>, Trouble> {
    let spec = &policy.spec;
    // Also while it is suspended: a mistake is told at once.
    next(policy, now)?;
    if spec.suspend {
        return Err(Trouble::Suspended);
    }
    let (_, uid) = found.ready(&spec.dataset_ref.name)?;
    let past = Past {
        since: policy.creation_timestamp().map_or(now, |time| time.0),
        schedule: before.last_schedule_time.as_ref().map(|time| time.0),
        dataset: before.ready_dataset.clone(),
        request: before.last_request.clone(),
        revision: before.revision.clone(),
    };
    let request = policy.annotations().get(REQUESTED).map(String::as_str);
    let revision = found.revision();
    due::due(&spec.triggers, &past, Present { now, dataset: uid, request, revision }).map_err(Trouble::from)
}

fn next(policy: &PreloadPolicy, now: Timestamp) -> Result<Option<Timestamp>, CalendarError> {
    due::next(&policy.spec.triggers, now)
}

fn jobs(context: &Context, owner: &Owner) -> Api<Job> {
    Api::namespaced(context.client.clone(), &owner.namespace)
}

/// Makes a Job, or finds the one that was made before the status said so.
async fn create(context: &Context, owner: &Owner, job: &Job) -> Result<Job, PolicyError> {
    let api = jobs(context, owner);
    let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
    match within(api.create(&params, job)).await {
        Ok(job) => Ok(job),
        Err(error) if error.is(409) => {
            let there = within(api.get(&job.name_any())).await.map_err(doing("reading the Job of the run"))?;
            if owner.owns(&there.metadata) {
                return Ok(there);
            }
            Err(doing("creating the Job, whose name is taken,")(error))
        }
        Err(error) => Err(doing("creating the Job of a run")(error)),
    }
}

/// Writes the status, removes what is not needed any more, and says when to look again.
async fn finish(
    context: &Context,
    policy: &PreloadPolicy,
    found: &Found,
    before: &PreloadPolicyStatus,
    mut after: PreloadPolicyStatus,
    trouble: Option<Trouble>,
    now: Timestamp,
) -> Result<Action, PolicyError> {
    progress::trim(&mut after, &policy.spec.history_limits);
    let next = next(policy, now).ok().flatten().filter(|_| !policy.spec.suspend);
    after.next_schedule_time = next.map(Time);
    let is_active = after.last_run.as_ref().is_some_and(|run| !run.has_ended());
    let kept: Vec<String> = after.last_run.iter().chain(&after.runs).map(|run| run.uid.clone()).collect();
    let budget = found.dataset.as_ref().and_then(|dataset| dataset.spec.gets_per_second());
    publish(context, policy, before, after, trouble.as_ref(), budget, now)
        .await
        .map_err(doing("writing the status"))?;
    // After the status: what is not in it is no longer needed, and not before.
    let api: Api<Job> = Api::namespaced(context.client.clone(), &policy.namespace().unwrap_or_default());
    for job in found.jobs.iter().filter(|job| job.end().is_some()) {
        if job.metadata.uid.as_ref().is_some_and(|uid| !kept.contains(uid)) {
            delete(&api, &job.metadata).await.map_err(doing("deleting the Job of an old run"))?;
        }
    }
    let mut pause = if is_active { ACTIVE } else { resync() };
    if let Some(next) = next {
        // A little later than that, so that it has come.
        let until = since(now, next) + Duration::from_millis(20);
        pause = pause.min(until);
    }
    Ok(Action::requeue(pause))
}
