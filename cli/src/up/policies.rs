//! The PreloadPolicies of the manifests: this process is to them what the operator and its Jobs are in a cluster.
//!
//! One task each. What happened is kept for `forebay status` while the instance runs; a new one begins anew, and what is
//! loaded then counts at once.

use std::sync::Arc;

use anyhow::Context as _;
use forebay_api::{
    ConcurrencyPolicy, PreloadPolicySpec, Run, RunPhase, RunTrigger,
    manifest::{Manifest, ValidatedPolicy},
    rules,
};
use forebay_client::Client;
use forebay_preload::{
    asked,
    due::{self, Due, Past, Present},
    progress::{count, end, since},
    run::{self, Request},
};
use forebay_protocol::{
    DatasetId,
    worker::{ScanState, selection},
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use tokio::{
    task::JoinSet,
    time::{Duration, sleep, timeout},
};
use tracing::{error, info, warn};

use super::Record;
use crate::session::{client_of, dataset_path, worker_status};

/// Pause before a run that failed is tried again, as that of a Job's pods.
const AGAIN: Duration = Duration::from_secs(10);
/// How often the Dataset is looked at for changes.
const CHANGES: Duration = Duration::from_secs(1);
/// Longest sleep: the clock may be set.
const LOOK: Duration = Duration::from_secs(30);
/// The deadline of a run that has none.
const NONE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What is known of a policy.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    namespace: String,
    name: String,
    dataset: String,
    last_run: Option<Run>,
    next_schedule_time: Option<Timestamp>,
}

/// The policies of an instance; they end when this is dropped.
#[derive(Default)]
pub struct Policies {
    states: Vec<Arc<Mutex<State>>>,
    tasks: JoinSet<()>,
}

/// States of policies, for whoever asks.
#[derive(Clone)]
pub struct Report(Vec<Arc<Mutex<State>>>);

impl Report {
    /// As JSON, a document for each.
    pub fn to_json(&self) -> Value {
        self.0.iter().map(|state| serde_json::to_value(&*state.lock()).unwrap_or_default()).collect()
    }
}

impl Policies {
    /// Begins to run the policies of a manifest, whose Datasets are served as `record` says.
    pub fn start(manifest: &Manifest, record: &Record) -> anyhow::Result<Self> {
        let mut policies = Self::default();
        for policy in &manifest.policies {
            let name = &policy.spec.dataset_ref.name;
            let ours = |dataset: &&super::DatasetRecord| dataset.namespace == policy.namespace && dataset.name == *name;
            let dataset = record.datasets.iter().find(ours).with_context(|| format!("no Dataset {name} is served"))?;
            let client = client_of(record.runtime_of(dataset)?)?;
            let state = Arc::new(Mutex::new(State {
                namespace: policy.namespace.clone(),
                name: policy.name.clone(),
                dataset: name.clone(),
                last_run: None,
                next_schedule_time: None,
            }));
            policies.states.push(state.clone());
            policies.tasks.spawn(Runner { policy: policy.clone(), dataset: dataset.id, client, state }.follow());
        }
        Ok(policies)
    }

    /// What is known of them, from now on.
    pub fn report(&self) -> Report {
        Report(self.states.clone())
    }
}

/// Runs one policy.
struct Runner {
    policy: ValidatedPolicy,
    dataset: DatasetId,
    client: Client,
    state: Arc<Mutex<State>>,
}

impl Runner {
    fn spec(&self) -> &PreloadPolicySpec {
        &self.policy.spec
    }

    /// Starts what is due, for ever.
    async fn follow(self) {
        let name = &self.policy.name;
        if self.spec().suspend {
            return info!(policy = name, "suspended: no run starts");
        }
        let dataset = self.dataset.to_string();
        let mut past = Past { since: Timestamp::now(), ..Past::default() };
        loop {
            let now = Timestamp::now();
            let revision = self.revision().await;
            // What is seen first is what changes are told from.
            past.revision = past.revision.or_else(|| revision.clone());
            let present = Present { now, dataset: &dataset, request: None, revision: revision.as_deref() };
            let (due, next) = match due::due(&self.spec().triggers, &past, present)
                .and_then(|due| Ok((due, due::next(&self.spec().triggers, now)?)))
            {
                Ok(found) => found,
                // The manifest was checked, so this cannot be.
                Err(error) => return error!(policy = name, %error, "no run starts"),
            };
            self.state.lock().next_schedule_time = next;
            if let Some(Due { trigger, past: after }) = due {
                past = after;
                self.run(trigger, &past).await;
                continue;
            }
            let follows_changes = self.spec().triggers.iter().any(|trigger| trigger.source_changed.is_some());
            let longest = if follows_changes { CHANGES } else { LOOK };
            match next {
                Some(next) => sleep((since(now, next) + Duration::from_millis(20)).min(longest)).await,
                None if follows_changes => sleep(longest).await,
                None => return,
            }
        }
    }

    /// What the Dataset's files are, if they have been counted.
    async fn revision(&self) -> Option<String> {
        let answers = worker_status(&self.client).await;
        let statuses =
            answers.iter().filter_map(|answer| answer.status.as_ref().ok()).flat_map(|status| &status.datasets);
        let scans = statuses.filter(|status| status.dataset == self.dataset.to_bytes()).filter_map(|s| s.scan.as_ref());
        let newest = scans.filter(|scan| scan.state() == ScanState::Complete).max_by_key(|scan| scan.generation)?;
        Some(format!("{:016x}", newest.digest))
    }

    /// One run, with its tries, or as far as it comes until another one takes its place.
    async fn run(&self, trigger: RunTrigger, past: &Past) {
        let name = format!("{}-{}", self.policy.name, Timestamp::now().as_second());
        let run = Run::new(name.clone(), name.clone(), trigger, Time(Timestamp::now()));
        self.state.lock().last_run = Some(run);
        info!(policy = self.policy.name, run = name, ?trigger, "a run starts");
        let deadline = self.spec().deadline.as_deref().and_then(rules::seconds).map_or(NONE, Duration::from_secs);
        let ended = tokio::select! {
            ended = timeout(deadline, self.tries(&name)) => match ended {
                Ok(ended) => ended,
                Err(_) => Err(format!("it was not complete within {deadline:?} (spec.deadline)")),
            },
            () = self.replaced(past) => Err("another run took its place".to_owned()),
        };
        let now = Timestamp::now();
        let mut state = self.state.lock();
        let Some(run) = &mut state.last_run else { return };
        match ended {
            Ok(()) => {
                info!(
                    policy = self.policy.name,
                    run = name,
                    files = run.files,
                    bytes = run.bytes,
                    "the run is complete"
                );
                end(run, RunPhase::Complete, None, now);
            }
            Err(reason) => {
                error!(policy = self.policy.name, run = name, %reason, "the run failed");
                end(run, RunPhase::Failed, Some(reason), now);
            }
        }
    }

    async fn tries(&self, name: &str) -> Result<(), String> {
        let mut selection = asked::selection(self.spec(), Timestamp::now()).map_err(|error| error.to_string())?;
        if let Some(lines) = &self.policy.manifest {
            selection.manifest = Some(selection::Manifest::ManifestText(lines.clone().into()));
        }
        let terms = asked::terms(self.spec()).map_err(|error| error.to_string())?;
        let path = dataset_path(&self.spec().select.path).map_err(|error| format!("{error:#}"))?;
        let request = Request { dataset: self.dataset, run: name.to_owned(), path, selection, terms };
        let mut left = self.spec().backoff_limit;
        loop {
            let tell = |sum: &forebay_protocol::worker::LoadProgress| {
                let mut state = self.state.lock();
                if let Some(run) = &mut state.last_run {
                    run.phase = RunPhase::Running;
                    count(run, sum, Timestamp::now());
                }
            };
            match run::run(&self.client, &request, tell).await {
                Ok(_) => return Ok(()),
                Err(reason) if left == 0 => return Err(reason.to_string()),
                Err(reason) => warn!(policy = self.policy.name, run = name, %reason, "the run is tried again"),
            }
            left -= 1;
            sleep(AGAIN).await;
        }
    }

    /// Ends when another run is due that takes the place of this one.
    async fn replaced(&self, past: &Past) {
        if self.spec().concurrency_policy == ConcurrencyPolicy::Forbid {
            return std::future::pending().await;
        }
        let dataset = self.dataset.to_string();
        loop {
            sleep(CHANGES).await;
            let revision = self.revision().await;
            let revision = revision.as_deref();
            let present = Present { now: Timestamp::now(), dataset: &dataset, request: None, revision };
            if matches!(due::due(&self.spec().triggers, past, present), Ok(Some(_))) {
                return;
            }
        }
    }
}
