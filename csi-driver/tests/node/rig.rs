//! A driver process with its daemons, and the kubelet's side of its sockets.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    io::Read as _,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use forebay_csi::proto::csi::{
    NodeGetVolumeHealthRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, VolumeCapability, VolumeHealth, VolumeUsage,
    node_client::NodeClient,
    volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode},
    volume_health::VolumeHealthEntry,
};
use forebay_fuse::memory::pattern;
use hyper_util::rt::TokioIo;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    process::Signal,
    thread::UnshareFlags,
};
use tokio::net::UnixStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::daemon::{Daemon, FILE, SEED, SIZE, Trees};

/// For whatever should happen soon, on a busy machine with a debug build.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const DATASET: &str = "7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11";
pub(crate) const NAME: &str = "default/pictures";
/// Of the directories of all rigs.
const PREFIX: &str = "forebay-csi-";
/// In no log, ever.
pub(crate) const KEY: &str = "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e75ec2e75ec2e75ec2e75ec2e75ec2";

/// Whether this process can mount; says so when it cannot.
pub(crate) fn can_mount() -> bool {
    let able = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !able {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    able
}

/// Everything that a test has. Dropped in this order.
pub(crate) struct Rig {
    pub(crate) daemons: Vec<Daemon>,
    driver: Option<Child>,
    pub(crate) channel: Channel,
    pub(crate) service: String,
    arguments: Vec<String>,
    trees: Trees,
    filter: &'static str,
    /// In memory, as on a node.
    state: tempfile::TempDir,
    dir: tempfile::TempDir,
}

impl Rig {
    /// A driver and two daemons with trees in memory.
    pub(crate) async fn new() -> Self {
        Self::with(Trees::Memory, &[]).await
    }

    /// The same with more arguments, or other trees.
    pub(crate) async fn with(trees: Trees, arguments: &[&str]) -> Self {
        Self::logging("warn,forebay=debug", trees, arguments).await
    }

    /// The same with another filter of the log.
    pub(crate) async fn logging(filter: &'static str, trees: Trees, arguments: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), mode).unwrap();
        let kubelet = dir.path().join("kubelet");
        for directory in ["plugins_registry", "pods", "stage"] {
            std::fs::create_dir_all(kubelet.join(directory)).unwrap();
        }
        rustix::mount::mount_bind(&kubelet, &kubelet).unwrap();
        rustix::mount::mount_change(&kubelet, MountPropagationFlags::SHARED).unwrap();
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let channel = connect(&kubelet.join("plugins/csi.forebay.io/csi.sock"));
        let service = "127.0.0.1:1".to_owned();
        let memory = Path::new("/dev/shm");
        let memory = if memory.is_dir() { memory } else { dir.path() };
        let state = tempfile::Builder::new().prefix(PREFIX).tempdir_in(memory).unwrap();
        let mut rig =
            Self { daemons: Vec::new(), driver: None, channel, service, arguments, trees, filter, state, dir };
        rig.start().await;
        rig.daemon();
        rig.daemon();
        rig
    }

    /// Starts the driver, again perhaps, and waits until it answers.
    pub(crate) async fn start(&mut self) {
        assert!(self.driver.is_none());
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_forebay-csi"));
        command.arg("--node-id=test-node").args(&self.arguments);
        command.arg(format!("--kubelet-dir={}", self.kubelet().display()));
        command.arg(format!("--state-dir={}", self.state().display()));
        command.env("FOREBAY_LOG", self.filter).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let others = foreign_mounts();
        // SAFETY: these are system calls without memory of their own, and nothing else happens between fork and exec.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // As in a pod: a mount namespace of its own, and the kubelet's directory shared with that of the node.
                rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)?;
                // Not as in a pod: what others test here at the same time came with it, and would not end before this.
                for other in &others {
                    let _ = rustix::mount::unmount(other.as_c_str(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
                }
                Ok(())
            });
        }
        self.driver = Some(command.spawn().unwrap());
        let socket = self.endpoint();
        eventually("the driver listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
        self.channel = connect(&socket);
    }

    /// Starts one more daemon.
    pub(crate) fn daemon(&mut self) {
        self.daemons.push(Daemon::start(&self.plugin().join("keeper/keeper.sock"), self.trees));
    }

    pub(crate) fn pid(&self) -> u32 {
        self.driver.as_ref().unwrap().id()
    }

    /// Stops the driver as the kubelet does.
    pub(crate) async fn terminate(&mut self) -> ExitStatus {
        let mut driver = self.driver.take().unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(driver.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = driver.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the driver does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills the driver.
    pub(crate) fn kill(&mut self) {
        let mut driver = self.driver.take().unwrap();
        driver.kill().unwrap();
        driver.wait().unwrap();
    }

    pub(crate) fn kubelet(&self) -> PathBuf {
        self.dir.path().join("kubelet")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.state.path().join("state")
    }

    pub(crate) fn plugin(&self) -> PathBuf {
        self.kubelet().join("plugins/csi.forebay.io")
    }

    pub(crate) fn endpoint(&self) -> PathBuf {
        self.plugin().join("csi.sock")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// All that the driver has logged.
    pub(crate) fn logged(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap()
    }

    /// Where a volume is staged; made by the kubelet.
    pub(crate) fn stage_path(&self, volume: &str) -> PathBuf {
        let parent = self.kubelet().join("stage").join(volume);
        std::fs::create_dir_all(&parent).unwrap();
        let path = parent.join("globalmount");
        // What is there may be a dead mount, which is not looked at.
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => panic!("{error}"),
            _ => path,
        }
    }

    /// Where a pod finds a volume; its parent is made by the kubelet.
    pub(crate) fn target_path(&self, pod: &str) -> PathBuf {
        let parent = self.kubelet().join("pods").join(pod).join("volumes/kubernetes.io~csi/data");
        std::fs::create_dir_all(&parent).unwrap();
        parent.join("mount")
    }

    pub(crate) fn secrets(&self) -> HashMap<String, String> {
        map(&[("key", KEY), ("service", &self.service)])
    }

    pub(crate) fn stage_request(&self, volume: &str) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: volume.to_owned(),
            staging_target_path: text(&self.stage_path(volume)),
            volume_capability: Some(capability(Mode::MultiNodeReaderOnly, &[])),
            secrets: self.secrets(),
            volume_context: map(&[("dataset", DATASET), ("name", NAME)]),
        }
    }

    pub(crate) fn publish_request(&self, volume: &str, pod: &str) -> NodePublishVolumeRequest {
        let pod_info = [("csi.storage.k8s.io/pod.name", pod), ("csi.storage.k8s.io/ephemeral", "false")];
        NodePublishVolumeRequest {
            volume_id: volume.to_owned(),
            staging_target_path: text(&self.stage_path(volume)),
            target_path: text(&self.target_path(pod)),
            volume_capability: Some(capability(Mode::MultiNodeReaderOnly, &[])),
            readonly: true,
            secrets: self.secrets(),
            volume_context: map(&[[("dataset", DATASET), ("name", NAME)], pod_info].concat()),
        }
    }

    pub(crate) fn inline_request(&self, volume: &str, pod: &str) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            staging_target_path: String::new(),
            volume_capability: Some(capability(Mode::SingleNodeMultiWriter, &[])),
            volume_context: map(&[
                ("dataset", "pictures"),
                ("csi.storage.k8s.io/ephemeral", "true"),
                ("csi.storage.k8s.io/pod.namespace", "default"),
                ("csi.storage.k8s.io/pod.name", pod),
            ]),
            ..self.publish_request(volume, pod)
        }
    }

    pub(crate) fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    pub(crate) async fn stage(&self, volume: &str) -> Result<(), Status> {
        self.node().node_stage_volume(self.stage_request(volume)).await.map(|_| ())
    }

    pub(crate) async fn publish(&self, volume: &str, pod: &str) -> Result<PathBuf, Status> {
        self.node().node_publish_volume(self.publish_request(volume, pod)).await.map(|_| self.target_path(pod))
    }

    pub(crate) async fn publish_inline(&self, volume: &str, pod: &str) -> Result<PathBuf, Status> {
        self.node().node_publish_volume(self.inline_request(volume, pod)).await.map(|_| self.target_path(pod))
    }

    pub(crate) async fn unpublish(&self, volume: &str, pod: &str) -> Result<(), Status> {
        let target_path = text(&self.target_path(pod));
        let request = NodeUnpublishVolumeRequest { volume_id: volume.to_owned(), target_path };
        self.node().node_unpublish_volume(request).await.map(|_| ())
    }

    pub(crate) async fn unstage(&self, volume: &str) -> Result<(), Status> {
        let staging_target_path = text(&self.stage_path(volume));
        let request = NodeUnstageVolumeRequest { volume_id: volume.to_owned(), staging_target_path };
        self.node().node_unstage_volume(request).await.map(|_| ())
    }

    pub(crate) async fn stats(&self, volume: &str, path: &Path) -> Result<Vec<VolumeUsage>, Status> {
        let request =
            NodeGetVolumeStatsRequest { volume_id: volume.to_owned(), volume_path: text(path), ..Default::default() };
        Ok(self.node().node_get_volume_stats(request).await?.into_inner().usage)
    }

    pub(crate) async fn health(&self, volume: &str, path: &Path) -> Result<VolumeHealth, Status> {
        let request = NodeGetVolumeHealthRequest {
            volume_id: volume.to_owned(),
            volume_publish_path: text(path),
            ..Default::default()
        };
        Ok(self.node().node_get_volume_health(request).await?.into_inner().volume_health.unwrap())
    }

    /// Waits until a volume that is published at `path` says of its health what is wanted.
    pub(crate) async fn health_becomes(&self, volume: &str, path: &Path, wanted: impl Fn(&VolumeHealthEntry) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let health = self.health(volume, path).await.unwrap().health_statuses;
            if health.first().is_some_and(&wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{health:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Every mount below the kubelet's directory.
    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        let kubelet = self.kubelet();
        mounts()
            .into_iter()
            .map(|mount| mount.target)
            .filter(|path| path.starts_with(&kubelet) && *path != kubelet)
            .collect()
    }

    /// Nothing of any volume is left.
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new());
        let inline = self.plugin().join("inline");
        assert_eq!(std::fs::read_dir(inline).unwrap().count(), 0);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.daemons.clear();
        if let Some(mut driver) = self.driver.take() {
            let _ = driver.kill();
            let _ = driver.wait();
        }
        // A test may have failed anywhere: what is mounted goes, the last first.
        for path in self.mounts().into_iter().rev().chain([self.kubelet()]) {
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        if std::thread::panicking() {
            eprintln!("{}", self.logged());
        }
    }
}

fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub(crate) fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn capability(mode: Mode, flags: &[&str]) -> VolumeCapability {
    let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume { mount_flags, ..Default::default() })),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

/// Waits until `done` holds.
pub(crate) async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Reads the file of the tree in memory and checks every byte, off the runtime's threads.
pub(crate) async fn read(mount: &Path) -> std::io::Result<()> {
    let path = mount.join(FILE);
    let work = move || {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        let mut expected = vec![0; SIZE as usize];
        pattern(SEED, 0, &mut expected);
        assert!(bytes == expected, "wrong bytes");
        Ok(())
    };
    let reading = tokio::task::spawn_blocking(work);
    tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap()
}

/// A line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) device: String,
    pub(crate) target: PathBuf,
    pub(crate) options: Vec<String>,
}

/// What is mounted, in order.
pub(crate) fn mounts() -> Vec<Mount> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let options = fields[5].split(',').map(str::to_owned).collect();
        Mount { device: fields[2].to_owned(), target: fields[4].into(), options }
    };
    table.lines().map(line).collect()
}

/// What is mounted at a path, the lowest first.
pub(crate) fn mounts_at(path: &Path) -> Vec<Mount> {
    mounts().into_iter().filter(|mount| mount.target == path).collect()
}

/// Mounts of other tests that a new mount namespace would keep alive. Nothing to do where mounts propagate by themselves.
fn foreign_mounts() -> Vec<CString> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root_is_shared = table.lines().any(|line| line.split(' ').nth(4) == Some("/") && line.contains(" shared:"));
    let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let foreign = fields.filter(|fields| {
        !root_is_shared && fields.contains(&"fuse.forebay") && !fields[4].contains(PREFIX) && !fields[4].contains('\\')
    });
    foreign.map(|fields| CString::new(fields[4]).unwrap()).collect()
}

/// Ends a connection as the keeper does, or a person.
pub(crate) fn abort(device: &str) {
    let minor = device.strip_prefix("0:").unwrap();
    std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1").unwrap();
}

/// A connection that was there. Its number alone does not tell: when it has ended, the next mount of any test gets it.
pub(crate) struct Connection(std::fs::File);

impl Connection {
    /// That of a mounted device.
    pub(crate) fn of(device: &str) -> Self {
        let minor = device.strip_prefix("0:").unwrap();
        Self(std::fs::File::open(format!("/sys/fs/fuse/connections/{minor}/waiting")).unwrap())
    }

    /// Whether it has not ended. The file of one that has is empty; each is read once, for it cannot be rewound.
    pub(crate) fn is_there(&self) -> bool {
        let again = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        !std::fs::read(again).unwrap().is_empty()
    }
}

/// Mounts something that is not ours.
pub(crate) fn mount_foreign(path: &Path) {
    std::fs::create_dir_all(path).unwrap();
    rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
}
