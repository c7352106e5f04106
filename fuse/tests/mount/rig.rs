//! A keeper, its daemons, a mounted volume.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use forebay_fuse::{
    DatasetRef, KeySource, TableSource, VolumeConfig,
    config::ConfigError,
    daemon::{DaemonOptions, Volumes, run_with},
    memory::{Contents, MemoryTree, pattern},
    node_cache::NodeCacheOptions,
};
use forebay_keeper::{Keeper, KeeperOptions, KeeperStatus, MountMode, MountSpec};
use forebay_protocol::{DatasetId, DatasetPath, FileVersion};

pub(crate) const VOLUME: &str = "test";
pub(crate) const MOUNTED_AT_NS: i64 = 1_600_000_000_000_000_000;
const SOCKET: &str = "FOREBAY_TEST_SOCKET";
const SCRIPT: &str = "FOREBAY_TEST_SCRIPT";
const NODE_CACHE: &str = "FOREBAY_TEST_NODE_CACHE";
/// Of the daemons' node cache.
const NODE_CACHE_CAPACITY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
/// Of a daemon that was told to end and has no keeper.
pub(crate) const LEAVE_PATIENCE: Duration = Duration::from_secs(3);

/// Whether mounts can be made here.
pub(crate) fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("no /dev/fuse: nothing is tested");
    }
    can
}

/// A line of the script by which all daemons make their trees.
#[derive(Clone, Debug)]
pub(crate) enum Line {
    /// A file of this pattern and size.
    Put(String, u64, u64),
    /// So many small files `000000`, ... in a directory.
    Many(String, u64),
    Remove(String),
    /// Forget the bytes of the current version.
    Drop(String),
    /// Every call takes so many microseconds.
    Latency(u64),
    /// Small files suit it.
    Small,
}

impl Line {
    fn encode(&self) -> String {
        let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self {
            Self::Put(path, seed, size) => format!("put {} {seed} {size}\n", hex(path)),
            Self::Many(path, count) => format!("many {} {count}\n", hex(path)),
            Self::Remove(path) => format!("remove {}\n", hex(path)),
            Self::Drop(path) => format!("drop {}\n", hex(path)),
            Self::Latency(micros) => format!("latency {micros}\n"),
            Self::Small => "small\n".to_owned(),
        }
    }

    fn decode(line: &str) -> Self {
        let fields: Vec<&str> = line.split(' ').collect();
        let text = |index: usize| {
            let hex = fields[index].as_bytes().chunks(2);
            let bytes = hex.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
            String::from_utf8(bytes.collect()).unwrap()
        };
        let number = |index: usize| fields[index].parse().unwrap();
        match fields[0] {
            "put" => Self::Put(text(1), number(2), number(3)),
            "many" => Self::Many(text(1), number(2)),
            "remove" => Self::Remove(text(1)),
            "drop" => Self::Drop(text(1)),
            "latency" => Self::Latency(number(1)),
            "small" => Self::Small,
            other => panic!("{other}"),
        }
    }
}

/// Size of the `number`th of [`Line::Many`].
pub(crate) fn size_of_many(number: u64) -> u64 {
    number % 3_000
}

fn path(text: &str) -> DatasetPath {
    DatasetPath::parse(text.as_bytes().to_vec()).unwrap()
}

/// Makes a tree from the script, and follows the script for changes.
struct Scripted {
    script: PathBuf,
}

impl Volumes for Scripted {
    type Tree = MemoryTree;

    fn open(&mut self, _config: &VolumeConfig) -> Result<MemoryTree, ConfigError> {
        let tree = MemoryTree::new();
        let mut script = File::open(&self.script).unwrap();
        let mut versions = HashMap::new();
        let mut done = 0;
        let mut step = {
            let tree = tree.clone();
            move || {
                let mut text = String::new();
                script.seek(SeekFrom::Start(done)).unwrap();
                script.read_to_string(&mut text).unwrap();
                // Whole lines only.
                let whole = text.rfind('\n').map_or(0, |end| end + 1);
                for line in text[..whole].lines() {
                    apply(&tree, &mut versions, Line::decode(line));
                }
                done += whole as u64;
            }
        };
        step();
        thread::spawn(move || {
            loop {
                thread::sleep(Duration::from_millis(10));
                step();
            }
        });
        Ok(tree)
    }

    fn metrics(_tree: &MemoryTree) -> Option<forebay_client::ClientMetrics> {
        None
    }
}

fn apply(tree: &MemoryTree, versions: &mut HashMap<String, FileVersion>, line: Line) {
    match line {
        Line::Put(name, seed, size) => {
            let version = tree.put(&path(&name), Contents::Pattern { seed, size }).unwrap();
            versions.insert(name, version);
        }
        Line::Many(directory, count) => {
            for number in 0..count {
                let contents = Contents::Pattern { seed: number, size: size_of_many(number) };
                tree.put(&path(&format!("{directory}/{number:06}")), contents).unwrap();
            }
        }
        Line::Remove(name) => tree.remove(&path(&name)).unwrap(),
        Line::Drop(name) => tree.drop_version(&path(&name), &versions[&name]),
        Line::Latency(micros) => tree.set_latency(Duration::from_micros(micros)),
        Line::Small => tree.suits_small(),
    }
}

/// No test: what a child process runs.
#[test]
fn daemon_child() {
    let (Some(socket), Some(script)) = (std::env::var_os(SOCKET), std::env::var_os(SCRIPT)) else { return };
    // It outlives its keeper, but not its test.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let node_cache = std::env::var_os(NODE_CACHE).map(|dir| NodeCacheOptions {
        dir: dir.into(),
        capacity: NODE_CACHE_CAPACITY,
        free_percent: 0,
    });
    let options = DaemonOptions { leave_patience: LEAVE_PATIENCE, node_cache, ..DaemonOptions::new(socket) };
    let result = run_with(options, Scripted { script: script.into() });
    if let Err(error) = &result {
        eprintln!("daemon {}: {error}", std::process::id());
    }
    std::process::exit(i32::from(result.is_err()));
}

/// Where the node cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodeCache {
    Directory,
    /// One of its own, of so many bytes.
    FileSystem(u64),
}

pub(crate) struct Rig {
    directory: tempfile::TempDir,
    node_cache: Option<NodeCache>,
    keeper: Option<Keeper>,
    daemons: Vec<Child>,
}

impl Rig {
    /// Mounts a tree, with an active daemon and a standby.
    pub(crate) fn new(lines: &[Line]) -> Self {
        Self::start(lines, None)
    }

    /// The same, with a node cache.
    pub(crate) fn with_node_cache(lines: &[Line]) -> Self {
        Self::start(lines, Some(NodeCache::Directory))
    }

    /// The same, on a file system of so many bytes.
    pub(crate) fn with_node_cache_of(bytes: u64, lines: &[Line]) -> Self {
        Self::start(lines, Some(NodeCache::FileSystem(bytes)))
    }

    fn start(lines: &[Line], node_cache: Option<NodeCache>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut rig = Self { directory, node_cache, keeper: None, daemons: Vec::new() };
        if let Some(NodeCache::FileSystem(bytes)) = node_cache {
            fs::create_dir(rig.node_cache()).unwrap();
            let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("tmpfs", rig.node_cache(), "tmpfs", flags, Some(options.as_c_str())).unwrap();
        }
        File::create(rig.script()).unwrap();
        rig.add(lines);
        rig.start_keeper();
        rig.spawn();
        rig.spawn();
        fs::create_dir(rig.root()).unwrap();
        let config = VolumeConfig {
            dataset: DatasetRef::Id(DatasetId::local("default", VOLUME)),
            name: format!("default/{VOLUME}"),
            table: TableSource::File(PathBuf::from("/nonexistent")),
            key: KeySource::File(PathBuf::from("/nonexistent")),
            budget_bytes: 64 << 20,
            deadline_ms: 10_000,
            max_read_ahead_bytes: 0,
            connections_per_worker: 1,
            ttl_seconds: 86_400,
            mounted_at_ns: MOUNTED_AT_NS,
        };
        let mut spec = MountSpec::new(VOLUME, rig.root(), config.encode().unwrap());
        spec.mode = MountMode::suitable();
        rig.keeper().mount(spec).unwrap();
        rig.wait(|status| status.daemons.len() == 2 && status.volume(VOLUME).is_some_and(|v| v.daemon.is_some()));
        rig
    }

    /// A keeper; it takes over the mounts of the one before.
    pub(crate) fn start_keeper(&mut self) {
        let options = KeeperOptions {
            state_file: Some(self.directory.path().join("mounts.json")),
            resume: true,
            heartbeat_timeout: Duration::from_secs(2),
            node_arena: 64 << 20,
            max_handles: 4096,
            ..KeeperOptions::new(self.directory.path().join("keeper.sock"))
        };
        let (keeper, _events, cleaned) = Keeper::start(options).unwrap();
        assert_eq!(cleaned, []);
        self.keeper = Some(keeper);
    }

    /// The keeper leaves everything to the daemons.
    pub(crate) fn keeper_leaves(&mut self) {
        self.keeper.take().unwrap().leave(PATIENCE).unwrap();
    }

    /// Whether that daemon still runs.
    pub(crate) fn runs(&mut self, pid: i32) -> bool {
        let child = self.daemons.iter_mut().find(|child| child.id() == pid as u32).unwrap();
        child.try_wait().unwrap().is_none()
    }

    pub(crate) fn keeper(&self) -> &Keeper {
        self.keeper.as_ref().unwrap()
    }

    fn script(&self) -> PathBuf {
        self.directory.path().join("script")
    }

    /// Directory of the node cache.
    pub(crate) fn node_cache(&self) -> PathBuf {
        self.directory.path().join("node-cache")
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Adds lines to the script of all daemons.
    pub(crate) fn add(&self, lines: &[Line]) {
        let text: String = lines.iter().map(Line::encode).collect();
        OpenOptions::new().append(true).open(self.script()).unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Starts another daemon.
    pub(crate) fn spawn(&mut self) {
        self.daemons.retain_mut(|child| child.try_wait().unwrap().is_none());
        let mut command = Command::new(std::env::current_exe().unwrap());
        if self.node_cache.is_some() {
            command.env(NODE_CACHE, self.node_cache());
        }
        let child = command
            .args(["--exact", "rig::daemon_child", "--nocapture"])
            .env(SOCKET, self.directory.path().join("keeper.sock"))
            .env(SCRIPT, self.script())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.daemons.push(child);
    }

    pub(crate) fn status(&self) -> KeeperStatus {
        self.keeper().status().unwrap()
    }

    pub(crate) fn wait(&self, what: impl Fn(&KeeperStatus) -> bool) -> KeeperStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if what(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{status:#?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn counter(&self, counter: forebay_keeper::tables::Counter) -> u64 {
        self.status().volume(VOLUME).unwrap().counters.get(counter)
    }

    /// Sends a signal to the daemon that serves.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) -> i32 {
        let pid = self.status().active().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
        pid
    }

    /// Waits until somebody else than `before` serves.
    pub(crate) fn wait_for_successor(&self, before: i32) {
        self.wait(|status| {
            status.active().is_some_and(|pid| pid != before)
                && status.volume(VOLUME).is_some_and(|volume| volume.daemon == status.active())
        });
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            let result = keeper.shutdown(Duration::from_secs(2));
            for mut child in self.daemons.drain(..) {
                // They stop by themselves when the keeper says so; none may be left in any case.
                let _ = child.kill();
                let _ = child.wait();
            }
            if !thread::panicking() {
                result.unwrap();
            }
        }
        if let Some(NodeCache::FileSystem(_)) = self.node_cache {
            let _ = rustix::mount::unmount(self.node_cache(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// The bytes of a pattern.
pub(crate) fn expected(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pattern(seed, offset, &mut bytes);
    bytes
}

/// Maps a part of a file, at a page, drops what is cached of it, and verifies it.
pub(crate) fn read_mapped(path: &Path, seed: u64, from: u64, len: usize) {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, from, std::num::NonZeroU64::new(len as u64), rustix::fs::Advice::DontNeed).unwrap();
    // SAFETY: a new read-only mapping within a file that does not change; unmapped before anybody could use it again.
    unsafe {
        let address = rustix::mm::mmap(
            std::ptr::null_mut(),
            len,
            rustix::mm::ProtFlags::READ,
            rustix::mm::MapFlags::SHARED,
            &file,
            from,
        )
        .unwrap();
        assert!(std::slice::from_raw_parts(address.cast::<u8>(), len) == expected(seed, from, len));
        rustix::mm::munmap(address, len).unwrap();
    }
}

/// A C string of a path.
pub(crate) fn c_path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap()
}
