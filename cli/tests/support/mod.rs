//! A real S3 server, a real `forebay up`, real mounts. Everything is taken away when a test ends, also when it fails.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod node;
pub mod readers;

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use bytes::Bytes;
pub use forebay_test_store::content;
use forebay_test_store::{Options, TestStore};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// The bucket of the tests.
pub const BUCKET: &str = "bucket";
/// How long `up` has to be ready, on a busy machine with a debug build.
const READY: Duration = Duration::from_secs(60);

/// Whether this process can mount; says so when it cannot.
pub fn can_mount() -> bool {
    let able = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !able {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    able
}

/// Whether the long forms are wanted (`make nightly`).
pub fn long() -> bool {
    std::env::var_os("FOREBAY_LONG").is_some()
}

/// A store, a manifest, and an instance that serves it. Dropped in this order: the directory is the last to go.
pub struct Bench {
    pub up: Up,
    pub store: TestStore,
    pub dir: tempfile::TempDir,
}

/// What differs between tests.
#[derive(Clone, Debug)]
pub struct Setup {
    pub shape: &'static str,
    pub workers: u32,
    pub capacity: &'static str,
    pub latency: Duration,
    pub arguments: Vec<String>,
}

impl Setup {
    /// With a mount of this shape.
    pub fn shaped(shape: &'static str) -> Self {
        Self { shape, ..Self::default() }
    }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            shape: "Auto",
            workers: 3,
            capacity: "4Gi",
            latency: Duration::ZERO,
            // Without a node cache what is read again comes from a worker again.
            arguments: ["--deadline", "20", "--node-cache", "0"].map(str::to_owned).to_vec(),
        }
    }
}

impl Bench {
    /// Starts a store, lets `fill` put objects, and serves them as Dataset `data`.
    pub async fn start<F>(setup: Setup, fill: impl FnOnce(TestStore) -> F) -> Self
    where
        F: Future<Output = TestStore>,
    {
        let dir = test_dir();
        let store = TestStore::start(Options { latency: setup.latency, dir: Some(dir.path().to_owned()) }).await;
        store.create_bucket(BUCKET).await;
        let store = fill(store).await;
        let manifest = dir.path().join("data.yaml");
        std::fs::write(&manifest, manifest_text(&setup, &store)).unwrap();
        let up = Up::start(&manifest, dir.path(), &setup.arguments);
        Self { up, store, dir }
    }

    /// Ends the instance; it must end well and leave nothing.
    pub fn stop(self) {
        self.up.stop();
    }

    /// The path of a file in the mount.
    pub fn path(&self, name: &str) -> PathBuf {
        self.up.mount.join(name)
    }
}

/// The shapes of mounts.
pub const SHAPES: [&str; 2] = ["Large", "Small"];

/// A temporary directory that the unprivileged user of workers and daemons can enter.
pub fn test_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("forebay-test-").tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A runtime and one Dataset over the bucket.
pub fn manifest_text(setup: &Setup, store: &TestStore) -> String {
    format!(
        "apiVersion: forebay.io/v1alpha1
kind: CacheRuntime
metadata: {{name: runtime}}
spec:
  replicas: {workers}
  tiers:
  - {{name: disk, medium: SSD, capacity: {capacity}, volume: {{emptyDir: {{}}}}}}
---
apiVersion: v1
kind: Secret
metadata: {{name: keys}}
stringData: {{accessKeyId: {access}, secretAccessKey: {secret}}}
---
apiVersion: forebay.io/v1alpha1
kind: Dataset
metadata: {{name: data}}
spec:
  runtimeRef: {{name: runtime}}
  volume: {{shape: {shape}}}
  sources:
  - path: /
    uri: s3://{BUCKET}/
    secretRef: {{name: keys}}
    s3: {{endpoint: \"{endpoint}\", region: us-east-1, addressing: Path}}
",
        shape = setup.shape,
        workers = setup.workers,
        capacity = setup.capacity,
        access = store.access_key(),
        secret = store.secret_key(),
        endpoint = store.endpoint(),
    )
}

/// A running `forebay up`.
pub struct Up {
    pub state: PathBuf,
    pub mount: PathBuf,
    child: Child,
}

impl Up {
    /// Starts it and waits until it serves; Dataset `data` is expected.
    pub fn start(manifest: &Path, dir: &Path, arguments: &[String]) -> Self {
        Self::start_with(command(), manifest, dir, arguments)
    }

    /// The same with a prepared command (another user, say).
    pub fn start_with(mut command: Command, manifest: &Path, dir: &Path, arguments: &[String]) -> Self {
        let state = dir.join("state");
        // SAFETY: prctl is async-signal-safe, and nothing else happens between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let mut child = command
            .args(["up", "--output", "json", "--file"])
            .arg(manifest)
            .arg("--mount")
            .arg(dir.join("mnt"))
            .arg("--state-dir")
            .arg(&state)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line);
            let _ = sender.send(line);
        });
        let line = line.recv_timeout(READY).unwrap_or_default();
        let Ok(ready) = serde_json::from_str::<Value>(&line) else {
            let _ = child.kill();
            panic!("forebay up was not ready; it said {line:?}");
        };
        let mount = ready["datasets"][0]["mount"].as_str().unwrap().into();
        Self { state, mount, child }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs another command against it.
    pub fn forebay(&self, arguments: &[&str]) -> Output {
        command().args(arguments).arg("--state-dir").arg(&self.state).output().unwrap()
    }

    /// Runs a command that must succeed; gives its JSON (the last line of a stream).
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.forebay(&[arguments, &["--output", "json"]].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text)
            .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}"))
    }

    /// `forebay status`.
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// The daemon that serves the mount.
    pub fn daemon(&self) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(pid) = self.status()["mounts"][0]["daemonPid"].as_u64() {
                return u32::try_from(pid).unwrap();
            }
            assert!(Instant::now() < deadline, "no daemon serves the mount");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The processes of the workers, in order; `None` for one that does not run now.
    pub fn workers(&self) -> Vec<Option<u32>> {
        let status = self.status();
        status["workerProcesses"]
            .as_array()
            .unwrap()
            .iter()
            .map(|worker| worker["pid"].as_u64().map(|pid| u32::try_from(pid).unwrap()))
            .collect()
    }

    /// Everything that was started: workers and daemons.
    pub fn children(&self) -> Vec<u32> {
        let status = self.status();
        ["workerProcesses", "daemons"]
            .iter()
            .flat_map(|group| status[*group].as_array().unwrap().clone())
            .filter_map(|child| child["pid"].as_u64())
            .map(|pid| u32::try_from(pid).unwrap())
            .collect()
    }

    /// Kills it with -9, as an OOM killer would; children follow by themselves.
    pub fn kill(mut self) {
        let children = self.children();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        for pid in children {
            wait_gone(pid);
        }
        std::mem::forget(self);
    }

    /// Interrupts it as a person would; it must end well and leave nothing.
    pub fn stop(mut self) {
        let children = self.children();
        let mount = self.mount.clone();
        signal(self.pid(), Signal::INT);
        let status = wait(&mut self.child, Duration::from_secs(45));
        assert!(status.success(), "{status}");
        assert!(!is_mounted(&mount), "{} is still mounted", mount.display());
        for pid in children {
            wait_gone(pid);
        }
        for left in
            ["up.lock", "up.json", "control.sock", "keeper.sock", "mounts.json", "mounts.json.lock", "made.json"]
        {
            assert!(!self.state.join(left).exists(), "{left} was left");
        }
        assert!(!mount.exists(), "the mount point {} was left", mount.display());
        std::mem::forget(self);
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // A test failed: end it the way that cleans up, then make sure.
        signal(self.pid(), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if is_mounted(&self.mount) {
            let _ = rustix::mount::unmount(&self.mount, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// The program under test.
pub fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_forebay"))
}

/// Sends a signal to a process that is known to exist.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

/// Waits for a child, with a deadline.
pub fn wait(child: &mut Child, patience: Duration) -> std::process::ExitStatus {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "process {} did not end within {patience:?}", child.id());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until a process is gone (or a zombie that nobody has reaped yet).
pub fn wait_gone(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process runs.
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}

/// Whether something is mounted at `path`, by the mount table alone.
pub fn is_mounted(path: &Path) -> bool {
    mounts().iter().any(|mount| mount == path)
}

/// All mount points.
pub fn mounts() -> Vec<PathBuf> {
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .collect()
}

/// Puts the bytes of a file into the page cache and keeps them there for as long as the map lives.
pub fn lock_pages(path: &Path) -> memmap2::Mmap {
    let file = std::fs::File::open(path).unwrap();
    // SAFETY: nobody reads through this map.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    map.lock().unwrap();
    map
}

/// Waits until `done` holds.
pub fn eventually(what: &str, patience: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen within {patience:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Contents of a small object.
pub fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}
