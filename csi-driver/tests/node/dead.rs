//! What dies: daemons, connections, stage mounts, the keeper's memory. Pods get their volume back, and everything can be
//! taken down in bounded time.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use forebay_csi::proto::csi::{
    ProbeRequest, VolumeHealthErrorType, identity_client::IdentityClient, volume_health::VolumeHealthEntry,
};
use rustix::{mount::UnmountFlags, process::Signal};
use tonic::Code;

use crate::{
    daemon::{FILE, SIZE},
    rig::{Connection, Rig, abort, can_mount, eventually, mounts_at, read},
};

/// Longest that taking down a volume may take, whatever is dead: the keeper's grace of 2 s, and its aborting.
const TEARDOWN: Duration = Duration::from_secs(15);

/// Reads with O_DIRECT all the time, so that each read is a request.
pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<std::io::Result<u64>>,
}

impl Reader {
    pub(crate) fn start(mount: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
            let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
            let file = std::fs::File::options().read(true).custom_flags(direct).open(mount.join(FILE))?;
            let mut buffer = vec![0; 64 << 10];
            let mut reads = 0;
            while !stopped.load(Ordering::Relaxed) {
                let offset = reads * (64 << 10) % SIZE;
                file.read_exact_at(&mut buffer, offset)?;
                let mut expected = vec![0; buffer.len()];
                forebay_fuse::memory::pattern(crate::daemon::SEED, offset, &mut expected);
                assert!(buffer == expected, "wrong bytes at {offset}");
                reads += 1;
            }
            Ok(reads)
        });
        Self { stop, thread }
    }

    pub(crate) async fn finish(self) -> std::io::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        eventually("the reader ends", || self.thread.is_finished()).await;
        self.thread.join().unwrap()
    }
}

#[tokio::test]
async fn daemons_killed_under_a_reader() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    let reader = Reader::start(target.clone());
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        rig.daemons.remove(0).kill();
        rig.daemon();
    }
    assert!(reader.finish().await.unwrap() > 0);

    // No daemon at all: what is asked waits, no other pod gets the volume, and what is taken down goes.
    while let Some(daemon) = rig.daemons.pop() {
        daemon.kill();
    }
    let mount = target.clone();
    let waiting = tokio::spawn(async move { read(&mount).await });
    rig.publish("v", "pod").await.unwrap();
    let error = rig.publish("v", "other").await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("no FUSE daemon is connected"), "{error:?}");
    rig.unpublish("v", "other").await.unwrap();
    let is_inaccessible = |health: &VolumeHealthEntry| health.status() == VolumeHealthErrorType::Inaccessible;
    rig.health_becomes("v", &target, |health| is_inaccessible(health) && health.reason == "NoDaemon").await;
    assert_eq!(rig.stats("v", &target).await.unwrap_err().code(), Code::Unavailable);
    assert!(!waiting.is_finished());
    let connection = Connection::of(&mounts_at(&target)[0].device);
    let begun = Instant::now();
    rig.unpublish("v", "pod").await.unwrap();
    rig.unstage("v").await.unwrap();
    assert!(begun.elapsed() < TEARDOWN, "{:?}", begun.elapsed());
    assert!(waiting.await.unwrap().is_err());
    assert!(!connection.is_there());
    rig.assert_clean();
}

#[tokio::test]
async fn a_connection_that_is_aborted_is_made_again() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let (a, b) = (rig.publish("v", "pod-a").await.unwrap(), rig.publish("v", "pod-b").await.unwrap());
    let kept = std::fs::File::open(a.join(FILE)).unwrap();
    let device = mounts_at(&a)[0].device.clone();
    let connection = Connection::of(&device);
    abort(&device);
    assert!(read(&a).await.is_err());
    // The daemons end with the connection; the kubelet starts them again.
    rig.daemons.clear();
    rig.daemon();
    rig.daemon();
    rig.health_becomes("v", &a, |health| health.status() == VolumeHealthErrorType::Inaccessible).await;

    // The kubelet publishes again, each pod in its time.
    rig.publish("v", "pod-a").await.unwrap();
    read(&a).await.unwrap();
    let health = rig.health("v", &b).await.unwrap().health_statuses;
    assert_eq!(health[0].reason, "DeadMount", "{health:?}");
    assert_eq!(rig.stats("v", &b).await.unwrap_err().code(), Code::Unavailable);
    rig.publish("v", "pod-b").await.unwrap();
    read(&b).await.unwrap();
    for target in [&a, &b, &rig.stage_path("v")] {
        let found = mounts_at(target);
        assert!(found.len() == 1 && found[0].device != device, "{found:?}");
    }
    assert!(!rig.logged().contains("cannot mount beneath"), "there was a gap");
    // What was open stays dead, and does not keep the old connection from ending.
    assert!(std::io::Read::read(&mut &kept, &mut [0; 1]).is_err());
    drop(kept);
    assert!(!connection.is_there());
    for pod in ["pod-a", "pod-b"] {
        rig.unpublish("v", pod).await.unwrap();
    }
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}

/// Dead mounts that nobody has mended are taken down, and never asked for anything.
#[tokio::test]
async fn dead_mounts_are_taken_down() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    abort(&mounts_at(&target)[0].device);
    assert!(std::fs::read_dir(&target).is_err());
    let begun = Instant::now();
    rig.unpublish("v", "pod").await.unwrap();
    rig.unstage("v").await.unwrap();
    assert!(begun.elapsed() < TEARDOWN, "{:?}", begun.elapsed());
    rig.assert_clean();
}

/// Somebody unmounts the stage mount: the next call makes it again, and never binds the directory below it.
#[tokio::test]
async fn a_stage_mount_that_was_taken_away() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    let stage = rig.stage_path("v");
    rustix::mount::unmount(&stage, UnmountFlags::DETACH).unwrap();
    std::fs::write(stage.join("of-the-node"), "x").unwrap();
    std::fs::remove_file(stage.join("of-the-node")).unwrap();
    // The pod has it still.
    read(&target).await.unwrap();
    rig.stage("v").await.unwrap();
    rig.publish("v", "pod").await.unwrap();
    read(&target).await.unwrap();
    assert_eq!(mounts_at(&target).len(), 1);
    assert_eq!(mounts_at(&target)[0].device, mounts_at(&stage)[0].device);
    rig.unpublish("v", "pod").await.unwrap();
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}

/// The driver is killed and the keeper's record lost: mounts that nobody knows are taken over, or taken down, whether
/// daemons still serve them or not.
#[tokio::test]
async fn the_keepers_record_is_lost() {
    if !can_mount() {
        return;
    }
    for daemons_live in [false, true] {
        let mut rig = Rig::new().await;
        for volume in ["v", "w"] {
            rig.stage(volume).await.unwrap();
            rig.publish(volume, volume).await.unwrap();
        }
        rig.kill();
        std::fs::remove_dir_all(rig.state()).unwrap();
        if !daemons_live {
            rig.daemons.clear();
        }
        rig.start().await;
        if !daemons_live {
            rig.daemon();
            rig.daemon();
        }
        assert_eq!(rig.mounts().len(), 4);
        let target = rig.publish("v", "v").await.unwrap();
        read(&target).await.unwrap();
        assert_eq!(rig.health("w", &rig.target_path("w")).await.unwrap().health_statuses[0].reason, "DeadMount");
        for volume in ["v", "w"] {
            rig.unpublish(volume, volume).await.unwrap();
            rig.unstage(volume).await.unwrap();
        }
        rig.assert_clean();
    }
}

/// Driver and daemons are killed at the same time, so that nobody holds the descriptors: what is on record is found dead,
/// and made again.
#[tokio::test]
async fn nobody_is_left() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    rig.publish_inline("csi-0a", "inline").await.unwrap();
    rig.kill();
    rig.daemons.clear();
    assert!(read(&target).await.is_err());
    rig.start().await;
    rig.daemon();
    rig.daemon();
    rig.publish("v", "pod").await.unwrap();
    rig.publish_inline("csi-0a", "inline").await.unwrap();
    for pod in ["pod", "inline"] {
        read(&rig.target_path(pod)).await.unwrap();
        assert_eq!(mounts_at(&rig.target_path(pod)).len(), 1);
    }
    rig.unpublish("v", "pod").await.unwrap();
    rig.unpublish("csi-0a", "inline").await.unwrap();
    rig.unstage("v").await.unwrap();
    rig.assert_clean();
}

/// A container's mount namespace keeps a volume alive while it is unstaged, and ends then; the kernel gives the device number
/// to the next volume, which must not be taken for the old one.
#[tokio::test]
async fn a_device_number_that_is_used_again() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let device = mounts_at(&rig.stage_path("v"))[0].device.clone();
    let connection = Connection::of(&device);
    let mut container = std::process::Command::new("sleep");
    // SAFETY: both are single system calls, and nothing else happens between fork and exec.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut container, || {
            rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS)?;
            let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
            Ok(rustix::mount::mount_change("/", private)?)
        });
    }
    let mut container = container.arg("60").spawn().unwrap();
    let unstage = async {
        let begun = Instant::now();
        rig.unstage("v").await.unwrap();
        println!("unstaged in {:?}", begun.elapsed());
    };
    let next = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        container.kill().unwrap();
        container.wait().unwrap();
        // The namespace goes a moment later.
        eventually("the old connection has ended", || !connection.is_there()).await;
        for volume in ["w0", "w1", "w2", "w3"] {
            rig.stage(volume).await.unwrap();
        }
    };
    tokio::join!(unstage, next);
    let devices = ["w0", "w1", "w2", "w3"].map(|volume| mounts_at(&rig.stage_path(volume))[0].device.clone());
    println!("{device} and then {devices:?}");
    for volume in ["w0", "w1", "w2", "w3"] {
        let target = rig.publish(volume, volume).await.unwrap();
        read(&target).await.unwrap();
        rig.unpublish(volume, volume).await.unwrap();
        rig.unstage(volume).await.unwrap();
    }
    rig.assert_clean();
}

/// A daemon that is stopped: what asks it has a deadline, nothing else waits, and taking down does not ask.
#[tokio::test]
async fn a_daemon_that_hangs() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new().await;
    rig.stage("v").await.unwrap();
    let target = rig.publish("v", "pod").await.unwrap();
    read(&target).await.unwrap();
    rig.daemons.iter().for_each(|daemon| daemon.signal(Signal::STOP));
    let stats = async {
        let begun = Instant::now();
        let error = rig.stats("v", &target).await.unwrap_err();
        (error, begun.elapsed())
    };
    let probes = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..50 {
            let begun = Instant::now();
            IdentityClient::new(rig.channel.clone()).probe(ProbeRequest {}).await.unwrap();
            slowest = slowest.max(begun.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        slowest
    };
    let ((error, took), slowest) = tokio::join!(stats, probes);
    assert!(took < Duration::from_secs(4), "{took:?}: {error:?}");
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    let begun = Instant::now();
    rig.unpublish("v", "pod").await.unwrap();
    rig.unstage("v").await.unwrap();
    assert!(begun.elapsed() < TEARDOWN, "{:?}", begun.elapsed());
    rig.assert_clean();
    // The keeper kills those that say nothing.
    eventually("the daemons are killed", || rig.daemons.iter_mut().all(|daemon| !daemon.is_alive())).await;
}
