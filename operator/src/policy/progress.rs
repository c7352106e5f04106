//! What a run's Job and the workers say, put into the status. Pure.

use std::time::Duration;

use forebay_api::{HistoryLimits, PreloadPolicyStatus, Run, RunPhase};
use forebay_preload::{
    progress::{count, end, since},
    run::{judge, sum},
};
use k8s_openapi::jiff::Timestamp;

use crate::{poll::RunSeen, views::JobView};

/// How long a Job that was just made may not be known here yet.
const UNKNOWN: Duration = Duration::from_secs(30);
/// How long the last numbers of a run that has ended are waited for.
const LAST_WORDS: Duration = Duration::from_secs(15);

/// Brings a run up to date.
pub fn update(run: &mut Run, job: Option<&JobView>, seen: Option<&RunSeen>, now: Timestamp) {
    if run.has_ended() {
        return;
    }
    let mut finished = false;
    if let Some(seen) = seen {
        // Without the share of a worker the numbers say less than what is the case: those before are better.
        if seen.is_whole {
            let all = sum(seen.shares.values());
            count(run, &all, now);
            finished = all.finished;
        }
        (run.phase, run.message) = (RunPhase::Running, None);
    }
    let Some(job) = job else {
        if since(run.start_time.0, now) <= UNKNOWN {
            return;
        }
        // It may have gone by itself, when its time to live was over.
        match finished && seen.and_then(reason).is_none() {
            true => complete(run, now),
            false => end(run, RunPhase::Failed, Some("its Job was deleted".into()), now),
        }
        return;
    };
    let Some(ended) = job.end() else {
        if seen.is_none() {
            run.message = Some("no worker loads anything for it yet: see its pod".into());
        }
        return;
    };
    let at = ended.last_transition_time.as_ref().map_or(now, |time| time.0);
    if ended.kind == "Complete" {
        // Workers are asked every few seconds; one that has restarted since knows nothing of it any more.
        if finished || since(at, now) > LAST_WORDS {
            complete(run, at);
        }
        return;
    }
    let why = seen.and_then(reason).map_or_else(String::new, |reason| format!(": {reason}"));
    let said = format!("{}{why}", if ended.reason.is_empty() { &ended.message } else { &ended.reason });
    end(run, RunPhase::Failed, Some(said), at);
}

/// Ends a run that loaded everything, whatever the last numbers that were heard.
fn complete(run: &mut Run, at: Timestamp) {
    run.files = run.total_files.or(run.files);
    run.bytes = run.total_bytes.or(run.bytes);
    run.percent = Some(100);
    end(run, RunPhase::Complete, None, at);
}

/// Why not everything is loaded, by what workers say.
fn reason(seen: &RunSeen) -> Option<String> {
    let all = sum(seen.shares.values());
    match judge(all) {
        Err(error) => Some(error.to_string()),
        Ok(_) => seen.errors.first().cloned(),
    }
}

/// Puts a run before the others: the one that was the last becomes the first of those before it.
pub fn begin(status: &mut PreloadPolicyStatus, run: Run) {
    if let Some(before) = status.last_run.replace(run) {
        status.runs.insert(0, before);
    }
}

/// Drops the oldest of what is above the limits.
pub fn trim(status: &mut PreloadPolicyStatus, limits: &HistoryLimits) {
    let (mut succeeded, mut failed) = (limits.succeeded, limits.failed);
    status.runs.retain(|run| {
        let left = if run.phase == RunPhase::Complete { &mut succeeded } else { &mut failed };
        let keeps = *left > 0;
        *left = left.saturating_sub(1);
        keeps
    });
}

#[cfg(test)]
mod tests {
    use forebay_api::RunTrigger;
    use forebay_protocol::worker::LoadProgress;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn run(name: &str, phase: RunPhase) -> Run {
        serde_json::from_value(json!({
            "name": name, "uid": "u", "trigger": RunTrigger::Request, "phase": phase, "startTime": Time(at(100)),
        }))
        .unwrap()
    }

    fn job(end: Option<(&str, &str, i64)>) -> JobView {
        let conditions = end.map(|(kind, reason, time)| {
            json!([{"type": kind, "status": "True", "reason": reason, "lastTransitionTime": Time(at(time))}])
        });
        serde_json::from_value(json!({"metadata": {}, "status": {"conditions": conditions.unwrap_or(json!([]))}}))
            .unwrap()
    }

    fn seen(done_bytes: u64, finished: bool, failed_files: u64) -> RunSeen {
        let share = |done_bytes| LoadProgress {
            total_files: 5,
            total_bytes: 500,
            done_files: done_bytes / 100,
            done_bytes,
            listed: true,
            finished,
            failed_files,
            failures: vec!["/a: gone".into(); failed_files as usize],
            ..LoadProgress::default()
        };
        let shares = [("w-0".into(), share(done_bytes)), ("w-1".into(), share(500))].into();
        RunSeen { shares, is_whole: true, errors: vec![] }
    }

    /// One worker was started again, and knows nothing of it.
    fn half_seen(done_bytes: u64) -> RunSeen {
        let mut half = seen(done_bytes, true, 0);
        half.shares.remove("w-1");
        RunSeen { is_whole: false, ..half }
    }

    #[test]
    fn numbers_are_those_of_all_workers_and_an_end_waits_for_the_last() {
        let mut one = run("a", RunPhase::Pending);
        update(&mut one, Some(&job(None)), None, at(101));
        assert_eq!(one.phase, RunPhase::Pending);
        update(&mut one, Some(&job(None)), Some(&seen(100, false, 0)), at(110));
        assert_eq!(
            (one.phase, one.files, one.total_files, one.percent),
            (RunPhase::Running, Some(6), Some(10), Some(60))
        );
        assert_eq!((one.bytes_per_second, one.eta_time.clone()), (Some(60), Some(Time(at(116)))));
        update(&mut one, Some(&job(None)), Some(&half_seen(500)), at(111));
        assert_eq!((one.files, one.total_files), (Some(6), Some(10)), "less than all is not told");
        // The Job is faster than the numbers.
        update(&mut one, Some(&job(Some(("Complete", "", 112)))), Some(&half_seen(500)), at(113));
        assert_eq!(one.phase, RunPhase::Running);
        update(&mut one, Some(&job(Some(("Complete", "", 112)))), Some(&seen(100, false, 0)), at(113));
        assert_eq!(one.phase, RunPhase::Running);
        update(&mut one, Some(&job(Some(("Complete", "", 112)))), Some(&seen(500, true, 0)), at(114));
        assert_eq!(
            (one.phase, one.percent, one.completion_time.clone()),
            (RunPhase::Complete, Some(100), Some(Time(at(112))))
        );
        assert_eq!(one.eta_time, None);
        // What has ended stays as it is.
        let ended = one.clone();
        update(&mut one, None, None, at(1000));
        assert_eq!(one, ended);
    }

    #[test]
    fn a_run_that_is_not_complete_says_why() {
        let mut one = run("a", RunPhase::Running);
        update(&mut one, Some(&job(Some(("Failed", "BackoffLimitExceeded", 130)))), Some(&seen(400, true, 1)), at(131));
        assert_eq!(one.phase, RunPhase::Failed);
        let message = one.message.unwrap();
        assert!(message.starts_with("BackoffLimitExceeded: ") && message.contains("/a: gone"), "{message}");
        let mut one = run("a", RunPhase::Running);
        update(&mut one, None, None, at(110));
        assert_eq!(one.phase, RunPhase::Running, "the Job may not be known yet");
        update(&mut one, None, None, at(131));
        assert_eq!((one.phase, one.message.as_deref()), (RunPhase::Failed, Some("its Job was deleted")));
        // Unless everything was loaded before it went.
        let mut one = run("a", RunPhase::Running);
        update(&mut one, None, Some(&seen(500, true, 0)), at(131));
        assert_eq!((one.phase, one.files), (RunPhase::Complete, Some(10)));
    }

    #[test]
    fn history_is_bounded_by_how_runs_ended() {
        let mut status = PreloadPolicyStatus::default();
        for number in 0..6 {
            let phase = if number % 2 == 0 { RunPhase::Complete } else { RunPhase::Failed };
            begin(&mut status, run(&format!("r{number}"), phase));
        }
        trim(&mut status, &HistoryLimits { succeeded: 2, failed: 1 });
        let names: Vec<&str> = status.runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!((status.last_run.as_ref().unwrap().name.as_str(), names), ("r5", vec!["r4", "r3", "r2"]));
    }
}
