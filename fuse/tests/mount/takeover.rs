//! Daemons die while programs read.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use forebay_keeper::tables::Counter;
use rustix::process::Signal;

use crate::rig::{LEAVE_PATIENCE, Line, Rig, can_mount, expected, read_mapped, size_of_many};

const BIG: u64 = 8 * 1024 * 1024 + 77;
const FILES: u64 = 200;
const PASSED: u64 = 12;
const PASSED_SIZE: u64 = (2 << 20) + 11;

/// Threads that read and verify until they are told to stop. Any error is a panic.
struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    longest_ms: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Readers {
    fn start(rig: &Rig) -> Self {
        let mut readers =
            Self { stop: Arc::default(), reads: Arc::default(), longest_ms: Arc::default(), threads: Vec::new() };
        let big = rig.at("big.bin");
        // Past the page cache, where no error can hide behind a retry of read-ahead.
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&big).unwrap();
        readers.spawn(move |step| read_some(&direct, step));
        // Through it, dropped before each round.
        let buffered = File::open(&big).unwrap();
        readers.spawn(move |step| {
            if step % 50 == 0 {
                rustix::fs::fadvise(&buffered, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            }
            read_some(&buffered, step);
        });
        let mapped = big.clone();
        readers.spawn(move |step| {
            let from = (step * 1_299_709 % BIG) & !4095;
            read_mapped(&mapped, 1, from, (64 * 1024).min((BIG - from) as usize));
        });
        // Open, read, close, stat of many small files.
        let many = rig.at("many");
        readers.spawn(move |step| {
            let number = step * 7_919 % FILES;
            let path = many.join(format!("{number:06}"));
            let file = File::open(&path).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            assert!(fs::read(&path).unwrap() == expected(number, 0, size_of_many(number) as usize));
            assert_eq!(fs::metadata(&path).unwrap().len(), size_of_many(number));
        });
        readers
    }

    fn spawn(&mut self, mut read: impl FnMut(u64) + Send + 'static) {
        let (stop, reads, longest) = (self.stop.clone(), self.reads.clone(), self.longest_ms.clone());
        self.threads.push(thread::spawn(move || {
            let mut step = 0;
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                read(step);
                longest.fetch_max(start.elapsed().as_millis() as u64, Ordering::Relaxed);
                reads.fetch_add(1, Ordering::Relaxed);
                step += 1;
            }
        }));
    }

    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        (self.reads.load(Ordering::Relaxed), self.longest_ms.load(Ordering::Relaxed))
    }
}

fn read_some(file: &File, step: u64) {
    let offset = step * 1_299_709 % BIG;
    let mut buffer = vec![0; 200_000];
    let got = file.read_at(&mut buffer, offset).unwrap();
    assert_eq!(got, buffer.len().min((BIG - offset) as usize));
    assert!(buffer[..got] == expected(1, offset, got), "wrong bytes at {offset}");
}

fn lines() -> Vec<Line> {
    vec![
        Line::Put("/big.bin".to_owned(), 1, BIG),
        Line::Many("/many".to_owned(), FILES),
        // So that requests are in flight when a daemon dies.
        Line::Latency(1_000),
    ]
}

#[test]
fn killed_again_and_again_under_readers() {
    if can_mount() {
        let rig = Rig::new(&lines());
        let readers = Readers::start(&rig);
        killed_again_and_again(rig, readers);
    }
}

#[test]
fn killed_again_and_again_under_readers_of_small_files() {
    if can_mount() {
        let rig = Rig::new(&[lines(), vec![Line::Small]].concat());
        let readers = Readers::start(&rig);
        killed_again_and_again(rig, readers);
    }
}

/// Files come into the node cache, and are opened in both ways, while daemons die.
#[test]
fn killed_again_and_again_under_readers_of_passed_files() {
    if !can_mount() {
        return;
    }
    let passed = (0..PASSED).map(|number| Line::Put(format!("/passed/{number}"), number, PASSED_SIZE));
    let rig = Rig::with_node_cache(&lines().into_iter().chain(passed).collect::<Vec<_>>());
    let mut readers = Readers::start(&rig);
    let directory = rig.at("passed");
    readers.spawn(move |step| {
        let number = step * 7 % PASSED;
        let path = directory.join(number.to_string());
        let file = File::open(&path).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(fs::read(&path).unwrap() == expected(number, 0, PASSED_SIZE as usize), "wrong bytes");
    });
    let held = rig.at("passed/0");
    readers.spawn(move |step| read_mapped(&held, 0, step % 256 * 4096, 64 * 1024));
    killed_again_and_again(rig, readers);
}

fn killed_again_and_again(mut rig: Rig, readers: Readers) {
    const KILLS: u64 = 100;
    let (mut hit, mut slowest) = (0, 0);
    for kill in 0..KILLS {
        thread::sleep(Duration::from_millis(5 + kill * 7 % 20));
        let resent = rig.counter(Counter::Resent);
        let before = rig.signal(Signal::KILL);
        rig.wait_for_successor(before);
        slowest = slowest.max(rig.status().volume("test").unwrap().last_takeover_millis.unwrap_or(0));
        rig.spawn();
        rig.wait(|status| status.daemons.len() == 2);
        hit += u64::from(rig.counter(Counter::Resent) > resent);
    }
    let (reads, longest) = readers.finish();
    println!(
        "{KILLS} kills, {hit} with requests in flight, {reads} reads, longest {longest} ms, take-over {slowest} ms, {} silent",
        rig.status().kills_silent
    );
    assert!(hit >= KILLS / 2, "only {hit} of {KILLS} kills met a request");
    assert!(reads > KILLS);
    assert_eq!(rig.counter(Counter::Errors), 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = rig.root();
    assert_eq!(mounts.lines().filter(|line| line.contains(root.to_str().unwrap())).count(), 1);
}

#[test]
fn a_stopped_daemon_is_replaced() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(&lines());
    let readers = Readers::start(&rig);
    for _ in 0..2 {
        thread::sleep(Duration::from_millis(100));
        let before = rig.signal(Signal::STOP);
        rig.wait_for_successor(before);
        rig.spawn();
        rig.wait(|status| status.daemons.len() == 2);
    }
    let status = rig.status();
    assert_eq!(status.kills_silent, 2);
    let (_, longest) = readers.finish();
    assert!(longest < 10_000, "{longest} ms");
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn a_terminated_daemon_hands_over() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(&lines());
    let readers = Readers::start(&rig);
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(50));
        let before = rig.signal(Signal::TERM);
        rig.wait_for_successor(before);
        rig.spawn();
        rig.wait(|status| status.daemons.len() == 2);
    }
    let status = rig.status();
    assert_eq!((status.kills_silent, status.kills_other), (0, 0));
    let (_, longest) = readers.finish();
    assert!(longest < 5_000, "{longest} ms");
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn nobody_serves_for_a_while() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(&lines());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(rig.at("big.bin")).unwrap();
    read_some(&file, 1);
    let first = rig.signal(Signal::KILL);
    rig.wait_for_successor(first);
    rig.signal(Signal::KILL);
    rig.wait(|status| status.daemons.is_empty());
    let reader = thread::spawn(move || read_some(&file, 2));
    thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished());
    rig.spawn();
    reader.join().unwrap();
}

#[test]
fn the_keeper_leaves_and_daemons_serve_on() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(&lines());
    let readers = Readers::start(&rig);
    for round in 0..6u64 {
        let before = rig.wait(|status| status.volume("test").unwrap().holders == 2).active().unwrap();
        let read = readers.reads.load(Ordering::Relaxed);
        rig.keeper_leaves();
        // Served without a keeper; and by a daemon that was told to end, until there is one.
        if round % 2 == 1 {
            rustix::process::kill_process(rustix::process::Pid::from_raw(before).unwrap(), Signal::TERM).unwrap();
        }
        thread::sleep(Duration::from_millis(200));
        assert!(rig.runs(before));
        assert!(readers.reads.load(Ordering::Relaxed) > read);
        rig.start_keeper();
        if round % 2 == 1 {
            rig.wait_for_successor(before);
            rig.spawn();
        } else {
            let status = rig.wait(|status| status.volume("test").unwrap().daemon.is_some());
            assert_eq!((status.active(), status.volume("test").unwrap().takeovers), (Some(before), 0));
        }
    }
    let status = rig.wait(|status| status.volume("test").unwrap().holders == 2);
    assert_eq!((status.kills_silent, status.kills_other), (0, 0));
    let (reads, longest) = readers.finish();
    println!("6 keepers, {reads} reads, longest {longest} ms");
    assert!(longest < 5_000, "{longest} ms");
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn without_a_keeper_a_daemon_that_is_to_end_does_so_after_its_patience() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(&lines());
    let status = rig.wait(|status| status.volume("test").unwrap().holders == 2);
    let pids: Vec<i32> = status.daemons.iter().map(|daemon| daemon.pid).collect();
    rig.keeper_leaves();
    let start = Instant::now();
    for pid in &pids {
        rustix::process::kill_process(rustix::process::Pid::from_raw(*pid).unwrap(), Signal::TERM).unwrap();
    }
    while pids.iter().any(|pid| rig.runs(*pid)) {
        assert!(start.elapsed() < LEAVE_PATIENCE * 4);
        thread::sleep(Duration::from_millis(20));
    }
    assert!(start.elapsed() >= LEAVE_PATIENCE, "{:?}", start.elapsed());
    // Nobody is left: an error, and no wait.
    let big = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(rig.at("big.bin"));
    assert!(big.is_err());
    rig.start_keeper();
}
