//! Workers that send something else than was asked for.

use std::time::Duration;

use forebay_client::ClientError;

use crate::support::{Cluster, MIB, Reply, eventually};

#[tokio::test]
async fn a_lying_worker_is_found_out() {
    for reply in [Reply::Flip, Reply::Swap, Reply::Shift, Reply::Short] {
        for (size, offset, len) in [(40 * MIB, 123, 3 << 20), (40 * MIB, 39 * MIB, 1 << 20), (700_001, 5, 700_000)] {
            let cluster = Cluster::start(3).await;
            let file = cluster.open("/a", size);
            let order = cluster.order(&file);
            cluster.workers[order[0]].always(reply.clone());
            file.check(offset, len).await;
            let metrics = cluster.client.metrics();
            assert_eq!(metrics.checksum_failures, 1, "{reply:?} {size}");
            assert_eq!(metrics.members[order[0]].checksum_failures, 1, "{reply:?} {size}");
            assert_eq!(metrics.members[order[0]].failovers, 1, "{reply:?} {size}");
            assert_eq!(metrics.members[order[1]].checksum_failures, 0, "{reply:?} {size}");
            // It lives, and is asked for other things.
            assert!(metrics.members[order[0]].up);
        }
    }
}

#[tokio::test]
async fn blocks_before_the_bad_one_are_kept() {
    let cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 40 * MIB);
    let order = cluster.order(&file);
    cluster.workers[order[0]].always(Reply::Flip);
    file.check(0, 4 << 20).await;
    let asked = cluster.workers[order[1]].requests();
    assert_eq!((asked[0].range.first, asked[0].range.count), (63, 1));
}

#[tokio::test]
async fn what_was_not_asked_for_is_not_taken() {
    for reply in [Reply::Twice, Reply::TooMuch] {
        for (size, len) in [(40 * MIB, 3 << 20), (700_001, 700_000)] {
            let cluster = Cluster::start(2).await;
            let file = cluster.open("/a", size);
            cluster.workers[cluster.order(&file)[0]].always(reply.clone());
            file.check(5, len).await;
            drop(file);
            eventually("all memory came back", || cluster.client.metrics().budget_used == 0).await;
        }
    }
}

#[tokio::test]
async fn nobody_honest_means_no_bytes() {
    let cluster = Cluster::with(2, |config| config.deadline = Duration::from_secs(1)).await;
    cluster.all(Reply::Flip);
    for size in [4 * MIB, 1000] {
        let file = cluster.open("/a", size);
        let error = file.reader.read(0, 1000).await.unwrap_err();
        let ClientError::Unavailable(text) = &error else { panic!("{error}") };
        assert!(text.contains("checksum"), "{text}");
    }
}

#[tokio::test]
async fn a_worker_that_lies_now_and_then_does_no_harm() {
    let cluster = Cluster::start(3).await;
    for (i, worker) in cluster.workers.iter().enumerate() {
        worker.script(move |read| match (read.range.first as usize / 7 + i) % 5 {
            0 => Reply::Flip,
            1 => Reply::Swap,
            _ => Reply::Serve,
        });
    }
    let file = cluster.open("/a", 150 * MIB);
    for i in 0..150 {
        file.check(i * MIB, 1 << 20).await;
    }
    assert!(cluster.client.metrics().checksum_failures > 0);
}
