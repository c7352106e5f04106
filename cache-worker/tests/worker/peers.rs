//! A new owner fills from the old one.

use std::{
    fs,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use forebay_protocol::{
    handshake,
    table::{Member, MemberState},
};
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{BLOCK, Cluster, MIB, eventually, files_below, http_of};

const FILES: u64 = 24;
const SIZE: u64 = 2 * MIB + 5;
const TOTAL: u64 = FILES * SIZE;

/// So many workers, of which those in `serving` run, are in the table, and hold all files.
async fn filled(workers: usize, serving: &[usize]) -> Cluster {
    let mut cluster = Cluster::start(workers).await;
    for index in (0..workers).filter(|index| !serving.contains(index)) {
        cluster.workers[index].stop().await;
    }
    cluster.publish(serving.to_vec());
    cluster.ready().await;
    put(&cluster, "f").await;
    check(&cluster, "f").await;
    held(&cluster, TOTAL).await;
    cluster
}

async fn put(cluster: &Cluster, prefix: &str) {
    for i in 0..FILES {
        cluster.put(&format!("{prefix}{i}"), i, SIZE).await;
    }
    cluster.refresh("/").await;
}

async fn check(cluster: &Cluster, prefix: &str) {
    for i in 0..FILES {
        cluster.check(&format!("/{prefix}{i}"), i, SIZE).await;
    }
}

/// Has the table say that a worker drains; the others serve.
async fn drain(cluster: &Cluster, draining: usize) {
    let member = |index| match cluster.member(index) {
        member if index == draining => Member { state: MemberState::Draining, ..member },
        member => member,
    };
    cluster.publish_members((0..cluster.workers.len()).map(member).collect());
    cluster.ready().await;
}

/// Waits until so many bytes are on disk: readers have them earlier.
async fn held(cluster: &Cluster, bytes: u64) {
    eventually("blocks on disk", || async { cluster.sum(|status| status.cached_bytes).await >= bytes }).await;
}

/// A counter of the dataset at one worker.
async fn counter(cluster: &Cluster, worker: usize, name: &str) -> u64 {
    let text = http_of(&cluster.workers[worker], "/metrics").await;
    let name = format!("forebay_worker_{name}_total{{");
    text.lines().find(|line| line.starts_with(&name)).unwrap().rsplit(' ').next().unwrap().parse().unwrap()
}

/// Answers of "not held": how often others asked this worker in vain.
async fn refusals(cluster: &Cluster, worker: usize) -> u64 {
    let text = http_of(&cluster.workers[worker], "/metrics").await;
    let line = text.lines().find(|line| line.starts_with("forebay_worker_read_failures_total{code=\"NotHeld\"}"));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_come_and_go_and_the_source_is_not_asked() {
    let mut cluster = filled(3, &[0, 1]).await;
    let before = cluster.store.counters().gets;
    cluster.publish(vec![0, 1, 2]);
    cluster.restart(2).await;
    check(&cluster, "f").await;
    held(&cluster, TOTAL + BLOCK).await;
    assert_eq!(cluster.store.counters().gets, before, "the source was asked");
    let moved = counter(&cluster, 2, "peer_bytes").await;
    assert!(moved > 0);
    eventually("what moved on disk", || async { cluster.status(2).await.cached_bytes == moved }).await;
    // Now it holds them itself.
    check(&cluster, "f").await;
    assert_eq!(counter(&cluster, 2, "peer_bytes").await, moved);

    // What only three workers have read: the third one's share moves back when it drains.
    put(&cluster, "g").await;
    check(&cluster, "g").await;
    held(&cluster, 2 * TOTAL + moved).await;
    let newest = cluster.status(2).await.cached_bytes - moved;
    assert!(newest > 0);
    let before = cluster.store.counters().gets;
    drain(&cluster, 2).await;
    for prefix in ["f", "g"] {
        check(&cluster, prefix).await;
    }
    assert_eq!(counter(&cluster, 0, "peer_bytes").await + counter(&cluster, 1, "peer_bytes").await, newest);
    cluster.publish(vec![0, 1]);
    cluster.workers[2].stop().await;
    cluster.ready().await;
    for prefix in ["f", "g"] {
        check(&cluster, prefix).await;
    }
    assert_eq!(cluster.store.counters().gets, before, "the source was asked");
    for index in [0, 1] {
        assert_eq!(counter(&cluster, index, "peer_errors").await, 0);
    }
}

/// Clients know a table with a new owner before that knows it itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_does_not_know_it_yet_asks_the_others() {
    let mut cluster = filled(3, &[0, 1]).await;
    // It was here before there were files.
    fs::remove_dir_all(&cluster.workers[2].options.cache_dir).unwrap();
    cluster.workers[2].start().await;
    let before = cluster.store.counters().gets;
    cluster.tell_clients(vec![0, 1, 2]);
    eventually("the directory at its new owner", || async { cluster.version("/f0").await.is_ok() }).await;
    eventually("the dataset at the third worker", || async {
        cluster.status_of(2, cluster.id).await.is_ok_and(|status| !status.datasets.is_empty())
    })
    .await;
    check(&cluster, "f").await;
    assert!(counter(&cluster, 2, "peer_bytes").await > 0);
    assert_eq!(cluster.store.counters().gets, before, "the source was asked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_asked_when_nothing_changed() {
    let mut cluster = filled(2, &[0, 1]).await;
    let asked = refusals(&cluster, 0).await + refusals(&cluster, 1).await;
    assert!(asked > 0, "they began with nothing, so they asked each other");
    // They start with what they hold, and with the table that they know.
    for index in [0, 1] {
        cluster.workers[index].stop().await;
        cluster.restart(index).await;
    }
    put(&cluster, "g").await;
    check(&cluster, "g").await;
    assert_eq!(cluster.store.bytes_of("g0"), SIZE);
    for index in [0, 1] {
        assert_eq!(refusals(&cluster, index).await, 0);
        assert_eq!(counter(&cluster, index, "peer_errors").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_version_of_a_peer_is_not_taken() {
    let cluster = filled(2, &[0, 1]).await;
    for i in 0..FILES {
        cluster.put(&format!("f{i}"), 1000 + i, SIZE).await;
    }
    cluster.refresh("/").await;
    drain(&cluster, 1).await;
    for i in 0..FILES {
        cluster.check(&format!("/f{i}"), 1000 + i, SIZE).await;
    }
    assert_eq!(counter(&cluster, 0, "peer_bytes").await, 0);
    assert!(refusals(&cluster, 1).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_old_owner_holds_in_part_is_taken() {
    let cluster = Cluster::start(2).await;
    cluster.put_virtual("big", 1, 64 * MIB);
    cluster.refresh("/").await;
    cluster.read("/big", 0, 3 * MIB).await.unwrap();
    held(&cluster, 3 * MIB).await;
    let owner = usize::from(cluster.status(0).await.cached_bytes == 0);
    drain(&cluster, owner).await;
    cluster.check("/big", 1, 64 * MIB).await;
    assert_eq!(cluster.store.bytes_of("big"), 64 * MIB, "each byte once");
    assert_eq!(counter(&cluster, 1 - owner, "peer_bytes").await, 3 * MIB);
}

/// A member that accepts connections, with `greet` also as a worker of the runtime, and then says nothing.
async fn silent(cluster: &Cluster, greet: bool) -> Member {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let key = cluster.key.clone();
    tokio::spawn(async move {
        let mut open = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let key = key.clone();
            open.spawn(async move {
                if greet {
                    let _ = handshake::accept(&mut stream, &key).await;
                }
                std::future::pending::<()>().await;
                drop(stream);
            });
        }
    });
    // Clients ask it last.
    Member { name: "silent".into(), address, weight: 1000, state: MemberState::Draining }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_hangs_costs_its_deadline() {
    for greet in [false, true] {
        let cluster = Cluster::start(1).await;
        put(&cluster, "f").await;
        let silent = silent(&cluster, greet).await;
        cluster.publish_members(vec![cluster.member(0), silent]);
        cluster.ready().await;
        let start = Instant::now();
        cluster.check("/f0", 0, SIZE).await;
        let first = start.elapsed();
        let deadline = if greet { Duration::from_secs(1) } else { Duration::from_millis(500) };
        assert!(first >= deadline, "it was not asked: {first:?}");
        assert!(first < deadline + Duration::from_secs(2), "{first:?}");
        assert_eq!(counter(&cluster, 0, "peer_errors").await, 1);
        check(&cluster, "f").await;
        let all = start.elapsed();
        // It is left alone for 1 s, then for 4 s, then for 10 s.
        let asked = 2 + all.as_secs() / 5;
        assert!(counter(&cluster, 0, "peer_errors").await <= asked, "asked again and again within {all:?}");
        assert_eq!(cluster.store.counters().bytes_out, TOTAL);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_of_a_peer_are_not_taken() {
    let cluster = filled(2, &[0, 1]).await;
    let before = cluster.store.counters();
    // The process that wrote them believes that they are right.
    let mut damaged = 0;
    for file in files_below(&cluster.workers[1].options.cache_dir.join("chunks")) {
        if fs::metadata(&file).unwrap().len() >= SIZE && !file.to_string_lossy().contains("redb") {
            let file = fs::OpenOptions::new().read(true).write(true).open(&file).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 9 * BLOCK + 5).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 9 * BLOCK + 5).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0);
    let moving = cluster.status(1).await.cached_bytes;
    drain(&cluster, 1).await;
    check(&cluster, "f").await;
    assert!(counter(&cluster, 0, "peer_corrupt_blocks").await > 0);
    let (peer, source) =
        (counter(&cluster, 0, "peer_bytes").await, cluster.store.counters().bytes_out - before.bytes_out);
    assert!(peer >= 9 * BLOCK, "what came before the bad block was right");
    assert_eq!(peer + source, moving);
}
