//! Sources that are wrong, are mended, come and go.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use forebay_cache_worker::{SourceConfig, SourceProblem};
use forebay_client::{ClientError, Event};
use forebay_protocol::worker::ScanState;
use forebay_test_store::{Action, Fault};
use forebay_under_store::{S3Credentials, S3Options, SourceSpec};
use futures::StreamExt;

use crate::harness::{Cluster, MIB, at, eventually, path, read_at, source};

/// Waits until every worker gives this reason, and says how long that took.
async fn told(cluster: &Cluster, reason: &str) -> Duration {
    let start = Instant::now();
    loop {
        let mut all = true;
        for index in 0..cluster.workers.len() {
            let status = cluster.status(index).await;
            all &= status.source_problem_reason == reason && status.source_problem.is_empty() == reason.is_empty();
        }
        if all {
            return start.elapsed();
        }
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "not '{reason}': {}",
            cluster.status(0).await.source_problem
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn scanned(cluster: &Cluster, files: u64) {
    eventually("a complete scan", || async {
        let mut found = None;
        for index in 0..cluster.workers.len() {
            let scan = cluster.status(index).await.scan;
            found = found.or(scan.filter(|scan| scan.state() == ScanState::Complete).map(|scan| scan.files));
        }
        found == Some(files)
    })
    .await;
}

/// Workers take up other sources within half a second of each other: waits until the owners of these files' directories
/// have.
async fn shown(cluster: &Cluster, files: &[&str]) {
    for file in files {
        eventually("its source at the directory's owner", || async { cluster.version(file).await.is_ok() }).await;
    }
}

/// On a machine that does nothing else it is a second; the file is looked at twice per second.
const SOON: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_without_readers_and_passes_when_it_is_mended() {
    let cluster = Cluster::start(2).await;
    cluster.put("f", 1, MIB).await;
    // The scan that begins with the workers may have listed the directory before.
    cluster.refresh("/").await;
    let good = source(&cluster.store, "");
    let elsewhere = |endpoint: &str| SourceSpec {
        s3: good.s3.clone().map(|s3| S3Options { endpoint: Some(endpoint.to_owned()), ..s3 }),
        ..good.clone()
    };
    let wrong_key = SourceSpec {
        credentials: good.credentials.clone().map(|keys| S3Credentials { secret_access_key: "no".into(), ..keys }),
        ..good.clone()
    };
    let no_secret = SourceConfig {
        problem: Some(SourceProblem {
            reason: "SecretNotFound".into(),
            message: "Secret 'keys' does not exist".into(),
        }),
        ..at("/", SourceSpec { credentials: None, ..good.clone() })
    };
    let cases = [
        (at("/", wrong_key), "CredentialsInvalid"),
        (at("/", SourceSpec { uri: "s3://missing/".into(), ..good.clone() }), "BucketNotFound"),
        (at("/", elsewhere("http://127.0.0.1:1")), "SourceUnreachable"),
        (at("/", elsewhere("http://nowhere.invalid")), "SourceUnreachable"),
        (at("/", elsewhere("no URL")), "SourceInvalid"),
        (no_secret, "SecretNotFound"),
    ];
    for (wrong, reason) in cases {
        cluster.configure(&[cluster.with_sources(vec![wrong])]);
        let took = told(&cluster, reason).await;
        assert!(took < SOON, "{reason} after {took:?}");
        cluster.configure(&[cluster.with_sources(vec![at("/", good.clone())])]);
        let took = told(&cluster, "").await;
        assert!(took < SOON, "{reason} was forgotten after {took:?}");
        // What waited for the wrong one is answered by the right one.
        cluster.check("/f", 1, MIB).await;
        scanned(&cluster, 1).await;
    }

    // Mended at the source: nobody tells the workers.
    cluster.configure(&[cluster.with_sources(vec![at("/", SourceSpec { uri: "s3://later/".into(), ..good.clone() })])]);
    told(&cluster, "BucketNotFound").await;
    cluster.store.create_bucket("later").await;
    let took = told(&cluster, "").await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    for (action, reason) in [(403, "CredentialsInvalid"), (503, "SourceUnreachable")] {
        let fault = cluster.store.faults().add(Fault::new(Action::Status(action)));
        cluster.configure(&[cluster.with_sources(vec![at("/", source(&cluster.store, &format!("{action}/")))])]);
        told(&cluster, reason).await;
        // It stays for as long as it is so.
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert!(told(&cluster, reason).await < Duration::from_secs(1));
        cluster.store.faults().remove(fault);
        let took = told(&cluster, "").await;
        assert!(took < Duration::from_millis(5_500), "{reason} passed after {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_after_a_restart_though_everything_is_listed() {
    let mut cluster = Cluster::start(1).await;
    cluster.put("f", 1, MIB).await;
    cluster.refresh("/").await;
    cluster.check("/f", 1, MIB).await;
    cluster.store.faults().add(Fault::new(Action::Status(403)));
    cluster.workers[0].stop().await;
    cluster.restart(0).await;
    let took = told(&cluster, "CredentialsInvalid").await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    // What is held is served all the same.
    cluster.check("/f", 1, MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_cannot_be_used_leaves_the_others() {
    let cluster = Cluster::start(2).await;
    cluster.put("good/f", 1, MIB).await;
    cluster.put("bad/f", 2, MIB).await;
    let message = "Secret 'keys' has no key 'accessKeyId'";
    let bad = SourceConfig {
        problem: Some(SourceProblem { reason: "SecretInvalid".into(), message: message.into() }),
        ..at("/bad", source(&cluster.store, "bad/"))
    };
    let good = at("/good", source(&cluster.store, "good/"));
    cluster.configure(&[cluster.with_sources(vec![good.clone(), bad])]);
    told(&cluster, "SecretInvalid").await;
    assert_eq!(cluster.status(1).await.source_problem, format!("source /bad: {message}"));
    cluster.check("/good/f", 1, MIB).await;
    let names: Vec<_> = cluster.names().list(&path("/"), b"", 10).await.unwrap().entries;
    assert_eq!(names.iter().map(|entry| &entry.name[..]).collect::<Vec<_>>(), [b"bad", &b"good"[..]]);
    let asked = cluster.names();
    let refused = tokio::time::timeout(Duration::from_secs(40), asked.list(&path("/bad"), b"", 10)).await.unwrap();
    assert!(matches!(&refused, Err(ClientError::Unavailable(why)) if why.contains(message)), "{refused:?}");

    cluster.configure(&[cluster.with_sources(vec![good, at("/bad", source(&cluster.store, "bad/"))])]);
    assert!(told(&cluster, "").await < SOON);
    cluster.check("/bad/f", 2, MIB).await;
    scanned(&cluster, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_come_and_go_under_readers_of_the_others() {
    let cluster = Arc::new(Cluster::start(2).await);
    for i in 0..8 {
        cluster.put(&format!("main/d{}/f{i}", i % 2), i, MIB).await;
        cluster.put(&format!("labels/l{i}"), 100 + i, 10_000).await;
    }
    let main = at("/", source(&cluster.store, "main/"));
    cluster.configure(&[cluster.with_sources(vec![main.clone()])]);
    scanned(&cluster, 8).await;
    shown(&cluster, &["/d0/f0", "/d1/f1"]).await;
    for i in 0..8 {
        cluster.check(&format!("/d{}/f{i}", i % 2), i, MIB).await;
    }
    let mut watch = Box::pin(cluster.names().watch());
    tokio::time::sleep(Duration::from_millis(500)).await;
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_millis(100), watch.next()).await {}

    let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let readers: Vec<_> = (0..8u64)
        .map(|i| {
            let (cluster, stop, reads) = (cluster.clone(), stop.clone(), reads.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    cluster.check(&format!("/d{}/f{i}", i % 2), i, MIB).await;
                    assert!(start.elapsed() < Duration::from_secs(2), "a reader waited for {:?}", start.elapsed());
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let counters = cluster.store.counters();
    for round in 0..3 {
        let before = reads.load(Ordering::Relaxed);
        assert_eq!(cluster.names().lookup(&path("/"), b"labels").await.map(drop), Err(ClientError::NotFound));
        cluster
            .configure(&[cluster.with_sources(vec![main.clone(), at("/labels", source(&cluster.store, "labels/"))])]);
        let change = async {
            loop {
                match watch.next().await.unwrap() {
                    Event::Changed { directory, names } if directory == path("/") => {
                        assert_eq!(names, ["labels"]);
                        return;
                    }
                    Event::Changed { .. } => {}
                    Event::Reset => panic!("everything was to be forgotten"),
                }
            }
        };
        tokio::time::timeout(SOON, change).await.unwrap();
        eventually("the new directory", || async { cluster.names().lookup(&path("/"), b"labels").await.is_ok() }).await;
        scanned(&cluster, 16).await;
        shown(&cluster, &["/labels/l0"]).await;
        for i in 0..8 {
            cluster.check(&format!("/labels/l{i}"), 100 + i, 10_000).await;
        }
        let version = cluster.version("/labels/l0").await.unwrap();
        cluster.configure(&[cluster.with_sources(vec![main.clone()])]);
        scanned(&cluster, 8).await;
        eventually("the directory's end", || async {
            cluster.names().lookup(&path("/"), b"labels").await.map(drop) == Err(ClientError::NotFound)
        })
        .await;
        // Held or not: nobody reads a source that is gone by a name that is.
        let _ = read_at(&cluster.names(), "/labels/l0", version, 0, 10_000).await;
        while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(300), watch.next()).await {
            assert_ne!(event, Event::Reset);
        }
        assert!(reads.load(Ordering::Relaxed) > before, "nobody read in round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }
    // What is read of the one source was neither listed nor fetched again. The root is listed again when what hid an
    // entry of it goes.
    let after = cluster.store.counters();
    for i in 0..8 {
        let key = format!("main/d{}/f{i}", i % 2);
        assert_eq!(after.bytes_of(&key), counters.bytes_of(&key), "{key}");
    }
    let status = cluster.status(0).await;
    assert!(status.store_lists >= 3 && status.source_problem.is_empty(), "{}", status.source_problem);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_that_rotate_are_not_seen_by_readers() {
    let cluster = Arc::new(Cluster::start(2).await);
    for i in 0..4 {
        cluster.put_virtual(&format!("f{i}"), i, 64 * MIB);
    }
    cluster.refresh("/").await;
    cluster.store.set_latency(Duration::from_millis(20));
    let readers: Vec<_> = (0..4)
        .map(|i| {
            let cluster = cluster.clone();
            tokio::spawn(async move { cluster.check(&format!("/f{i}"), i, 64 * MIB).await })
        })
        .collect();
    let good = source(&cluster.store, "");
    let mut rounds = 0;
    while !readers.iter().all(|reader| reader.is_finished()) {
        rounds += 1;
        // Others that are as good: the store does not look at the token.
        let token = Some(format!("token-{rounds}"));
        let credentials = good.credentials.clone().map(|keys| S3Credentials { session_token: token, ..keys });
        cluster.configure(&[cluster.with_sources(vec![at("/", SourceSpec { credentials, ..good.clone() })])]);
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    for reader in readers {
        reader.await.unwrap();
    }
    assert!(rounds >= 2, "the readers were too fast");
    assert_eq!(cluster.status(0).await.source_problem, "");
}
