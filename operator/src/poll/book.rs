//! Answers of workers, added up.
//!
//! What a worker said last is kept while it is a member: bytes on the disk of one that does not answer are still there.
//! Whether it serves a Dataset, and what is wrong with a source, only counts from those who answered just now. Whether
//! it still holds one that is to go counts from all: who said nothing may hold it.

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

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::{
    counters::{Counters, Counts},
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
    /// It answered once, now or before.
    pub is_known: bool,
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
    /// A member serves it, or has not wiped it yet, by its last answer.
    pub is_held: bool,
    pub cached: u64,
    pub replicated: u64,
    pub pinned: u64,
    pub hits: u64,
    pub misses: u64,
    pub evicted: u64,
    pub expired: u64,
    pub scan: Option<ScanSeen>,
    pub problem: Option<Problem>,
    /// Loads that have a name.
    pub runs: BTreeMap<String, RunSeen>,
}

/// What workers said of a load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunSeen {
    /// Shares of workers, by name.
    pub shares: BTreeMap<String, wire::LoadProgress>,
    /// Whether every member that serves told its share, all by one table: one that has just been told of the load, or was
    /// started again since, knows nothing of it.
    pub is_whole: bool,
    /// Why a share ended before it was finished.
    pub errors: Vec<String>,
}

/// How far its sources have been counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanSeen {
    pub generation: u64,
    pub state: ScanState,
    pub files: u64,
    pub bytes: u64,
    pub directories: u64,
    pub error: String,
    /// Of all files with their paths and versions.
    pub digest: u64,
    /// When the sources began to be listed, if they are listed periodically.
    pub synced: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ScanState {
    Failed,
    #[default]
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

    /// Whether a member has something of a Dataset, or never said what it has.
    pub fn may_hold(&self, dataset: &DatasetId) -> bool {
        self.datasets.get(dataset).is_some_and(|seen| seen.is_held) || self.workers.values().any(|w| !w.is_known)
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
    /// What is held of each Dataset that it holds; nothing of one that it is wiping.
    datasets: HashMap<DatasetId, Held>,
    /// Loads that have a name.
    runs: HashMap<DatasetId, Vec<wire::LoadRun>>,
}

/// Bytes of a Dataset on a worker.
#[derive(Clone, Copy, Default)]
struct Held {
    cached: u64,
    replicated: u64,
    pinned: u64,
}

/// What was said so far.
pub struct Book {
    began: Instant,
    workers: HashMap<String, Last>,
    counters: HashMap<DatasetId, Counters>,
    /// When the sources began to be listed under a generation, as it was first told: ages are told with every answer.
    synced: HashMap<DatasetId, (u64, Timestamp)>,
}

impl Book {
    pub fn new(began: Instant) -> Self {
        Self { began, workers: HashMap::new(), counters: HashMap::new(), synced: HashMap::new() }
    }

    /// Enters one round of answers, one for each member, and adds up. `datasets` are those that exist.
    pub fn enter(&mut self, answers: Vec<Answer>, datasets: &[Arc<Dataset>]) -> RuntimeSeen {
        let published: HashMap<DatasetId, Option<Counts>> = datasets.iter().filter_map(published).collect();
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
                last.seen.is_known = true;
                let wiping = status.wiping.iter().filter_map(|id| DatasetId::from_slice(id));
                last.datasets = wiping.map(|id| (id, Held::default())).collect();
                last.runs.clear();
                for mut dataset in status.datasets {
                    let Some(id) = DatasetId::from_slice(&dataset.dataset) else { continue };
                    let cached = dataset.cached_bytes;
                    let held = Held { cached, replicated: dataset.replicated_bytes, pinned: dataset.pinned_bytes };
                    last.datasets.insert(id, held);
                    last.runs.insert(id, std::mem::take(&mut dataset.runs));
                    if let Some(published) = published.get(&id) {
                        let counts = Counts {
                            hits: dataset.hit_bytes,
                            misses: dataset.miss_bytes,
                            evicted: dataset.evicted_bytes,
                            expired: dataset.expired_bytes,
                        };
                        let counters =
                            self.counters.entry(id).or_insert_with(|| Counters::new(published.unwrap_or_default()));
                        counters.say(&member.name, status.incarnation, counts, older && published.is_some());
                    }
                    seen.datasets.entry(id).or_default().hear(dataset, serving);
                }
            }
            for (id, Held { cached, replicated, pinned }) in &last.datasets {
                let dataset = seen.datasets.entry(*id).or_default();
                dataset.is_held = true;
                dataset.cached += cached;
                dataset.replicated += replicated;
                dataset.pinned += pinned;
            }
            for (id, runs) in last.runs.iter().filter(|_| serving) {
                let dataset = seen.datasets.entry(*id).or_default();
                runs.iter().for_each(|run| dataset.hear_run(&member.name, run));
            }
            seen.workers.insert(member.name, last.seen.clone());
        }
        let (serving, _) = seen.serving();
        for run in seen.datasets.values_mut().flat_map(|dataset| dataset.runs.values_mut()) {
            let mut epochs = run.shares.values().filter(|share| share.listed).map(|share| share.epoch);
            let first = epochs.next();
            run.is_whole = run.shares.len() == serving && epochs.all(|epoch| Some(epoch) == first);
        }
        self.synced.retain(|id, _| published.contains_key(id));
        for (id, dataset) in &mut seen.datasets {
            let Some(scan) = &mut dataset.scan else { continue };
            if let Some(told) = &mut scan.synced {
                let first = self.synced.entry(*id).or_insert((scan.generation, *told));
                if first.0 != scan.generation {
                    *first = (scan.generation, *told);
                }
                *told = first.1;
            }
        }
        for (id, counters) in &mut self.counters {
            let total = counters.total();
            let dataset = seen.datasets.entry(*id).or_default();
            let Counts { hits, misses, evicted, expired } = total;
            (dataset.hits, dataset.misses, dataset.evicted, dataset.expired) = (hits, misses, evicted, expired);
        }
        seen
    }
}

/// Sums that were published, if any.
fn published(dataset: &Arc<Dataset>) -> Option<(DatasetId, Option<Counts>)> {
    let id = dataset_id(dataset)?;
    let counts = dataset.status.as_ref().and_then(|status| {
        let (hits, misses) = status.hits.zip(status.misses)?;
        let (evicted, expired) = (status.evicted_bytes.unwrap_or_default(), status.expired_bytes.unwrap_or_default());
        Some(Counts { hits, misses, evicted, expired })
    });
    Some((id, counts))
}

impl DatasetSeen {
    fn hear_run(&mut self, worker: &str, said: &wire::LoadRun) {
        let run = self.runs.entry(said.run.clone()).or_default();
        run.shares.insert(worker.to_owned(), said.progress.clone().unwrap_or_default());
        if !said.error.is_empty() {
            run.errors.push(format!("worker {worker}: {}", said.error));
        }
    }

    fn hear(&mut self, said: wire::DatasetStatus, serving: bool) {
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
    let wire::ScanProgress { generation, files, bytes, directories, error, digest, synced_ms, .. } = scan;
    let age = synced_ms.and_then(|ms| Some(SignedDuration::from_millis(i64::try_from(ms).ok()?)));
    let synced = age.and_then(|age| Timestamp::now().checked_sub(age).ok());
    Some(ScanSeen { generation, state, files, bytes, directories, error, digest, synced })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    const UID: &str = "6df92765-2aaf-4e34-b7fb-4cdc5e906387";

    fn dataset(status: serde_json::Value) -> Arc<Dataset> {
        let dataset = json!({
            "metadata": {"name": "d", "uid": UID},
            "spec": {"runtimeRef": {"name": "w"}, "sources": []},
            "status": status,
        });
        Arc::new(serde_json::from_value(dataset).unwrap())
    }

    fn id() -> DatasetId {
        dataset_id(&dataset(json!({}))).unwrap()
    }

    fn member(name: &str, state: MemberState) -> WorkerMember {
        WorkerMember { name: name.into(), address: "a:1".into(), weight: 1, state }
    }

    fn answer(name: &str, change: impl FnOnce(&mut StatusResponse, &mut wire::DatasetStatus)) -> Answer {
        let mut said = wire::DatasetStatus { dataset: id().to_bytes(), cached_bytes: 10, ..Default::default() };
        let mut status = StatusResponse { incarnation: 1, used_bytes: 10, ..Default::default() };
        change(&mut status, &mut said);
        status.datasets.push(said);
        Answer { member: member(name, MemberState::Serving), said: Ok(status) }
    }

    fn silent(name: &str) -> Answer {
        Answer { member: member(name, MemberState::Serving), said: Err("gone".into()) }
    }

    #[test]
    fn shares_of_a_load_are_kept_by_worker() {
        let mut book = Book::new(Instant::now());
        let share = |name: &str, done_files, error: &str| {
            let (run, error) = ("r".to_owned(), error.to_owned());
            let progress = Some(wire::LoadProgress { done_files, ..Default::default() });
            answer(name, move |_, said| said.runs = vec![wire::LoadRun { run, progress, error }])
        };
        let datasets = [dataset(json!({}))];
        book.enter(vec![share("w-0", 3, ""), share("w-1", 4, "the disk is gone")], &datasets);
        // The second one says nothing now; what it said counts.
        let silent = Answer { member: member("w-1", MemberState::Serving), said: Err("no".into()) };
        let seen = book.enter(vec![share("w-0", 5, ""), silent], &datasets);
        let run = &seen.datasets[&id()].runs["r"];
        let done: Vec<u64> = run.shares.values().map(|share| share.done_files).collect();
        assert_eq!((done, run.errors.as_slice()), (vec![5, 4], ["worker w-1: the disk is gone".to_owned()].as_slice()));
        assert!(run.is_whole);
        // Started again, it knows nothing; one that is leaving does not count.
        let seen = book.enter(vec![share("w-0", 5, ""), answer("w-1", |_, _| {})], &datasets);
        assert!(!seen.datasets[&id()].runs["r"].is_whole);
        let mut leaving = share("w-1", 4, "");
        leaving.member.state = MemberState::Draining;
        let seen = book.enter(vec![share("w-0", 5, ""), leaving], &datasets);
        let run = &seen.datasets[&id()].runs["r"];
        assert_eq!((run.is_whole, run.shares.len()), (true, 1));
    }

    #[test]
    fn what_workers_hold_is_added_up_and_kept_while_one_is_away() {
        let mut book = Book::new(Instant::now());
        let datasets = [dataset(json!({}))];
        let both = book.enter(vec![answer("a", |_, _| {}), answer("b", |_, _| {})], &datasets);
        let seen = &both.datasets[&id()];
        assert_eq!((seen.cached, seen.served_by, both.serving()), (20, 2, (2, 2)));
        let one = book.enter(vec![answer("a", |_, _| {}), silent("b")], &datasets);
        let seen = &one.datasets[&id()];
        assert_eq!((seen.cached, seen.served_by, one.serving()), (20, 1, (2, 1)));
        assert_eq!(one.workers["b"].used, 10);
        // One that left the table took its disk with it.
        let alone = book.enter(vec![answer("a", |_, _| {})], &datasets);
        assert_eq!(alone.datasets[&id()].cached, 10);
    }

    #[test]
    fn draining_workers_hold_and_do_not_serve() {
        let mut book = Book::new(Instant::now());
        let mut draining = answer("b", |_, _| {});
        draining.member.state = MemberState::Draining;
        let seen = book.enter(vec![answer("a", |_, _| {}), draining], &[dataset(json!({}))]);
        assert_eq!((seen.datasets[&id()].served_by, seen.datasets[&id()].cached, seen.serving()), (1, 20, (1, 1)));
    }

    #[test]
    fn the_newest_scan_counts_and_the_first_problem() {
        let scanned = |generation, state: wire::ScanState, files| {
            move |_: &mut StatusResponse, said: &mut wire::DatasetStatus| {
                let scan = wire::ScanProgress { state: state.into(), generation, files, ..Default::default() };
                said.scan = Some(scan);
                said.source_problem = format!("problem {generation}");
            }
        };
        let answers = vec![
            answer("a", scanned(1, wire::ScanState::Complete, 9)),
            answer("b", scanned(2, wire::ScanState::Running, 3)),
        ];
        let seen = Book::new(Instant::now()).enter(answers, &[dataset(json!({}))]).datasets[&id()].clone();
        let scan = seen.scan.unwrap();
        assert_eq!((scan.generation, scan.state, scan.files), (2, ScanState::Running, 3));
        // A worker that names no reason still has a problem.
        let problem = Problem { reason: "SourceUnreachable".into(), message: "problem 1".into() };
        assert_eq!(seen.problem, Some(problem));
    }

    #[test]
    fn bytes_that_are_being_wiped_are_still_held() {
        let answer = |wiping| {
            let said = Ok(StatusResponse { wiping, ..Default::default() });
            Answer { member: member("a", MemberState::Serving), said }
        };
        let mut book = Book::new(Instant::now());
        let seen = book.enter(vec![answer(vec![id().to_bytes()])], &[]);
        assert!(seen.may_hold(&id()));
        assert_eq!((seen.datasets[&id()].served_by, seen.datasets[&id()].cached), (0, 0));
        assert!(!book.enter(vec![answer(Vec::new())], &[]).may_hold(&id()));
    }

    #[test]
    fn who_says_nothing_holds_what_it_last_said() {
        let mut book = Book::new(Instant::now());
        // One that never said anything may hold anything.
        assert!(book.enter(vec![silent("a")], &[]).may_hold(&id()));
        assert!(book.enter(vec![answer("a", |_, _| {})], &[]).may_hold(&id()));
        assert!(book.enter(vec![silent("a")], &[]).may_hold(&id()));
        let nothing = Answer { said: Ok(StatusResponse::default()), ..silent("a") };
        assert!(!book.enter(vec![nothing], &[]).may_hold(&id()));
        assert!(!book.enter(vec![silent("a")], &[]).may_hold(&id()));
        // Nobody is there who could.
        assert!(!book.enter(Vec::new(), &[]).may_hold(&id()));
    }

    #[test]
    fn reads_go_on_from_what_was_published() {
        let read = |hits, uptime| {
            move |status: &mut StatusResponse, said: &mut wire::DatasetStatus| {
                status.uptime_seconds = uptime;
                said.hit_bytes = hits;
            }
        };
        let datasets = [dataset(json!({"hits": 100, "misses": 7}))];
        let began = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let mut book = Book::new(began);
        // Older than this operator: what it counted is in what was published.
        let seen = book.enter(vec![answer("a", read(60, 500))], &datasets);
        assert_eq!((seen.datasets[&id()].hits, seen.datasets[&id()].misses), (100, 7));
        // Younger: all it counted is new.
        let seen = book.enter(vec![answer("a", read(70, 503)), answer("b", read(5, 3))], &datasets);
        assert_eq!(seen.datasets[&id()].hits, 115);
    }

    #[test]
    fn change_is_expected_while_somebody_is_missing_or_knows_too_little() {
        let datasets = [dataset(json!({}))];
        let enter = |answers| Book::new(Instant::now()).enter(answers, &datasets);
        let counted = |_: &mut StatusResponse, said: &mut wire::DatasetStatus| {
            said.scan = Some(wire::ScanProgress { state: wire::ScanState::Complete.into(), ..Default::default() });
        };
        assert!(!enter(vec![answer("a", counted)]).expects_change(&datasets));
        assert!(enter(vec![answer("a", counted), silent("b")]).expects_change(&datasets));
        assert!(enter(vec![answer("a", |_, _| {})]).expects_change(&datasets));
    }
}
