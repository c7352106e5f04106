//! Reading files, as programs do it. Whatever is not as it must be is an error, which fails the row.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use forebay_test_store::content;
use rand::{RngExt as _, seq::SliceRandom as _};

use super::{
    Done,
    direct::{self, ALIGNMENT, Memory},
    timed,
};
use crate::data::{Large, Set};

/// Bytes of one read.
const BUFFER: usize = 1 << 20;
/// Stack of a thread that waits in one read.
const SMALL_STACK: usize = 64 << 10;

pub(super) fn touch(bytes: u64) -> anyhow::Result<(u64, u64)> {
    let mut map = memmap2::MmapMut::map_anon(bytes as usize)?;
    for page in map.chunks_mut(4096) {
        page[0] = 1;
    }
    Ok((bytes, 0))
}

/// A buffer whose pages are there, so that nobody is charged for them.
fn buffer(bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    for page in buffer.chunks_mut(4096) {
        page[0] = std::hint::black_box(1);
    }
    buffer
}

pub(super) fn sequential(file: &Large, verify: bool) -> anyhow::Result<Done> {
    let mut buffer = buffer(BUFFER);
    timed(|| {
        let mut open = File::open(&file.path).with_context(|| format!("opening {}", file.path.display()))?;
        let mut expected = Vec::new();
        let mut offset = 0;
        loop {
            let count = open.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            if verify {
                check(file.seed, offset, &buffer[..count], &mut expected)?;
            }
            offset += count as u64;
        }
        ensure!(offset == file.size, "{} has {offset} bytes, not {}", file.path.display(), file.size);
        Ok((offset, 1))
    })
}

fn check(seed: u64, offset: u64, read: &[u8], expected: &mut Vec<u8>) -> anyhow::Result<()> {
    expected.resize(read.len(), 0);
    content::fill(seed, offset, expected);
    ensure!(read == expected, "wrong bytes in the {} from {offset} on", read.len());
    Ok(())
}

pub(super) fn mmap(file: &Large) -> anyhow::Result<(u64, u64)> {
    let open = File::open(&file.path)?;
    ensure!(open.metadata()?.len() == file.size, "{} is not of {} bytes", file.path.display(), file.size);
    // SAFETY: nobody writes to the files of a data set while the benchmark reads them.
    let map = unsafe { memmap2::Mmap::map(&open)? };
    let (words, _) = map.as_chunks::<8>();
    let sum = words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word)));
    std::hint::black_box(sum);
    Ok((file.size, 1))
}

pub(super) fn random(file: &Large, block: u64, count: u64) -> anyhow::Result<Done> {
    let mut buffer = buffer(block as usize);
    let mut random = rand::rng();
    let places: Vec<u64> = (0..count).map(|_| random.random_range(0..file.size / block) * block).collect();
    let open = File::open(&file.path)?;
    timed(|| {
        for place in &places {
            open.read_exact_at(&mut buffer, *place)?;
        }
        Ok((count * block, 1))
    })
}

/// Reads files in random order; with `told`, the mount is told of so many of them ahead.
pub(super) fn files(
    root: &Path,
    set: &Set,
    mut order: Vec<u64>,
    threads: u64,
    verify: bool,
    told: Option<usize>,
) -> anyhow::Result<Done> {
    order.shuffle(&mut rand::rng());
    let paths: Vec<_> = order.iter().map(|file| (*file, root.join(set.path(*file)))).collect();
    let next = AtomicUsize::new(0);
    let bytes = AtomicU64::new(0);
    let read = || -> anyhow::Result<()> {
        let mut buffer = buffer(BUFFER);
        let mut expected = Vec::new();
        while let Some((file, path)) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut open = File::open(path).with_context(|| format!("opening {}", path.display()))?;
            let mut size = 0;
            loop {
                let count = open.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                if verify {
                    check(set.seed_of(*file), size, &buffer[..count], &mut expected)
                        .with_context(|| path.display().to_string())?;
                }
                size += count as u64;
            }
            ensure!(size == set.size(*file), "{} has {size} bytes, not {}", path.display(), set.size(*file));
            bytes.fetch_add(size, Ordering::Relaxed);
        }
        Ok(())
    };
    timed(|| {
        std::thread::scope(|scope| {
            let tell = |ahead| announce(root, set, &order, &next, ahead);
            let told = told.map(|ahead| scope.spawn(move || tell(ahead)));
            let readers = (0..threads).map(|_| scope.spawn(read)).chain(told);
            for reader in readers.collect::<Vec<_>>() {
                match reader.join() {
                    Ok(read) => read?,
                    Err(_) => bail!("a reader panicked"),
                }
            }
            Ok((bytes.load(Ordering::Relaxed), paths.len() as u64))
        })
    })
}

/// Tells the mount which files come, until all were told.
fn announce(root: &Path, set: &Set, order: &[u64], next: &AtomicUsize, ahead: usize) -> anyhow::Result<()> {
    let directory = File::open(root)?;
    let paths: Vec<String> = order.iter().map(|file| set.path(*file)).collect();
    let mut told = 0;
    while told < paths.len() {
        let until = (next.load(Ordering::Relaxed) + ahead).min(paths.len());
        if until >= (told + ahead / 2).min(paths.len()) {
            told += forebay_test_instance::hint(&directory, paths[told..until].iter().map(String::as_str))
                .context("telling the mount what comes")?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

pub(super) fn walk(root: &Path, set: &Set) -> anyhow::Result<(u64, u64)> {
    let (mut entries, mut bytes) = (0, 0);
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let attributes = entry.metadata()?;
            entries += 1;
            if attributes.is_dir() {
                directories.push(entry.path());
            } else {
                bytes += attributes.len();
            }
        }
    }
    ensure!(
        (entries, bytes) == (set.entries(), set.bytes()),
        "{entries} entries of {bytes} bytes, not {} of {}",
        set.entries(),
        set.bytes()
    );
    Ok((0, entries))
}

pub(super) fn at_once(root: &Path, set: &Set) -> anyhow::Result<(u64, u64)> {
    let start = Barrier::new(set.files as usize);
    let failed = AtomicBool::new(false);
    let first = Mutex::new(None);
    let read = |file: u64| -> anyhow::Result<()> {
        let open = direct::open(&root.join(set.path(file)));
        // Also those that failed: the others wait for all.
        start.wait();
        let mut memory = Memory::new(ALIGNMENT);
        let buffer = memory.aligned();
        open?.read_exact_at(buffer, 0)?;
        check(set.seed_of(file), 0, buffer, &mut Vec::new())
    };
    std::thread::scope(|scope| {
        for file in 0..set.files {
            let (read, failed, first) = (&read, &failed, &first);
            std::thread::Builder::new().stack_size(SMALL_STACK).spawn_scoped(scope, move || {
                if let Err(error) = read(file)
                    && !failed.swap(true, Ordering::Relaxed)
                {
                    *first.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                }
            })?;
        }
        anyhow::Ok(())
    })?;
    match first.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok((set.files * ALIGNMENT as u64, set.files)),
    }
}
