//! What a worker keeps of each small file beside its bytes.

use std::{os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use crate::{
    Bench,
    data::Set,
    job::{self, Work},
    measure::{self, Role},
    report::{Claim, Limit, Report},
    served::{self, Served, Setup},
};

const ROW: &str = "worker: a cached small file";
const DISK: Claim = Claim::new(ROW, "disk for index and metadata, of 200 B", Limit::AtMost(1.0));
const MEMORY: Claim = Claim::new(ROW, "memory for index and metadata, of 150 B", Limit::AtMost(1.0));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 2] = [DISK, MEMORY];

const DISK_GOAL: f64 = 200.0;
const MEMORY_GOAL: f64 = 150.0;
/// Two instances that differ by their number of files only: what each file costs is the difference.
const FEW: u64 = 1000;
const MORE: u64 = 20_000;
const SET: Set = Set { seed: 8, files: 0, directories: 200, smallest: 4 << 10, largest: 8 << 10, sparse: false };
/// What is freed lazily is freed by then.
const SETTLE: Duration = Duration::from_secs(3);

/// What a worker has.
struct Kept {
    index: u64,
    chunks: u64,
    memory: u64,
}

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let more = bench.scaled(MORE);
    let few = kept(bench, FEW).await?;
    let many = kept(bench, FEW + more).await?;
    let each = |of: fn(&Kept) -> u64| (of(&many) as f64 - of(&few) as f64) / more as f64;
    let (index, chunks, memory) = (each(|kept| kept.index), each(|kept| kept.chunks), each(|kept| kept.memory));
    if bench.wants(&DISK) {
        let detail = format!(
            "{:.0} B a file: {index:.0} B in databases, {chunks:.0} B of chunk files beyond the contents (trailers, and \
             the rest of the last 4 KiB); {more} files of 4 to 8 KiB",
            index + chunks
        );
        report.measured(&DISK, (index + chunks) / DISK_GOAL, true, detail);
    }
    // With few files, what the allocator happens to keep is more than the difference.
    if bench.wants(&MEMORY) && memory <= 0.0 {
        report.unmeasured(&MEMORY, format!("{more} more files do not show in a worker's RSS"));
    } else if bench.wants(&MEMORY) {
        let detail = format!(
            "{memory:.0} B a file: RSS of a worker with {} files less that with {FEW}, {SETTLE:?} after the load; it \
             includes what the database and the allocator keep",
            FEW + more
        );
        report.measured(&MEMORY, memory / MEMORY_GOAL, true, detail);
    }
    Ok(())
}

/// What a worker has that holds so many files.
async fn kept(bench: &Bench, files: u64) -> anyhow::Result<Kept> {
    let set = Set { files, ..SET };
    let dir = bench.directory("index")?;
    bench.say(format_args!("a worker that holds {files} files"));
    job::run(Work::WriteSet { root: served::source(dir.path())?, set }, None).await?;
    let served = Served::start(bench, dir.path(), Setup { workers: 1, ..Setup::default() }).await?;
    served.load().await?;
    let root = served.mount().to_owned();
    job::run(Work::Files { root, set, first: 0, step: 1, threads: 4, verify: true }, None).await?;
    tokio::time::sleep(SETTLE).await;
    let workers = served.processes()?.into_iter().filter(|process| process.role == Role::Worker);
    let memory = workers.map(|process| process.rss).sum();
    // What was written is on disk, so that blocks are counted as they are.
    measure::settle().await?;
    let state = served.state().to_owned();
    served.stop().await?;
    let (index, chunks) = usage(&state.join("runtimes"))?;
    Ok(Kept { index, chunks: chunks - set.bytes().min(chunks), memory })
}

/// Bytes on disk of databases, and of everything else.
pub(super) fn usage(directory: &Path) -> anyhow::Result<(u64, u64)> {
    let (mut index, mut chunks) = (0, 0);
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            let below = usage(&entry.path())?;
            index += below.0;
            chunks += below.1;
        } else if entry.path().extension().is_some_and(|extension| extension == "redb") {
            index += metadata.blocks() * 512;
        } else {
            chunks += metadata.blocks() * 512;
        }
    }
    Ok((index, chunks))
}
