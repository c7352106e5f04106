#![allow(clippy::unwrap_used)]

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::Path,
};

use futures::future::BoxFuture;
use rustix::fs::{CWD, Mode, mknodat};
use tempfile::TempDir;

use super::*;
use crate::{
    SourceSpec,
    conformance::{self, Abilities, Fixture, list_all, read},
    open,
};

fn store(root: &Path) -> Arc<dyn UnderStore> {
    store_with(root, &Limits { deadline: Duration::from_secs(20), ..Limits::default() })
}

fn store_with(root: &Path, limits: &Limits) -> Arc<dyn UnderStore> {
    let uri = url::Url::from_file_path(root).unwrap().to_string();
    open(&SourceSpec { uri, s3: None, credentials: None }, limits, Arc::default()).unwrap()
}

struct Directory {
    dir: TempDir,
    store: Arc<dyn UnderStore>,
}

impl Fixture for Directory {
    fn store(&self) -> Arc<dyn UnderStore> {
        self.store.clone()
    }

    fn put<'a>(&'a self, key: &'a [u8], bytes: Bytes) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let path = self.dir.path().join(OsStr::from_bytes(key));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            // As one must: never in place.
            let new = self.dir.path().join(format!(".new-{:?}", std::thread::current().id()));
            std::fs::write(&new, bytes).unwrap();
            std::fs::rename(&new, path).unwrap();
        })
    }

    fn delete<'a>(&'a self, key: &'a [u8]) -> BoxFuture<'a, ()> {
        Box::pin(async move { std::fs::remove_file(self.dir.path().join(OsStr::from_bytes(key))).unwrap() })
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            file_beside_directory: false,
            raw_names: true,
            control_characters: true,
            keys_that_are_no_paths: false,
            markers: false,
        }
    }
}

#[tokio::test]
async fn conforms() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    conformance::run(&Directory { dir, store }).await;
}

#[tokio::test]
async fn links_within_are_followed_and_others_hidden() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "no").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(path("real/sub")).unwrap();
    std::fs::write(path("real/f"), "yes").unwrap();
    std::fs::write(path("real/sub/g"), "deep").unwrap();
    symlink("real/f", path("relative")).unwrap();
    symlink(path("real/f"), path("absolute")).unwrap();
    symlink("real", path("dir")).unwrap();
    symlink("../real/sub", path("real/back")).unwrap();
    symlink("..", path("real/up")).unwrap();
    symlink(".", path("self")).unwrap();
    symlink("loop", path("loop")).unwrap();
    symlink("nowhere", path("dangling")).unwrap();
    symlink(outside.path().join("secret"), path("out")).unwrap();
    symlink(format!("../{}/secret", outside.path().file_name().unwrap().to_str().unwrap()), path("sneaky")).unwrap();
    symlink(outside.path(), path("outdir")).unwrap();
    mknodat(CWD, path("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();

    let store = store(dir.path());
    for limit in [1, 2, 100] {
        let (items, hidden) = list_all(&*store, b"", limit).await;
        let names: Vec<_> = items.iter().map(|item| String::from_utf8(item.sort_key()).unwrap()).collect();
        assert_eq!(names, ["absolute", "dir/", "real/", "relative"], "in pages of {limit}");
        assert_eq!(hidden, 8, "self, loop, dangling, out, sneaky, outdir, pipe, socket");
    }
    let (items, hidden) = list_all(&*store, b"dir", 10).await;
    let names: Vec<_> = items.iter().map(|item| String::from_utf8(item.sort_key()).unwrap()).collect();
    assert_eq!((names, hidden), (vec!["back/".to_owned(), "f".to_owned(), "sub/".to_owned()], 1), "up is hidden");
    for key in ["relative", "absolute", "dir/f", "real/f"] {
        let ItemKind::File { size, mtime_ns: _, version } = store.head(key.as_bytes()).await.unwrap().kind else {
            panic!("{key} is a file")
        };
        assert_eq!(read(&*store, key.as_bytes(), &version, size, 0..size).await.unwrap(), b"yes", "{key}");
    }
    let version = VersionKey::new("any").unwrap();
    for key in ["out", "sneaky", "outdir/secret", "../x", "pipe", "socket", "dangling", "loop", "real"] {
        assert!(matches!(store.head(key.as_bytes()).await, Err(StoreError::NotFound(_))), "{key}");
        let error = read(&*store, key.as_bytes(), &version, 2, 0..2).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound(_)), "{key}: {error}");
    }
    assert!(matches!(store.list(b"outdir", None, 9).await, Err(StoreError::NotFound(_))));
}

#[tokio::test]
async fn a_file_that_changes_under_a_stream_is_a_mismatch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let store = store(dir.path());
    for change in ["in place", "truncated", "replaced"] {
        std::fs::write(&path, vec![1; 4 << 20]).unwrap();
        let ItemKind::File { size, mtime_ns: _, version } = store.head(b"f").await.unwrap().kind else {
            panic!("a file")
        };
        let mut stream = store.get(b"f", &version, size, 0..size).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap().len(), 1 << 20);
        // Past the resolution of the file system's clock.
        std::thread::sleep(Duration::from_millis(20));
        match change {
            "in place" => {
                std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"x", 3 << 20).unwrap()
            }
            "truncated" => std::fs::File::options().write(true).open(&path).unwrap().set_len(5).unwrap(),
            _ => std::fs::remove_file(&path).unwrap(),
        }
        let next = stream.next().await.unwrap();
        assert!(matches!(next, Err(StoreError::VersionMismatch(_))), "{change}: {next:?}");
        assert!(stream.next().await.is_none());
    }
}

#[tokio::test]
async fn pages_of_a_large_directory_come_from_few_readings_and_see_changes() {
    let dir = tempfile::tempdir().unwrap();
    for at in 0..3_000 {
        std::fs::write(dir.path().join(format!("{at:05}")), "").unwrap();
    }
    let store = store(dir.path());
    let first = store.list(b"", None, 1_000).await.unwrap();
    std::fs::write(dir.path().join("01500x"), "").unwrap();
    std::fs::remove_file(dir.path().join("02000")).unwrap();
    let second = store.list(b"", first.next.as_deref(), 1_000).await.unwrap();
    let third = store.list(b"", second.next.as_deref(), 1_001).await.unwrap();
    let names: Vec<_> = [first, second, third].into_iter().flat_map(|page| page.items).map(|item| item.name).collect();
    assert_eq!(names.len(), 3_000);
    assert!(names.contains(&b"01500x".to_vec()) && !names.contains(&b"02000".to_vec()));
}

#[tokio::test]
async fn a_root_that_is_missing_is_not_found_until_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("later");
    let store = store(&root);
    assert!(matches!(store.list(b"", None, 9).await, Err(StoreError::NotFound(_))));
    std::fs::create_dir(&root).unwrap();
    assert_eq!(store.list(b"", None, 9).await.unwrap(), Page::default());
}

#[tokio::test]
async fn what_may_not_be_read_is_denied() {
    if rustix::process::geteuid().is_root() {
        // Root may read everything; the mapping is tested as such.
        assert!(matches!(of_errno(b"k", Errno::ACCESS).error, StoreError::PermissionDenied(_)));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "x").unwrap();
    std::fs::set_permissions(dir.path().join("f"), std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let store = store(dir.path());
    let ItemKind::File { size, mtime_ns: _, version } = store.head(b"f").await.unwrap().kind else { panic!("a file") };
    let error = read(&*store, b"f", &version, size, 0..1).await.unwrap_err();
    assert!(matches!(error, StoreError::PermissionDenied(_)), "{error}");
}
