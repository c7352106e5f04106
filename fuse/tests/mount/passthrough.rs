//! Files that the kernel reads from the node cache itself.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use forebay_keeper::{MountMode, tables::Counter};
use forebay_protocol::DatasetId;
use rustix::process::Signal;

use crate::rig::{Line, Rig, VOLUME, can_mount, expected, read_mapped};

const SIZE: u64 = 3 * 1024 * 1024 + 77;

fn line(name: &str, seed: u64) -> Line {
    Line::Put(format!("/{name}"), seed, SIZE)
}

/// Whether files can be passed through here.
fn can_pass() -> bool {
    can_mount() && MountMode::suitable() == MountMode::Kernel
}

fn read(rig: &Rig, name: &str, seed: u64) -> File {
    let mut file = File::open(rig.at(name)).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert!(bytes == expected(seed, 0, SIZE as usize), "wrong bytes");
    file
}

/// Reads a file again and again until the daemon is not asked for any of it. The handle that was opened last.
fn read_until_passed(rig: &Rig, name: &str, seed: u64) -> File {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let before = rig.counter(Counter::Read);
        let file = read(rig, name, seed);
        if rig.counter(Counter::Read) == before {
            return file;
        }
        drop(file);
        assert!(Instant::now() < end, "the file never got into the node cache");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Files that are complete in the node cache.
fn complete(rig: &Rig) -> usize {
    let Ok(entries) = fs::read_dir(rig.node_cache()) else { return 0 };
    let datasets =
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir() && !path.ends_with("filling"));
    let files = datasets.flat_map(|path| fs::read_dir(path).unwrap()).map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_none()).count()
}

fn backings(rig: &Rig) -> u64 {
    rig.status().volume("test").unwrap().backings
}

#[test]
fn a_complete_file_is_read_without_the_daemon() {
    if !can_pass() {
        return;
    }
    let mut rig = Rig::with_node_cache(&[line("a", 1), line("b", 2)]);
    let a = read_until_passed(&rig, "a", 1);
    assert_eq!(backings(&rig), 1);
    let before = rig.counter(Counter::Read);
    // Nobody serves: neither what is open nor its mapping needs anybody.
    let first = rig.signal(Signal::KILL);
    rig.wait_for_successor(first);
    rig.signal(Signal::KILL);
    rig.wait(|status| status.daemons.is_empty());
    let mut buffer = vec![0; 100_000];
    a.read_exact_at(&mut buffer, 1_000_003).unwrap();
    assert!(buffer == expected(1, 1_000_003, buffer.len()));
    // The next daemon knows the id, and uses it before it has looked at the node cache.
    rig.spawn();
    rig.spawn();
    drop(read(&rig, "a", 1));
    assert_eq!((rig.counter(Counter::Read), backings(&rig)), (before, 1));
    read_mapped(&rig.at("a"), 1, 4096 * 50, 64 * 1024);
    assert_eq!(rig.counter(Counter::Read), before);
    // Another file goes on with the cache as its predecessor left it.
    drop(read_until_passed(&rig, "b", 2));
    assert_eq!((backings(&rig), rig.counter(Counter::Errors)), (2, 0));
}

#[test]
fn a_file_that_is_open_through_the_page_cache_stays_so() {
    if !can_pass() {
        return;
    }
    let rig = Rig::with_node_cache(&[line("a", 1), line("b", 2)]);
    let first = read(&rig, "a", 1);
    // Complete when another one that was asked for later is.
    drop(read_until_passed(&rig, "b", 2));
    let before = rig.counter(Counter::Read);
    drop(read(&rig, "a", 1));
    assert!(rig.counter(Counter::Read) > before, "two ways to read one inode");
    drop(first);
    drop(read_until_passed(&rig, "a", 1));
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn a_look_at_a_header_fetches_nothing() {
    if !can_pass() {
        return;
    }
    let rig = Rig::with_node_cache(&[line("a", 1), line("b", 2)]);
    let header = || {
        let file = File::open(rig.at("a")).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        let mut buffer = vec![0; 4096];
        file.read_exact_at(&mut buffer, 0).unwrap();
    };
    header();
    drop(read_until_passed(&rig, "b", 2));
    assert_eq!(complete(&rig), 1);
    // Looked at often enough, it is worth it.
    while complete(&rig) < 2 {
        header();
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_changed_file_is_another_file() {
    if !can_pass() {
        return;
    }
    let rig = Rig::with_node_cache(&[line("a", 1)]);
    let old = read_until_passed(&rig, "a", 1);
    rig.add(&[line("a", 9)]);
    let end = Instant::now() + Duration::from_secs(30);
    let mut byte = [0];
    loop {
        File::open(rig.at("a")).unwrap().read_exact(&mut byte).unwrap();
        if byte == *expected(9, 0, 1) {
            break;
        }
        assert!(Instant::now() < end, "the change never arrived");
        thread::sleep(Duration::from_millis(5));
    }
    drop(read_until_passed(&rig, "a", 9));
    // Who has the old one open still reads the old one.
    let mut buffer = vec![0; 1000];
    old.read_exact_at(&mut buffer, 500_000).unwrap();
    assert!(buffer == expected(1, 500_000, 1000));
    assert_eq!(backings(&rig), 2);
}

#[test]
fn without_a_keeper_new_files_go_through_the_page_cache() {
    if !can_pass() {
        return;
    }
    let mut rig = Rig::with_node_cache(&[line("a", 1), line("b", 2)]);
    drop(read_until_passed(&rig, "a", 1));
    drop(read(&rig, "b", 2));
    // b is complete, and has no id yet.
    while complete(&rig) < 2 {
        thread::sleep(Duration::from_millis(5));
    }
    rig.wait(|status| status.volume("test").unwrap().holders == 2);
    rig.keeper_leaves();
    drop(read(&rig, "b", 2));
    drop(read(&rig, "a", 1));
    rig.start_keeper();
    rig.wait(|status| status.volume("test").unwrap().daemon.is_some());
    drop(read_until_passed(&rig, "b", 2));
    drop(read_until_passed(&rig, "a", 1));
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn a_cache_directory_that_vanishes_is_done_without_and_made_again() {
    if !can_pass() {
        return;
    }
    let rig = Rig::with_node_cache(&[line("a", 1), line("b", 2)]);
    let a = read_until_passed(&rig, "a", 1);
    fs::remove_dir_all(rig.node_cache()).unwrap();
    let mut buffer = vec![0; 1000];
    a.read_exact_at(&mut buffer, 500_000).unwrap();
    assert!(buffer == expected(1, 500_000, 1000));
    drop(read_until_passed(&rig, "b", 2));
    drop(read(&rig, "a", 1));
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn a_disk_that_is_full_or_read_only_is_done_without() {
    if !can_pass() {
        return;
    }
    // Room for three and a half.
    let rig = Rig::with_node_cache_of(11 << 20, &[line("a", 1), line("b", 2), line("c", 3), line("d", 4)]);
    drop(read_until_passed(&rig, "a", 1));
    // Somebody else fills it up while there seems to be room: what is there stays, the rest is read all the same.
    let filler = rig.node_cache().join("filler");
    fs::write(&filler, vec![0; 7 << 20]).unwrap();
    for _ in 0..3 {
        drop(read(&rig, "b", 2));
        drop(read(&rig, "a", 1));
    }
    assert_eq!(complete(&rig), 1);
    fs::remove_file(&filler).unwrap();
    let remount = |flags| rustix::mount::mount_remount(rig.node_cache(), flags, "").unwrap();
    remount(rustix::mount::MountFlags::RDONLY);
    drop(read(&rig, "c", 3));
    let before = rig.counter(Counter::Read);
    drop(read(&rig, "a", 1));
    assert_eq!(rig.counter(Counter::Read), before, "what is there is read from there");
    remount(rustix::mount::MountFlags::empty());
    // A file that nobody has tried meanwhile: the others are left alone for a minute.
    drop(read_until_passed(&rig, "d", 4));
    assert_eq!(rig.counter(Counter::Errors), 0);
}

/// The second pass is not the workers': the source has lost the bytes.
#[test]
fn small_files_come_from_this_node_the_second_time() {
    if !can_mount() {
        return;
    }
    for shape in [None, Some(Line::Small)] {
        let put = |name: &str, seed| Line::Put(format!("/{name}"), seed, 200_000);
        let mut rig = Rig::with_node_cache(&[vec![put("a", 1), put("b", 2)], shape.into_iter().collect()].concat());
        let read = |name: &str, seed| {
            let file = File::open(rig.at(name)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let mut bytes = vec![0; 200_000];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes == expected(seed, 0, bytes.len()), "wrong bytes");
        };
        let index = || {
            let dataset = DatasetId::local("default", VOLUME).to_string();
            let packs = fs::read_dir(rig.node_cache().join(dataset).join("packs")).into_iter().flatten();
            let lengths = packs.map(|entry| entry.unwrap().path()).filter(|path| path.extension().unwrap() == "index");
            lengths.map(|path| fs::metadata(path).unwrap().len()).sum::<u64>()
        };
        let end = Instant::now() + Duration::from_secs(30);
        while index() < 64 {
            // Read before its packs were opened, a file is not kept.
            read("a", 1);
            read("b", 2);
            assert!(Instant::now() < end, "the files never got into the node cache");
            thread::sleep(Duration::from_millis(5));
        }
        rig.add(&[Line::Drop("/a".to_owned()), Line::Drop("/b".to_owned())]);
        thread::sleep(Duration::from_millis(100));
        let before = rig.counter(Counter::Read);
        read("a", 1);
        assert!(rig.counter(Counter::Read) > before, "the kernel had it");
        // Whoever comes next finds it there.
        let pid = rig.signal(Signal::KILL);
        rig.wait_for_successor(pid);
        rig.spawn();
        let read = |name: &str, seed| {
            let file = File::open(rig.at(name)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let mut bytes = vec![0; 200_000];
            // Until its packs are open the source is asked, which has nothing.
            let end = Instant::now() + Duration::from_secs(30);
            while let Err(error) = file.read_exact_at(&mut bytes, 0) {
                assert!(error.raw_os_error() == Some(libc::ESTALE) && Instant::now() < end, "{error}");
                thread::sleep(Duration::from_millis(5));
            }
            assert!(bytes == expected(seed, 0, bytes.len()), "wrong bytes");
        };
        read("b", 2);
    }
}
