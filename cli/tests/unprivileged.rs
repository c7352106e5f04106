//! `forebay up` without root: fusermount3 mounts, and it says what is lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::process::Command;

use forebay_test_store::{Options, TestStore};
use support::{BUCKET, Setup, Up, can_mount, command, content, manifest_text, test_dir};

/// nobody: fusermount3 wants a user that has a name.
const USER: u32 = 65_534;

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

    // Where udev does not run, /dev/fuse is for root alone: in a mount namespace of its own the test has one for all.
    let script = format!(
        "mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse && \
         exec setpriv --reuid {USER} --regid {USER} --clear-groups \"$0\" \"$@\""
    );
    let mut up = Command::new("unshare");
    up.args(["--mount", "--propagation", "private", "sh", "-c", &script]).arg(&program);
    let up = Up::start_with(up, &manifest, &home, &[]);
    let cat = |user: u32| {
        let pid = up.pid().to_string();
        let user = user.to_string();
        Command::new("nsenter")
            .args(["--mount", "--target", &pid, "setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "cat"])
            .arg(up.mount.join("file"))
            .output()
            .unwrap()
    };
    let read = cat(USER);
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    assert_eq!(read.stdout, content::bytes(1, 300_000));
    // Another user, root too, is refused without allow_other: that shows whose mount it is.
    assert!(!cat(0).status.success());

    let pid = up.daemon();
    support::signal(pid, rustix::process::Signal::KILL);
    assert_eq!(cat(USER).stdout, content::bytes(1, 300_000));
    up.stop();
}
