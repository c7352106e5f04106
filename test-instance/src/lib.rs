//! `forebay up` as the child of a program that tries it out (`make demo`, `make bench`), and what it says of itself.
//!
//! Whoever gives up half-way leaves nothing behind: an [`Instance`] that is dropped is interrupted and waited for.

mod hints;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

pub use self::hints::hint;

const READY: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(30);

/// A running instance.
pub struct Instance {
    program: PathBuf,
    state: PathBuf,
    child: Child,
    /// Where the Dataset is mounted.
    pub mount: PathBuf,
}

impl Instance {
    /// Starts `forebay up` on a manifest and waits until it serves. State, mounts and log are in `dir`; `arguments` are
    /// further ones of `up`.
    pub async fn start(program: &Path, manifest: &Path, dir: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let state = dir.join("state");
        let mut child = Command::new(program)
            .args(["up", "--output", "json", "--file"])
            .arg(manifest)
            .arg("--mount")
            .arg(dir.join("mnt"))
            .arg("--state-dir")
            .arg(&state)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.join("forebay.log")).context("creating the log")?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let stdout = child.stdout.take().context("no standard output")?;
        // From here on there is something to take down.
        let mut instance = Self { program: program.to_owned(), state, child, mount: PathBuf::new() };
        let line = timeout(READY, BufReader::new(stdout).lines().next_line())
            .await
            .context("forebay up was not ready in time")??;
        let Some(line) = line else {
            let log = std::fs::read_to_string(dir.join("forebay.log")).unwrap_or_default();
            bail!("forebay up ended:\n{log}");
        };
        let ready: Value = serde_json::from_str(&line)?;
        let mount = ready["datasets"][0]["mount"].as_str().context("no mount in the answer of forebay up")?;
        instance.mount = mount.into();
        Ok(instance)
    }

    /// The process `forebay up`: the keeper; workers and daemons are its children.
    pub fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("forebay up has ended")
    }

    /// Its state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Files that are complete in the node cache.
    pub fn kept(&self) -> anyhow::Result<usize> {
        let datasets = match std::fs::read_dir(self.state.join("node-cache")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            datasets => datasets?,
        };
        let mut kept = 0;
        for dataset in datasets {
            let dataset = dataset?;
            if dataset.file_name() != "filling" {
                let files = std::fs::read_dir(dataset.path())?.flatten();
                kept += files.filter(|file| file.path().extension().is_none()).count();
            }
        }
        Ok(kept)
    }

    /// What `forebay status` says.
    pub async fn status(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.command(&["status"]).await?)?)
    }

    /// Runs another command against it; gives what it printed, as JSON.
    pub async fn command(&self, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
        let output = Command::new(&self.program)
            .args(arguments)
            .args(["--output", "json", "--state-dir"])
            .arg(&self.state)
            .kill_on_drop(true)
            .output()
            .await?;
        if !output.status.success() {
            bail!("forebay {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(output.stdout)
    }

    /// Kills (-9) the daemon that serves the mount; gives its pid.
    pub async fn kill_daemon(&self) -> anyhow::Result<u64> {
        let status = self.status().await?;
        let pid = status["mounts"][0]["daemonPid"].as_u64().context("no daemon serves")?;
        kill(pid)?;
        Ok(pid)
    }

    /// Kills (-9) the first worker; gives its pid.
    pub async fn kill_worker(&self) -> anyhow::Result<u64> {
        let status = self.status().await?;
        let workers = status["workerProcesses"].as_array().context("no workers")?;
        let pid = workers.iter().find_map(|worker| worker["pid"].as_u64()).context("no worker runs")?;
        kill(pid)?;
        Ok(pid)
    }

    /// Interrupts it as a person would, and checks that nothing is left.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(pid) = self.child.id() {
            signal(u64::from(pid), Signal::INT)?;
        }
        let status = timeout(END, self.child.wait()).await.context("forebay up did not end")??;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        if mounts.lines().any(|line| line.contains(&*self.mount.to_string_lossy())) {
            bail!("the mount {} was left behind", self.mount.display());
        }
        if !status.success() {
            bail!("forebay up ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // None: it was waited for.
        let Some(pid) = self.child.id() else { return };
        let _ = signal(u64::from(pid), Signal::INT);
        let deadline = Instant::now() + END;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn kill(pid: u64) -> anyhow::Result<()> {
    signal(pid, Signal::KILL)
}

fn signal(pid: u64, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process id")?;
    rustix::process::kill_process(pid, signal).context("sending a signal")
}
