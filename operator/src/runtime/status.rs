//! The status of a CacheRuntime: what was found, in words and numbers, and the worker table.

mod assess;

use std::time::{Duration, Instant};

use forebay_api::{CacheRuntime, CacheRuntimeStatus, object_name};
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Resource as _, ResourceExt as _, api::PostParams};

use self::assess::Assessment;
use super::{apply::Outcome, dereference::Found, table};
use crate::{
    conditions,
    context::{CallError, Context, NUMBERS, jitter, within},
    labels::{self, MANAGER},
    metrics::Kind,
    numbers::{differs, human},
};

/// Writes what changed. `Some`: there is more to write, when this time is over.
pub async fn publish(
    context: &Context,
    runtime: &CacheRuntime,
    found: &Found,
    outcome: &Outcome,
) -> Result<Option<Duration>, CallError> {
    let before = runtime.status.clone().unwrap_or_default();
    let table = table::next(before.table.as_ref(), &object_name(&runtime.name_any()), found.replicas, &found.pods);
    let table_changed = table.is_some();
    let mut after = CacheRuntimeStatus { table: table.or(before.table.clone()), ..numbers(runtime, found) };

    let assessed = assess::assess(runtime, &before, found, outcome, Timestamp::now());
    let mut findings = Vec::new();
    let mut urgent = table_changed;
    match assessed {
        // What was said stays until the workers were asked.
        None => {
            after.observed_generation = before.observed_generation;
            after.phase = before.phase;
            after.conditions = before.conditions.clone();
            (after.ready_replicas, after.used_bytes, after.used) =
                (before.ready_replicas, before.used_bytes, before.used.clone());
        }
        Some(Assessment { phase, findings: found }) => {
            let generation = runtime.metadata.generation;
            after.observed_generation = match outcome {
                Outcome::Failed(_) | Outcome::Ending => before.observed_generation,
                Outcome::Applied | Outcome::NameTaken(_) | Outcome::Invalid(_) => generation,
            };
            after.phase = Some(phase);
            urgent |= found.iter().any(|finding| finding.is_urgent(&before.conditions, after.observed_generation));
            urgent |= found.len() != before.conditions.len();
            after.conditions =
                conditions::merge(&before.conditions, &found, after.observed_generation, Timestamp::now());
            findings = found;
        }
    }
    urgent |= urgent_fields(&before) != urgent_fields(&after);
    if after == before || (!urgent && !differs(before.used_bytes, after.used_bytes)) {
        return Ok(None);
    }
    let uid = runtime.uid().unwrap_or_default();
    if !urgent && let Some(rest) = context.remember(&uid, |memory| memory.rest(Instant::now())) {
        return Ok(Some(rest));
    }

    write(context, runtime, after, table_changed).await?;
    context.remember(&uid, |memory| {
        memory.numbers = Some((Instant::now(), jitter(NUMBERS)));
        memory.failures = 0;
    });
    context.events.transitions(&runtime.object_ref(&()), &before.conditions, &findings).await;
    Ok(None)
}

async fn write(
    context: &Context,
    runtime: &CacheRuntime,
    status: CacheRuntimeStatus,
    table_changed: bool,
) -> Result<(), CallError> {
    let namespace = runtime.namespace().unwrap_or_default();
    let api: Api<CacheRuntime> = Api::namespaced(context.client.clone(), &namespace);
    let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
    // With the resource version that it was computed from: two operators never write two tables of one epoch.
    let mut written = runtime.clone();
    written.status = Some(status);
    within(api.replace_status(&runtime.name_any(), &params, &written)).await?;
    context.metrics.status_writes.get_or_create(&Kind { kind: "CacheRuntime" }).inc();
    if table_changed {
        context.observations.wake(&runtime.uid().unwrap_or_default());
    }
    Ok(())
}

/// Fields of which any change is written at once.
fn urgent_fields(status: &CacheRuntimeStatus) -> impl PartialEq + '_ {
    let CacheRuntimeStatus {
        observed_generation,
        phase,
        replicas,
        ready_replicas,
        selector,
        table: _,
        capacity_bytes,
        used_bytes,
        capacity: _,
        used: _,
        conditions: _,
    } = status;
    (observed_generation, phase, replicas, ready_replicas, selector, capacity_bytes, used_bytes.is_some())
}

fn numbers(runtime: &CacheRuntime, found: &Found) -> CacheRuntimeStatus {
    let each = runtime.spec.tiers.first().and_then(|tier| tier.capacity.bytes().ok());
    let capacity = each.map(|bytes| bytes.saturating_mul(found.replicas.into()));
    let used = found.seen.as_ref().map(|seen| seen.workers.values().map(|worker| worker.used).sum());
    let selector = labels::worker_selector(&runtime.name_any());
    let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    CacheRuntimeStatus {
        replicas: count(found.pods.len()),
        ready_replicas: count(found.serving()),
        selector: Some(selector.join(",")),
        capacity_bytes: capacity,
        capacity: capacity.map(human),
        used_bytes: used,
        used: used.map(human),
        ..CacheRuntimeStatus::default()
    }
}
