//! FUSE daemons as child processes, of an unprivileged user where it can reach this binary.

use std::{
    os::unix::{
        fs::PermissionsExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use forebay_fuse::{
    VolumeConfig,
    config::ConfigError,
    daemon::{DaemonOptions, Volumes, run, run_with},
    memory::{Contents, MemoryTree},
};
use forebay_protocol::DatasetPath;
use rustix::process::{Pid, Signal};

const SOCKET: &str = "FOREBAY_TEST_SOCKET";
const WORKERS: &str = "FOREBAY_TEST_WORKERS";
/// The user that the driver expects.
const USER: u32 = 10001;

/// The file of every tree in memory.
pub(crate) const FILE: &str = "some/file";
pub(crate) const SEED: u64 = 7;
pub(crate) const SIZE: u64 = 3 << 20;

/// A tree with one file.
struct Memory;

impl Volumes for Memory {
    type Tree = MemoryTree;

    fn open(&mut self, _config: &VolumeConfig) -> Result<MemoryTree, ConfigError> {
        let tree = MemoryTree::new();
        let path = DatasetPath::parse(format!("/{FILE}").into_bytes()).unwrap();
        tree.put(&path, Contents::Pattern { seed: SEED, size: SIZE }).unwrap();
        Ok(tree)
    }

    fn metrics(_tree: &MemoryTree) -> Option<forebay_client::ClientMetrics> {
        None
    }
}

/// No test: what a child process runs.
#[test]
fn daemon_child() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let options = DaemonOptions { connect_deadline: None, ..DaemonOptions::new(socket) };
    let result = if std::env::var_os(WORKERS).is_some() { run(options) } else { run_with(options, Memory) };
    if let Err(error) = &result {
        eprintln!("daemon {}: {error}", std::process::id());
    }
    std::process::exit(i32::from(result.is_err()));
}

/// What trees daemons have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trees {
    Memory,
    Workers,
}

/// A daemon, killed when it is dropped.
pub(crate) struct Daemon(Child);

impl Daemon {
    pub(crate) fn start(socket: &Path, trees: Trees) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(&program);
        command.args(["--exact", "daemon::daemon_child", "--nocapture"]).env(SOCKET, socket);
        if trees == Trees::Workers {
            command.env(WORKERS, "1");
        }
        if is_reachable(&program) && is_reachable(socket.parent().unwrap()) {
            command.uid(USER).gid(USER);
        } else {
            eprintln!("daemons run as root: others cannot reach {}", program.display());
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: prctl is async-signal-safe, and nothing else happens between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        Self(command.spawn().unwrap())
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }

    /// Ends it with -9, and sees that it was this that ended it.
    pub(crate) fn kill(mut self) {
        self.0.kill().unwrap();
        assert_eq!(self.0.wait().unwrap().signal(), Some(9));
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether every user gets to a path.
fn is_reachable(path: &Path) -> bool {
    path.ancestors().all(|part| std::fs::metadata(part).is_ok_and(|found| found.permissions().mode() & 0o001 != 0))
}
