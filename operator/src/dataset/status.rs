//! The status of a Dataset: what was found, in words and numbers.

mod assess;

use std::time::{Duration, Instant};

use forebay_api::{API_VERSION, Dataset, DatasetStatus};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Resource as _, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::json;

use self::assess::Assessment;
use super::{apply::Outcome, dereference::Found};
use crate::{
    conditions::{self, Finding},
    context::{CallError, Context, NUMBERS, jitter, within},
    labels::MANAGER,
    metrics::Kind,
    numbers::{differs, human, percent},
    poll::ScanState,
};

/// Writes what changed; `refreshed` is the request for which a refresh has begun. `Some`: there is more to write, when
/// this time is over.
pub async fn publish(
    context: &Context,
    dataset: &Dataset,
    found: &Found,
    outcome: &Outcome,
    refreshed: Option<String>,
) -> Result<Option<Duration>, CallError> {
    let before = dataset.status.clone().unwrap_or_default();
    let mut after = numbers(&before, found);
    after.last_refresh = refreshed.or_else(|| before.last_refresh.clone());
    after.claim_name = match outcome {
        Outcome::Bound | Outcome::Binding(..) => Some(dataset.name_any()),
        Outcome::NameTaken(_) => None,
        Outcome::Invalid(_) | Outcome::Failed(_) | Outcome::Ending => before.claim_name.clone(),
    };
    let Some(Assessment { phase, findings }) = assess::assess(&before, found, outcome) else {
        // What was said stays until the workers were asked, which will be told.
        return Ok(None);
    };
    after.observed_generation = match outcome {
        Outcome::Failed(_) => before.observed_generation,
        _ => dataset.metadata.generation,
    };
    after.phase = Some(phase);
    after.conditions = conditions::merge(&before.conditions, &findings, after.observed_generation, Timestamp::now());

    let urgent = findings.iter().any(|finding| finding.is_urgent(&before.conditions, after.observed_generation))
        || urgent_fields(&before) != urgent_fields(&after);
    if !urgent && !changed(&before, &after) {
        return Ok(None);
    }
    let uid = dataset.uid().unwrap_or_default();
    if !urgent && let Some(rest) = context.remember(&uid, |memory| memory.rest(Instant::now())) {
        return Ok(Some(rest));
    }
    write(context, dataset, after, &before, &findings).await?;
    Ok(None)
}

/// Writes a status, and publishes what is new in it.
pub async fn write(
    context: &Context,
    dataset: &Dataset,
    after: DatasetStatus,
    before: &DatasetStatus,
    findings: &[Finding],
) -> Result<(), CallError> {
    let name = dataset.name_any();
    let api: Api<Dataset> = Api::namespaced(context.client.clone(), &dataset.namespace().unwrap_or_default());
    // With the resource version that it was computed from: times of conditions are not set back, and nothing is told
    // twice.
    let body = json!({
        "apiVersion": API_VERSION,
        "kind": "Dataset",
        "metadata": {"name": name, "resourceVersion": dataset.resource_version()},
        "status": after,
    });
    within(api.patch_status(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body))).await?;
    context.metrics.status_writes.get_or_create(&Kind { kind: "Dataset" }).inc();
    context.remember(&dataset.uid().unwrap_or_default(), |memory| {
        memory.numbers = Some((Instant::now(), jitter(NUMBERS)));
        memory.failures = 0;
    });
    context.events.transitions(&dataset.object_ref(&()), &before.conditions, findings).await;
    Ok(())
}

/// Fields of which any change is written at once, and those that begin to be known.
fn urgent_fields(status: &DatasetStatus) -> impl PartialEq + '_ {
    let DatasetStatus {
        observed_generation,
        phase,
        revision,
        last_sync_time: _,
        last_refresh,
        files,
        bytes,
        cached_bytes,
        replicated_bytes,
        pinned_bytes,
        size: _,
        cached: _,
        hits,
        misses,
        hit_ratio_percent,
        evicted_bytes,
        expired_bytes,
        claim_name,
        conditions: _,
    } = status;
    let known =
        [files, bytes, cached_bytes, replicated_bytes, pinned_bytes, hits, misses, evicted_bytes, expired_bytes];
    let known = known.map(Option::is_some);
    (observed_generation, phase, revision, last_refresh, known, hit_ratio_percent.is_some(), claim_name)
}

/// Whether a number or a message is worth writing.
fn changed(before: &DatasetStatus, after: &DatasetStatus) -> bool {
    let numbers = |status: &DatasetStatus| {
        let DatasetStatus { files, bytes, cached_bytes, pinned_bytes, hits, misses, .. } = status;
        let DatasetStatus { replicated_bytes, evicted_bytes, expired_bytes, .. } = status;
        [files, bytes, cached_bytes, replicated_bytes, pinned_bytes, hits, misses, evicted_bytes, expired_bytes]
            .map(|number| *number)
    };
    numbers(before).into_iter().zip(numbers(after)).any(|(old, new)| differs(old, new))
        || before.last_sync_time != after.last_sync_time
        || before.conditions != after.conditions
}

/// The numbers as workers said them; what they did not say stays.
fn numbers(before: &DatasetStatus, found: &Found) -> DatasetStatus {
    let seen = found.dataset.as_ref();
    let counted = seen.and_then(|seen| seen.scan.as_ref()).filter(|scan| scan.state == ScanState::Complete);
    // Without a runtime there is no worker, and no byte on one.
    let held = |said: Option<u64>, before: Option<u64>| match found.runtime {
        Some(_) => said.or(before),
        None => before.map(|_| 0),
    };
    let files = counted.map(|scan| scan.files).or(before.files);
    let bytes = counted.map(|scan| scan.bytes).or(before.bytes);
    let cached = held(seen.map(|seen| seen.cached), before.cached_bytes);
    let hits = seen.map(|seen| seen.hits).max(before.hits);
    let misses = seen.map(|seen| seen.misses).max(before.misses);
    DatasetStatus {
        revision: counted.map(|scan| format!("{:016x}", scan.digest)).or_else(|| before.revision.clone()),
        last_sync_time: counted.and_then(|scan| scan.synced).map(Time).or_else(|| before.last_sync_time.clone()),
        files,
        bytes,
        size: bytes.map(human),
        cached_bytes: cached,
        cached: cached.map(human),
        replicated_bytes: held(seen.map(|seen| seen.replicated), before.replicated_bytes),
        pinned_bytes: held(seen.map(|seen| seen.pinned), before.pinned_bytes),
        hits,
        misses,
        evicted_bytes: seen.map(|seen| seen.evicted).max(before.evicted_bytes),
        expired_bytes: seen.map(|seen| seen.expired).max(before.expired_bytes),
        hit_ratio_percent: hits.zip(misses).and_then(|(hits, misses)| percent(hits, misses)),
        ..DatasetStatus::default()
    }
}
