//! Right bytes for any sequence of reads, and no more asked of workers than is worth it.

use std::{sync::Arc, time::Duration};

use forebay_client::{ClientError, MemoryBudget};
use forebay_protocol::{BLOCK_SIZE, CHUNK_SIZE, frame::Purpose};
use proptest::prelude::*;

use crate::support::{Cluster, MIB, Reply, eventually};

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0u64),
        1..200_000u64,
        Just(BLOCK_SIZE),
        MIB - 2..MIB + 3,
        2 * MIB..6 * MIB,
        CHUNK_SIZE - 2..CHUNK_SIZE + 3 * MIB,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Any reads, sequential or not, some at once, give what the generator gives.
    #[test]
    fn reads_equal_the_generator(
        size in sizes(),
        reads in prop::collection::vec((0.0..1.05f64, 0..3_000_000usize, any::<bool>(), any::<bool>()), 1..25),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let cluster = Cluster::with(2, |config| config.memory = MemoryBudget::new(16 << 20)).await;
            let file = cluster.open("/a", size);
            let mut offset = 0;
            for (place, len, sequential, twice) in reads {
                if !sequential {
                    offset = (size as f64 * place) as u64;
                }
                if twice {
                    tokio::join!(file.check(offset, len), file.check(offset + len as u64, len));
                    offset += len as u64;
                } else {
                    file.check(offset, len).await;
                }
                offset += len as u64;
            }
            drop(file);
            eventually("all memory came back", || cluster.client.metrics().budget_used == 0).await;
            assert!(cluster.client.metrics().budget_peak <= 16 << 20);
        });
    }
}

#[tokio::test]
async fn a_random_read_asks_for_its_blocks_only() {
    let cluster = Cluster::start(3).await;
    let file = cluster.open("/huge", 10 << 30);
    for i in 0..20u64 {
        let before = cluster.blocks_asked();
        // Odd places all over the file, one across the border of two chunks.
        let offset = if i == 7 { CHUNK_SIZE - 300_001 } else { (i * 7 % 20) * (500 << 20) + 12_345 * i };
        file.check(offset, 1 << 20).await;
        let asked = (cluster.blocks_asked() - before) * BLOCK_SIZE;
        assert!(asked <= MIB + 128 * 1024, "{asked} at {offset}");
    }
    assert_eq!(cluster.client.metrics().read_ahead_bytes, 0);
}

#[tokio::test]
async fn read_ahead_grows_is_used_and_stops() {
    let cluster = Cluster::with(2, |config| config.max_read_ahead = 8 * MIB).await;
    let file = cluster.open("/a", 1 << 30);
    for i in 0..64 {
        file.check(i * MIB, 1 << 20).await;
    }
    let metrics = cluster.client.metrics();
    assert_eq!(metrics.read_ahead_wasted_bytes, 0);
    assert!(metrics.read_ahead_used_bytes >= 60 * MIB, "{metrics:?}");
    assert!(metrics.read_ahead_bytes <= (62 + 8) * MIB, "{metrics:?}");
    assert!(metrics.blocks_requested * BLOCK_SIZE <= (64 + 8) * MIB, "nothing twice: {metrics:?}");
    let ahead = cluster.workers.iter().flat_map(|worker| worker.requests());
    let largest = ahead.filter(|read| read.purpose == Purpose::ReadAhead).map(|read| read.range.count).max();
    assert_eq!(largest, Some(32), "segments of 2 MiB under a window of 8 MiB");

    // Random reads elsewhere: nothing more is read ahead.
    for i in 0..30 {
        file.check((100 + i * 17 % 29 * 30) * MIB, 100_000).await;
    }
    assert_eq!(cluster.client.metrics().read_ahead_bytes, metrics.read_ahead_bytes);

    // Closing gives all memory back and counts what was not read.
    drop(file);
    eventually("all memory came back", || cluster.client.metrics().budget_used == 0).await;
    let end = cluster.client.metrics();
    assert_eq!(end.read_ahead_bytes, end.read_ahead_used_bytes + end.read_ahead_wasted_bytes);
}

#[tokio::test]
async fn requests_of_the_kernel_in_any_order_are_one_stream() {
    let cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 100 * MIB);
    for i in 0..24u64 {
        // Four requests at once, shuffled.
        let at = |k: u64| (i * 4 + (k * 3 + i) % 4) * MIB;
        tokio::join!(
            file.check(at(0), 1 << 20),
            file.check(at(1), 1 << 20),
            file.check(at(2), 1 << 20),
            file.check(at(3), 1 << 20)
        );
    }
    let metrics = cluster.client.metrics();
    assert!(metrics.read_ahead_used_bytes >= 60 * MIB, "{metrics:?}");
    // A little is asked twice when a request overtakes what is read ahead for it.
    assert!(metrics.blocks_requested * BLOCK_SIZE <= 112 * MIB, "{metrics:?}");
}

#[tokio::test]
async fn interleaved_readers_each_have_their_stream() {
    let cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 400 * MIB);
    for i in 0..30 {
        for reader in 0..4 {
            file.check(reader * 100 * MIB + i * MIB / 2, 1 << 19).await;
        }
    }
    let metrics = cluster.client.metrics();
    assert!(metrics.read_ahead_used_bytes >= 40 * MIB, "{metrics:?}");
}

#[tokio::test]
async fn a_small_file_is_one_request() {
    let cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 900_000);
    tokio::join!(file.check(0, 4096), file.check(300_000, 4096), file.check(899_999, 10));
    for i in 0..9 {
        file.check(i * 100_000, 90_000).await;
    }
    assert_eq!(cluster.requests(), 1);
    assert_eq!(cluster.client.metrics().read_ahead_bytes, 0);
}

#[tokio::test]
async fn a_read_waits_for_what_is_read_ahead_and_helps_itself_when_that_is_stuck() {
    let cluster = Cluster::start(1).await;
    let file = cluster.open("/a", 100 * MIB);
    cluster.workers[0].script(|read| match read.purpose {
        Purpose::ReadAhead => Reply::Delay(Duration::from_millis(400)),
        _ => Reply::Serve,
    });
    file.check(0, 1 << 20).await;
    file.check(MIB, 1 << 20).await;
    let before = cluster.blocks_asked();
    file.check(2 * MIB, 4096).await;
    let demanded = cluster.workers[0].requests().iter().filter(|read| read.purpose == Purpose::Demand).count();
    assert_eq!(demanded, 2, "the third read waited");
    assert!(cluster.blocks_asked() >= before);

    cluster.workers[0].script(|read| match read.purpose {
        Purpose::ReadAhead => Reply::Stall,
        _ => Reply::Serve,
    });
    let other = cluster.open("/b", 100 * MIB);
    for i in 0..3 {
        other.check(i * MIB, 1 << 20).await;
    }
}

#[tokio::test]
async fn dropping_a_read_cancels_its_requests() {
    for size in [40 * MIB, 500_000] {
        let cluster = Cluster::start(1).await;
        cluster.all(Reply::Stall);
        let file = cluster.open("/a", size);
        let reader = file.reader.clone();
        let read = tokio::spawn(async move { reader.read(0, 4096).await });
        eventually("the read is under way", || cluster.requests() == 1).await;
        assert!(cluster.client.metrics().budget_used > 0);
        read.abort();
        eventually("it is cancelled", || cluster.workers[0].cancels() == 1).await;
        eventually("its memory came back", || cluster.client.metrics().budget_used == 0).await;
        cluster.all(Reply::Serve);
        file.check(0, 4096).await;
    }
}

#[tokio::test]
async fn one_who_leaves_does_not_cancel_what_another_waits_for() {
    let cluster = Cluster::start(1).await;
    cluster.all(Reply::Delay(Duration::from_millis(300)));
    let file = Arc::new(cluster.open("/a", 500_000));
    let stays = tokio::spawn({
        let file = file.clone();
        async move { file.check(0, 500_000).await }
    });
    let leaves = tokio::spawn({
        let file = file.clone();
        async move { file.check(0, 500_000).await }
    });
    eventually("the read is under way", || cluster.requests() == 1).await;
    leaves.abort();
    stays.await.unwrap();
    assert_eq!((cluster.requests(), cluster.workers[0].cancels()), (1, 0));
}

#[tokio::test]
async fn reads_at_and_beyond_the_end() {
    let cluster = Cluster::start(1).await;
    let file = cluster.open("/a", 3 * MIB + 1);
    file.check(3 * MIB, 4096).await;
    file.check(3 * MIB + 1, 4096).await;
    file.check(u64::MAX - 5, 4096).await;
    file.check(0, 0).await;
    let empty = cluster.open("/b", 0);
    empty.check(0, 4096).await;
    let huge = cluster.open("/c", 10 << 30);
    assert!(matches!(huge.reader.read(0, 1 << 30).await, Err(ClientError::Invalid(_))));
}
