//! Programs that read from the mount all the time and check every byte: buffered, mmap, direct I/O, an fd kept open,
//! and a walker. They stop when told, and give what they saw.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::content::{difference, mix};

/// How a reader reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Open, read from beginning to end, close, drop the cached pages, again.
    Buffered,
    /// The same with O_DIRECT: every read is a request, and no error hides behind read-ahead.
    Direct,
    /// Random places of a mapping that is made anew each round.
    Mmap,
    /// Random places of one descriptor that is opened once, with O_DIRECT.
    KeptOpen,
}

/// A file and the seed of its contents.
#[derive(Clone, Debug)]
pub struct Target {
    pub path: PathBuf,
    pub size: u64,
    pub seed: u64,
}

/// What all readers together saw.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub bytes: u64,
    pub rounds: u64,
    pub longest: Duration,
    pub errors: Vec<String>,
}

/// Readers at work.
pub struct Readers {
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Report>>,
}

impl Readers {
    /// Starts a reader for each pair.
    pub fn start(work: Vec<(Kind, Target)>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let bytes = Arc::new(AtomicU64::new(0));
        let threads = work
            .into_iter()
            .map(|(kind, target)| {
                let (stop, bytes) = (Arc::clone(&stop), Arc::clone(&bytes));
                std::thread::spawn(move || read_until(kind, &target, &stop, &bytes))
            })
            .collect();
        Self { stop, bytes, threads }
    }

    /// Bytes read and checked so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits until `more` further bytes were read: the readers make progress.
    pub fn progress(&self, more: u64, patience: Duration) {
        let (goal, deadline) = (self.bytes() + more, Instant::now() + patience);
        while self.bytes() < goal {
            assert!(Instant::now() < deadline, "the readers hang");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends them.
    pub fn finish(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = Report::default();
        for thread in self.threads {
            let report = thread.join().unwrap();
            total.bytes += report.bytes;
            total.rounds += report.rounds;
            total.longest = total.longest.max(report.longest);
            total.errors.extend(report.errors);
        }
        total
    }
}

fn read_until(kind: Kind, target: &Target, stop: &AtomicBool, bytes: &AtomicU64) -> Report {
    let mut report = Report::default();
    let kept = (kind == Kind::KeptOpen).then(|| open(&target.path, true).unwrap());
    let mut random = target.seed;
    while !stop.load(Ordering::Relaxed) && report.errors.len() < 10 {
        let done = match kind {
            Kind::Buffered => {
                open(&target.path, false).and_then(|file| whole(&file, target, stop, bytes, &mut report, true))
            }
            Kind::Direct => {
                open(&target.path, true).and_then(|file| whole(&file, target, stop, bytes, &mut report, false))
            }
            Kind::Mmap => mapped(target, &mut random, bytes, &mut report),
            Kind::KeptOpen => {
                kept.as_ref().map_or(Ok(()), |file| somewhere(file, target, &mut random, bytes, &mut report))
            }
        };
        if let Err(error) = done {
            report.errors.push(format!("{kind:?} {}: {error}", target.path.display()));
        }
        report.rounds += 1;
    }
    report
}

/// Opens for reading, optionally past the page cache.
pub fn open(path: &Path, direct: bool) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true);
    if direct {
        options.custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
    }
    options.open(path)
}

/// Forgets the pages of a file that nobody maps or writes.
pub fn drop_pages(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

fn whole(
    file: &File,
    target: &Target,
    stop: &AtomicBool,
    bytes: &AtomicU64,
    report: &mut Report,
    drop: bool,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < target.size && !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let count = file.read_at(&mut buffer, offset)?;
        report.longest = report.longest.max(begun.elapsed());
        if count == 0 {
            return Err(std::io::Error::other(format!("ends at {offset} of {}", target.size)));
        }
        check(target, offset, &buffer[..count])?;
        offset += count as u64;
        report.bytes += count as u64;
        bytes.fetch_add(count as u64, Ordering::Relaxed);
    }
    if drop {
        drop_pages(file);
    }
    Ok(())
}

fn somewhere(
    file: &File,
    target: &Target,
    random: &mut u64,
    bytes: &AtomicU64,
    report: &mut Report,
) -> std::io::Result<()> {
    *random = mix(*random);
    let offset = *random % target.size;
    let mut buffer = vec![0; 64 << 10];
    let begun = Instant::now();
    let count = file.read_at(&mut buffer, offset)?;
    report.longest = report.longest.max(begun.elapsed());
    check(target, offset, &buffer[..count])?;
    report.bytes += count as u64;
    bytes.fetch_add(count as u64, Ordering::Relaxed);
    Ok(())
}

fn mapped(target: &Target, random: &mut u64, bytes: &AtomicU64, report: &mut Report) -> std::io::Result<()> {
    let file = open(&target.path, false)?;
    // SAFETY: the file is read-only and its bytes never change under one node id; a vanished version would be SIGBUS,
    // which fails the test.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    for _ in 0..16 {
        *random = mix(*random);
        let offset = (*random % target.size) as usize;
        let end = (offset + (64 << 10)).min(map.len());
        let begun = Instant::now();
        let copy = map[offset..end].to_vec();
        report.longest = report.longest.max(begun.elapsed());
        check(target, offset as u64, &copy)?;
        report.bytes += copy.len() as u64;
        bytes.fetch_add(copy.len() as u64, Ordering::Relaxed);
    }
    drop(map);
    drop_pages(&file);
    Ok(())
}

fn check(target: &Target, offset: u64, read: &[u8]) -> std::io::Result<()> {
    match difference(target.seed, offset, read) {
        None => Ok(()),
        Some(position) => Err(std::io::Error::other(format!("wrong byte at {position}"))),
    }
}
