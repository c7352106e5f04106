//! A real file system that is full or read-only: a small tmpfs. Needs the right to mount.

use std::path::Path;
use std::time::Duration;

use crate::support::*;
use forebay_cache_store::{Tuning, WriteError};
use forebay_protocol::BLOCK_SIZE;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// 8 MiB; `None` without the right to mount.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        match mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), Some(c"size=8m")) {
            Ok(()) => Some(Self(dir)),
            Err(error) => {
                eprintln!("SKIPPED: mounting a tmpfs needs root ({error})");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_is_a_bypass_and_then_it_is_not() {
    let Some(disk) = Tmpfs::new() else { return };
    let tuning = Tuning { watch_space: false, retry_pause: Duration::from_millis(300), ..QUICK };
    let store = open_with(options(disk.path(), 1 << 30), tuning);
    let files: Vec<_> = (0..20).map(|n| spec(&format!("f{n}"), 8 * BLOCK_SIZE, 0)).collect();
    let mut full = None;
    for (n, file) in files.iter().enumerate() {
        let Some(chunk) = store.chunk(file, true) else { panic!("refused without a failure") };
        match chunk.write(0, &contents(file, 0, 8), &[]) {
            Ok(()) => {}
            Err(WriteError::Disk(problem)) => {
                assert!(problem.contains("No space left"), "{problem}");
                full = Some(n);
                break;
            }
            Err(other) => panic!("{other}"),
        }
    }
    let full = full.unwrap();
    assert!((8..20).contains(&full));
    // Bypassed, said, and what is held is served.
    assert!(store.totals().problem.is_some_and(|problem| problem.contains("No space left")));
    assert!(store.chunk(&files[full + 1], true).is_none());
    assert!(files[..full].iter().all(|file| read_all(&store, file)));
    assert_eq!(store.usage(dataset()).cached_bytes, full as u64 * 8 * BLOCK_SIZE);
    for file in &files[..4] {
        assert_eq!(store.remove(file.key).bytes, 8 * BLOCK_SIZE);
    }
    eventually("writes are tried again", || store.chunk(&files[full], true).is_some());
    fill(&store, &files[full]);
    assert!(read_all(&store, &files[full]));
    assert_eq!(store.totals().problem, None);
    store.close();
    let store = open_with(options(disk.path(), 1 << 30), tuning);
    swept(&store);
    assert!(files[4..=full].iter().all(|file| read_all(&store, file)));
}

#[test]
fn admission_stops_before_the_disk_is_full() {
    let Some(disk) = Tmpfs::new() else { return };
    let store = open_with(options(disk.path(), 1 << 30), QUICK);
    let files: Vec<_> = (0..20).map(|n| spec(&format!("f{n}"), 8 * BLOCK_SIZE, 0)).collect();
    let stored = files.iter().take_while(|file| {
        store.chunk(file, true).is_some_and(|chunk| chunk.write(0, &contents(file, 0, 8), &[]).is_ok())
    });
    let stored = stored.count();
    assert!((8..16).contains(&stored), "{stored}");
    let totals = store.totals();
    assert!(totals.problem.is_some_and(|problem| problem.contains("nearly full")));
    assert_eq!(totals.write_failures, 0);
    for file in &files[..4] {
        store.remove(file.key);
    }
    eventually("admission goes on", || store.chunk(&files[0], true).is_some());
    assert_eq!(store.totals().problem, None);
}

#[test]
fn a_read_only_disk_serves_what_it_has() {
    let Some(disk) = Tmpfs::new() else { return };
    let files = [spec("a", 3 * BLOCK_SIZE, 0), spec("b", 3 * BLOCK_SIZE, 0), spec("c", 3 * BLOCK_SIZE, 0)];
    let store = open_with(options(disk.path(), 1 << 30), Tuning { open_files: 1, ..QUICK });
    fill(&store, &files[0]);
    fill(&store, &files[1]);
    eventually("the index is written", || store.totals().index_waiting == 0);
    // The index is open for writing, so a forced read-only superblock is not to be had; a new chunk fails all the same.
    match mount_remount(disk.path(), MountFlags::RDONLY | MountFlags::BIND, "") {
        Ok(()) => {}
        Err(error) => {
            eprintln!("SKIPPED: cannot make the mount read-only ({error})");
            return;
        }
    }
    let chunk = store.chunk(&files[2], true).unwrap();
    let refused = chunk.write(0, &contents(&files[2], 0, 3), &[]);
    assert!(matches!(&refused, Err(WriteError::Disk(problem)) if problem.contains("Read-only")), "{refused:?}");
    assert!(store.totals().problem.is_some());
    assert!(read_all(&store, &files[0]) && read_all(&store, &files[1]) && read_all(&store, &files[0]));
    assert_eq!(store.remove(files[0].key).bytes, 0);
    assert!(read_all(&store, &files[0]));
    mount_remount(disk.path(), MountFlags::BIND, "").unwrap();
    eventually("writes are tried again", || store.chunk(&files[2], true).is_some());
    fill(&store, &files[2]);
    assert_eq!(store.totals().problem, None);
    drop((chunk, store));
}
