//! Measuring: CPU and memory of processes, on which CPU they run, and the state of the kernel's caches.

use std::{collections::HashMap, ops::Range, time::Duration};

use anyhow::{Context, ensure};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use crate::job::{self, Work};

/// Units in which /proc counts CPU: USER_HZ, 100 on every architecture that Linux has today.
const TICK: f64 = 0.01;
/// The least that is touched before caches grow, and the most.
const TOUCH: std::ops::RangeInclusive<u64> = 1 << 28..=6 << 30;

/// What a process is to a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// `forebay up`.
    Keeper,
    /// `forebay fuse`, active or standby.
    Daemon,
    /// `forebay worker`.
    Worker,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Daemon, Self::Keeper, Self::Worker];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keeper => "keeper",
            Self::Daemon => "daemons",
            Self::Worker => "workers",
        }
    }

    fn of(pid: u32) -> Option<Self> {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        match line.split(|byte| *byte == 0).nth(1)? {
            b"up" => Some(Self::Keeper),
            b"fuse" => Some(Self::Daemon),
            b"worker" => Some(Self::Worker),
            // A child that has not become what it will be.
            _ => None,
        }
    }
}

/// A process at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// What it is.
    pub role: Role,
    /// CPU that it, and children of it that ended, used so far, in seconds.
    pub cpu: f64,
    /// Resident memory, in bytes.
    pub rss: u64,
    /// The most of it since [`forget_peaks`].
    pub peak: u64,
}

/// `forebay up` and its children.
pub fn tree(keeper: u32) -> Vec<Process> {
    let children = |pid: u32| {
        let threads = numbers(&format!("/proc/{pid}/task"));
        threads.into_iter().flat_map(move |thread| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/children")).unwrap_or_default();
            text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
        })
    };
    std::iter::once(keeper).chain(children(keeper)).filter_map(process).collect()
}

/// None: it ended meanwhile.
fn process(pid: u32) -> Option<Process> {
    let role = Role::of(pid)?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Process {
        pid,
        role,
        cpu: cpu_of(&stat, ALL)?,
        rss: memory_of(&status, "VmRSS:")?,
        peak: memory_of(&status, "VmHWM:")?,
    })
}

/// utime, stime, cutime and cstime among the fields of /proc/PID/stat after the name.
const ALL: Range<usize> = 11..15;
/// cutime and cstime.
const CHILDREN: Range<usize> = 13..15;

/// Fields of /proc/PID/stat that count CPU, in seconds.
fn cpu_of(stat: &str, fields: Range<usize>) -> Option<f64> {
    // The name may hold anything; the fields after it do not: the first of them is the third of proc_pid_stat(5).
    let after: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = after.get(fields)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(ticks as f64 * TICK)
}

/// CPU of children of this process that ended, in seconds.
pub fn children() -> anyhow::Result<f64> {
    cpu_of(&std::fs::read_to_string("/proc/self/stat")?, CHILDREN).context("/proc/self/stat is not understood")
}

fn memory_of(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// CPU by role between two looks at the same instance.
pub fn cpu_between(before: &[Process], after: &[Process]) -> HashMap<Role, f64> {
    let sum = |processes: &[Process], role| {
        processes.iter().filter(|process| process.role == role).map(|process| process.cpu).sum::<f64>()
    };
    Role::ALL.into_iter().map(|role| (role, sum(after, role) - sum(before, role))).collect()
}

/// Peaks of memory count from here on.
pub fn forget_peaks(processes: &[Process]) -> anyhow::Result<()> {
    for process in processes {
        std::fs::write(format!("/proc/{}/clear_refs", process.pid), "5").context("resetting a peak of memory")?;
    }
    Ok(())
}

/// The CPU on which reader and servers share what they cost: the last one that this process may use.
pub fn shared_cpu() -> anyhow::Result<usize> {
    let allowed = sched_getaffinity(None)?;
    (0..CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu)).context("no CPU may be used")
}

/// Moves this thread, and those that it starts, to one CPU.
pub fn pin_self(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Moves all threads of processes to one CPU, or lets them run wherever this one may.
pub fn pin(processes: &[Process], cpu: Option<usize>) -> anyhow::Result<()> {
    let set = match cpu {
        Some(cpu) => {
            let mut set = CpuSet::new();
            set.set(cpu);
            set
        }
        None => sched_getaffinity(None)?,
    };
    for process in processes {
        for thread in numbers(&format!("/proc/{}/task", process.pid)) {
            let Some(thread) = i32::try_from(thread).ok().and_then(Pid::from_raw) else { continue };
            match sched_setaffinity(Some(thread), &set) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error).context("moving a process to a CPU"),
            }
        }
    }
    Ok(())
}

fn numbers(directory: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Writes out what was written, once: on a machine with other jobs this takes long.
pub async fn settle() -> anyhow::Result<()> {
    Ok(tokio::task::spawn_blocking(rustix::fs::sync).await?)
}

/// Empties the kernel's caches of everything that is on disk, after making sure that the memory which fills them again
/// is there: `bytes` will be read. What was written a moment ago is kept: see [`settle`].
pub async fn forget(bytes: u64) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(|| std::fs::write("/proc/sys/vm/drop_caches", "3"))
        .await?
        .context("dropping caches, which only root can")?;
    let free = available()? / 2;
    job::run(Work::Touch { bytes: bytes.clamp(*TOUCH.start(), *TOUCH.end()).min(free) }, None).await?;
    // Requests that the kernel sends for what it forgot.
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}

/// Memory that may be used, in bytes.
pub fn available() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let bytes = memory_of(&text, "MemAvailable:").context("no MemAvailable in /proc/meminfo")?;
    ensure!(bytes > 0, "no memory is free");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_process_hides_no_field() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 10 20 3 4 20 0 5 0 99 0 0";
        assert_eq!(cpu_of(stat, ALL), Some(0.37));
        assert_eq!(cpu_of(stat, CHILDREN), Some(0.07));
        assert_eq!(cpu_of("7 (a) S 1", ALL), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        assert_eq!(memory_of("Name:\tx\nVmRSS:\t    12 kB\n", "VmRSS:"), Some(12 * 1024));
        assert_eq!(memory_of("Name:\tx\n", "VmRSS:"), None);
    }

    #[test]
    fn this_process_is_found() {
        let own = std::process::id();
        let stat = std::fs::read_to_string(format!("/proc/{own}/stat")).unwrap();
        assert!(cpu_of(&stat, ALL).is_some());
        assert!(numbers(&format!("/proc/{own}/task")).contains(&own));
        assert!(available().unwrap() > 0);
    }
}
