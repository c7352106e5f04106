//! How far a run is, for the status.

use std::time::Duration;

use forebay_api::{PreloadPolicySpec, Run, RunPhase, rules};
use forebay_protocol::worker::LoadProgress;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// How long a run is measured before its rate says when it ends.
const MEASURED: Duration = Duration::from_secs(5);

/// Why a run will miss its deadline, if that is what its limits, the GET requests that the sources may get a second
/// (`budget`) or its rate say.
pub fn at_risk(run: &Run, spec: &PreloadPolicySpec, budget: Option<u64>, now: Timestamp) -> Option<String> {
    let deadline = Duration::from_secs(rules::seconds(spec.deadline.as_deref()?)?);
    let total = run.total_bytes.filter(|_| !run.has_ended())?;
    let left = deadline.saturating_sub(since(run.start_time.0, now)).as_secs();
    let bytes = total.saturating_sub(run.bytes.unwrap_or_default());
    let files = run.total_files.unwrap_or_default().saturating_sub(run.files.unwrap_or_default());
    // As if nothing of it were held yet: what is counts at once, and the next look knows better.
    let bandwidth = spec.limits.bandwidth.as_ref().and_then(|limit| limit.bytes().ok());
    if let Some(seconds) = bandwidth.and_then(|limit| bytes.checked_div(limit)).filter(|seconds| *seconds > left) {
        return Some(format!("{bytes} bytes take {seconds} s by spec.limits.bandwidth, and {left} s are left"));
    }
    // At least one request for a file.
    let own = spec.limits.requests_per_second.map(|limit| (u64::from(limit), "spec.limits.requestsPerSecond"));
    let common = budget.map(|budget| (budget, "the request budgets of the Dataset's sources"));
    if let Some((limit, name)) = own.into_iter().chain(common).min()
        && let Some(seconds) = files.checked_div(limit).filter(|seconds| *seconds > left)
    {
        return Some(format!("{files} files take {seconds} s by {name}, and {left} s are left"));
    }
    let rate = run.bytes_per_second.filter(|_| since(run.start_time.0, now) >= MEASURED)?;
    let seconds = bytes.checked_div(rate).unwrap_or(u64::MAX);
    (seconds > left).then(|| match rate {
        0 => format!("nothing is loaded yet, and {left} s are left for {bytes} bytes"),
        _ => format!("{bytes} bytes take {seconds} s at {rate} bytes a second, and {left} s are left"),
    })
}

/// Takes the sum of all shares.
pub fn count(run: &mut Run, sum: &LoadProgress, now: Timestamp) {
    run.files = Some(sum.done_files);
    run.bytes = Some(sum.done_bytes);
    run.failed_files = Some(sum.failed_files);
    run.first_failures.clone_from(&sum.failures);
    if sum.listed {
        run.total_files = Some(sum.total_files);
        run.total_bytes = Some(sum.total_bytes);
        let percent = (u128::from(sum.done_bytes) * 100).checked_div(u128::from(sum.total_bytes)).unwrap_or(100);
        run.percent = u8::try_from(percent).ok();
    }
    let rate = sum.done_bytes / since(run.start_time.0, now).as_secs().max(1);
    run.bytes_per_second = Some(rate);
    run.eta_time = (sum.listed && !sum.finished)
        .then(|| sum.total_bytes.saturating_sub(sum.done_bytes).checked_div(rate))
        .flatten()
        .and_then(|left| now.checked_add(SignedDuration::from_secs(i64::try_from(left).ok()?)).ok())
        .map(Time);
}

/// Ends a run.
pub fn end(run: &mut Run, phase: RunPhase, message: Option<String>, at: Timestamp) {
    run.phase = phase;
    run.message = message;
    run.completion_time = Some(Time(at));
    run.eta_time = None;
}

/// The time between two; none if they are the other way round.
pub fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails here")]
    use forebay_api::RunTrigger;

    use serde_json::{Value, json};

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn rate_and_end_are_those_since_the_start() {
        let mut run = Run::new("r".into(), "u".into(), RunTrigger::Request, Time(at(100)));
        let mut sum = LoadProgress { done_files: 6, done_bytes: 600, ..LoadProgress::default() };
        count(&mut run, &sum, at(110));
        assert_eq!((run.files, run.total_files, run.percent, run.eta_time.clone()), (Some(6), None, None, None));
        assert_eq!(run.bytes_per_second, Some(60));
        (sum.total_files, sum.total_bytes, sum.listed) = (10, 1000, true);
        count(&mut run, &sum, at(110));
        assert_eq!((run.percent, run.eta_time.clone()), (Some(60), Some(Time(at(116)))));
        (sum.done_bytes, sum.finished) = (1000, true);
        count(&mut run, &sum, at(117));
        assert_eq!((run.percent, run.eta_time.clone()), (Some(100), None));
        // Nothing is all of nothing.
        count(&mut run, &LoadProgress { listed: true, finished: true, ..LoadProgress::default() }, at(117));
        assert_eq!(run.percent, Some(100));
    }

    fn risk(spec: Value, run: Value, now: i64) -> Option<String> {
        risk_with(spec, run, None, now)
    }

    fn risk_with(spec: Value, run: Value, budget: Option<u64>, now: i64) -> Option<String> {
        let (mut spec, mut run) = (spec, run);
        spec["datasetRef"] = json!({"name": "d"});
        for (field, value) in
            [("name", "r"), ("uid", "u"), ("trigger", "Request"), ("startTime", "1970-01-01T00:01:40Z")]
        {
            run[field] = json!(value);
        }
        let (spec, run) = (serde_json::from_value(spec).unwrap(), serde_json::from_value(run).unwrap());
        at_risk(&run, &spec, budget, Timestamp::from_second(100 + now).unwrap())
    }

    #[test]
    fn a_deadline_is_at_risk_by_limits_at_once_and_by_the_rate_after_a_while() {
        let run = json!({"phase": "Running", "totalBytes": 1000, "bytes": 0, "totalFiles": 10, "bytesPerSecond": 20});
        let bandwidth = |limit: &str| json!({"deadline": "1m", "limits": {"bandwidth": limit}});
        assert!(risk(bandwidth("10"), run.clone(), 0).is_some_and(|why| why.contains("spec.limits.bandwidth")));
        assert_eq!(risk(bandwidth("20"), run.clone(), 0), None);
        assert!(risk(bandwidth("20"), run.clone(), 20).is_some());
        let requests = json!({"deadline": "5s", "limits": {"requestsPerSecond": 1}});
        assert!(risk(requests.clone(), run.clone(), 0).is_some_and(|why| why.contains("10 files take 10 s by spec")));
        // Whichever is less.
        let budget = json!({"deadline": "4s", "limits": {"requestsPerSecond": 3}});
        assert_eq!(risk_with(budget.clone(), run.clone(), Some(3), 0), None);
        assert!(
            risk_with(budget, run.clone(), Some(2), 0)
                .is_some_and(|why| why.contains("10 files take 5 s by the request"))
        );
        assert!(risk_with(requests, run.clone(), Some(2), 0).is_some_and(|why| why.contains("by spec.limits")));
        // 50 s at its rate.
        let deadline = json!({"deadline": "52s"});
        assert_eq!((risk(deadline.clone(), run.clone(), 2), risk(json!({}), run.clone(), 2)), (None, None));
        assert!(risk(deadline.clone(), run.clone(), 6).is_some_and(|why| why.contains("46 s are left")));
        let mut stuck = run.clone();
        stuck["bytesPerSecond"] = json!(0);
        assert!(risk(deadline.clone(), stuck, 6).is_some_and(|why| why.starts_with("nothing is loaded")));
        let mut ended = run;
        ended["phase"] = json!("Complete");
        assert_eq!(risk(deadline, ended, 6), None);
    }
}
