//! From a store that answers each request after 20 ms.

use std::{path::Path, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use forebay_test_store::{Options, TestStore, content};
use tokio::{process::Command, time::Instant};

use crate::{
    Bench,
    data::{Large, Set},
    job::{self, Done, Work},
    measure,
    report::{Claim, Limit, Report, median},
    rounds::{ROUNDS, Rounds},
    served::{BUCKET, Pass, Served, Setup},
};

const SEQUENTIAL: Claim =
    Claim::new("cold sequential from S3 at 20 ms", "throughput, of rclone with 16 streams", Limit::AtLeast(0.9));
const SMALL: Claim =
    Claim::new("cold small files from S3 at 20 ms", "files/s, of concurrency / latency", Limit::AtLeast(0.9));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 2] = [SEQUENTIAL, SMALL];

const LATENCY: Duration = Duration::from_millis(20);
const SIZE: u64 = 1 << 30;
const STREAMS: u32 = 16;
const READERS: u64 = 16;
const SET: Set = Set { seed: 5, files: 4000, directories: 40, smallest: 80 << 10, largest: 120 << 10, sparse: false };

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    if bench.wants(&SEQUENTIAL) {
        match &bench.rclone {
            // Small files are measured all the same.
            Some(rclone) => {
                if let Err(error) = sequential(bench, rclone, report).await {
                    report.unmeasured(&SEQUENTIAL, format!("it failed: {error:#}"));
                }
            }
            None => report.unmeasured(&SEQUENTIAL, "no rclone: name one with --rclone"),
        }
    }
    if bench.wants(&SMALL) {
        small(bench, report).await?;
    }
    Ok(())
}

async fn store(dir: &Path) -> TestStore {
    let store = TestStore::start(Options { latency: LATENCY, dir: Some(dir.to_owned()) }).await;
    store.create_bucket(BUCKET).await;
    store
}

/// Each round reads an object of its own: nobody has seen it before.
async fn sequential(bench: &Bench, rclone: &Path, report: &mut Report) -> anyhow::Result<()> {
    let dir = bench.directory("cold")?;
    let store = store(dir.path()).await;
    let size = bench.scaled(SIZE).next_multiple_of(1 << 20);
    let object = |round: u32| Large { path: format!("r{round}.bin").into(), size, seed: u64::from(round) };
    // One more, to check every byte of.
    for round in 0..=ROUNDS {
        let Large { path, size, seed } = object(round);
        store.put_virtual(BUCKET, &path.to_string_lossy(), size, content::generator(seed));
    }
    let served = Served::start(bench, dir.path(), Setup { store: Some(&store), ..Setup::default() }).await?;
    served.scanned().await?;
    bench.say("checking every byte of an object through the mount");
    job::run(Work::Sequential { file: object(0).below(served.mount()), verify: true }, None).await?;

    // Memory, so that the reference does not wait for a disk.
    let scratch = tempfile::Builder::new().prefix("forebay-bench-").tempdir_in("/dev/shm")?;
    let (mut direct, mut mounted) = (1..=ROUNDS, 1..=ROUNDS);
    let (direct, mounted) = (std::cell::RefCell::new(&mut direct), &mut mounted);
    let rounds = Rounds::run(
        bench,
        SEQUENTIAL.row,
        async || {
            let round = direct.borrow_mut().next().context("one round more")?;
            measure::forget(size).await?;
            let cpu = measure::children()?;
            let seconds = fetch(rclone, &store, &object(round), scratch.path()).await?;
            let cpu = measure::children()? - cpu;
            Ok(Pass { done: Done { bytes: size, files: 1, seconds, cpu, latencies: None }, ..Pass::default() })
        },
        async || {
            let file = object(mounted.next().context("one round more")?).below(served.mount());
            measure::forget(size).await?;
            served.pass(vec![Work::Sequential { file, verify: false }], None).await
        },
    )
    .await?;
    let detail = format!(
        "'local' is `rclone copyto` to memory, --multi-thread-streams {STREAMS} --multi-thread-chunk-size 8M; the store's \
         CPU is in nobody's; {}",
        rounds.detail()
    );
    report.measured(&SEQUENTIAL, rounds.throughput(), true, detail);
    served.stop().await
}

/// Fetches an object with rclone; gives the seconds. The ETags of generated objects look like MD5 sums and are none.
async fn fetch(rclone: &Path, store: &TestStore, object: &Large, scratch: &Path) -> anyhow::Result<f64> {
    let to = scratch.join("object");
    let started = Instant::now();
    let output = Command::new(rclone)
        .args([
            "copyto",
            "--config",
            "/dev/null",
            "--ignore-checksum",
            "--retries",
            "1",
            "--multi-thread-cutoff",
            "1M",
            "--multi-thread-chunk-size",
            "8M",
        ])
        .arg(format!("--multi-thread-streams={STREAMS}"))
        .arg(format!(":s3:{BUCKET}/{}", object.path.display()))
        .arg(&to)
        .envs([
            ("RCLONE_S3_PROVIDER", "Other"),
            ("RCLONE_S3_ENDPOINT", &store.endpoint()),
            ("RCLONE_S3_ACCESS_KEY_ID", store.access_key()),
            ("RCLONE_S3_SECRET_ACCESS_KEY", store.secret_key()),
            ("RCLONE_S3_FORCE_PATH_STYLE", "true"),
        ])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("starting {}", rclone.display()))?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(output.status.success(), "rclone: {}", String::from_utf8_lossy(&output.stderr).trim());
    ensure!(std::fs::metadata(&to)?.len() == object.size, "rclone fetched another number of bytes");
    std::fs::remove_file(&to)?;
    Ok(seconds)
}

/// Each round reads a set of its own, below a directory of the bucket.
async fn small(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let dir = bench.directory("cold-small")?;
    let store = store(dir.path()).await;
    let set = |round: u32| Set { seed: SET.seed + u64::from(round), files: bench.scaled(SET.files), ..SET };
    for round in 0..=ROUNDS {
        let set = set(round);
        for file in 0..set.files {
            let key = format!("r{round}/{}", set.path(file));
            store.put_virtual(BUCKET, &key, set.size(file), content::generator(set.seed_of(file)));
        }
    }
    let served = Served::start(bench, dir.path(), Setup { store: Some(&store), ..Setup::default() }).await?;
    served.scanned().await?;
    let work = |round: u32, verify| Work::Files {
        root: served.mount().join(format!("r{round}")),
        set: set(round),
        first: 0,
        step: 1,
        threads: READERS,
        verify,
    };
    bench.say("checking every byte of small files through the mount");
    job::run(work(0, true), None).await?;
    let limit = READERS as f64 / LATENCY.as_secs_f64();
    let (mut rates, mut costs, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        measure::forget(set(round).bytes()).await?;
        let pass = served.pass(vec![work(round, false)], None).await?;
        let rate = pass.done.files as f64 / pass.done.seconds;
        bench.say(format_args!("{}, round {round}: {rate:.0} of {limit:.0} files/s", SMALL.row));
        rates.push(rate);
        costs.push(pass.total() * 1e9 / pass.done.bytes as f64);
        requests.push(pass.requests as f64 / pass.done.files as f64);
    }
    let rate = median(rates);
    let detail = format!(
        "{READERS} readers / 20 ms = {limit:.0} files/s; {rate:.0} files/s; {:.2} CPU s per GB without the store; \
         {:.2} requests a file; {} files a round, each of a set of its own, its directories listed before",
        median(costs),
        median(requests),
        set(0).files
    );
    report.measured(&SMALL, rate / limit, true, detail);
    served.stop().await
}
