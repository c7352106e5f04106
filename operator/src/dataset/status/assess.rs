//! How a Dataset is, from what was found. Pure.

use forebay_api::{DatasetStatus, MemberState, Phase};

use crate::{
    conditions::{self, DEGRADED, Finding, PROGRESSING, READY},
    dataset::{apply::Outcome, dereference::Found},
    poll::{DatasetSeen, RuntimeSeen, ScanState},
};

/// How a Dataset is.
pub struct Assessment {
    pub phase: Phase,
    pub findings: Vec<Finding>,
}

/// Why a Dataset cannot be used, or is less than it should be.
struct Trouble {
    reason: String,
    message: String,
    /// Somebody has to do something about it; else it is waited for.
    needs_help: bool,
    /// The message is somebody else's.
    quoted: bool,
}

impl Trouble {
    fn help(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into(), needs_help: true, quoted: false }
    }

    fn wait(reason: &str, message: impl Into<String>) -> Self {
        Self { needs_help: false, ..Self::help(reason, message) }
    }

    fn finding(&self, kind: &'static str, status: bool) -> Finding {
        Finding { quoted: self.quoted, ..Finding::new(kind, status, &self.reason, &self.message) }
    }
}

/// How a Dataset is. `None`: the workers have not been asked yet, and what was said before stays.
pub fn assess(before: &DatasetStatus, found: &Found, outcome: &Outcome) -> Option<Assessment> {
    let stopped = match stopped(found, outcome) {
        Some(trouble) => Some(trouble),
        // There are workers.
        None if found.seen.is_none() && !before.conditions.is_empty() => return None,
        None => unusable(before, found, outcome),
    };
    let (all, answering) = found.seen.as_ref().map_or((0, 0), |seen| seen.serving());
    let ready = match &stopped {
        Some(trouble) => trouble.finding(READY, false),
        None => Finding::new(READY, true, "Serving", format!("{answering} of {all} workers")),
    };
    let degraded = match &stopped {
        Some(trouble) => {
            Some(trouble).filter(|trouble| trouble.needs_help).map(|trouble| trouble.finding(DEGRADED, true))
        }
        None => impaired(found).map(|trouble| trouble.finding(DEGRADED, true)),
    };
    let is_degraded = degraded.is_some();
    let phase = match &stopped {
        Some(trouble) if trouble.needs_help => Phase::Failed,
        Some(_) => Phase::Pending,
        None if is_degraded => Phase::Degraded,
        None => Phase::Ready,
    };
    let degraded = degraded.unwrap_or_else(|| Finding::new(DEGRADED, false, "Serving", "nothing is wrong"));
    Some(Assessment { phase, findings: vec![ready, progressing(before, found), degraded] })
}

/// What has to be there before there is anybody to ask.
fn stopped(found: &Found, outcome: &Outcome) -> Option<Trouble> {
    match outcome {
        Outcome::NameTaken(message) => {
            let message = format!("{message}; remove it, or give the Dataset another name");
            return Some(Trouble::help("ClaimNameTaken", message));
        }
        Outcome::Invalid(message) => return Some(Trouble::help("SpecInvalid", message)),
        Outcome::Bound | Outcome::Binding(..) | Outcome::Failed(_) | Outcome::Ending => {}
    }
    let Some(runtime) = &found.runtime else {
        return Some(Trouble::wait("RuntimeNotFound", "there is no CacheRuntime of this name in the namespace"));
    };
    let name = runtime.metadata.name.as_deref().unwrap_or_default();
    if runtime.metadata.deletion_timestamp.is_some() {
        return Some(Trouble::wait("RuntimeNotReady", format!("CacheRuntime {name} is being deleted")));
    }
    let status = runtime.status.as_ref();
    let mut members = status.and_then(|status| status.table.as_ref()).into_iter().flat_map(|table| &table.members);
    if members.any(|member| member.state == MemberState::Serving) {
        return None;
    }
    let said = status.and_then(|status| conditions::get(&status.conditions, READY));
    Some(match said {
        Some(ready) if ready.status == "False" && ready.reason != "WorkersStarting" => {
            Trouble::wait("RuntimeNotReady", format!("CacheRuntime {name}: {}", ready.message))
        }
        _ => Trouble::wait("NoWorkers", format!("CacheRuntime {name} has no worker yet")),
    })
}

/// What keeps it from being used although there are workers.
fn unusable(before: &DatasetStatus, found: &Found, outcome: &Outcome) -> Option<Trouble> {
    let none = RuntimeSeen::default();
    let seen = found.seen.as_deref().unwrap_or(&none);
    let (all, answering) = seen.serving();
    if answering == 0 {
        // One that was never of use is waited for; of one that was, somebody should know.
        return Some(match before.phase {
            None | Some(Phase::Pending) => Trouble::wait("NoWorkers", "no worker answers yet"),
            _ => Trouble::help("WorkersUnavailable", format!("none of {all} workers answers")),
        });
    }
    if let Outcome::Binding(why, _) | Outcome::Failed(why) = outcome {
        // A claim that was bound is so while the API server does not answer.
        let bound = matches!(outcome, Outcome::Failed(_)) && before.claim_name.is_some();
        if !bound {
            return Some(Trouble::wait("VolumeNotBound", why));
        }
    }
    let nothing = DatasetSeen::default();
    let dataset = found.dataset.as_ref().unwrap_or(&nothing);
    let scan = dataset.scan.as_ref();
    let answered = before.files.is_some()
        || conditions::is_true(&before.conditions, READY)
        || scan.is_some_and(|scan| scan.directories > 0 || scan.state == ScanState::Complete);
    match &dataset.problem {
        Some(problem) if !answered => {
            return Some(Trouble { quoted: true, ..Trouble::help(&problem.reason, &problem.message) });
        }
        _ => {}
    }
    if dataset.served_by == 0 {
        return Some(Trouble::wait("RuntimeNotReady", "workers have not taken it up yet"));
    }
    (!answered).then(|| Trouble::wait("Scanning", "its sources have not answered yet"))
}

/// What makes it less than it should be while it can be used.
fn impaired(found: &Found) -> Option<Trouble> {
    let seen = found.seen.as_deref()?;
    if let Some(problem) = found.dataset.as_ref().and_then(|dataset| dataset.problem.as_ref()) {
        let message = format!("what is cached is served: {}", problem.message);
        return Some(Trouble { quoted: true, ..Trouble::help(&problem.reason, message) });
    }
    let (all, answering) = seen.serving();
    if answering < all {
        let away = seen.workers.iter().filter(|(_, worker)| worker.serving && !worker.answered);
        let away: Vec<&str> = away.take(3).map(|(name, _)| name.as_str()).collect();
        let message = format!("{answering} of {all} workers answer; away: {}", away.join(", "));
        return Some(Trouble::help("WorkersUnavailable", message));
    }
    let failed = found.dataset.as_ref().and_then(|dataset| dataset.scan.as_ref());
    if let Some(scan) = failed.filter(|scan| scan.state == ScanState::Failed) {
        let message = format!("counting its files failed: {}", scan.error);
        return Some(Trouble { quoted: true, ..Trouble::help("SourceUnreachable", message) });
    }
    let (name, worker) = seen.workers.iter().find(|(_, worker)| !worker.tier_problem.is_empty())?;
    Some(Trouble::help("RuntimeNotReady", format!("{name} keeps nothing: {}", worker.tier_problem)))
}

fn progressing(before: &DatasetStatus, found: &Found) -> Finding {
    let scan = found.dataset.as_ref().and_then(|dataset| dataset.scan.as_ref());
    let running = match scan {
        Some(scan) => scan.state == ScanState::Running,
        None => before.files.is_none(),
    };
    if running {
        Finding::new(PROGRESSING, true, "Scanning", "its files are being counted")
    } else {
        Finding::new(PROGRESSING, false, "Scanned", "its files are counted")
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use k8s_openapi::jiff::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::poll::{Problem, ScanSeen, WorkerSeen};

    fn runtime(members: usize) -> Arc<forebay_api::CacheRuntime> {
        let members: Vec<_> = (0..members)
            .map(|i| json!({"name": format!("w-{i}"), "address": "a:1", "weight": 1, "state": "Serving"}))
            .collect();
        let runtime = json!({
            "metadata": {"name": "w"},
            "spec": {"tiers": []},
            "status": {"table": {"epoch": 1, "members": members}},
        });
        Arc::new(serde_json::from_value(runtime).unwrap())
    }

    fn scan(state: ScanState, directories: u64) -> ScanSeen {
        ScanSeen { state, files: 3, bytes: 9, directories, error: "broken".into(), ..ScanSeen::default() }
    }

    /// Two workers that answer and serve a Dataset that is counted.
    fn good() -> Found {
        let worker = WorkerSeen { serving: true, answered: true, ..WorkerSeen::default() };
        let workers: BTreeMap<_, _> = (0..2).map(|i| (format!("w-{i}"), worker.clone())).collect();
        let dataset = DatasetSeen {
            served_by: 2,
            is_held: true,
            scan: Some(scan(ScanState::Complete, 1)),
            ..DatasetSeen::default()
        };
        Found {
            runtime: Some(runtime(2)),
            seen: Some(Arc::new(RuntimeSeen { workers, ..RuntimeSeen::default() })),
            dataset: Some(dataset),
            claim: None,
        }
    }

    fn with_workers(mut found: Found, change: impl Fn(usize, &mut WorkerSeen)) -> Found {
        let mut seen = (*found.seen.unwrap()).clone();
        seen.workers.values_mut().enumerate().for_each(|(index, worker)| change(index, worker));
        found.seen = Some(Arc::new(seen));
        found
    }

    fn with_dataset(mut found: Found, change: impl FnOnce(&mut DatasetSeen)) -> Found {
        change(found.dataset.as_mut().unwrap());
        found
    }

    fn trouble(reason: &str) -> Option<Problem> {
        Some(Problem { reason: reason.into(), message: "source /: 403".into() })
    }

    /// What was said when all was well.
    fn was_ready() -> DatasetStatus {
        let said = assess(&DatasetStatus::default(), &good(), &Outcome::Bound).unwrap();
        DatasetStatus {
            phase: Some(said.phase),
            files: Some(3),
            claim_name: Some("d".into()),
            conditions: conditions::merge(&[], &said.findings, None, Timestamp::UNIX_EPOCH),
            ..DatasetStatus::default()
        }
    }

    /// Phase, reason of Ready with its status, reason of Degraded if it is.
    fn judge(before: &DatasetStatus, found: &Found, outcome: &Outcome) -> (Phase, bool, String, Option<String>) {
        let Assessment { phase, findings } = assess(before, found, outcome).unwrap();
        let [ready, _, degraded] = findings.try_into().unwrap();
        assert_eq!((ready.kind, degraded.kind), (READY, DEGRADED));
        (phase, ready.status, ready.reason, Some(degraded.reason).filter(|_| degraded.status))
    }

    #[test]
    fn a_dataset_that_is_served_is_ready() {
        let fresh = DatasetStatus::default();
        assert_eq!(judge(&fresh, &good(), &Outcome::Bound), (Phase::Ready, true, "Serving".into(), None));
        // A scan that has listed something shows that the source answers.
        let scanning = with_dataset(good(), |dataset| dataset.scan = Some(scan(ScanState::Running, 1)));
        assert_eq!(judge(&fresh, &scanning, &Outcome::Bound).0, Phase::Ready);
    }

    #[test]
    fn what_is_waited_for_is_pending() {
        let fresh = DatasetStatus::default();
        let no_runtime = Found::default();
        let no_workers = Found { runtime: Some(runtime(0)), ..Found::default() };
        let nobody_answers = with_workers(good(), |_, worker| worker.answered = false);
        let not_taken_up = Found { dataset: None, ..good() };
        let nothing_listed = with_dataset(good(), |dataset| dataset.scan = Some(scan(ScanState::Running, 0)));
        for (found, outcome, reason) in [
            (no_runtime, Outcome::Bound, "RuntimeNotFound"),
            (no_workers, Outcome::Bound, "NoWorkers"),
            (nobody_answers, Outcome::Bound, "NoWorkers"),
            (good(), Outcome::Binding("soon".into(), std::time::Duration::ZERO), "VolumeNotBound"),
            (not_taken_up, Outcome::Bound, "RuntimeNotReady"),
            (nothing_listed, Outcome::Bound, "Scanning"),
        ] {
            assert_eq!(judge(&fresh, &found, &outcome), (Phase::Pending, false, reason.into(), None));
        }
    }

    #[test]
    fn a_source_that_never_answered_fails_it_and_one_that_did_degrades_it() {
        for reason in ["CredentialsInvalid", "BucketNotFound", "SourceUnreachable", "SecretNotFound"] {
            let broken = with_dataset(good(), |dataset| {
                dataset.problem = trouble(reason);
                dataset.scan = None;
            });
            let named = Some(reason.to_owned());
            let fresh = judge(&DatasetStatus::default(), &broken, &Outcome::Bound);
            assert_eq!(fresh, (Phase::Failed, false, reason.into(), named.clone()));
            let before = judge(&was_ready(), &broken, &Outcome::Bound);
            assert_eq!(before, (Phase::Degraded, true, "Serving".into(), named));
        }
        // Both ways.
        assert_eq!(judge(&was_ready(), &good(), &Outcome::Bound), (Phase::Ready, true, "Serving".into(), None));
    }

    #[test]
    fn workers_that_are_away_degrade_it_and_all_of_them_fail_it() {
        let one = with_workers(good(), |index, worker| worker.answered = index == 0);
        let judged = judge(&was_ready(), &one, &Outcome::Bound);
        assert_eq!(judged, (Phase::Degraded, true, "Serving".into(), Some("WorkersUnavailable".into())));
        let none = with_workers(good(), |_, worker| worker.answered = false);
        let judged = judge(&was_ready(), &none, &Outcome::Bound);
        let away = "WorkersUnavailable".to_owned();
        assert_eq!(judged, (Phase::Failed, false, away.clone(), Some(away)));
    }

    #[test]
    fn a_tier_that_keeps_nothing_and_a_scan_that_failed_are_told() {
        let full = with_workers(good(), |_, worker| worker.tier_problem = "disk full".into());
        assert_eq!(judge(&was_ready(), &full, &Outcome::Bound).3.as_deref(), Some("RuntimeNotReady"));
        let failed = with_dataset(good(), |dataset| dataset.scan = Some(scan(ScanState::Failed, 1)));
        assert_eq!(judge(&was_ready(), &failed, &Outcome::Bound).3.as_deref(), Some("SourceUnreachable"));
    }

    #[test]
    fn a_foreign_claim_needs_somebody() {
        let taken = "ClaimNameTaken".to_owned();
        let judged = judge(&DatasetStatus::default(), &good(), &Outcome::NameTaken("it exists".into()));
        assert_eq!(judged, (Phase::Failed, false, taken.clone(), Some(taken)));
    }

    #[test]
    fn what_was_said_stays_until_workers_were_asked_and_while_the_api_server_is_away() {
        let unknown = Found { seen: None, dataset: None, ..good() };
        assert!(assess(&was_ready(), &unknown, &Outcome::Bound).is_none());
        // A new one is not left without a word.
        assert!(assess(&DatasetStatus::default(), &unknown, &Outcome::Bound).is_some());
        let judged = judge(&was_ready(), &good(), &Outcome::Failed("timeout".into()));
        assert_eq!(judged.0, Phase::Ready);
    }
}
