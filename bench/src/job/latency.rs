//! How long single operations take.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rand::RngExt as _;

use super::{
    Latencies,
    direct::{self, ALIGNMENT, Memory},
};
use crate::data::Set;

/// Seconds that each operation took, and the bytes they gave.
#[derive(Default)]
struct Taken {
    seconds: Vec<f64>,
    bytes: u64,
}

/// Bytes and files that were read, and the percentiles.
pub(super) fn measure(
    root: &Path,
    set: &Set,
    readers: u64,
    lasting: Duration,
) -> anyhow::Result<(u64, u64, Latencies)> {
    let end = Instant::now() + lasting;
    let repeat = |operation: &(dyn Fn(&mut Memory) -> anyhow::Result<u64> + Sync)| -> anyhow::Result<Taken> {
        let mut taken = Taken::default();
        let mut memory = Memory::new(set.largest as usize);
        while Instant::now() < end {
            let begin = Instant::now();
            taken.bytes += operation(&mut memory)?;
            taken.seconds.push(begin.elapsed().as_secs_f64());
        }
        Ok(taken)
    };
    let read = |memory: &mut Memory| {
        let file = rand::rng().random_range(0..set.files);
        let path = root.join(set.path(file));
        let count = read_whole(&path, memory.aligned()).with_context(|| path.display().to_string())?;
        ensure!(count == set.size(file), "{} has {count} bytes, not {}", path.display(), set.size(file));
        Ok(count)
    };
    let list = |_: &mut Memory| {
        let directory = rand::rng().random_range(0..set.directories);
        let path = root.join(set.path(directory));
        let names = std::fs::read_dir(path.parent().context("a directory")?)?.count() as u64;
        let wanted = (set.files - directory).div_ceil(set.directories);
        ensure!(names == wanted, "{names} of {wanted} names beside {}", path.display());
        Ok(0)
    };
    let (mut reads, lists) = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..readers).map(|_| scope.spawn(|| repeat(&read))).collect();
        let lists = repeat(&list)?;
        let mut reads = Taken::default();
        for reader in readers {
            let Ok(taken) = reader.join() else { bail!("a reader panicked") };
            let taken = taken?;
            reads.seconds.extend(taken.seconds);
            reads.bytes += taken.bytes;
        }
        Ok((reads, lists))
    })?;
    let files = reads.seconds.len() as u64;
    let latencies = Latencies { reads: p99(&mut reads.seconds)?, lists: p99(&mut { lists.seconds })? };
    Ok((reads.bytes, files, latencies))
}

/// Reads a file that is no longer than `buffer`.
fn read_whole(path: &Path, buffer: &mut [u8]) -> anyhow::Result<u64> {
    let file = direct::open(path)?;
    let mut count = 0;
    loop {
        match file.read_at(&mut buffer[count..], count as u64)? {
            0 => return Ok(count as u64),
            more => count += more,
        }
        // The end is not aligned, and no place to read from.
        if !count.is_multiple_of(ALIGNMENT) || count == buffer.len() {
            return Ok(count as u64);
        }
    }
}

fn p99(seconds: &mut [f64]) -> anyhow::Result<f64> {
    ensure!(seconds.len() >= 100, "{} operations are too few for a percentile", seconds.len());
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() * 99 / 100])
}

/// Reads the beginning of all files at the same time. How many gave it.
pub(super) fn wait(files: &[PathBuf]) -> u64 {
    std::thread::scope(|scope| {
        let readers: Vec<_> = files
            .iter()
            .map(|path| scope.spawn(move || File::open(path).and_then(|file| file.read_at(&mut [0; 4096], 0)).is_ok()))
            .collect();
        readers.into_iter().filter_map(|reader| reader.join().ok()).filter(|read| *read).count() as u64
    })
}
