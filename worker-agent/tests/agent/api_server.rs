//! A real kube-apiserver with an etcd of its own, on 127.0.0.1, from the binaries that `make e2e` builds.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, Client, Config, api::PostParams, config::AuthInfo};
use tempfile::TempDir;

const ADMIN: &str = "admin-of-the-test";
const WORKER: &str = "worker-of-the-test";
/// Who the worker is for RBAC.
pub(crate) const WORKER_USER: &str = "worker";

/// The pair; it ends when dropped.
pub(crate) struct ApiServer {
    dir: TempDir,
    binaries: PathBuf,
    etcd: Child,
    server: Option<Child>,
    etcd_port: u16,
    port: u16,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
        end(&mut self.etcd);
    }
}

fn end(child: &mut Child) {
    // It may have ended.
    let _ = child.kill();
    let _ = child.wait();
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn spawn(program: &Path, log: &Path, arguments: &[String]) -> Child {
    let log = fs::File::options().create(true).append(true).open(log).unwrap();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap()
}

impl ApiServer {
    /// Starts them, with the project's kinds of objects in place; `None`, said, without the binaries.
    pub(crate) async fn start() -> Option<Self> {
        let version = std::env::var("KUBERNETES").unwrap_or_else(|_| "v1.37.2".to_owned());
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target"), PathBuf::from);
        let binaries = target.join("e2e/kubernetes").join(version);
        if !binaries.join("kube-apiserver").exists() {
            eprintln!("skipped: no kube-apiserver in {} (`make e2e` builds it)", binaries.display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("accounts.key");
        let made = Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048").output();
        if !made.is_ok_and(|made| made.status.success()) {
            eprintln!("skipped: openssl makes no key for service accounts");
            return None;
        }
        fs::write(dir.path().join("tokens.csv"), format!("{ADMIN},admin,1,system:masters\n{WORKER},{WORKER_USER},2\n"))
            .unwrap();
        let (etcd_port, peers) = (free_port(), free_port());
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let arguments = [
            format!("--data-dir={}", dir.path().join("etcd").display()),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
            format!("--listen-client-urls={}", url(etcd_port)),
            format!("--advertise-client-urls={}", url(etcd_port)),
            format!("--listen-peer-urls={}", url(peers)),
        ];
        let etcd = spawn(&binaries.join("etcd"), &dir.path().join("etcd.log"), &arguments);
        let mut this = Self { dir, binaries, etcd, server: None, etcd_port, port: free_port() };
        this.restart().await;
        let crds: Api<CustomResourceDefinition> = Api::all(this.admin());
        for crd in forebay_api::crds() {
            crds.create(&PostParams::default(), &crd).await.unwrap();
        }
        Some(this)
    }

    /// Kills the server.
    pub(crate) fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            end(&mut server);
        }
    }

    /// Starts the server (again), and waits until it is ready.
    pub(crate) async fn restart(&mut self) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--cert-dir={}", path("certificates")),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("accounts.key")),
            format!("--service-account-signing-key-file={}", path("accounts.key")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        ];
        let log = self.dir.path().join("kube-apiserver.log");
        self.server = Some(spawn(&self.binaries.join("kube-apiserver"), &log, &arguments));
        let (client, start) = (self.admin(), Instant::now());
        loop {
            let ready = client.request_text(http_get("/readyz")).await;
            if ready.is_ok() {
                return;
            }
            if start.elapsed() > Duration::from_secs(60) {
                let log = fs::read_to_string(&log).unwrap_or_default();
                panic!("the API server is not ready: {ready:?}\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Somebody who may do everything.
    pub(crate) fn admin(&self) -> Client {
        self.client(ADMIN)
    }

    /// Somebody who may do what roles allow to [`WORKER_USER`].
    pub(crate) fn worker(&self) -> Client {
        self.client(WORKER)
    }

    fn client(&self, token: &str) -> Client {
        let mut config = Config::new(format!("https://127.0.0.1:{}", self.port).parse().unwrap());
        // The server made its certificate itself.
        config.accept_invalid_certs = true;
        config.auth_info = AuthInfo { token: Some(token.to_owned().into()), ..AuthInfo::default() };
        Client::try_from(config).unwrap()
    }
}

fn http_get(path: &str) -> http::Request<Vec<u8>> {
    http::Request::get(path).body(Vec::new()).unwrap()
}
