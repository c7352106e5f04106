//! Many threads fill, read, drop, damage and pin the same chunks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::*;
use forebay_cache_store::{DatasetPolicy, Policy, Tuning, WriteError};
use forebay_protocol::BLOCK_SIZE;

#[test]
fn concurrent_use_gives_right_bytes_and_sums() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..12).map(|n| spec(&format!("f{n}"), 20 * BLOCK_SIZE + n * 1000, 0)).collect();
    let quota = 8 * 21 * BLOCK_SIZE;
    let tuning = Tuning { open_files: 4, supersede_grace: Duration::from_millis(20), ..QUICK };
    let store = open_with(options(dir.path(), 1 << 30), tuning);
    store
        .set_dataset(dataset(), DatasetPolicy { policy: Policy::Hold, quota: Some(quota), ..DatasetPolicy::default() });
    let expected: Vec<Vec<u8>> = files.iter().map(|file| contents(file, 0, 21)).collect();
    let (sent, refused, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (store, files, expected, sent, refused, stop) = (&store, &files, &expected, &sent, &refused, &stop);
            scope.spawn(move || {
                let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut next = move |below: u64| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random % below
                };
                let mut buffer = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let n = next(files.len() as u64) as usize;
                    let file = &files[n];
                    let part = |first: u32, count: u32| {
                        let start = u64::from(first) * BLOCK_SIZE;
                        let end = (start + u64::from(count) * BLOCK_SIZE).min(expected[n].len() as u64);
                        &expected[n][start as usize..end as usize]
                    };
                    let Some(chunk) = store.chunk(file, true) else {
                        refused.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    let first = next(u64::from(chunk.blocks())) as u32;
                    let count = (1 + next(4) as u32).min(chunk.blocks() - first);
                    match next(100) {
                        0 => drop(store.remove(file.key)),
                        1 => store.supersede(file.key.file),
                        2 => chunk.invalidate(first, 1),
                        3 => drop(store.pin(file.key, next(3) == 0)),
                        4..=45 => match chunk.write(first, part(first, count), &[]) {
                            Ok(()) | Err(WriteError::Refused(_) | WriteError::Gone) => {}
                            Err(error) => panic!("{error}"),
                        },
                        46..=55 => {
                            if chunk.read_verified(first, count, &mut buffer).is_ok() {
                                assert_eq!(buffer, part(first, count));
                            }
                        }
                        _ => {
                            if let Some(extent) = chunk.send(first, count) {
                                // Whatever happened since: these are the right bytes.
                                assert_eq!(receive(file, first, &extent).as_deref(), Some(part(first, count)));
                                sent.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                    assert!(store.usage(dataset()).used_bytes <= quota);
                }
            });
        }
        while started.elapsed() < Duration::from_secs(4) {
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(sent.load(Ordering::Relaxed) > 1000, "{sent:?} sent, {refused:?} refused");
    assert_eq!(store.totals().problem, None);
    // At rest the sums are those of the files.
    let exact = |store: &forebay_cache_store::ChunkStore| {
        let mut used = 0;
        for file in &files {
            let layout = layout(file);
            let chunk = store.chunk(file, false);
            let held = chunk.as_ref().map(|chunk| chunk.cached_bytes() + u64::from(layout.overhead()));
            used +=
                if store.is_pinned(file.key) { layout.len + u64::from(layout.overhead()) } else { held.unwrap_or(0) };
        }
        assert_eq!(store.usage(dataset()).used_bytes, used);
        used
    };
    std::thread::sleep(Duration::from_millis(100));
    let used = exact(&store);
    store.close();
    let store = open_with(options(dir.path(), 1 << 30), QUICK);
    assert_eq!(store.totals().used, used);
    exact(&store);
    for file in &files {
        let Some(chunk) = store.chunk(file, false) else { continue };
        for block in chunk.held(0, chunk.blocks()).iter() {
            let extent = chunk.send(block, 1).unwrap();
            assert_eq!(receive(file, block, &extent), Some(contents(file, block, 1)));
        }
    }
}

#[test]
fn one_chunk_filled_in_parallel_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = spec("shard", 200 * BLOCK_SIZE + 5, 0);
    let store = open(dir.path());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (store, file) = (&store, &file);
            scope.spawn(move || {
                let chunk = store.chunk(file, true).unwrap();
                // Overlapping ranges: each block is written by whoever comes first.
                for first in (thread * 7..201).step_by(11) {
                    let count = 16.min(201 - first);
                    chunk.write(first, &contents(file, first, count), &[]).unwrap();
                }
                for first in (0..201).step_by(16) {
                    chunk.write(first, &contents(file, first, 16.min(201 - first)), &[]).unwrap();
                }
            });
        }
    });
    assert!(read_all(&store, &file));
    store.close();
    let store = open(dir.path());
    assert!(read_all(&store, &file));
    assert_eq!(store.usage(dataset()).cached_bytes, 200 * BLOCK_SIZE + 5);
}
