//! Work that is measured, each piece in a process of its own: what it costs is not mixed with the cost of this program
//! and of the store in it, and it ends when it is killed, whatever it is doing.

mod direct;
mod latency;
mod read;
mod transport;

use std::{
    io::Read as _,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::{
    process::Signal,
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    data::{Large, Set},
    measure,
};

/// The first argument of such a process.
pub const ARGUMENT: &str = "job";

/// Files that a mount is told of ahead of the readers, as a sampler does it.
const AHEAD: usize = 4096;
/// The longest that one piece of work may take.
const LONGEST: Duration = Duration::from_secs(300);

/// What is to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Work {
    /// Writes the files of a set below a directory.
    WriteSet { root: PathBuf, set: Set },
    /// Writes a large file.
    WriteLarge { file: Large },
    /// Takes memory from the machine and gives it back: memory that was never used is slow at first.
    Touch { bytes: u64 },
    /// Reads a file from its beginning to its end; with `verify` its bytes are checked as well.
    Sequential { file: Large, verify: bool },
    /// The same through a mapping.
    Mmap { file: Large },
    /// Reads `count` times `block` bytes at random places.
    Random { file: Large, block: u64, count: u64 },
    /// Opens, reads to the end, and closes the files `first`, `first + step`, ... of a set in random order.
    Files { root: PathBuf, set: Set, first: u64, step: u64, threads: u64, verify: bool },
    /// The same with all files, by so many readers; with `told`, the mount is told the order ahead of them.
    Announced { root: PathBuf, set: Set, threads: u64, told: bool },
    /// Lists all directories, and asks for the attributes of every entry.
    Walk { root: PathBuf, set: Set },
    /// Opens, reads past the page cache and closes files of a set at random, and lists its directories beside that, for
    /// so long: how long that takes each time is told.
    Latencies { root: PathBuf, set: Set, readers: u64, lasting: Duration },
    /// Reads from all of these files at the same time, whatever becomes of it.
    Await { files: Vec<PathBuf> },
    /// Opens every file of a set, and reads from all of them at the same time, past the page cache.
    AtOnce { root: PathBuf, set: Set },
    /// Reads a file from a worker with the client library. `state` is that of `forebay up`.
    Client { state: PathBuf, file: Large },
    /// Sends a file over a loopback connection with sendfile(2), and receives it.
    Sendfile { file: Large },
}

/// Work, and where it runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    work: Work,
    cpu: Option<usize>,
}

/// What it did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// Bytes read.
    pub bytes: u64,
    /// Files read, or entries seen.
    pub files: u64,
    /// From its begin to its end, without the start of the process.
    pub seconds: f64,
    /// CPU of the process meanwhile, in seconds.
    pub cpu: f64,
    /// Where they were asked for.
    pub latencies: Option<Latencies>,
}

/// The 99th percentiles of what was done many times, in seconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Latencies {
    /// Of a file: to open it, read it and close it.
    pub reads: f64,
    /// Of a directory: to list it.
    pub lists: f64,
}

/// Work under way; it is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

/// Starts work, on one CPU or on any.
pub async fn start(work: Work, cpu: Option<usize>) -> anyhow::Result<Running> {
    let child = Command::new(std::env::current_exe()?)
        .arg(ARGUMENT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a reader")?;
    let mut running = Running { child };
    let mut stdin = running.child.stdin.take().context("no standard input")?;
    stdin.write_all(&serde_json::to_vec(&Job { work, cpu })?).await?;
    Ok(running)
}

/// Does work from begin to end.
pub async fn run(work: Work, cpu: Option<usize>) -> anyhow::Result<Done> {
    start(work, cpu).await?.done().await
}

impl Running {
    /// Waits for its end.
    pub async fn done(mut self) -> anyhow::Result<Done> {
        let mut text = Vec::new();
        if let Some(stdout) = &mut self.child.stdout {
            timeout(LONGEST, stdout.read_to_end(&mut text)).await.context("a reader did not end")??;
        }
        if !self.child.wait().await?.success() {
            bail!("a reader failed; it said why above");
        }
        serde_json::from_slice(&text).context("reading what a reader did")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.id().is_none() || self.child.start_kill().is_err() {
            return;
        }
        // It holds files below directories that are removed next.
        while matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The other side: a job from standard input, what it did to standard output.
pub fn main() -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text)?;
    let Job { work, cpu } = serde_json::from_slice(&text)?;
    if let Some(cpu) = cpu {
        measure::pin_self(cpu)?;
    }
    let done = work.run()?;
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

impl Work {
    fn run(self) -> anyhow::Result<Done> {
        match self {
            Self::WriteSet { root, set } => timed(|| {
                set.write(&root)?;
                Ok((set.bytes(), set.files))
            }),
            Self::WriteLarge { file } => timed(|| {
                file.write()?;
                Ok((file.size, 1))
            }),
            Self::Touch { bytes } => timed(|| read::touch(bytes)),
            Self::Sequential { file, verify } => read::sequential(&file, verify),
            Self::Mmap { file } => timed(|| read::mmap(&file)),
            Self::Random { file, block, count } => read::random(&file, block, count),
            Self::Files { root, set, first, step, threads, verify } => {
                read::files(&root, &set, (first..set.files).step_by(step as usize).collect(), threads, verify, None)
            }
            Self::Announced { root, set, threads, told } => {
                let ahead = told.then_some(AHEAD);
                read::files(&root, &set, (0..set.files).collect(), threads, true, ahead)
            }
            Self::Walk { root, set } => timed(|| read::walk(&root, &set)),
            Self::Latencies { root, set, readers, lasting } => {
                let mut found = None;
                let done = timed(|| {
                    let (bytes, files, latencies) = latency::measure(&root, &set, readers, lasting)?;
                    found = Some(latencies);
                    Ok((bytes, files))
                })?;
                Ok(Done { latencies: found, ..done })
            }
            Self::Await { files } => timed(|| Ok((0, latency::wait(&files)))),
            Self::AtOnce { root, set } => timed(|| read::at_once(&root, &set)),
            Self::Client { state, file } => transport::client(&state, &file),
            Self::Sendfile { file } => transport::sendfile(&file),
        }
    }
}

/// Runs what gives bytes and files, with a clock beside it.
fn timed(work: impl FnOnce() -> anyhow::Result<(u64, u64)>) -> anyhow::Result<Done> {
    let cpu = process_cpu();
    let started = Instant::now();
    let (bytes, files) = work()?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Done { bytes, files, seconds, cpu: process_cpu() - cpu, latencies: None })
}

fn process_cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
