//! Listings: lazy, single-flight, paged, exact; errors and deadlines.

use std::time::{Duration, Instant};

use forebay_under_store::{Page, StoreError};

use super::{Fixture, id, open_index, options, path, sources};
use crate::{
    DatasetIndex, DatasetOptions, DirectoryScan, Index, MetadataError,
    memory_store::{Fault, MemoryStore},
};

fn down() -> Fault {
    Fault::Error(StoreError::Unavailable("down".to_owned()))
}

#[tokio::test]
async fn directories_are_listed_when_they_are_asked_for_and_once() {
    let f = Fixture::new().await;
    for (key, size) in [("a.txt", 1), ("d/x", 2), ("d/y", 3), ("d/e/z", 4)] {
        f.store.put(key, size, "v1");
    }
    assert_eq!(f.store.listed(""), 0);
    let asked = (0..50).map(|_| f.lookup("/", "a.txt"));
    for answer in futures::future::join_all(asked).await {
        assert_eq!(answer.unwrap(), "v1");
    }
    assert_eq!((f.store.listed(""), f.store.listed("d")), (1, 0));
    assert_eq!(f.names("/").await.unwrap(), ["a.txt", "d/"]);
    assert_eq!(f.names("/d").await.unwrap(), ["e/", "x", "y"]);
    assert_eq!(f.lookup("/d", "e").await.unwrap(), "/");
    assert_eq!(f.lookup("/d", "nothing").await, Err(MetadataError::NotFound));
    assert_eq!(f.lookup("/d", "..").await, Err(MetadataError::NotFound));
    assert_eq!((f.store.listed(""), f.store.listed("d"), f.store.listed("d/e")), (1, 1, 0));
    let scan = f.dataset.scan_directory(0, &path("/d"), b"").await.unwrap();
    let digest = scan.digest;
    let expected =
        DirectoryScan { files: 2, bytes: 5, digest, subdirectories: vec!["e".into()], end: true, ..Default::default() };
    assert_eq!(scan, expected);
    assert_eq!(f.dataset.stats().listings, 2);
    assert_eq!(f.dataset.requests().lists, 2);
}

#[tokio::test]
async fn a_directory_that_does_not_exist_is_not_found() {
    let f = Fixture::new().await;
    assert_eq!(f.names("/").await.unwrap(), [""; 0]);
    assert_eq!(f.names("/none").await, Err(MetadataError::NotFound));
    assert_eq!(f.lookup("/none", "x").await, Err(MetadataError::NotFound));
    assert_eq!(f.dataset.scan_directory(0, &path("/none"), b"").await, Err(MetadataError::NotFound));
    assert_eq!(f.store.listed("none"), 1);
    // A key that cannot be shown still makes a directory.
    f.store.put("odd/x", 1, "v");
    f.store.hide("odd/x");
    assert_eq!(f.names("/odd").await.unwrap(), [""; 0]);
    assert_eq!(f.dataset.scan_directory(0, &path("/odd"), b"").await.unwrap().hidden, 1);
}

#[tokio::test]
async fn a_file_system_has_empty_directories() {
    let f = Fixture::new().await;
    f.store.make_directory("empty");
    f.store.make_directory("full");
    f.store.put("full/x", 1, "v");
    assert_eq!(f.names("/").await.unwrap(), ["empty/", "full/"]);
    assert_eq!(f.names("/empty").await.unwrap(), [""; 0]);
    assert_eq!(f.names("/full").await.unwrap(), ["x"]);
    assert_eq!(f.names("/none").await, Err(MetadataError::NotFound));
}

#[tokio::test]
async fn the_top_of_a_source_must_exist() {
    let f = Fixture::new().await;
    f.store.fault("", Fault::Error(StoreError::NotFound("no such bucket".to_owned())));
    let error = f.names("/").await.unwrap_err();
    assert!(matches!(&error, MetadataError::Unavailable(why) if why.contains("no such bucket")), "{error}");
    tokio::time::sleep(f.options.failure_ttl * 2).await;
    assert!(f.names("/").await.is_ok());
}

#[tokio::test]
async fn a_name_that_is_file_and_directory_is_a_directory() {
    let f = Fixture::new().await;
    // Between "a" and "a/" sort names with characters below '/'.
    for key in ["a", "a b", "a-1", "a.txt", "a/x", "a0", "b"] {
        f.store.put(key, 10, "v");
    }
    for page in 1..8 {
        f.store.set_page(page);
        f.store.put("a/x", 10, "v");
        f.raise().await;
        assert_eq!(f.names_by("/", 2).await.unwrap(), ["a b", "a-1", "a.txt", "a/", "a0", "b"], "pages of {page}");
        assert_eq!(f.lookup("/", "a").await.unwrap(), "/");
        let scan = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
        assert_eq!((scan.files, scan.bytes, scan.hidden), (5, 50, 1), "pages of {page}");
        // Removed, and added; a first listing changes nothing.
        assert_eq!(scan.changed, if page == 1 { 0 } else { 2 });
        f.raise().await;
        assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().changed, 0, "pages of {page}");

        f.store.delete("a/x");
        f.raise().await;
        assert_eq!(f.names("/").await.unwrap(), ["a", "a b", "a-1", "a.txt", "a0", "b"], "pages of {page}");
        assert_eq!(f.lookup("/", "a").await.unwrap(), "v");
        let scan = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
        assert_eq!((scan.files, scan.bytes, scan.hidden, scan.changed), (6, 60, 0, 2), "pages of {page}");
    }
}

#[tokio::test]
async fn a_page_is_answered_while_the_listing_goes_on() {
    let f = Fixture::new().await;
    for i in 0..100 {
        f.store.put(format!("n{i:03}"), 1, "v");
    }
    f.store.set_page(10);
    let gate = f.store.gate();
    gate.add_permits(1);
    // Nine of ten: the last file of the page may still turn out to be a directory.
    let page = f.dataset.list(0, &path("/"), b"", 100).await.unwrap();
    assert_eq!((page.entries.len(), page.end), (9, false));
    assert_eq!(f.lookup("/", "n008").await.unwrap(), "v");
    assert_eq!(f.lookup("/", "m").await, Err(MetadataError::NotFound));
    let later = tokio::time::timeout(Duration::from_millis(50), f.lookup("/", "n009"));
    assert!(later.await.is_err(), "not listed yet");
    let root = path("/");
    let next = f.dataset.list(0, &root, b"n008", 100);
    let (next, ()) = tokio::join!(next, async { gate.add_permits(1) });
    let next = next.unwrap();
    assert_eq!((next.entries.len(), next.end), (10, false));
    f.store.ungate();
    assert_eq!(f.names("/").await.unwrap().len(), 100);
    assert_eq!(f.store.listed(""), 10);
}

#[tokio::test]
async fn a_failed_page_is_an_error_and_the_next_listing_goes_on_there() {
    let f = Fixture::new().await;
    for i in 0..30 {
        f.store.put(format!("n{i:03}"), 1, "v");
    }
    f.store.set_page(10);
    assert_eq!(f.dataset.list(0, &path("/"), b"", 5).await.unwrap().entries.len(), 5);
    assert_eq!(f.names("/").await.unwrap().len(), 30);
    f.raise().await;
    f.store.put("n015", 2, "w");
    let before = f.store.listed("");
    let gate = f.store.gate();
    gate.add_permits(1);
    assert_eq!(f.lookup("/", "n005").await.unwrap(), "v");
    // The second page waits at the gate; the third fails.
    f.asked("", before + 2).await;
    f.store.fault("", down());
    f.store.ungate();
    assert_eq!(f.names("/").await, Err(MetadataError::Unavailable("down".to_owned())));
    assert_eq!(f.store.listed("") - before, 3);
    // Remembered: nobody asks the source now.
    assert_eq!(f.lookup("/", "n029").await, Err(MetadataError::Unavailable("down".to_owned())));
    assert_eq!(f.store.listed("") - before, 3);
    tokio::time::sleep(f.options.failure_ttl * 2).await;
    assert_eq!(f.names("/").await.unwrap().len(), 30);
    assert_eq!(f.store.listed("") - before, 4);
    assert_eq!(f.lookup("/", "n015").await.unwrap(), "w");
    assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().changed, 1);
    assert_eq!(f.dataset.stats().listing_failures, 1);
}

#[tokio::test]
async fn errors_say_what_the_caller_can_do() {
    let f = Fixture::new().await;
    let denied = StoreError::PermissionDenied("key".to_owned());
    f.store.fault("d", Fault::Error(denied));
    assert_eq!(f.names("/d").await, Err(MetadataError::PermissionDenied("key".to_owned())));
    assert_eq!(f.names("/").await.unwrap(), [""; 0], "one directory's failure is its own");
    let endless = Page { items: vec![], next: Some(b"a".to_vec()), hidden: 0 };
    f.store.fault("e", Fault::Page(endless.clone()));
    f.store.fault("e", Fault::Page(endless));
    assert!(matches!(f.names("/e").await, Err(MetadataError::Unavailable(_))), "a source that makes no progress");
}

#[tokio::test]
async fn every_wait_has_a_deadline() {
    let quick = DatasetOptions { deadline: Duration::from_millis(100), ..options() };
    let f = Fixture::with(quick).await;
    f.store.put("a", 1, "v");
    f.store.fault("", Fault::Hang);
    for _ in 0..2 {
        assert_eq!(f.lookup("/", "a").await, Err(MetadataError::Deadline));
        assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await, Err(MetadataError::Deadline));
    }
    assert_eq!((f.store.listed(""), f.dataset.stats().deadlines), (1, 4));
    f.dataset.close().await;
    assert_eq!(f.lookup("/", "a").await, Err(MetadataError::Closed));

    let f = Fixture::with(DatasetOptions { page_deadline: Duration::from_millis(100), ..options() }).await;
    f.store.fault("", Fault::Hang);
    assert!(matches!(f.names("/").await, Err(MetadataError::Unavailable(_))));
}

#[tokio::test]
async fn a_directory_that_goes_away_while_it_is_listed_is_listed_from_its_start() {
    let f = Fixture::new().await;
    f.store.make_directory("d");
    for name in ["a", "b", "c"] {
        f.store.put(format!("d/{name}"), 1, "v");
    }
    f.store.set_page(1);
    let gate = f.store.gate();
    gate.add_permits(1);
    // The first page passes, the second waits at the gate, the third is not found.
    let (names, ()) = tokio::join!(f.names("/d"), async {
        f.asked("d", 2).await;
        f.store.fault("d", Fault::Error(StoreError::NotFound("gone".to_owned())));
        f.store.ungate();
    });
    assert!(matches!(names, Err(MetadataError::Unavailable(_))));
    f.store.delete("d/a");
    tokio::time::sleep(f.options.failure_ttl * 2).await;
    assert_eq!(f.names("/d").await.unwrap(), ["b", "c"]);
    assert_eq!(f.store.listed("d"), 3 + 2);
}

#[tokio::test]
async fn sources_are_merged_into_one_namespace() {
    let (root, deep) = (MemoryStore::new(), MemoryStore::new());
    for key in ["a/x", "m", "m0", "m/hidden", "z/inner/under", "z/own"] {
        root.put(key, 1, "root");
    }
    deep.put("f", 1, "deep");
    let directory = tempfile::tempdir().unwrap();
    let index = open_index(directory.path());
    let namespace = sources(&[("/", &root, 0), ("/m", &deep, 0), ("/z/inner", &deep, 0), ("/p/q", &deep, 0)]);
    let dataset = DatasetIndex::open(index.clone(), id(), namespace, options()).await.unwrap();
    let f = Fixture { directory, store: root, index, dataset, options: options() };
    for page in [1, 2, 100] {
        f.store.set_page(page);
        f.raise().await;
        assert_eq!(f.names("/").await.unwrap(), ["a/", "m/", "m0", "p/", "z/"]);
        assert_eq!(f.names("/m").await.unwrap(), ["f"], "a mount point shadows the source around it");
        assert_eq!(f.names("/z").await.unwrap(), ["inner/", "own"]);
        assert_eq!(f.names("/z/inner").await.unwrap(), ["f"]);
        assert_eq!(f.names("/p").await.unwrap(), ["q/"]);
        assert_eq!(f.names("/p/q").await.unwrap(), ["f"]);
        assert_eq!(f.names("/p/r").await, Err(MetadataError::NotFound));
        let scan = f.dataset.scan_directory(0, &path("/"), b"").await.unwrap();
        assert_eq!((scan.files, scan.hidden, scan.subdirectories.len()), (1, 1, 4));
    }
    // A mount point is known without asking, also while its source is down.
    f.store.fault("", down());
    f.raise().await;
    assert_eq!(f.lookup("/", "m").await.unwrap(), "/");
    assert_eq!(f.lookup("/p", "q").await.unwrap(), "/");
    assert_eq!(f.lookup("/m", "f").await.unwrap(), "deep");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_with_200_000_entries() {
    const ENTRIES: u64 = 200_000;
    let directory = tempfile::tempdir().unwrap();
    let index = Index::open(directory.path()).unwrap();
    let f = Fixture::on(directory, index, options()).await;
    for i in 0..ENTRIES {
        f.store.put(format!("big/image-{i:09}.jpeg"), 100_000, &format!("\"{:032x}\"", i.wrapping_mul(0x9e37_79b9)));
    }
    let start = Instant::now();
    let first = f.dataset.list(0, &path("/big"), b"", 1_000).await.unwrap();
    let first_page = start.elapsed();
    assert_eq!((first.entries.len(), first.end), (999, false));
    let scan = f.dataset.scan_directory(0, &path("/big"), b"").await.unwrap();
    assert_eq!((scan.files, scan.bytes), (ENTRIES, ENTRIES * 100_000));
    let listed = start.elapsed();
    assert_eq!(f.store.listed("big"), ENTRIES / 1_000);
    let mut after = Vec::new();
    let mut count = 0;
    loop {
        let page = f.dataset.list(0, &path("/big"), &after, 4_096).await.unwrap();
        count += page.entries.len() as u64;
        if page.end {
            break;
        }
        after = page.entries.last().unwrap().sort_key();
    }
    assert_eq!(count, ENTRIES);
    let (rows, bytes) = f.index.entries_on_disk().await;
    assert_eq!(rows, ENTRIES);
    // Free pages and all.
    let file = std::fs::metadata(f.directory.path().join("metadata.redb")).unwrap().len();
    assert!(bytes / rows < 80 && file / rows < 130, "{} and {} bytes per entry", bytes / rows, file / rows);
    assert!(first_page < listed / 4, "the first page does not wait for the last: {first_page:?} of {listed:?}");
}
