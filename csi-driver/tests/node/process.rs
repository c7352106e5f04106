//! The driver as a process: the kubelet finds it, it ends and starts without harm, shows its numbers, and is small.

use std::time::{Duration, Instant};

use forebay_csi::proto::registration::{InfoRequest, RegistrationStatus, registration_client::RegistrationClient};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    daemon::Trees,
    dead::Reader,
    rig::{KEY, PATIENCE, Rig, can_mount, eventually, read, text},
};

/// The kubelet's view of the registration socket.
async fn kubelet(rig: &Rig) -> RegistrationClient<Channel> {
    let socket = rig.kubelet().join("plugins_registry/csi.forebay.io-reg.sock");
    eventually("the registration socket is there", || socket.exists()).await;
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    RegistrationClient::new(Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector))
}

async fn get(address: &str, path: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// An address that nobody listens on.
fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[tokio::test]
async fn registered_ready_and_ended() {
    if !can_mount() {
        return;
    }
    let address = free_address();
    let mut rig = Rig::with(Trees::Memory, &["--http", &address]).await;
    let mut registration = kubelet(&rig).await;
    let info = registration.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "csi.forebay.io"));
    assert_eq!(info.endpoint, text(&rig.endpoint()));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    assert_eq!(get(&address, "/healthz").await.0, 200);
    assert_eq!(get(&address, "/readyz").await, (503, "not registered with the kubelet\n".to_owned()));

    // Refused: another socket is offered.
    let refused = RegistrationStatus { plugin_registered: false, error: "no".into() };
    registration.notify_registration_status(refused).await.unwrap();
    let accepted = RegistrationStatus { plugin_registered: true, error: String::new() };
    let deadline = Instant::now() + PATIENCE;
    while kubelet(&rig).await.notify_registration_status(accepted.clone()).await.is_err() {
        assert!(Instant::now() < deadline, "not offered again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(get(&address, "/readyz").await.0, 200);

    rig.stage("v").await.unwrap();
    rig.publish("v", "pod").await.unwrap();
    let (status, text) = get(&address, "/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "forebay_csi_calls_total{method=\"NodeStageVolume\",code=\"Ok\"} 1",
        "forebay_csi_daemons{role=\"active\"} 1",
        "forebay_csi_hanging_calls 0",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }

    let mounts = rig.mounts();
    let begun = Instant::now();
    assert_eq!(rig.terminate().await.code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(rig.mounts(), mounts);
    let registry = rig.kubelet().join("plugins_registry");
    assert_eq!(std::fs::read_dir(registry).unwrap().count(), 0);
    assert!(!rig.endpoint().exists() && !rig.plugin().join("keeper/keeper.sock").exists());
}

/// The driver is stopped, or killed, and started again under readers, who notice nothing.
#[tokio::test]
async fn restarted_under_readers() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    rig.publish_inline("csi-0a", "inline").await.unwrap();
    let readers = [target.clone(), rig.target_path("inline")].map(Reader::start);
    let mounts = rig.mounts();
    for round in 0..4 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        if round % 2 == 0 {
            assert_eq!(rig.terminate().await.code(), Some(0));
        } else {
            rig.kill();
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        rig.start().await;
        // The kubelet stages nothing, but publishes again.
        rig.publish("v", "pod").await.unwrap();
        rig.publish_inline("csi-0a", "inline").await.unwrap();
        assert_eq!(rig.mounts(), mounts);
        read(&rig.publish("v", "new").await.unwrap()).await.unwrap();
        rig.unpublish("v", "new").await.unwrap();
    }
    for reader in readers {
        assert!(reader.finish().await.unwrap() > 0);
    }
    // A daemon may die afterwards as before.
    rig.daemons.remove(0).kill();
    rig.daemon();
    read(&target).await.unwrap();
    rig.unpublish("v", "pod").await.unwrap();
    rig.unpublish("csi-0a", "inline").await.unwrap();
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}

#[tokio::test]
async fn small_and_silent_about_keys() {
    if !can_mount() {
        return;
    }
    let rig = Rig::logging("trace", Trees::Memory, &[]).await;
    for index in 0..50 {
        let (volume, pod) = (format!("v{index}"), format!("pod{index}"));
        rig.stage(&volume).await.unwrap();
        let target = rig.publish(&volume, &pod).await.unwrap();
        read(&target).await.unwrap();
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", rig.pid())).unwrap();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    };
    println!("50 volumes: VmRSS {} KiB, VmHWM {} KiB, RssAnon {} KiB", kib("VmRSS"), kib("VmHWM"), kib("RssAnon"));
    assert!(kib("VmRSS") < 32 << 10, "{status}");
    for index in 0..50 {
        rig.unpublish(&format!("v{index}"), &format!("pod{index}")).await.unwrap();
        rig.unstage(&format!("v{index}")).await.unwrap();
    }
    rig.assert_clean();
    let logged = rig.logged();
    assert!(logged.contains("staged") && logged.contains("TRACE"));
    assert!(!logged.contains(KEY) && !logged.contains(&format!("{:?}", KEY.as_bytes())), "a key is in the log");
}

#[tokio::test]
async fn the_record_is_for_root_only() {
    if !can_mount() {
        return;
    }
    use std::os::unix::fs::PermissionsExt as _;
    let rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let mode = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(rig.state()), 0o700);
    assert_eq!(mode(rig.endpoint()), 0o600);
    assert_eq!(mode(rig.plugin().join("keeper")), 0o755);
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}
