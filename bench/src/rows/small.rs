//! Many small files: a second epoch, after the kernel forgot them, and first seen.

use std::path::Path;

use crate::{
    Bench,
    data::Set,
    job::{self, Work},
    measure,
    report::{Claim, Limit, Report},
    rounds::Rounds,
    served::{self, Served, Setup},
};

const ROW: &str = "20,000 files of 80-120 KiB";
const SECOND_1: Claim = second("second epoch, 1 thread, CPU");
const SECOND_4: Claim = second("second epoch, 4 threads, CPU");
const FORGOTTEN: Claim = Claim::new(ROW, "after drop_caches, CPU", Limit::AtMost(4.0));
const FIRST: Claim = Claim::new(ROW, "first pass, workers hold them, no push, CPU", Limit::AtMost(8.0));
const PUSH_WALL: Claim = Claim::new(ROW, "first pass, workers hold them, push, wall", Limit::AtMost(1.5));
const PUSH_CPU: Claim = Claim::new(ROW, "first pass, workers hold them, push, CPU", Limit::AtMost(7.0));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 6] = [SECOND_1, SECOND_4, FORGOTTEN, FIRST, PUSH_WALL, PUSH_CPU];

const SET: Set =
    Set { seed: 2, files: 20_000, directories: 200, smallest: 80 << 10, largest: 120 << 10, sparse: false };

const fn second(phase: &'static str) -> Claim {
    Claim { also: Some("0 requests"), ..Claim::new(ROW, phase, Limit::AtMost(1.2)) }
}

fn read(root: &Path, set: Set, threads: u64) -> Work {
    Work::Files { root: root.to_owned(), set, first: 0, step: 1, threads, verify: false }
}

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    for claim in [PUSH_WALL, PUSH_CPU].iter().filter(|claim| bench.wants(claim)) {
        report.unmeasured(claim, "a push of contents into the kernel's cache is not implemented yet");
    }
    if ![SECOND_1, SECOND_4, FORGOTTEN, FIRST].iter().any(|claim| bench.wants(claim)) {
        return Ok(());
    }
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let dir = bench.directory("small")?;
    let local = served::source(dir.path())?;
    bench.say("writing the small files");
    job::run(Work::WriteSet { root: local.clone(), set }, None).await?;
    let mut served = Served::start(bench, dir.path(), Setup { shape: "Small", ..Setup::default() }).await?;
    served.load().await?;
    bench.say("checking every byte of them through the mount");
    let verify = Work::Files { root: served.mount().to_owned(), set, first: 0, step: 1, threads: 4, verify: true };
    job::run(verify, None).await?;

    let mount = served.mount().to_owned();
    for (claim, threads) in [(SECOND_1, 1), (SECOND_4, 4)] {
        if !bench.wants(&claim) {
            continue;
        }
        let (direct, mounted) = (read(&local, set, threads), read(&mount, set, threads));
        job::run(direct.clone(), None).await?;
        job::run(mounted.clone(), None).await?;
        let rounds = Rounds::warm(bench, claim.phase, &served, &direct, &mounted).await?;
        report.measured(&claim, rounds.cpu(), rounds.requests() == 0, rounds.detail());
    }

    let (cpu, bytes) = (Some(bench.cpu), set.bytes());
    let (direct, mounted) = (read(&local, set, 1), read(&mount, set, 1));
    let cold_direct = async || {
        measure::forget(bytes).await?;
        served::direct(vec![direct.clone()], cpu).await
    };
    if bench.wants(&FORGOTTEN) {
        let rounds = Rounds::run(bench, FORGOTTEN.phase, cold_direct, async || {
            measure::forget(bytes).await?;
            served.pass(vec![mounted.clone()], cpu).await
        })
        .await?;
        report.measured(&FORGOTTEN, rounds.cpu(), true, rounds.detail());
    }
    if bench.wants(&FIRST) {
        let mut slot = Some(served);
        let rounds = Rounds::run(bench, FIRST.phase, cold_direct, async || {
            let Some(old) = slot.take() else { anyhow::bail!("the instance is gone") };
            let served = old.restart().await?;
            served.scanned().await?;
            measure::forget(bytes).await?;
            let pass = served.pass(vec![mounted.clone()], cpu).await?;
            slot = Some(served);
            Ok(pass)
        })
        .await?;
        let detail = format!("a new mount, and local files after drop_caches; {}", rounds.detail());
        report.measured(&FIRST, rounds.cpu(), true, detail);
        let Some(last) = slot else { anyhow::bail!("the instance is gone") };
        served = last;
    }
    served.stop().await
}
