//! `forebay up` on real manifests: right bytes, the verbs, a clean end, and a clean start after a kill.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use support::{BUCKET, Bench, Setup, Up, can_mount, command, content, text};

/// A few directories of small files and one file of several chunks.
async fn fill(store: forebay_test_store::TestStore) -> forebay_test_store::TestStore {
    for index in 0..60 {
        let key = format!("small/{}/{index}.bin", index % 3);
        store.put(BUCKET, &key, content::bytes(index, 1000 + 3000 * index as usize)).await;
    }
    store.put(BUCKET, "empty", text("")).await;
    store.put_virtual(BUCKET, "large/shard", LARGE, content::generator(7));
    store
}

const LARGE: u64 = (130 << 20) + 5;

fn check_everything(bench: &Bench) {
    for index in 0..60 {
        let read = std::fs::read(bench.path(&format!("small/{}/{index}.bin", index % 3))).unwrap();
        assert_eq!(read, content::bytes(index, 1000 + 3000 * index as usize), "small file {index}");
    }
    assert_eq!(std::fs::read(bench.path("empty")).unwrap(), b"");
    let large = std::fs::read(bench.path("large/shard")).unwrap();
    assert_eq!(large.len() as u64, LARGE);
    assert_eq!(content::difference(7, 0, &large), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_served_and_nothing_is_left() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    check_everything(&bench);
    let after_cold = bench.store.counters();
    // What the object store sent is what the files hold, each byte once, rounded to nothing.
    let held: u64 = LARGE + (0..60).map(|index| 1000 + 3000 * index).sum::<u64>();
    assert_eq!(after_cold.bytes_out, held, "bytes were fetched twice, or not at all");
    check_everything(&bench);
    assert_eq!(bench.store.counters().gets, after_cold.gets, "a warm read asked the store");

    let status = bench.up.status();
    let dataset = &status["datasets"][0];
    assert_eq!(dataset["phase"], "Ready");
    assert_eq!(dataset["files"], 62);
    assert_eq!(dataset["bytes"], held);
    assert_eq!(dataset["cachedBytes"], held);

    bench.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_and_daemons_have_no_privileges() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let children = bench.up.children();
    assert_eq!(children.len(), 3 + 2);
    for pid in children {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned();
        assert!(!field("Uid:").split_whitespace().any(|uid| uid == "0"), "{status}");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set} of {pid}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
    }
    bench.stop();
}

/// The owner of a path, without following links.
fn owner(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().uid()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_caches_are_the_unprivileged_users() {
    if !can_mount() {
        return;
    }
    let Bench { store, dir, up } = Bench::start(Setup::default(), fill).await;
    let state = up.state.clone();
    let runtime = state.join("runtimes/default.runtime");
    let check = |up: &Up| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", up.children()[0])).unwrap();
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
        let user: u32 = uid.split_whitespace().next().unwrap().parse().unwrap();
        for directory in [&state, &state.join("runtimes"), &runtime] {
            let metadata = std::fs::metadata(directory).unwrap();
            assert_eq!((metadata.uid(), metadata.mode() & 0o022), (0, 0), "{}", directory.display());
        }
        for file in ["up.lock", "up.json", "control.sock", "keeper.sock", "mounts.json", "made.json"] {
            assert_eq!(owner(&state.join(file)), 0, "{file}");
        }
        assert_eq!(owner(&runtime.join("cache")), user);
        assert_eq!(owner(&runtime.join("cache/runtime-0")), user);
        user
    };
    let user = check(&up);
    up.stop();

    // As an earlier version had it: taken back.
    for directory in [&state, &state.join("runtimes"), &runtime] {
        std::os::unix::fs::chown(directory, Some(user), Some(user)).unwrap();
    }
    let manifest = dir.path().join("data.yaml");
    let up = Up::start(&manifest, dir.path(), &Setup::default().arguments);
    check(&up);
    up.stop();

    // What such an owner may have put in the way is not followed.
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::rename(&runtime, state.join("parked")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &runtime).unwrap();
    let refused = command()
        .args(["up", "--file"])
        .arg(&manifest)
        .arg("--mount")
        .arg(dir.path().join("mnt"))
        .arg("--state-dir")
        .arg(&state)
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert_eq!((std::fs::read_dir(&elsewhere).unwrap().count(), owner(&elsewhere)), (0, 0));
    drop(store);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_verbs_tell_and_do_what_they_say() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let up = &bench.up;

    let listed = up.forebay(&["ls", "data", "/small"]);
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "0/\n1/\n2/\n");
    assert!(!up.forebay(&["ls", "data", "/missing"]).status.success());
    let missing = up.forebay(&["ls", "nonsense"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("there is: data"));

    let selected = ["--include", "small/0/*", "--exclude", "**/3.bin", "--max-size", "50Ki"];
    let loaded = up.json(&[&["load", "data"][..], &selected].concat());
    assert_eq!((loaded["totalFiles"].as_u64(), loaded["doneFiles"].as_u64()), (Some(5), Some(5)));
    let refused = up.forebay(&["load", "data", "--include", "small/["]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("'small/['"), "{refused:?}");

    let loaded = up.json(&["load", "data", "/small"]);
    assert_eq!((loaded["totalFiles"].as_u64(), loaded["doneFiles"].as_u64()), (Some(60), Some(60)));
    let bytes: u64 = (0..60).map(|index| 1000 + 3000 * index).sum();
    assert_eq!(loaded["doneBytes"].as_u64(), Some(bytes));
    let gets = bench.store.counters().gets;
    assert_eq!(std::fs::read(bench.path("small/0/3.bin")).unwrap(), content::bytes(3, 10_000));
    assert_eq!(bench.store.counters().gets, gets, "a loaded file was fetched again");

    let stat = up.json(&["stat", "data", "/small/0/3.bin"]);
    assert_eq!((stat["size"].as_u64(), stat["cachedBytes"].as_u64()), (Some(10_000), Some(10_000)));

    let pinned = up.json(&["pin", "data", "/small/0"]);
    assert_eq!(pinned["finished"], true);
    let freed = up.json(&["free", "data", "/small"]);
    assert!(freed["pinnedBytesKept"].as_u64().unwrap() > 0);
    let status = up.status();
    let kept: u64 = (0..60).filter(|index| index % 3 == 0).map(|index| 1000 + 3000 * index).sum();
    assert_eq!(status["datasets"][0]["pinnedBytes"], kept);
    assert_eq!(status["datasets"][0]["cachedBytes"], kept);
    up.json(&["pin", "data", "/small/0", "--remove"]);
    up.json(&["free", "data"]);
    assert_eq!(up.status()["datasets"][0]["cachedBytes"], 0);

    let top = up.json(&["top", "--interval", "1", "--count", "1"]);
    assert_eq!(top["name"], "data");
    assert!(up.forebay(&["status"]).status.success());

    bench.store.put(BUCKET, "small/new", text("new")).await;
    let refreshed = up.json(&["refresh", "data"]);
    assert_eq!((refreshed["complete"].as_bool(), refreshed["changed"].as_u64()), (Some(true), Some(1)));
    support::eventually("the new file", Duration::from_secs(10), || bench.path("small/new").exists());
    assert_eq!(std::fs::read(bench.path("small/new")).unwrap(), b"new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_instance_is_cleaned_up_by_the_next() {
    if !can_mount() {
        return;
    }
    let Bench { store, dir, up } = Bench::start(Setup::default(), fill).await;
    std::fs::read(up.mount.join("small/0/0.bin")).unwrap();
    let mount = up.mount.clone();
    // A program still stands in the mount when everything dies.
    let held = std::fs::File::open(up.mount.join("large/shard")).unwrap();
    up.kill();
    assert!(support::is_mounted(&mount), "the kernel keeps the mount of a dead keeper");

    let gets = store.counters().gets;
    let again = Up::start(&dir.path().join("data.yaml"), dir.path(), &Setup::default().arguments);
    assert_eq!(support::mounts().iter().filter(|at| **at == mount).count(), 1, "the old mount is still there");
    let bench = Bench { store, dir, up: again };
    assert_eq!(std::fs::read(bench.path("small/0/0.bin")).unwrap(), content::bytes(0, 1000));
    assert_eq!(bench.store.counters().gets, gets, "the cache did not survive");
    drop(held);
    bench.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_do_not_share_a_state_directory() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let second = command()
        .args(["up", "--file"])
        .arg(bench.dir.path().join("data.yaml"))
        .arg("--mount")
        .arg(bench.dir.path().join("other"))
        .arg("--state-dir")
        .arg(&bench.up.state)
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("already running") && said.contains(&bench.up.pid().to_string()), "{said}");
    check_everything(&bench);
}

#[test]
fn verbs_without_an_instance_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for verb in [&["status"][..], &["ls", "data"], &["load", "data"], &["top"]] {
        let output = command().args(verb).arg("--state-dir").arg(dir.path()).output().unwrap();
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("forebay up"), "{verb:?}");
    }
}
