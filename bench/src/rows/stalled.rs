//! Cached data while a source sends nothing.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use forebay_test_store::{Action, Fault, FaultId, Options, TestStore, Verb, content};
use tokio::time::{Instant, sleep};

use crate::{
    Bench,
    data::Set,
    job::{self, Latencies, Work},
    report::{Claim, Limit, Report, median},
    rounds::ROUNDS,
    served::{BUCKET, Served, Setup},
};

const READS: Claim = Claim::new("a source that stalls", "p99 of cached reads, of that without", Limit::AtMost(2.0));
const LISTS: Claim = Claim::new("a source that stalls", "p99 of `ls`, of that without", Limit::AtMost(2.0));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 2] = [READS, LISTS];

/// What is cached, below `near/`.
const SET: Set = Set { seed: 11, files: 2000, directories: 20, smallest: 80 << 10, largest: 120 << 10, sparse: false };
const READERS: u64 = 4;
/// Of one round with, and of one without.
const LASTING: Duration = Duration::from_secs(10);
/// Bodies that stall, below `far/`: large files, each read by a program of its own.
const STALLED: u64 = 32;
const FAR: u64 = 256 << 20;
/// Longer than anything here.
const STALL: Duration = Duration::from_secs(600);
/// How long it may take until all of them wait.
const WAITING: Duration = Duration::from_secs(20);

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let dir = bench.directory("stalled")?;
    let store = TestStore::start(Options { latency: Duration::ZERO, dir: Some(dir.path().to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    for file in 0..set.files {
        let key = format!("near/{}", set.path(file));
        store.put_virtual(BUCKET, &key, set.size(file), content::generator(set.seed_of(file)));
    }
    let far = |file: u64| format!("far/f{file:02}.bin");
    for file in 0..STALLED {
        store.put_virtual(BUCKET, &far(file), FAR, content::generator(file));
    }
    // Workers answer the reads, and not this node.
    let setup = Setup { store: Some(&store), node_cache: false, shape: "Large", ..Setup::default() };
    let served = Served::start(bench, dir.path(), setup).await?;
    served.load_below("/near").await?;
    let near = served.mount().join("near");
    bench.say("checking every byte of what is cached through the mount");
    let all = Work::Files { root: near.clone(), set, first: 0, step: 1, threads: READERS, verify: true };
    job::run(all, None).await?;

    let measured = Work::Latencies { root: near, set, readers: READERS, lasting: LASTING };
    let latencies = async || -> anyhow::Result<Latencies> {
        job::run(measured.clone(), None).await?.latencies.context("a reader told no latencies")
    };
    latencies().await?;
    let files: Vec<_> = (0..STALLED).map(|file| served.mount().join(far(file))).collect();
    let stall = Action::StallBody { after: 4096, stall: STALL };
    let stalled = store.faults().add(Fault::new(stall).on(Verb::Get).key("far/"));
    let (mut reads, mut lists, mut told) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let without = latencies().await?;
        let waiting = job::start(Work::Await { files: files.clone() }, None).await?;
        all_wait(&store, stalled, u64::from(round) * STALLED).await?;
        let with = latencies().await?;
        drop(waiting);
        let text = format!(
            "reads {:.1} / {:.1} ms, `ls` {:.1} / {:.1} ms",
            without.reads * 1e3,
            with.reads * 1e3,
            without.lists * 1e3,
            with.lists * 1e3
        );
        bench.say(format_args!("{}, round {round}, p99 without / with: {text}", READS.row));
        reads.push(with.reads / without.reads);
        lists.push(with.lists / without.lists);
        told.push(text);
    }
    let detail = format!(
        "{READERS} readers of {} files (O_DIRECT, from workers) and one that lists their directories, for {LASTING:?}; \
         with and without {STALLED} readers of files whose bodies stop after 4 KiB; p99 without / with: {}",
        set.files,
        told.join("; ")
    );
    report.measured(&READS, median(reads), true, detail.clone());
    report.measured(&LISTS, median(lists), true, detail);
    store.faults().clear();
    served.stop().await
}

/// Waits until so many bodies have stalled.
async fn all_wait(store: &TestStore, stalled: FaultId, bodies: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + WAITING;
    while store.faults().hits(stalled) < bodies {
        let hits = store.faults().hits(stalled);
        ensure!(Instant::now() < deadline, "{hits} of {bodies} bodies stalled within {WAITING:?}");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
