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
            // Told to verify, it lies again, and is not asked a third time.
            assert_eq!(metrics.checksum_failures, 2, "{reply:?} {size}");
            assert_eq!(metrics.members[order[0]].checksum_failures, 2, "{reply:?} {size}");
            let marks: Vec<_> = cluster.workers[order[0]].requests().iter().map(|read| read.verify).collect();
            assert_eq!(marks, [false, true], "{reply:?} {size}");
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
    for (worker, verify) in [(order[0], true), (order[1], false)] {
        let last = cluster.workers[worker].requests().pop().unwrap();
        assert_eq!((last.range.first, last.range.count, last.verify), (63, 1, verify));
    }
}

#[tokio::test]
async fn a_worker_that_finds_its_damage_when_told_serves_on() {
    for (size, offset, len) in [(40 * MIB, 123, 3 << 20), (700_001, 5, 700_000)] {
        // No other one could help.
        let cluster = Cluster::start(1).await;
        cluster.workers[0].script(|read| if read.verify { Reply::Serve } else { Reply::Flip });
        let file = cluster.open("/a", size);
        file.check(offset, len).await;
        let asked = cluster.workers[0].requests();
        assert_eq!(asked.len(), 2, "{size}");
        assert_eq!((asked[1].verify, asked[1].range.count, asked[1].purpose), (true, 1, asked[0].purpose), "{size}");
        let metrics = cluster.client.metrics();
        assert_eq!((metrics.checksum_failures, metrics.failovers, metrics.retries), (1, 0, 0), "{size}");
        // The next read does not know of it.
        cluster.all(Reply::Serve);
        file.check(0, 1000).await;
        assert!(cluster.workers[0].requests().iter().skip(2).all(|read| !read.verify));
    }
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
    // Each was believed once per read; after that it was to verify, with a pause after every round.
    for worker in &cluster.workers {
        let asked = worker.requests();
        assert!(asked.iter().filter(|read| !read.verify).count() <= 2);
        assert!(asked.len() < 40, "not a storm: {}", asked.len());
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
