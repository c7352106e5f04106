//! `make bench`: reads through a mount against the same files without it, as ratios of one run.
//!
//! Each group of rows has a data set of its own, served by an instance of its own: both are gone when its rows are
//! measured. Readers are processes of their own (`job`), so what they cost is theirs alone. Rows that compare CPU run
//! readers and servers on one CPU: waking a CPU that sleeps costs more on a virtual machine than what is measured.
//! Local and mounted passes take turns, and the median of their ratios counts.

#![allow(unreachable_pub, reason = "a program: nothing is reachable from outside")]

mod data;
mod job;
mod measure;
mod policies;
mod report;
mod rounds;
mod rows;
mod served;

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    report::{Claim, Report},
    rows::Group,
};

/// Compares a mount with local files and with a named client.
#[derive(Debug, Parser)]
struct Args {
    /// The program `forebay`
    #[arg(long, value_name = "FILE")]
    forebay: PathBuf,
    /// The program `rclone`, the client that cold reads are compared with
    #[arg(long, value_name = "FILE")]
    rclone: Option<PathBuf>,
    /// Hit ratios of eviction policies, instead of the rows
    #[arg(long, conflicts_with_all = ["rclone", "rows"])]
    policies: bool,
    /// Only rows with one of these words in their name
    #[arg(long, value_name = "WORD", num_args = 1.., value_delimiter = ' ')]
    rows: Vec<String>,
    /// Part of the data to use, for a quick look
    #[arg(long, default_value_t = 1.0, value_name = "FRACTION")]
    scale: f64,
    /// Where the report for programs goes [default: target/bench.json, or target/bench-policies.json]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where data is kept meanwhile: a directory on a local disk that every user can enter
    #[arg(long, default_value_os_t = std::env::temp_dir(), value_name = "DIR")]
    dir: PathBuf,
}

/// What all rows need.
#[derive(Debug)]
pub struct Bench {
    /// The program that is measured.
    pub forebay: PathBuf,
    /// The client that cold reads are compared with.
    pub rclone: Option<PathBuf>,
    /// The CPU that reader and servers share when CPU is compared.
    pub cpu: usize,
    dir: PathBuf,
    words: Vec<String>,
    scale: f64,
    started: Instant,
}

impl Bench {
    /// Whether a row was chosen.
    pub fn wants(&self, claim: &Claim) -> bool {
        claim.is_named(&self.words)
    }

    /// So much of a number of bytes or files.
    pub fn scaled(&self, whole: u64) -> u64 {
        ((whole as f64 * self.scale) as u64).max(1)
    }

    /// A directory for the data of some rows; it is removed with what it is given for.
    pub fn directory(&self, name: &str) -> anyhow::Result<tempfile::TempDir> {
        let dir = tempfile::Builder::new().prefix(&format!("forebay-bench-{name}-")).tempdir_in(&self.dir)?;
        // Workers and daemons run as an unprivileged user, who must get in.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(dir)
    }

    /// Tells how far it is.
    pub fn say(&self, text: impl Display) {
        eprintln!("[{:6.1} s] {text}", self.started.elapsed().as_secs_f64());
    }
}

fn main() -> anyhow::Result<ExitCode> {
    if std::env::args().nth(1).as_deref() == Some(job::ARGUMENT) {
        job::main()?;
        return Ok(ExitCode::SUCCESS);
    }
    let args = Args::parse();
    ensure!(rustix::process::geteuid().is_root(), "the benchmark drops caches and mounts: it needs root");
    ensure!(args.scale > 0.0 && args.scale <= 1.0, "--scale is a fraction");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(run(args));
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { forebay, rclone, policies, rows, scale, json, dir } = args;
    let usual = if policies { "target/bench-policies.json" } else { "target/bench.json" };
    let json = json.unwrap_or_else(|| usual.into());
    let bench = Bench {
        forebay,
        rclone,
        cpu: measure::shared_cpu()?,
        dir: dir.canonicalize().with_context(|| format!("looking for {}", dir.display()))?,
        words: rows,
        scale,
        started: Instant::now(),
    };
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let measured = async {
        if policies {
            return policies::run(&bench).await;
        }
        let mut report = Report::default();
        measure_all(&bench, &mut report).await;
        println!("{}", report.table());
        report.json()
    };
    // What is dropped when a signal comes first takes its processes, mounts and directories with it.
    let report = tokio::select! {
        report = measured => report?,
        _ = interrupt.recv() => return Ok(ExitCode::FAILURE),
        _ = terminate.recv() => return Ok(ExitCode::FAILURE),
    };
    bench.say("done");
    write(&json, &report)?;
    Ok(ExitCode::SUCCESS)
}

/// Measures what is wanted. A group that fails is told as such, and the others are measured all the same.
async fn measure_all(bench: &Bench, report: &mut Report) {
    for group in Group::ALL {
        let wanted: Vec<Claim> = group.claims().iter().filter(|claim| bench.wants(claim)).copied().collect();
        if wanted.is_empty() {
            continue;
        }
        let reason = match group.run(bench, report).await {
            Ok(()) => "nothing was measured".to_owned(),
            Err(error) => {
                bench.say(format_args!("{group:?} failed: {error:#}"));
                format!("it failed: {error:#}")
            }
        };
        report.complete(&wanted, &reason);
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
