//! The source changes under a mounted volume, whose names and attributes the kernel keeps for a day.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::rig::{Line, Rig, can_mount, expected};

fn put(path: &str, seed: u64, size: u64) -> Line {
    Line::Put(path.to_owned(), seed, size)
}

/// What was announced arrives; generously.
fn soon(what: &str, test: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !test() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn changes_arrive_and_open_files_keep_their_version() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new(&[put("/d/a", 1, 300_000), put("/d/b", 2, 10)]);
    let (a, d) = (rig.at("d/a"), rig.at("d"));
    let old = File::open(&a).unwrap();
    let number = fs::metadata(&a).unwrap().ino();
    assert_eq!(names(&d), ["a", "b"]);
    assert_eq!(fs::metadata(rig.at("d/c")).unwrap_err().kind(), io::ErrorKind::NotFound);
    let mut first = vec![0; 1000];
    old.read_exact_at(&mut first, 0).unwrap();

    rig.add(&[put("/d/a", 11, 200_000), put("/d/c", 3, 20), Line::Remove("/d/b".to_owned())]);
    soon("a new name", || rig.at("d/c").exists());
    soon("a removed name", || !rig.at("d/b").exists());
    soon("a changed file", || fs::metadata(&a).unwrap().len() == 200_000);
    soon("a changed listing", || names(&d) == ["a", "c"]);
    assert_ne!(fs::metadata(&a).unwrap().ino(), number);
    assert!(fs::read(&a).unwrap() == expected(11, 0, 200_000));
    assert_eq!(fs::read(rig.at("d/c")).unwrap(), expected(3, 0, 20));

    // Who had it open reads the old bytes, also those that were not read before, also from a successor.
    assert_eq!(old.metadata().unwrap().len(), 300_000);
    let before = rig.signal(Signal::KILL);
    rig.wait_for_successor(before);
    let mut whole = vec![0; 300_000];
    old.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole == expected(1, 0, 300_000));
}

#[test]
fn changes_that_nobody_announced_are_found_after_a_takeover() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(&[put("/d/a", 1, 100)]);
    assert_eq!(names(&rig.at("d")), ["a"]);
    assert!(!rig.at("d/b").exists());
    // Nobody serves when the source changes, so nobody hears of it.
    let first = rig.signal(Signal::KILL);
    rig.wait_for_successor(first);
    rig.signal(Signal::KILL);
    rig.wait(|status| status.daemons.is_empty());
    rig.add(&[put("/d/a", 2, 200), put("/d/b", 3, 10)]);
    rig.spawn();
    soon("a changed file", || fs::metadata(rig.at("d/a")).unwrap().len() == 200);
    soon("a new name", || rig.at("d/b").exists());
    soon("a changed listing", || names(&rig.at("d")) == ["a", "b"]);
}

#[test]
fn a_version_that_is_gone_is_an_error_for_who_holds_it_and_for_nobody_else() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new(&[put("/a", 1, 300_000)]);
    let path = rig.at("a");
    let held = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let mut buffer = vec![0; 1000];
    held.read_exact_at(&mut buffer, 0).unwrap();
    assert!(buffer == expected(1, 0, 1000));
    rig.add(&[Line::Drop("/a".to_owned()), put("/a", 2, 400_000)]);
    soon("a changed file", || fs::metadata(&path).unwrap().len() == 400_000);
    assert_eq!(held.read_at(&mut buffer, 5000).unwrap_err().raw_os_error(), Some(libc::ESTALE));
    assert!(fs::read(&path).unwrap() == expected(2, 0, 400_000));
}
