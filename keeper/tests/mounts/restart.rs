//! The keeper ends, or is killed, and its daemons live on.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forebay_keeper::mount::TakenDown;
use forebay_keeper::tables::Counter;
use forebay_keeper::{Event, Keeper, KeeperError, KeeperOptions, MountSpec, VolumeState, mount};
use rustix::process::Signal;
use serde_json::Value;

use super::reader::{Reader, probe};
use super::rig::{Rig, VOLUME, mounts_under, signal_pid, supervise};
use super::{SLOW_READS, alone};

/// Directory of this process, when it is a keeper.
const KEEPER: &str = "FOREBAY_TEST_RESUMING_KEEPER";
/// Socket of this process, when it is a daemon that lies.
const LIAR: &str = "FOREBAY_TEST_LIAR";
const REJOIN: Duration = Duration::from_secs(2);

fn options(dir: &Path) -> KeeperOptions {
    KeeperOptions {
        state_file: Some(dir.join("mounts.json")),
        resume: true,
        rejoin: REJOIN,
        abort_after: Duration::from_secs(30),
        ..KeeperOptions::new(dir.join("keeper.sock"))
    }
}

/// Not a test: a keeper in a process of its own. It mounts what is not there yet, and answers each line.
#[test]
fn resuming_keeper_main() {
    let Some(dir) = std::env::var_os(KEEPER).map(PathBuf::from) else { return };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let (keeper, _events, cleaned) = Keeper::start(options(&dir)).unwrap();
    assert_eq!(cleaned, []);
    let mount = || {
        let config = serde_json::to_vec(&SLOW_READS).unwrap();
        keeper.mount(MountSpec::new(VOLUME, dir.join("mnt"), config)).unwrap();
    };
    if keeper.status().unwrap().volumes.is_empty() {
        mount();
    }
    println!("\nREADY");
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "status" => println!("{}", serde_json::to_string(&keeper.status().unwrap()).unwrap()),
            "remount" => {
                let taken = keeper.unmount(VOLUME, Duration::from_millis(100)).unwrap();
                mount();
                println!("{taken:?}");
            }
            "leave" => {
                keeper.leave(Duration::from_secs(10)).unwrap();
                println!("LEFT");
                // Without a word, as a process that exits.
                std::process::exit(0);
            }
            other => panic!("{other}"),
        }
    }
    keeper.shutdown(Duration::ZERO).unwrap();
    println!("DOWN");
}

/// Not a test: gives back descriptors that are of something else.
#[test]
fn liar_main() {
    let Some(socket) = std::env::var_os(LIAR) else { return };
    let address = rustix::net::SocketAddrUnix::new(PathBuf::from(socket)).unwrap();
    let link = {
        use rustix::net::{AddressFamily, SocketFlags, SocketType};
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    };
    rustix::net::connect(&link, &address).unwrap();
    let bytes = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let hello = [b"FBK2\x10\0".to_vec(), bytes(b"liar"), 1u64.to_le_bytes().to_vec(), vec![0; 8]].concat();
    rustix::net::send(&link, &hello, rustix::net::SendFlags::empty()).unwrap();
    let held = [b"FBK2\x14\0".to_vec(), bytes(VOLUME.as_bytes()), vec![1, 0, 0, 0, 0, 0, 0, 0], bytes(b""), bytes(b"")];
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = [null.as_fd(); 4];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let held = held.concat();
    let packet = [std::io::IoSlice::new(&held)];
    rustix::net::sendmsg(&link, &packet, &mut control, rustix::net::SendFlags::empty()).unwrap();
    println!("\nLIED");
    std::thread::sleep(Duration::from_secs(60));
}

struct KeeperProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl KeeperProcess {
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "restart::resuming_keeper_main", "--nocapture"])
            .env(KEEPER, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut keeper = Self { child, input, output };
        while keeper.line() != "READY" {}
        keeper
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.output.read_line(&mut line).unwrap() > 0, "the keeper ended");
        line.trim().to_owned()
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.input, "{question}").unwrap();
        self.line()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A keeper process and its daemons.
struct Restarts {
    dir: tempfile::TempDir,
    keeper: KeeperProcess,
    daemons: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    supervisor: Option<JoinHandle<()>>,
}

impl Restarts {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let keeper = KeeperProcess::start(dir.path());
        let (daemons, stop) = (Arc::new(AtomicUsize::new(2)), Arc::new(AtomicBool::new(false)));
        let supervisor = {
            let (socket, daemons, stop) = (dir.path().join("keeper.sock"), Arc::clone(&daemons), Arc::clone(&stop));
            std::thread::spawn(move || supervise(&socket, &daemons, &stop))
        };
        let mut rig = Self { dir, keeper, daemons, stop, supervisor: Some(supervisor) };
        rig.ready();
        rig
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn status(&mut self) -> Value {
        serde_json::from_str(&self.keeper.ask("status")).unwrap()
    }

    /// Until it is served, and two daemons hold it.
    fn ready(&mut self) -> Value {
        self.wait("both daemons", |volume| volume["state"] == "served" && volume["holders"] == 2)
    }

    /// Until that is so of the volume, which is returned.
    fn wait(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.status();
            let volume = &status["volumes"][0];
            if done(volume) {
                return volume.clone();
            }
            assert!(Instant::now() < end, "{what} not within 20 s: {status:#}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn pid(volume: &Value) -> i32 {
        i32::try_from(volume["daemon"].as_i64().unwrap()).unwrap()
    }

    fn standby(&mut self) -> i32 {
        let status = self.status();
        let daemons = status["daemons"].as_array().unwrap();
        let standby = daemons.iter().find(|daemon| daemon["role"] == "standby").unwrap();
        i32::try_from(standby["pid"].as_i64().unwrap()).unwrap()
    }

    fn restart(&mut self) {
        self.keeper = KeeperProcess::start(self.dir.path());
    }

    fn reads(&self) -> std::io::Result<usize> {
        probe(self.target().join("data"), Duration::from_secs(5)).expect("the reader hangs")
    }

    fn end(mut self) {
        let Self { keeper: KeeperProcess { child, .. }, .. } = &mut self;
        assert!(child.try_wait().unwrap().is_none());
        let KeeperProcess { mut child, input, mut output } =
            std::mem::replace(&mut self.keeper, KeeperProcess::start_nothing());
        drop(input);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut output, &mut text).unwrap();
        assert!(child.wait().unwrap().success() && text.contains("DOWN"), "{text}");
        assert_eq!(mounts_under(self.dir.path()), 0);
        let left = ["keeper.sock", "mounts.json", "mounts.json.lock", "mounts.json.daemons"];
        assert!(!left.iter().any(|name| self.dir.path().join(name).exists()));
    }
}

impl KeeperProcess {
    fn start_nothing() -> Self {
        let mut child = Command::new("true").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }
}

impl Drop for Restarts {
    fn drop(&mut self) {
        let _ = self.keeper.child.kill();
        let _ = self.keeper.child.wait();
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.supervisor.take().unwrap().join();
        // When a test failed.
        let _ = mount::take_down(&self.target().canonicalize_parent(), Duration::ZERO);
    }
}

trait CanonicalParent {
    fn canonicalize_parent(&self) -> PathBuf;
}

impl CanonicalParent for PathBuf {
    fn canonicalize_parent(&self) -> PathBuf {
        self.parent().unwrap().canonicalize().unwrap().join(self.file_name().unwrap())
    }
}

#[test]
fn a_keeper_killed_again_and_again_under_readers() {
    let Some(_alone) = alone() else { return };
    let mut rig = Restarts::new();
    let readers = ["buffered", "direct", "mmap", "walk"].map(|kind| Reader::start(kind, &rig.target()));
    for round in 0..10u64 {
        let before = rig.ready();
        rig.keeper.kill();
        std::thread::sleep(Duration::from_millis(round * 37 % 150));
        // Served without it.
        assert_eq!(rig.reads().unwrap(), 1);
        rig.restart();
        let after = rig.ready();
        assert_eq!((&after["daemon"], &after["takeovers"]), (&before["daemon"], &Value::from(0)), "{after:#}");
        assert!(after["generation"].as_u64() >= before["generation"].as_u64());
        assert_eq!(after["counters"]["errors"], 0);
        assert!(after["counters"]["read"].as_u64() > before["counters"]["read"].as_u64());
        // The next death of a daemon is survived as ever.
        signal_pid(Restarts::pid(&after), Signal::KILL);
        rig.wait("a take-over", |volume| volume["takeovers"] == 1);
    }
    let last = rig.ready();
    let bytes: u64 = readers.into_iter().map(Reader::finish).sum();
    println!("10 kills of the keeper and of a daemon each, {bytes} bytes read, {} resent", last["counters"]["resent"]);
    assert_eq!((mounts_under(rig.dir.path()), &last["counters"]["errors"]), (1, &Value::from(0)));
    rig.end();
}

#[test]
fn the_daemon_dies_while_there_is_no_keeper() {
    let Some(_alone) = alone() else { return };
    let mut rig = Restarts::new();
    let readers = ["direct", "mmap", "walk"].map(|kind| Reader::start(kind, &rig.target()));
    for round in 0..6u64 {
        let pid = Restarts::pid(&rig.ready());
        if round % 2 == 0 {
            rig.keeper.kill();
            signal_pid(pid, Signal::KILL);
        } else {
            signal_pid(pid, Signal::KILL);
            rig.keeper.kill();
        }
        std::thread::sleep(Duration::from_millis(round * 20));
        let started = Instant::now();
        rig.restart();
        let after = rig.wait("a take-over", |volume| volume["state"] == "served");
        assert_ne!(Restarts::pid(&after), pid);
        // It is known to be dead: nobody waits for it.
        assert!(started.elapsed() < REJOIN, "{:?}", started.elapsed());
    }
    rig.ready();
    readers.into_iter().for_each(|reader| assert!(reader.finish() > 0));
    rig.end();
}

#[test]
fn a_daemon_that_is_late_is_waited_for_and_one_that_is_stopped_is_killed() {
    let Some(_alone) = alone() else { return };
    let mut rig = Restarts::new();
    let readers = ["direct", "walk"].map(|kind| Reader::start(kind, &rig.target()));
    // Late: the standby is there first, and gets nothing.
    let pid = Restarts::pid(&rig.ready());
    signal_pid(pid, Signal::STOP);
    rig.keeper.kill();
    rig.restart();
    rig.wait("the standby", |volume| volume["holders"] == 1 && volume["state"] == "vacant");
    std::thread::sleep(REJOIN / 4);
    assert_eq!(rig.status()["volumes"][0]["state"], "vacant");
    signal_pid(pid, Signal::CONT);
    let after = rig.ready();
    assert_eq!((Restarts::pid(&after), &after["takeovers"]), (pid, &Value::from(0)));
    // Stopped: killed in the end, and replaced.
    let standby = rig.standby();
    signal_pid(pid, Signal::STOP);
    rig.keeper.kill();
    let started = Instant::now();
    rig.restart();
    let after = rig.wait("a take-over", |volume| volume["state"] == "served");
    assert!(started.elapsed() >= REJOIN, "{:?}", started.elapsed());
    assert_eq!((Restarts::pid(&after), &after["takeovers"]), (standby, &Value::from(1)));
    assert_eq!(rig.status()["killsSilent"], 1);
    rig.ready();
    readers.into_iter().for_each(|reader| assert!(reader.finish() > 0));
    rig.end();
}

#[test]
fn when_all_are_gone_the_mount_is_an_error_and_can_be_made_again() {
    let Some(_alone) = alone() else { return };
    let mut rig = Restarts::new();
    rig.ready();
    rig.daemons.store(0, Ordering::Relaxed);
    let pids = [Restarts::pid(&rig.ready()), rig.standby()];
    rig.keeper.kill();
    pids.into_iter().for_each(|pid| signal_pid(pid, Signal::KILL));
    assert!(rig.reads().is_err());
    rig.restart();
    assert_eq!(rig.status()["volumes"][0]["state"], "returning");
    // A daemon that gives back what it does not have changes nothing.
    let mut liar = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "restart::liar_main", "--nocapture"])
        .env(LIAR, rig.dir.path().join("keeper.sock"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(liar.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "LIED"));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.status()["volumes"][0]["state"], "returning");
    liar.kill().unwrap();
    liar.wait().unwrap();
    rig.wait("the abort", |volume| volume["state"] == "aborted");
    rig.daemons.store(2, Ordering::Relaxed);
    assert_eq!(rig.keeper.ask("remount"), "Clean");
    rig.ready();
    assert_eq!(rig.reads().unwrap(), 1);
    rig.end();
}

#[test]
fn a_keeper_leaves_and_another_one_goes_on() {
    let Some(_alone) = alone() else { return };
    let mut rig = Restarts::new();
    let readers = ["direct", "walk"].map(|kind| Reader::start(kind, &rig.target()));
    let before = rig.ready();
    for _ in 0..5 {
        assert_eq!(rig.keeper.ask("leave"), "LEFT");
        assert!(rig.keeper.child.wait().unwrap().success());
        rig.restart();
        assert_eq!(rig.ready()["daemon"], before["daemon"]);
    }
    readers.into_iter().for_each(|reader| assert!(reader.finish() > 0));
    rig.end();
}

/// In this process, to see its answers.
fn in_process() -> (Rig, KeeperOptions) {
    let mut options = None;
    let rig = Rig::new(SLOW_READS, |given| {
        given.resume = true;
        given.rejoin = REJOIN;
        options = Some(given.clone());
    });
    (rig, options.unwrap())
}

#[test]
fn a_keeper_does_not_leave_what_nobody_holds() {
    let Some(_alone) = alone() else { return };
    let (mut rig, options) = in_process();
    rig.ready();
    rig.daemons.store(0, Ordering::Relaxed);
    for daemon in rig.status().daemons {
        signal_pid(daemon.pid, Signal::KILL);
    }
    rig.wait("their end", |status| status.daemons.is_empty());
    // A daemon that comes while it waits is enough.
    let daemons = Arc::clone(&rig.daemons);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        daemons.store(1, Ordering::Relaxed);
    });
    let keeper = rig.keeper.take().unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            let spec = MountSpec::new("other", rig.dir.path().join("other"), Vec::new());
            assert!(matches!(keeper.mount(spec), Err(KeeperError::Leaving)));
        });
        keeper.leave(Duration::from_secs(20)).unwrap();
    });
    assert!((Duration::from_millis(300)..Duration::from_secs(15)).contains(&started.elapsed()));
    assert!(matches!(keeper.status(), Err(KeeperError::Ended)));
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
    let (keeper, mut events, _) = Keeper::start(options.clone()).unwrap();
    rig.keeper = Some(keeper);
    rig.wait("the resumption", |status| status.volumes[0].state == VolumeState::Served);
    let mut resumed = std::iter::from_fn(|| events.try_recv().ok());
    assert!(resumed.any(|event| matches!(event, Event::Resumed { .. })));
    assert_eq!(rig.status().volumes[0].counters.get(Counter::Errors), 0);
    // Nobody: after its patience it goes all the same, and says what ends.
    rig.daemons.store(0, Ordering::Relaxed);
    rig.signal_active(Signal::KILL);
    rig.wait("its end", |status| status.daemons.is_empty());
    let keeper = rig.keeper.take().unwrap();
    let left = keeper.leave(Duration::from_millis(200));
    assert!(matches!(left, Err(KeeperError::Unheld(volumes)) if volumes == [VOLUME]));
    drop(keeper);
    assert!(probe(rig.target.join("data"), Duration::from_secs(5)).unwrap().is_err());
    // The next one takes it down.
    let (keeper, _, cleaned) = Keeper::start(KeeperOptions { resume: false, ..options }).unwrap();
    assert_eq!((cleaned.len(), rig.mounts()), (1, 0));
    rig.keeper = Some(keeper);
}

#[test]
fn a_volume_that_is_not_on_record_is_left_alone() {
    let Some(_alone) = alone() else { return };
    let (mut rig, options) = in_process();
    rig.ready();
    let pid = rig.status().active().unwrap();
    rig.keeper.take().unwrap().leave(Duration::from_secs(5)).unwrap();
    std::fs::remove_file(options.state_file.as_ref().unwrap()).unwrap();
    let (keeper, mut events, _) = Keeper::start(options).unwrap();
    rig.keeper = Some(keeper);
    rig.wait("the daemons", |status| status.daemons.len() == 2);
    let mut unclaimed = std::iter::from_fn(|| events.try_recv().ok());
    assert!(unclaimed.any(|event| event == Event::Unclaimed { volume: VOLUME.to_owned(), pid }));
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(5)).unwrap().unwrap(), 1);
    // It is in the mount table, and can be taken down by that.
    let target = rig.target.canonicalize_parent();
    let found = mount::mounted_at(&target).unwrap().unwrap();
    assert_eq!((found.kind.as_str(), found.source), (mount::FUSE_KIND, format!("forebay:{VOLUME}")));
    let open = std::fs::File::open(rig.target.join("data")).unwrap();
    assert_eq!(mount::take_down(&target, Duration::from_millis(200)).unwrap(), TakenDown::Detached);
    assert_eq!((mount::take_down(&target, Duration::ZERO).unwrap(), rig.mounts()), (TakenDown::Absent, 0));
    // Who uses it keeps it.
    assert_eq!(std::os::unix::fs::FileExt::read_at(&open, &mut [0], 12_000_000).unwrap(), 1);
    assert!(mount::take_down(Path::new("/proc"), Duration::ZERO).is_err());
}

/// The record is lost, and the volume mounted anew before the daemons of the earlier mount are back.
#[test]
fn an_earlier_mount_of_a_volume_is_not_taken_for_it() {
    let Some(_alone) = alone() else { return };
    let (mut rig, options) = in_process();
    rig.ready();
    // Who uses it keeps the earlier one alive.
    let _open = std::fs::File::open(rig.target.join("data")).unwrap();
    let pids: Vec<i32> = rig.status().daemons.iter().map(|daemon| daemon.pid).collect();
    pids.iter().for_each(|pid| signal_pid(*pid, Signal::STOP));
    rig.keeper.take().unwrap().leave(Duration::from_secs(5)).unwrap();
    std::fs::remove_file(options.state_file.as_ref().unwrap()).unwrap();
    let target = rig.target.canonicalize_parent();
    assert_eq!(mount::take_down(&target, Duration::from_millis(200)).unwrap(), TakenDown::Detached);
    let (keeper, _, _) = Keeper::start(options).unwrap();
    keeper.mount(MountSpec::new(VOLUME, &rig.target, serde_json::to_vec(&SLOW_READS).unwrap())).unwrap();
    rig.keeper = Some(keeper);
    pids.iter().for_each(|pid| signal_pid(*pid, Signal::CONT));
    rig.ready();
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(10)).unwrap().unwrap(), 1);
    // Both hold the new one.
    rig.wait("the standby", |status| status.volumes[0].holders == 2);
    rig.signal_active(Signal::KILL);
    assert_eq!(probe(rig.target.join("data"), Duration::from_secs(10)).unwrap().unwrap(), 1);
}
