//! Memory stays within its budget, and everybody goes on.

use std::{sync::Arc, time::Duration};

use forebay_client::MemoryBudget;
use forebay_protocol::frame::{Purpose, Read};
use futures::future::join_all;

use crate::support::{Cluster, MIB, Reply, eventually};

const BUDGET: usize = 8 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_readers_share_eight_mebibytes() {
    let cluster = Arc::new(Cluster::with(3, |config| config.memory = MemoryBudget::new(BUDGET)).await);
    // Nobody is starved: a read that gets no memory within its deadline fails.
    let readers = (0..64).map(|i| {
        let cluster = cluster.clone();
        tokio::spawn(async move {
            let file = cluster.open(&format!("/f{i}"), 20 * MIB);
            for step in 0..6 {
                // Half of them sequential, half of them not.
                let offset = if i % 2 == 0 { step * MIB } else { (step * 7 + i) % 19 * MIB + 1 };
                file.check(offset, 1 << 20).await;
            }
        })
    });
    join_all(readers).await.into_iter().for_each(|read| read.unwrap());
    let metrics = cluster.client.metrics();
    assert!(metrics.budget_peak <= BUDGET as u64, "{metrics:?}");
    assert!(metrics.budget_peak > BUDGET as u64 / 2, "the budget is used: {metrics:?}");
    assert!(metrics.budget_waits > 0);
    eventually("all memory came back", || cluster.client.metrics().budget_used == 0).await;
}

#[tokio::test]
async fn what_is_read_ahead_gives_way_to_reads() {
    let cluster = Cluster::with(1, |config| config.memory = MemoryBudget::new(BUDGET)).await;
    let idle: Vec<_> = (0..4).map(|i| cluster.open(&format!("/idle{i}"), 100 * MIB)).collect();
    for file in &idle {
        for i in 0..8 {
            file.check(i * MIB, 1 << 20).await;
        }
    }
    eventually("read-ahead took what it may", || cluster.client.metrics().budget_used >= 4 << 20).await;
    // Their holders keep nothing back.
    let file = cluster.open("/other", 100 * MIB);
    let held = file.reader.read(0, 7 << 20).await.unwrap();
    assert_eq!(held.iter().map(|part| part.len()).sum::<usize>(), 7 << 20);
    assert!(cluster.client.metrics().read_ahead_wasted_bytes > 0);
    assert!(cluster.client.metrics().budget_used >= 7 << 20, "what a caller holds is counted");
    drop(held);
    for file in &idle {
        file.check(20 * MIB, 1 << 20).await;
    }
    assert!(cluster.client.metrics().budget_peak <= BUDGET as u64);
}

#[tokio::test]
async fn clients_that_share_a_budget_keep_within_it_and_give_way_to_each_other() {
    let memory = MemoryBudget::new(BUDGET);
    let sharing = || Cluster::with(1, |config| config.memory = memory.clone());
    let (idle, busy) = (sharing().await, sharing().await);
    let ahead: Vec<_> = (0..4).map(|i| idle.open(&format!("/idle{i}"), 100 * MIB)).collect();
    for file in &ahead {
        for i in 0..8 {
            file.check(i * MIB, 1 << 20).await;
        }
    }
    eventually("read-ahead of one took what it may", || memory.usage().used >= 4 << 20).await;
    let held = busy.open("/other", 100 * MIB).reader.read(0, 7 << 20).await.unwrap();
    assert!(idle.client.metrics().read_ahead_wasted_bytes > 0);
    assert!(memory.usage().peak <= BUDGET as u64);
    drop((held, idle, ahead, busy));
    eventually("all memory came back", || memory.usage().used == 0).await;
}

#[tokio::test]
async fn stalled_reads_hold_nobody_else() {
    let cluster = Arc::new(
        Cluster::with(1, |config| {
            config.memory = MemoryBudget::new(BUDGET);
            config.deadline = Duration::from_secs(20);
            config.connections_per_worker = 1;
        })
        .await,
    );
    cluster.workers[0].script(|read| match read.path.as_bytes().starts_with(b"/stalled") {
        true => Reply::Stall,
        false => Reply::Serve,
    });
    // Four times the budget waits for a source that does not answer, large files and small ones.
    let stalled: Vec<_> = (0..40)
        .map(|i| {
            let cluster = cluster.clone();
            tokio::spawn(async move {
                let size = if i % 4 == 0 { 900_000 } else { 20 * MIB };
                cluster.open(&format!("/stalled{i}"), size).check(0, 1 << 20).await;
            })
        })
        .collect();
    eventually("reads are stalled", || cluster.requests() >= 7).await;
    let file = cluster.open("/held", 20 * MIB);
    for i in 0..10 {
        file.check(i * MIB, 1 << 20).await;
    }
    // They overtook those who wait.
    for read in &stalled {
        assert!(!read.is_finished());
    }
    // The source answers again: whoever waited gets the right bytes.
    cluster.all(Reply::Serve);
    // Those under way were told nothing yet; they end by a new connection.
    cluster.workers[0].freeze(true);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    cluster.workers[0].freeze(false);
    for read in stalled {
        read.await.unwrap();
    }
    assert!(cluster.client.metrics().budget_peak <= BUDGET as u64);
}

#[tokio::test]
async fn parked_memory_is_taken_again_when_bytes_come() {
    let cluster = Arc::new(
        Cluster::with(1, |config| {
            config.memory = MemoryBudget::new(4 << 20);
            config.deadline = Duration::from_secs(20);
        })
        .await,
    );
    cluster.workers[0].script(|read| match read.path.as_bytes().starts_with(b"/slow") {
        true => Reply::Delay(Duration::from_millis(1500)),
        false => Reply::Serve,
    });
    let reads: Vec<_> = (0..12)
        .map(|i| {
            let cluster = cluster.clone();
            tokio::spawn(async move { cluster.open(&format!("/slow{i}"), 20 * MIB).check(0, 1 << 20).await })
        })
        .collect();
    for read in reads {
        read.await.unwrap();
    }
    let metrics = cluster.client.metrics();
    assert!(metrics.budget_peak <= 4 << 20, "{metrics:?}");
    assert_eq!(metrics.checksum_failures, 0);
}

#[tokio::test]
async fn stalled_read_ahead_leaves_the_demand_lane_free() {
    let cluster = Cluster::with(1, |config| config.connections_per_worker = 1).await;
    cluster.workers[0].script(|read| match read.purpose {
        Purpose::ReadAhead => Reply::Stall,
        _ => Reply::Serve,
    });
    let files: Vec<_> = (0..20).map(|i| cluster.open(&format!("/f{i}"), 100 * MIB)).collect();
    for file in &files {
        file.check(0, 1 << 20).await;
        file.check(MIB, 1 << 20).await;
    }
    let ahead = |read: &Read| read.purpose == Purpose::ReadAhead;
    eventually("read-ahead is stalled", || cluster.workers[0].requests().iter().any(ahead)).await;
    cluster.open("/other", 100 * MIB).check(50 * MIB, 1 << 20).await;
    // Nothing that is stalled had to go first.
    assert_eq!(cluster.workers[0].cancels(), 0);
}
