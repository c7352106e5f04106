//! A million files in a store: their index, walks over them, one directory of all of them, and what keeping up costs.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use forebay_test_store::{Counters, Options, TestStore, content};

use super::index;
use crate::{
    Bench,
    data::Set,
    job::Work,
    measure::Role,
    report::{Claim, Limit, Report},
    served::{BUCKET, Served, Setup},
};

const ROW: &str = "1,000,000 files in S3 at 20 ms";
const INDEX: Claim = Claim::new(ROW, "index: time, of 60 s", Limit::AtMost(1.0));
const DISK: Claim = Claim::new(ROW, "index: disk for an entry, of 130 B", Limit::AtMost(1.0));
const MEMORY: Claim = Claim::new(ROW, "index: memory for an entry, of 200 B", Limit::AtMost(1.0));
const FIRST: Claim = Claim::new(ROW, "find through the mount, first, of 60 s", Limit::AtMost(1.0));
const SECOND: Claim = Claim::new(ROW, "find through the mount, second, of the first", Limit::AtMost(0.5));
const REFRESH: Claim =
    Claim::new(ROW, "refresh of what did not change: requests, of a bare listing", Limit::AtMost(1.05));
const SEEN: Claim = Claim::new(ROW, "until a change is seen, of the interval (60 s)", Limit::AtMost(1.0));
const PAGE: Claim = Claim::new(
    "a directory of 1,000,000 entries in S3 at 20 ms",
    "until its first entries, of 1 s",
    Limit::AtMost(1.0),
);
/// What is claimed.
pub(super) const CLAIMS: [Claim; 8] = [INDEX, DISK, MEMORY, FIRST, SECOND, REFRESH, SEEN, PAGE];

const LATENCY: Duration = Duration::from_millis(20);
const SET: Set =
    Set { seed: 21, files: 1_000_000, directories: 1_000, smallest: 80 << 10, largest: 120 << 10, sparse: true };
/// Keys of a page of a listing.
const KEYS: u64 = 1000;
const WORKERS: u32 = 2;
const INTERVAL: u64 = 60;
const CHANGES: u64 = 3;
const MILLION: f64 = 1e6;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let wants = |claims: &[Claim]| claims.iter().any(|claim| bench.wants(claim));
    if wants(&[INDEX, DISK, MEMORY, FIRST, SECOND, REFRESH]) {
        tree(bench, report).await?;
    }
    if wants(&[SEEN]) {
        changes(bench, report).await?;
    }
    if wants(&[PAGE]) {
        one_directory(bench, report).await?;
    }
    Ok(())
}

async fn store(dir: &Path, set: &Set) -> TestStore {
    let store = TestStore::start(Options { latency: LATENCY, dir: Some(dir.to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    for file in 0..set.files {
        store.put_virtual(BUCKET, &set.path(file), set.size(file), content::generator(set.seed_of(file)));
    }
    store
}

fn memory(served: &Served) -> anyhow::Result<u64> {
    let workers = served.processes()?.into_iter().filter(|process| process.role == Role::Worker);
    Ok(workers.map(|worker| worker.rss).sum())
}

async fn tree(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let dir = bench.directory("million-s3")?;
    bench.say(format_args!("a store of {} files", set.files));
    let store = store(dir.path(), &set).await;
    // What workers take without an index.
    let empty = TestStore::start(Options { latency: LATENCY, dir: None }).await;
    empty.create_bucket(BUCKET).await;
    let other = bench.directory("million-none")?;
    let none = Served::start(bench, other.path(), setup(&empty)).await?;
    none.scanned().await?;
    let without = memory(&none)?;
    none.stop().await?;

    let began = Instant::now();
    let served = Served::start(bench, dir.path(), setup(&store)).await?;
    served.counted().await?;
    let seconds = began.elapsed().as_secs_f64();
    let lists = store.counters().lists;
    let with = memory(&served)?;
    bench.say(format_args!("indexed in {seconds:.1} s, by {lists} LISTs"));
    report.measured(
        &INDEX,
        seconds / 60.0 * MILLION / set.files as f64,
        true,
        format!("{seconds:.1} s from the start of {WORKERS} workers on; {lists} LISTs of 20 ms; {} files", set.files),
    );
    let each = with.saturating_sub(without) as f64 / set.files as f64;
    let detail = format!(
        "{each:.0} B: RSS of {WORKERS} workers, {:.0} MiB, less that without files, {:.0} MiB; the database's cache is in it",
        with as f64 / 1048576.0,
        without as f64 / 1048576.0
    );
    report.measured(&MEMORY, each / 200.0, true, detail);

    if bench.wants(&FIRST) || bench.wants(&SECOND) {
        let walk = || vec![Work::Walk { root: served.mount().to_owned(), set }];
        let first = served.pass(walk(), None).await?;
        let second = served.pass(walk(), None).await?;
        let wall = first.done.seconds;
        let detail = format!("{wall:.1} s, {} requests to the daemon; every entry is stat'ed", first.requests);
        report.measured(&FIRST, wall / 60.0 * MILLION / set.files as f64, true, detail);
        let again = second.done.seconds;
        report.measured(&SECOND, again / wall, true, format!("{again:.1} s, {} requests", second.requests));
    }
    if bench.wants(&REFRESH) {
        let before = store.counters();
        let began = Instant::now();
        served.refresh().await?;
        let seconds = began.elapsed().as_secs_f64();
        let Counters { gets, lists, heads, .. } = store.counters();
        let asked = [gets - before.gets, lists - before.lists, heads - before.heads];
        // Each directory's pages, and the root's.
        let least =
            set.directories * set.files.div_ceil(set.directories).div_ceil(KEYS) + set.directories.div_ceil(KEYS);
        let detail = format!("{asked:?} GET, LIST, HEAD; a bare listing has {least} pages; {seconds:.1} s");
        report.measured(&REFRESH, asked.iter().sum::<u64>() as f64 / least as f64, true, detail);
    }
    let state = served.state().to_owned();
    served.stop().await?;
    if bench.wants(&DISK) {
        let (disk, _) = index::usage(&state.join("runtimes"))?;
        let each = disk as f64 / set.files as f64;
        report.measured(&DISK, each / 130.0, true, format!("{each:.0} B: databases of {WORKERS} workers, {disk} B"));
    }
    Ok(())
}

fn setup(store: &TestStore) -> Setup<'_> {
    Setup { store: Some(store), workers: WORKERS, memory: 256, shape: "Small", node_cache: false, ..Setup::default() }
}

/// Overwrites files, one after the other, and waits until the mount shows it.
async fn changes(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let dir = bench.directory("million-sync")?;
    bench.say(format_args!("a store of {} files", set.files));
    let store = store(dir.path(), &set).await;
    let served = Served::start(bench, dir.path(), Setup { sync: Some(INTERVAL), ..setup(&store) }).await?;
    served.counted().await?;
    let mut longest = 0.0f64;
    for change in 1..=CHANGES {
        let file = set.files / (CHANGES + 1) * change;
        let path = served.mount().join(set.path(file));
        ensure!(std::fs::metadata(&path)?.len() == set.size(file), "{} has another size", path.display());
        let began = Instant::now();
        store.put_virtual(BUCKET, &set.path(file), set.size(file) + 1, content::generator(change));
        while std::fs::metadata(&path)?.len() != set.size(file) + 1 {
            ensure!(began.elapsed() < Duration::from_secs(5 * INTERVAL), "a change is not seen");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let seconds = began.elapsed().as_secs_f64();
        bench.say(format_args!("change {change} was seen after {seconds:.1} s"));
        longest = longest.max(seconds);
        // Not always at the same moment of a listing.
        tokio::time::sleep(Duration::from_secs(7 * change)).await;
    }
    let detail = format!("the longest of {CHANGES}: {longest:.1} s; {} files", set.files);
    report.measured(&SEEN, longest / INTERVAL as f64, true, detail);
    served.stop().await
}

async fn one_directory(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(SET.files), directories: 1, ..SET };
    let dir = bench.directory("million-one")?;
    bench.say(format_args!("a directory of {} files", set.files));
    let store = store(dir.path(), &set).await;
    let served = Served::start(bench, dir.path(), setup(&store)).await?;
    let below = std::fs::read_dir(served.mount())?.next().context("the directory")??.path();
    let began = Instant::now();
    let mut entries = std::fs::read_dir(&below)?;
    entries.next().context("an entry")??;
    let first = began.elapsed().as_secs_f64();
    let lists = store.counters().lists;
    let count = 1 + entries.count() as u64;
    ensure!(count == set.files, "{count} entries of {}", set.files);
    let all = began.elapsed().as_secs_f64();
    let detail =
        format!("{first:.3} s, {lists} LISTs by then; all {count} entries after {all:.1} s; right after the start");
    report.measured(&PAGE, first, true, detail);
    served.stop().await
}
