//! Datasets that are synchronised periodically: what changes at the source is seen in time, at the price of its listing,
//! and nobody waits for it.

use std::time::{Duration, Instant};

use forebay_client::ClientError;
use forebay_test_store::{Action, Fault, Verb};

use crate::harness::{BUCKET, Cluster, eventually, path};

const INTERVAL: Duration = Duration::from_secs(3);

async fn cluster(workers: usize) -> Cluster {
    Cluster::start_with(workers, |_| {}, |dataset| dataset.sync_interval = Some(INTERVAL)).await
}

/// Listings of all sources that have come to their end.
async fn generation(cluster: &Cluster) -> u64 {
    cluster.status(0).await.generation
}

async fn synchronised(cluster: &Cluster, times: u64) {
    let from = generation(cluster).await;
    eventually("the next listings", || async { generation(cluster).await >= from + times }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_out_of_band_is_seen_within_the_interval() {
    let cluster = cluster(2).await;
    for (key, seed) in [("d/same", 1), ("d/changed", 2), ("d/gone", 3), ("lost/gone", 4)] {
        cluster.put(key, seed, 100_000).await;
    }
    synchronised(&cluster, 2).await;
    for (key, seed) in [("/d/same", 1), ("/d/changed", 2), ("/d/gone", 3)] {
        cluster.check(key, seed, 100_000).await;
    }
    let revision = cluster.status(0).await.scan.map(|scan| scan.digest);
    let began = Instant::now();
    cluster.put("d/changed", 12, 100_001).await;
    cluster.put("new/file", 13, 100_000).await;
    cluster.store.delete(BUCKET, "d/gone").await;
    cluster.store.delete(BUCKET, "lost/gone").await;
    let missing = |name: &'static str| async { matches!(cluster.version(name).await, Err(ClientError::NotFound)) };
    eventually("all changes", || async {
        let changed = cluster.version("/d/changed").await.is_ok_and(|version| version.size == 100_001);
        changed && cluster.version("/new/file").await.is_ok() && missing("/d/gone").await && missing("/lost/gone").await
    })
    .await;
    println!("seen after {:?} of {INTERVAL:?}", began.elapsed());
    cluster.check("/d/changed", 12, 100_001).await;
    cluster.check("/d/same", 1, 100_000).await;
    eventually("another revision", || async {
        let scans = [cluster.status(0).await.scan, cluster.status(1).await.scan];
        scans
            .into_iter()
            .flatten()
            .any(|scan| scan.files == 3 && Some(scan.digest) != revision && scan.synced_ms.is_some())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unchanged_tree_costs_its_listing_and_nothing_else() {
    let cluster = cluster(2).await;
    for file in 0..40 {
        cluster.put(&format!("d{}/{file}", file % 4), file, 10_000).await;
    }
    synchronised(&cluster, 2).await;
    cluster.check("/d0/0", 0, 10_000).await;
    let (before, from) = (cluster.store.counters(), generation(&cluster).await);
    synchronised(&cluster, 2).await;
    let (after, to) = (cluster.store.counters(), generation(&cluster).await);
    assert_eq!((after.gets, after.heads), (before.gets, before.heads));
    // Five directories; the source is asked whether it is there, too, and the last listing may be under way.
    let lists = after.lists - before.lists;
    assert!(lists <= 5 * (to - from + 1) + 5, "{lists} requests in {} rounds", to - from);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_source_that_is_listed_again() {
    let cluster = cluster(2).await;
    for file in 0..20 {
        cluster.put(&format!("d{}/{file}", file % 4), file, 10_000).await;
    }
    synchronised(&cluster, 2).await;
    cluster.store.faults().add(Fault::new(Action::Delay(Duration::from_secs(30))).on(Verb::List));
    let end = Instant::now() + 2 * INTERVAL;
    let mut longest = Duration::ZERO;
    while Instant::now() < end {
        for file in 0..20 {
            let began = Instant::now();
            assert!(cluster.version(&format!("/d{}/{file}", file % 4)).await.is_ok());
            longest = longest.max(began.elapsed());
        }
        let names = cluster.names().list(&path("/d0"), &[], 100).await.unwrap();
        assert_eq!(names.entries.len(), 5);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("longest look-up {longest:?}");
    // What is there again is seen again.
    cluster.store.faults().clear();
    cluster.put("d0/new", 50, 10_000).await;
    eventually("the new file", || async { cluster.version("/d0/new").await.is_ok() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_listing_met_that_broke_off_is_listed_again() {
    let cluster = cluster(2).await;
    for file in 0..20 {
        cluster.put(&format!("d{}/{file}", file % 4), file, 10_000).await;
    }
    synchronised(&cluster, 2).await;
    // All directories but one are listed, again and again, in vain.
    cluster.store.faults().add(Fault::new(Action::Status(403)).on(Verb::List).key("d3/"));
    let before = generation(&cluster).await;
    cluster.put("d0/first", 50, 10_000).await;
    eventually("a listing that breaks off", || async { cluster.version("/d0/first").await.is_ok() }).await;
    cluster.put("d0/second", 51, 10_000).await;
    eventually("another one", || async { cluster.version("/d0/second").await.is_ok() }).await;
    // The one that was under way may have been complete.
    assert!(generation(&cluster).await <= before + 1, "a listing that broke off counts as complete");
    // What is known of the directory that cannot be listed is answered.
    cluster.check("/d3/3", 3, 10_000).await;
    cluster.store.faults().clear();
    synchronised(&cluster, 1).await;
}
