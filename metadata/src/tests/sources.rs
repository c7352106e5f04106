//! Sources that come, go and change under those who ask.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::StreamExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{Fixture, id, open_index, options, path, sources};
use crate::{
    DatasetIndex, InvalidationKind, MetadataError,
    memory_store::{Fault, MemoryStore},
};

fn store(keys: &[&str]) -> Arc<MemoryStore> {
    let store = MemoryStore::new();
    for key in keys {
        store.put(key, 3, "v1");
    }
    store
}

/// Two sources, listed.
async fn two() -> (Fixture, Arc<MemoryStore>) {
    let f = Fixture::new().await;
    for key in ["a", "d/x", "d/e/y"] {
        f.store.put(key, 3, "v1");
    }
    let labels = store(&["l", "m/n"]);
    f.dataset.replace(sources(&[("/", &f.store, 0), ("/labels", &labels, 1)])).await.unwrap();
    for directory in ["/", "/d", "/d/e", "/labels", "/labels/m"] {
        f.names(directory).await.unwrap();
    }
    (f, labels)
}

/// Everything that watchers are told until they hear of nothing more.
async fn told(f: &Fixture, after: u64) -> Vec<String> {
    let mut told = Vec::new();
    let mut watch = Box::pin(f.dataset.watch(f.dataset.incarnation(), after));
    loop {
        match watch.next().await.unwrap().kind {
            InvalidationKind::Heartbeat => return told,
            InvalidationKind::Reset => told.push("reset".to_owned()),
            InvalidationKind::Directory { directory, names } => {
                let names: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
                told.push(format!("{directory} {}", names.join(",")).trim_end().to_owned());
            }
        }
    }
}

async fn last(f: &Fixture) -> u64 {
    Box::pin(f.dataset.watch(0, 0)).next().await.unwrap().number
}

#[tokio::test]
async fn a_source_that_comes_disturbs_no_other_and_is_seen_at_once() {
    let (f, labels) = two().await;
    let images = store(&["i/j"]);
    assert_eq!(f.lookup("/", "images").await, Err(MetadataError::NotFound));
    assert_eq!(f.names("/data/images").await, Err(MetadataError::NotFound));
    let (lists, number) = (f.store.listed("") + f.store.listed("d") + labels.listed(""), last(&f).await);
    let three = [("/", &f.store, 0), ("/labels", &labels, 1), ("/data/images", &images, 2)];
    f.dataset.replace(sources(&three)).await.unwrap();
    assert_eq!(told(&f, number).await, ["/ data", "/data images"]);
    assert_eq!(f.names("/").await.unwrap(), ["a", "d/", "data/", "labels/"]);
    assert_eq!(f.names("/data/images").await.unwrap(), ["i/"]);
    assert_eq!(f.names("/data/images/i").await.unwrap(), ["j"]);
    assert_eq!(f.names("/d").await.unwrap(), ["e/", "x"]);
    assert_eq!(f.names("/labels/m").await.unwrap(), ["n"]);
    assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().subdirectories, ["d", "data", "labels"]);
    // "/data" was asked of the source around it, once.
    assert_eq!(f.store.listed("") + f.store.listed("d") + labels.listed(""), lists);

    // And a name that was a file.
    let number = last(&f).await;
    let four = [three[0], three[1], three[2], ("/a", &images, 3)];
    f.dataset.replace(sources(&four)).await.unwrap();
    assert_eq!(told(&f, number).await, ["/ a"]);
    assert_eq!(f.names("/").await.unwrap(), ["a/", "d/", "data/", "labels/"]);
    assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().files, 0);
    let mut superseded = f.dataset.take_superseded().unwrap();
    assert_eq!(superseded.recv().await.unwrap().0, path("/a"));
}

#[tokio::test]
async fn a_source_that_goes_takes_its_files_along() {
    let (f, labels) = two().await;
    let number = last(&f).await;
    let mut superseded = f.dataset.take_superseded().unwrap();
    let lists = f.store.listed("d") + f.store.listed("d/e");
    f.dataset.replace(sources(&[("/", &f.store, 0)])).await.unwrap();
    let mut messages = told(&f, number).await;
    messages.sort();
    assert_eq!(messages, ["/ labels", "/labels", "/labels/m"]);
    assert_eq!(f.names("/").await.unwrap(), ["a", "d/"]);
    assert_eq!(f.names("/labels").await, Err(MetadataError::NotFound));
    assert_eq!(f.names("/d/e").await.unwrap(), ["y"]);
    assert_eq!(f.store.listed("d") + f.store.listed("d/e"), lists);
    let mut gone = vec![superseded.recv().await.unwrap().0, superseded.recv().await.unwrap().0];
    gone.sort();
    assert_eq!(gone, [path("/labels/l"), path("/labels/m/n")]);
    assert!(superseded.try_recv().is_err());

    // What it hid shows.
    f.store.put("labels/own", 1, "v1");
    f.dataset.replace(sources(&[("/", &f.store, 0), ("/labels", &labels, 1)])).await.unwrap();
    assert_eq!(f.names("/labels").await.unwrap(), ["l", "m/"]);
    f.dataset.replace(sources(&[("/", &f.store, 0)])).await.unwrap();
    assert_eq!(f.names("/").await.unwrap(), ["a", "d/", "labels/"]);
    assert_eq!(f.names("/labels").await.unwrap(), ["own"]);
}

#[tokio::test]
async fn another_source_at_the_same_path_is_listed_anew_and_other_credentials_are_not() {
    let (f, labels) = two().await;
    let lists = labels.listed("");
    f.dataset.replace(sources(&[("/", &f.store, 0), ("/labels", &labels, 1)])).await.unwrap();
    f.names("/labels").await.unwrap();
    assert_eq!(labels.listed(""), lists);
    let others = store(&["o"]);
    let number = last(&f).await;
    f.dataset.replace(sources(&[("/", &f.store, 0), ("/labels", &others, 2)])).await.unwrap();
    assert_eq!(told(&f, number).await, ["/labels", "/labels/m"]);
    assert_eq!(f.names("/labels").await.unwrap(), ["o"]);
    assert_eq!(f.names("/labels/m").await, Err(MetadataError::NotFound));
}

#[tokio::test]
async fn who_waits_for_a_source_that_is_replaced_gets_the_new_ones_answer() {
    let (f, labels) = two().await;
    let slow = store(&["s"]);
    slow.gate();
    slow.fault("", Fault::Error(forebay_under_store::StoreError::Unavailable("replaced".to_owned())));
    f.dataset.replace(sources(&[("/", &f.store, 0), ("/slow", &slow, 5)])).await.unwrap();
    let (names, ()) = tokio::join!(f.names("/slow"), async {
        while slow.listed("") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        f.dataset.replace(sources(&[("/", &f.store, 0), ("/slow", &labels, 6)])).await.unwrap();
        slow.ungate();
    });
    assert_eq!(names.unwrap(), ["l", "m/"]);
}

#[tokio::test]
async fn sources_that_changed_while_nobody_served_are_noticed_at_the_start() {
    let (f, labels) = two().await;
    let lists = f.store.listed("") + f.store.listed("d") + f.store.listed("d/e");
    let Fixture { directory, store: root, index, dataset, options } = f;
    dataset.close().await;
    drop((dataset, index));
    let index = open_index(directory.path());
    let others = sources(&[("/", &root, 0), ("/d/e/labels", &labels, 1)]);
    let dataset = DatasetIndex::open(index.clone(), id(), others, options.clone()).await.unwrap();
    let f = Fixture { directory, store: root, index, dataset, options };
    let mut superseded = f.dataset.take_superseded().unwrap();
    let mut gone = vec![superseded.recv().await.unwrap().0, superseded.recv().await.unwrap().0];
    gone.sort();
    assert_eq!(gone, [path("/labels/l"), path("/labels/m/n")]);
    assert_eq!(f.names("/d").await.unwrap(), ["e/", "x"]);
    assert_eq!(f.names("/d/e").await.unwrap(), ["labels/", "y"]);
    assert_eq!(f.names("/d/e/labels").await.unwrap(), ["l", "m/"]);
    assert_eq!(f.store.listed("") + f.store.listed("d") + f.store.listed("d/e"), lists);
    assert_eq!(f.names("/").await.unwrap(), ["a", "d/"]);
    assert_eq!(f.index.datasets().await.unwrap(), [id()]);
}

/// Whatever comes and goes: the answers are those of an index that never knew anything else.
#[tokio::test]
async fn random_changes_leave_what_a_new_index_lists() {
    let stores = [store(&["a", "b/c", "b/d/e"]), store(&["b", "f/g"]), store(&["d/e", "f"])];
    let paths = ["/", "/b", "/b/d", "/f/g", "/x/y"];
    let mut random = StdRng::seed_from_u64(7);
    let f = Fixture::new().await;
    let directories = ["/", "/b", "/b/d", "/b/d/d", "/b/f", "/d", "/f", "/f/g", "/f/g/b", "/x", "/x/y", "/x/y/f"];
    for round in 0..40 {
        let mut mounts: BTreeMap<&str, usize> = BTreeMap::new();
        for path in paths {
            if random.random_bool(0.5) {
                mounts.insert(path, random.random_range(0..stores.len()));
            }
        }
        let namespace = || {
            let mounts: Vec<_> = mounts.iter().map(|(path, at)| (*path, &stores[*at], *at as u64)).collect();
            sources(&mounts)
        };
        f.dataset.replace(namespace()).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let index = open_index(directory.path());
        let dataset = DatasetIndex::open(index.clone(), id(), namespace(), options()).await.unwrap();
        let fresh = Fixture { directory, store: stores[0].clone(), index, dataset, options: options() };
        for at in directories.iter().filter(|_| random.random_bool(0.7)) {
            assert_eq!(f.names(at).await, fresh.names(at).await, "{at} in round {round} of {mounts:?}");
            let scan = async |f: &Fixture| {
                let scan = f.dataset.scan_directory(0, &path(at), b"").await?;
                Ok::<_, MetadataError>((scan.files, scan.bytes, scan.hidden, scan.subdirectories))
            };
            assert_eq!(scan(&f).await, scan(&fresh).await, "{at} in round {round} of {mounts:?}");
        }
    }
}
