//! The files of RetinaNet training (Open Images, as MLPerf Storage reads it): 323 KB each, 8 reader processes.

use std::path::Path;

use anyhow::ensure;

use crate::{
    Bench,
    data::Set,
    job::{self, Work},
    measure,
    report::{Claim, Limit, Report},
    rounds::Rounds,
    served::{self, Served, Setup},
};

const SHAPE: Claim = Claim::new("retinanet shape: files of 323 KB", "warm, 8 processes, files/s", Limit::AtLeast(0.8));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 1] = [SHAPE];

const FILES: u64 = 20_000;
const SIZE: u64 = 323_000;
const READERS: u64 = 8;
/// A file is in memory three times while it is loaded: local, in the mount, and as a worker's chunk.
const COPIES: u64 = 3;
/// A file is on disk twice: local, and as a worker's chunk.
const ON_DISK: u64 = 2;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let dir = bench.directory("shape")?;
    // A tenth of memory and a quarter of the disk stay free.
    let memory = measure::available()? / 10 * 9 / COPIES / SIZE;
    let disk = rustix::fs::statvfs(dir.path())?;
    let disk = disk.f_bavail * disk.f_frsize / 4 * 3 / ON_DISK / SIZE;
    let files = bench.scaled(FILES).min(memory).min(disk);
    ensure!(files >= READERS, "neither memory nor disk for {READERS} files");
    let set = Set { seed: 4, files, directories: 200, smallest: SIZE, largest: SIZE, sparse: false };
    let local = served::source(dir.path())?;
    bench.say(format_args!("writing {files} files of 323 KB"));
    job::run(Work::WriteSet { root: local.clone(), set }, None).await?;
    let served = Served::start(bench, dir.path(), Setup { shape: "Small", ..Setup::default() }).await?;
    served.load().await?;
    let mount = served.mount().to_owned();
    measure::forget(set.bytes()).await?;
    bench.say("checking every byte of them through the mount");
    let verify = Work::Files { root: mount.clone(), set, first: 0, step: 1, threads: 4, verify: true };
    job::run(verify, None).await?;
    let works = |root: &Path| -> Vec<Work> {
        let work = |first| Work::Files { root: root.to_owned(), set, first, step: READERS, threads: 1, verify: false };
        (0..READERS).map(work).collect()
    };
    served::direct(works(&local), None).await?;
    let direct = async || served::direct(works(&local), None).await;
    let rounds = Rounds::run(bench, SHAPE.row, direct, async || served.pass(works(&mount), None).await).await?;
    let detail = format!("{files} files, in the page cache of the mount, on all CPUs; {}", rounds.detail());
    report.measured(&SHAPE, rounds.throughput(), true, detail);
    served.stop().await
}
