//! Copies: what several workers are to hold.

use std::{fs, time::Duration};

use bytes::Bytes;
use forebay_cache_worker::{DatasetConfig, Replicas};
use forebay_protocol::{
    table::{Member, MemberState},
    worker::{DatasetStatus, LoadProgress, LoadRequest, LoadTerms, PinRequest},
};
use futures::future::join_all;

use crate::harness::{Cluster, MIB, at, eventually, http_of, source};

const FILES: u64 = 120;
const SIZE: u64 = 50_000;
/// Two chunks.
const LARGE: u64 = 70 * MIB;
const ALL: u64 = FILES * SIZE + LARGE;

async fn start(workers: usize, replicas: Replicas) -> Cluster {
    let cluster = Cluster::start_with(workers, |_| {}, |dataset| dataset.replicas = replicas).await;
    for file in 0..FILES {
        cluster.put(&format!("d/{}/{file}", file % 7), file, SIZE).await;
    }
    cluster.put_virtual("large", 1000, LARGE);
    cluster.refresh("/").await;
    cluster
}

fn of(min: u32) -> Replicas {
    Replicas { min, max: min }
}

async fn read_all(cluster: &Cluster) {
    for file in 0..FILES {
        cluster.check(&format!("/d/{}/{file}", file % 7), file, SIZE).await;
    }
    cluster.check("/large", 1000, LARGE).await;
}

fn cached(status: &DatasetStatus) -> u64 {
    status.cached_bytes
}

async fn held(cluster: &Cluster, bytes: u64) {
    eventually("copies", || async { cluster.sum(cached).await == bytes }).await;
}

fn edited(cluster: &Cluster, change: impl Fn(&mut DatasetConfig)) -> DatasetConfig {
    let mut config = cluster.with_sources(vec![at("/", source(&cluster.store, ""))]);
    change(&mut config);
    config
}

async fn load(cluster: &Cluster, terms: LoadTerms) -> LoadProgress {
    let loads = cluster.workers.iter().map(|worker| async {
        let mut control = cluster.client.control(&worker.options.name).await.unwrap();
        let request = LoadRequest {
            dataset: cluster.id.to_bytes(),
            path: Bytes::from_static(b"/"),
            terms: Some(terms),
            ..LoadRequest::default()
        };
        let mut stream = control.load(request).await.unwrap().into_inner();
        let mut last = LoadProgress::default();
        while let Some(progress) = stream.message().await.unwrap() {
            last = progress;
        }
        assert!(last.finished);
        last
    });
    let mut sum = LoadProgress::default();
    for progress in join_all(loads).await {
        sum.total_files += progress.total_files;
        sum.done_files += progress.done_files;
        sum.done_bytes += progress.done_bytes;
        sum.failed_files += progress.failed_files;
        sum.failures.extend(progress.failures);
    }
    sum
}

fn draining(member: Member) -> Member {
    Member { state: MemberState::Draining, ..member }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_cost_no_fetch_and_are_made_again_after_a_loss() {
    let mut cluster = start(4, of(2)).await;
    read_all(&cluster).await;
    let gets = cluster.store.counters().gets;
    held(&cluster, 2 * ALL).await;
    eventually("copies that are counted", || async { cluster.sum(|status| status.replicated_bytes).await == ALL })
        .await;
    assert_eq!(cluster.store.counters().gets, gets, "copies come from workers");
    // With all that it had.
    cluster.workers[1].kill().await;
    fs::remove_dir_all(&cluster.workers[1].options.cache_dir).unwrap();
    cluster.publish(vec![0, 2, 3]);
    cluster.ready().await;
    read_all(&cluster).await;
    held(&cluster, 2 * ALL).await;
    // And another one: what was held twice is held still.
    cluster.workers[2].kill().await;
    cluster.publish(vec![0, 3]);
    cluster.ready().await;
    read_all(&cluster).await;
    held(&cluster, 2 * ALL).await;
    // One that is new has nothing to offer, and gets its part.
    cluster.workers[1].start().await;
    cluster.publish(vec![0, 1, 3]);
    cluster.ready().await;
    eventually("a new worker that has its part", || async { cluster.status(1).await.cached_bytes > FILES * SIZE / 2 })
        .await;
    read_all(&cluster).await;
    assert_eq!(cluster.store.counters().gets, gets, "nothing is fetched twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_ends_when_its_copies_are_made() {
    let cluster = start(4, Replicas { min: 1, max: 2 }).await;
    let progress = load(&cluster, LoadTerms { replicas: 3, ..LoadTerms::default() }).await;
    let LoadProgress { total_files, done_files, done_bytes, failed_files, failures, .. } = progress;
    assert_eq!((total_files, done_files, done_bytes), (FILES + 1, FILES + 1, ALL), "{failures:?}");
    assert_eq!(failed_files, 0, "{failures:?}");
    assert_eq!(cluster.sum(cached).await, 3 * ALL);
    let gets = cluster.store.counters().gets;
    // More than there are workers: all of them.
    let progress = load(&cluster, LoadTerms { replicas: 9, pin: true, ..LoadTerms::default() }).await;
    assert_eq!((progress.done_files, progress.failed_files), (FILES + 1, 0), "{:?}", progress.failures);
    assert_eq!(cluster.sum(cached).await, 4 * ALL);
    assert_eq!(cluster.sum(|status| status.pinned_bytes).await, 2 * ALL, "as many as the dataset has at most");
    assert_eq!(cluster.store.counters().gets, gets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_whose_copies_have_no_room_says_so() {
    let small = |options: &mut forebay_cache_worker::WorkerOptions| {
        if options.name == "w-1" {
            options.capacity = 2 * MIB;
        }
    };
    let cluster = Cluster::start_with(2, small, |_| {}).await;
    for file in 0..FILES {
        cluster.put(&format!("d/{file}"), file, SIZE).await;
    }
    cluster.refresh("/").await;
    // Those that are on w-0 alone come there; w-1 has no room for all of its own, and for no copy.
    let progress = load(&cluster, LoadTerms { replicas: 2, ..LoadTerms::default() }).await;
    assert!(progress.failed_files > FILES / 4, "{}", progress.failed_files);
    assert!(progress.failures[0].contains("no copy on worker w-1: it was not admitted"), "{:?}", progress.failures);
    let metrics = http_of(&cluster.workers[0], "/metrics").await;
    let refused =
        format!("copies_without_room_total{{namespace=\"default\",dataset=\"data\"}} {}", progress.failed_files);
    assert!(metrics.contains(&refused), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_makes_copies_and_those_that_are_spare_give_way() {
    let tight = |options: &mut forebay_cache_worker::WorkerOptions| {
        (options.capacity, options.high_percent, options.low_percent) = (14 * MIB, 95, 90);
        options.spare_after = Duration::ZERO;
    };
    let cluster = Cluster::start_with(2, tight, |_| {}).await;
    for file in 0..FILES {
        cluster.put(&format!("d/{file}"), file, SIZE).await;
    }
    cluster.refresh("/").await;
    load(&cluster, LoadTerms::default()).await;
    assert_eq!(cluster.sum(cached).await, FILES * SIZE);
    cluster.configure(&[edited(&cluster, |config| config.replicas = of(2))]);
    held(&cluster, 2 * FILES * SIZE).await;
    cluster.configure(&[edited(&cluster, |_| {})]);
    eventually("copies that are spare", || async {
        let metrics = http_of(&cluster.workers[0], "/metrics").await;
        !metrics.contains("forebay_worker_spare_bytes{namespace=\"default\",dataset=\"data\"} 0\n")
    })
    .await;
    // Twice as much again: it fits once, and the dataset holds what it has, but for what is spare.
    for file in FILES..3 * FILES {
        cluster.put(&format!("d/{file}"), file, SIZE).await;
    }
    cluster.refresh("/").await;
    let gets = cluster.store.counters().gets;
    eventually("room for all", || async {
        load(&cluster, LoadTerms::default()).await;
        cluster.sum(cached).await >= 3 * FILES * SIZE
    })
    .await;
    for file in 0..FILES {
        cluster.check(&format!("/d/{file}"), file, SIZE).await;
    }
    let fetched = cluster.store.counters().gets - gets;
    assert_eq!(fetched, 2 * FILES, "what was held once is held still");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_hands_its_pins_on() {
    let mut cluster = start(3, of(1)).await;
    for worker in &cluster.workers {
        let mut control = cluster.client.control(&worker.options.name).await.unwrap();
        let request = PinRequest { dataset: cluster.id.to_bytes(), path: Bytes::from_static(b"/"), remove: false };
        let mut stream = control.pin(request).await.unwrap().into_inner();
        while stream.message().await.unwrap().is_some() {}
    }
    assert_eq!(cluster.sum(|status| status.pinned_bytes).await, ALL);
    let gets = cluster.store.counters().gets;
    cluster.workers[0].options.drain = Duration::from_secs(30);
    cluster.publish_members(vec![draining(cluster.member(0)), cluster.member(1), cluster.member(2)]);
    cluster.ready().await;
    // As the operator does it: the worker ends when nobody needs it any more.
    cluster.workers[0].stop().await;
    cluster.workers[0].options.drain = Duration::from_secs(30);
    cluster.workers[0].start().await;
    eventually("pins at the others", || async {
        let others = [cluster.status(1).await.pinned_bytes, cluster.status(2).await.pinned_bytes];
        others.iter().sum::<u64>() == ALL
    })
    .await;
    eventually("none at who leaves", || async { cluster.status(0).await.pinned_bytes == 0 }).await;
    cluster.workers[0].drain().await;
    cluster.publish(vec![1, 2]);
    cluster.ready().await;
    read_all(&cluster).await;
    assert_eq!(cluster.store.counters().gets, gets, "nothing is fetched twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_a_hot_file_are_spread_over_workers() {
    let sensitive = |options: &mut forebay_cache_worker::WorkerOptions| options.hot_blocks_per_second = 20;
    let cluster = Cluster::start_with(4, sensitive, |dataset| dataset.replicas = Replicas { min: 1, max: 3 }).await;
    for file in 0..20 {
        cluster.put(&format!("{file}"), file, SIZE).await;
    }
    cluster.refresh("/").await;
    let served = || async {
        let statuses = join_all((0..4).map(|worker| cluster.status(worker))).await;
        statuses.iter().map(|status| status.served_bytes).collect::<Vec<_>>()
    };
    for file in 0..20 {
        cluster.check(&format!("/{file}"), file, SIZE).await;
    }
    let before = served().await;
    eventually("three workers that serve the hot file", || async {
        for _ in 0..50 {
            cluster.check("/7", 7, SIZE).await;
        }
        let now = served().await;
        let busy = now.iter().zip(&before).filter(|(now, before)| **now >= **before + 10 * SIZE);
        busy.count() == 3
    })
    .await;
    assert_eq!(cluster.store.counters().gets, 20, "copies come from workers");
    // The others stay where they are.
    assert_eq!(cluster.sum(|status| status.cached_chunks).await, 20 + 2);
    let hot = join_all(cluster.workers.iter().map(|worker| http_of(worker, "/metrics"))).await;
    assert_eq!(hot.iter().filter(|metrics| metrics.contains("forebay_worker_hot_chunks 1\n")).count(), 1);
}
