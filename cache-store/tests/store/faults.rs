//! One test per thing that happens to cache directories.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use crate::support::*;
use forebay_cache_store::{
    ChunkStore, DatasetPolicy, OpenError, PinError, Policy, ReadError, Refusal, StoreOptions, Tuning, WriteError,
};
use forebay_protocol::{BLOCK_SIZE, CHUNK_SIZE, ChunkKey, DatasetId, FileIdentity};

#[test]
fn what_is_written_comes_back_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let files = [spec("a", 1, 0), spec("b", 200_000, 0), spec("c", CHUNK_SIZE + 5, 0), spec("c", CHUNK_SIZE + 5, 1)];
    let store = open(dir.path());
    let chunk = store.chunk(&files[2], true).unwrap();
    write(&chunk, &files[2], 1000, 24);
    write(&chunk, &files[2], 3, 1);
    for file in [&files[0], &files[1], &files[3]] {
        fill(&store, file);
        assert!(read_all(&store, file));
    }
    assert_eq!((chunk.blocks(), chunk.size()), (1024, CHUNK_SIZE));
    assert_eq!(chunk.cached_bytes(), 25 * BLOCK_SIZE);
    let usage = store.usage(dataset());
    assert_eq!((usage.chunks, usage.cached_bytes), (4, 1 + 200_000 + 5 + 25 * BLOCK_SIZE));
    for clean in [true, false] {
        let store = if clean {
            store.close();
            open(dir.path())
        } else {
            drop(open(dir.path()));
            open(dir.path())
        };
        swept(&store);
        assert_eq!(DatasetPolicy::default().quota, None);
        let now = store.usage(dataset());
        assert_eq!((now.used_bytes, now.cached_bytes, now.chunks), (usage.used_bytes, usage.cached_bytes, 4));
        assert!([0, 1, 3].iter().all(|file| read_all(&store, &files[*file])));
        let chunk = store.chunk(&files[2], false).unwrap();
        assert_eq!(
            chunk.held(0, 1024).runs().map(|run| (run.first, run.count)).collect::<Vec<_>>(),
            [(3, 1), (1000, 24)]
        );
        assert!(chunk.send(3, 1).is_some() && chunk.send(2, 2).is_none() && chunk.send(1020, 5).is_none());
        store.close();
    }
}

#[test]
fn the_file_is_plain_bytes_then_a_trailer() {
    let dir = tempfile::tempdir().unwrap();
    let file = spec("photo", 100_000, 0);
    let store = open(dir.path());
    fill(&store, &file);
    let bytes = std::fs::read(file_of(dir.path(), &file)).unwrap();
    assert_eq!(bytes[..100_000], contents(&file, 0, 2));
    let trailer = forebay_cache_store::trailer::decode(&bytes[102_400..]).unwrap();
    assert!(trailer.valid.is_full());
    assert_eq!(trailer.header.chunk_key(), file.key);
    // Sparse: a block in the middle of a large chunk takes itself and the trailer.
    let large = spec("large", CHUNK_SIZE, 0);
    let chunk = store.chunk(&large, true).unwrap();
    write(&chunk, &large, 500, 1);
    use std::os::unix::fs::MetadataExt;
    let blocks = std::fs::metadata(file_of(dir.path(), &large)).unwrap().blocks();
    assert!(blocks * 512 <= 2 * BLOCK_SIZE, "{blocks}");
}

#[test]
fn a_flipped_bit_costs_its_block_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let file = spec("shard", 10 * BLOCK_SIZE, 0);
    let store = open(dir.path());
    fill(&store, &file);
    let before = store.usage(dataset()).used_bytes;
    store.close();
    flip(&file_of(dir.path(), &file), 4 * BLOCK_SIZE + 77);
    let store = open(dir.path());
    let chunk = store.chunk(&file, false).unwrap();
    // Loaded from a former process: the good blocks are verified and sent, the bad one is not.
    let early = chunk.send(0, 4).unwrap();
    assert!(chunk.send(4, 1).is_none());
    assert_eq!(chunk.held(0, 10).count(), 9);
    assert!(chunk.send(5, 5).is_some());
    assert_eq!(receive(&file, 0, &early), Some(contents(&file, 0, 4)));
    let usage = store.usage(dataset());
    assert_eq!((usage.used_bytes, usage.corrupt_blocks), (before - BLOCK_SIZE, 1));
    write(&chunk, &file, 4, 1);
    assert!(read_all(&store, &file));
    assert_eq!(store.usage(dataset()).used_bytes, before);

    // In the same process the client finds it, and says so.
    flip(&file_of(dir.path(), &file), 70);
    let extent = chunk.send(0, 2).unwrap();
    assert_eq!(receive(&file, 0, &extent), None);
    assert_eq!(chunk.read_verified(0, 2, &mut Vec::new()), Err(ReadError::Corrupt));
    assert_eq!(chunk.held(0, 10).missing(0, 10).map(|run| run.first).collect::<Vec<_>>(), [0]);
    // The old file was not written: whoever has it open sees what was there.
    assert_eq!(receive(&file, 0, &extent), None);
    let mut bytes = Vec::new();
    chunk.read_verified(1, 9, &mut bytes).unwrap();
    assert_eq!(bytes, contents(&file, 1, 9));
    // What is asked about is checked, and with it, when it is copied, what nobody asked about.
    for block in [3, 5, 8] {
        flip(&file_of(dir.path(), &file), block * BLOCK_SIZE + 9);
    }
    chunk.verify_again(0, 3);
    assert_eq!((chunk.held(0, 10).count(), store.usage(dataset()).corrupt_blocks), (9, 2));
    chunk.verify_again(4, 3);
    let missing: Vec<_> = chunk.held(0, 10).missing(0, 10).map(|run| run.first).collect();
    assert_eq!((missing, store.usage(dataset()).corrupt_blocks), (vec![0, 3, 5, 8], 5));
    [0, 3, 5, 8].iter().for_each(|block| write(&chunk, &file, *block, 1));
    assert!(read_all(&store, &file));
    assert_eq!(store.usage(dataset()).used_bytes, before);
}

#[test]
fn truncated_torn_and_foreign_files_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..8).map(|n| spec(&format!("f{n}"), 150_000, 0)).collect();
    let other = spec_in(DatasetId::local("default", "other"), "f0", 150_000, 0);
    let store = open(dir.path());
    store.set_dataset(other.dataset, DatasetPolicy::default());
    files.iter().chain([&other]).for_each(|file| fill(&store, file));
    store.close();
    let path = |n: usize| file_of(dir.path(), &files[n]);
    let resize = |n: usize, len| std::fs::OpenOptions::new().write(true).open(path(n)).unwrap().set_len(len).unwrap();
    resize(0, 0);
    resize(1, 70_000);
    resize(2, 500_000);
    std::fs::write(path(3), vec![0xff; 152_000]).unwrap();
    std::fs::copy(file_of(dir.path(), &other), path(4)).unwrap();
    std::fs::remove_file(path(5)).unwrap();
    std::fs::remove_file(path(6)).unwrap();
    std::os::unix::fs::symlink(path(7), path(6)).unwrap();
    let store = open(dir.path());
    for file in &files[..7] {
        assert!(!read_all(&store, file), "{}", file.path);
    }
    assert!(read_all(&store, &files[7]) && read_all(&store, &other));
    assert_eq!(store.usage(dataset()).chunks, 1);
    assert_eq!(store.totals().dropped_files, 6);
    for file in &files {
        fill(&store, file);
        assert!(read_all(&store, file));
    }
}

#[test]
fn a_removed_directory_is_made_again() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("cache");
    let file = spec("shard", 3 * BLOCK_SIZE, 0);
    let store = open(&dir);
    for what in [dir.clone(), dir.join("chunks"), dir.clone()] {
        fill(&store, &file);
        let chunk = store.chunk(&file, false).unwrap();
        let extent = chunk.send(0, 3).unwrap();
        // At once, or the store would make it again under the hands of who removes it.
        std::fs::rename(&what, temp.path().join("trash")).unwrap();
        std::fs::remove_dir_all(temp.path().join("trash")).unwrap();
        eventually("the store gives up what it held", || store.totals().chunks == 0);
        assert_eq!(receive(&file, 0, &extent), Some(contents(&file, 0, 3)));
        eventually("the directory is made again", || store.totals().problem.is_none());
        assert!(store.chunk(&file, false).is_none());
    }
    fill(&store, &file);
    swept(&store);
    store.close();
    let store = open(&dir);
    assert!(!store.totals().sweeping && read_all(&store, &file));
}

#[test]
fn a_directory_that_was_moved_away_and_back_is_taken_again() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, away) = (temp.path().join("cache"), temp.path().join("away"));
    let files: Vec<_> = (0..5).map(|n| spec(&format!("f{n}"), 3 * BLOCK_SIZE, 0)).collect();
    let store = open(&dir);
    files[..4].iter().for_each(|file| fill(&store, file));
    store.pin(files[1].key, true).unwrap();
    let brought = std::fs::read(file_of(&dir, &files[3])).unwrap();
    store.remove(files[3].key);
    let used = store.totals().used;
    std::fs::rename(&dir, &away).unwrap();
    std::fs::write(&dir, "in the way").unwrap();
    let problem = |text: &str| store.totals().problem.is_some_and(|problem| problem.contains(text));
    eventually("it cannot be made again", || problem("cannot be made again"));
    // It may come back: nothing is given up, and nothing is added.
    assert_eq!(store.totals().used, used);
    assert!(files[..3].iter().all(|file| read_all(&store, file)));
    assert!(store.chunk(&files[4], true).is_none());
    std::fs::write(file_of(&away, &files[3]), brought).unwrap();
    std::fs::remove_file(&dir).unwrap();
    std::fs::rename(&away, &dir).unwrap();
    eventually("it is used again", || store.totals().problem.is_none());
    swept(&store);
    assert!(files[..4].iter().all(|file| read_all(&store, file)), "what was brought meanwhile is found");
    assert!(store.is_pinned(files[1].key));
    fill(&store, &files[4]);
    store.close();
    let store = open(&dir);
    assert!(!store.totals().sweeping && files.iter().all(|file| read_all(&store, file)));
}

#[test]
fn a_cache_that_takes_the_place_of_another_is_swept() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, away) = (temp.path().join("cache"), temp.path().join("away"));
    let (a, b) = (spec("a", 3 * BLOCK_SIZE, 0), spec("b", 3 * BLOCK_SIZE, 0));
    let store = open(&dir);
    fill(&store, &a);
    std::fs::rename(&dir, &away).unwrap();
    eventually("it is made again", || store.totals().chunks == 0 && store.totals().problem.is_none());
    fill(&store, &b);
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, &dir, CWD, &away, RenameFlags::EXCHANGE).unwrap();
    eventually("the first one is found again", || read_all(&store, &a));
    swept(&store);
    assert!(store.chunk(&b, false).is_none());
    assert_eq!(store.totals().chunks, 1);
}

#[test]
fn a_deleted_file_is_noticed_by_the_next_write() {
    let dir = tempfile::tempdir().unwrap();
    let file = spec("shard", 3 * BLOCK_SIZE, 0);
    let store = open(dir.path());
    let chunk = store.chunk(&file, true).unwrap();
    write(&chunk, &file, 0, 1);
    std::fs::remove_file(file_of(dir.path(), &file)).unwrap();
    assert_eq!(chunk.write(1, &contents(&file, 1, 1), &[]), Err(WriteError::Gone));
    assert_eq!(store.totals().used, 0);
    fill(&store, &file);
    assert!(read_all(&store, &file));
}

#[test]
fn a_directory_has_one_owner_and_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let file = spec("a", 10, 0);
    let store = open(dir.path());
    fill(&store, &file);
    match ChunkStore::open(options(dir.path(), 1 << 30)) {
        Err(OpenError::InUse { path }) => assert_eq!(path, dir.path()),
        other => panic!("{:?}", other.err()),
    }
    store.close();
    let store = open_with(StoreOptions { owner: "demo/worker-1".into(), ..options(dir.path(), 1 << 30) }, QUICK);
    assert!(!read_all(&store, &file));
    assert_eq!(store.totals().used, 0);
    store.close();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(elsewhere.path().join("thesis.tex"), "text").unwrap();
    assert!(matches!(ChunkStore::open(options(elsewhere.path(), 1 << 30)), Err(OpenError::NotACache { .. })));
    for (owner, capacity, high, low) in
        [("", 1, 9, 9), ("a\nb", 1, 9, 9), ("a", 0, 9, 9), ("a", 1, 101, 9), ("a", 1, 9, 10)]
    {
        let options = StoreOptions {
            dir: elsewhere.path().join("new"),
            owner: owner.into(),
            capacity,
            high_percent: high,
            low_percent: low,
        };
        assert!(matches!(ChunkStore::open(options), Err(OpenError::Options(_))));
    }
}

#[test]
fn quota_and_watermark_end_admission() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(options(dir.path(), 1 << 20), QUICK);
    store.set_dataset(
        dataset(),
        DatasetPolicy { policy: Policy::Hold, quota: Some(500_000), ..DatasetPolicy::default() },
    );
    let (a, b, c) =
        (spec("a", 7 * BLOCK_SIZE, 0), spec("b", BLOCK_SIZE, 0), spec_in(DatasetId::local("x", "y"), "c", 1 << 20, 0));
    fill(&store, &a);
    assert!(store.chunk(&b, true).is_none());
    assert!(store.chunk(&c, true).is_none(), "a dataset that was not announced");
    store.set_dataset(c.dataset, DatasetPolicy::default());
    let chunk = store.chunk(&c, true).unwrap();
    write(&chunk, &c, 0, 7);
    match chunk.write(7, &contents(&c, 7, 2), &[]) {
        Err(WriteError::Refused(Refusal::Watermark { wanted, limit, .. })) => {
            assert_eq!((wanted, limit), (2 * BLOCK_SIZE, (1 << 20) * 95 / 100));
        }
        other => panic!("{other:?}"),
    }
    assert!(chunk.send(0, 7).is_some() && chunk.send(7, 1).is_none());
    assert!(store.usage(dataset()).bypassed == 1 && store.usage(c.dataset).bypassed == 2);
    // A write of the wrong shape is a defect, whatever is free.
    for (first, len) in [(0, 0), (0, 5), (16, 1), (15, 65_537), (0, 65_537)] {
        assert!(matches!(chunk.write(first, &vec![0; len], &[]), Err(WriteError::Shape(_))));
    }
    assert!(matches!(chunk.write(8, &vec![0; 65_536], &[1, 2]), Err(WriteError::Shape(_))));
    // A smaller quota is enforced, newest first; what is open stays readable.
    let held = store.chunk(&a, false).unwrap();
    let extent = held.send(0, 7).unwrap();
    let older = store.usage(dataset()).used_bytes;
    store.set_dataset(
        dataset(),
        DatasetPolicy { policy: Policy::Hold, quota: Some(older - 1), ..DatasetPolicy::default() },
    );
    eventually("the chunk above the quota goes", || store.usage(dataset()).chunks == 0);
    assert_eq!(receive(&a, 0, &extent), Some(contents(&a, 0, 7)));
    assert!(held.send(0, 7).is_some() && store.chunk(&a, false).is_none());
    assert_eq!(store.usage(dataset()).evicted_bytes, 7 * BLOCK_SIZE);
    assert_eq!(held.write(0, &contents(&a, 0, 1), &[]), Ok(()), "valid blocks are left alone");
}

#[test]
fn a_smaller_capacity_evicts_newest_first_down_to_the_low_watermark() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..10).map(|n| spec(&format!("f{n}"), BLOCK_SIZE, 0)).collect();
    let store = open(dir.path());
    files.iter().for_each(|file| fill(&store, file));
    store.pin(files[9].key, true).unwrap();
    let each = store.totals().used / 10;
    store.close();
    let store = open_with(options(dir.path(), 10 * each), QUICK);
    eventually("the evictor ends", || store.totals().used <= 8 * each);
    let left: Vec<_> = (0..10).filter(|n| read_all(&store, &files[*n])).collect();
    assert_eq!(left, [0, 1, 2, 3, 4, 5, 6, 9]);
}

#[test]
fn superseded_chunks_go_after_a_grace_or_under_pressure() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..3).map(|n| spec(&format!("f{n}"), BLOCK_SIZE, 0)).collect();
    let tuning = Tuning { supersede_grace: Duration::from_millis(300), ..QUICK };
    let store = open_with(options(dir.path(), 1 << 30), tuning);
    files.iter().for_each(|file| fill(&store, file));
    store.pin(files[1].key, true).unwrap();
    files[..2].iter().for_each(|file| store.supersede(file.key.file));
    assert!(read_all(&store, &files[0]));
    eventually("the grace ends", || store.chunk(&files[0], false).is_none());
    assert!(read_all(&store, &files[1]) && read_all(&store, &files[2]));
    store.pin(files[1].key, false).unwrap();
    eventually("what was pinned follows", || store.chunk(&files[1], false).is_none());
    store.close();

    let used = 2 * (BLOCK_SIZE + 4096);
    let store = open_with(options(dir.path(), used * 100 / 95 + 1), QUICK);
    fill(&store, &files[0]);
    store.supersede(files[2].key.file);
    store.close();
    // Also when marked by a former process.
    let store = open_with(options(dir.path(), used * 100 / 95 + 1), QUICK);
    assert!(read_all(&store, &files[2]));
    eventually("pressure makes room", || store.chunk(&files[1], true).is_some());
    assert!(store.chunk(&files[2], false).is_none() && read_all(&store, &files[0]));
}

#[test]
fn a_forgotten_dataset_goes_with_its_pins() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, other) = (spec("a", BLOCK_SIZE, 0), spec_in(DatasetId::local("x", "y"), "b", BLOCK_SIZE, 0));
    let store = open(dir.path());
    store.set_dataset(other.dataset, DatasetPolicy::default());
    fill(&store, &mine);
    fill(&store, &other);
    store.pin(other.key, true).unwrap();
    let chunk = store.chunk(&other, false).unwrap();
    store.forget_dataset(other.dataset);
    eventually("the dataset is gone", || store.usage(other.dataset).chunks == 0);
    assert!(store.chunk(&other, true).is_none() && chunk.send(0, 1).is_some());
    assert_eq!(store.datasets(), [mine.dataset]);
    assert!(read_all(&store, &mine));
    store.set_dataset(other.dataset, DatasetPolicy::default());
    fill(&store, &other);
    assert!(read_all(&store, &other));
}

#[test]
fn a_pin_is_a_guarantee() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..20).map(|n| spec(&format!("f{n}"), 4 * BLOCK_SIZE, 0)).collect();
    let capacity = 10 * (4 * BLOCK_SIZE + 4096);
    let store = open_with(options(dir.path(), capacity), QUICK);
    let fits = |n: usize| files[..n].iter().filter(|file| store.is_pinned(file.key)).count();
    assert_eq!(store.pin(files[0].key, true), Err(PinError::Absent));
    // Full of what is not pinned.
    let crowd = || {
        for (file, block) in files[10..].iter().flat_map(|file| (0..4).map(move |block| (file, block))) {
            if let Some(chunk) = store.chunk(file, true) {
                let _ = chunk.write(block, &contents(file, block, 1), &[]);
            }
        }
    };
    crowd();
    assert!(store.chunk(&files[0], true).is_none());
    // 8 of 10 fit below the low watermark; each makes its room, and keeps it before it is filled.
    for file in &files[..8] {
        let chunk = store.pinned_chunk(file).unwrap();
        assert!(chunk.held(0, 4).is_empty());
    }
    assert_eq!(fits(10), 8);
    let refused = store.reserve_pin(dataset(), 4 * BLOCK_SIZE).unwrap_err();
    assert_eq!((refused.wanted, refused.available, refused.limit), (4 * BLOCK_SIZE, 0, capacity * 80 / 100));
    assert!(store.reserve_pin(dataset(), 0).is_ok());
    assert!(matches!(store.pinned_chunk(&files[9]), Err(PinError::Refused(Refusal::Pin(_)))));
    crowd();
    // What can never be pinned costs nobody a byte.
    let (large, before) = (spec("large", CHUNK_SIZE, 0), store.usage(dataset()).cached_bytes);
    assert!(matches!(store.pinned_chunk(&large), Err(PinError::Refused(Refusal::Pin(_)))));
    assert!(before > 0 && store.usage(dataset()).cached_bytes == before);
    files[..8].iter().for_each(|file| fill(&store, file));
    assert!(store.remove(files[0].key).kept_pinned);
    assert_eq!(store.usage(dataset()).pinned_bytes, 8 * 4 * BLOCK_SIZE);
    // A crash, and then a crash in which the index is lost.
    drop(store);
    let store = open_with(options(dir.path(), capacity), QUICK);
    assert!(files[..8].iter().all(|file| store.is_pinned(file.key) && read_all(&store, file)));
    store.pin(files[7].key, false).unwrap();
    drop(store);
    std::fs::write(dir.path().join("index.redb"), "gone").unwrap();
    let store = open_with(options(dir.path(), capacity), QUICK);
    swept(&store);
    assert!(files[..7].iter().all(|file| store.is_pinned(file.key) && read_all(&store, file)));
    assert!(!store.is_pinned(files[7].key));
    // Its file is deleted: the place remains.
    std::fs::remove_file(file_of(dir.path(), &files[0])).unwrap();
    store.close();
    let store = open_with(options(dir.path(), capacity), QUICK);
    assert!(store.chunk(&files[0], false).is_none() && store.is_pinned(files[0].key));
    fill(&store, &files[0]);
    assert!(read_all(&store, &files[0]));
    assert_eq!(store.pin(ChunkKey { file: FileIdentity(1), index: 0 }, false), Ok(()));
}

#[test]
fn open_files_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..100).map(|n| spec(&format!("f{n}"), 10, 0)).collect();
    let store = open_with(options(dir.path(), 1 << 30), Tuning { open_files: 8, ..QUICK });
    for _ in 0..2 {
        files.iter().for_each(|file| fill(&store, file));
        assert!(files.iter().all(|file| read_all(&store, file)));
    }
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = descriptors.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let open = targets.filter(|target| target.starts_with(dir.path().join("chunks"))).count();
    assert!(open <= 8, "{open}");
    assert!(store.totals().open_files <= 8);
}

#[test]
fn what_does_not_name_itself_is_not_admitted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let good = spec("a", 10, 0);
    let mut bad = good.clone();
    bad.key.file = FileIdentity(7);
    assert!(store.chunk(&bad, true).is_none());
    assert!(store.chunk(&spec("a", 10, 1), true).is_none(), "beyond the end");
    assert!(store.chunk(&spec("a", 0, 0), true).is_none(), "an empty file has no chunks");
    fill(&store, &good);
    bad = spec("b", 10, 0);
    bad.key = good.key;
    assert!(store.chunk(&bad, false).is_none());
}

#[test]
fn a_closed_store_still_serves_those_who_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = spec("a", 2 * BLOCK_SIZE, 0);
    let store = open(dir.path());
    let chunk = store.chunk(&file, true).unwrap();
    write(&chunk, &file, 0, 1);
    store.close();
    assert_eq!(chunk.write(1, &contents(&file, 1, 1), &[]), Err(WriteError::Refused(Refusal::Closed)));
    let extent = chunk.send(0, 1).unwrap();
    let mut bytes = vec![0; extent.len as usize];
    extent.file.read_exact_at(&mut bytes, extent.offset).unwrap();
    assert_eq!(bytes, contents(&file, 0, 1));
    assert!(store.chunk(&file, true).is_none());
    let again: Arc<ChunkStore> = open(dir.path());
    assert!(again.chunk(&file, false).is_some());
}
