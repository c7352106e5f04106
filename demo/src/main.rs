//! `make demo`: a Dataset from an S3 store (in this process, 20 ms away) through three workers and a FUSE mount.
//!
//! It reads everything cold, warm, and past the page cache, checks every byte against the generator, kills a worker and
//! the FUSE daemon with -9 in the middle of the passes that need them, and prints what happened. Errors must be 0.

#![allow(unreachable_pub, reason = "a program: nothing is reachable from outside")]

mod data;
mod epoch;
mod report;

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Parser;
use forebay_test_instance::Instance;
use forebay_test_store::{Options, TestStore, content};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, sleep};

use crate::{
    data::Expected,
    epoch::{Mode, Outcome, Progress},
    report::{Row, Sample},
};

/// Serves a data set from an embedded S3 store, kills what serves it, and counts.
#[derive(Debug, Parser)]
struct Args {
    /// The program `forebay`
    #[arg(long, value_name = "FILE")]
    forebay: PathBuf,
    /// The manifests; the store's address is put in place of the one they name
    #[arg(long, value_name = "FILE", default_value = "examples/quickstart.yaml")]
    manifest: PathBuf,
    /// Latency of a request to the store, in milliseconds
    #[arg(long, default_value_t = 20)]
    latency: u64,
    /// Threads that read
    #[arg(long, default_value_t = 16)]
    readers: usize,
}

/// The bucket that the quickstart names.
const BUCKET: &str = "quickstart";
/// The endpoint that the quickstart names.
const ENDPOINT: &str = "http://127.0.0.1:9000";
/// The keys that the quickstart's Secret holds.
const ACCESS_KEY: &str = "quickstart";
const SECRET_KEY: &str = "quickstart-secret";
/// How long the large files may take until they are in the node cache.
const KEPT: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(args))
}

async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let dir = tempfile::Builder::new().prefix("forebay-demo-").tempdir()?;
    // Workers and daemons run as an unprivileged user, who must get in.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let store =
        TestStore::start(Options { latency: Duration::from_millis(args.latency), dir: Some(dir.path().to_owned()) })
            .await;
    let files = fill(&store).await?;
    let bytes: u64 = files.iter().map(|file| file.size).sum();
    println!("store: {} files, {:.0} MB, {} ms a request", files.len(), bytes as f64 / 1e6, args.latency);

    let manifest = manifest(&args.manifest, &store, dir.path())?;
    let instance = Instance::start(&args.forebay, &manifest, dir.path(), &[]).await?;
    println!("up:    3 workers, 1 FUSE daemon and its standby, mounted at {}", instance.mount.display());

    let shards: Vec<Expected> = files.iter().filter(|file| file.path.starts_with("shards/")).cloned().collect();
    let mut rows = Vec::new();
    let demo = Demo { store: &store, instance: &instance, readers: args.readers };
    // Open all the while, they stay out of the node cache: its reads would need no daemon, whose kills would prove nothing.
    let held = demo.open(&shards)?;
    rows.push(demo.pass("cold", &files, Mode::Buffered, true).await?);
    rows.push(demo.pass("warm", &files, Mode::Buffered, false).await?);
    rows.push(demo.pass("large files, direct I/O", &shards, Mode::Direct, true).await?);
    drop(held);
    if rustix::process::geteuid().is_root() {
        demo.keep(&shards).await?;
        rows.push(demo.pass("large files, node cache", &shards, Mode::Direct, true).await?);
    }

    instance.stop().await?;
    println!("{}", report::table(&rows));
    let errors: Vec<&String> = rows.iter().flat_map(|row| &row.outcome.errors).collect();
    for error in errors.iter().take(20) {
        eprintln!("{error}");
    }
    if !errors.is_empty() {
        let log = dir.keep();
        eprintln!("the log is {}", log.join("forebay.log").display());
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Puts everything into the store; gives what must be found.
async fn fill(store: &TestStore) -> anyhow::Result<Vec<Expected>> {
    store.create_bucket(BUCKET).await;
    let bar = bar("filling the store", data::SHARDS * data::SHARD_SIZE)?;
    let mut files = Vec::new();
    for (path, contents) in data::images() {
        files.push(data::expect_image(&path, &contents));
        store.put(BUCKET, &path, contents).await;
    }
    for shard in 0..data::SHARDS {
        store.put_virtual(BUCKET, &data::shard_path(shard), data::SHARD_SIZE, content::generator(shard));
        files.push(tokio::task::spawn_blocking(move || data::expect_shard(shard)).await?);
        bar.inc(data::SHARD_SIZE);
    }
    bar.finish_and_clear();
    Ok(files)
}

/// The quickstart's manifests with this store's address and keys.
fn manifest(path: &Path, store: &TestStore, dir: &Path) -> anyhow::Result<PathBuf> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut replaced = text.clone();
    for (theirs, ours) in [
        (ENDPOINT.to_owned(), store.endpoint()),
        (format!("accessKeyId: {ACCESS_KEY}"), format!("accessKeyId: {}", store.access_key())),
        (format!("secretAccessKey: {SECRET_KEY}"), format!("secretAccessKey: {}", store.secret_key())),
    ] {
        ensure!(replaced.contains(&theirs), "{} does not say '{theirs}'", path.display());
        replaced = replaced.replace(&theirs, &ours);
    }
    let copy = dir.join("quickstart.yaml");
    std::fs::write(&copy, replaced)?;
    Ok(copy)
}

struct Demo<'a> {
    store: &'a TestStore,
    instance: &'a Instance,
    readers: usize,
}

impl Demo<'_> {
    async fn sample(&self) -> anyhow::Result<Sample> {
        Sample::new(&self.store.counters(), &self.instance.status().await?)
    }

    fn open(&self, files: &[Expected]) -> anyhow::Result<Vec<File>> {
        let open = |file: &Expected| {
            let path = self.instance.mount.join(&file.path);
            File::open(&path).with_context(|| format!("opening {}", path.display()))
        };
        files.iter().map(open).collect()
    }

    /// Reads files once more, and waits until all of them are in the node cache.
    async fn keep(&self, files: &[Expected]) -> anyhow::Result<()> {
        let row = self.pass("into the node cache", files, Mode::Direct, false).await?;
        ensure!(row.outcome.errors.is_empty(), "{}", row.outcome.errors.join("\n"));
        let deadline = Instant::now() + KEPT;
        while self.instance.kept()? < files.len() {
            ensure!(Instant::now() < deadline, "the large files were not in the node cache within {KEPT:?}");
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Reads the files once; with `kills`, a worker dies after a third and the daemon after two thirds.
    async fn pass(&self, name: &str, files: &[Expected], mode: Mode, kills: bool) -> anyhow::Result<Row> {
        let total: u64 = files.iter().map(|file| file.size).sum();
        let bar = bar(name, total)?;
        let before = self.sample().await?;
        let progress = Arc::new(Progress::default());
        let reading = {
            let (root, files, progress, bar) =
                (self.instance.mount.clone(), files.to_vec(), Arc::clone(&progress), bar.clone());
            let readers = self.readers;
            tokio::task::spawn_blocking(move || epoch::run(&root, &files, readers, mode, &progress, &bar))
        };
        let mut resent = Vec::new();
        let mut worker_kills = 0;
        if kills {
            if reached(&progress, total / 3, &reading).await {
                self.instance.kill_worker().await?;
                worker_kills += 1;
                bar.set_message("a worker was killed");
            }
            if reached(&progress, total * 2 / 3, &reading).await {
                let so_far = self.sample().await?.resent();
                self.instance.kill_daemon().await?;
                bar.set_message("the daemon was killed");
                sleep(Duration::from_millis(500)).await;
                resent.push(self.sample().await?.resent() - so_far);
            }
        }
        let outcome: Outcome = reading.await?;
        bar.finish_and_clear();
        let after = self.sample().await?;
        println!(
            "{name}: {} files in {:.1} s, {} errors",
            outcome.files,
            outcome.wall.as_secs_f64(),
            outcome.errors.len()
        );
        Ok(Row { name: name.into(), outcome, before, after, resent, worker_kills })
    }
}

/// Waits until so many bytes are read; false when the pass has ended before.
async fn reached(progress: &Progress, bytes: u64, reading: &tokio::task::JoinHandle<Outcome>) -> bool {
    let deadline = Instant::now() + Duration::from_secs(120);
    while progress.bytes() < bytes {
        if reading.is_finished() || Instant::now() > deadline {
            return false;
        }
        sleep(Duration::from_millis(2)).await;
    }
    true
}

fn bar(name: &str, bytes: u64) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix:24} {wide_bar} {binary_bytes}/{binary_total_bytes} {msg}")?;
    Ok(ProgressBar::new(bytes).with_style(style).with_prefix(name.to_owned()))
}
