//! One pass over the data: several readers, in random order, every byte checked.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use rand::seq::SliceRandom as _;
use xxhash_rust::xxh3::Xxh3;

use crate::data::Expected;

/// How files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As programs read: through the page cache.
    Buffered,
    /// Past the page cache: every read reaches the daemon.
    Direct,
}

/// What a pass did.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Files read whole.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// How long it took.
    pub wall: Duration,
    /// The longest single open or read.
    pub longest_stall: Duration,
    /// What went wrong: I/O errors and wrong bytes.
    pub errors: Vec<String>,
}

/// Progress of a pass, for whoever does something in the middle of it.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
}

impl Progress {
    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Reads all files with `readers` threads. Blocks.
pub fn run(
    root: &Path,
    files: &[Expected],
    readers: usize,
    mode: Mode,
    progress: &Progress,
    bar: &ProgressBar,
) -> Outcome {
    let mut order: Vec<&Expected> = files.iter().collect();
    order.shuffle(&mut rand::rng());
    let next = AtomicU64::new(0);
    let total = Mutex::new(Outcome::default());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| {
                let mut own = Outcome::default();
                let mut buffer = AlignedBuffer::new();
                while let Some(expected) = order.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    match read(root, expected, mode, &mut buffer, &mut own.longest_stall, progress, bar) {
                        Ok(()) => {
                            own.files += 1;
                            own.bytes += expected.size;
                        }
                        Err(error) => own.errors.push(format!("{}: {error}", expected.path)),
                    }
                }
                // A reader that panicked has failed the pass already.
                let mut total = total.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                total.files += own.files;
                total.bytes += own.bytes;
                total.longest_stall = total.longest_stall.max(own.longest_stall);
                total.errors.extend(own.errors);
            });
        }
    });
    let mut outcome = total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    outcome.wall = started.elapsed();
    outcome
}

fn read(
    root: &Path,
    expected: &Expected,
    mode: Mode,
    buffer: &mut AlignedBuffer,
    longest: &mut Duration,
    progress: &Progress,
    bar: &ProgressBar,
) -> std::io::Result<()> {
    let mut timed = |what: &mut dyn FnMut() -> std::io::Result<usize>| {
        let begun = Instant::now();
        let done = what();
        *longest = (*longest).max(begun.elapsed());
        done
    };
    let mut file = None;
    timed(&mut || {
        let mut options = File::options();
        options.read(true);
        if mode == Mode::Direct {
            options.custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
        }
        file = Some(options.open(root.join(&expected.path))?);
        Ok(0)
    })?;
    let Some(mut file) = file else { return Ok(()) };
    let mut hasher = Xxh3::new();
    let mut size = 0;
    loop {
        let buffer = buffer.slice();
        let count = timed(&mut || file.read(buffer))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        size += count as u64;
        progress.bytes.fetch_add(count as u64, Ordering::Relaxed);
        bar.inc(count as u64);
    }
    if size != expected.size || hasher.digest128() != expected.sum {
        return Err(std::io::Error::other(format!("wrong bytes ({size} of {})", expected.size)));
    }
    Ok(())
}

/// 1 MiB, aligned as direct I/O wants it.
struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    const SIZE: usize = 1 << 20;
    const ALIGNMENT: usize = 4096;

    fn new() -> Self {
        let memory = vec![0; Self::SIZE + Self::ALIGNMENT];
        let start = memory.as_ptr().align_offset(Self::ALIGNMENT);
        Self { memory, start }
    }

    fn slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + Self::SIZE]
    }
}
