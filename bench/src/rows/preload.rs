//! Data that is loaded before it is read.

use std::time::Duration;

use forebay_test_store::{Options, TestStore, content};

use crate::{
    Bench,
    data::Set,
    measure::{self, Role},
    report::{Claim, Limit, Report, median},
    rounds::ROUNDS,
    served::{BUCKET, Served, Setup},
};

const RATE: Claim =
    Claim::new("preload from S3 at 20 ms", "files/s, of the requests that the source may get", Limit::AtLeast(0.9));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 1] = [RATE];

const LATENCY: Duration = Duration::from_millis(20);
/// Requests in a second that the one worker may send.
const LIMIT: u32 = 400;
const SET: Set = Set { seed: 9, files: 4000, directories: 40, smallest: 80 << 10, largest: 120 << 10, sparse: false };

/// Each round loads a set of its own, a request for each of its files.
pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let dir = bench.directory("preload")?;
    let store = TestStore::start(Options { latency: LATENCY, dir: Some(dir.path().to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    let set = |round: u32| Set { seed: SET.seed + u64::from(round), files: bench.scaled(SET.files), ..SET };
    for round in 1..=ROUNDS {
        let set = set(round);
        for file in 0..set.files {
            let key = format!("r{round}/{}", set.path(file));
            store.put_virtual(BUCKET, &key, set.size(file), content::generator(set.seed_of(file)));
        }
    }
    let setup = Setup { store: Some(&store), workers: 1, requests_per_second: Some(LIMIT), ..Setup::default() };
    let served = Served::start(bench, dir.path(), setup).await?;
    served.scanned().await?;
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let set = set(round);
        let before = served.processes()?;
        let rate = set.files as f64 / served.load_below(&format!("/r{round}")).await?;
        let cpu = measure::cpu_between(&before, &served.processes()?);
        bench.say(format_args!("{}, round {round}: {rate:.0} of {LIMIT} files/s", RATE.row));
        rates.push(rate);
        costs.push(cpu.get(&Role::Worker).copied().unwrap_or_default() * 1e9 / set.bytes() as f64);
    }
    let rate = median(rates);
    let detail = format!(
        "one worker, {LIMIT} requests/s; {rate:.0} files/s; workers {:.2} CPU s per GB; {} files a round",
        median(costs),
        set(1).files
    );
    report.measured(&RATE, rate / f64::from(LIMIT), true, detail);
    served.stop().await
}
