//! What a source gets a second from several workers, against what it may get.

use std::time::Duration;

use anyhow::{Context, ensure};
use forebay_test_store::{Options, TestStore, content};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    Bench,
    data::Set,
    measure::Role,
    report::{Claim, Limit, Report},
    served::{BUCKET, Served, Setup},
};

const fn claim(phase: &'static str) -> Claim {
    let claim = Claim::new("a source with a budget of 100 GET/s", phase, Limit::AtLeast(0.9));
    Claim { also: Some("and at most 1.05 in any minute"), ..claim }
}

/// What is claimed.
pub(super) const CLAIMS: [Claim; 5] = [
    claim("1 worker, least of a minute"),
    claim("3 workers, least of a minute"),
    claim("5 workers, least of a minute"),
    claim("3 workers, one dies, least of a minute"),
    claim("5 workers, one dies, least of a minute"),
];
/// Workers, and whether one dies.
const CASES: [(u32, bool); 5] = [(1, false), (3, false), (5, false), (3, true), (5, true)];

/// Requests in a second that the source may get.
const BUDGET: u32 = 100;
const MINUTE: Duration = Duration::from_secs(60);
/// How long it is looked at, from the first request on: some minutes that overlap.
const LOOK: Duration = Duration::from_secs(75);
/// When one dies.
const DEATH: Duration = Duration::from_secs(20);
/// A request for each file, and more of them than can be asked for while it is looked at.
const SET: Set = Set { seed: 21, files: 9000, directories: 30, smallest: 4 << 10, largest: 8 << 10, sparse: false };

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    for (claim, (workers, dies)) in CLAIMS.iter().zip(CASES) {
        let Minutes { least, most } = minutes(bench, workers, dies).await?;
        bench.say(format_args!("{}, {}: {least} to {most} in a minute", claim.row, claim.phase));
        let whole = f64::from(BUDGET) * MINUTE.as_secs_f64();
        let (least, most) = (least as f64 / whole, most as f64 / whole);
        let detail = format!("{:.1} to {:.1} requests/s", least * f64::from(BUDGET), most * f64::from(BUDGET));
        report.measured(claim, least, most <= 1.05, detail);
    }
    Ok(())
}

/// Requests in a minute.
struct Minutes {
    least: u64,
    most: u64,
}

async fn minutes(bench: &Bench, workers: u32, dies: bool) -> anyhow::Result<Minutes> {
    let dir = bench.directory("budget")?;
    let store = TestStore::start(Options { latency: Duration::ZERO, dir: Some(dir.path().to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    for file in 0..SET.files {
        store.put_virtual(BUCKET, &SET.path(file), SET.size(file), content::generator(SET.seed_of(file)));
    }
    let setup = Setup { store: Some(&store), workers, gets_per_second: Some(BUDGET), ..Setup::default() };
    let served = Served::start(bench, dir.path(), setup).await?;
    served.scanned().await?;
    let loading = async {
        // A load ends with an error when one of its workers dies; the next one goes on where it was.
        while served.load_below("/").await.is_err() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    let looking = async {
        let mut seen = Vec::new();
        while store.counters().gets == 0 {
            sleep(Duration::from_millis(10)).await;
        }
        let (begin, mut dying) = (Instant::now(), dies);
        while begin.elapsed() < LOOK {
            seen.push((begin.elapsed(), store.counters().gets));
            if dying && begin.elapsed() >= DEATH {
                dying = false;
                let processes = served.processes()?;
                let worker = processes.iter().find(|process| process.role == Role::Worker).context("no worker")?;
                let pid = Pid::from_raw(worker.pid.cast_signed()).context("a process has a number")?;
                kill_process(pid, Signal::KILL).context("killing a worker")?;
            }
            sleep(Duration::from_millis(250)).await;
        }
        anyhow::Ok(seen)
    };
    let seen = tokio::select! {
        seen = looking => seen?,
        () = loading => anyhow::bail!("all files were loaded in less than {LOOK:?}: the budget was not kept"),
    };
    let mut counts = Vec::new();
    for (index, (from, before)) in seen.iter().enumerate() {
        let end = seen[index..].iter().find(|(to, _)| *to >= *from + MINUTE);
        // Looks are a little more than a minute apart.
        counts.extend(end.map(|(to, after)| {
            let share = MINUTE.as_secs_f64() / (*to - *from).as_secs_f64();
            ((after - before) as f64 * share).round() as u64
        }));
    }
    ensure!(!counts.is_empty(), "nobody looked for a minute");
    timeout(MINUTE, served.stop()).await.context("the instance does not stop")??;
    Ok(Minutes {
        least: counts.iter().copied().min().unwrap_or_default(),
        most: counts.iter().copied().max().unwrap_or_default(),
    })
}
