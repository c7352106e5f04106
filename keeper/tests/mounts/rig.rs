//! A keeper with its daemons, for one test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forebay_keeper::{Event, Keeper, KeeperOptions, KeeperStatus, MountSpec};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};

use super::daemon::{Config, SOCKET};

pub(crate) const VOLUME: &str = "default/test";

pub(crate) struct Rig {
    pub(crate) keeper: Option<Keeper>,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) target: PathBuf,
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
    /// How many daemons there should be.
    pub(crate) daemons: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    supervisor: Option<JoinHandle<()>>,
}

impl Rig {
    pub(crate) fn new(config: Config, change: impl FnOnce(&mut KeeperOptions)) -> Self {
        Self::with(tempfile::tempdir().unwrap(), config, change, |_| ())
    }

    pub(crate) fn with(
        dir: tempfile::TempDir,
        config: Config,
        change: impl FnOnce(&mut KeeperOptions),
        spec: impl FnOnce(&mut MountSpec),
    ) -> Self {
        // Longer than an address of a Unix socket.
        let deep = dir.path().join("pod".repeat(30)).join("volumes~".repeat(10));
        std::fs::create_dir_all(&deep).unwrap();
        let socket = deep.join("keeper.sock");
        let mut options = KeeperOptions::new(&socket);
        options.state_file = Some(dir.path().join("mounts.json"));
        options.abort_after = Duration::from_secs(30);
        change(&mut options);
        let (keeper, mut receiver, _) = Keeper::start(options).unwrap();
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        std::thread::spawn(move || {
            while let Some(event) = receiver.blocking_recv() {
                sink.lock().push(event);
            }
        });
        let target = dir.path().join("mnt");
        std::fs::create_dir_all(&target).unwrap();
        let (daemons, stop) = (Arc::new(AtomicUsize::new(2)), Arc::new(AtomicBool::new(false)));
        let supervisor = {
            let (daemons, stop) = (Arc::clone(&daemons), Arc::clone(&stop));
            std::thread::spawn(move || supervise(&socket, &daemons, &stop))
        };
        let supervisor = Some(supervisor);
        let rig = Self { keeper: Some(keeper), dir, target, events, daemons, stop, supervisor };
        let mut mount = MountSpec::new(VOLUME, &rig.target, serde_json::to_vec(&config).unwrap());
        spec(&mut mount);
        let info = rig.keeper().mount(mount).unwrap();
        assert_eq!(info.target, rig.target.canonicalize_parent());
        rig
    }

    pub(crate) fn keeper(&self) -> &Keeper {
        self.keeper.as_ref().unwrap()
    }

    pub(crate) fn status(&self) -> KeeperStatus {
        self.keeper().status().unwrap()
    }

    /// Until a daemon serves and another stands by.
    pub(crate) fn ready(&self) {
        self.wait("both daemons", |status| {
            status.daemons.len() == 2
                && status.volumes.iter().all(|volume| volume.state == forebay_keeper::VolumeState::Served)
        });
    }

    pub(crate) fn wait(&self, what: &str, done: impl Fn(&KeeperStatus) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.status();
            if done(&status) {
                return;
            }
            assert!(Instant::now() < end, "{what} not within 20 s: {status:#?}\n{:#?}", self.events.lock());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn wait_event(&self, what: &str, is: impl Fn(&Event) -> bool) -> Event {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(event) = self.events.lock().iter().find(|event| is(event)) {
                return event.clone();
            }
            assert!(Instant::now() < end, "{what} not within 20 s: {:#?}", self.events.lock());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn signal_active(&self, signal: Signal) -> i32 {
        let pid = self.status().active().unwrap();
        signal_pid(pid, signal);
        pid
    }

    /// Lines of the mount table with this test's directory.
    pub(crate) fn mounts(&self) -> usize {
        mounts_under(self.dir.path())
    }
}

trait CanonicalParent {
    fn canonicalize_parent(&self) -> PathBuf;
}

impl CanonicalParent for PathBuf {
    /// Without touching the mount itself.
    fn canonicalize_parent(&self) -> PathBuf {
        self.parent().unwrap().canonicalize().unwrap().join(self.file_name().unwrap())
    }
}

/// A daemon that is gone already is as good.
pub(crate) fn signal_pid(pid: i32, signal: Signal) {
    match kill_process(Pid::from_raw(pid).unwrap(), signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn mounts_under(dir: &Path) -> usize {
    let dir = dir.canonicalize().unwrap();
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter(|line| line.contains(dir.to_str().unwrap())).count()
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            let result = keeper.shutdown(Duration::ZERO);
            if !std::thread::panicking() {
                result.unwrap();
                assert_eq!(self.mounts(), 0);
            }
        }
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.supervisor.take().unwrap().join();
    }
}

/// Keeps as many daemons alive as there should be. Children of this thread die with it.
pub(crate) fn supervise(socket: &Path, daemons: &AtomicUsize, stop: &AtomicBool) {
    let mut children: Vec<Child> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        children.retain_mut(|child| child.try_wait().unwrap().is_none());
        if children.len() < daemons.load(Ordering::Relaxed) {
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "daemon_main", "--nocapture"])
                .env(SOCKET, socket)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn();
            children.push(child.unwrap());
            continue;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    for child in &mut children {
        let _ = child.kill();
        let _ = child.wait();
    }
}
