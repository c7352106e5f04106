//! Which run is to start.

use forebay_api::{
    RunTrigger, Trigger,
    calendar::{Calendar, CalendarError},
};
use jiff::Timestamp;

/// What has happened so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// Since when the policy has been there: earlier times of its schedules do not count.
    pub since: Timestamp,
    /// The last time of a schedule for which a run started.
    pub schedule: Option<Timestamp>,
    /// UID of the last Dataset for which trigger `datasetReady` started a run.
    pub dataset: Option<String>,
    /// The last request for which a run started.
    pub request: Option<String>,
    /// Revision of the Dataset with which the last run began, or with which it was first seen.
    pub revision: Option<String>,
}

/// What is the case.
#[derive(Clone, Copy, Debug)]
pub struct Present<'a> {
    /// The time.
    pub now: Timestamp,
    /// UID of the Dataset, which is Ready.
    pub dataset: &'a str,
    /// What somebody asks for, if anybody does: any text.
    pub request: Option<&'a str>,
    /// Its revision, if it is known.
    pub revision: Option<&'a str>,
}

/// A run that is to start. It is all runs that are due: none of them loads more than it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// What it is due to, first of all.
    pub trigger: RunTrigger,
    /// What has happened once it has started.
    pub past: Past,
}

/// The run that is to start now, if one is.
pub fn due(triggers: &[Trigger], past: &Past, present: Present<'_>) -> Result<Option<Due>, CalendarError> {
    let mut after = past.clone();
    let mut trigger = None;
    let mut asked_by = |by| trigger = trigger.or(Some(by));
    if let Some(request) = present.request.filter(|request| past.request.as_deref() != Some(request)) {
        after.request = Some(request.to_owned());
        asked_by(RunTrigger::Request);
    }
    let on_ready = triggers.iter().any(|trigger| trigger.dataset_ready.is_some());
    if on_ready && past.dataset.as_deref() != Some(present.dataset) {
        after.dataset = Some(present.dataset.to_owned());
        asked_by(RunTrigger::DatasetReady);
    }
    let on_change = triggers.iter().any(|trigger| trigger.source_changed.is_some());
    let changed = past.revision.is_some() && present.revision.is_some() && past.revision.as_deref() != present.revision;
    if on_change && changed {
        asked_by(RunTrigger::SourceChanged);
    }
    let since = past.schedule.map_or(past.since, |last| last.max(past.since));
    for calendar in calendars(triggers) {
        if let Some(time) = calendar?.last(since, present.now) {
            after.schedule = after.schedule.max(Some(time));
            asked_by(RunTrigger::Schedule);
        }
    }
    if let Some(revision) = present.revision {
        after.revision = Some(revision.to_owned());
    }
    Ok(trigger.map(|trigger| Due { trigger, past: after }))
}

/// When a schedule starts the next run.
pub fn next(triggers: &[Trigger], now: Timestamp) -> Result<Option<Timestamp>, CalendarError> {
    let mut first = None;
    for calendar in calendars(triggers) {
        let time = calendar?.next(now);
        first = [first, time].into_iter().flatten().min();
    }
    Ok(first)
}

fn calendars(triggers: &[Trigger]) -> impl Iterator<Item = Result<Calendar, CalendarError>> {
    triggers.iter().filter_map(|trigger| trigger.schedule.as_ref()).map(Calendar::new)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails here")]
    use forebay_api::{DatasetReady, Schedule, SourceChanged};

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn on_ready() -> Trigger {
        Trigger { dataset_ready: Some(DatasetReady {}), ..Trigger::default() }
    }

    fn at_times(cron: &str) -> Trigger {
        Trigger { schedule: Some(Schedule { cron: cron.to_owned(), time_zone: None }), ..Trigger::default() }
    }

    fn present(now: &str) -> Present<'static> {
        Present { now: at(now), dataset: "d-1", request: None, revision: None }
    }

    #[test]
    fn each_dataset_is_loaded_once_when_it_is_ready() {
        let past = Past { since: at("2026-01-01T00:30:00Z"), ..Past::default() };
        let now = present("2026-01-01T00:40:00Z");
        let run = due(&[on_ready()], &past, now).unwrap().unwrap();
        assert_eq!((run.trigger, run.past.dataset.as_deref()), (RunTrigger::DatasetReady, Some("d-1")));
        assert_eq!(due(&[on_ready()], &run.past, now).unwrap(), None);
        let other = Present { dataset: "d-2", ..now };
        assert!(due(&[on_ready()], &run.past, other).unwrap().is_some());
        assert_eq!(due(&[], &past, now).unwrap(), None);
    }

    #[test]
    fn times_that_passed_are_made_up_for_once() {
        let past = Past { since: at("2026-01-01T00:30:00Z"), ..Past::default() };
        let hourly = [at_times("@hourly")];
        assert_eq!(due(&hourly, &past, present("2026-01-01T00:59:59Z")).unwrap(), None);
        let run = due(&hourly, &past, present("2026-01-01T05:10:00Z")).unwrap().unwrap();
        assert_eq!((run.trigger, run.past.schedule), (RunTrigger::Schedule, Some(at("2026-01-01T05:00:00Z"))));
        assert_eq!(due(&hourly, &run.past, present("2026-01-01T05:59:00Z")).unwrap(), None);
        assert!(due(&hourly, &run.past, present("2026-01-01T06:00:00Z")).unwrap().is_some());
        assert_eq!(next(&hourly, at("2026-01-01T05:10:00Z")).unwrap(), Some(at("2026-01-01T06:00:00Z")));
        let several = [at_times("0 9 * * *"), on_ready(), at_times("30 5 * * *")];
        assert_eq!(next(&several, at("2026-01-01T05:10:00Z")).unwrap(), Some(at("2026-01-01T05:30:00Z")));
    }

    #[test]
    fn another_revision_is_loaded_once() {
        let on_change = [Trigger { source_changed: Some(SourceChanged {}), ..Trigger::default() }];
        let now = present("2026-01-01T01:00:00Z");
        // What was not known before has not changed.
        assert_eq!(due(&on_change, &Past::default(), Present { revision: Some("a"), ..now }).unwrap(), None);
        let past = Past { revision: Some("a".to_owned()), ..Past::default() };
        for same in [None, Some("a")] {
            assert_eq!(due(&on_change, &past, Present { revision: same, ..now }).unwrap(), None);
        }
        let changed = Present { revision: Some("b"), ..now };
        assert_eq!(due(&[on_ready()], &Past { dataset: Some("d-1".into()), ..past.clone() }, changed).unwrap(), None);
        let run = due(&on_change, &past, changed).unwrap().unwrap();
        assert_eq!((run.trigger, run.past.revision.as_deref()), (RunTrigger::SourceChanged, Some("b")));
        assert_eq!(due(&on_change, &run.past, changed).unwrap(), None);
        // A run for another reason loads it, too.
        let asked = due(&on_change, &past, Present { request: Some("now"), ..changed }).unwrap().unwrap();
        assert_eq!(due(&on_change, &asked.past, Present { request: Some("now"), ..changed }).unwrap(), None);
    }

    #[test]
    fn all_that_is_due_is_one_run() {
        let past = Past { since: at("2026-01-01T00:30:00Z"), ..Past::default() };
        let now = Present { request: Some("now"), ..present("2026-01-01T01:00:00Z") };
        let triggers = [at_times("@hourly"), on_ready()];
        let run = due(&triggers, &past, now).unwrap().unwrap();
        assert_eq!(run.trigger, RunTrigger::Request);
        assert_eq!(due(&triggers, &run.past, now).unwrap(), None);
        let again = Present { request: Some("again"), ..now };
        assert_eq!(due(&triggers, &run.past, again).unwrap().unwrap().trigger, RunTrigger::Request);
    }

    #[test]
    fn a_schedule_that_names_no_time_is_an_error() {
        let past = Past::default();
        assert!(due(&[at_times("0 0 30 2 *")], &past, present("2026-01-01T01:00:00Z")).is_err());
    }
}
