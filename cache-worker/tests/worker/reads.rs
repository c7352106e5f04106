//! Reads: right bytes, and no byte from the store that was not asked for.

use std::{sync::Arc, time::Duration};

use forebay_cache_worker::WorkerOptions;
use forebay_client::ClientError;
use forebay_test_store::{Action, Fault, Verb};

use crate::harness::{BLOCK, Cluster, MIB, begin_load, eventually, metrics, read_at};

const FOREVER: Duration = Duration::from_secs(3600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cold_then_warm() {
    let cluster = Cluster::start(3).await;
    let sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * MIB + 17, 65 * MIB + 5];
    for (seed, size) in sizes.iter().enumerate() {
        cluster.put(&format!("dir/file-{seed}"), seed as u64, *size).await;
    }
    cluster.refresh("/").await;
    let total: u64 = sizes.iter().sum();
    for (seed, size) in sizes.iter().enumerate() {
        cluster.check(&format!("/dir/file-{seed}"), seed as u64, *size).await;
    }
    // Every byte once: nothing is read twice, nothing that was not asked for.
    let cold = cluster.store.counters();
    assert_eq!((0..sizes.len()).map(|i| cold.bytes_of(&format!("dir/file-{i}"))).sum::<u64>(), total);
    let hits_before = cluster.sum(|status| status.hit_bytes).await;
    for (seed, size) in sizes.iter().enumerate() {
        cluster.check(&format!("/dir/file-{seed}"), seed as u64, *size).await;
    }
    assert_eq!(cluster.store.counters().gets, cold.gets, "a warm read asked the store");
    assert_eq!(cluster.sum(|status| status.hit_bytes).await - hits_before, total);
    assert_eq!(cluster.sum(|status| status.miss_bytes).await, total);
    assert_eq!(cluster.sum(|status| status.cached_bytes).await, total);
    assert_eq!(cluster.sum(|status| status.served_bytes).await, 2 * total);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_reads_are_exact() {
    let cluster = Cluster::start(2).await;
    let size = 10 << 30;
    cluster.put_virtual("huge", 7, size);
    cluster.refresh("/").await;
    for (offset, len) in [(5 * (1 << 30) + 12_345, MIB), (size - 100, 100), (64 * MIB - 10, 20)] {
        let before = cluster.store.bytes_of("huge");
        let got = cluster.read("/huge", offset, len).await.unwrap();
        let mut expected = vec![0; len as usize];
        crate::harness::generate(7, offset, &mut expected);
        assert!(got == expected, "wrong bytes at {offset}");
        let fetched = cluster.store.bytes_of("huge") - before;
        assert!(fetched <= len + 2 * BLOCK, "{fetched} bytes fetched for {len}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_readers_are_one_fetch() {
    // One worker: a client that takes a slow one for dead has others fetch the same. Nor is a slow answer asked for twice.
    let cluster = Arc::new(Cluster::start_with(1, patient, |_| {}).await);
    let size = 24 * MIB;
    cluster.put_virtual("shared", 3, size);
    cluster.refresh("/").await;
    cluster.store.set_latency(Duration::from_millis(20));
    let version = cluster.version("/shared").await.unwrap();
    let readers: Vec<_> = (0..64u64)
        .map(|reader| {
            let (cluster, version) = (cluster.clone(), version.clone());
            tokio::spawn(async move {
                // All over the file, each from another start, one MiB at a time.
                for step in 0..24 {
                    let offset = (reader * 5 + step) % 24 * MIB;
                    let got = read_at(&cluster.names(), "/shared", version.clone(), offset, MIB).await.unwrap();
                    let mut expected = vec![0; MIB as usize];
                    crate::harness::generate(3, offset, &mut expected);
                    assert!(got == expected, "wrong bytes at {offset}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    assert_eq!(cluster.store.bytes_of("shared"), size, "{}", metrics(&cluster).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_read_through() {
    let cluster = Cluster::start_with(1, |_| {}, |dataset| dataset.quota = Some(2 * MIB)).await;
    for i in 0..4 {
        cluster.put(&format!("f{i}"), i, 2 * MIB).await;
    }
    cluster.refresh("/").await;
    for _ in 0..2 {
        for i in 0..4 {
            cluster.check(&format!("/f{i}"), i, 2 * MIB).await;
        }
    }
    let status = cluster.status(0).await;
    assert!(status.cached_bytes > 0 && status.cached_bytes <= 2 * MIB, "{}", status.cached_bytes);
    assert!(status.bypassed_bytes >= 8 * MIB, "{}", status.bypassed_bytes);
    assert!(status.hit_bytes > 0);
    // Many readers of one file that is not stored share what is in flight.
    cluster.store.set_latency(Duration::from_millis(300));
    let version = cluster.version("/f3").await.unwrap();
    let before = cluster.store.bytes_of("f3");
    let names = cluster.names();
    let reads = (0..16).map(|_| read_at(&names, "/f3", version.clone(), 0, 2 * MIB));
    for got in futures::future::join_all(reads).await {
        assert!(got.unwrap() == crate::harness::contents(3, 2 * MIB));
    }
    assert!(cluster.store.bytes_of("f3") - before <= 8 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_budget_slows_but_does_not_stop() {
    let small = |options: &mut WorkerOptions| options.memory_budget = 2 * BLOCK;
    let cluster = Cluster::start_with(1, small, |dataset| dataset.quota = Some(MIB)).await;
    let size = 16 * MIB;
    cluster.put_virtual("big", 9, size);
    cluster.refresh("/").await;
    let version = cluster.version("/big").await.unwrap();
    let names = cluster.names();
    let reads = (0..8).map(|i| read_at(&names, "/big", version.clone(), i * 2 * MIB, 2 * MIB));
    for (i, got) in futures::future::join_all(reads).await.into_iter().enumerate() {
        let mut expected = vec![0; 2 * MIB as usize];
        crate::harness::generate(9, i as u64 * 2 * MIB, &mut expected);
        assert!(got.unwrap() == expected);
    }
}

/// Nothing of the source ends by itself before a reader's deadline (30 s) does.
fn patient(options: &mut WorkerOptions) {
    (options.limits.deadline, options.limits.progress_timeout) = (FOREVER, FOREVER);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_load_holds_no_reader() {
    let cluster = Cluster::start_with(1, patient, |_| {}).await;
    for i in 0..64 {
        cluster.put(&format!("slow/{i}"), i, MIB).await;
    }
    cluster.put("fast", 100, MIB).await;
    cluster.refresh("/").await;
    cluster.store.faults().add(Fault::new(Action::Delay(FOREVER)).on(Verb::Get).key("slow/"));
    let _load = begin_load(&cluster, "/slow").await;
    eventually("load under way", || async { cluster.store.counters().gets >= 16 }).await;
    cluster.check("/fast", 100, MIB).await;
    // The load has not moved meanwhile.
    assert_eq!(cluster.store.counters().bytes_out, MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_the_end_does_not_wait_for_the_load_of_the_beginning() {
    let cluster = Cluster::start_with(1, patient, |_| {}).await;
    let size = 64 * MIB;
    cluster.put_virtual("big", 5, size);
    cluster.refresh("/").await;
    // The chunk is eight runs, of which a load has four under way; these never end.
    let stalled = cluster.store.faults().add(Fault::new(Action::Delay(FOREVER)).on(Verb::Get).key("big").times(4));
    let _load = begin_load(&cluster, "/big").await;
    eventually("load under way", || async { cluster.store.faults().hits(stalled) == 4 }).await;
    let mut expected = vec![0; MIB as usize];
    crate::harness::generate(5, size - MIB, &mut expected);
    assert!(cluster.read("/big", size - MIB, MIB).await.unwrap() == expected);
    let counters = cluster.store.counters();
    assert_eq!((counters.gets, counters.bytes_out <= 8 * MIB), (5, true), "only the run of the reader");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_names_are_not_found() {
    let cluster = Cluster::start(2).await;
    cluster.put("here", 1, 1).await;
    cluster.refresh("/").await;
    assert_eq!(cluster.version("/gone").await, Err(ClientError::NotFound));
    assert_eq!(cluster.version("/no/where").await, Err(ClientError::NotFound));
    cluster.check("/here", 1, 1).await;
}
