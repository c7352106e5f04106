//! A real file system that is full or read-only: a small tmpfs. Needs the right to mount.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::*;
use forebay_cache_store::{Refusal, Tuning, WriteError};
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

    /// Takes all but `spare` bytes; the file that has them.
    fn fill_up(&self, spare: u64) -> PathBuf {
        let path = self.path().join("ballast");
        let space = rustix::fs::statvfs(self.path()).unwrap();
        std::fs::write(&path, vec![0; (space.f_bavail * space.f_frsize - spare) as usize]).unwrap();
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_is_a_bypass_and_then_it_is_not() {
    const PAUSE: Duration = Duration::from_secs(1);
    // No room for the chunk's file; or for the file, but not for its bytes: then the chunk is there, without blocks.
    for (spare, problem, present) in [(0, "cannot create a chunk", false), (4 * 4096, "cannot write", true)] {
        let Some(disk) = Tmpfs::new() else { return };
        // The index is written by the sweep, and at the end: in between nobody takes the room that is counted here.
        let tuning = Tuning { watch_space: false, retry_pause: PAUSE, commit_interval: PAUSE * 3600, ..QUICK };
        let store = open_with(options(disk.path(), 1 << 30), tuning);
        swept(&store);
        let files: Vec<_> = (0..7).map(|n| spec(&format!("f{n}"), 8 * BLOCK_SIZE, 0)).collect();
        files[..5].iter().for_each(|file| fill(&store, file));
        let ballast = disk.fill_up(spare);
        let last = &files[5];
        let write = || store.chunk(last, true).map(|chunk| chunk.write(0, &contents(last, 0, 8), &[]));
        let failed = Instant::now();
        let said = |text: &str| text.contains(problem) && text.contains("No space left");
        let refused = write();
        assert!(matches!(&refused, Some(Err(WriteError::Disk(text))) if said(text)), "{refused:?}");
        // Bypassed, said, and what is held is served.
        assert!(store.totals().problem.is_some_and(|text| said(&text)));
        assert!(store.chunk(&files[6], true).is_none());
        assert!(files[..5].iter().all(|file| read_all(&store, file)));
        assert_eq!(store.usage(dataset()).cached_bytes, 5 * 8 * BLOCK_SIZE);
        for file in &files[..2] {
            assert_eq!(store.remove(file.key).bytes, 8 * BLOCK_SIZE);
        }
        // There is room now, but nobody has seen it: the pause is not cut short. A chunk that is there is given all the
        // same, so only a write tells; the first one that is tried must succeed.
        assert_eq!(store.chunk(last, true).is_some(), present);
        eventually("writes are tried again", || match write() {
            None | Some(Err(WriteError::Refused(Refusal::Disk(_)))) => false,
            Some(tried) => {
                assert_eq!(tried, Ok(()));
                true
            }
        });
        assert!(failed.elapsed() >= PAUSE, "{:?}", failed.elapsed());
        assert!(read_all(&store, last));
        assert_eq!((store.totals().problem, store.totals().write_failures), (None, 1));
        std::fs::remove_file(ballast).unwrap();
        store.close();
        let store = open_with(options(disk.path(), 1 << 30), tuning);
        swept(&store);
        assert!(files[2..=5].iter().all(|file| read_all(&store, file)));
    }
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
