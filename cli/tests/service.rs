//! Volumes as a node plugin mounts them: workers found by a name, the key and the dataset's name in the configuration,
//! daemons without any privilege.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use forebay_test_store::{Action, Fault, Options, TestStore};
use support::{BUCKET, can_mount, content, eventually, node::Node};

const FILES: u64 = 300;
const SIZE: usize = 200_000;

async fn store(dir: &Path) -> TestStore {
    let store = TestStore::start(Options { dir: Some(dir.to_owned()), ..Options::default() }).await;
    store.create_bucket(BUCKET).await;
    for seed in 0..FILES {
        store.put(BUCKET, &format!("d{}/f{seed}", seed % 7), content::bytes(seed, SIZE)).await;
    }
    store
}

fn check(mount: &Path, seed: u64) {
    let path = mount.join(format!("d{}/f{seed}", seed % 7));
    let read = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(read.len(), SIZE);
    assert_eq!(content::difference(seed, 0, &read), None, "{}", path.display());
}

/// Programs that read file after file, uncached, until told to stop; an error is a panic.
struct Readers {
    stop: Arc<AtomicBool>,
    read: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    fn start(mount: &Path, count: u64) -> Self {
        let (stop, read) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let reader = |first: u64| {
            let (mount, stop, read): (PathBuf, _, _) = (mount.to_owned(), stop.clone(), read.clone());
            std::thread::spawn(move || {
                for step in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let seed = (first * 31 + step) % FILES;
                    let path = mount.join(format!("d{}/f{seed}", seed % 7));
                    check(&mount, seed);
                    // The next one comes from a worker again.
                    let file = std::fs::File::open(path).unwrap();
                    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                    read.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..count).map(reader).collect();
        Self { stop, read, threads }
    }

    fn progress(&self, files: u64) {
        let before = self.read.load(Ordering::Relaxed);
        eventually("readers go on", Duration::from_secs(60), || self.read.load(Ordering::Relaxed) >= before + files);
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_found_by_name_and_may_come_late_and_change() {
    if !can_mount() {
        return;
    }
    let mut node = Node::start();
    let store = store(node.dir.path()).await;
    assert!(node.get(0, "/readyz").starts_with("HTTP/1.1 200"), "a keeper is connected");
    // There is a worker, but nobody knows the table yet; a mount does not wait for that.
    node.add_worker(&store);
    let mount = node.mount(Duration::from_secs(20));
    let early = {
        let mount = mount.clone();
        std::thread::spawn(move || check(&mount, 1))
    };
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!early.is_finished());
    node.add_worker(&store);
    node.publish(&[0, 1]);
    early.join().unwrap();
    node.expect_health("Healthy", "");

    let readers = Readers::start(&mount, 4);
    readers.progress(50);
    node.add_worker(&store);
    node.publish(&[0, 1, 2]);
    let serving = |node: &Node| node.get(0, "/metrics") + &node.get(1, "/metrics");
    let epoch = |epoch: u64| format!("forebay_fuse_table_epoch{{volume=\"volume\",dataset=\"default/data\"}} {epoch}");
    eventually("the table of three", Duration::from_secs(20), || serving(&node).contains(&epoch(2)));
    // And back, without the worker that the name leads to: members are asked, not the name.
    readers.progress(100);
    node.publish(&[1, 2]);
    eventually("the table without the first", Duration::from_secs(20), || serving(&node).contains(&epoch(3)));
    node.kill_worker(0);
    readers.progress(100);
    // A successor knows neither the table nor the dataset but by what it found itself, before it was needed.
    let before = node.kill_active();
    eventually("a successor", Duration::from_secs(10), || node.volume().daemon.is_some_and(|pid| pid != before));
    node.spawn_daemon();
    readers.progress(100);
    readers.end();

    let successor = if node.volume().daemon == Some(node.pid(0)) { 0 } else { 1 };
    let metrics = node.get(successor, "/metrics") + &node.get(2, "/metrics");
    for line in ["forebay_fuse_memory_budget_bytes 67108864", "forebay_fuse_volumes 1", "forebay_fuse_volumes 0"] {
        assert!(metrics.lines().any(|found| found == line), "{line} in {metrics}");
    }
    // Whatever was logged, at the highest level, and whatever is shown.
    let shown = node.logs() + &metrics + &format!("{:?}", node.keeper().status().unwrap());
    assert!(shown.contains("worker table") && !shown.contains(&node.key()));
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_serve_on_without_a_keeper_and_tell_the_next_one_all_it_needs() {
    if !can_mount() {
        return;
    }
    let mut node = Node::start();
    let store = store(node.dir.path()).await;
    node.add_worker(&store);
    node.publish(&[0]);
    let mount = node.mount(Duration::from_secs(20));
    node.expect_health("Healthy", "");
    let readers = Readers::start(&mount, 2);
    readers.progress(10);
    node.stop_keeper();
    eventually("daemons that say so", Duration::from_secs(5), || node.get(0, "/readyz").starts_with("HTTP/1.1 503"));
    assert!(node.get(0, "/readyz").ends_with("no keeper is connected\n"));
    assert!(node.get(0, "/healthz").starts_with("HTTP/1.1 200"));
    readers.progress(50);
    node.start_keeper();
    eventually("daemons that are back", Duration::from_secs(10), || node.get(1, "/readyz").starts_with("HTTP/1.1 200"));
    node.expect_health("Healthy", "");
    assert_eq!(node.volume().takeovers, 0, "the one that served serves on");
    readers.progress(50);
    readers.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_what_is_away() {
    if !can_mount() {
        return;
    }
    let mut node = Node::start();
    let store = store(node.dir.path()).await;
    node.add_worker(&store);
    node.add_worker(&store);
    node.publish(&[0, 1]);
    let mount = node.mount(Duration::from_secs(2));
    assert!(node.volume().health.is_none(), "nothing is known yet");
    node.expect_health("Healthy", "");
    check(&mount, 0);

    node.kill_worker(1);
    let health = node.expect_health("Degraded", "WorkersUnavailable");
    assert!(health.message.starts_with("1 of 2 workers do not answer: w-1: "), "{}", health.message);
    node.start_worker(1);
    node.expect_health("Healthy", "");

    let fault = store.faults().add(Fault::new(Action::Status(503)));
    assert!(std::fs::read(mount.join("d1/f1")).is_err());
    let health = node.expect_health("Degraded", "SourceUnavailable");
    assert!(health.message.starts_with("the source has a problem: "), "{}", health.message);
    check(&mount, 0);
    store.faults().remove(fault);
    node.expect_health("Healthy", "");

    node.kill_worker(0);
    node.kill_worker(1);
    node.expect_health("Inaccessible", "NoWorker");
    let error = std::fs::read(mount.join("d2/f2")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    node.start_worker(0);
    node.start_worker(1);
    node.expect_health("Healthy", "");
    check(&mount, 3);

    node.kill_daemons();
    let health = node.expect_health("Inaccessible", "NoDaemon");
    assert!(health.message.contains("FUSE daemon"), "{}", health.message);
    node.spawn_daemon();
    node.expect_health("Healthy", "");
    check(&mount, 4);
}
