//! What programs see of a volume.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use forebay_keeper::tables::Counter;
use rustix::process::Signal;

use crate::rig::{Line, MOUNTED_AT_NS, Rig, c_path, can_mount, expected, size_of_many};

const BIG: u64 = 20 * 1024 * 1024 + 12_345;

fn lines() -> Vec<Line> {
    let put = |path: &str, seed, size| Line::Put(path.to_owned(), seed, size);
    vec![
        put("/big.bin", 1, BIG),
        put("/small", 2, 1000),
        put("/empty", 3, 0),
        put("/dir/with space", 4, 10),
        put("/dir/line\nbreak", 5, 11),
        put("/dir/ünï-日本", 6, 12),
        put("/dir/sub/deep", 7, 13),
    ]
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn files_read_as_their_source() {
    read_as_their_source(&lines());
}

#[test]
fn files_of_a_small_mount_read_as_their_source() {
    read_as_their_source(&[lines(), vec![Line::Small]].concat());
}

fn read_as_their_source(lines: &[Line]) {
    if !can_mount() {
        return;
    }
    let rig = Rig::new(lines);
    // Sequential; again from the page cache. (Some machines reclaim pages while there is memory, so what is asked for
    // again is only less, and in one of some rounds.)
    let mut warm = u64::MAX;
    for round in 0..4 {
        let before = rig.counter(Counter::BytesRead);
        let bytes = fs::read(rig.at("big.bin")).unwrap();
        assert!(bytes == expected(1, 0, BIG as usize), "round {round}");
        if round > 0 {
            warm = warm.min(rig.counter(Counter::BytesRead) - before);
        }
    }
    assert!(warm < BIG / 2, "{warm} bytes of a warm file were read again");
    assert!(rig.counter(Counter::Read) < 4 * BIG / 65_536, "small requests: {}", rig.counter(Counter::Read));
    // Random, through the cache and past it.
    for flags in [0, libc::O_DIRECT] {
        let file = OpenOptions::new().read(true).custom_flags(flags).open(rig.at("big.bin")).unwrap();
        for step in 0..100u64 {
            let offset = step * 7_919_113 % BIG;
            let len = (step * 977 % 300_000) as usize + 1;
            let mut buffer = vec![0; len];
            let got = file.read_at(&mut buffer, offset).unwrap();
            assert_eq!(got, len.min((BIG - offset) as usize));
            assert!(buffer[..got] == expected(1, offset, got), "at {offset}");
        }
        assert_eq!(file.read_at(&mut [0; 10], BIG).unwrap(), 0);
    }
    // Mapped.
    let file = File::open(rig.at("big.bin")).unwrap();
    // SAFETY: a new mapping, read-only, as long as the file, which does not change.
    let mapped = unsafe {
        let address = rustix::mm::mmap(
            std::ptr::null_mut(),
            BIG as usize,
            rustix::mm::ProtFlags::READ,
            rustix::mm::MapFlags::SHARED,
            &file,
            0,
        );
        std::slice::from_raw_parts(address.unwrap().cast::<u8>(), BIG as usize)
    };
    assert!(mapped == expected(1, 0, BIG as usize));
    // SAFETY: the mapping made above; nobody uses it after this.
    unsafe { rustix::mm::munmap(mapped.as_ptr().cast_mut().cast(), mapped.len()).unwrap() };
    drop(file);
    // The others.
    for (name, seed, size) in [
        ("small", 2, 1000),
        ("empty", 3, 0),
        ("dir/with space", 4, 10),
        ("dir/line\nbreak", 5, 11),
        ("dir/ünï-日本", 6, 12),
    ] {
        assert_eq!(fs::read(rig.at(name)).unwrap(), expected(seed, 0, size), "{name}");
    }
    assert_eq!(rig.counter(Counter::Errors), 0);
}

/// Listed, looked up, opened and read again without one request, and through a take-over without being opened.
#[test]
fn a_small_mount_is_read_again_without_requests() {
    if !can_mount() {
        return;
    }
    const FILES: u64 = 300;
    let mut rig = Rig::new(&[Line::Many("/many".to_owned(), FILES), Line::Small]);
    let pass = |rig: &Rig| {
        let mut names: Vec<_> = fs::read_dir(rig.at("many")).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        assert_eq!(names.len() as u64, FILES);
        for (number, path) in (0..).zip(names) {
            assert_eq!(fs::metadata(&path).unwrap().len(), size_of_many(number));
            assert!(fs::read(&path).unwrap() == expected(number, 0, size_of_many(number) as usize), "{number}");
        }
    };
    let asked = |rig: &Rig, counters: &[Counter]| counters.iter().map(|counter| rig.counter(*counter)).sum::<u64>();
    let opens = [Counter::Open, Counter::Release, Counter::Opendir, Counter::Releasedir];
    pass(&rig);
    assert_eq!(asked(&rig, &opens), 2, "one of each kind, to be told that it is not needed");
    // (Some machines reclaim pages while there is memory, so it is one of some rounds.)
    let every: Vec<Counter> = Counter::ALL.iter().copied().filter(|counter| counter.is_request()).collect();
    let again = |rig: &Rig| {
        let before = asked(rig, &every);
        pass(rig);
        asked(rig, &every) - before
    };
    let fewest = (0..5).map(|_| again(&rig)).min();
    assert_eq!(fewest, Some(0));
    let before = rig.signal(Signal::KILL);
    rig.wait_for_successor(before);
    rig.spawn();
    pass(&rig);
    assert_eq!(asked(&rig, &opens), 2);
}

#[test]
fn names_and_attributes() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new(&lines());
    let file = fs::metadata(rig.at("small")).unwrap();
    assert_eq!((file.len(), file.permissions().mode(), file.nlink()), (1000, 0o100_444, 1));
    assert_eq!((file.uid(), file.gid(), file.blocks(), file.blksize()), (0, 0, 2, 1 << 20));
    assert!(file.mtime() >= 1_700_000_000 && file.mtime_nsec() > 0);
    let directory = fs::metadata(rig.at("dir")).unwrap();
    assert_eq!((directory.permissions().mode(), directory.nlink()), (0o040_555, 2));
    assert_eq!(directory.mtime(), MOUNTED_AT_NS / 1_000_000_000);
    // The same file by two ways has the same number.
    assert_eq!(fs::metadata(rig.at("dir/../small")).unwrap().ino(), file.ino());

    let mut names: Vec<_> = fs::read_dir(rig.at("dir")).unwrap().map(|entry| entry.unwrap()).collect();
    names.sort_by_key(fs::DirEntry::file_name);
    let shown: Vec<_> = names.iter().map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert_eq!(shown, ["line\nbreak", "sub", "with space", "ünï-日本"]);
    assert!(names[1].file_type().unwrap().is_dir() && names[0].file_type().unwrap().is_file());
    for entry in names {
        assert_eq!(std::os::unix::fs::DirEntryExt::ino(&entry), fs::metadata(entry.path()).unwrap().ino());
    }

    // What is not there is not there, and the kernel remembers that.
    assert_eq!(errno(fs::metadata(rig.at("none"))), libc::ENOENT);
    let asked = rig.counter(Counter::Lookup);
    assert_eq!(errno(fs::metadata(rig.at("none"))), libc::ENOENT);
    assert_eq!(rig.counter(Counter::Lookup), asked);
    assert_eq!(errno(fs::metadata(rig.at("small/below"))), libc::ENOTDIR);
    assert_eq!(errno(fs::metadata(rig.at(&"x".repeat(256)))), libc::ENAMETOOLONG);

    // The sums are asked for in the background.
    rig.wait(|_| rustix::fs::statvfs(rig.root()).unwrap().f_files == 7);
    let statistics = rustix::fs::statvfs(rig.root()).unwrap();
    assert_eq!((statistics.f_bsize, statistics.f_namemax, statistics.f_bavail), (4096, 255, 0));
    assert_eq!(rig.counter(Counter::Errors), 0);
}

#[test]
fn nothing_can_be_changed() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new(&lines());
    let small = rig.at("small");
    let write = |path: &Path| OpenOptions::new().write(true).open(path);
    assert_eq!(errno(write(&small)), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().append(true).open(&small)), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().write(true).create(true).truncate(false).open(rig.at("new"))), libc::EROFS);
    assert_eq!(errno(File::create(&small)), libc::EROFS);
    assert_eq!(errno(fs::create_dir(rig.at("new"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(&small)), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(rig.at("dir/sub"))), libc::EROFS);
    assert_eq!(errno(fs::rename(&small, rig.at("other"))), libc::EROFS);
    assert_eq!(errno(fs::hard_link(&small, rig.at("other"))), libc::EROFS);
    assert_eq!(errno(std::os::unix::fs::symlink("x", rig.at("other"))), libc::EROFS);
    assert_eq!(errno(fs::set_permissions(&small, fs::Permissions::from_mode(0o644))), libc::EROFS);
    assert_eq!(errno(fs::read_link(&small)), libc::EINVAL);
    let set = rustix::fs::setxattr(&small, "user.x", b"1", rustix::fs::XattrFlags::empty());
    assert_eq!(set.unwrap_err(), rustix::io::Errno::ROFS);

    // What works on any file works here.
    let file = File::open(&small).unwrap();
    file.sync_all().unwrap();
    file.try_lock().unwrap();
    file.unlock().unwrap();
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(10)).unwrap(), 10);
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(10)).unwrap(), 1000);
    // SAFETY: an ioctl that takes no argument but a pointer to one int, which lives; it is not known here.
    let result = unsafe {
        let mut number: libc::c_int = 0;
        libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS as _, &raw mut number)
    };
    assert_eq!((result, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ENOTTY)));
    assert_eq!(rustix::fs::access(&small, rustix::fs::Access::WRITE_OK).unwrap_err(), rustix::io::Errno::ROFS);
    rustix::fs::access(&small, rustix::fs::Access::READ_OK).unwrap();
}

#[test]
fn extended_attributes() {
    if !can_mount() {
        return;
    }
    let rig = Rig::new(&lines());
    let get = |path: &str, name: &str, room: usize| {
        let mut buffer = vec![0; room];
        let len = rustix::fs::getxattr(rig.at(path), name, &mut buffer[..])?;
        buffer.truncate(len);
        Ok::<_, rustix::io::Errno>(buffer)
    };
    let list = |path: &str| {
        let mut buffer = vec![0; 1000];
        let len = rustix::fs::listxattr(rig.at(path), &mut buffer[..]).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    };
    assert_eq!(list("small"), "user.forebay.version\0user.forebay.cached_bytes\0user.forebay.owner\0");
    assert_eq!(list("dir"), "user.forebay.owner\0");
    assert_eq!(get("small", "user.forebay.version", 100).unwrap(), b"v2");
    assert_eq!(get("small", "user.forebay.cached_bytes", 100).unwrap(), b"1000");
    assert_eq!(get("dir", "user.forebay.owner", 100).unwrap(), b"memory");
    assert_eq!(get("small", "user.forebay.cached_bytes", 2).unwrap_err(), rustix::io::Errno::RANGE);
    // The size comes first, as programs ask for it.
    let path = c_path(&rig.at("small"));
    // SAFETY: both strings end with NUL and live; no buffer is given, and its size is 0.
    let size = unsafe { libc::getxattr(path.as_ptr(), c"user.forebay.owner".as_ptr(), std::ptr::null_mut(), 0) };
    assert_eq!(size, 6);
    // SAFETY: as above.
    let size = unsafe { libc::listxattr(path.as_ptr(), std::ptr::null_mut(), 0) };
    assert_eq!(size as usize, list("small").len());
    // An unknown name says so, and does not switch the known ones off.
    for name in ["user.other", "security.capability", "user.forebay.versions"] {
        assert_eq!(get("small", name, 100).unwrap_err(), rustix::io::Errno::NODATA, "{name}");
    }
    assert_eq!(get("small", "user.forebay.version", 100).unwrap(), b"v2");
}

#[test]
fn a_directory_of_200_000_files() {
    if !can_mount() {
        return;
    }
    const COUNT: u64 = 200_000;
    let mut rig = Rig::new(&[Line::Many("/many".to_owned(), COUNT)]);
    let walk = |rig: &mut Rig, kill_at: Option<u64>| {
        let mut sizes = BTreeMap::new();
        for (number, entry) in fs::read_dir(rig.at("many")).unwrap().enumerate() {
            let entry = entry.unwrap();
            let size = entry.metadata().unwrap().len();
            assert!(sizes.insert(entry.file_name(), size).is_none(), "{:?} twice", entry.file_name());
            if kill_at == Some(number as u64) {
                let before = rig.signal(rustix::process::Signal::KILL);
                rig.spawn();
                rig.wait_for_successor(before);
            }
        }
        assert_eq!(sizes.len() as u64, COUNT);
        for (number, (name, size)) in sizes.into_iter().enumerate() {
            assert_eq!(name, OsStr::new(&format!("{number:06}")));
            assert_eq!(size, size_of_many(number as u64));
        }
    };
    let asked = |rig: &Rig| rig.counter(Counter::Readdirplus) + rig.counter(Counter::Readdir);
    // The daemon dies in the middle of the first walk.
    walk(&mut rig, Some(COUNT / 2));
    let first = asked(&rig);
    assert!(first < COUNT / 50, "{first} requests");
    // A warm walk is the kernel's own, once the take-over has expired what was known and the listing began again.
    // (Some machines reclaim pages while there is memory: then the end of a listing is asked for again.)
    let quiet = || {
        let before = rig.counter(Counter::InvalidatedEntries);
        std::thread::sleep(std::time::Duration::from_millis(200));
        rig.counter(Counter::InvalidatedEntries) == before
    };
    while !quiet() {}
    let stats = rig.counter(Counter::Getattr) + rig.counter(Counter::Lookup);
    walk(&mut rig, None);
    let warm = (0..5).map(|_| {
        let before = asked(&rig);
        walk(&mut rig, None);
        asked(&rig) - before
    });
    let warm: Vec<u64> = warm.collect();
    assert!(warm.iter().any(|warm| *warm < first * 9 / 10), "every walk is asked for: {warm:?} of {first}");
    // Attributes came with the names.
    assert!(rig.counter(Counter::Getattr) + rig.counter(Counter::Lookup) < stats + COUNT / 50);
    let mut contents = Vec::new();
    File::open(rig.at("many/123456")).unwrap().read_to_end(&mut contents).unwrap();
    assert_eq!(contents, expected(123_456, 0, size_of_many(123_456) as usize));
}
