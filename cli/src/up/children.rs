//! The processes that `forebay up` keeps running: cache workers and FUSE daemons.
//!
//! A child that ends is started again, after a pause that doubles from [`PAUSE_MIN`] to [`PAUSE_MAX`] and is forgotten
//! once a child has lived for [`HEALTHY`]. At the end each gets SIGTERM, and SIGKILL when it has not ended in time.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::privileges::{self, RunAs};

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
const HEALTHY: Duration = Duration::from_secs(10);
/// How long a child has to say that it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// What every child is told by its parent.
#[derive(Clone, Copy, Debug, Args)]
pub struct ChildArgs {
    /// Change to this user first, UID:GID
    #[arg(long)]
    run_as: Option<RunAs>,
    /// Die with this process
    #[arg(long)]
    parent: Option<u32>,
}

impl ChildArgs {
    /// Whether a parent process looks after this one.
    pub fn has_parent(&self) -> bool {
        self.parent.is_some()
    }

    /// Gives up privileges; before there are threads.
    pub fn enter(&self) -> anyhow::Result<()> {
        match self.parent {
            Some(parent) => privileges::become_child(self.run_as, parent),
            None => Ok(()),
        }
    }
}

/// How to run a child.
#[derive(Clone, Debug)]
pub struct ChildSpec {
    /// For logs and status.
    pub name: String,
    /// Arguments of this program.
    pub arguments: Vec<String>,
    /// The user.
    pub run_as: Option<RunAs>,
    /// How long it has after SIGTERM.
    pub grace: Duration,
}

/// A child as others see it.
#[derive(Debug)]
pub struct ChildState {
    /// Its name.
    pub name: String,
    pid: AtomicU32,
    starts: AtomicU64,
}

impl ChildState {
    /// The process that runs now.
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// How often it was started again.
    pub fn restarts(&self) -> u64 {
        self.starts.load(Ordering::Relaxed).saturating_sub(1)
    }
}

/// Keeps a child running until `stop`; lines that it prints go to `lines` (one line says that it is ready).
pub fn supervise(
    spec: ChildSpec,
    lines: mpsc::Sender<String>,
    stop: CancellationToken,
) -> (Arc<ChildState>, tokio::task::JoinHandle<()>) {
    let state = Arc::new(ChildState { name: spec.name.clone(), pid: AtomicU32::new(0), starts: AtomicU64::new(0) });
    let task = tokio::spawn(run(spec, Arc::clone(&state), lines, stop));
    (state, task)
}

async fn run(spec: ChildSpec, state: Arc<ChildState>, lines: mpsc::Sender<String>, stop: CancellationToken) {
    let mut pause = PAUSE_MIN;
    while !stop.is_cancelled() {
        let started = Instant::now();
        match start(&spec) {
            Ok((mut child, stdout)) => {
                state.pid.store(child.id().unwrap_or(0), Ordering::Relaxed);
                state.starts.fetch_add(1, Ordering::Relaxed);
                let reader = tokio::spawn(forward(stdout, lines.clone()));
                tokio::select! {
                    status = child.wait() => match status {
                        Ok(status) => warn!(child = spec.name, %status, "ended; starting it again"),
                        Err(error) => warn!(child = spec.name, %error, "lost; starting it again"),
                    },
                    () = stop.cancelled() => end(&spec, &mut child).await,
                }
                state.pid.store(0, Ordering::Relaxed);
                reader.abort();
            }
            Err(error) => warn!(child = spec.name, error = format!("{error:#}"), "cannot be started"),
        }
        pause = if started.elapsed() >= HEALTHY { PAUSE_MIN } else { pause };
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn start(spec: &ChildSpec) -> anyhow::Result<(Child, ChildStdout)> {
    // The program that runs, even when its file was replaced or removed meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.args(&spec.arguments).arg("--parent").arg(std::process::id().to_string());
    if let Some(run_as) = spec.run_as {
        command.arg("--run-as").arg(run_as.to_string());
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Ctrl-C at a terminal goes to `up` alone, which stops its children in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {}", spec.name))?;
    let stdout = child.stdout.take().context("a child without standard output")?;
    info!(child = spec.name, pid = child.id(), "started");
    Ok((child, stdout))
}

async fn forward(stdout: ChildStdout, lines: mpsc::Sender<String>) {
    let mut reader = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = reader.next_line().await {
        // Nobody listens after the first one: reading on keeps the pipe from filling.
        let _ = lines.try_send(line);
    }
}

async fn end(spec: &ChildSpec, child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
        // It is not reaped yet, so the number is still its own.
        if let Err(error) = rustix::process::kill_process(pid, Signal::TERM) {
            warn!(child = spec.name, %error, "cannot be told to end");
        }
    }
    if timeout(spec.grace, child.wait()).await.is_err() {
        warn!(child = spec.name, grace = ?spec.grace, "did not end; killing it");
        if let Err(error) = child.kill().await {
            warn!(child = spec.name, %error, "cannot be killed");
        }
    }
}

/// Waits for the first line of a child.
pub async fn ready(name: &str, lines: &mut mpsc::Receiver<String>) -> anyhow::Result<String> {
    timeout(READY_DEADLINE, lines.recv())
        .await
        .ok()
        .flatten()
        .with_context(|| format!("{name} was not ready within {READY_DEADLINE:?}; its log says why"))
}

/// Writes the line that says that this child is ready.
pub fn say_ready(line: &str) {
    println!("{line}");
}

/// A path as an argument of a child.
pub fn path_argument(path: &Path) -> anyhow::Result<String> {
    PathBuf::from(path)
        .into_os_string()
        .into_string()
        .map_err(|path| anyhow::anyhow!("{} is not UTF-8; choose another place", path.display()))
}
