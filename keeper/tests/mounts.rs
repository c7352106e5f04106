//! Real mounts, real daemons that die. Needs root and /dev/fuse; without them each test says so and passes.

// The helpers of tests are not in `#[test]` functions, where these are allowed by configuration.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "mounts/daemon.rs"]
mod daemon;
#[path = "mounts/reader.rs"]
mod reader;
#[path = "mounts/restart.rs"]
mod restart;
#[path = "mounts/rig.rs"]
mod rig;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use forebay_keeper::mount::{Loss, MountMode, TakenDown};
use forebay_keeper::tables::Counter;
use forebay_keeper::{
    Event, Keeper, KeeperError, KeeperOptions, KeeperStatus, LossCause, MountError, MountSpec, VolumeState,
};
use parking_lot::{Mutex, MutexGuard};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::Signal;

use daemon::{Config, HANG, Refuse, fill};
use reader::{Reader, probe};
use rig::{Rig, VOLUME, mounts_under, signal_pid};

/// Not a test: what a child process of these tests runs.
#[test]
fn daemon_main() {
    if let Some(socket) = std::env::var_os(daemon::SOCKET) {
        daemon::run(PathBuf::from(socket));
    }
}

/// Not a test: what a child process of these tests runs.
#[test]
fn reader_main() {
    if let Ok(what) = std::env::var(reader::READER) {
        reader::run(&what);
    }
}

/// One test at a time: they measure pauses on a machine with few cores. `None` when it can not run here.
fn alone() -> Option<MutexGuard<'static, ()>> {
    static ALONE: Mutex<()> = Mutex::new(());
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!("SKIPPED: needs root and /dev/fuse");
        return None;
    }
    Some(ALONE.lock())
}

const SLOW_READS: Config = Config { read_delay_ms: 3, attach_delay_ms: 0, refuse: Refuse::Never };

#[test]
fn kill_30_times_under_readers() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |_| ());
    rig.ready();
    assert_eq!(rig.mounts(), 1);
    let losses = rig.status().volumes[0].mount.losses.clone();
    assert_eq!(losses, vec![], "root loses nothing");
    let bdi = format!("/sys/class/bdi/{}/read_ahead_kb", rig.status().volumes[0].mount.device);
    assert_eq!(std::fs::read_to_string(bdi).unwrap().trim(), "1024");
    let readers = ["buffered", "direct", "mmap", "walk"].map(|kind| Reader::start(kind, &rig.target));
    let mut in_flight = 0;
    let mut pause = 7u64;
    for round in 0..30u64 {
        rig.ready();
        pause = pause.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_millis(20 + (pause >> 58)));
        let resent = rig.status().volumes[0].counters.get(Counter::Resent);
        rig.signal_active(Signal::KILL);
        rig.wait("take-over", |status| status.volumes[0].takeovers > round);
        // What was in flight comes again at once.
        std::thread::sleep(Duration::from_millis(20));
        in_flight += u64::from(rig.status().volumes[0].counters.get(Counter::Resent) > resent);
    }
    let bytes: u64 = readers.into_iter().map(Reader::finish).sum();
    let status = rig.status();
    let volume = &status.volumes[0];
    assert_eq!((volume.takeovers, volume.generation, rig.mounts()), (30, 31, 1));
    assert!(in_flight >= 15, "only {in_flight} of 30 kills met requests in flight");
    assert_eq!(volume.counters.get(Counter::Errors), 0);
    assert_eq!(status.kills_silent + status.kills_other + status.events_dropped, 0);
    let mut millis: Vec<u64> = rig
        .events
        .lock()
        .iter()
        .filter_map(|event| match event {
            Event::TakenOver { millis, .. } => Some(*millis),
            _ => None,
        })
        .collect();
    millis.sort_unstable();
    println!(
        "30 kills, {in_flight} with requests in flight, {} resent, {} MB read, take-over {} ms median, {} ms at most",
        volume.counters.get(Counter::Resent),
        bytes / 1_000_000,
        millis[15],
        millis[29]
    );
}

#[test]
fn a_successor_killed_while_it_takes_over() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(Config { attach_delay_ms: 15, ..SLOW_READS }, |_| ());
    rig.ready();
    let readers = ["direct", "walk"].map(|kind| Reader::start(kind, &rig.target));
    for round in 0..12u64 {
        rig.ready();
        std::thread::sleep(Duration::from_millis(30));
        let first = rig.signal_active(Signal::KILL);
        rig.wait("a successor", |status| status.active().is_some_and(|pid| pid != first));
        std::thread::sleep(Duration::from_millis(round * 2));
        rig.signal_active(Signal::KILL);
    }
    rig.ready();
    readers.into_iter().for_each(|reader| assert!(reader.finish() > 0));
    assert_eq!(rig.mounts(), 1);
}

#[test]
fn a_stopped_daemon_is_killed_and_replaced() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |options| options.heartbeat_timeout = Duration::from_millis(800));
    rig.ready();
    let readers = ["direct", "walk"].map(|kind| Reader::start(kind, &rig.target));
    let stopped = rig.signal_active(Signal::STOP);
    let lost = rig.wait_event("the loss", |event| matches!(event, Event::DaemonLost { pid, .. } if *pid == stopped));
    assert!(matches!(lost, Event::DaemonLost { cause: LossCause::Silent, .. }), "{lost:?}");
    rig.ready();
    assert_eq!(rig.status().kills_silent, 1);
    // A SIGCONT at any moment: before, at and after the deadline, and while it is being killed.
    for round in 0..8u64 {
        rig.ready();
        let pid = rig.signal_active(Signal::STOP);
        std::thread::sleep(Duration::from_millis(500 + 60 * round));
        signal_pid(pid, Signal::CONT);
        std::thread::sleep(Duration::from_millis(100));
    }
    rig.ready();
    // A stopped standby is killed, too: it would be of no use.
    let status = rig.status();
    let standby = status.daemons.iter().map(|daemon| daemon.pid).find(|pid| status.active() != Some(*pid)).unwrap();
    signal_pid(standby, Signal::STOP);
    rig.wait_event(
        "the standby's loss",
        |event| matches!(event, Event::DaemonLost { pid, cause: LossCause::Silent, .. } if *pid == standby),
    );
    readers.into_iter().for_each(|reader| assert!(reader.finish() > 0));
}

#[test]
fn a_predecessor_that_lingers_is_not_waited_for() {
    let Some(_alone) = alone() else { return };
    // No time at all to be gone: every predecessor lingers, for the moment that dying takes.
    let rig = Rig::new(SLOW_READS, |options| options.kill_wait = Duration::ZERO);
    rig.ready();
    let reader = Reader::start("direct", &rig.target);
    for round in 0..10 {
        rig.ready();
        std::thread::sleep(Duration::from_millis(30));
        rig.signal_active(Signal::KILL);
        rig.wait("take-over", |status| status.volumes[0].takeovers > round);
    }
    assert!(reader.finish() > 0);
    let lingered = rig.events.lock().iter().filter(|event| matches!(event, Event::PredecessorGone { .. })).count();
    println!("{lingered} of 10 lingered, {} late resends", rig.status().volumes[0].late_resends);
}

#[test]
fn a_killed_daemon_that_cannot_end_is_noticed_at_once() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |options| options.heartbeat_timeout = Duration::from_secs(10));
    rig.ready();
    // A look-up holds the directory's lock, for which a thread of the daemon waits that should answer it: what is killed
    // then keeps its descriptors, the socket among them, until a successor has answered.
    let path = rig.target.join(HANG);
    let looked_up = std::thread::spawn(move || std::fs::metadata(path));
    let pid = rig.status().active().unwrap();
    let sleeps = || {
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().any(|task| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
        })
    };
    let end = Instant::now() + Duration::from_secs(20);
    while !sleeps() {
        assert!(Instant::now() < end, "no thread waits for the lock");
        std::thread::sleep(Duration::from_millis(10));
    }
    let killed = Instant::now();
    signal_pid(pid, Signal::KILL);
    rig.wait("take-over", |status| status.volumes[0].takeovers == 1);
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    assert_eq!(looked_up.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::NotFound);
    rig.wait_event("its end", |event| *event == Event::PredecessorGone { pid });
    assert_eq!(rig.status().kills_silent, 0);
}

#[test]
fn nobody_takes_over() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |options| options.abort_after = Duration::from_secs(2));
    rig.ready();
    let path = rig.target.join("data");
    assert_eq!(probe(path.clone(), Duration::from_secs(5)).unwrap().unwrap(), 1);
    rig.daemons.store(0, Ordering::Relaxed);
    let started = Instant::now();
    for daemon in rig.status().daemons {
        signal_pid(daemon.pid, Signal::KILL);
    }
    let answer = probe(path, Duration::from_secs(10)).expect("the reader hangs");
    let took = started.elapsed();
    assert!(answer.is_err(), "{answer:?}");
    assert!((Duration::from_millis(1900)..Duration::from_secs(5)).contains(&took), "{took:?}");
    let aborted = rig.wait_event("the abort", |event| matches!(event, Event::Aborted { .. }));
    assert_eq!(aborted, Event::Aborted { volume: VOLUME.to_owned(), error: None });
    assert_eq!(rig.status().volumes[0].state, VolumeState::Aborted);
    // A daemon that comes too late is not given a dead connection, and the volume can be mounted afresh.
    rig.daemons.store(2, Ordering::Relaxed);
    rig.wait("daemons", |status| status.daemons.len() == 2);
    rig.keeper().unmount(VOLUME, Duration::ZERO).unwrap();
    rig.keeper().mount(MountSpec::new(VOLUME, &rig.target, serde_json::to_vec(&SLOW_READS).unwrap())).unwrap();
    rig.ready();
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
}

#[test]
fn a_daemon_that_refuses_leads_to_an_abort() {
    let Some(_alone) = alone() else { return };
    let config = Config { refuse: Refuse::Always, ..SLOW_READS };
    let rig = Rig::new(config, |options| options.abort_after = Duration::from_secs(1));
    rig.wait_event(
        "the refusal",
        |event| matches!(event, Event::AttachFailed { error, .. } if error == "refused as told"),
    );
    rig.wait_event("the abort", |event| matches!(event, Event::Aborted { .. }));
}

#[test]
fn a_volume_that_one_daemon_refuses_is_given_to_the_other() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |_| ());
    rig.ready();
    let active = rig.status().active().unwrap();
    let target = rig.dir.path().join("second");
    std::fs::create_dir(&target).unwrap();
    let config = serde_json::to_vec(&Config { refuse: Refuse::OneProcess, ..SLOW_READS }).unwrap();
    rig.keeper().mount(MountSpec::new("second", &target, config)).unwrap();
    let served = |status: &KeeperStatus| status.volume("second").is_some_and(|second| second.daemon.is_some());
    rig.wait("the second volume", |status| {
        served(status) && status.volumes.iter().all(|v| v.state == VolumeState::Served)
    });
    let status = rig.status();
    let by = |volume| status.volume(volume).unwrap().daemon.unwrap();
    // Nobody was killed for it, and the volume that is served was left alone.
    assert_eq!((by(VOLUME), status.active(), status.daemons.len()), (active, Some(active), 2));
    assert_ne!(by("second"), active);
    assert_eq!(probe(target.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
    let reader = Reader::start("direct", &target);
    // Its daemon dies: the active one refuses, the next that joins does not.
    signal_pid(by("second"), Signal::KILL);
    rig.wait("a take-over", |status| status.volume("second").unwrap().takeovers == 1);
    rig.ready();
    assert_eq!(rig.status().volume(VOLUME).unwrap().takeovers, 0);
    assert!(reader.finish() > 0);
    // And when the active one dies, the other serves both.
    signal_pid(active, Signal::KILL);
    rig.wait("a take-over", |status| status.volume(VOLUME).unwrap().takeovers == 1);
    assert_eq!(rig.status().volume("second").unwrap().takeovers, 1);
}

#[test]
fn what_all_refuse_is_offered_again_after_a_pause() {
    let Some(_alone) = alone() else { return };
    let started = Instant::now();
    // Two daemons: refused by both, a second later by both again, two seconds later served.
    let rig = Rig::new(Config { refuse: Refuse::Times(4), ..SLOW_READS }, |_| ());
    rig.wait_event("the refusal", |event| matches!(event, Event::AttachFailed { .. }));
    rig.ready();
    let took = started.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(8)).contains(&took), "{took:?}");
    let refusals = rig.events.lock().iter().filter(|event| matches!(event, Event::AttachFailed { .. })).count();
    assert_eq!((refusals, rig.status().kills_other), (4, 0));
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
}

#[test]
fn teardown_with_and_without_open_files() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |_| ());
    rig.ready();
    let mut file = std::fs::File::open(rig.target.join("data")).unwrap();
    let mut bytes = [0; 1000];
    file.read_exact(&mut bytes).unwrap();
    let mut expected = [0; 1000];
    fill(0, &mut expected);
    assert_eq!(bytes, expected);
    let spec = || MountSpec::new(VOLUME, &rig.target, serde_json::to_vec(&SLOW_READS).unwrap());
    assert!(matches!(rig.keeper().mount(spec()), Err(KeeperError::Exists(_))));
    let other = MountSpec { volume: "other".to_owned(), ..spec() };
    assert!(matches!(rig.keeper().mount(other), Err(KeeperError::Mount(MountError::Busy { .. }))));
    let started = Instant::now();
    assert_eq!(rig.keeper().unmount(VOLUME, Duration::from_millis(700)).unwrap(), TakenDown::Aborted);
    assert!((Duration::from_millis(700)..Duration::from_secs(5)).contains(&started.elapsed()));
    assert_eq!(rig.mounts(), 0);
    drop(file);
    assert!(matches!(rig.keeper().unmount(VOLUME, Duration::ZERO), Err(KeeperError::Unknown(_))));

    rig.keeper().mount(spec()).unwrap();
    rig.ready();
    drop(std::fs::File::open(rig.target.join("data")).unwrap());
    assert_eq!(rig.keeper().unmount(VOLUME, Duration::from_secs(10)).unwrap(), TakenDown::Clean);

    // Somebody else unmounts: it is noticed, and the volume can be let go.
    rig.keeper().mount(spec()).unwrap();
    rig.ready();
    rustix::mount::unmount(&rig.target, rustix::mount::UnmountFlags::DETACH).unwrap();
    rig.wait_event("the loss", |event| matches!(event, Event::Vanished { .. }));
    assert_eq!(rig.keeper().unmount(VOLUME, Duration::ZERO).unwrap(), TakenDown::Absent);
}

#[test]
fn a_device_number_that_came_to_mean_another_mount_is_let_be() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |_| ());
    rig.ready();
    let (first, second) = (rig.dir.path().join("first"), rig.dir.path().join("second"));
    let mount = |volume: &str, target: &PathBuf| {
        std::fs::create_dir_all(target).unwrap();
        let config = serde_json::to_vec(&SLOW_READS).unwrap();
        rig.keeper().mount(MountSpec::new(volume, target, config)).unwrap().device
    };
    // Numbers are given out again at once, unless somebody else is faster.
    let reused = (0..20).any(|_| {
        let device = mount("first", &first);
        rig.ready();
        rustix::mount::unmount(&first, rustix::mount::UnmountFlags::DETACH).unwrap();
        if mount("second", &second) == device {
            return true;
        }
        for volume in ["first", "second"] {
            rig.keeper().unmount(volume, Duration::from_secs(5)).unwrap();
        }
        false
    });
    assert!(reused, "no device number was given out twice");
    rig.wait("the second", |status| status.volume("second").unwrap().state == VolumeState::Served);
    assert_eq!(rig.keeper().unmount("first", Duration::ZERO).unwrap(), TakenDown::Absent);
    assert_eq!(probe(second.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
}

#[test]
fn targets_that_can_not_be_mounted_on() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (keeper, _, _) = Keeper::start(KeeperOptions::new(dir.path().join("k"))).unwrap();
    let mount = |target: PathBuf| keeper.mount(MountSpec::new("v", target, Vec::new()));
    assert!(matches!(mount(dir.path().join("missing")), Err(KeeperError::Mount(MountError::System { .. }))));
    std::fs::write(dir.path().join("file"), b"x").unwrap();
    assert!(matches!(mount(dir.path().join("file")), Err(KeeperError::Mount(MountError::Invalid(_)))));
    assert!(matches!(mount(PathBuf::from("/proc")), Err(KeeperError::Mount(MountError::Busy { .. }))));
    let long = MountSpec { config: vec![0; 100_000], ..MountSpec::new("v", dir.path(), Vec::new()) };
    assert!(matches!(keeper.mount(long), Err(KeeperError::Mount(MountError::Invalid(_)))));
    assert_eq!(keeper.status().unwrap().volumes.len(), 0);
}

#[test]
fn garbage_on_the_socket_is_closed_and_counted() {
    let Some(_alone) = alone() else { return };
    let rig = Rig::new(SLOW_READS, |_| ());
    rig.ready();
    let path = std::fs::canonicalize(rig.dir.path()).unwrap();
    let short = path.join("s");
    std::os::unix::fs::symlink(path.join("pod".repeat(30)).join("volumes~".repeat(10)), &short).unwrap();
    let connect = || {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let address = rustix::net::SocketAddrUnix::new(short.join("keeper.sock")).unwrap();
        rustix::net::connect(&socket, &address).unwrap();
        socket
    };
    // The end of a closed connection.
    let closed = |socket: &rustix::fd::OwnedFd| match rustix::io::read(socket, &mut [0; 10][..]) {
        Ok(read) => assert_eq!(read, 0),
        Err(error) => assert_eq!(error, rustix::io::Errno::CONNRESET),
    };
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 1], &[0xff; 100_000], b"FBK2\x63\0", b"FBK2\x11\0\0\0\0\0\0\0\0\0"]
    {
        let socket = connect();
        rustix::net::send(&socket, garbage, rustix::net::SendFlags::empty()).unwrap();
        closed(&socket);
    }
    // Descriptors that nobody asked for.
    let socket = connect();
    let fds = [socket.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let text = [std::io::IoSlice::new(b"FBK2")];
    rustix::net::sendmsg(&socket, &text, &mut control, rustix::net::SendFlags::empty()).unwrap();
    closed(&socket);
    // One that says nothing is let go, and a daemon's own death is not needed for any of it.
    let silent = connect();
    closed(&silent);
    let status = rig.status();
    assert_eq!((status.garbage, status.volumes[0].takeovers, status.daemons.len()), (6, 0, 2));
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
}

const KEEPER: &str = "FOREBAY_TEST_KEEPER";

/// Not a test: a keeper in a process of its own, to be killed.
#[test]
fn keeper_main() {
    let Some(dir) = std::env::var_os(KEEPER).map(PathBuf::from) else { return };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let mut options = KeeperOptions::new(dir.join("keeper.sock"));
    options.state_file = Some(dir.join("mounts.json"));
    let (keeper, _events, _) = Keeper::start(options).unwrap();
    keeper.mount(MountSpec::new("v", dir.join("mnt"), Vec::new())).unwrap();
    println!("MOUNTED");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_keeper_is_cleaned_up_after() {
    let Some(_alone) = alone() else { return };
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("mnt");
    std::fs::create_dir(&target).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "keeper_main", "--nocapture"])
        .env(KEEPER, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    let mut out = child.stdout.take().unwrap();
    while !text.contains("MOUNTED") {
        let mut bytes = [0; 256];
        let read = out.read(&mut bytes).unwrap();
        assert!(read > 0, "the keeper ended: {text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    let mut options = KeeperOptions::new(dir.path().join("other.sock"));
    options.state_file = Some(dir.path().join("mounts.json"));
    // While it lives, nothing is touched.
    assert!(Keeper::start(options.clone()).is_err());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(mounts_under(dir.path()), 1);
    let (keeper, _, cleaned) = Keeper::start(options).unwrap();
    assert_eq!(cleaned.len(), 1);
    assert_eq!(mounts_under(dir.path()), 0);
    // The place is free again.
    keeper.mount(MountSpec::new("v", &target, Vec::new())).unwrap();
    keeper.shutdown(Duration::ZERO).unwrap();
    assert_eq!(mounts_under(dir.path()), 0);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "other.sock" || name == "mounts.json" || name == "mounts.json.lock"));
}

const UNPRIVILEGED: &str = "FOREBAY_TEST_UNPRIVILEGED";

/// Not a test: what `without_root` runs as another user.
#[test]
fn unprivileged_main() {
    let Some(dir) = std::env::var_os(UNPRIVILEGED).map(PathBuf::from) else { return };
    assert!(!rustix::process::geteuid().is_root());
    let dir = tempfile::tempdir_in(dir).unwrap();
    let rig = Rig::with(dir, SLOW_READS, |_| (), |spec| spec.allow_other = true);
    rig.ready();
    let info = rig.status().volumes[0].mount.clone();
    assert_eq!(info.mode, MountMode::Fusermount);
    for loss in &info.losses {
        println!("lost without root: {loss}");
    }
    assert!(info.losses.iter().any(|loss| matches!(loss, Loss::ReadAhead { kib: 128, .. })));
    let readers = ["direct", "walk"].map(|kind| Reader::start(kind, &rig.target));
    for round in 0..5 {
        rig.ready();
        std::thread::sleep(Duration::from_millis(30));
        rig.signal_active(Signal::KILL);
        rig.wait("take-over", |status| status.volumes[0].takeovers > round);
    }
    readers.into_iter().for_each(|reader| assert!(reader.finish() > 0));
    assert_eq!(rig.keeper().unmount(VOLUME, Duration::from_secs(10)).unwrap(), TakenDown::Clean);
    // With a file open: lazily, and aborted where fusectl lets its owner.
    rig.keeper().mount(MountSpec::new(VOLUME, &rig.target, serde_json::to_vec(&SLOW_READS).unwrap())).unwrap();
    rig.ready();
    let file = std::fs::File::open(rig.target.join("data")).unwrap();
    assert_eq!(rig.keeper().unmount(VOLUME, Duration::from_millis(200)).unwrap(), TakenDown::Aborted);
    drop(file);
    println!("UNPRIVILEGED DONE");
}

#[test]
fn without_root() {
    let Some(_alone) = alone() else { return };
    if Command::new("fusermount3").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: the package fuse3 is not installed");
        return;
    }
    const NOBODY: u32 = 65_534;
    let dir = tempfile::tempdir().unwrap();
    // Where another user can run it.
    let program = dir.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // Where udev does not run, /dev/fuse is for root alone: in a mount namespace of its own the test has one for all.
    let script = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse && \
                  exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" --exact unprivileged_main --nocapture";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(&program)
        .env(UNPRIVILEGED, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    std::io::stdout().write_all(text.as_bytes()).unwrap();
    assert!(output.status.success() && text.contains("UNPRIVILEGED DONE"), "{text}\n{errors}");
    assert_eq!(mounts_under(dir.path()), 0);
}
