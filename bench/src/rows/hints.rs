//! Files of which a trainer knows the order, from a cache that is smaller than the data.

use std::{path::Path, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use forebay_test_store::{Options, TestStore, content};
use tokio::process::Command;

use crate::{
    Bench,
    data::Set,
    job::{self, Work},
    measure,
    report::{Claim, Limit, Report, median},
    rounds::ROUNDS,
    served::{BUCKET, Served, Setup},
};

const TOLD: Claim = Claim::new(
    "epoch in an announced order, half of it cached, S3 at 20 ms",
    "files/s, of the same without hints",
    Limit::AtLeast(2.0),
);
const SAMPLER: Claim =
    Claim::new(TOLD.row, "samples/s of a PyTorch loader, of the same with a plain sampler", Limit::AtLeast(1.5));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 2] = [TOLD, SAMPLER];

const LATENCY: Duration = Duration::from_millis(20);
const READERS: u64 = 4;
const SET: Set = Set { seed: 12, files: 4000, directories: 40, smallest: 80 << 10, largest: 120 << 10, sparse: false };
/// Where PyTorch may be.
const PYTHON: &str = "/usr/bin/python3";

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let dir = bench.directory("hints")?;
    let store = TestStore::start(Options { latency: LATENCY, dir: Some(dir.path().to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    let set = Set { files: bench.scaled(SET.files), ..SET };
    for file in 0..set.files {
        let key = set.path(file);
        store.put_virtual(BUCKET, &key, set.size(file), content::generator(set.seed_of(file)));
    }
    let setup = Setup {
        store: Some(&store),
        memory: 256,
        shape: "Small",
        node_cache: false,
        cache: Some(("Hold", set.bytes() / 2)),
        ..Setup::default()
    };
    let served = Served::start(bench, dir.path(), setup).await?;
    served.scanned().await?;
    let epoch = |told| Work::Announced { root: served.mount().to_owned(), set, threads: READERS, told };
    bench.say("filling half of the cache, and checking every byte");
    job::run(epoch(false), None).await?;
    if bench.wants(&TOLD) {
        let mut rates = [Vec::new(), Vec::new()];
        for round in 1..=ROUNDS {
            for told in [false, true] {
                measure::forget(set.bytes()).await?;
                let before = store.counters();
                let done = job::run(epoch(told), None).await?;
                let rate = done.files as f64 / done.seconds;
                let gets = store.counters().gets - before.gets;
                bench.say(format_args!("{}, round {round}, told {told}: {rate:.0} files/s, {gets} GETs", TOLD.row));
                rates[usize::from(told)].push(rate);
            }
        }
        let [plain, told] = rates.map(median);
        let detail = format!(
            "{READERS} readers, every byte checked; {plain:.0} files/s without, {told:.0} with; {} files",
            set.files
        );
        report.measured(&TOLD, told / plain, true, detail);
    }
    if bench.wants(&SAMPLER) {
        match sampler(bench, &served).await {
            Ok((plain, told)) => {
                let detail = format!(
                    "examples/pytorch/measure.py, {READERS} loader processes; {plain:.0} samples/s without, {told:.0} with"
                );
                report.measured(&SAMPLER, told / plain, true, detail);
            }
            Err(error) => report.unmeasured(&SAMPLER, format!("it failed: {error:#}")),
        }
    }
    served.stop().await
}

/// Samples per second of the second epochs of a loader, without and with hints.
async fn sampler(bench: &Bench, served: &Served) -> anyhow::Result<(f64, f64)> {
    let mut rates = [Vec::new(), Vec::new()];
    for round in 1..=ROUNDS {
        for told in [false, true] {
            measure::forget(0).await?;
            let rate = loader(served.mount(), round, told).await?;
            bench.say(format_args!("{}, round {round}, told {told}: {rate:.0} samples/s", SAMPLER.row));
            rates[usize::from(told)].push(rate);
        }
    }
    let [plain, told] = rates.map(median);
    Ok((plain, told))
}

async fn loader(mount: &Path, seed: u32, told: bool) -> anyhow::Result<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/pytorch/measure.py");
    let output = Command::new(PYTHON)
        .arg(script)
        .arg(mount)
        .args(["--epochs", "1", "--workers", &READERS.to_string(), "--seed", &seed.to_string()])
        .args((!told).then_some("--plain"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("starting {PYTHON}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    let rate = text.split(", ").find_map(|part| part.strip_suffix(" samples/s"));
    rate.with_context(|| format!("no rate in {text:?}"))?.parse().context("a rate")
}
