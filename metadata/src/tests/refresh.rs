//! Generations: listing again, what changed, invalidations, superseded versions, rechecks, pruning, scans.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_under_store::StoreError;
use futures::StreamExt;
use tokio_util::sync::CancellationToken;

use super::{Fixture, path};
use crate::{Invalidation, InvalidationKind, MetadataError, ScanOptions, ScanState, Scanner, memory_store::Fault};

type Stream = std::pin::Pin<Box<dyn futures::Stream<Item = Invalidation> + Send>>;

/// A stream that is at its end.
async fn follow(f: &Fixture) -> Stream {
    let mut stream: Stream = Box::pin(f.dataset.watch(0, 0));
    assert_eq!(stream.next().await.unwrap().kind, InvalidationKind::Reset);
    stream
}

/// What arrived until nothing more does.
async fn drain(stream: &mut Stream) -> Vec<(String, Vec<String>)> {
    let mut seen = Vec::new();
    while let Ok(Some(message)) = tokio::time::timeout(Duration::from_millis(50), stream.next()).await {
        match message.kind {
            InvalidationKind::Directory { directory, names } => {
                let names = names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
                seen.push((directory.to_string(), names));
            }
            InvalidationKind::Heartbeat => {}
            InvalidationKind::Reset => panic!("reset"),
        }
    }
    seen
}

fn superseded(
    receiver: &mut tokio::sync::mpsc::Receiver<(forebay_protocol::DatasetPath, forebay_protocol::FileVersion)>,
) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    while let Ok((path, version)) = receiver.try_recv() {
        seen.insert(format!("{path}@{}", String::from_utf8_lossy(version.key.as_bytes())));
    }
    seen
}

#[tokio::test]
async fn what_changed_is_named_once_and_counted() {
    let f = Fixture::new().await;
    for key in ["same", "changed", "removed", "to-dir", "d/x", "from-dir/x"] {
        f.store.put(key, 1, "v1");
    }
    let mut stream = follow(&f).await;
    let mut receiver = f.dataset.take_superseded().unwrap();
    assert!(f.dataset.take_superseded().is_none());
    f.names("/").await.unwrap();
    assert!(drain(&mut stream).await.is_empty(), "a first listing changes nothing that was known");

    f.store.put("changed", 1, "v2");
    f.store.delete("removed");
    f.store.put("to-dir/x", 1, "v1");
    f.store.delete("to-dir");
    f.store.put("from-dir", 1, "v1");
    f.store.delete("from-dir/x");
    f.store.put("added", 1, "v1");
    assert_eq!(f.lookup("/", "changed").await.unwrap(), "v1", "until the generation rises");
    assert_eq!(f.raise().await, 1);
    assert_eq!(f.lookup("/", "changed").await.unwrap(), "v2");
    let scan = f.dataset.scan_directory(1, &path("/"), b"").await.unwrap();
    // A file that is a directory now is one entry removed and one added.
    assert_eq!((scan.files, scan.changed), (4, 3 + 2 + 2));
    let names = ["added", "changed", "from-dir", "removed", "to-dir"].map(str::to_owned).to_vec();
    assert_eq!(drain(&mut stream).await, [("/".to_owned(), names)]);
    let expected = ["/changed@v1", "/removed@v1", "/to-dir@v1"].map(str::to_owned);
    assert_eq!(superseded(&mut receiver), BTreeSet::from(expected));

    // Nothing changed: nothing is said.
    assert_eq!(f.raise().await, 2);
    assert_eq!(f.dataset.scan_directory(2, &path("/"), b"").await.unwrap().changed, 0);
    assert!(drain(&mut stream).await.is_empty());
    assert!(superseded(&mut receiver).is_empty());
}

#[tokio::test]
async fn too_many_changes_are_not_named() {
    let f = Fixture::new().await;
    for i in 0..6_000 {
        f.store.put(format!("n{i}"), 1, "v");
    }
    f.names("/").await.unwrap();
    let mut stream = follow(&f).await;
    let mut receiver = f.dataset.take_superseded().unwrap();
    for i in 0..6_000 {
        f.store.delete(format!("n{i}"));
    }
    f.raise().await;
    // More rows than one transaction deletes.
    assert_eq!(f.names("/").await.unwrap(), [""; 0]);
    let scan = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
    assert_eq!((scan.changed, scan.files), (6_000, 0));
    assert_eq!(drain(&mut stream).await, [("/".to_owned(), vec![])]);
    assert_eq!(superseded(&mut receiver).len(), 6_000);
    assert_eq!(f.index.entries_on_disk().await.0, 0);
}

#[tokio::test]
async fn a_generation_is_adopted_from_requests() {
    let f = Fixture::new().await;
    f.store.put("a", 1, "v1");
    assert_eq!(f.lookup("/", "a").await.unwrap(), "v1");
    let mut stream = follow(&f).await;
    f.store.put("a", 1, "v2");
    f.dataset.lookup(5, &path("/elsewhere"), b"x").await.unwrap_err();
    assert_eq!(f.dataset.generation(), 5);
    let beat = stream.next().await.unwrap();
    assert_eq!((beat.generation, beat.kind), (5, InvalidationKind::Heartbeat), "subscribers hear of it at once");
    assert_eq!(f.lookup("/", "a").await.unwrap(), "v2", "an older generation does not lower it");
    assert_eq!(f.raise().await, 6);
    f.dataset.adopt_generation(u64::MAX);
    assert!(matches!(f.dataset.raise_generation().await, Err(MetadataError::Internal(_))));
    assert_eq!(f.lookup("/", "a").await.unwrap(), "v2");
}

#[tokio::test]
async fn old_entries_are_not_served_while_the_directory_is_listed_again() {
    let f = Fixture::new().await;
    for i in 0..20 {
        f.store.put(format!("n{i:02}"), 1, "v1");
    }
    f.names("/").await.unwrap();
    f.store.set_page(5);
    for i in 0..20 {
        f.store.put(format!("n{i:02}"), 1, "v2");
    }
    f.raise().await;
    let gate = f.store.gate();
    gate.add_permits(1);
    let page = f.dataset.list(0, &path("/"), b"", 100).await.unwrap();
    assert_eq!(page.entries.len(), 4, "what the new listing has passed");
    assert_eq!(f.lookup("/", "n03").await.unwrap(), "v2");
    let old = tokio::time::timeout(Duration::from_millis(50), f.lookup("/", "n10"));
    assert!(old.await.is_err(), "the rest waits");
    // Raised in the middle: it starts over, and the first page is asked for again.
    f.store.put("n00", 1, "v3");
    f.raise().await;
    gate.add_permits(2);
    assert_eq!(f.lookup("/", "n00").await.unwrap(), "v3");
    f.store.ungate();
    assert_eq!(f.names("/").await.unwrap().len(), 20);
    assert_eq!(f.lookup("/", "n10").await.unwrap(), "v2");
}

#[tokio::test]
async fn a_recheck_corrects_one_entry() {
    let f = Fixture::new().await;
    for key in ["a", "b", "d/x"] {
        f.store.put(key, 10, "v1");
    }
    f.names("/").await.unwrap();
    let mut stream = follow(&f).await;
    let mut receiver = f.dataset.take_superseded().unwrap();
    let lists = f.dataset.requests().lists;

    assert!(!f.dataset.recheck_now(&path("/a")).await.unwrap(), "nothing changed");
    f.store.put("b", 7, "v2");
    assert!(f.dataset.recheck_now(&path("/b")).await.unwrap());
    assert!(!f.dataset.recheck_now(&path("/b")).await.unwrap(), "once per interval");
    assert_eq!(f.lookup("/", "b").await.unwrap(), "v2");
    assert_eq!(drain(&mut stream).await, [("/".to_owned(), vec!["b".to_owned()])]);
    assert_eq!(superseded(&mut receiver), BTreeSet::from(["/b@v1".to_owned()]));
    let scan = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
    assert_eq!((scan.files, scan.bytes), (2, 17));

    f.store.delete("b");
    tokio::time::sleep(f.options.recheck_interval * 2).await;
    f.dataset.recheck(&path("/b"));
    for _ in 0..20 {
        f.dataset.recheck(&path("/b"));
    }
    assert_eq!(drain(&mut stream).await, [("/".to_owned(), vec!["b".to_owned()])]);
    assert_eq!(f.lookup("/", "b").await, Err(MetadataError::NotFound));
    assert_eq!(superseded(&mut receiver), BTreeSet::from(["/b@v2".to_owned()]));
    let scan = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
    assert_eq!((scan.files, scan.bytes), (1, 10));

    // It comes back; a directory that was never listed, and a failing source, change nothing.
    f.store.put("b", 1, "v3");
    tokio::time::sleep(f.options.recheck_interval * 2).await;
    assert!(f.dataset.recheck_now(&path("/b")).await.unwrap());
    assert_eq!(f.names("/").await.unwrap(), ["a", "b", "d/"]);
    assert!(!f.dataset.recheck_now(&path("/d/x")).await.unwrap());
    assert!(!f.dataset.recheck_now(&path("/")).await.unwrap());
    f.store.fault_head(Fault::Error(StoreError::Unavailable("down".to_owned())));
    tokio::time::sleep(f.options.recheck_interval * 2).await;
    assert!(matches!(f.dataset.recheck_now(&path("/a")).await, Err(MetadataError::Unavailable(_))));
    assert_eq!(f.lookup("/", "a").await.unwrap(), "v1");
    assert_eq!(f.dataset.requests().lists, lists, "no listing was needed");
    assert!(f.dataset.stats().rechecks_limited >= 20);
}

#[tokio::test]
async fn a_refresh_scans_and_prunes() {
    let f = Fixture::new().await;
    for directory in ["keep", "gone", "gone/deep", "gone b", "other/gone"] {
        for name in ["x", "y"] {
            f.store.put(format!("{directory}/{name}"), 1, "v1");
        }
    }
    let scan = |generation, at: &'static str| {
        Scanner::start(
            f.dataset.clone(),
            generation,
            path(at),
            ScanOptions { backoff: Duration::from_millis(150), ..ScanOptions::default() },
            CancellationToken::new(),
        )
        .finished()
    };
    let first = scan(0, "/").await;
    assert_eq!(first.state, ScanState::Complete);
    assert_eq!((first.files, first.bytes, first.directories, first.changed), (10, 10, 7, 0));
    assert_eq!(f.store.listed("gone/deep"), 1);
    assert_eq!(scan(0, "/").await, first);
    assert_eq!(f.store.listed("gone/deep"), 1, "answered from the index");

    for directory in ["gone", "gone/deep", "other/gone"] {
        for name in ["x", "y"] {
            f.store.delete(format!("{directory}/{name}"));
        }
    }
    let mut receiver = f.dataset.take_superseded().unwrap();
    let generation = f.raise().await;
    // A failure in between is tried again.
    f.store.fault("keep", Fault::Error(StoreError::Unavailable("down".to_owned())));
    let second = scan(generation, "/").await;
    assert_eq!(second.state, ScanState::Complete);
    // "gone" left the root; "other" was a prefix of its keys only, so it went with them.
    assert_eq!((second.files, second.directories, second.changed), (4, 3, 2));
    let mut stream = follow(&f).await;
    assert_eq!(f.dataset.prune(generation, &path("/gone")).await.unwrap(), 2);
    assert_eq!(f.dataset.prune(generation, &path("/")).await.unwrap(), 2);
    assert_eq!(f.dataset.prune(generation, &path("/")).await.unwrap(), 0);
    let pruned: BTreeSet<String> = drain(&mut stream).await.into_iter().map(|(directory, _)| directory).collect();
    let expected = ["/gone", "/gone/deep", "/other", "/other/gone"].map(str::to_owned);
    assert_eq!(pruned, BTreeSet::from(expected));
    let files = ["/gone/deep/x", "/gone/deep/y", "/gone/x", "/gone/y", "/other/gone/x", "/other/gone/y"];
    assert_eq!(superseded(&mut receiver), files.iter().map(|file| format!("{file}@v1")).collect());
    assert_eq!(f.names("/gone b").await.unwrap(), ["x", "y"]);
    assert_eq!(f.names("/gone").await, Err(MetadataError::NotFound));

    // A source that stays down fails the scan.
    let generation = f.raise().await;
    for _ in 0..10 {
        f.store.fault("keep", Fault::Error(StoreError::Unavailable("down".to_owned())));
    }
    let third = scan(generation, "/").await;
    assert_eq!(third.state, ScanState::Failed);
    assert!(third.error.unwrap().starts_with("/keep: "));
}

#[tokio::test]
async fn subdirectories_are_paged() {
    let f = Fixture::new().await;
    for i in 0..2_500 {
        f.store.put(format!("d{i:04}/x"), 1, "v");
        f.store.put(format!("f{i:04}"), 1, "v");
    }
    let mut seen: Vec<Bytes> = Vec::new();
    let mut after = Vec::new();
    let mut files = 0;
    for expected in [1_000, 1_000, 500] {
        let page = f.dataset.scan_directory(0, &path("/"), &after).await.unwrap();
        assert_eq!((page.subdirectories.len(), page.end), (expected, expected == 500));
        files += page.files;
        after = [page.subdirectories.last().unwrap().as_ref(), b"/"].concat();
        seen.extend(page.subdirectories);
    }
    assert_eq!((seen.len(), files), (2_500, 2_500));
    seen.dedup();
    assert_eq!(seen.len(), 2_500);
    let done = Scanner::start(f.dataset.clone(), 0, path("/"), ScanOptions::default(), CancellationToken::new());
    let done = done.finished().await;
    assert_eq!((done.files, done.directories), (5_000, 2_501));
}

#[tokio::test]
async fn a_watch_ends_with_its_dataset() {
    let f = Fixture::new().await;
    let mut stream = follow(&f).await;
    let incarnation = f.dataset.incarnation();
    f.dataset.close().await;
    assert!(stream.next().await.is_none());
    let f = f.restart().await;
    assert_ne!(f.dataset.incarnation(), incarnation);
    let mut stream: Stream = Box::pin(f.dataset.watch(incarnation, 0));
    assert_eq!(stream.next().await.unwrap().kind, InvalidationKind::Reset);
    let _: Arc<_> = f.dataset;
}

/// What a scan ahead of need, under a generation of its own, finds of a directory.
async fn ahead(f: &Fixture, generation: u64, dir: &str) -> Result<crate::DirectoryScan, MetadataError> {
    f.dataset.scan_ahead(generation, &path(dir), b"").await
}

#[tokio::test]
async fn what_is_listed_ahead_of_need_is_answered_all_the_while() {
    let f = Fixture::new().await;
    f.store.set_page(2);
    for key in ["a", "b", "c", "d", "e"] {
        f.store.put(key, 1, "v1");
    }
    assert_eq!(f.names("/").await.unwrap(), ["a", "b", "c", "d", "e"]);
    let before = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
    let mut stream = follow(&f).await;
    f.store.put("a", 1, "v2");
    f.store.delete("b");
    f.store.put("f", 1, "v1");
    // The first page comes, the second takes its time.
    let gate = f.store.gate();
    let scanning = tokio::spawn({
        let dataset = f.dataset.clone();
        async move { dataset.scan_ahead(1, &path("/"), b"").await }
    });
    gate.add_permits(1);
    tokio::time::timeout(Duration::from_secs(10), async {
        while f.lookup("/", "a").await.unwrap() != "v2" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(f.lookup("/", "e").await.unwrap(), "v1");
    assert_eq!(f.lookup("/", "f").await, Err(MetadataError::NotFound));
    assert!(f.names("/").await.unwrap().ends_with(&["d".to_owned(), "e".to_owned()]));
    assert_eq!(f.dataset.generation(), 0, "readers wait for nothing");
    f.store.ungate();
    let scan = scanning.await.unwrap().unwrap();
    assert_eq!((scan.files, scan.changed), (5, 3));
    assert_ne!(scan.digest, before.digest);
    assert_eq!(drain(&mut stream).await, [("/".to_owned(), ["a", "b", "f"].map(str::to_owned).to_vec())]);
    // Raised to it, nothing is listed again.
    let asked = f.store.listed("");
    f.dataset.adopt_generation(1);
    assert_eq!(f.names("/").await.unwrap(), ["a", "c", "d", "e", "f"]);
    assert_eq!(f.store.listed(""), asked);
}

#[tokio::test]
async fn a_source_that_is_away_is_listed_ahead_in_vain_and_nobody_notices() {
    let f = Fixture::new().await;
    f.store.put("d/a", 1, "v1");
    f.store.put("d/b", 1, "v1");
    assert_eq!(f.names("/d").await.unwrap(), ["a", "b"]);
    f.store.put("d/a", 1, "v2");
    f.store.fault("d", Fault::Error(StoreError::Unavailable("down".to_owned())));
    assert!(matches!(ahead(&f, 1, "/d").await, Err(MetadataError::Unavailable(_))));
    // The failure is remembered, for those who have to wait for the source.
    assert!(matches!(ahead(&f, 1, "/d").await, Err(MetadataError::Unavailable(_))));
    assert_eq!(f.names("/d").await.unwrap(), ["a", "b"]);
    assert_eq!(f.lookup("/d", "a").await.unwrap(), "v1");
    tokio::time::sleep(f.options.failure_ttl).await;
    assert_eq!(ahead(&f, 1, "/d").await.unwrap().changed, 1);
    assert_eq!(f.lookup("/d", "a").await.unwrap(), "v2");
    // A directory that went is gone, for readers too, once that is found out.
    f.store.delete("d/a");
    f.store.delete("d/b");
    assert_eq!(ahead(&f, 2, "/d").await, Err(MetadataError::NotFound));
    assert_eq!(f.lookup("/d", "a").await, Err(MetadataError::NotFound));
}

#[tokio::test]
async fn a_digest_is_of_paths_and_versions_and_nothing_else() {
    let digest = async |keys: &[(&str, u64, &str)]| {
        let f = Fixture::new().await;
        // In another order, and in pages of another size.
        f.store.set_page(1 + keys.len() % 3);
        for (key, size, version) in keys {
            f.store.put(key, *size, version);
        }
        let scan = Scanner::start(f.dataset.clone(), 0, path("/"), ScanOptions::default(), CancellationToken::new());
        let progress = scan.finished().await;
        assert_eq!(progress.state, ScanState::Complete);
        progress.digest
    };
    let base = digest(&[("a", 1, "v"), ("d/b", 2, "v"), ("d/c", 3, "w")]).await;
    assert_eq!(base, digest(&[("d/c", 3, "w"), ("a", 1, "v"), ("d/b", 2, "v")]).await);
    let others: [&[(&str, u64, &str)]; 7] = [
        &[("a", 1, "v"), ("d/b", 2, "v")],
        &[("a", 1, "v"), ("d/b", 2, "v"), ("d/c", 3, "v")],
        &[("a", 1, "v"), ("d/b", 2, "v"), ("d/c", 4, "w")],
        &[("a", 1, "v"), ("d/b", 2, "v"), ("e/c", 3, "w")],
        &[("a", 1, "v"), ("e/b", 2, "v"), ("e/c", 3, "w")],
        &[("a", 1, "v"), ("d/c", 2, "v"), ("d/b", 3, "w")],
        &[("d/a", 1, "v"), ("d/b", 2, "v"), ("d/c", 3, "w")],
    ];
    for other in others {
        assert_ne!(base, digest(other).await, "{other:?}");
    }
    // A correction of one file comes to the same as a listing.
    let f = Fixture::new().await;
    f.store.put("a", 1, "v1");
    f.names("/").await.unwrap();
    f.store.put("a", 2, "v2");
    assert!(f.dataset.recheck_now(&path("/a")).await.unwrap());
    let corrected = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().digest;
    f.raise().await;
    assert_eq!(f.dataset.scan_directory(1, &path("/"), b"").await.unwrap().digest, corrected);
}
