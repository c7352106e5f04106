//! The suite that every backend passes. A backend gives a [`Fixture`]; [`run`] panics at the first thing that is
//! wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bytes::Bytes;
use forebay_protocol::VersionKey;
use futures::{StreamExt, TryStreamExt, future::BoxFuture, stream};

use crate::{Item, ItemKind, Page, StoreError, UnderStore};

/// A backend with an empty source.
pub trait Fixture: Send + Sync {
    /// The store under test.
    fn store(&self) -> Arc<dyn UnderStore>;
    /// Puts an object, whatever was there before.
    fn put<'a>(&'a self, key: &'a [u8], bytes: Bytes) -> BoxFuture<'a, ()>;
    /// Deletes an object.
    fn delete<'a>(&'a self, key: &'a [u8]) -> BoxFuture<'a, ()>;
    /// What not every backend can do.
    fn abilities(&self) -> Abilities;
    /// A store for the same source that is not allowed to read it, when there can be one.
    fn denied(&self) -> Option<Arc<dyn UnderStore>> {
        None
    }
}

/// What a backend can hold.
#[derive(Debug, Clone, Copy, Default)]
pub struct Abilities {
    /// `a` beside `a/b`.
    pub file_beside_directory: bool,
    /// Names that are not UTF-8.
    pub raw_names: bool,
    /// Names with control characters, such as newlines.
    pub control_characters: bool,
    /// Keys that are no paths: `a//b`, `a/../b`, names of over 255 bytes.
    pub keys_that_are_no_paths: bool,
    /// Keys with a slash at their end.
    pub markers: bool,
}

/// Runs the suite.
pub async fn run(fixture: &dyn Fixture) {
    order_and_resume(fixture).await;
    odd_names(fixture).await;
    hidden_keys(fixture).await;
    file_beside_directory(fixture).await;
    markers(fixture).await;
    empty_file(fixture).await;
    ranges(fixture).await;
    overwritten(fixture).await;
    missing_and_deleted(fixture).await;
    denied(fixture).await;
    many_entries(fixture).await;
}

/// Reads a range to its end.
pub async fn read(
    store: &dyn UnderStore,
    key: &[u8],
    version: &VersionKey,
    size: u64,
    range: Range<u64>,
) -> Result<Vec<u8>, StoreError> {
    let stream = store.get(key, version, size, range).await?;
    stream
        .try_fold(Vec::new(), |mut all, bytes| async move {
            all.extend_from_slice(&bytes);
            Ok(all)
        })
        .await
}

/// Lists a directory in pages of `limit`.
pub async fn list_all(store: &dyn UnderStore, directory: &[u8], limit: usize) -> (Vec<Item>, u64) {
    list_from(store, directory, None, limit).await
}

async fn list_from(store: &dyn UnderStore, directory: &[u8], after: Option<&[u8]>, limit: usize) -> (Vec<Item>, u64) {
    let (mut items, mut hidden, mut after) = (Vec::new(), 0, after.map(<[u8]>::to_vec));
    loop {
        let page = store.list(directory, after.as_deref(), limit).await.expect("a page");
        assert!(page.items.len() <= limit, "a page of {} for a limit of {limit}", page.items.len());
        items.extend(page.items);
        hidden += page.hidden;
        match page.next {
            Some(next) => {
                assert!(after.as_ref().is_none_or(|after| *after < next), "paging stands still at {next:?}");
                after = Some(next);
            }
            None => return (items, hidden),
        }
    }
}

fn sort_keys(items: &[Item]) -> Vec<Vec<u8>> {
    items.iter().map(Item::sort_key).collect()
}

async fn put_all(fixture: &dyn Fixture, keys: impl IntoIterator<Item = Vec<u8>>) {
    stream::iter(keys)
        .for_each_concurrent(16, |key| async move { fixture.put(&key, Bytes::from(key.clone())).await })
        .await;
}

async fn file(store: &dyn UnderStore, key: &[u8]) -> (u64, VersionKey) {
    match store.head(key).await.expect("a file").kind {
        ItemKind::File { size, mtime_ns: _, version } => (size, version),
        ItemKind::Directory => panic!("head gives files"),
    }
}

/// What a listing of `directory` must give, by definition.
fn expected(keys: &[Vec<u8>], directory: &[u8]) -> Vec<Vec<u8>> {
    let mut entries = BTreeMap::new();
    for key in keys {
        let rest = key.strip_prefix(directory).and_then(|rest| rest.strip_prefix(b"/"));
        if let Some(rest) = rest {
            let end = rest.iter().position(|byte| *byte == b'/').map_or(rest.len(), |slash| slash + 1);
            entries.insert(rest[..end].to_vec(), ());
        }
    }
    entries.into_keys().collect()
}

async fn order_and_resume(fixture: &dyn Fixture) {
    let store = fixture.store();
    // Around the slash: '-' and '.' come before it, '0' follows it at once. U+10FFFF is the last character there is.
    let names = [
        "a",
        "d!",
        "d-x",
        "d.",
        "d/",
        "d/zzz",
        "d/\u{10FFFF}",
        "d/\u{10FFFF}x",
        "d/\u{10FFFF}\u{10FFFF}\u{10FFFF}",
        "d0",
        "d\u{10FFFF}",
        "e/deep/x",
        "e/deep/y",
        "e0/x",
        "f",
        "z-/x",
        "z/x",
        "z0/x",
        "é",
        "日本",
    ];
    let keys: Vec<Vec<u8>> =
        names.iter().filter(|name| !name.ends_with('/')).map(|name| format!("order/{name}").into_bytes()).collect();
    put_all(fixture, keys.clone()).await;
    for directory in ["order", "order/d", "order/e", "order/e/deep"] {
        let all = expected(&keys, directory.as_bytes());
        for limit in 1..=all.len() + 1 {
            let (items, hidden) = list_all(&*store, directory.as_bytes(), limit).await;
            assert_eq!(sort_keys(&items), all, "{directory} in pages of {limit}");
            assert_eq!(hidden, 0, "{directory}");
        }
        // From every entry, and from places between entries.
        let before = |key: &Vec<u8>| key[..key.len() - 1].to_vec();
        let places = all.iter().flat_map(|key| [key.clone(), before(key), [key, b"!".as_slice()].concat()]);
        for after in places.filter(|after| std::str::from_utf8(after).is_ok() || fixture.abilities().raw_names) {
            let rest: Vec<_> = all.iter().filter(|key| **key > after).cloned().collect();
            for limit in [1, 3, 100] {
                let (items, _) = list_from(&*store, directory.as_bytes(), Some(&after), limit).await;
                assert_eq!(sort_keys(&items), rest, "{directory} after {after:?} in pages of {limit}");
            }
        }
    }
    // Bytes that no name has are places as well.
    let (items, _) = list_from(&*store, b"order", Some(b"d\xff"), 2).await;
    let rest: Vec<_> =
        expected(&keys, b"order").into_iter().filter(|key| key.as_slice() > b"d\xff".as_slice()).collect();
    assert_eq!(sort_keys(&items), rest, "after bytes that are not UTF-8");
    let (top, _) = list_all(&*store, b"", 10).await;
    assert!(sort_keys(&top).contains(&b"order/".to_vec()), "the top is a directory");
}

async fn odd_names(fixture: &dyn Fixture) {
    let store = fixture.store();
    let Abilities { raw_names, control_characters, .. } = fixture.abilities();
    let mut names: Vec<Vec<u8>> = [
        "with space",
        " leading",
        "trailing ",
        "a+b",
        "a%2Bb",
        "100%",
        "%",
        "a&b",
        "a=b?c#d",
        "<a>\"'",
        "back\\slash",
        "~!*()",
        "ümlaut",
        "日本語",
        "\u{1F600}",
        "...",
        ".hidden",
        "a;b,c:d@e$f",
        "[x]{y}|^`",
        "e\u{301}",
    ]
    .iter()
    .map(|name| name.as_bytes().to_vec())
    .collect();
    names.push("x".repeat(255).into_bytes());
    if control_characters {
        names.extend([b"new\nline".to_vec(), b"tab\t\r".to_vec(), b"\x01\x7f".to_vec()]);
    }
    if raw_names {
        names.extend([b"\xff\xfe".to_vec(), b"a\xc3".to_vec()]);
    }
    let keys: Vec<Vec<u8>> = names.iter().map(|name| [b"odd/", name.as_slice()].concat()).collect();
    put_all(fixture, keys.clone()).await;
    let (items, hidden) = list_all(&*store, b"odd", 7).await;
    assert_eq!((sort_keys(&items), hidden), (expected(&keys, b"odd"), 0));
    for item in &items {
        let key = [b"odd/", item.name.as_slice()].concat();
        assert_eq!(store.head(&key).await.as_ref().ok(), Some(item), "HEAD and listing agree");
        let (size, version) = file(&*store, &key).await;
        assert_eq!(read(&*store, &key, &version, size, 0..size).await.expect("bytes"), key);
    }
    // The same names as directories.
    let inner: Vec<Vec<u8>> = names.iter().map(|name| [b"odddirs/", name.as_slice(), b"/f"].concat()).collect();
    put_all(fixture, inner.clone()).await;
    let (items, _) = list_all(&*store, b"odddirs", 7).await;
    assert_eq!(sort_keys(&items), expected(&inner, b"odddirs"));
    for item in &items {
        let (files, _) = list_all(&*store, &[b"odddirs/", item.name.as_slice()].concat(), 7).await;
        assert_eq!(sort_keys(&files), [b"f".to_vec()], "{:?}", item.name);
    }
}

async fn hidden_keys(fixture: &dyn Fixture) {
    if !fixture.abilities().keys_that_are_no_paths {
        return;
    }
    let store = fixture.store();
    let long = "y".repeat(256);
    let (long_file, long_directory) = (format!("hide/{long}"), format!("hide/{long}/x"));
    let hidden = ["hide//x", "hide//y", "hide/./x", "hide/../x", "hide/..", "hide/nul\0", &long_file, &long_directory];
    let shown = ["hide/a", "hide/b/c", "hide/z"].map(|key| key.as_bytes().to_vec());
    put_all(fixture, hidden.iter().map(|key| key.as_bytes().to_vec()).chain(shown.clone())).await;
    for limit in 1..10 {
        let (items, count) = list_all(&*store, b"hide", limit).await;
        // The two below `hide//` are one entry, as any directory's are.
        assert_eq!(sort_keys(&items), expected(&shown, b"hide"), "in pages of {limit}");
        assert_eq!(count, 7, "in pages of {limit}");
    }
    for key in ["hide//x", "hide/", "/hide", "hide/../x", ""] {
        assert!(matches!(store.head(key.as_bytes()).await, Err(StoreError::NotFound(_))), "{key}");
    }
}

async fn file_beside_directory(fixture: &dyn Fixture) {
    if !fixture.abilities().file_beside_directory {
        return;
    }
    let store = fixture.store();
    let keys = ["both/n", "both/n-", "both/n/x", "both/n0"].map(|key| key.as_bytes().to_vec());
    put_all(fixture, keys.clone()).await;
    for limit in 1..6 {
        let (items, _) = list_all(&*store, b"both", limit).await;
        assert_eq!(sort_keys(&items), [b"n".to_vec(), b"n-".to_vec(), b"n/".to_vec(), b"n0".to_vec()]);
    }
    let (size, version) = file(&*store, b"both/n").await;
    assert_eq!(read(&*store, b"both/n", &version, size, 0..size).await.unwrap(), b"both/n");
}

async fn markers(fixture: &dyn Fixture) {
    if !fixture.abilities().markers {
        return;
    }
    let store = fixture.store();
    fixture.put(b"marked/", Bytes::new()).await;
    fixture.put(b"marked/empty/", Bytes::new()).await;
    fixture.put(b"marked/f", Bytes::from_static(b"f")).await;
    for limit in 1..4 {
        let (items, hidden) = list_all(&*store, b"marked", limit).await;
        assert_eq!((sort_keys(&items), hidden), (vec![b"empty/".to_vec(), b"f".to_vec()], 0));
        assert_eq!(list_all(&*store, b"marked/empty", limit).await, (vec![], 0));
    }
}

async fn empty_file(fixture: &dyn Fixture) {
    let store = fixture.store();
    fixture.put(b"empty/f", Bytes::new()).await;
    let (size, version) = file(&*store, b"empty/f").await;
    assert_eq!(size, 0);
    assert_eq!(read(&*store, b"empty/f", &version, 0, 0..0).await.unwrap(), b"");
    fixture.put(b"empty/f", Bytes::from_static(b"not any more")).await;
    let error = read(&*store, b"empty/f", &version, 0, 0..0).await.unwrap_err();
    assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}");
}

async fn ranges(fixture: &dyn Fixture) {
    let store = fixture.store();
    let bytes: Vec<u8> = (0..3_000_001_u64).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    let size = bytes.len() as u64;
    fixture.put(b"ranges/f", Bytes::from(bytes.clone())).await;
    let (listed_size, version) = file(&*store, b"ranges/f").await;
    assert_eq!(listed_size, size);
    let before = store.requests();
    let ranges = [0..size, 0..1, size - 1..size, 1..2, 65_535..65_537, 1_000_000..2_000_000];
    for range in &ranges {
        let wanted = &bytes[range.start as usize..range.end as usize];
        assert!(read(&*store, b"ranges/f", &version, size, range.clone()).await.unwrap() == wanted, "{range:?}");
    }
    let received = store.requests().bytes - before.bytes;
    assert_eq!(received, ranges.iter().map(|range| range.end - range.start).sum::<u64>(), "no more is read than asked");
    // Nothing to read, but the version is looked up, and that answer may have a body.
    for range in [size..size, 7..7] {
        assert!(read(&*store, b"ranges/f", &version, size, range.clone()).await.unwrap().is_empty(), "{range:?}");
    }
    #[allow(clippy::reversed_empty_ranges)]
    for range in [0..size + 1, size + 1..size + 2, 3..2] {
        let error = read(&*store, b"ranges/f", &version, size, range).await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid(_)), "{error}");
    }
    // A stream that is dropped gives back what it held.
    for _ in 0..200 {
        drop(store.get(b"ranges/f", &version, size, 0..size).await.unwrap());
    }
    // Right version, wrong size: that version never existed.
    let error = read(&*store, b"ranges/f", &version, size + 5, 0..10).await.unwrap_err();
    assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}");
}

async fn overwritten(fixture: &dyn Fixture) {
    let store = fixture.store();
    fixture.put(b"over/f", Bytes::from_static(b"first")).await;
    let (size, old) = file(&*store, b"over/f").await;
    assert_eq!(read(&*store, b"over/f", &old, size, 0..5).await.unwrap(), b"first");
    fixture.put(b"over/f", Bytes::from_static(b"other")).await;
    let error = read(&*store, b"over/f", &old, size, 0..5).await.unwrap_err();
    assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}");
    let (size, new) = file(&*store, b"over/f").await;
    assert_ne!(new, old);
    assert_eq!(read(&*store, b"over/f", &new, size, 0..5).await.unwrap(), b"other");
    fixture.put(b"over/f", Bytes::from_static(b"x")).await;
    let error = read(&*store, b"over/f", &new, size, 3..5).await.unwrap_err();
    assert!(matches!(error, StoreError::VersionMismatch(_)), "a shorter object: {error}");
}

async fn missing_and_deleted(fixture: &dyn Fixture) {
    let store = fixture.store();
    fixture.put(b"gone/d/f", Bytes::from_static(b"f")).await;
    fixture.put(b"gone/g", Bytes::from_static(b"g")).await;
    let (size, version) = file(&*store, b"gone/d/f").await;
    for key in [b"gone/d".as_slice(), b"gone/x", b"gone/d/f/x", b"nowhere/x"] {
        let error = store.head(key).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound(_)), "{key:?}: {error}");
        let error = read(&*store, key, &version, size, 0..1).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound(_)), "{key:?}: {error}");
    }
    match store.list(b"nowhere", None, 10).await {
        Ok(page) => assert_eq!(page, Page::default()),
        Err(error) => assert!(matches!(error, StoreError::NotFound(_)), "{error}"),
    }
    fixture.delete(b"gone/d/f").await;
    let error = read(&*store, b"gone/d/f", &version, size, 0..1).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error}");
    assert_eq!(store.problem().map(|problem| problem.to_string()), None, "the source is there");
    store.check().await.unwrap();
    fixture.delete(b"gone/g").await;
    let (items, _) = list_all(&*store, b"gone", 10).await;
    assert!(!sort_keys(&items).contains(&b"g".to_vec()), "a deleted object is not listed");
}

async fn denied(fixture: &dyn Fixture) {
    let Some(denied) = fixture.denied() else { return };
    fixture.put(b"denied/f", Bytes::from_static(b"f")).await;
    let (size, version) = file(&*fixture.store(), b"denied/f").await;
    let errors = [
        denied.head(b"denied/f").await.unwrap_err(),
        denied.list(b"denied", None, 10).await.unwrap_err(),
        read(&*denied, b"denied/f", &version, size, 0..1).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::PermissionDenied(_)), "{error}");
    }
    assert!(denied.requests().errors <= 3, "a refusal is not asked again");
    assert!(matches!(denied.check().await, Err(StoreError::PermissionDenied(_))));
    assert!(matches!(denied.problem(), Some(StoreError::PermissionDenied(_))));
}

async fn many_entries(fixture: &dyn Fixture) {
    let store = fixture.store();
    let keys: Vec<Vec<u8>> = (0..5_000).map(|at| format!("many/{at:05}").into_bytes()).collect();
    put_all(fixture, keys.clone()).await;
    for limit in [777, 1_000, 5_000, 20_000] {
        let (items, hidden) = list_all(&*store, b"many", limit).await;
        assert!(sort_keys(&items) == expected(&keys, b"many"), "in pages of {limit}: {} entries", items.len());
        assert_eq!(hidden, 0);
    }
}
