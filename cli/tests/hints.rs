//! What a program says that it will read is fetched ahead.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use forebay_test_instance::hint;
use rustix::{
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use support::{BUCKET, Bench, SHAPES, Setup, can_mount, content};

const FILES: u64 = 400;
const SIZE: usize = 30_000;

fn name(file: u64) -> String {
    format!("{}/a b {file} ü", file % 7)
}

/// An order in which nobody would read ahead.
fn order() -> impl Iterator<Item = u64> {
    (0..FILES).map(|at| (at * 149 + 31) % FILES)
}

async fn start(shape: &'static str) -> Bench {
    let setup = Setup { latency: Duration::from_millis(20), ..Setup::shaped(shape) };
    Bench::start(setup, async |store| {
        for file in 0..FILES {
            store.put(BUCKET, &name(file), content::bytes(file, SIZE)).await;
        }
        store.put_virtual(BUCKET, "large", 40 << 20, content::generator(9));
        store
    })
    .await
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn check(bench: &Bench, file: u64) {
    assert!(std::fs::read(bench.path(&name(file))).unwrap() == content::bytes(file, SIZE), "file {file}");
}

fn open(path: impl AsRef<Path>) -> File {
    File::open(path).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_announced_is_fetched_ahead_and_once() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let bench = start(shape).await;
        let root = open(&bench.up.mount);
        let names: Vec<String> = order().map(name).collect();
        // What is not there, and what is no file, is passed over.
        let wrong = ["none", "3", "../x", "1/none/y"];
        let all = wrong.into_iter().chain(names.iter().map(String::as_str));
        assert_eq!(hint(&root, all).unwrap(), wrong.len() + names.len());
        let gets = || bench.store.counters().gets;
        eventually("some are fetched before anybody reads", || gets() >= 64);
        std::thread::sleep(Duration::from_millis(500));
        assert!(gets() < 120, "{} for nobody: far too many", gets());
        // The last of them is not there yet, and read all the same.
        let last = order().last().unwrap();
        check(&bench, last);
        for file in order() {
            check(&bench, file);
        }
        assert_eq!(gets(), FILES, "{shape}: each once");
        // Below a directory, and from the root.
        let directory = open(bench.path("3"));
        assert_eq!(hint(&directory, ["/large"]).unwrap(), 1);
        eventually("the beginning of a large file", || gets() > FILES);
        let mut expected = vec![0; 1 << 20];
        content::generator(9)(0, &mut expected);
        assert!(std::fs::read(bench.path("large")).unwrap().starts_with(&expected));
        // Open directories keep a mount busy.
        drop((root, directory));
        bench.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_hint_is_refused_and_a_take_over_forgets_hints() {
    if !can_mount() {
        return;
    }
    let bench = start("Small").await;
    let file = open(bench.path(&name(0)));
    assert_eq!(hint(&file, ["x"]).unwrap_err().raw_os_error(), Some(Errno::NOTTY.raw_os_error()));
    let root = open(&bench.up.mount);
    // Many more than are kept: the first ones are taken.
    let many: Vec<String> = (0..FILES).cycle().take(100_000).map(name).collect();
    let taken = hint(&root, many.iter().map(String::as_str)).unwrap();
    assert!((65_536..70_000).contains(&taken), "{taken}");
    let daemon = bench.up.daemon();
    kill_process(Pid::from_raw(daemon.cast_signed()).unwrap(), Signal::KILL).unwrap();
    for file in order() {
        check(&bench, file);
    }
    // Its successor takes new ones.
    assert_eq!(hint(&root, [name(1).as_str()]).unwrap(), 1);
    drop((root, file));
    bench.stop();
}
