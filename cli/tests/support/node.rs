//! A node of a cluster without Kubernetes: a keeper in this process, `forebay fuse` twice as an unprivileged user, and
//! workers that are found by a name.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use forebay_cache_worker::{
    DatasetConfig, DatasetsFile, Policy, Replicas, RunningWorker, SourceConfig, TableFile, VolumeShape, WorkerOptions,
};
use forebay_fuse::{DatasetRef, KeySource, TableSource, VolumeConfig};
use forebay_keeper::{Health, Keeper, KeeperOptions, MountSpec, VolumeStatus};
use forebay_protocol::{
    DatasetId,
    handshake::RuntimeKey,
    table::{Member, MemberState},
};
use forebay_test_store::TestStore;
use forebay_under_store::{S3Addressing, S3Credentials, S3Options, SourceSpec};
use tokio::runtime::Runtime;

use super::{BUCKET, eventually, test_dir};

/// Whom the images run daemons as.
const USER: u32 = 10_001;
/// The name of the dataset.
pub const DATASET: &str = "default/data";

/// A worker on a runtime of its own, so that it can be stopped as a pod is killed.
struct TestWorker {
    options: WorkerOptions,
    running: Option<(Runtime, RunningWorker)>,
}

pub struct Node {
    workers: Vec<TestWorker>,
    epoch: u64,
    key: RuntimeKey,
    keeper: Option<Keeper>,
    daemons: Vec<Child>,
    /// Where each daemon shows itself.
    http: Vec<SocketAddr>,
    pub dir: tempfile::TempDir,
}

impl Node {
    /// A node with two daemons and no workers.
    pub fn start() -> Self {
        let dir = test_dir();
        fs::create_dir(dir.path().join("keeper")).unwrap();
        let mut node = Self {
            workers: Vec::new(),
            epoch: 0,
            key: RuntimeKey::generate(),
            keeper: None,
            daemons: Vec::new(),
            http: Vec::new(),
            dir,
        };
        // Daemons may be there first: they wait for the keeper.
        node.spawn_daemon();
        node.spawn_daemon();
        node.start_keeper();
        eventually("two daemons", Duration::from_secs(10), || node.keeper().status().unwrap().daemons.len() == 2);
        node
    }

    /// The first keeper, or the next one.
    pub fn start_keeper(&mut self) {
        let options = KeeperOptions {
            allowed_uids: vec![USER],
            state_file: Some(self.dir.path().join("mounts.json")),
            resume: true,
            ..KeeperOptions::new(self.dir.path().join("keeper/keeper.sock"))
        };
        let (keeper, _, _) = Keeper::start(options).unwrap();
        self.keeper = Some(keeper);
    }

    /// As a node plugin that is replaced.
    pub fn stop_keeper(&mut self) {
        self.keeper.take().unwrap().leave(Duration::from_secs(10)).unwrap();
    }

    /// Kills the daemon that serves.
    pub fn kill_active(&self) -> i32 {
        let pid = self.keeper().status().unwrap().active().unwrap();
        super::signal(u32::try_from(pid).unwrap(), rustix::process::Signal::KILL);
        pid
    }

    /// As the container does: no user, no group, no capability, nothing to gain.
    pub fn spawn_daemon(&mut self) {
        let index = self.daemons.len();
        let log = fs::File::create(self.dir.path().join(format!("fuse-{index}.log"))).unwrap();
        let user = USER.to_string();
        // Free a moment ago, and the kernel gives it to nobody else for a while.
        self.http.push(TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let child = Command::new("setpriv")
            .args(["--reuid", &user, "--regid", &user, "--clear-groups", "--no-new-privs"])
            .args(["--bounding-set", "-all", "--inh-caps", "-all", "--pdeathsig", "KILL"])
            .arg(env!("CARGO_BIN_EXE_forebay"))
            .args(["fuse", "--memory-budget", "64Mi", "--socket"])
            .arg(self.dir.path().join("keeper/keeper.sock"))
            .args(["--http", &self.http[index].to_string()])
            .env("FOREBAY_LOG", "trace")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemons.push(child);
    }

    /// What a daemon answers.
    pub fn get(&self, daemon: usize, path: &str) -> String {
        let mut socket = TcpStream::connect(self.http[daemon]).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Everything that daemons have logged.
    pub fn logs(&self) -> String {
        (0..self.daemons.len())
            .map(|index| fs::read_to_string(self.dir.path().join(format!("fuse-{index}.log"))).unwrap())
            .collect()
    }

    pub fn key(&self) -> String {
        self.key.to_text()
    }

    /// The process of a daemon, by the order of their start.
    pub fn pid(&self, daemon: usize) -> i32 {
        i32::try_from(self.daemons[daemon].id()).unwrap()
    }

    pub fn kill_daemons(&mut self) {
        for child in &mut self.daemons {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    pub fn keeper(&self) -> &Keeper {
        self.keeper.as_ref().unwrap()
    }

    pub fn volume(&self) -> VolumeStatus {
        self.keeper().status().unwrap().volume("volume").unwrap().clone()
    }

    /// Waits until the volume is in this state, for this reason.
    pub fn expect_health(&self, state: &str, reason: &str) -> Health {
        let mut last = None;
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while std::time::Instant::now() < end {
            last = self.volume().health;
            if let Some(health) = &last
                && (format!("{:?}", health.state).as_str(), health.reason.as_str()) == (state, reason)
            {
                return health.clone();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("not {state} {reason}: {last:?}");
    }

    /// Mounts the dataset, known by its name alone.
    pub fn mount(&self, deadline: Duration) -> PathBuf {
        let service = format!("localhost:{}", self.workers[0].options.listen.port());
        let config = VolumeConfig {
            name: DATASET.to_owned(),
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap(),
            ..VolumeConfig::new(DatasetRef::ByName, TableSource::Service(service), KeySource::Inline(self.key.clone()))
        };
        let target = self.dir.path().join("mnt");
        fs::create_dir(&target).unwrap();
        self.keeper().mount(MountSpec::new("volume", &target, config.encode().unwrap())).unwrap();
        target
    }

    /// Starts one more worker; the table is told by [`Self::publish`].
    pub fn add_worker(&mut self, store: &TestStore) {
        let index = self.workers.len();
        let key_file = self.dir.path().join("key");
        if index == 0 {
            write_private(&key_file, self.key.to_text().as_bytes());
            write_private(&self.datasets(), &serde_json::to_vec(&datasets(store)).unwrap());
        }
        let name = format!("w-{index}");
        let options = WorkerOptions {
            owner: format!("default/runtime/{name}"),
            cache_dir: self.dir.path().join(&name),
            capacity: 4 << 30,
            table: self.table(),
            datasets: self.datasets(),
            key_file,
            name,
            ..WorkerOptions::default()
        };
        self.workers.push(TestWorker { options, running: None });
        self.start_worker(index);
    }

    pub fn start_worker(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let options = worker.options.clone();
        let started = runtime.spawn(RunningWorker::start(options));
        let running = tokio::task::block_in_place(|| runtime.block_on(started)).unwrap().unwrap();
        // Started again, it listens where clients look for it.
        worker.options.listen = running.address();
        worker.running = Some((runtime, running));
    }

    /// As `kubectl delete --force`: nothing is said.
    pub fn kill_worker(&mut self, index: usize) {
        let (runtime, worker) = self.workers[index].running.take().unwrap();
        runtime.shutdown_background();
        drop(worker);
    }

    /// Writes the next table, of these workers.
    pub fn publish(&mut self, members: &[usize]) {
        self.epoch += 1;
        let member = |index: &usize| Member {
            name: self.workers[*index].options.name.clone(),
            address: self.workers[*index].options.listen.to_string(),
            weight: 1,
            state: MemberState::Serving,
        };
        let members = members.iter().map(member).collect();
        let file = TableFile { epoch: self.epoch, members, runtime_uid: "uid".to_owned() };
        write_private(&self.table(), &serde_json::to_vec(&file).unwrap());
    }

    fn table(&self) -> PathBuf {
        self.dir.path().join("table.json")
    }

    fn datasets(&self) -> PathBuf {
        self.dir.path().join("datasets.json")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Killed first: what a failed test left open would hold the mount up.
        for child in &mut self.daemons {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.unmount("volume", Duration::ZERO);
        }
        for index in 0..self.workers.len() {
            if self.workers[index].running.is_some() {
                self.kill_worker(index);
            }
        }
    }
}

fn datasets(store: &TestStore) -> DatasetsFile {
    let (namespace, name) = DATASET.split_once('/').unwrap();
    let spec = SourceSpec {
        uri: format!("s3://{BUCKET}/"),
        s3: Some(S3Options {
            endpoint: Some(store.endpoint()),
            region: Some("us-east-1".into()),
            addressing: Some(S3Addressing::Path),
        }),
        credentials: Some(S3Credentials {
            access_key_id: store.access_key().into(),
            secret_access_key: store.secret_key().into(),
            session_token: None,
        }),
    };
    let dataset = DatasetConfig {
        // Known to the workers alone.
        id: DatasetId::local("uid", "of-the-object"),
        namespace: namespace.into(),
        name: name.into(),
        sources: vec![SourceConfig { path: "/".into(), spec, request_budget: Default::default(), problem: None }],
        policy: Policy::Hold,
        quota: None,
        shape: VolumeShape::Auto,
        reserve: 0,
        priority: 0,
        ttl: None,
        replicas: Replicas::default(),
        sync_interval: None,
    };
    DatasetsFile { datasets: vec![dataset] }
}

fn write_private(path: &Path, text: &[u8]) {
    use std::os::unix::fs::PermissionsExt as _;
    let next = path.with_extension("next");
    fs::write(&next, text).unwrap();
    fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&next, path).unwrap();
}
