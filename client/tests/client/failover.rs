//! Workers that are dead, stopped, broken or unwilling.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_client::ClientError;
use forebay_protocol::{frame::FailureCode, handshake::RuntimeKey};

use crate::support::{Cluster, FakeWorker, MIB, Reply, eventually, table_of};

#[tokio::test]
async fn a_dead_worker_is_avoided_at_once() {
    let mut cluster = Cluster::start(3).await;
    let file = cluster.open("/a", 8 * MIB);
    let owner = cluster.order(&file)[0];
    cluster.workers[owner].stop();
    file.check(0, 1 << 20).await;
    file.check(5 * MIB, 1 << 20).await;
    let metrics = cluster.client.metrics();
    assert!(metrics.failovers >= 1 && metrics.retries == 0, "the next one was asked without a pause: {metrics:?}");
    assert!(!metrics.members[owner].up);
    assert!(metrics.members[owner].last_error.contains("connect"), "{}", metrics.members[owner].last_error);

    cluster.workers[owner].restart().await;
    eventually("the worker is used again", || cluster.client.metrics().members[owner].up).await;
    file.check(3 * MIB, 1 << 20).await;
    assert_eq!(cluster.workers[owner].requests().len(), 1);
}

#[tokio::test]
async fn a_worker_killed_in_mid_read_loses_nothing() {
    let cluster = Cluster::start(3).await;
    let file = cluster.open("/a", 40 * MIB);
    let order = cluster.order(&file);
    cluster.workers[order[0]].always(Reply::CloseMidFrame);
    file.check(0, 4 << 20).await;
    assert_eq!(cluster.workers[order[1]].requests().len(), 1);
    // After the handshake of a probe it is asked again, breaks again, and the read still succeeds.
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(120)).await;
        file.check(20 * MIB, 1 << 20).await;
    }
    let metrics = cluster.client.metrics();
    assert!(metrics.members[order[0]].failovers >= 1);
    assert_eq!(metrics.checksum_failures, 0);
}

#[tokio::test]
async fn a_stopped_worker_is_noticed_by_its_silence() {
    let cluster = Cluster::start(3).await;
    let file = cluster.open("/a", 40 * MIB);
    let owner = cluster.order(&file)[0];
    file.check(0, 1 << 20).await;
    cluster.workers[owner].freeze(true);
    let start = Instant::now();
    // Readers that are under way wait out the silence together; those that come later do not.
    let reads = (1..9).map(|i| file.check(i * 4 * MIB, 1 << 20));
    futures::future::join_all(reads).await;
    assert!(start.elapsed() >= Duration::from_millis(1900), "{:?}", start.elapsed());
    let noticed = cluster.client.metrics().members[owner].clone();
    assert!(noticed.last_error.contains("silent for 2s"), "{}", noticed.last_error);
    file.check(38 * MIB, 1 << 20).await;
    let later = cluster.client.metrics().members[owner].clone();
    assert_eq!((later.up, later.requests), (false, noticed.requests));

    cluster.workers[owner].freeze(false);
    eventually("the worker is used again", || cluster.client.metrics().members[owner].up).await;
    file.check(7 * MIB, 1 << 20).await;
}

#[tokio::test]
async fn a_slow_source_is_not_a_dead_worker() {
    let cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 40 * MIB);
    cluster.all(Reply::Delay(Duration::from_millis(2800)));
    file.check(0, 1 << 20).await;
    let metrics = cluster.client.metrics();
    assert_eq!((metrics.failovers, metrics.retries), (0, 0));
}

#[tokio::test]
async fn garbage_breaks_only_its_connection() {
    for reply in [Reply::Garbage, Reply::Stranger] {
        let cluster = Cluster::start(2).await;
        let file = cluster.open("/a", 2 * MIB);
        let order = cluster.order(&file);
        cluster.workers[order[0]].always(reply.clone());
        file.check(0, 2 << 20).await;
        let metrics = cluster.client.metrics();
        assert_eq!(metrics.members[order[0]].failovers, 1, "{reply:?}");
        assert_eq!(metrics.members[order[0]].downs, 1, "{reply:?}");
        assert_eq!(metrics.members[order[1]].requests, 1, "{reply:?}");
    }
}

#[tokio::test]
async fn a_worker_of_another_runtime_is_refused() {
    let mut cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 2 * MIB);
    let owner = cluster.order(&file)[0];
    let stranger = FakeWorker::start(RuntimeKey::generate()).await;
    cluster.workers[owner] = stranger;
    cluster.table.send_replace(Arc::new(table_of(2, &cluster.workers)));
    file.check(0, 1 << 20).await;
    assert!(cluster.client.metrics().members[owner].last_error.contains("key"));
    assert_eq!(cluster.workers[owner].requests().len(), 0);
}

#[tokio::test]
async fn codes_that_another_worker_may_answer_go_on() {
    use FailureCode::{Busy, Internal, NotHeld, Stopping, UnknownDataset};
    for code in [Busy, UnknownDataset, Stopping, Internal, NotHeld] {
        let cluster = Cluster::start(3).await;
        let file = cluster.open("/a", 40 * MIB);
        let order = cluster.order(&file);
        cluster.workers[order[0]].always(Reply::Fail(code));
        cluster.workers[order[1]].always(Reply::Fail(code));
        file.check(10, 1 << 20).await;
        assert_eq!(cluster.client.metrics().failovers, 2, "{code}");
        // The worker lives: nobody avoids it.
        assert!(cluster.client.metrics().members[order[0]].up, "{code}");
    }
}

#[tokio::test]
async fn everybody_busy_is_a_pause() {
    let cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 40 * MIB);
    cluster.all(Reply::Fail(FailureCode::Busy));
    let relax = async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        cluster.all(Reply::Serve);
    };
    tokio::join!(file.check(0, 1 << 20), relax);
    assert!(cluster.client.metrics().retries >= 2);
    assert!(cluster.requests() < 20, "not a storm: {}", cluster.requests());
}

#[tokio::test]
async fn final_codes_end_the_read() {
    let expected = [
        (FailureCode::VersionGone, 1, "version"),
        (FailureCode::PermissionDenied, 1, "permission denied"),
        (FailureCode::BadRequest, 1, "invalid"),
        (FailureCode::SourceUnavailable, 2, "unavailable"),
    ];
    for (code, requests, text) in expected {
        for size in [40 * MIB, 1000] {
            let cluster = Cluster::start(3).await;
            let file = cluster.open("/a", size);
            cluster.all(Reply::Fail(code));
            let error = file.reader.read(0, 4096).await.unwrap_err();
            assert!(error.to_string().contains(text), "{code}: {error}");
            assert_eq!((cluster.requests(), cluster.client.metrics().retries), (requests, 0), "{code}");
        }
    }
}

#[tokio::test]
async fn the_deadline_ends_a_read_when_all_are_gone_and_reads_recover() {
    let mut cluster = Cluster::with(3, |config| config.deadline = Duration::from_millis(1500)).await;
    let large = cluster.open("/a", 40 * MIB);
    let small = cluster.open("/b", 1000);
    large.check(0, 1 << 20).await;
    for worker in &mut cluster.workers {
        worker.stop();
    }
    let start = Instant::now();
    let (a, b) = tokio::join!(large.reader.read(MIB, 4096), small.reader.read(0, 1000));
    let took = start.elapsed();
    for error in [a.unwrap_err(), b.unwrap_err()] {
        let ClientError::Unavailable(text) = &error else { panic!("{error}") };
        assert!(text.contains("1.5s") && text.contains("worker worker-"), "{text}");
    }
    // By the text it was the deadline that ended them; it did so not much later.
    assert!(took >= Duration::from_millis(1400) && took < Duration::from_secs(8), "{took:?}");

    for worker in &mut cluster.workers {
        worker.restart().await;
    }
    large.check(2 * MIB, 1 << 20).await;
    small.check(0, 1000).await;
}

#[tokio::test]
async fn an_empty_table_is_waited_for() {
    let cluster = Cluster::with(1, |config| config.deadline = Duration::from_secs(3)).await;
    let full = cluster.client.members();
    cluster.table.send_replace(Arc::new(table_of(2, &[])));
    let file = cluster.open("/a", 4 * MIB);
    let arrives = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut table = (*full).clone();
        table.epoch = 3;
        cluster.table.send_replace(Arc::new(table));
    };
    tokio::join!(file.check(0, 1 << 20), arrives);
}

#[tokio::test]
async fn connections_to_a_member_that_left_are_closed() {
    let mut cluster = Cluster::start(2).await;
    let file = cluster.open("/a", 40 * MIB);
    let owner = cluster.order(&file)[0];
    file.check(0, 1 << 20).await;
    assert_eq!(cluster.workers[owner].connections(), 1);
    cluster.workers[owner].always(Reply::Stall);
    let leaves = async {
        eventually("the read is under way", || cluster.workers[owner].requests().len() == 2).await;
        let mut table = (*cluster.client.members()).clone();
        table.epoch += 1;
        table.members.remove(owner);
        cluster.table.send_replace(Arc::new(table));
    };
    tokio::join!(file.check(8 * MIB, 1 << 20), leaves);
    eventually("its connections are closed", || cluster.workers[owner].connections() == 0).await;
    assert_eq!(cluster.client.metrics().members.len(), 1);
    assert_eq!(cluster.client.members().epoch, 2);
    cluster.client.note_epoch(9);
    assert_eq!(*cluster.client.epochs().borrow(), 9);
    assert_eq!(cluster.client.metrics().highest_epoch, 9);
    cluster.workers[owner].stop();
}
