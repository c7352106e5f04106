//! Loads that have a name: by all workers together, and on without who asked for them.

use std::{sync::Arc, time::Duration};

use forebay_preload::run::{self, Request, RunError};
use forebay_protocol::worker::{LoadProgress, LoadRequest, LoadRun, LoadTerms, Selection};
use forebay_test_store::{Action, Fault, Verb};
use futures::StreamExt;
use parking_lot::Mutex;

use crate::harness::{Cluster, MIB, eventually, path};

const FILES: u64 = 60;

/// Files of some 20 KB each, and one of several chunks.
async fn fill(cluster: &Cluster) -> u64 {
    let mut bytes = 65 * MIB;
    for file in 0..FILES - 1 {
        let size = 10_000 + file * 300;
        cluster.put(&format!("train/{}/{file}", file % 3), file, size).await;
        bytes += size;
    }
    cluster.put_virtual("train/shard", 77, 65 * MIB);
    cluster.refresh("/").await;
    bytes
}

fn request(cluster: &Cluster, run: &str) -> Request {
    Request {
        dataset: cluster.id,
        run: run.to_owned(),
        path: path("/"),
        selection: Selection::default(),
        terms: LoadTerms::default(),
    }
}

async fn run_of(cluster: &Cluster, worker: usize, name: &str) -> Option<LoadRun> {
    cluster.status(worker).await.runs.into_iter().find(|run| run.run == name)
}

/// Has the first worker load everything under a name, and hears the first word of it.
async fn begin(cluster: &Cluster, name: &str) -> tonic::Streaming<LoadProgress> {
    let mut control = cluster.client.control("w-0").await.unwrap();
    let wanted = LoadRequest {
        dataset: cluster.id.to_bytes(),
        path: path("/").to_bytes(),
        run: name.to_owned(),
        epoch: cluster.client.members().epoch,
        ..LoadRequest::default()
    };
    let mut stream = control.load(wanted).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_exact_and_nothing_is_fetched_twice() {
    let cluster = Cluster::start(3).await;
    let bytes = fill(&cluster).await;
    let told = Arc::new(Mutex::new(LoadProgress::default()));
    let last = told.clone();
    let done = run::run(&cluster.client, &request(&cluster, "one"), |sum| *last.lock() = sum.clone()).await.unwrap();
    assert_eq!((done.total_files, done.done_files), (FILES, FILES));
    assert_eq!((done.total_bytes, done.done_bytes), (bytes, bytes));
    assert_eq!(*told.lock(), done);
    assert_eq!(cluster.sum(|status| status.cached_bytes).await, bytes);
    // The workers know it, and who asks again, by the same name or another, costs the source nothing.
    let known = run_of(&cluster, 1, "one").await.unwrap();
    assert!(known.error.is_empty() && known.progress.unwrap().finished);
    let gets = cluster.store.counters().gets;
    for name in ["one", "two"] {
        assert_eq!(run::run(&cluster.client, &request(&cluster, name), |_| {}).await.unwrap().done_bytes, bytes);
    }
    assert_eq!(cluster.store.counters().gets, gets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_complete_fails_and_goes_on_when_asked_again() {
    let cluster = Cluster::start(2).await;
    fill(&cluster).await;
    cluster.store.faults().add(Fault::new(Action::Status(403)).on(Verb::Get).key("train/1/7"));
    match run::run(&cluster.client, &request(&cluster, "one"), |_| {}).await {
        Err(RunError::Files { files: 1, total: FILES, reasons }) => {
            assert!(reasons.len() == 1 && reasons[0].starts_with("/train/1/7: "), "{reasons:?}");
        }
        other => panic!("{other:?}"),
    }
    cluster.store.faults().clear();
    let gets = cluster.store.counters().gets;
    let done = run::run(&cluster.client, &request(&cluster, "one"), |_| {}).await.unwrap();
    assert_eq!((done.done_files, done.failed_files), (FILES, 0));
    assert_eq!(cluster.store.counters().gets, gets + 1, "what was loaded is loaded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_goes_on_when_its_caller_is_gone_and_another_joins_it() {
    let cluster = Cluster::start(1).await;
    let bytes = fill(&cluster).await;
    // The last of them waits until it is let go.
    cluster
        .store
        .faults()
        .add(Fault::new(Action::Delay(Duration::from_secs(3))).on(Verb::Get).key("train/1/58").times(1));
    drop(begin(&cluster, "one").await);
    eventually("all but one file", || async {
        run_of(&cluster, 0, "one").await.and_then(|run| run.progress).is_some_and(|seen| seen.done_files == FILES - 1)
    })
    .await;
    let gets = cluster.store.counters().gets;
    let done = run::run(&cluster.client, &request(&cluster, "one"), |_| {}).await.unwrap();
    assert_eq!(done.done_bytes, bytes);
    // The one that waited counts when it is answered.
    assert_eq!(cluster.store.counters().gets, gets + 1, "nothing is fetched twice");
    assert_eq!(cluster.status(0).await.runs.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_restarts_loads_what_is_missing() {
    let mut cluster = Cluster::start(2).await;
    let bytes = fill(&cluster).await;
    cluster.store.faults().add(Fault::new(Action::Delay(Duration::from_millis(300))).on(Verb::Get).key("train/2/"));
    let (client, wanted) = (cluster.client.clone(), request(&cluster, "one"));
    let (begun, beginning) = tokio::sync::oneshot::channel();
    let running = tokio::spawn(async move {
        let mut begun = Some(begun);
        run::run(&client, &wanted, |sum| {
            if sum.done_files > 5
                && let Some(begun) = begun.take()
            {
                let _ = begun.send(());
            }
        })
        .await
    });
    beginning.await.unwrap();
    cluster.workers[1].kill().await;
    cluster.restart(1).await;
    cluster.store.faults().clear();
    let done = running.await.unwrap().unwrap();
    assert_eq!((done.done_files, done.done_bytes), (FILES, bytes));
    assert_eq!(cluster.sum(|status| status.cached_bytes).await, bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_runs_are_bounded() {
    let cluster = Cluster::start(1).await;
    fill(&cluster).await;
    let refused = run::run(&cluster.client, &request(&cluster, &"x".repeat(65)), |_| {}).await;
    assert!(matches!(&refused, Err(RunError::Worker { reason, .. }) if reason.contains("64 bytes")), "{refused:?}");
    // Of those that have ended some are kept.
    for run in 0..20 {
        run::run(&cluster.client, &request(&cluster, &format!("run-{run}")), |_| {}).await.unwrap();
    }
    let names: Vec<String> = cluster.status(0).await.runs.into_iter().map(|run| run.run).collect();
    assert_eq!((names.len(), names[0].as_str(), names[15].as_str()), (16, "run-4", "run-19"));
}
