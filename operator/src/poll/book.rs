//! Answers of workers, added up.
//!
//! What a worker said last is kept while it is a member: bytes on the disk of one that does not answer are still there.
//! Whether it serves a Dataset, and what is wrong with a source, only counts from those who answered just now.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use forebay_api::{Dataset, MemberState, WorkerMember};
use forebay_protocol::{
    DatasetId,
    worker::{self as wire, StatusResponse},
};

use super::{
    counters::{Counters, Reads},
    dataset_id,
};

/// What a worker said, or why it said nothing.
pub struct Answer {
    pub member: WorkerMember,
    pub said: Result<StatusResponse, String>,
}

/// What the workers of a runtime said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeSeen {
    /// Members of the table, by name.
    pub workers: BTreeMap<String, WorkerSeen>,
    /// What they said of Datasets.
    pub datasets: HashMap<DatasetId, DatasetSeen>,
}

/// What a worker said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerSeen {
    pub serving: bool,
    pub answered: bool,
    pub capacity: u64,
    pub used: u64,
    /// Why its disk keeps nothing; empty when it does.
    pub tier_problem: String,
}

/// What workers said of a Dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatasetSeen {
    /// Members that serve, answered and know it.
    pub served_by: usize,
    /// A member that answered serves it, or has not wiped it yet.
    pub is_held: bool,
    pub cached: u64,
    pub pinned: u64,
    pub hits: u64,
    pub misses: u64,
    pub scan: Option<ScanSeen>,
    pub problem: Option<Problem>,
}

/// How far its sources have been counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanSeen {
    pub generation: u64,
    pub state: ScanState,
    pub files: u64,
    pub bytes: u64,
    pub directories: u64,
    pub error: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ScanState {
    Failed,
    Running,
    Complete,
}

/// What is wrong with a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub reason: String,
    pub message: String,
}

impl RuntimeSeen {
    /// Who answers, by name.
    pub fn reachability(&self) -> impl PartialEq {
        let reached = |(name, worker): (&String, &WorkerSeen)| (name.clone(), worker.serving, worker.answered);
        self.workers.iter().map(reached).collect::<Vec<_>>()
    }

    /// Members that take new data, and how many of them answer.
    pub fn serving(&self) -> (usize, usize) {
        let serving = self.workers.values().filter(|worker| worker.serving);
        serving.fold((0, 0), |(all, answering), worker| (all + 1, answering + usize::from(worker.answered)))
    }

    /// Whether somebody will soon be there who is not, or know what it does not.
    pub fn expects_change(&self, datasets: &[Arc<Dataset>]) -> bool {
        let (all, answering) = self.serving();
        all > answering
            || datasets.iter().any(|dataset| {
                let going = dataset.metadata.deletion_timestamp.is_some();
                match dataset_id(dataset).and_then(|id| self.datasets.get(&id)) {
                    Some(seen) if going => seen.is_held,
                    Some(seen) => seen.served_by < answering || (seen.scan.is_none() && seen.problem.is_none()),
                    None => !going && answering > 0,
                }
            })
    }
}

/// What a worker said last, as far as it is needed again.
#[derive(Default)]
struct Last {
    seen: WorkerSeen,
    datasets: HashMap<DatasetId, (u64, u64)>,
}

/// What was said so far.
pub struct Book {
    began: Instant,
    workers: HashMap<String, Last>,
    counters: HashMap<DatasetId, Counters>,
}

impl Book {
    pub fn new(began: Instant) -> Self {
        Self { began, workers: HashMap::new(), counters: HashMap::new() }
    }

    /// Enters one round of answers, one for each member, and adds up. `datasets` are those that exist.
    pub fn enter(&mut self, answers: Vec<Answer>, datasets: &[Arc<Dataset>]) -> RuntimeSeen {
        let published: HashMap<DatasetId, Option<Reads>> = datasets.iter().filter_map(published).collect();
        let is_member = |name: &str| answers.iter().any(|answer| answer.member.name == name);
        self.workers.retain(|name, _| is_member(name));
        self.counters.retain(|id, _| published.contains_key(id));
        self.counters.values_mut().for_each(|counters| counters.retain(is_member));

        let mut seen = RuntimeSeen::default();
        for Answer { member, said } in answers {
            let serving = member.state == MemberState::Serving;
            let last = self.workers.entry(member.name.clone()).or_default();
            last.seen.serving = serving;
            last.seen.answered = said.is_ok();
            if let Ok(status) = said {
                let older = u128::from(status.uptime_seconds) > self.began.elapsed().as_millis() / 1000;
                last.seen.capacity = status.capacity_bytes;
                last.seen.used = status.used_bytes;
                last.seen.tier_problem = status.tier_problem;
                last.datasets.clear();
                for id in status.wiping.iter().filter_map(|id| DatasetId::from_slice(id)) {
                    seen.datasets.entry(id).or_default().is_held = true;
                }
                for dataset in status.datasets {
                    let Some(id) = DatasetId::from_slice(&dataset.dataset) else { continue };
                    last.datasets.insert(id, (dataset.cached_bytes, dataset.pinned_bytes));
                    if let Some(published) = published.get(&id) {
                        let reads = Reads { hits: dataset.hit_bytes, misses: dataset.miss_bytes };
                        let counters =
                            self.counters.entry(id).or_insert_with(|| Counters::new(published.unwrap_or_default()));
                        counters.say(&member.name, status.incarnation, reads, older && published.is_some());
                    }
                    seen.datasets.entry(id).or_default().hear(dataset, serving);
                }
            }
            for (id, (cached, pinned)) in &last.datasets {
                let dataset = seen.datasets.entry(*id).or_default();
                dataset.cached += cached;
                dataset.pinned += pinned;
            }
            seen.workers.insert(member.name, last.seen.clone());
        }
        for (id, counters) in &mut self.counters {
            let total = counters.total();
            let dataset = seen.datasets.entry(*id).or_default();
            (dataset.hits, dataset.misses) = (total.hits, total.misses);
        }
        seen
    }
}

/// Sums that were published, if any.
fn published(dataset: &Arc<Dataset>) -> Option<(DatasetId, Option<Reads>)> {
    let id = dataset_id(dataset)?;
    let reads = dataset.status.as_ref().and_then(|status| {
        let (hits, misses) = status.hits.zip(status.misses)?;
        Some(Reads { hits, misses })
    });
    Some((id, reads))
}

impl DatasetSeen {
    fn hear(&mut self, said: wire::DatasetStatus, serving: bool) {
        self.is_held = true;
        self.served_by += usize::from(serving);
        if let Some(scan) = said.scan.and_then(scan) {
            let rank = |scan: &ScanSeen| (scan.generation, scan.state, scan.files);
            if self.scan.as_ref().is_none_or(|other| rank(other) < rank(&scan)) {
                self.scan = Some(scan);
            }
        }
        if self.problem.is_none() && !said.source_problem.is_empty() {
            let reason = match said.source_problem_reason.as_str() {
                "" => "SourceUnreachable",
                reason => reason,
            };
            self.problem = Some(Problem { reason: reason.to_owned(), message: said.source_problem });
        }
    }
}

fn scan(scan: wire::ScanProgress) -> Option<ScanSeen> {
    let state = match scan.state() {
        wire::ScanState::Running => ScanState::Running,
        wire::ScanState::Complete => ScanState::Complete,
        wire::ScanState::Failed => ScanState::Failed,
        wire::ScanState::Unspecified => return None,
    };
    let wire::ScanProgress { generation, files, bytes, directories, error, .. } = scan;
    Some(ScanSeen { generation, state, files, bytes, directories, error })
}
