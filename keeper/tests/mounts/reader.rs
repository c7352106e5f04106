//! Readers, each a process of its own: one that hangs or dies of SIGBUS fails a test, and no more.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::daemon::{DATA_SIZE, SMALL_FILES, fill, small_size};

/// Kind and mount of this process, when it is a reader.
pub(crate) const READER: &str = "FOREBAY_TEST_READER";

/// Reads until standard input ends, everything once at least, then says how much. Any wrong byte or error is a panic.
pub(crate) fn run(what: &str) {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let (kind, root) = what.split_once(':').unwrap();
    let root = Path::new(root);
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        seen.store(true, Ordering::Relaxed);
    });
    let kept = File::open(root.join("data")).unwrap();
    let mut bytes = 0u64;
    loop {
        bytes += match kind {
            "buffered" => buffered(&root.join("data")),
            "direct" => direct(&root.join("data")),
            "mmap" => mapped(&root.join("data")),
            "walk" => walk(root),
            other => panic!("{other}"),
        };
        let mut some = [0; 100];
        kept.read_exact_at(&mut some, 12_345).unwrap();
        check(12_345, &some);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    println!("READ {bytes}");
}

fn check(offset: u64, bytes: &[u8]) {
    let mut expected = vec![0; bytes.len()];
    fill(offset, &mut expected);
    assert!(expected == bytes, "wrong bytes at {offset}");
}

fn forget(file: &File) {
    rustix::fs::fadvise(file.as_fd(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

fn sequential(file: &File) -> u64 {
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let read = file.read_at(&mut buffer, offset).unwrap();
        if read == 0 {
            assert_eq!(offset, DATA_SIZE);
            return offset;
        }
        check(offset, &buffer[..read]);
        offset += read as u64;
    }
}

fn buffered(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    forget(&file);
    sequential(&file)
}

fn direct(path: &Path) -> u64 {
    sequential(&OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap())
}

fn mapped(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    forget(&file);
    let len = DATA_SIZE as usize;
    // SAFETY: a fresh read-only mapping of the whole file, which never changes.
    let bytes = unsafe {
        let flags = rustix::mm::MapFlags::SHARED;
        let at = rustix::mm::mmap(std::ptr::null_mut(), len, rustix::mm::ProtFlags::READ, flags, &file, 0).unwrap();
        std::slice::from_raw_parts(at.cast::<u8>(), len)
    };
    for offset in (0..len).step_by(1 << 16) {
        let end = (offset + 4096).min(len);
        check(offset as u64, &bytes[offset..end]);
    }
    // SAFETY: `bytes` is not used after this.
    unsafe { rustix::mm::munmap(bytes.as_ptr().cast_mut().cast(), len).unwrap() };
    DATA_SIZE
}

fn walk(root: &Path) -> u64 {
    let mut names: Vec<_> =
        std::fs::read_dir(root.join("d")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names.len() as u64, SMALL_FILES);
    let mut bytes = 0;
    for index in 0..SMALL_FILES {
        let path = root.join("d").join(format!("f{index}"));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), small_size(index));
        let contents = std::fs::read(&path).unwrap();
        assert_eq!(contents.len() as u64, small_size(index));
        check(0, &contents);
        bytes += contents.len() as u64;
        assert!(!path.with_extension("none").exists());
    }
    assert_eq!(std::fs::metadata(root.join("nothing")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    bytes
}

/// A reader process.
pub(crate) struct Reader {
    kind: &'static str,
    child: Child,
}

impl Reader {
    pub(crate) fn start(kind: &'static str, root: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "reader_main", "--nocapture"])
            .env(READER, format!("{kind}:{}", root.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { kind, child }
    }

    /// Ends it, and asserts that it saw no error. Returns the bytes it read.
    pub(crate) fn finish(mut self) -> u64 {
        drop(self.child.stdin.take());
        let end = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "the {} reader hangs", self.kind);
            std::thread::sleep(Duration::from_millis(10));
        }
        let status = self.child.wait().unwrap();
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(status.success(), "the {} reader failed: {status}\n{text}", self.kind);
        let bytes = text.split("READ ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
        assert!(bytes > 0, "the {} reader read nothing", self.kind);
        bytes
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // Not waited for when it is stuck: its parent's end kills it.
        let _ = self.child.try_wait();
    }
}

/// Reads one byte that no cache has, in a thread: how it ended, or that it did not.
pub(crate) fn probe(path: PathBuf, timeout: Duration) -> Option<std::io::Result<usize>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let read = || {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
            file.read_at(&mut [0], 7)
        };
        let _ = sender.send(read());
    });
    receiver.recv_timeout(timeout).ok()
}
