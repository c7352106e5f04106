//! Sources that are listed periodically: a mount shows what changes there, and what comes is loaded before it is read.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{fs, io::Read as _, os::unix::fs::MetadataExt as _, time::Duration};

use forebay_test_store::{Options, TestStore};
use support::{BUCKET, SHAPES, Setup, Up, can_mount, content, eventually, manifest_text, test_dir};

/// Far above the interval, for a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// The usual manifest, of a Dataset that is listed every three seconds.
fn manifest(setup: &Setup, store: &TestStore) -> String {
    manifest_text(setup, store).replace("  sources:", "  sync: {mode: Periodic, interval: 3s}\n  sources:")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_follows_its_source() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let setup = Setup::shaped(shape);
        let dir = test_dir();
        let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
        store.create_bucket(BUCKET).await;
        for (seed, name) in ["d/same", "d/changed", "d/gone", "lost/file"].into_iter().enumerate() {
            store.put(BUCKET, name, content::bytes(seed as u64, 100_000)).await;
        }
        let file = dir.path().join("data.yaml");
        fs::write(&file, manifest(&setup, &store)).unwrap();
        let up = Up::start(&file, dir.path(), &setup.arguments);
        let at = |name: &str| up.mount.join(name);
        let names = || {
            let mut names: Vec<String> =
                fs::read_dir(at("d")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        // Everything is in the kernel's caches, and one file is open.
        assert_eq!(names(), ["changed", "gone", "same"]);
        for (seed, name) in ["d/same", "d/changed", "d/gone"].into_iter().enumerate() {
            assert_eq!(fs::read(at(name)).unwrap(), content::bytes(seed as u64, 100_000));
        }
        assert!(at("lost").is_dir() && !at("new").exists());
        let inode = fs::metadata(at("d/same")).unwrap().ino();
        let mut open = fs::File::open(at("d/changed")).unwrap();

        store.put(BUCKET, "d/changed", content::bytes(11, 100_001)).await;
        store.put(BUCKET, "d/added", content::bytes(12, 1_000)).await;
        store.put(BUCKET, "new/file", content::bytes(13, 1_000)).await;
        store.delete(BUCKET, "d/gone").await;
        store.delete(BUCKET, "lost/file").await;
        eventually("the changed file", DEADLINE, || fs::metadata(at("d/changed")).unwrap().len() == 100_001);
        eventually("the listing", DEADLINE, || names() == ["added", "changed", "same"]);
        eventually("the new directory", DEADLINE, || at("new/file").is_file());
        eventually("the end of the other one", DEADLINE, || !at("lost").exists());
        assert_eq!(fs::read(at("d/changed")).unwrap(), content::bytes(11, 100_001));
        assert_eq!(fs::read(at("d/added")).unwrap(), content::bytes(12, 1_000));
        // What has not changed is still the same node; what was open is what it was, from the kernel's memory.
        assert_eq!(fs::metadata(at("d/same")).unwrap().ino(), inode);
        let mut old = Vec::new();
        open.read_to_end(&mut old).unwrap();
        assert_eq!(old, content::bytes(1, 100_000));
        drop(open);
        up.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_is_loaded_before_it_is_read() {
    if !can_mount() {
        return;
    }
    let dir = test_dir();
    let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
    store.create_bucket(BUCKET).await;
    store.put(BUCKET, "a", content::bytes(1, 50_000)).await;
    let file = dir.path().join("data.yaml");
    let policy = "---
apiVersion: forebay.io/v1alpha1
kind: PreloadPolicy
metadata: {name: follow}
spec:
  datasetRef: {name: data}
  triggers: [{sourceChanged: {}}]
";
    fs::write(&file, manifest(&Setup::default(), &store) + policy).unwrap();
    let up = Up::start(&file, dir.path(), &Setup::default().arguments);
    let run = || up.status()["policies"][0]["lastRun"].clone();
    eventually("a revision", DEADLINE, || up.status()["datasets"][0]["revision"].is_string());
    // Looked at a few times, it has not changed.
    std::thread::sleep(Duration::from_secs(4));
    assert!(run().is_null());
    store.put(BUCKET, "b", content::bytes(2, 60_000)).await;
    eventually("the run", DEADLINE, || run()["phase"] == "Complete" && run()["files"] == 2);
    assert_eq!(run()["trigger"], "SourceChanged");
    let gets = store.counters().gets;
    assert_eq!(fs::read(up.mount.join("b")).unwrap(), content::bytes(2, 60_000));
    assert_eq!(store.counters().gets, gets);
    up.stop();
}
