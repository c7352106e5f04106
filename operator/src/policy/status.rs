//! The status of a PreloadPolicy, written.

use std::time::{Duration, Instant};

use forebay_api::{
    API_VERSION, PreloadPolicy, PreloadPolicySpec, PreloadPolicyStatus, Run, RunPhase, calendar::CalendarError,
};
use forebay_preload::progress::at_risk;
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Resource as _, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::{
    conditions::{self, Finding},
    context::{CallError, Context, within},
    labels::MANAGER,
    metrics::Kind,
};

/// The last run loaded everything.
const COMPLETE: &str = "Complete";
/// The last run did not, or none can start.
const FAILED: &str = "Failed";
/// The last run will miss its deadline.
const DEADLINE_AT_RISK: &str = "DeadlineAtRisk";
/// How long numbers of a run rest.
const NUMBERS: Duration = Duration::from_secs(5);

/// Why no run starts, whatever is due.
#[derive(Debug)]
pub enum Trouble {
    Suspended,
    NoDataset(String),
    NotReady(String),
    Schedule(CalendarError),
}

impl From<CalendarError> for Trouble {
    fn from(error: CalendarError) -> Self {
        Self::Schedule(error)
    }
}

/// What is the case.
fn findings(run: Option<&Run>, trouble: Option<&Trouble>) -> [Finding; 2] {
    let both = |complete: bool, failed: bool, reason: &str, message: String| {
        [Finding::new(COMPLETE, complete, reason, &message), Finding::new(FAILED, failed, reason, message)]
    };
    // A policy that can never start a run is told before what its last run was like.
    if let Some(Trouble::Schedule(error)) = trouble {
        return both(false, true, "InvalidSchedule", format!("spec.triggers: {error}"));
    }
    if let Some(run) = run {
        let name = &run.name;
        return match run.phase {
            RunPhase::Pending => both(false, false, "Waiting", format!("run {name} waits for its pod")),
            RunPhase::Running => both(false, false, "Loading", format!("run {name} is under way")),
            RunPhase::Complete => {
                let files = run.files.unwrap_or_default();
                both(true, false, "Loaded", format!("run {name} loaded {files} files"))
            }
            RunPhase::Failed => {
                let why = run.message.as_deref().unwrap_or("it says nothing");
                both(false, true, "RunFailed", format!("run {name}: {why}"))
            }
        };
    }
    match trouble {
        Some(Trouble::NoDataset(name)) => {
            both(false, true, "DatasetNotFound", format!("there is no Dataset {name} in this namespace"))
        }
        Some(Trouble::NotReady(name)) => {
            both(false, false, "DatasetNotReady", format!("Dataset {name} is not Ready yet"))
        }
        Some(Trouble::Suspended) => both(false, false, "Suspended", "spec.suspend is true".into()),
        Some(Trouble::Schedule(_)) | None => both(false, false, "Waiting", "no run was due yet".into()),
    }
}

/// Whether the last run keeps its deadline; nothing where there is none.
fn deadline(spec: &PreloadPolicySpec, run: Option<&Run>, budget: Option<u64>, now: Timestamp) -> Option<Finding> {
    spec.deadline.as_ref()?;
    let finding = |risk, reason: &str, message: String| Some(Finding::new(DEADLINE_AT_RISK, risk, reason, message));
    let Some(run) = run.filter(|run| !run.has_ended()) else {
        return finding(false, "NoRun", "no run is under way".into());
    };
    match at_risk(run, spec, budget, now) {
        Some(why) => finding(true, "TooSlow", format!("run {}: {why}", run.name)),
        None => finding(false, "InTime", format!("run {} has its time", run.name)),
    }
}

/// Writes what changed. `budget`: GET requests that the Dataset's sources may get a second.
pub async fn publish(
    context: &Context,
    policy: &PreloadPolicy,
    before: &PreloadPolicyStatus,
    mut after: PreloadPolicyStatus,
    trouble: Option<&Trouble>,
    budget: Option<u64>,
    now: Timestamp,
) -> Result<(), CallError> {
    let mut findings = findings(after.last_run.as_ref(), trouble).to_vec();
    findings.extend(deadline(&policy.spec, after.last_run.as_ref(), budget, now));
    after.conditions = conditions::merge(&before.conditions, &findings, after.observed_generation, now);
    if after == *before {
        return Ok(());
    }
    let uid = policy.uid().unwrap_or_default();
    let resting = context.remember(&uid, |memory| memory.is_resting(Instant::now()));
    if resting && without_numbers(before) == without_numbers(&after) {
        return Ok(());
    }
    let name = policy.name_any();
    let api: Api<PreloadPolicy> = Api::namespaced(context.client.clone(), &policy.namespace().unwrap_or_default());
    // With the resource version that it was computed from: no run is forgotten, and none is started twice.
    let body = json!({
        "apiVersion": API_VERSION,
        "kind": "PreloadPolicy",
        "metadata": {"name": name, "resourceVersion": policy.resource_version()},
        "status": after,
    });
    within(api.patch_status(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body))).await?;
    context.metrics.status_writes.get_or_create(&Kind { kind: "PreloadPolicy" }).inc();
    context.remember(&uid, |memory| {
        memory.numbers = Some((Instant::now(), NUMBERS));
        memory.failures = 0;
    });
    context.events.transitions(&policy.object_ref(&()), &before.conditions, &findings).await;
    Ok(())
}

/// A status of which any change is written at once.
fn without_numbers(status: &PreloadPolicyStatus) -> PreloadPolicyStatus {
    let mut status = status.clone();
    if let Some(run) = status.last_run.as_mut().filter(|run| !run.has_ended()) {
        let known = run.total_files.map(|_| 0);
        (run.files, run.bytes, run.percent) = (None, None, None);
        (run.total_files, run.total_bytes) = (known, known);
        (run.bytes_per_second, run.eta_time) = (None, None);
    }
    for risk in status.conditions.iter_mut().filter(|condition| condition.type_ == DEADLINE_AT_RISK) {
        risk.message.clear();
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reasons(run: Option<&Run>, trouble: Option<Trouble>) -> (String, bool, bool) {
        let [complete, failed] = findings(run, trouble.as_ref());
        assert_eq!(complete.reason, failed.reason);
        (complete.reason, complete.status, failed.status)
    }

    #[test]
    fn a_run_is_complete_or_failed_or_neither() {
        let run = |phase: RunPhase| -> Run {
            serde_json::from_value(json!({
                "name": "r", "uid": "u", "trigger": "Request", "phase": phase, "startTime": "2026-01-01T00:00:00Z",
            }))
            .unwrap()
        };
        assert_eq!(reasons(Some(&run(RunPhase::Running)), None), ("Loading".into(), false, false));
        assert_eq!(reasons(Some(&run(RunPhase::Complete)), None), ("Loaded".into(), true, false));
        assert_eq!(reasons(Some(&run(RunPhase::Failed)), None), ("RunFailed".into(), false, true));
        assert_eq!(reasons(None, Some(Trouble::NoDataset("d".into()))), ("DatasetNotFound".into(), false, true));
        // What was loaded is loaded, though no other run starts now.
        let suspended = reasons(Some(&run(RunPhase::Complete)), Some(Trouble::Suspended));
        assert_eq!(suspended, ("Loaded".into(), true, false));
        let wrong = CalendarError::TimeZone("Mars/Olympus".into());
        let wrong = reasons(Some(&run(RunPhase::Complete)), Some(Trouble::Schedule(wrong)));
        assert_eq!(wrong, ("InvalidSchedule".into(), false, true));
    }
}
