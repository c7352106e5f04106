//! Names: look-ups, listings, walks and changes, with fail-over.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use forebay_client::{ClientError, EntryKind, Event, Watch};
use forebay_protocol::{identity::directory_placement_key, placement::Placement};
use futures::StreamExt;
use tonic::Code;

use crate::support::{Cluster, dataset_id, eventually, path, version};

/// Every worker knows the whole tree, as after listing it.
fn fill(cluster: &Cluster) {
    for worker in &cluster.workers {
        let names = &worker.state.names;
        names.add("/", "d", None);
        names.add("/", "a", Some(5));
        for i in 0..2500 {
            names.add("/d", &format!("f{i:04}"), Some(i));
        }
        names.add("/d", "e", None);
        names.directory("/d/e");
    }
}

fn owner(cluster: &Cluster, directory: &str) -> usize {
    let key = directory_placement_key(dataset_id(), &path(directory));
    Placement::new(&cluster.client.members()).owner(key).unwrap()
}

async fn next(watch: &mut Watch) -> Event {
    tokio::time::timeout(Duration::from_secs(10), watch.next()).await.expect("an event in time").unwrap()
}

async fn quiet(watch: &mut Watch) {
    let event = tokio::time::timeout(Duration::from_millis(400), watch.next()).await;
    assert!(event.is_err(), "{event:?}");
}

#[tokio::test]
async fn names_are_found_and_listed_in_pages() {
    let cluster = Cluster::start(3).await;
    fill(&cluster);
    let found = cluster.dataset.lookup(&path("/d"), b"f0042").await.unwrap();
    let EntryKind::File { version } = &found.kind else { panic!("{found:?}") };
    assert_eq!((version.size, version.mtime_ns, version.key.as_bytes()), (42, 5, &b"v1"[..]));
    assert_eq!(cluster.dataset.lookup(&path("/"), b"d").await.unwrap().kind, EntryKind::Directory);
    assert_eq!(cluster.dataset.lookup(&path("/d"), b"nope").await, Err(ClientError::NotFound));
    assert!(matches!(cluster.dataset.lookup(&path("/d"), b"a/b").await, Err(ClientError::Invalid(_))));
    assert_eq!(cluster.dataset.list(&path("/nope"), b"", 10).await, Err(ClientError::NotFound));

    let mut names = Vec::new();
    let mut after = bytes::Bytes::new();
    loop {
        let page = cluster.dataset.list(&path("/d"), &after, 1000).await.unwrap();
        names.extend(page.entries.iter().map(|entry| entry.name.clone()));
        if page.end {
            break;
        }
        after = page.entries.last().unwrap().sort_key();
    }
    assert_eq!(names.len(), 2501);
    assert!(names.is_sorted());
    // Only the directory's owner was asked.
    let calls: Vec<_> = cluster.workers.iter().map(|worker| worker.state.names.calls.load(Ordering::SeqCst)).collect();
    assert_eq!(calls.iter().filter(|calls| **calls >= 4).count(), 1, "{calls:?}");
}

#[tokio::test]
async fn the_generation_is_adopted_both_ways() {
    let cluster = Cluster::start(3).await;
    fill(&cluster);
    let first = owner(&cluster, "/d");
    cluster.workers[first].state.names.generation.store(7, Ordering::SeqCst);
    cluster.dataset.lookup(&path("/d"), b"e").await.unwrap();
    assert_eq!(cluster.dataset.generation(), 7);
    // Every handle of the dataset knows it, and tells it to the others.
    let again = cluster.client.dataset(dataset_id());
    assert_eq!(again.generation(), 7);
    for directory in ["/", "/d", "/d/e"] {
        again.list(&path(directory), b"", 10).await.unwrap();
        let seen = &cluster.workers[owner(&cluster, directory)].state.names.seen_generation;
        assert_eq!(seen.load(Ordering::SeqCst), 7);
    }
}

#[tokio::test]
async fn metadata_fails_over() {
    let mut cluster = Cluster::with(3, |config| config.deadline = Duration::from_secs(6)).await;
    fill(&cluster);
    let first = owner(&cluster, "/d");
    for code in [Code::Unavailable, Code::Internal, Code::ResourceExhausted] {
        *cluster.workers[first].state.names.refusal.lock() = Some(code);
        cluster.dataset.lookup(&path("/d"), b"e").await.unwrap();
    }
    *cluster.workers[first].state.names.refusal.lock() = Some(Code::PermissionDenied);
    let refused = cluster.dataset.lookup(&path("/d"), b"e").await;
    assert_eq!(refused, Err(ClientError::PermissionDenied("as scripted".into())));
    *cluster.workers[first].state.names.refusal.lock() = Some(Code::FailedPrecondition);
    assert_eq!(cluster.dataset.list(&path("/d"), b"", 9).await, Err(ClientError::NotDirectory));
    *cluster.workers[first].state.names.refusal.lock() = None;

    // Stopped: noticed by its silence, and avoided from then on.
    cluster.dataset.lookup(&path("/d"), b"e").await.unwrap();
    cluster.workers[first].freeze(true);
    let start = Instant::now();
    cluster.dataset.lookup(&path("/d"), b"e").await.unwrap();
    let took = start.elapsed();
    assert!(took > Duration::from_millis(500) && took < Duration::from_millis(3500), "{took:?}");
    let start = Instant::now();
    cluster.dataset.lookup(&path("/d"), b"e").await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert!(!cluster.client.metrics().members[first].up);

    // Nobody left, and all back.
    for worker in &mut cluster.workers {
        worker.stop();
    }
    let start = Instant::now();
    let error = cluster.dataset.lookup(&path("/d"), b"e").await.unwrap_err();
    assert!(matches!(error, ClientError::Unavailable(_)), "{error}");
    assert!(start.elapsed() < Duration::from_secs(7));
    for worker in &mut cluster.workers {
        worker.freeze(false);
        worker.restart().await;
    }
    cluster.dataset.lookup(&path("/d"), b"e").await.unwrap();
}

#[tokio::test]
async fn a_slow_listing_ends_at_the_deadline() {
    let cluster = Cluster::with(1, |config| config.deadline = Duration::from_secs(1)).await;
    fill(&cluster);
    cluster.workers[0].state.names.hangs.send_replace(true);
    let start = Instant::now();
    let error = cluster.dataset.list(&path("/d"), b"", 10).await.unwrap_err();
    assert!(matches!(error, ClientError::Unavailable(_)), "{error}");
    let took = start.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1800), "{took:?}");
}

#[tokio::test]
async fn a_walk_finds_everything_once() {
    let cluster = Cluster::start(3).await;
    let mut expected = BTreeSet::new();
    for worker in &cluster.workers {
        let names = &worker.state.names;
        for top in 0..30 {
            names.add("/", &format!("t{top}"), None);
            expected.insert(format!("/t{top}"));
            for sub in 0..20 {
                names.add(&format!("/t{top}"), &format!("s{sub}"), None);
                expected.insert(format!("/t{top}/s{sub}"));
                for file in 0..3 {
                    names.add(&format!("/t{top}/s{sub}"), &format!("f {file}\n"), Some(1));
                    expected.insert(format!("/t{top}/s{sub}/f {file}\n"));
                }
            }
        }
        // Listed in its parent, but gone meanwhile.
        names.add("/", "vanished", None);
    }
    expected.insert("/vanished".into());
    let found: Vec<_> = cluster.dataset.walk(path("/")).map(|entry| entry.unwrap().path.to_string()).collect().await;
    assert_eq!(found.len(), expected.len());
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected);
    let missing: Vec<_> = cluster.dataset.walk(path("/nope")).collect().await;
    assert_eq!(missing, [Err(ClientError::NotFound)]);
}

#[tokio::test]
async fn inspection_and_control() {
    let mut cluster = Cluster::start(2).await;
    let (file, size) = (path("/a"), version(1000));
    let inspection = cluster.dataset.inspect(&file, &size).await.unwrap();
    assert_eq!((inspection.cached_bytes, inspection.pinned), (1000, true));
    assert!(inspection.owner.starts_with("worker-"));
    cluster.workers[1].state.names.status.lock().worker = "the second".into();
    let mut control = cluster.client.control("worker-1").await.unwrap();
    let status = control.status(forebay_protocol::worker::StatusRequest::default()).await.unwrap();
    assert_eq!(status.into_inner().worker, "the second");
    assert!(matches!(cluster.client.control("nobody").await, Err(ClientError::Invalid(_))));
    cluster.workers[0].stop();
    assert!(matches!(cluster.client.control("worker-0").await, Err(ClientError::Unavailable(_)) | Ok(_)));
}

#[tokio::test]
async fn changes_are_merged_and_survive_broken_streams() {
    let mut cluster = Cluster::start(2).await;
    for (i, worker) in cluster.workers.iter().enumerate() {
        worker.state.names.incarnate(10 + i as u64);
    }
    let mut watch = cluster.dataset.watch();
    assert_eq!(next(&mut watch).await, Event::Reset, "first contact");
    eventually("both are watched", || {
        cluster.workers.iter().all(|worker| worker.state.names.watchers.load(Ordering::SeqCst) >= 1)
    })
    .await;
    // The second first contact, unless it was merged into the first.
    let _ = tokio::time::timeout(Duration::from_millis(300), watch.next()).await;

    let change = |name: &'static str| Event::Changed { directory: path("/d"), names: vec![name.into()] };
    cluster.workers[0].state.names.changed("/d", "x");
    assert_eq!(next(&mut watch).await, change("x"));
    cluster.workers[1].state.names.changed("/d", "y");
    assert_eq!(next(&mut watch).await, change("y"));

    // A broken stream loses nothing: what changed meanwhile follows, and no Reset.
    cluster.workers[0].state.names.cut();
    cluster.workers[0].state.names.changed("/d", "z");
    assert_eq!(next(&mut watch).await, change("z"));
    cluster.workers[1].stop();
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.workers[1].state.names.changed("/d", "w");
    cluster.workers[1].restart().await;
    assert_eq!(next(&mut watch).await, change("w"));
    quiet(&mut watch).await;

    // Numbers that are lost are a Reset, and so is a new incarnation.
    cluster.workers[0].stop();
    cluster.workers[0].state.names.changed("/d", "lost");
    cluster.workers[0].state.names.forget();
    cluster.workers[0].restart().await;
    assert_eq!(next(&mut watch).await, Event::Reset);
    cluster.workers[1].state.names.incarnate(99);
    assert_eq!(next(&mut watch).await, Event::Reset);
    quiet(&mut watch).await;
}

#[tokio::test]
async fn a_change_of_owners_is_a_reset() {
    let cluster = Cluster::start(2).await;
    let mut watch = cluster.dataset.watch();
    while tokio::time::timeout(Duration::from_millis(500), watch.next()).await.is_ok() {}
    let mut table = (*cluster.client.members()).clone();
    table.epoch += 1;
    cluster.table.send_replace(Arc::new(table.clone()));
    quiet(&mut watch).await;
    table.epoch += 1;
    table.members[0].weight = 5;
    cluster.table.send_replace(Arc::new(table));
    assert_eq!(next(&mut watch).await, Event::Reset);
    quiet(&mut watch).await;
}
