//! Times that a schedule names.

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::{Timestamp, tz::TimeZone};

use crate::Schedule;

/// A schedule that names no times.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CalendarError {
    /// The fields of cron mean nothing, or no day at all (30 February).
    #[error("cron '{cron}': {reason}")]
    Cron {
        /// As it was given.
        cron: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such time zone.
    #[error("timeZone '{0}' is not known")]
    TimeZone(String),
}

/// The time zone of this name, by the data that is in the program.
pub(crate) fn zone(name: &str) -> Result<TimeZone, CalendarError> {
    TimeZone::get(name).map_err(|_| CalendarError::TimeZone(name.to_owned()))
}

/// Times that a schedule names.
#[derive(Clone, Debug)]
pub struct Calendar {
    cron: Cron,
    zone: TimeZone,
}

impl Calendar {
    /// The times of a schedule. Where clocks are turned, a time of day that does not exist is taken when it would have
    /// been, and one that comes twice is taken once; what comes every few minutes or hours goes on as the clock shows.
    pub fn new(schedule: &Schedule) -> Result<Self, CalendarError> {
        let Schedule { cron, time_zone } = schedule;
        let zone = match time_zone {
            None => TimeZone::UTC,
            Some(name) => zone(name)?,
        };
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let refused =
            |error: &dyn std::fmt::Display| CalendarError::Cron { cron: cron.clone(), reason: error.to_string() };
        let parsed = parser.parse(cron).map_err(|error| refused(&error))?;
        // What is well written may still name no day.
        let calendar = Self { cron: parsed, zone };
        match calendar.cron.find_next_occurrence(&Timestamp::now().to_zoned(calendar.zone.clone()), false) {
            Ok(_) => Ok(calendar),
            Err(error) => Err(refused(&error)),
        }
    }

    /// The first time after this one.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        self.cron.find_next_occurrence(&after.to_zoned(self.zone.clone()), false).ok().map(|time| time.timestamp())
    }

    /// The last time that is after `since` and not after `now`.
    pub fn last(&self, since: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let last = self.cron.find_previous_occurrence(&now.to_zoned(self.zone.clone()), true).ok()?.timestamp();
        (last > since).then_some(last)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails here")]
    use super::*;

    fn calendar(cron: &str, zone: Option<&str>) -> Result<Calendar, CalendarError> {
        Calendar::new(&Schedule { cron: cron.to_owned(), time_zone: zone.map(str::to_owned) })
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn times_are_those_of_the_zone_in_winter_and_summer() {
        let madrid = calendar("0 5 * * 1-5", Some("Europe/Madrid")).unwrap();
        // Thursday evening, before the clocks are turned on Sunday, 29 March 2026.
        assert_eq!(madrid.next(at("2026-03-26T20:00:00Z")), Some(at("2026-03-27T04:00:00Z")));
        assert_eq!(madrid.next(at("2026-03-27T04:00:00Z")), Some(at("2026-03-30T03:00:00Z")));
        assert_eq!(
            calendar("@daily", None).unwrap().next(at("2026-03-26T20:00:00Z")),
            Some(at("2026-03-27T00:00:00Z"))
        );
    }

    #[test]
    fn turned_clocks_neither_skip_nor_repeat_a_day() {
        let madrid = calendar("30 2 * * *", Some("Europe/Madrid")).unwrap();
        let days = |first: &str, last: &str| {
            let (first, last) = (at(first), at(last));
            let times = std::iter::successors(madrid.next(first), |time| madrid.next(*time));
            times.take_while(|time| *time < last).count()
        };
        // 2:30 does not exist on 29 March and comes twice on 25 October.
        assert_eq!(days("2026-03-26T12:00:00Z", "2026-04-01T12:00:00Z"), 6);
        assert_eq!(days("2026-10-22T12:00:00Z", "2026-10-28T12:00:00Z"), 6);
    }

    #[test]
    fn of_many_times_that_passed_the_last_counts() {
        let hourly = calendar("@hourly", None).unwrap();
        let now = at("2026-01-01T10:30:00Z");
        assert_eq!(hourly.last(at("2026-01-01T03:00:00Z"), now), Some(at("2026-01-01T10:00:00Z")));
        assert_eq!(hourly.last(at("2026-01-01T10:00:00Z"), now), None);
        assert_eq!(
            hourly.last(at("2026-01-01T09:59:00Z"), at("2026-01-01T10:00:00Z")),
            Some(at("2026-01-01T10:00:00Z"))
        );
    }

    #[test]
    fn what_names_no_time_is_refused() {
        for cron in ["", "60 * * * *", "0 0 30 2 *", "0 0 0 * * *", "a b c d e"] {
            assert!(matches!(calendar(cron, None), Err(CalendarError::Cron { .. })), "{cron}");
        }
        assert_eq!(
            calendar("@daily", Some("Europe/Nowhere")).unwrap_err(),
            CalendarError::TimeZone("Europe/Nowhere".into())
        );
    }
}
