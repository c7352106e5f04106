//! Names and attributes of 100,000 entries, and what a million of them cost a daemon.

use std::cell::RefCell;

use crate::{
    Bench,
    data::Set,
    job::{self, Work},
    measure::{self, Role},
    report::{Claim, Limit, Report},
    rounds::Rounds,
    served::{self, Served, Setup},
};

const ROW: &str = "walk + stat of 100,000 entries";
const FIRST: Claim = Claim::new(ROW, "first, CPU", Limit::AtMost(3.5));
const SECOND: Claim = Claim::new(ROW, "second, CPU", Limit::AtMost(1.2));
const RESIDENT: Claim =
    Claim::new("walk + stat of 1,000,000 files", "RSS of the daemon, of 160 MiB", Limit::AtMost(1.0));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 3] = [FIRST, SECOND, RESIDENT];

const SET: Set = Set { seed: 3, files: 99_800, directories: 200, smallest: 80 << 10, largest: 120 << 10, sparse: true };
/// One directory for a thousand of them.
const MILLION: Set = Set { files: 1_000_000, directories: 1_000, ..SET };
/// RSS of a daemon that has shown them, in bytes.
const MOST_RESIDENT: f64 = (160 << 20) as f64;
/// More than the kernel's caches of 100,000 names and inodes take.
const MEMORY: u64 = 1 << 29;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    if bench.wants(&FIRST) || bench.wants(&SECOND) {
        walks(bench, report).await?;
    }
    if bench.wants(&RESIDENT) {
        resident(bench, report).await?;
    }
    Ok(())
}

async fn resident(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(MILLION.files), ..MILLION };
    let dir = bench.directory("million")?;
    bench.say(format_args!("writing {} files to walk over", set.files));
    job::run(Work::WriteSet { root: served::source(dir.path())?, set }, None).await?;
    let served = Served::start(bench, dir.path(), Setup { shape: "Small", ..Setup::default() }).await?;
    served.scanned().await?;
    let pass = served.pass(vec![Work::Walk { root: served.mount().to_owned(), set }], None).await?;
    let daemons = pass.processes.iter().filter(|process| process.role == Role::Daemon);
    let most = daemons.map(|process| process.peak).max().unwrap_or_default() as f64;
    let detail = format!("{:.1} MiB after {} files; wall {:.1} s", most / 1048576.0, set.files, pass.done.seconds);
    report.measured(&RESIDENT, most / MOST_RESIDENT, true, detail);
    served.stop().await
}

async fn walks(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let dir = bench.directory("walk")?;
    let local = served::source(dir.path())?;
    bench.say("writing the files to walk over");
    job::run(Work::WriteSet { root: local.clone(), set }, None).await?;
    let served = Served::start(bench, dir.path(), Setup { shape: "Small", ..Setup::default() }).await?;
    served.scanned().await?;
    let cpu = Some(bench.cpu);
    let direct = Work::Walk { root: local, set };
    let mounted = Work::Walk { root: served.mount().to_owned(), set };
    // Workers have listed everything before the first pass that counts.
    job::run(mounted.clone(), None).await?;
    // Each cold walk is followed by a warm one; the warm ones are compared afterwards.
    let warm = RefCell::new((Vec::new(), Vec::new()));
    let first = Rounds::run(
        bench,
        "first walk",
        async || {
            measure::forget(MEMORY).await?;
            let cold = served::direct(vec![direct.clone()], cpu).await?;
            let again = served::direct(vec![direct.clone()], cpu).await?;
            warm.borrow_mut().0.push(again);
            Ok(cold)
        },
        async || {
            measure::forget(MEMORY).await?;
            let cold = served.pass(vec![mounted.clone()], cpu).await?;
            let again = served.pass(vec![mounted.clone()], cpu).await?;
            warm.borrow_mut().1.push(again);
            Ok(cold)
        },
    )
    .await?;
    let (direct, mounted) = warm.into_inner();
    let second = Rounds::of(direct, mounted);
    if bench.wants(&FIRST) {
        report.measured(&FIRST, first.cpu(), true, format!("both after drop_caches; {}", first.detail()));
    }
    if bench.wants(&SECOND) {
        report.measured(&SECOND, second.cpu(), true, format!("both right after the first; {}", second.detail()));
    }
    served.stop().await
}
