//! `forebay up` without root: fusermount3 mounts, and it says what is lost.

mod support;

use std::os::unix::process::CommandExt as _;

use forebay_test_store::{Options, TestStore};
use support::{BUCKET, Setup, Up, can_mount, command, content, manifest_text, test_dir};

/// An unprivileged user that exists nowhere else.
const USER: u32 = 54_321;

#[tokio::test(flavor = "multi_thread")]
async fn a_user_mounts_for_himself() {
    if !can_mount() {
        return;
    }
    if !std::path::Path::new("/usr/bin/fusermount3").exists() {
        eprintln!("skipped: needs fusermount3 (package fuse3)");
        return;
    }
    let dir = test_dir();
    let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
    store.create_bucket(BUCKET).await;
    store.put(BUCKET, "file", content::bytes(1, 300_000)).await;
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(USER), Some(USER)).unwrap();
    let manifest = home.join("data.yaml");
    std::fs::write(&manifest, manifest_text(&Setup::default(), &store)).unwrap();
    // The program must be reachable for the user.
    let program = home.join("forebay");
    std::fs::copy(command().get_program(), &program).unwrap();

    let mut up = std::process::Command::new(&program);
    up.uid(USER).gid(USER);
    let up = Up::start_with(up, &manifest, &home, &[]);
    let read = std::process::Command::new("cat").arg(up.mount.join("file")).uid(USER).gid(USER).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    assert_eq!(read.stdout, content::bytes(1, 300_000));
    // Root is another user: without allow_other the kernel refuses it, which shows whose mount it is.
    assert!(std::fs::read(up.mount.join("file")).is_err());

    let pid = up.daemon();
    support::signal(pid, rustix::process::Signal::KILL);
    let again = std::process::Command::new("cat").arg(up.mount.join("file")).uid(USER).gid(USER).output().unwrap();
    assert_eq!(again.stdout, content::bytes(1, 300_000));
    up.stop();
}
