//! One source of a dataset on this worker: its store, what it may have under way, and what is wrong with it.
//!
//! A source is asked whether it is there when it is taken up, and again and again while something is wrong with it: what
//! is wrong is known, and forgotten when it is mended, though nobody reads.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_protocol::DatasetPath;
use forebay_under_store::{Allowance, Limits, Requests, StoreError, UnderStore, Verb, open};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use xxhash_rust::xxh3::Xxh3;

use super::{
    DatasetError,
    problem::{SourceProblem, reason},
    store::{NoStore, Replaceable},
};
use crate::{
    config::{RequestBudget, SourceConfig},
    fill::Pools,
};

/// Sources that are asked at once. One that does not answer waits for as long as [`CHECK`].
const CHECKS: usize = 64;
/// How long a source is asked before another one gets the turn; its own retries pause for at most 5 s.
const CHECK: Duration = Duration::from_secs(15);
/// How often it is looked whether something is wrong, and asked while something is; between half and all of it.
const PAUSE: Duration = Duration::from_secs(3);
/// Part of a budget that a worker takes before it knows its share.
const AT_FIRST: f64 = 1.0 / 32.0;

/// What takes up sources.
#[derive(Clone)]
pub(super) struct SourceOpener {
    limits: Limits,
    checks: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl SourceOpener {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, checks: Arc::new(Semaphore::new(CHECKS)), tasks: TaskTracker::new() }
    }

    /// Takes up a source, and begins to look after it. One that cannot be what it says is one that has that problem.
    pub(super) fn open(&self, config: SourceConfig) -> Result<Arc<Source>, DatasetError> {
        let path = DatasetPath::parse(Bytes::copy_from_slice(config.path.as_bytes()))
            .map_err(|error| DatasetError::Path { path: config.path.clone(), source: error })?;
        let allowance = Arc::new(Allowance::default());
        let opened = match &config.problem {
            Some(SourceProblem { reason: _, message }) => Err(StoreError::Unavailable(message.clone())),
            None => open(&config.spec, &self.limits, allowance.clone()),
        };
        let usable = opened.is_ok();
        let store = opened.unwrap_or_else(|error| Arc::new(NoStore(error)));
        let replaced = CancellationToken::new();
        let source = Arc::new(Source {
            store: Arc::new(Replaceable::new(store, replaced.clone())),
            pools: Arc::new(Pools::new(&self.limits, allowance.clone())),
            path,
            budget: Mutex::default(),
            allowance,
            config,
            replaced,
            wanted: Notify::new(),
        });
        source.set_budget(source.config.request_budget);
        if usable {
            let (kept, checks) = (source.clone(), self.checks.clone());
            self.tasks.spawn(async move { kept.replaced.run_until_cancelled(kept.keep_checked(&checks)).await });
        }
        Ok(source)
    }
}

/// A source.
pub(crate) struct Source {
    config: SourceConfig,
    pub(crate) path: DatasetPath,
    pub(super) store: Arc<dyn UnderStore>,
    pub(super) pools: Arc<Pools>,
    budget: Mutex<RequestBudget>,
    /// This worker's share of the budget.
    pub(crate) allowance: Arc<Allowance>,
    replaced: CancellationToken,
    /// It is to be asked once more.
    wanted: Notify,
}

impl Source {
    /// Whether it is what is meant, but perhaps for its budget.
    pub(super) fn is(&self, config: &SourceConfig) -> bool {
        let SourceConfig { path, spec, request_budget: _, problem } = config;
        (&self.config.path, &self.config.spec, &self.config.problem) == (path, spec, problem)
    }

    /// What all workers together may ask of it.
    pub(crate) fn budget(&self) -> RequestBudget {
        *self.budget.lock()
    }

    /// Another budget, of which somebody will lend it a share soon.
    pub(super) fn set_budget(&self, budget: RequestBudget) {
        let before = std::mem::replace(&mut *self.budget.lock(), budget);
        for verb in Verb::ALL {
            match (before.of(verb), budget.of(verb)) {
                (None, Some(rate)) => self.allowance.lend(verb, rate * AT_FIRST, Duration::ZERO),
                (Some(_), None) => self.allowance.unlimited(verb),
                _ => {}
            }
        }
    }

    /// What decides which objects are listed; credentials do not.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = Xxh3::new();
        let spec = &self.config.spec;
        for part in [spec.uri.as_str(), &format!("{:?}", spec.s3)] {
            hasher.update(part.as_bytes());
            hasher.update(&[0]);
        }
        hasher.digest()
    }

    /// What is wrong with it.
    pub(super) fn problem(&self) -> Option<SourceProblem> {
        let problem = self.config.problem.clone().or_else(|| {
            let error = self.store.problem()?;
            Some(SourceProblem { reason: reason(&error).to_owned(), message: error.to_string() })
        });
        problem.map(|SourceProblem { reason, message }| SourceProblem {
            reason,
            message: format!("source {}: {message}", self.config.path),
        })
    }

    pub(super) fn requests(&self) -> Requests {
        self.store.requests()
    }

    /// Asks it soon, though nothing seems wrong.
    pub(super) fn check_soon(&self) {
        self.wanted.notify_one();
    }

    /// Another one, or none, stands in its place: whoever waits for it is sent there.
    pub(super) fn replace(&self) {
        self.replaced.cancel();
    }

    async fn keep_checked(&self, checks: &Semaphore) {
        // Workers start together, and datasets with them.
        sleep(PAUSE.mul_f64(rand::random_range(0.0..0.1))).await;
        loop {
            let answered = {
                // The semaphore is never closed.
                let Ok(_turn) = checks.acquire().await else { return };
                matches!(timeout(CHECK, self.store.check()).await, Ok(Ok(())))
            };
            loop {
                let pause = sleep(PAUSE.mul_f64(rand::random_range(0.5..1.0)));
                tokio::select! {
                    () = pause => {
                        if !answered || self.store.problem().is_some() {
                            break;
                        }
                    }
                    () = self.wanted.notified() => break,
                }
            }
        }
    }
}
