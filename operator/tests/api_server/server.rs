//! An API server with its etcd, without controllers and nodes, on this machine; and an operator that works on it.

use std::{
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// Names a folder with `etcd` and `kube-apiserver`.
const BINARIES: &str = "FOREBAY_KUBERNETES";
const TOKEN: &str = "0f0e0d0c";
/// How long the API server may take to start.
const START: Duration = Duration::from_secs(120);
/// Starts at most: somebody else may take a port that was free.
const STARTS: u32 = 3;

/// A process that ends with its handle, and with the thread that started it.
pub(crate) struct Running(Child);

impl Running {
    fn spawn(program: &Path, arguments: &[String], log: &Path) -> Self {
        let log = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        // The shell's interrupt reaches it, too: it stays in the process group of the test.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(arguments);
        Self(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An API server; it is gone with its directory when this is dropped.
pub(crate) struct Server {
    pub(crate) client: Client,
    kubeconfig: PathBuf,
    _apiserver: Running,
    _etcd: Running,
    directory: tempfile::TempDir,
}

/// The folder that the environment names: who has built it decides when these tests, two minutes long, run.
fn binaries() -> Result<PathBuf, String> {
    let Some(named) = env::var_os(BINARIES).map(PathBuf::from) else {
        return Err(format!("no {BINARIES}; e2e/run.sh names it, and e2e/cluster/build.sh builds it"));
    };
    let missing = ["etcd", "kube-apiserver"].into_iter().find(|name| !named.join(name).exists());
    match missing {
        Some(name) => panic!("{BINARIES} is {}, where there is no {name}", named.display()),
        None => Ok(named),
    }
}

/// Ports that were free a moment ago.
fn ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

impl Server {
    /// Starts one; an error says what the machine lacks.
    pub(crate) async fn start() -> Result<Self, String> {
        let binaries = binaries()?;
        for tool in ["openssl", "setpriv"] {
            let found = Command::new(tool).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status();
            found.map_err(|error| format!("no {tool}: {error}"))?;
        }
        for _ in 0..STARTS {
            if let Some(server) = Self::try_start(&binaries).await {
                return Ok(server);
            }
        }
        panic!("the API server does not start");
    }

    /// `None`: etcd or the API server ended.
    async fn try_start(binaries: &Path) -> Option<Self> {
        let directory = tempfile::Builder::new().prefix("forebay-api-server-").tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut openssl = Command::new("openssl");
        let key = openssl.args(["genrsa", "-out", &at("sa.key"), "2048"]).stderr(Stdio::null()).status().unwrap();
        assert!(key.success(), "openssl makes no key");
        fs::write(at("tokens"), format!("{TOKEN},admin,admin,system:masters\n")).unwrap();
        let [etcd_port, peer_port, api_port] = ports();
        let etcd = format!("http://127.0.0.1:{etcd_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let options = [
            format!("--data-dir={}", at("etcd")),
            format!("--listen-client-urls={etcd}"),
            format!("--advertise-client-urls={etcd}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        let mut etcd_process = Running::spawn(&binaries.join("etcd"), &options, Path::new(&at("etcd.log")));
        let options = [
            format!("--etcd-servers={etcd}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            // It takes no loopback address, and nobody here looks for the API server in a Service.
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={api_port}"),
            format!("--cert-dir={}", at("certificates")),
            format!("--token-auth-file={}", at("tokens")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", at("sa.key")),
            format!("--service-account-signing-key-file={}", at("sa.key")),
            "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            // Pods of tests name accounts that nobody makes here.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ];
        let apiserver_log = at("apiserver.log");
        let mut apiserver = Running::spawn(&binaries.join("kube-apiserver"), &options, Path::new(&apiserver_log));

        let kubeconfig = directory.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: 'https://127.0.0.1:{api_port}', insecure-skip-tls-verify: true}}}}]\n\
             users: [{{name: admin, user: {{token: '{TOKEN}'}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: admin}}}}]\n"
        );
        fs::write(&kubeconfig, &text).unwrap();
        let parsed = Kubeconfig::read_from(&kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let ready = || client.request_text(http::Request::get("/readyz").body(Vec::new()).unwrap());
        let began = Instant::now();
        while ready().await.is_err() {
            if etcd_process.has_ended() || apiserver.has_ended() {
                let said = fs::read_to_string(&apiserver_log).unwrap_or_default();
                eprintln!("the API server ended: {}", said.lines().last().unwrap_or_default());
                return None;
            }
            assert!(began.elapsed() < START, "the API server is not ready");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Some(Self { client, kubeconfig, _apiserver: apiserver, _etcd: etcd_process, directory })
    }

    /// Runs a command of the operator to its end: whether it succeeded, and what it said.
    pub(crate) fn run(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forebay-operator"));
        let output = command.args(arguments).env("KUBECONFIG", &self.kubeconfig).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    /// Starts an operator; it is killed with its handle.
    pub(crate) fn operator(&self) -> Running {
        let master = self.directory.path().join("master");
        fs::write(&master, "0f".repeat(32)).unwrap();
        let arguments = [
            format!("KUBECONFIG={}", self.kubeconfig.display()),
            env!("CARGO_BIN_EXE_forebay-operator").to_owned(),
            "run".to_owned(),
            "--http=127.0.0.1:0".to_owned(),
            "--namespace=default".to_owned(),
            "--identity=test".to_owned(),
            "--worker-image=forebay:test".to_owned(),
            "--worker-priority-class=".to_owned(),
            format!("--master-key-file={}", master.display()),
        ];
        Running::spawn(Path::new("env"), &arguments, &self.log())
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("operator.log")
    }

    /// What the operators said.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}
