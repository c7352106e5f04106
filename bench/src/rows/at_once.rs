//! 10,000 reads at the same time.

use std::{os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration};

use forebay_test_store::{Options, TestStore, content};

use crate::{
    Bench,
    data::Set,
    job::{self, Work},
    measure::{self, Role},
    report::{Claim, Limit, Report},
    served::{BUCKET, Served, Setup},
};

const PEAK: Claim =
    Claim::new("10,000 reads in flight", "growth of the daemon's memory, of its budget", Limit::AtMost(1.0));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 1] = [PEAK];

const SET: Set =
    Set { seed: 9, files: 10_000, directories: 100, smallest: 80 << 10, largest: 120 << 10, sparse: false };
/// Long enough that all readers wait at the same time, short enough that the last of them gets its bytes in time.
const LATENCY: Duration = Duration::from_millis(100);
/// Of the mount, in MiB.
const BUDGET: u64 = 128;
/// Between two looks at the connection.
const LOOK: Duration = Duration::from_millis(20);

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let dir = bench.directory("at-once")?;
    let store = TestStore::start(Options { latency: LATENCY, dir: Some(dir.path().to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    for file in 0..set.files {
        store.put_virtual(BUCKET, &set.path(file), set.size(file), content::generator(set.seed_of(file)));
    }
    let setup = Setup { store: Some(&store), memory: BUDGET, ..Setup::default() };
    let served = Served::start(bench, dir.path(), setup).await?;
    served.scanned().await?;
    let root = served.mount().to_owned();
    job::run(Work::Walk { root: root.clone(), set }, None).await?;
    let waiting = waiting(&root)?;
    let idle = served.processes()?;
    measure::forget_peaks(&idle)?;
    bench.say(format_args!("{} reads at the same time", set.files));

    let mut most = 0;
    let pass = {
        let mut reading = std::pin::pin!(served.pass(vec![Work::AtOnce { root, set }], None));
        loop {
            tokio::select! {
                pass = &mut reading => break pass?,
                () = tokio::time::sleep(LOOK) => most = most.max(number(&waiting)),
            }
        }
    };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let before: u64 = of(&idle, Role::Daemon).map(|process| process.rss).max().unwrap_or_default();
    let peak: u64 = of(&pass.processes, Role::Daemon).map(|process| process.peak).max().unwrap_or_default();
    let workers: Vec<String> =
        of(&pass.processes, Role::Worker).map(|process| format!("{:.0}", mib(process.peak))).collect();
    let growth = mib(peak.saturating_sub(before));
    let detail = format!(
        "the daemon that serves: {:.0} MiB idle, {:.0} MiB at its peak, budget {BUDGET} MiB for contents; peaks of the \
         workers {} MiB; at most {most} requests waited at once (looked at every {LOOK:?}); O_DIRECT, {} files, {:.1} s",
        mib(before),
        mib(peak),
        workers.join(" + "),
        set.files,
        pass.done.seconds
    );
    report.measured(&PEAK, growth / BUDGET as f64, true, detail);
    served.stop().await
}

fn of(processes: &[measure::Process], role: Role) -> impl Iterator<Item = &measure::Process> {
    processes.iter().filter(move |process| process.role == role)
}

/// Where the kernel tells how many requests of a mount wait for an answer.
fn waiting(mount: &std::path::Path) -> anyhow::Result<PathBuf> {
    let device = std::fs::metadata(mount)?.dev();
    Ok(format!("/sys/fs/fuse/connections/{}/waiting", rustix::fs::minor(device)).into())
}

fn number(path: &PathBuf) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}
