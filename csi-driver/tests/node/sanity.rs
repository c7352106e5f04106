//! csi-sanity 5.6, the conformance tests of CSI, against the real driver with real mounts and daemons.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{
    daemon::Trees,
    rig::{DATASET, KEY, NAME, Rig, can_mount},
};

/// Where the program is; `csi-driver/sanity.sh` says it, else it is where `e2e/tools.sh` builds it.
fn program() -> Option<PathBuf> {
    let program = std::env::var_os("CSI_SANITY").map(PathBuf::from);
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/e2e/bin/csi-sanity");
    program.or_else(|| built.exists().then_some(built))
}

#[tokio::test]
async fn csi_sanity_finds_nothing() {
    let Some(program) = program() else {
        eprintln!("skipped: no csi-sanity; csi-driver/sanity.sh builds it");
        return;
    };
    if !can_mount() {
        return;
    }
    let rig = Rig::with(Trees::Memory, &["--controller"]).await;
    let dir = rig.kubelet();
    let secrets = format!("{{key: \"{KEY}\", service: \"{}\"}}", rig.service);
    let file = |name: &str, contents: String| {
        std::fs::write(dir.join(name), contents).unwrap();
        dir.join(name)
    };
    let secrets =
        file("secrets.yaml", format!("NodeStageVolumeSecret: {secrets}\nNodePublishVolumeSecret: {secrets}\n"));
    let parameters = file("parameters.yaml", format!("dataset: {DATASET}\nname: {NAME}\nservice: {}\n", rig.service));
    let mut command = Command::new(program);
    command
        .arg(format!("--csi.endpoint=unix://{}", rig.endpoint().display()))
        .arg(format!("--csi.mountdir={}", dir.join("csi-mount").display()))
        .arg(format!("--csi.stagingdir={}", dir.join("csi-staging").display()))
        .arg(format!("--csi.secrets={}", secrets.display()))
        .arg(format!("--csi.testvolumeparameters={}", parameters.display()))
        .arg("--ginkgo.no-color")
        .stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    // `Ran 40 of 95 Specs in 1 seconds`, `SUCCESS! -- 40 Passed | 0 Failed | 1 Pending | 54 Skipped`
    for line in text.lines().filter(|line| line.starts_with("Ran ") || line.contains(" Passed ")) {
        println!("{line}");
    }
    assert!(output.status.success() && text.contains("| 0 Failed |"), "{text}");
    rig.assert_clean();
}
