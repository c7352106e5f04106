//! docs/semantics.md, executed: attributes, errors, extended attributes, statfs, positions in directories.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
};

use rustix::{
    fs::{CWD, Mode, OFlags, RenameFlags, XattrFlags},
    io::Errno,
};
use support::{BUCKET, Bench, Setup, can_mount, content, text};

async fn fill(store: forebay_test_store::TestStore) -> forebay_test_store::TestStore {
    store.put(BUCKET, "dir/file", content::bytes(1, 100_001)).await;
    store.put(BUCKET, "dir/marker/", text("")).await;
    for index in 0..3000 {
        store.put(BUCKET, &format!("wide/{index:04}"), text("x")).await;
    }
    store
}

fn xattr(path: &std::path::Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 256];
    let count = rustix::fs::getxattr(path, name, &mut buffer[..])?;
    buffer.truncate(count);
    Ok(buffer)
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let file = fs::metadata(bench.path("dir/file")).unwrap();
    assert_eq!((file.len(), file.permissions().mode(), file.nlink()), (100_001, 0o100444, 1));
    assert_eq!((file.uid(), file.gid(), file.blocks()), (0, 0, 100_001u64.div_ceil(512)));
    let age = std::time::SystemTime::now().duration_since(file.modified().unwrap()).unwrap();
    assert!(age.as_secs() < 600, "the time is not the object's: {age:?}");
    let directory = fs::metadata(bench.path("dir")).unwrap();
    assert!(directory.is_dir());
    assert_eq!(directory.permissions().mode() & 0o7777, 0o555);
    assert_eq!(fs::metadata(bench.path("dir/file")).unwrap().ino(), file.ino());
    // A marker is no entry.
    assert!(!bench.path("dir/marker/file").exists());
    assert!(fs::read_dir(bench.path("dir")).unwrap().count() <= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_refused_as_read_only() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let (file, directory, new) = (bench.path("dir/file"), bench.path("dir"), bench.path("dir/new"));
    let open = |path, flags| rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map(drop);
    let results = [
        ("write", open(&file, OFlags::WRONLY)),
        ("truncate", open(&file, OFlags::RDWR | OFlags::TRUNC)),
        ("create", open(&new, OFlags::CREATE | OFlags::WRONLY)),
        ("unlink", rustix::fs::unlink(&file)),
        ("rmdir", rustix::fs::rmdir(&directory)),
        ("mkdir", rustix::fs::mkdir(&new, Mode::from_raw_mode(0o755))),
        ("rename", rustix::fs::renameat_with(CWD, &file, CWD, &new, RenameFlags::empty())),
        ("link", rustix::fs::link(&file, &new)),
        ("symlink", rustix::fs::symlink("x", &new)),
        ("chmod", rustix::fs::chmod(&file, Mode::from_raw_mode(0o777))),
        ("chown", rustix::fs::chown(&file, Some(rustix::fs::Uid::from_raw(1)), None)),
        ("setxattr", rustix::fs::setxattr(&file, "user.x", b"1", XattrFlags::empty())),
        ("removexattr", rustix::fs::removexattr(&file, "user.forebay.version")),
    ];
    for (what, result) in results {
        assert_eq!(result, Err(Errno::ROFS), "{what}");
    }
    assert_eq!(fs::read(&file).unwrap(), content::bytes(1, 100_001));
}

#[tokio::test(flavor = "multi_thread")]
async fn extended_attributes() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let file = bench.path("dir/file");
    assert_eq!(xattr(&file, "user.forebay.cached_bytes").unwrap(), b"0");
    fs::read(&file).unwrap();
    assert_eq!(xattr(&file, "user.forebay.cached_bytes").unwrap(), b"100001");
    let stat = bench.up.json(&["stat", "data", "/dir/file"]);
    assert_eq!(xattr(&file, "user.forebay.version").unwrap(), stat["version"].as_str().unwrap().as_bytes());
    assert_eq!(xattr(&file, "user.forebay.owner").unwrap(), stat["owners"][0].as_str().unwrap().as_bytes());
    assert!(xattr(&bench.path("dir"), "user.forebay.owner").unwrap().starts_with(b"runtime-"));
    let revision = || bench.up.status()["datasets"][0]["revision"].as_str().map(str::to_owned);
    support::eventually("the revision", std::time::Duration::from_secs(30), || revision().is_some());
    assert_eq!(xattr(&bench.path(""), "user.forebay.revision").unwrap(), revision().unwrap().into_bytes());
    // Unknown names are absent, not unsupported: one ENOSYS would switch all of them off.
    assert_eq!(xattr(&file, "user.unknown"), Err(Errno::NODATA));
    assert_eq!(xattr(&file, "security.capability"), Err(Errno::NODATA));
    assert_eq!(xattr(&file, "user.forebay.cached_bytes").unwrap(), b"100001");
    let mut names = vec![0u8; 1024];
    let count = rustix::fs::listxattr(&file, &mut names[..]).unwrap();
    let names: BTreeSet<&str> = std::str::from_utf8(&names[..count]).unwrap().split_terminator('\0').collect();
    assert_eq!(names, BTreeSet::from(["user.forebay.version", "user.forebay.cached_bytes", "user.forebay.owner"]));
    assert_eq!(rustix::fs::getxattr(&file, "user.forebay.cached_bytes", &mut [0u8; 1][..]), Err(Errno::RANGE));
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_in_a_directory_survive_a_takeover() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let directory = rustix::fs::open(bench.path("wide"), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let mut buffer = Vec::with_capacity(4096);
    let mut entries = rustix::fs::RawDir::new(&directory, buffer.spare_capacity_mut());
    let mut seen = BTreeSet::new();
    while let Some(entry) = entries.next() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(seen.insert(name.clone()), "{name} came twice");
        if seen.len() % 1000 == 0 {
            support::signal(bench.up.daemon(), rustix::process::Signal::KILL);
        }
    }
    // "." and ".." beside the entries.
    assert_eq!(seen.len(), 3002);
}

#[tokio::test(flavor = "multi_thread")]
async fn statfs_tells_the_dataset() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    support::eventually("the scan", std::time::Duration::from_secs(20), || {
        bench.up.status()["datasets"][0]["scan"]["state"] == "Complete"
    });
    support::eventually("the totals", std::time::Duration::from_secs(20), || {
        let stat = rustix::fs::statfs(bench.path(".")).unwrap();
        stat.f_files == 3001
    });
    let stat = rustix::fs::statfs(bench.path(".")).unwrap();
    assert_eq!((stat.f_bfree, stat.f_bavail, stat.f_ffree, stat.f_namelen), (0, 0, 0, 255));
}
