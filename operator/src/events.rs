//! Events: what changed, once, where people look for it.

use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::Condition};
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tracing::warn;

use crate::{
    conditions::{DEGRADED, Finding, PROGRESSING},
    context::within,
    labels::MANAGER,
};

/// Reasons that stand for waiting, which is nothing to be warned of.
const CALM: [&str; 14] = [
    "Serving",
    "Scanning",
    "Scanned",
    "Deleting",
    "WorkersStarting",
    "NoWorkers",
    "RuntimeNotReady",
    "VolumeNotBound",
    "HostPath",
    "Waiting",
    "Loading",
    "Loaded",
    "Suspended",
    "DatasetNotReady",
];

/// Where events are published.
pub struct Events(Recorder);

impl Events {
    pub fn new(client: Client, identity: String) -> Self {
        Self(Recorder::new(client, Reporter { controller: MANAGER.into(), instance: Some(identity) }))
    }

    /// Publishes what is new in an object's conditions. An event that cannot be published is lost: the conditions say
    /// the same.
    pub async fn transitions(&self, object: &ObjectReference, before: &[Condition], findings: &[Finding]) {
        for finding in news(before, findings) {
            let event = Event {
                type_: if CALM.contains(&finding.reason.as_str()) { EventType::Normal } else { EventType::Warning },
                reason: finding.reason.clone(),
                note: Some(finding.message.clone()),
                action: "Reconcile".into(),
                secondary: None,
            };
            match within(self.0.publish(&event, object)).await {
                Ok(()) => {}
                Err(error) if error.is_end_of_namespace() => {}
                Err(error) => warn!(reason = %finding.reason, %error, "an event could not be published"),
            }
        }
    }
}

/// What deserves an event: a condition that changed, but not that trouble is over (that it is ready says so) nor what is
/// under way; each reason once.
fn news<'a>(before: &[Condition], findings: &'a [Finding]) -> Vec<&'a Finding> {
    let mut news: Vec<&Finding> = Vec::new();
    for finding in findings {
        let quiet = finding.kind == PROGRESSING || (finding.kind == DEGRADED && !finding.status);
        if !quiet && finding.is_news(before) && news.iter().all(|other| other.reason != finding.reason) {
            news.push(finding);
        }
    }
    news
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;
    use crate::conditions::{READY, merge};

    #[test]
    fn only_transitions_are_told_and_each_reason_once() {
        let broken = [
            Finding::new(READY, false, "CredentialsInvalid", "403"),
            Finding::new(DEGRADED, true, "CredentialsInvalid", "403"),
        ];
        let told: Vec<&str> = news(&[], &broken).iter().map(|finding| finding.reason.as_str()).collect();
        assert_eq!(told, ["CredentialsInvalid"]);
        let before = merge(&[], &broken, None, Timestamp::UNIX_EPOCH);
        assert!(news(&before, &broken).is_empty());
        let fine =
            [Finding::new(READY, true, "Serving", ""), Finding::new(DEGRADED, false, "Serving", "nothing is wrong")];
        let told: Vec<&str> = news(&before, &fine).iter().map(|finding| finding.kind).collect();
        assert_eq!(told, [READY]);
    }
}
