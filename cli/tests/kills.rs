//! kill -9 and SIGSTOP of what serves a mount, under readers: a pause, never an error.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{
    BUCKET, Bench, SHAPES, Setup, can_mount, content,
    readers::{Kind, Readers, Target},
};

const SIZE: u64 = 48 << 20;

/// Four files, so that each kind of reader has its own pages.
async fn fill(store: forebay_test_store::TestStore) -> forebay_test_store::TestStore {
    for seed in 1..=4 {
        store.put_virtual(BUCKET, &format!("file-{seed}"), SIZE, content::generator(seed));
    }
    store
}

fn all_kinds(bench: &Bench) -> Readers {
    let kinds = [Kind::Buffered, Kind::Direct, Kind::Mmap, Kind::KeptOpen];
    let work = kinds
        .into_iter()
        .zip(1..)
        .map(|(kind, seed)| (kind, Target { path: bench.path(&format!("file-{seed}")), size: SIZE, seed }));
    Readers::start(work.collect())
}

fn resent(bench: &Bench) -> u64 {
    bench.up.status()["mounts"][0]["resent"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_is_killed_a_hundred_times_under_readers() {
    if !can_mount() {
        return;
    }
    let kills = if support::long() { 1000 } else { 50 };
    // Without a node cache every read needs a daemon; with one, files are passed through while daemons die.
    for (shape, node_cache) in [("Large", "0"), ("Small", "0"), ("Large", "1Gi")] {
        let arguments = ["--deadline", "20", "--node-cache", node_cache].map(str::to_owned).to_vec();
        let bench = Bench::start(Setup { arguments, ..Setup::shaped(shape) }, fill).await;
        let readers = all_kinds(&bench);
        readers.progress(4 << 20, Duration::from_secs(60));
        let mut met = 0;
        let mut pauses = Vec::new();
        for _ in 0..kills {
            let before = resent(&bench);
            let pid = bench.up.daemon();
            let begun = Instant::now();
            support::signal(pid, Signal::KILL);
            readers.progress(1 << 20, Duration::from_secs(60));
            pauses.push(begun.elapsed());
            met += u64::from(resent(&bench) > before);
        }
        let report = readers.finish();
        pauses.sort();
        println!(
            "{shape}, node cache {node_cache}: {kills} kills, {met} met requests in flight; a MiB later after {:?} (median), {:?} (longest); {} MiB read, \
             longest read {:?}",
            pauses[pauses.len() / 2],
            pauses[pauses.len() - 1],
            report.bytes >> 20,
            report.longest
        );
        assert_eq!(report.errors, Vec::<String>::new());
        assert!(met * 2 >= kills, "only {met} of {kills} kills met a request: this proves too little");
        // Other tests mount meanwhile: only what is below this one's directory counts.
        let own = support::mounts().iter().filter(|mount| mount.starts_with(bench.dir.path())).count();
        assert_eq!(own, 1, "the mount table grew");
        bench.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_has_cached_survives_a_takeover() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let bench = Bench::start(Setup::shaped(shape), fill).await;
        let reads = || bench.up.status()["mounts"][0]["counters"]["read"].as_u64().unwrap();
        let path = bench.path("file-1");
        assert_eq!(content::difference(1, 0, &std::fs::read(&path).unwrap()), None);
        // A machine that reclaims idle pages leaves locked ones; a take-over that dropped pages would drop these too.
        let _locked = support::lock_pages(&path);
        let before = reads();
        let pid = bench.up.daemon();
        support::signal(pid, Signal::KILL);
        support::eventually("a take-over", Duration::from_secs(20), || bench.up.daemon() != pid);
        // The successor expires all names, so this asks for the name again, and for nothing else.
        support::eventually("the expiry", Duration::from_secs(20), || {
            bench.up.status()["mounts"][0]["counters"]["expired"].as_u64() >= Some(2)
        });
        assert_eq!(content::difference(1, 0, &std::fs::read(&path).unwrap()), None);
        assert_eq!(reads() - before, 0, "reads were made again: the take-over dropped the pages");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_successor_is_killed_while_it_takes_over() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let bench = Bench::start(Setup::shaped(shape), fill).await;
        let readers = all_kinds(&bench);
        readers.progress(4 << 20, Duration::from_secs(60));
        for _ in 0..5 {
            let status = bench.up.status();
            let daemons = status["daemons"].as_array().unwrap().clone();
            for daemon in daemons.iter().filter_map(|daemon| daemon["pid"].as_u64()) {
                support::signal(u32::try_from(daemon).unwrap(), Signal::KILL);
                std::thread::sleep(Duration::from_millis(5));
            }
            readers.progress(1 << 20, Duration::from_secs(60));
        }
        assert_eq!(readers.finish().errors, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_daemon_is_replaced_and_its_return_does_no_harm() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let bench = Bench::start(Setup::shaped(shape), fill).await;
        let readers = all_kinds(&bench);
        readers.progress(4 << 20, Duration::from_secs(60));
        for round in 0..3u32 {
            let pid = bench.up.daemon();
            support::signal(pid, Signal::STOP);
            // A SIGCONT at any moment: before it is missed, while it is being killed, and long after.
            std::thread::sleep(Duration::from_millis(u64::from(round) * 1700));
            support::signal(pid, Signal::CONT);
            support::signal(pid, Signal::STOP);
            readers.progress(1 << 20, Duration::from_secs(60));
            support::eventually("the end of the stopped daemon", Duration::from_secs(30), || !support::is_alive(pid));
            assert_ne!(bench.up.daemon(), pid);
        }
        assert_eq!(readers.finish().errors, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_killed_stopped_and_restarted_in_mid_read() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let readers = all_kinds(&bench);
    readers.progress(4 << 20, Duration::from_secs(60));
    for round in 0..6 {
        let pids: Vec<u32> = bench.up.workers().into_iter().flatten().collect();
        let pid = pids[round % pids.len()];
        if round % 2 == 0 {
            support::signal(pid, Signal::KILL);
            readers.progress(8 << 20, Duration::from_secs(60));
        } else {
            support::signal(pid, Signal::STOP);
            readers.progress(8 << 20, Duration::from_secs(60));
            support::signal(pid, Signal::CONT);
        }
        support::eventually("all workers", Duration::from_secs(30), || bench.up.workers().iter().all(Option::is_some));
    }
    assert_eq!(readers.finish().errors, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_workers_reads_fail_by_their_deadline_and_recover() {
    if !can_mount() {
        return;
    }
    let setup =
        Setup { arguments: ["--deadline", "4", "--node-cache", "0"].map(str::to_owned).to_vec(), ..Setup::default() };
    let bench = Bench::start(setup, fill).await;
    let path = bench.path("file-1");
    let file = support::readers::open(&path, true).unwrap();
    let pids: Vec<u32> = bench.up.workers().into_iter().flatten().collect();
    for pid in &pids {
        support::signal(*pid, Signal::STOP);
    }
    let begun = Instant::now();
    let error = std::os::unix::fs::FileExt::read_at(&file, &mut vec![0; 1 << 20], 0).unwrap_err();
    let took = begun.elapsed();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    // A bound for a wait: the deadline is 4 s, twice that with everything else a busy machine does.
    assert!(took < Duration::from_secs(20), "EIO came after {took:?}");
    for pid in pids {
        support::signal(pid, Signal::CONT);
    }
    support::eventually("recovery", Duration::from_secs(30), || {
        let mut buffer = vec![0; 1 << 20];
        std::os::unix::fs::FileExt::read_at(&file, &mut buffer, 0)
            .is_ok_and(|count| content::difference(1, 0, &buffer[..count]).is_none())
    });
}
