//! What the tests of the store share: files with known contents, and a store in a temporary directory.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_cache_store::trailer::{Header, Layout};
use forebay_cache_store::{Chunk, ChunkSpec, ChunkStore, DatasetPolicy, Extent, StoreOptions, Tuning};
use forebay_protocol::{BLOCK_SIZE, ChunkKey, DatasetId, DatasetPath, FileVersion, VersionKey, block_checksum};

/// Times that let a test see everything within a second.
pub(crate) const QUICK: Tuning = Tuning {
    commit_interval: Duration::from_millis(5),
    supersede_grace: Duration::from_secs(3600),
    retry_pause: Duration::from_millis(200),
    tick: Duration::from_millis(20),
    open_files: 64,
    watch_space: true,
    one_use: Duration::from_secs(10),
};

pub(crate) fn dataset() -> DatasetId {
    DatasetId::local("default", "images")
}

pub(crate) fn options(dir: &Path, capacity: u64) -> StoreOptions {
    StoreOptions { dir: dir.to_owned(), owner: "demo/worker-0".into(), capacity, high_percent: 95, low_percent: 80 }
}

pub(crate) fn open_with(options: StoreOptions, tuning: Tuning) -> Arc<ChunkStore> {
    let store = ChunkStore::open_tuned(options, tuning).unwrap();
    store.set_dataset(dataset(), DatasetPolicy::default());
    store
}

pub(crate) fn open(dir: &Path) -> Arc<ChunkStore> {
    open_with(options(dir, 1 << 40), QUICK)
}

/// A chunk of a file of `size` bytes that `name` names.
pub(crate) fn spec(name: &str, size: u64, index: u32) -> ChunkSpec {
    spec_in(dataset(), name, size, index)
}

pub(crate) fn spec_in(dataset: DatasetId, name: &str, size: u64, index: u32) -> ChunkSpec {
    let path = DatasetPath::parse(format!("/{name}").into_bytes()).unwrap();
    let version = FileVersion { size, mtime_ns: 0, key: VersionKey::new(b"\"e1\"".to_vec()).unwrap() };
    let key = ChunkKey { file: version.identity(dataset, &path), index };
    ChunkSpec { dataset, path, version, key }
}

pub(crate) fn layout(spec: &ChunkSpec) -> Layout {
    Layout::of(&Header {
        dataset: spec.dataset,
        path: spec.path.clone(),
        key: spec.version.key.clone(),
        size: spec.version.size,
        index: spec.key.index,
    })
    .unwrap()
}

/// The bytes of a chunk's blocks: a function of the chunk's name and the position, never read from anywhere.
pub(crate) fn contents(spec: &ChunkSpec, first: u32, count: u32) -> Vec<u8> {
    let layout = layout(spec);
    let seed = (spec.key.file.0 as u64) ^ u64::from(spec.key.index);
    let start = u64::from(first) * BLOCK_SIZE;
    let words = (start / 8..).map(|word| (word ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23));
    let len = layout.bytes_of(first, count) as usize;
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

pub(crate) fn write(chunk: &Chunk, spec: &ChunkSpec, first: u32, count: u32) {
    chunk.write(first, &contents(spec, first, count), &[]).unwrap();
}

/// Makes the whole chunk held.
pub(crate) fn fill(store: &ChunkStore, spec: &ChunkSpec) {
    let chunk = store.chunk(spec, true).unwrap();
    write(&chunk, spec, 0, chunk.blocks());
}

/// What a client gets from an extent: the bytes, if all of them are there and match their checksums.
pub(crate) fn receive(spec: &ChunkSpec, first: u32, extent: &Extent) -> Option<Vec<u8>> {
    let mut bytes = vec![0; extent.len as usize];
    extent.file.read_exact_at(&mut bytes, extent.offset).ok()?;
    let base = layout(spec).first_block + u64::from(first);
    let blocks = bytes.chunks(BLOCK_SIZE as usize);
    assert_eq!(blocks.len(), extent.checksums.len());
    let good = blocks.zip(&extent.checksums).zip(base..);
    good.into_iter().all(|((b, sum), block)| block_checksum(spec.key.file, block, b) == *sum).then_some(bytes)
}

/// Sends, receives and compares the whole chunk; whether it was held.
pub(crate) fn read_all(store: &ChunkStore, spec: &ChunkSpec) -> bool {
    let Some(chunk) = store.chunk(spec, false) else { return false };
    let Some(extent) = chunk.send(0, chunk.blocks()) else { return false };
    assert_eq!(receive(spec, 0, &extent), Some(contents(spec, 0, chunk.blocks())));
    true
}

/// Where a chunk's file is.
pub(crate) fn file_of(dir: &Path, spec: &ChunkSpec) -> PathBuf {
    let identity = spec.key.file.to_string();
    dir.join("chunks").join(&identity[..3]).join(format!("{identity}-{}", spec.key.index))
}

pub(crate) fn flip(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Waits for something that another thread does, at most 20 s.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn swept(store: &ChunkStore) {
    eventually("the sweep ends", || !store.totals().sweeping);
}
