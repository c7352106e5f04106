//! How a CacheRuntime is, from what was found. Pure.

use forebay_api::{CacheRuntime, CacheRuntimeStatus, Phase};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use crate::{
    conditions::{DEGRADED, Finding, PROGRESSING, READY},
    runtime::{apply::Outcome, dereference::Found},
    views::WorkerPod,
};

/// It needs a namespace that admits more than `restricted` pods.
const PRIVILEGED_PODS: &str = "PrivilegedPods";
/// Label of a pod that changes with its template.
const REVISION: &str = "controller-revision-hash";
/// How long a worker may take to start before it counts as away.
const START: SignedDuration = SignedDuration::from_secs(60);

/// How a CacheRuntime is.
pub struct Assessment {
    pub phase: Phase,
    pub findings: Vec<Finding>,
}

/// What keeps a runtime from being all it should be.
struct Problem {
    reason: &'static str,
    message: String,
    /// Somebody has to do something about it.
    needs_help: bool,
}

/// How a runtime is. `None`: its workers have not been asked yet, and what was said before stays.
pub fn assess(
    runtime: &CacheRuntime,
    before: &CacheRuntimeStatus,
    found: &Found,
    outcome: &Outcome,
    now: Timestamp,
) -> Option<Assessment> {
    if found.seen.is_none() && !before.conditions.is_empty() {
        return None;
    }
    let (serving, wanted) = (found.serving(), found.replicas as usize);
    let problem = problem(runtime, before, found, outcome, now);
    let counted = format!("{serving} of {wanted} workers serve");

    let ready = match &problem {
        Some(problem) if serving == 0 => Finding::new(READY, false, problem.reason, &problem.message),
        _ => Finding::new(READY, serving > 0, "Serving", &counted),
    };
    let replacing =
        found.wanted().filter_map(|pod| pod.labels().get(REVISION)).collect::<std::collections::HashSet<_>>();
    let progressing = if replacing.len() > 1 {
        Finding::new(PROGRESSING, true, "WorkersStarting", "workers are being replaced, one after another")
    } else if serving < wanted {
        Finding::new(PROGRESSING, true, "WorkersStarting", &counted)
    } else {
        Finding::new(PROGRESSING, false, "Serving", "every worker is as it should be")
    };
    // That the first workers start is what was asked for.
    let degraded = match &problem {
        Some(problem) if problem.needs_help || serving > 0 => {
            Finding::new(DEGRADED, true, problem.reason, &problem.message)
        }
        _ => Finding::new(DEGRADED, false, "Serving", "nothing is wrong"),
    };
    let phase = match &problem {
        None => Phase::Ready,
        Some(_) if serving > 0 => Phase::Degraded,
        Some(problem) if problem.needs_help => Phase::Failed,
        Some(_) => Phase::Pending,
    };
    let mut findings = vec![ready, progressing, degraded];
    findings.extend(privileged(runtime));
    Some(Assessment { phase, findings })
}

fn problem(
    runtime: &CacheRuntime,
    before: &CacheRuntimeStatus,
    found: &Found,
    outcome: &Outcome,
    now: Timestamp,
) -> Option<Problem> {
    let help = |reason, message| Some(Problem { reason, message, needs_help: true });
    match outcome {
        Outcome::NameTaken(message) => {
            return help("NameTaken", format!("{message}; remove it, or give the CacheRuntime another name"));
        }
        Outcome::Invalid(message) => return help("SpecInvalid", message.clone()),
        Outcome::Applied | Outcome::Failed(_) | Outcome::Ending => {}
    }
    if let Some((pod, why)) = found.wanted().find_map(|pod| Some((pod, pod.unschedulable()?))) {
        return help("CannotSchedule", format!("no node takes {}: {why}", pod.name_any()));
    }
    let seen = found.seen.as_deref();
    let tiers = seen.into_iter().flat_map(|seen| &seen.workers);
    if let Some((name, worker)) = tiers.into_iter().find(|(_, worker)| !worker.tier_problem.is_empty()) {
        return help("TierFailed", format!("{name} keeps nothing: {}", worker.tier_problem));
    }
    let (serving, wanted) = (found.serving(), found.replicas as usize);
    if serving == wanted {
        return None;
    }
    let old = |since: Option<Timestamp>| since.is_some_and(|since| now.duration_since(since) > START);
    let created = |pod: &WorkerPod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let known = |name: &str| before.table.iter().flat_map(|table| &table.members).any(|member| member.name == name);
    let stateful_set = forebay_api::object_name(&runtime.name_any());
    let mut away: Vec<String> = Vec::new();
    let mut starting = 0;
    for ordinal in 0..found.replicas {
        let name = format!("{stateful_set}-{ordinal}");
        let pod = found.pods.iter().find(|(other, _)| *other == ordinal).map(|(_, pod)| &**pod);
        let reached = seen.and_then(|seen| seen.workers.get(&name)).is_some_and(|worker| worker.answered);
        match pod {
            Some(pod) if pod.is_ready() && !pod.is_terminating() && reached => {}
            Some(pod) if pod.is_ready() && !pod.is_terminating() => away.push(format!("{name} does not answer")),
            Some(pod) if old(created(pod)) => away.push(format!("{name} is not ready")),
            Some(_) => starting += 1,
            None if known(&name) || old(runtime.metadata.creation_timestamp.as_ref().map(|time| time.0)) => {
                away.push(format!("{name} has no pod (see the events of StatefulSet {stateful_set})"));
            }
            None => starting += 1,
        }
    }
    let counted = format!("{serving} of {wanted} workers serve");
    if away.is_empty() {
        let message = format!("{counted}, {starting} starting");
        return Some(Problem { reason: "WorkersStarting", message, needs_help: false });
    }
    let more = away.len().saturating_sub(3);
    away.truncate(3);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    help("WorkersUnavailable", format!("{counted}: {}{more}", away.join(", ")))
}

/// What the namespace has to admit, if that is more than `restricted`.
fn privileged(runtime: &CacheRuntime) -> Option<Finding> {
    let tier = runtime.spec.tiers.iter().find(|tier| tier.volume.host_path.is_some())?;
    let message = format!(
        "tier {} is a directory of the nodes (hostPath), which the Pod Security Standards baseline and restricted \
         refuse: the namespace must not enforce them (kubectl label namespace {} \
         pod-security.kubernetes.io/enforce=privileged)",
        tier.name,
        runtime.namespace().unwrap_or_default(),
    );
    Some(Finding::new(PRIVILEGED_PODS, true, "HostPath", message))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use serde_json::json;

    use super::*;
    use crate::poll::{RuntimeSeen, WorkerSeen};

    const NOW: i64 = 1_000_000;

    fn runtime(volume: serde_json::Value, table: &[&str]) -> CacheRuntime {
        let members: Vec<_> =
            table.iter().map(|name| json!({"name": name, "address": "a:1", "weight": 1, "state": "Serving"})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": "w", "namespace": "n", "creationTimestamp": Timestamp::from_second(NOW - 5).unwrap()},
            "spec": {"replicas": 2, "tiers": [{"name": "t", "medium": "SSD", "capacity": "1Gi", "volume": volume}]},
            "status": {"table": {"epoch": 1, "members": members}},
        }))
        .unwrap()
    }

    fn pod(ordinal: u32, ready: bool, age: i64) -> (u32, Arc<WorkerPod>) {
        let ready = if ready { "True" } else { "False" };
        let pod = json!({
            "metadata": {"name": format!("w-forebay-{ordinal}"), "labels": {"controller-revision-hash": "1"},
                "creationTimestamp": Timestamp::from_second(NOW - age).unwrap()},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
        });
        (ordinal, Arc::new(serde_json::from_value(pod).unwrap()))
    }

    fn found(pods: Vec<(u32, Arc<WorkerPod>)>, answer: &[u32]) -> Found {
        let seen = |ordinal: &u32| {
            (format!("w-forebay-{ordinal}"), WorkerSeen { serving: true, answered: true, ..WorkerSeen::default() })
        };
        let workers: BTreeMap<_, _> = answer.iter().map(seen).collect();
        Found { pods, seen: Some(Arc::new(RuntimeSeen { workers, ..RuntimeSeen::default() })), replicas: 2 }
    }

    /// Phase, status and reason of Ready, reason of Degraded if it is.
    fn judge(runtime: &CacheRuntime, found: &Found, outcome: &Outcome) -> (Phase, bool, String, Option<String>) {
        let before = runtime.status.clone().unwrap_or_default();
        let now = Timestamp::from_second(NOW).unwrap();
        let Assessment { phase, findings } = assess(runtime, &before, found, outcome, now).unwrap();
        let (ready, degraded) = (&findings[0], &findings[2]);
        assert_eq!((ready.kind, degraded.kind), (READY, DEGRADED));
        (phase, ready.status, ready.reason.clone(), Some(degraded.reason.clone()).filter(|_| degraded.status))
    }

    fn empty() -> serde_json::Value {
        json!({"emptyDir": {}})
    }

    #[test]
    fn it_starts_and_is_ready_when_all_serve() {
        let runtime = runtime(empty(), &["w-forebay-0"]);
        let judged = judge(&runtime, &found(vec![], &[]), &Outcome::Applied);
        // One was there and is gone, the other one has never been there.
        assert_eq!(judged.0, Phase::Failed);
        let starting = found(vec![pod(0, false, 5), pod(1, false, 5)], &[]);
        let waiting = (Phase::Pending, false, "WorkersStarting".to_owned(), None);
        assert_eq!(judge(&runtime, &starting, &Outcome::Applied), waiting);
        let half = found(vec![pod(0, true, 9), pod(1, false, 5)], &[0]);
        let degraded = (Phase::Degraded, true, "Serving".to_owned(), Some("WorkersStarting".to_owned()));
        assert_eq!(judge(&runtime, &half, &Outcome::Applied), degraded);
        let all = found(vec![pod(0, true, 9), pod(1, true, 9)], &[0, 1]);
        assert_eq!(judge(&runtime, &all, &Outcome::Applied), (Phase::Ready, true, "Serving".into(), None));
    }

    #[test]
    fn workers_that_do_not_answer_are_named() {
        let runtime = runtime(empty(), &["w-forebay-0", "w-forebay-1"]);
        let found = found(vec![pod(0, true, 900), pod(1, true, 900)], &[0]);
        let judged = judge(&runtime, &found, &Outcome::Applied);
        assert_eq!(judged, (Phase::Degraded, true, "Serving".into(), Some("WorkersUnavailable".into())));
        let before = runtime.status.clone().unwrap();
        let assessed = assess(&runtime, &before, &found, &Outcome::Applied, Timestamp::from_second(NOW).unwrap());
        assert!(assessed.unwrap().findings[2].message.contains("w-forebay-1 does not answer"));
    }

    #[test]
    fn what_needs_somebody_fails_it() {
        let runtime = runtime(empty(), &[]);
        let mut unschedulable = (*pod(0, false, 900).1).clone();
        unschedulable.status.conditions = serde_json::from_value(json!([{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes are available",
        }]))
        .unwrap();
        let nowhere = found(vec![(0, Arc::new(unschedulable))], &[]);
        let taken = Outcome::NameTaken("Service w-forebay exists".into());
        for (found, outcome, reason) in [
            (nowhere, Outcome::Applied, "CannotSchedule"),
            (found(vec![], &[]), taken, "NameTaken"),
            (found(vec![], &[]), Outcome::Invalid("no".into()), "SpecInvalid"),
        ] {
            let expected = (Phase::Failed, false, reason.to_owned(), Some(reason.to_owned()));
            assert_eq!(judge(&runtime, &found, &outcome), expected);
        }
    }

    #[test]
    fn a_tier_that_keeps_nothing_degrades_it() {
        let runtime = runtime(empty(), &["w-forebay-0", "w-forebay-1"]);
        let mut found = found(vec![pod(0, true, 9), pod(1, true, 9)], &[0, 1]);
        let mut seen = (*found.seen.unwrap()).clone();
        seen.workers.get_mut("w-forebay-1").unwrap().tier_problem = "read-only".into();
        found.seen = Some(Arc::new(seen));
        let judged = judge(&runtime, &found, &Outcome::Applied);
        assert_eq!(judged, (Phase::Degraded, true, "Serving".into(), Some("TierFailed".into())));
    }

    #[test]
    fn a_directory_of_the_nodes_says_what_the_namespace_needs() {
        let all = || found(vec![pod(0, true, 9), pod(1, true, 9)], &[0, 1]);
        let now = Timestamp::from_second(NOW).unwrap();
        let said = |volume| {
            let runtime = runtime(volume, &[]);
            let before = CacheRuntimeStatus::default();
            let findings = assess(&runtime, &before, &all(), &Outcome::Applied, now).unwrap().findings;
            findings.into_iter().find(|finding| finding.kind == PRIVILEGED_PODS)
        };
        assert!(said(empty()).is_none());
        let message = said(json!({"hostPath": {"path": "/mnt"}})).unwrap().message;
        assert!(message.contains("label namespace n pod-security.kubernetes.io/enforce=privileged"), "{message}");
    }
}
