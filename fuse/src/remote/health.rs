//! How a volume is, from what its workers say in the background.

use std::time::Duration;

use forebay_client::{Client, Probe, ProbedMember};
use forebay_keeper::{Health, HealthState};
use forebay_protocol::worker::StatusResponse;
use futures::{Stream, stream};
use tokio::time::Instant;

use super::named::Named;

/// Workers are asked this often, sooner by up to a half.
const INTERVAL: Duration = Duration::from_secs(5);
/// A volume that was just opened is not called inaccessible: its workers are being looked for.
const GRACE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_millis(250));
/// Silent workers whose errors are told.
const TOLD: usize = 3;

/// The reasons why a volume is not healthy.
const NO_WORKER: &str = "NoWorker";
const WORKERS_UNAVAILABLE: &str = "WorkersUnavailable";
const SOURCE_UNAVAILABLE: &str = "SourceUnavailable";

/// The health of a volume, and then its changes. It is asked for while it is polled.
pub(super) fn follow(client: Client, dataset: Named, name: String) -> impl Stream<Item = Health> {
    let settled = Instant::now() + GRACE.0;
    stream::unfold((client, dataset, name, None), move |(client, dataset, name, told)| async move {
        // The first is told at once, the others at the pace of the questions.
        let mut pause = told.is_some();
        loop {
            if pause {
                tokio::time::sleep(INTERVAL.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
            }
            let health = ask(&client, &dataset, &name).await;
            if health.state == HealthState::Inaccessible && Instant::now() < settled {
                tokio::time::sleep(GRACE.1).await;
                continue;
            }
            if told.as_ref() != Some(&health) {
                return Some((health.clone(), (client, dataset, name, Some(health))));
            }
            pause = true;
        }
    })
}

async fn ask(client: &Client, dataset: &Named, name: &str) -> Health {
    match dataset.id() {
        Some(id) => assess(&client.probe(id).await, name),
        None if client.members().members.is_empty() => no_worker("the runtime has no workers, as far as is known"),
        None => no_worker(&format!("no worker serves dataset {name}")),
    }
}

fn no_worker(message: &str) -> Health {
    Health::new(HealthState::Inaccessible, NO_WORKER, message)
}

/// What a round of questions about dataset `name` says of the volume.
fn assess(probe: &Probe, name: &str) -> Health {
    let Probe { serving, members, table_problem } = probe;
    let silent: Vec<String> = members.iter().filter(|member| !member.draining).filter_map(silence).collect();
    let answers: Vec<_> = members.iter().filter_map(|member| member.answer.as_ref().ok()).collect();
    if answers.is_empty() {
        let why = match (table_problem, silent.is_empty()) {
            (Some(problem), true) => problem.clone(),
            (None, true) => "the runtime has no workers".to_owned(),
            (Some(problem), false) => format!("{}; {problem}", some(&silent)),
            (None, false) => some(&silent),
        };
        return no_worker(&format!("no worker answers: {why}"));
    }
    // One that is wiping the dataset answers, but does not serve it.
    let serves = |status: &&StatusResponse| !status.datasets.is_empty();
    let statuses: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref()).filter(serves).collect();
    if statuses.is_empty() {
        return no_worker(&format!("no worker serves dataset {name}; {} were asked", answers.len()));
    }
    let mut problems =
        statuses.iter().flat_map(|status| &status.datasets).filter(|told| !told.source_problem.is_empty());
    if let Some(told) = problems.next() {
        let text = match told.source_problem_reason.as_str() {
            "" => told.source_problem.clone(),
            reason => format!("{reason}: {}", told.source_problem),
        };
        return Health::new(HealthState::Degraded, SOURCE_UNAVAILABLE, &format!("the source has a problem: {text}"));
    }
    if !silent.is_empty() {
        let text = format!("{} of {serving} workers do not answer: {}", silent.len(), some(&silent));
        return Health::new(HealthState::Degraded, WORKERS_UNAVAILABLE, &text);
    }
    Health::default()
}

fn silence(member: &ProbedMember) -> Option<String> {
    member.answer.as_ref().err().map(|error| format!("{}: {error}", member.name))
}

/// The first few, in an order that does not change from round to round.
fn some(silent: &[String]) -> String {
    let mut told = silent.to_vec();
    told.sort_unstable();
    told.truncate(TOLD);
    told.join("; ")
}

#[cfg(test)]
mod tests {
    use forebay_protocol::worker::DatasetStatus;

    use super::*;

    type Answer = Result<Option<StatusResponse>, String>;

    fn well() -> Answer {
        Ok(Some(StatusResponse { datasets: vec![DatasetStatus::default()], ..Default::default() }))
    }

    fn ill() -> Answer {
        let told = DatasetStatus {
            source_problem: "no such bucket".into(),
            source_problem_reason: "BucketNotFound".into(),
            ..Default::default()
        };
        Ok(Some(StatusResponse { datasets: vec![told], ..Default::default() }))
    }

    fn gone() -> Answer {
        Err("connection refused".into())
    }

    fn probe(answers: &[(Answer, bool)]) -> Probe {
        let members = answers.iter().enumerate().map(|(index, (answer, draining))| ProbedMember {
            name: format!("w-{index}"),
            draining: *draining,
            answer: answer.clone(),
        });
        let serving = answers.iter().filter(|(_, draining)| !draining).count();
        Probe { serving, members: members.collect(), table_problem: None }
    }

    fn of(answers: &[(Answer, bool)]) -> (HealthState, String, String) {
        let Health { state, reason, message } = assess(&probe(answers), "ns/data");
        (state, reason, message)
    }

    #[test]
    fn every_state_has_its_reason() {
        use HealthState::{Degraded, Healthy, Inaccessible};
        assert_eq!(of(&[(well(), false), (well(), false)]).0, Healthy);
        assert_eq!(of(&[(well(), false), (gone(), true)]).0, Healthy, "who leaves may be silent");
        assert_eq!(of(&[(well(), false), (Ok(None), false)]).0, Healthy, "others serve it");

        let (state, reason, message) = of(&[(gone(), false), (well(), false), (gone(), false)]);
        assert_eq!((state, reason.as_str()), (Degraded, "WorkersUnavailable"));
        assert_eq!(message, "2 of 3 workers do not answer: w-0: connection refused; w-2: connection refused");
        let (state, reason, message) = of(&[(ill(), false), (gone(), false)]);
        assert_eq!((state, reason.as_str()), (Degraded, "SourceUnavailable"));
        assert_eq!(message, "the source has a problem: BucketNotFound: no such bucket");
        assert_eq!(of(&[(gone(), false), (well(), true)]).0, Degraded, "who leaves still serves");

        let inaccessible = |answers: &[(Answer, bool)], why: &str| {
            let (state, reason, message) = of(answers);
            assert_eq!((state, reason.as_str()), (Inaccessible, "NoWorker"));
            assert!(message.contains(why), "{message}");
        };
        inaccessible(&[(gone(), false), (gone(), false)], "w-0: connection refused");
        inaccessible(&[(Ok(None), false), (gone(), false)], "ns/data");
        inaccessible(&[(Ok(Some(StatusResponse::default())), false)], "ns/data");
        inaccessible(&[], "no workers");
        let problem = Probe { table_problem: Some("the name leads nowhere".into()), ..Probe::default() };
        assert!(assess(&problem, "ns/data").message.contains("leads nowhere"));
    }
}
