//! Request budgets of sources: kept by all workers together, whoever dies, and obeying the source.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_cache_worker::RequestBudget;
use forebay_protocol::{
    DatasetPath,
    identity::directory_placement_key,
    placement::Placement,
    table::WorkerTable,
    worker::{LoadProgress, LoadRequest},
};
use forebay_test_store::{Action, Fault, Verb};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use crate::harness::{Cluster, at, eventually, source};

const SIZE: u64 = 1000;

fn gets(per_second: u32) -> RequestBudget {
    RequestBudget { get_per_second: Some(per_second), ..RequestBudget::default() }
}

/// Workers with a budget, and a source with so many files.
async fn start(workers: usize, budget: RequestBudget, files: u64) -> Cluster {
    let change = |dataset: &mut forebay_cache_worker::DatasetConfig| dataset.sources[0].request_budget = budget;
    let cluster = Cluster::start_with(workers, |_| {}, change).await;
    for file in 0..files {
        cluster.put(&format!("d/{file:04}"), file, SIZE).await;
    }
    cluster.refresh("/").await;
    cluster
}

/// Loads a worker's share; `None` when the worker dies meanwhile.
async fn load(client: forebay_client::Client, worker: String, dataset: Bytes) -> Option<LoadProgress> {
    let mut control = client.control(&worker).await.ok()?;
    let request = LoadRequest { dataset, path: Bytes::from_static(b"/"), ..LoadRequest::default() };
    let mut stream = control.load(request).await.ok()?.into_inner();
    let mut last = LoadProgress::default();
    while let Some(progress) = stream.message().await.ok()? {
        last = progress;
    }
    last.finished.then_some(last)
}

fn load_all(cluster: &Cluster) -> Vec<tokio::task::JoinHandle<Option<LoadProgress>>> {
    let names = cluster.workers.iter().map(|worker| worker.options.name.clone());
    names.map(|name| tokio::spawn(load(cluster.client.clone(), name, cluster.id.to_bytes()))).collect()
}

/// The worker that shares out the budgets.
fn grantor(cluster: &Cluster) -> usize {
    let members = (0..cluster.workers.len()).map(|index| cluster.member(index)).collect();
    let placement = Placement::new(&WorkerTable { epoch: 1, members });
    placement.order(directory_placement_key(cluster.id, &DatasetPath::root()), 1)[0]
}

async fn keeps_the_budget(workers: usize, dies: impl Fn(&Cluster) -> usize) {
    const BUDGET: u32 = 60;
    const FILES: u64 = 500;
    let mut cluster = start(workers, gets(BUDGET), FILES).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let begin = Instant::now();
    let loads = load_all(&cluster);
    let dying = dies(&cluster);
    let counting = async {
        while loads.iter().enumerate().any(|(worker, load)| worker != dying && !load.is_finished()) {
            let before = begin.elapsed().as_secs_f64();
            let gets = cluster.store.counters().gets;
            seen.lock().push((before, gets, begin.elapsed().as_secs_f64()));
            sleep(Duration::from_millis(50)).await;
        }
    };
    let victim = &mut cluster.workers[dying];
    tokio::join!(counting, async {
        sleep(Duration::from_secs(4)).await;
        victim.kill().await;
    });
    let mut files = 0;
    for (worker, load) in loads.into_iter().enumerate() {
        if worker != dying {
            let progress = load.await.unwrap().unwrap();
            assert_eq!(progress.failed_files, 0, "{progress:?}");
            files += progress.done_files;
        }
    }
    assert!(files > 0 && files < FILES, "{files}");
    let seen = std::mem::take(&mut *seen.lock());
    let (_, gets, time) = *seen.last().unwrap();
    println!("{workers} workers, {dying} died: {gets} requests in {time:.1} s of {BUDGET}/s");
    // In no three seconds, or more, came more than the budget; but for half a second's, for a machine that stands still may
    // bring together what went out one by one.
    let burst = f64::from(BUDGET) * 0.5 + workers as f64;
    for (index, (from, before, _)) in seen.iter().enumerate() {
        for (_, after, to) in seen[index..].iter().filter(|(_, _, to)| to - from >= 3.0) {
            let most = (to - from) * f64::from(BUDGET) * 1.05 + burst;
            assert!((after - before) as f64 <= most, "{} requests from {from:.1} to {to:.1} s", after - before);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_together_keep_a_budget_though_their_grantor_dies() {
    keeps_the_budget(3, grantor).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_together_keep_a_budget_though_one_of_them_dies() {
    keeps_the_budget(3, |cluster| (grantor(cluster) + 1) % 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_workers_leave_a_source_alone_that_says_so() {
    let cluster = start(2, gets(50), 300).await;
    let loads = load_all(&cluster);
    eventually("requests", || async { cluster.store.counters().gets > 40 }).await;
    let fault = cluster.store.faults().add(Fault::new(Action::RetryAfter(503, 8)).on(Verb::Get).times(1));
    eventually("a refusal", || async { cluster.store.faults().hits(fault) == 1 }).await;
    let refused = Instant::now();
    // The other worker is told by the grantor, which is asked twice a second.
    sleep(Duration::from_secs(3)).await;
    let before = cluster.store.counters().gets;
    sleep(Duration::from_secs(3)).await;
    // On a machine that stood still for seconds the time may be over.
    if refused.elapsed() < Duration::from_secs(7) {
        assert_eq!(cluster.store.counters().gets, before);
    }
    let mut files = 0;
    for load in loads {
        files += load.await.unwrap().unwrap().done_files;
    }
    assert_eq!(files, 300);
    assert_eq!(cluster.sum(|status| status.store_throttled).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_may_be_edited_while_it_is_waited_for() {
    let cluster = start(2, gets(1), 100).await;
    let loads = load_all(&cluster);
    eventually("requests", || async { cluster.store.counters().gets > 0 }).await;
    let before = cluster.store.counters();
    assert!(before.gets < 50, "{before:?}");
    cluster.configure(&[cluster.with_sources(vec![at("/", source(&cluster.store, ""))])]);
    for load in loads {
        assert_eq!(load.await.unwrap().unwrap().failed_files, 0);
    }
    // The source stays open: it is neither asked whether it is there, nor listed.
    assert_eq!((cluster.store.counters().gets, cluster.store.counters().lists), (100, before.lists));
    let slow = forebay_cache_worker::SourceConfig { request_budget: gets(1), ..at("/", source(&cluster.store, "")) };
    cluster.configure(&[cluster.with_sources(vec![slow])]);
    cluster.check("/d/0042", 42, SIZE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_come_first_and_a_slow_load_does_not_fail() {
    // A budget by which the load's last file waits for longer than a request may (15 s).
    let cluster = start(1, gets(2), 45).await;
    let loads = load_all(&cluster);
    eventually("requests", || async { cluster.store.counters().gets > 1 }).await;
    for file in [44, 20, 33] {
        let before = cluster.store.counters().gets;
        cluster.check(&format!("/d/{file:04}"), file, SIZE).await;
        // One that went out before it, one that had its place, its own, and those that came while it was looked up; of the
        // load 28 may be under way.
        let since = cluster.store.counters().gets - before;
        assert!(since <= 10, "a reader was behind {since} requests");
    }
    for load in loads {
        let progress = load.await.unwrap().unwrap();
        assert_eq!((progress.done_files, progress.failed_files), (45, 0), "{progress:?}");
    }
    assert_eq!(cluster.store.counters().gets, 45);
}
