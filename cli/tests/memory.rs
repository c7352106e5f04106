//! A daemon in a control group of 256 MiB, under many readers of large files and a walk of many names; and one that the
//! kernel kills for its memory.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use forebay_test_store::TestStore;
use support::{
    BUCKET, Bench, Setup, can_mount, content,
    readers::{Kind, Readers, Target},
};

const LIMIT: u64 = 256 << 20;
const READERS: u64 = 64;
const SIZE: u64 = 4 << 20;
/// Names in each of a hundred directories.
fn names() -> u64 {
    if support::long() { 10_000 } else { 200 }
}

/// A control group for memory; it is removed when it is dropped.
struct Group(PathBuf);

impl Group {
    /// `None` where there is no memory controller for us: version 1 and 2 are known.
    fn new(name: &str, limit: u64) -> Option<Self> {
        let name = format!("forebay-test-{}-{name}", std::process::id());
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let group = Path::new(root).join(&name);
            if Path::new(root).exists() && fs::create_dir(&group).is_ok() {
                let group = Self(group);
                if fs::write(group.0.join(file), limit.to_string()).is_ok() {
                    return Some(group);
                }
            }
        }
        eprintln!("skipped: no control group for memory can be made here");
        None
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Processes that were killed for this group's limit.
    fn killed(&self) -> u64 {
        let text =
            ["memory.oom_control", "memory.events"].iter().find_map(|file| fs::read_to_string(self.0.join(file)).ok());
        let text = text.unwrap();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap().parse().unwrap()
    }

    /// The most that it ever had, in MiB.
    fn peak(&self) -> u64 {
        let files = ["memory.max_usage_in_bytes", "memory.peak"];
        let text = files.iter().find_map(|file| fs::read_to_string(self.0.join(file)).ok());
        text.map_or(0, |text| text.trim().parse::<u64>().unwrap() >> 20)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever is still in it goes to the group above.
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            let _ = fs::write(self.0.with_file_name("cgroup.procs"), pid);
        }
        support::eventually("the control group is gone", Duration::from_secs(10), || {
            !self.0.exists() || fs::remove_dir(&self.0).is_ok()
        });
    }
}

async fn fill(store: TestStore) -> TestStore {
    for seed in 0..READERS {
        store.put_virtual(BUCKET, &format!("large/{seed}"), SIZE, content::generator(seed));
    }
    for directory in 0..100 {
        for name in 0..names() {
            let key = format!("names/{directory:02}/image-{name:08}.jpg");
            store.put_virtual(BUCKET, &key, 100_000, content::generator(name));
        }
    }
    store
}

fn daemons(bench: &Bench) -> Vec<u32> {
    let status = bench.up.status();
    let pids = status["daemons"].as_array().unwrap().iter().filter_map(|daemon| daemon["pid"].as_u64());
    pids.map(|pid| u32::try_from(pid).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_stays_within_256_mib_and_is_replaced_when_it_does_not() {
    if !can_mount() {
        return;
    }
    let (Some(group), Some(none)) = (Group::new("daemons", LIMIT), Group::new("none", 4096)) else { return };
    // The budget that a daemon gives itself in a container of this size. Without a node cache it has to work for each read.
    let arguments = ["--memory", "64", "--deadline", "60", "--node-cache", "0"].map(str::to_owned).to_vec();
    let bench = Bench::start(Setup { shape: "Large", arguments, ..Setup::default() }, fill).await;
    for pid in daemons(&bench) {
        group.take(pid);
    }
    let kinds = [Kind::Buffered, Kind::Direct, Kind::Mmap, Kind::KeptOpen];
    let work = (0..READERS).map(|seed| {
        let target = Target { path: bench.path(&format!("large/{seed}")), size: SIZE, seed };
        (kinds[seed as usize % kinds.len()], target)
    });
    let readers = Readers::start(work.collect());
    let walked = {
        let root = bench.path("names");
        tokio::task::spawn_blocking(move || {
            let directories = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
            let sizes = directories.flat_map(|directory| fs::read_dir(directory).unwrap());
            sizes
                .map(|entry| entry.unwrap().metadata().unwrap().len())
                .map(|size| (1, size))
                .fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
        })
    };
    assert_eq!(walked.await.unwrap(), (100 * names(), 100 * names() * 100_000));
    readers.progress(64 << 20, Duration::from_secs(300));
    println!("{} names, {READERS} readers: the group of the daemons had {} MiB at most", 100 * names(), group.peak());
    assert_eq!(group.killed(), 0);

    // Now it gets no memory at all.
    let doomed = bench.up.daemon();
    none.take(doomed);
    support::eventually("the daemon is killed for its memory", Duration::from_secs(60), || none.killed() > 0);
    readers.progress(64 << 20, Duration::from_secs(300));
    assert_ne!(bench.up.daemon(), doomed);
    let report = readers.finish();
    println!("longest read {:?}", report.longest);
    assert_eq!(report.errors, Vec::<String>::new());
    assert_eq!(group.killed(), 0);
    bench.stop();
}
