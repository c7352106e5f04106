//! Our own cluster (e2e/cluster/): what the API does not give. Processes of a node are those that carry its network
//! namespaces' names on this machine, so they are looked for inside the node.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

/// Nodes of the cluster: node1 and node2.
const NODES: u32 = 2;

/// The cluster, by the directory of its scripts.
pub struct Cluster {
    scripts: PathBuf,
}

impl Cluster {
    pub fn new(scripts: PathBuf) -> Self {
        Self { scripts }
    }

    pub fn nodes(&self) -> u32 {
        NODES
    }

    fn script(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let what = || format!("{name} {}", arguments.join(" "));
        // The scripts enter the namespaces themselves; each has deadlines of its own.
        let output = Command::new(self.scripts.join(name)).args(arguments).output().with_context(what)?;
        if !output.status.success() {
            bail!("{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command inside a node.
    pub fn on(&self, node: u32, command: &[&str]) -> anyhow::Result<String> {
        let node = node.to_string();
        self.script("on.sh", &[&[node.as_str()], command].concat())
    }

    /// Process ids, as the node sees them, whose command line holds this text; the oldest first.
    pub fn processes(&self, node: u32, text: &str) -> anyhow::Result<Vec<u32>> {
        let list = self.on(node, &["ps", "-e", "-o", "pid=,args=", "--sort=start_time"])?;
        let ours = |line: &&str| line.contains(text) && !line.contains("ps -e -o");
        Ok(list.lines().filter(ours).filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect())
    }

    /// The same of all nodes: node and process.
    pub fn everywhere(&self, text: &str) -> anyhow::Result<Vec<(u32, u32)>> {
        let mut found = Vec::new();
        for node in 1..=NODES {
            found.extend(self.processes(node, text)?.into_iter().map(|process| (node, process)));
        }
        Ok(found)
    }

    /// kill -9.
    pub fn kill(&self, node: u32, process: u32) -> anyhow::Result<()> {
        self.on(node, &["kill", "-9", &process.to_string()]).map(drop)
    }

    /// Processes in uninterruptible sleep for longer than a moment.
    pub fn uninterruptible(&self, node: u32) -> anyhow::Result<Vec<String>> {
        let look = || -> anyhow::Result<Vec<String>> {
            let list = self.on(node, &["ps", "-e", "-o", "pid=,stat=,args="])?;
            let stuck = |line: &&str| line.split_whitespace().nth(1).is_some_and(|state| state.starts_with('D'));
            Ok(list.lines().filter(stuck).map(str::to_owned).collect())
        };
        let first = look()?;
        if first.is_empty() {
            return Ok(first);
        }
        std::thread::sleep(std::time::Duration::from_secs(5));
        let then = look()?;
        Ok(first.into_iter().filter(|line| then.contains(line)).collect())
    }

    /// The node's mount table.
    pub fn mounts(&self, node: u32) -> anyhow::Result<String> {
        self.on(node, &["cat", "/proc/self/mountinfo"])
    }

    /// Resident bytes of a process of a node.
    pub fn resident(&self, node: u32, process: u32) -> anyhow::Result<u64> {
        let kilobytes = self.on(node, &["ps", "-o", "rss=", "-p", &process.to_string()])?;
        Ok(kilobytes.trim().parse::<u64>()? * 1024)
    }

    /// CPU seconds that a process of a node has taken.
    pub fn cpu_seconds(&self, node: u32, process: u32) -> anyhow::Result<f64> {
        let stat = self.on(node, &["cat", &format!("/proc/{process}/stat")])?;
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
        // utime and stime are fields 14 and 15; the first after the name is 3.
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(ticks as f64 / 100.0)
    }

    pub fn power_off(&self, node: u32) -> anyhow::Result<()> {
        self.script("node.sh", &["off", &node.to_string()]).map(drop)
    }

    pub fn power_on(&self, node: u32) -> anyhow::Result<()> {
        self.script("node.sh", &["on", &node.to_string()]).map(drop)
    }

    pub fn stop_api_server(&self) -> anyhow::Result<()> {
        self.script("control.sh", &["stop", "apiserver"]).map(drop)
    }

    pub fn start_api_server(&self) -> anyhow::Result<()> {
        self.script("control.sh", &["start", "apiserver"]).map(drop)
    }

    /// Installs the chart as `make e2e` does, with other values on top (`--set-string`).
    pub fn install(&self, root: &Path, values: &[&str]) -> anyhow::Result<()> {
        let mut install = Command::new(root.join("e2e/install.sh"));
        for value in values {
            install.args(["--set-string", value]);
        }
        let output = install.output().context("e2e/install.sh")?;
        if !output.status.success() {
            bail!("e2e/install.sh: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}
