//! How far a run is, for the status.

use std::time::Duration;

use forebay_api::{Run, RunPhase};
use forebay_protocol::worker::LoadProgress;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

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
}
