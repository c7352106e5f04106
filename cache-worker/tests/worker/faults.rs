//! A store that fails: right bytes, or an error that says what to do; never wrong bytes, never a hang.

use std::time::{Duration, Instant};

use forebay_client::ClientError;
use forebay_test_store::{Action, Fault, Verb};

use crate::harness::{Cluster, MIB, contents, eventually, read_at};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passing_faults_are_not_seen() {
    let cluster = Cluster::start(2).await;
    let actions = [
        Action::Status(500),
        Action::Status(503),
        Action::Truncate { after: 300_000 },
        Action::StallBody { after: 100_000, stall: Duration::from_secs(6) },
        Action::Reset { after: Some(70_000) },
        Action::Reset { after: None },
    ];
    for (i, action) in actions.into_iter().enumerate() {
        let key = format!("file-{i}");
        cluster.put(&key, i as u64, 3 * MIB).await;
        cluster.refresh("/").await;
        let fault = cluster.store.faults().add(Fault::new(action).on(Verb::Get).key(&key).times(1));
        cluster.check(&format!("/{key}"), i as u64, 3 * MIB).await;
        assert_eq!(cluster.store.faults().hits(fault), 1, "the fault was not met");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_store_is_an_error_in_time_and_then_forgotten() {
    let short = |options: &mut forebay_cache_worker::WorkerOptions| options.limits.deadline = Duration::from_secs(2);
    let cluster = Cluster::start_with(1, short, |_| {}).await;
    cluster.put("a", 1, MIB).await;
    cluster.refresh("/").await;
    let version = cluster.version("/a").await.unwrap();
    let fault = cluster.store.faults().add(Fault::new(Action::Status(503)).on(Verb::Get));
    let start = Instant::now();
    let got = read_at(&cluster.names(), "/a", version.clone(), 0, MIB).await;
    assert!(matches!(got, Err(ClientError::Unavailable(_))), "{:?}", got.map(|bytes| bytes.len()));
    assert!(start.elapsed() < Duration::from_secs(25), "{:?}", start.elapsed());
    assert!(!cluster.status(0).await.source_problem.is_empty());
    cluster.store.faults().remove(fault);
    assert!(read_at(&cluster.names(), "/a", version, 0, MIB).await.unwrap() == contents(1, MIB));
    assert_eq!(cluster.status(0).await.source_problem, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_credentials_are_said() {
    let cluster = Cluster::start(1).await;
    cluster.put("a", 1, MIB).await;
    cluster.refresh("/").await;
    let version = cluster.version("/a").await.unwrap();
    cluster.store.faults().add(Fault::new(Action::Status(403)).on(Verb::Get));
    let got = read_at(&cluster.names(), "/a", version, 0, MIB).await;
    assert!(matches!(got, Err(ClientError::PermissionDenied(_))), "{:?}", got.map(|bytes| bytes.len()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_during_a_read_is_gone_then_new() {
    let cluster = Cluster::start(3).await;
    cluster.put("dir/f", 1, 8 * MIB).await;
    cluster.refresh("/").await;
    let old = cluster.version("/dir/f").await.unwrap();
    let head = read_at(&cluster.names(), "/dir/f", old.clone(), 0, MIB).await.unwrap();
    assert!(head == contents(1, 8 * MIB)[..MIB as usize]);
    cluster.put("dir/f", 2, 9 * MIB).await;
    // What is held of the old version can still be read; the rest is gone, and never comes from the new one.
    let got = read_at(&cluster.names(), "/dir/f", old.clone(), 4 * MIB, MIB).await;
    assert_eq!(got.map(|bytes| bytes.len()), Err(ClientError::VersionGone));
    let held = read_at(&cluster.names(), "/dir/f", old.clone(), 0, MIB).await.unwrap();
    assert!(held == head);
    // The failed read has told the metadata, without any refresh.
    let new = cluster.version("/dir/f").await.unwrap();
    assert_ne!(new.key, old.key);
    cluster.check("/dir/f", 2, 9 * MIB).await;
    assert!(cluster.sum(|status| status.version_conflicts).await >= 1);

    cluster.store.delete(crate::harness::BUCKET, "dir/f").await;
    cluster.put("dir/other", 3, 1).await;
    // The source is asked about one file once per second at most, so the second failed read may be the one that tells.
    eventually("lookup that knows", || async {
        let got = read_at(&cluster.names(), "/dir/f", old.clone(), 6 * MIB, MIB).await;
        assert_eq!(got.map(|bytes| bytes.len()), Err(ClientError::VersionGone));
        cluster.version("/dir/f").await == Err(ClientError::NotFound)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_while_64_readers_wait_mixes_nothing() {
    let cluster = Cluster::start(2).await;
    let size = 16 * MIB;
    cluster.put("f", 1, size).await;
    cluster.refresh("/").await;
    let old = cluster.version("/f").await.unwrap();
    cluster.store.set_latency(Duration::from_millis(50));
    let names = cluster.names();
    let reads = (0..64u64).map(|i| {
        let (names, old) = (names.clone(), old.clone());
        async move {
            let offset = i % 16 * MIB;
            (offset, read_at(&names, "/f", old, offset, MIB).await)
        }
    });
    let change = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        cluster.put("f", 2, size).await;
    };
    let (results, ()) = tokio::join!(futures::future::join_all(reads), change);
    let expected = contents(1, size);
    for (offset, result) in results {
        match result {
            Ok(got) => assert!(got == expected[offset as usize..(offset + MIB) as usize], "mixed bytes at {offset}"),
            Err(error) => assert_eq!(error, ClientError::VersionGone),
        }
    }
    // All may have been read before the change; then nobody has noticed yet.
    cluster.refresh("/").await;
    cluster.check("/f", 2, size).await;
}
