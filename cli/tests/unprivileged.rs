//! `forebay up` without root: fusermount3 mounts, and it says what is lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use forebay_test_store::{Options, TestStore};
use rustix::process::Signal;
use support::{BUCKET, Setup, Up, can_mount, command, content, eventually, manifest_text, test_dir};

/// nobody: fusermount3 wants a user that has a name.
const USER: u32 = 65_534;
const FUSERMOUNT: &str = "/usr/bin/fusermount3";

/// What a user has: a directory of his own, with a manifest and the program, and a store.
struct Place {
    home: PathBuf,
    manifest: PathBuf,
    program: PathBuf,
    _store: TestStore,
    _dir: tempfile::TempDir,
}

impl Place {
    /// `None` where this cannot be tested.
    async fn new() -> Option<Self> {
        if !can_mount() {
            return None;
        }
        if !Path::new(FUSERMOUNT).exists() {
            eprintln!("skipped: needs fusermount3 (package fuse3)");
            return None;
        }
        let dir = test_dir();
        let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
        store.create_bucket(BUCKET).await;
        store.put(BUCKET, "file", content::bytes(1, 300_000)).await;
        let home = dir.path().join("home");
        std::fs::create_dir(&home).unwrap();
        chown(&home, Some(USER), Some(USER)).unwrap();
        let manifest = home.join("data.yaml");
        std::fs::write(&manifest, manifest_text(&Setup::default(), &store)).unwrap();
        // The program must be reachable for the user.
        let program = home.join("forebay");
        std::fs::copy(command().get_program(), &program).unwrap();
        Some(Self { home, manifest, program, _store: store, _dir: dir })
    }

    /// Runs the program as that user, by a shell command in which it is `$0` with its arguments. Where udev does not run,
    /// /dev/fuse is for root alone: in a mount namespace of its own the test has one for all.
    fn command(&self, how: &str) -> Command {
        let script = format!(
            "mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse && {how}"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).arg(&self.program);
        command
    }

    /// `forebay up` with a fusermount3 that takes its time to mount, and refuses to unmount when a file `refuse` is there.
    /// What is mounted at its end is in the file `mountinfo`.
    fn hindered(&self) -> Child {
        let (home, bin) = (self.home.display(), self.home.join("bin"));
        std::fs::create_dir(&bin).unwrap();
        let helper = bin.join("fusermount3");
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in\n*\" -u \"*) [ ! -e {home}/refuse ] || exit 1 ;;\n*) touch {home}/mounting; sleep 2 \
             ;;\nesac\nexec {FUSERMOUNT} \"$@\"\n"
        );
        std::fs::write(&helper, script).unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut up = self.command(&format!(
            "{{ setpriv --reuid {USER} --regid {USER} --clear-groups \"$0\" \"$@\" & echo $! > {home}/pid; wait $!; \
             cat /proc/self/mountinfo > {home}/mountinfo; }}"
        ));
        up.args(["up", "--output", "json", "--file"])
            .arg(&self.manifest)
            .arg("--mount")
            .arg(self.home.join("mnt"))
            .arg("--state-dir")
            .arg(self.home.join("state"))
            .env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        up.spawn().unwrap()
    }

    fn interrupt(&self) {
        let pid = std::fs::read_to_string(self.home.join("pid")).unwrap();
        support::signal(pid.trim().parse().unwrap(), Signal::INT);
    }

    /// Whether its volume was mounted when the program had ended.
    fn left_mounted(&self) -> bool {
        let target = format!(" {} ", self.home.join("mnt/data").display());
        std::fs::read_to_string(self.home.join("mountinfo")).unwrap().contains(&target)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_mounts_for_himself() {
    let Some(place) = Place::new().await else { return };
    let up = place.command(&format!("exec setpriv --reuid {USER} --regid {USER} --clear-groups \"$0\" \"$@\""));
    let up = Up::start_with(up, &place.manifest, &place.home, &[]);
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
    support::signal(pid, Signal::KILL);
    assert_eq!(cat(USER).stdout, content::bytes(1, 300_000));
    up.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_interrupted_while_mounting_leaves_no_mount() {
    let Some(place) = Place::new().await else { return };
    let mut up = place.hindered();
    eventually("mounting", Duration::from_secs(60), || place.home.join("mounting").exists());
    std::thread::sleep(Duration::from_millis(300));
    place.interrupt();
    support::wait(&mut up, Duration::from_secs(45));
    assert!(!place.left_mounted());
    assert!(!place.home.join("mnt").exists(), "the mount point was left");
    for left in ["up.lock", "up.json", "keeper.sock", "mounts.json", "mounts.json.lock", "made.json"] {
        assert!(!place.home.join("state").join(left).exists(), "{left} was left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_unmounted_stays_on_record() {
    let Some(place) = Place::new().await else { return };
    let mut up = place.hindered();
    eventually("the record", Duration::from_secs(60), || place.home.join("state/up.json").exists());
    std::fs::write(place.home.join("refuse"), "").unwrap();
    place.interrupt();
    support::wait(&mut up, Duration::from_secs(60));
    assert!(place.left_mounted());
    let record = std::fs::read_to_string(place.home.join("state/mounts.json")).unwrap();
    assert!(record.contains(place.home.join("mnt/data").to_str().unwrap()), "{record}");
}
