//! Conditions: what was found, against what was said before.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

/// It can be used.
pub const READY: &str = "Ready";
/// Something is under way.
pub const PROGRESSING: &str = "Progressing";
/// It can be used, with less than was asked for; or it cannot, and this is why.
pub const DEGRADED: &str = "Degraded";

/// Longest message: what others said is cut.
const MAX_MESSAGE: usize = 1024;

/// What is the case of one type of condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub kind: &'static str,
    pub status: bool,
    /// CamelCase.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// The message quotes somebody who may word the same thing differently every time.
    pub quoted: bool,
}

impl Finding {
    pub fn new(kind: &'static str, status: bool, reason: impl Into<String>, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|end| message.is_char_boundary(*end)).unwrap_or_default();
            message.truncate(end);
        }
        Self { kind, status, reason: reason.into(), message, quoted: false }
    }

    /// Whether the condition has to be written at once.
    pub fn is_urgent(&self, before: &[Condition], generation: Option<i64>) -> bool {
        find(before, self.kind).is_none_or(|condition| {
            self.is_news(before)
                || condition.observed_generation != generation
                || (!self.quoted && condition.message != self.message)
        })
    }

    /// Whether the condition said something else before. Messages alone are no news.
    pub fn is_news(&self, before: &[Condition]) -> bool {
        find(before, self.kind)
            .is_none_or(|condition| condition.status != status(self.status) || condition.reason != self.reason)
    }
}

fn status(status: bool) -> &'static str {
    if status { "True" } else { "False" }
}

fn find<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// Whether a condition was true.
pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    find(conditions, kind).is_some_and(|condition| condition.status == "True")
}

/// The condition of a type.
pub fn get<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    find(conditions, kind)
}

/// The conditions that say what was found. The time of one whose status is the same stays.
pub fn merge(before: &[Condition], findings: &[Finding], generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let condition = |finding: &Finding| {
        let status = status(finding.status);
        let since = find(before, finding.kind)
            .filter(|condition| condition.status == status)
            .map_or(Time(now), |condition| condition.last_transition_time.clone());
        Condition {
            type_: finding.kind.to_owned(),
            status: status.to_owned(),
            reason: finding.reason.clone(),
            message: finding.message.clone(),
            last_transition_time: since,
            observed_generation: generation,
        }
    };
    findings.iter().map(condition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_move_with_the_status_only() {
        let first = [Finding::new(READY, false, "NoWorkers", "none")];
        let then = merge(&[], &first, Some(1), Timestamp::from_second(10).unwrap());
        let second = [Finding::new(READY, false, "Scanning", "soon")];
        let later = merge(&then, &second, Some(2), Timestamp::from_second(20).unwrap());
        assert_eq!(later[0].last_transition_time.0.as_second(), 10);
        assert_eq!((later[0].reason.as_str(), later[0].observed_generation), ("Scanning", Some(2)));
        let third = [Finding::new(READY, true, "Serving", "yes")];
        assert!(third[0].is_news(&later) && !second[0].is_news(&later));
        let last = merge(&later, &third, Some(2), Timestamp::from_second(30).unwrap());
        assert_eq!(last[0].last_transition_time.0.as_second(), 30);
        assert!(is_true(&last, READY) && !is_true(&last, DEGRADED));
    }

    #[test]
    fn messages_are_bounded() {
        let finding = Finding::new(READY, true, "Serving", "ä".repeat(4000));
        assert_eq!(finding.message.len(), MAX_MESSAGE);
    }
}
