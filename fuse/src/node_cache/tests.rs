use std::{io::Read as _, os::unix::fs::FileExt as _, path::Path};

use bytes::Bytes;
use forebay_protocol::DatasetId;

use super::*;
use crate::memory::pattern;

/// Gives the pattern of a seed; fails when it is told to.
struct Source {
    seed: u64,
    fails: bool,
}

impl Reader for Source {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TreeError> {
        if self.fails && offset > 0 {
            return Err(TreeError::VersionGone);
        }
        let mut buffer = vec![0; len];
        pattern(self.seed, offset, &mut buffer);
        // In pieces that end nowhere in particular.
        Ok(buffer.chunks(300_001).map(Bytes::copy_from_slice).collect())
    }
}

const SIZE: u64 = (2 << 20) + 77;

fn key(dataset: &str, number: u128) -> Key {
    Key { dataset: DatasetId::local("default", dataset), file: FileIdentity(number), size: SIZE }
}

fn cache(dir: &Path, capacity: u64) -> NodeCache {
    NodeCache::new(NodeCacheOptions { dir: dir.to_owned(), capacity, free_percent: 0 })
}

async fn ended(cache: &NodeCache) {
    while !cache.inner.state.lock().busy.is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn want(cache: &NodeCache, key: Key) {
    cache.want(key, move || Arc::new(Source { seed: key.file.0 as u64, fails: false }));
    ended(cache).await;
}

async fn get(cache: &NodeCache, key: &Key) -> Option<File> {
    cache.get(*key, tokio::time::Instant::now() + Duration::from_secs(60)).await
}

async fn is_right(cache: &NodeCache, key: &Key) -> bool {
    let Some(mut file) = get(cache, key).await else { return false };
    let (mut found, mut expected) = (Vec::new(), vec![0; SIZE as usize]);
    file.read_to_end(&mut found).unwrap();
    pattern(key.file.0 as u64, 0, &mut expected);
    assert!(found == expected, "wrong bytes");
    true
}

fn stored(dir: &Path, key: &Key) -> PathBuf {
    dir.join(key.dataset.to_string()).join(key.file.to_string())
}

#[tokio::test]
async fn a_file_is_fetched_once_and_found_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let key = key("a", 5);
    let first = cache(dir.path(), 10 * SIZE);
    assert!(!is_right(&first, &key).await);
    want(&first, key).await;
    assert!(is_right(&first, &key).await);
    want(&first, key).await;
    assert_eq!((first.usage().fetched, first.usage().used), (1, SIZE));

    // What its predecessor was writing goes; what it completed is verified before it is given.
    let filling = dir.path().join("filling/left");
    std::fs::write(&filling, "x").unwrap();
    let second = cache(dir.path(), 10 * SIZE);
    assert!(get(&second, &key).await.is_none());
    second.mounted(key.dataset);
    while !second.is_left(&key) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    want(&second, key).await;
    assert!(is_right(&second, &key).await && !second.is_left(&key));
    assert_eq!(second.usage().fetched, 0);
    want(&second, Key { file: FileIdentity(6), ..key }).await;
    assert!(!filling.exists());
    assert_eq!((second.usage().fetched, second.usage().used), (1, 2 * SIZE));
}

#[tokio::test]
async fn what_is_damaged_is_dropped_and_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let key = key("a", 5);
    want(&cache(dir.path(), 10 * SIZE), key).await;
    let path = stored(dir.path(), &key);
    let damage: [&dyn Fn(); 4] = [
        &|| {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, SIZE - 1).unwrap();
            file.write_all_at(&[byte[0] ^ 1], SIZE - 1).unwrap();
        },
        &|| std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(SIZE - 1).unwrap(),
        &|| std::fs::remove_file(path.with_extension("sums")).unwrap(),
        &|| std::fs::write(path.with_extension("sums"), [0; 7]).unwrap(),
    ];
    for damage in damage {
        damage();
        let next = cache(dir.path(), 10 * SIZE);
        want(&next, key).await;
        assert!(is_right(&next, &key).await);
        assert_eq!((next.usage().fetched, next.usage().corrupt), (1, 1));
    }
}

#[tokio::test]
async fn what_has_no_room_is_not_kept_and_mounted_datasets_stay() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 2 * SIZE);
    let (a, b) = (key("a", 1), key("b", 2));
    cache.mounted(a.dataset);
    for wanted in [a, b] {
        want(&cache, wanted).await;
    }
    assert!(is_right(&cache, &a).await && is_right(&cache, &b).await);
    // b belongs to no volume: it gives way. Then everything belongs to one.
    let more = |number| Key { file: FileIdentity(number), ..a };
    want(&cache, more(3)).await;
    want(&cache, more(4)).await;
    assert!(is_right(&cache, &a).await && is_right(&cache, &more(3)).await);
    assert!(get(&cache, &b).await.is_none() && get(&cache, &more(4)).await.is_none());
    assert_eq!((cache.usage().used, cache.usage().bypassed), (2 * SIZE, 1));
    // A descriptor that is out reads on.
    let file = get(&cache, &a).await.unwrap();
    cache.unmounted(a.dataset);
    want(&cache, Key { file: FileIdentity(5), ..b }).await;
    assert!(!stored(dir.path(), &a).exists());
    assert_eq!(file.metadata().unwrap().len(), SIZE);
}

#[tokio::test]
async fn a_fetch_that_fails_leaves_nothing_and_is_not_repeated_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 10 * SIZE);
    let key = key("a", 1);
    cache.want(key, || Arc::new(Source { seed: 1, fails: true }));
    ended(&cache).await;
    assert_eq!(cache.usage().used, 0);
    assert_eq!(std::fs::read_dir(dir.path().join("filling")).unwrap().count(), 0);
    want(&cache, key).await;
    assert!(get(&cache, &key).await.is_none(), "asked again at once");
    cache.inner.state.lock().failed.clear();
    want(&cache, key).await;
    assert!(is_right(&cache, &key).await);
}

const SMALL: u64 = 150_000;

fn small(number: u128) -> Key {
    Key { dataset: DatasetId::local("default", "small"), file: FileIdentity(number), size: SMALL }
}

fn contents(key: &Key) -> Vec<u8> {
    let mut bytes = vec![0; key.size as usize];
    pattern(key.file.0 as u64, 0, &mut bytes);
    bytes
}

/// A cache that serves the small dataset.
async fn with_packs(dir: &Path, capacity: u64) -> NodeCache {
    let cache = cache(dir, capacity);
    cache.mounted(small(0).dataset);
    while cache.inner.packs.read().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    cache
}

async fn keep(cache: &NodeCache, key: Key) {
    let bytes = Bytes::from(contents(&key));
    cache.offer(key, &[bytes.slice(..70_000), bytes.slice(70_000..)]);
    // All that was offered is written when nothing is on the way.
    while cache.inner.offered.available_permits() < OFFERED {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Every range that begins or ends at a block, or just before or after one.
async fn is_whole(cache: &NodeCache, key: Key) -> bool {
    let edges = [0, 1, 65_535, 65_536, 65_537, 131_072, 140_000, SMALL];
    for (from, to) in edges.iter().flat_map(|from| edges.iter().map(move |to| (*from, *to))).filter(|(a, b)| a < b) {
        let Some(bytes) = cache.read(key, from, (to - from) as usize).await else { return false };
        assert!(bytes == contents(&key)[from as usize..to as usize], "wrong bytes at {from}..{to}");
    }
    true
}

fn pack(dir: &Path, name: &str) -> PathBuf {
    dir.join(small(0).dataset.to_string()).join("packs").join(name)
}

#[tokio::test]
async fn small_files_are_found_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = with_packs(dir.path(), 1 << 30).await;
    for number in [1, 2, 1] {
        keep(&first, small(number)).await;
    }
    assert!(is_whole(&first, small(1)).await && is_whole(&first, small(2)).await);
    assert!(first.read(small(3), 0, 10).await.is_none());
    assert_eq!((first.usage().small, first.usage().used), (2, 2 * (SMALL + 3 * 4)));
    // A file of another dataset, or of one that nobody mounted, is not kept.
    keep(&first, key("b", 4)).await;
    assert_eq!(first.usage().small, 2);

    let second = with_packs(dir.path(), 1 << 30).await;
    assert!(is_whole(&second, small(1)).await && is_whole(&second, small(2)).await);
    keep(&second, small(3)).await;
    // It is no pack of a predecessor that is written.
    assert_eq!(std::fs::metadata(pack(dir.path(), "0000000001.pack")).unwrap().len(), 2 * (SMALL + 12));
    assert!(pack(dir.path(), "0000000002.pack").exists());
    assert_eq!((second.usage().small, second.usage().used), (3, 3 * (SMALL + 12)));
}

#[tokio::test]
async fn what_a_crash_left_of_packs_is_used_as_far_as_it_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let first = with_packs(dir.path(), 1 << 30).await;
    for number in 1..=4 {
        keep(&first, small(number)).await;
    }
    drop(first);
    let pack_file = pack(dir.path(), "0000000001.pack");
    let index = pack(dir.path(), "0000000001.index");
    // The last record is cut off, a byte of the first is wrong, the entry of the second is torn.
    let file = std::fs::OpenOptions::new().write(true).open(&pack_file).unwrap();
    file.set_len(4 * (SMALL + 12) - 1).unwrap();
    file.write_all_at(&[contents(&small(1))[0] ^ 1], 12).unwrap();
    let mut entries = std::fs::read(&index).unwrap();
    entries[40] ^= 1;
    entries.extend_from_slice(b"torn");
    std::fs::write(&index, entries).unwrap();

    let next = with_packs(dir.path(), 1 << 30).await;
    assert_eq!(next.usage().small, 2);
    assert!(!is_whole(&next, small(1)).await, "a wrong byte");
    assert!(is_whole(&next, small(3)).await);
    assert!(next.read(small(2), 0, 10).await.is_none() && next.read(small(4), 0, 10).await.is_none());
    assert_eq!((next.usage().small, next.usage().corrupt), (1, 1));
    // All come again.
    for number in [1, 2, 4] {
        keep(&next, small(number)).await;
        assert!(is_whole(&next, small(number)).await);
    }
    // Without its index a pack is nothing.
    std::fs::remove_file(&index).unwrap();
    let last = with_packs(dir.path(), 1 << 30).await;
    assert!(is_whole(&last, small(1)).await && last.read(small(3), 0, 10).await.is_none());
}

#[tokio::test]
async fn packs_give_way_when_nobody_has_their_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let cache = with_packs(dir.path(), SIZE).await;
    keep(&cache, small(1)).await;
    let large = key("a", 5);
    want(&cache, large).await;
    assert_eq!((cache.usage().bypassed, cache.usage().fetched), (1, 0));
    cache.unmounted(small(1).dataset);
    let other = Key { file: FileIdentity(6), ..large };
    want(&cache, other).await;
    assert!(get(&cache, &other).await.is_some());
    assert!(!pack(dir.path(), "0000000001.pack").exists() && !pack(dir.path(), "0000000001.index").exists());
    assert_eq!(cache.usage().used, SIZE);
}
