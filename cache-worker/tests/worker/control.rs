//! Load, pin, free, refresh, scans, invalidations.

use std::time::Duration;

use bytes::Bytes;
use forebay_cache_worker::{DatasetConfig, VolumeShape};
use forebay_client::{ClientError, Event};
use forebay_protocol::worker::{self, FreeRequest, LoadProgress, LoadRequest, PinRequest, ScanState, Selection};
use futures::StreamExt;
use tonic::{Code, Status};

use crate::harness::{BUCKET, Cluster, MIB, at, eventually, path, source};

async fn tree(cluster: &Cluster) -> (u64, u64) {
    let mut bytes = 0;
    for i in 0..30u64 {
        let size = 10_000 + i * 1_000;
        cluster.put(&format!("train/{}/{i}", i % 3), i, size).await;
        bytes += size;
    }
    cluster.put("train/empty", 0, 0).await;
    cluster.put_virtual("train/shard", 77, 130 * MIB);
    (32, bytes + 130 * MIB)
}

async fn load(cluster: &Cluster, worker: usize, at: &str) -> Result<LoadProgress, Status> {
    load_selected(cluster, worker, at, None).await
}

async fn load_selected(
    cluster: &Cluster,
    worker: usize,
    at: &str,
    selection: Option<Selection>,
) -> Result<LoadProgress, Status> {
    let mut control = cluster.client.control(&cluster.workers[worker].options.name).await.unwrap();
    let path = Bytes::copy_from_slice(at.as_bytes());
    let request = LoadRequest { dataset: cluster.id.to_bytes(), path, selection, ..LoadRequest::default() };
    let mut stream = control.load(request).await?.into_inner();
    let mut last = LoadProgress::default();
    let mut totals = None;
    while let Some(progress) = stream.message().await? {
        assert!(progress.done_bytes <= progress.total_bytes && progress.total_bytes >= last.total_bytes);
        if progress.listed {
            let now = (progress.total_files, progress.total_bytes);
            assert_eq!(*totals.get_or_insert(now), now, "totals changed after the listing");
        }
        last = progress;
    }
    assert!(last.finished && last.listed);
    Ok(last)
}

async fn pin(cluster: &Cluster, worker: usize, at: &str, remove: bool) -> Result<LoadProgress, Status> {
    let mut control = cluster.client.control(&cluster.workers[worker].options.name).await.unwrap();
    let request = PinRequest { dataset: cluster.id.to_bytes(), path: Bytes::copy_from_slice(at.as_bytes()), remove };
    let mut stream = control.pin(request).await?.into_inner();
    let mut last = LoadProgress::default();
    while let Some(progress) = stream.message().await? {
        last = progress;
    }
    Ok(last)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shape_of_mounts_is_told_as_it_is_now() {
    let cluster = Cluster::start(1).await;
    assert_eq!(cluster.status(0).await.volume_shape(), worker::VolumeShape::Auto);
    let sources = vec![at("/", source(&cluster.store, ""))];
    cluster.configure(&[DatasetConfig { shape: VolumeShape::Small, ..cluster.with_sources(sources) }]);
    eventually("the edited shape", || async { cluster.status(0).await.volume_shape() == worker::VolumeShape::Small })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loads_are_exact_and_free_is_complete() {
    let cluster = Cluster::start(3).await;
    let (files, bytes) = tree(&cluster).await;
    cluster.refresh("/").await;
    let mut sum = LoadProgress::default();
    for worker in 0..3 {
        let share = load(&cluster, worker, "/").await.unwrap();
        assert_eq!((share.done_files, share.done_bytes), (share.total_files, share.total_bytes));
        assert_eq!((share.failed_files, share.bypassed_bytes), (0, 0), "{:?}", share.failures);
        sum.total_files += share.total_files;
        sum.total_bytes += share.total_bytes;
    }
    assert_eq!((sum.total_files, sum.total_bytes), (files, bytes));
    assert_eq!(cluster.sum(|status| status.cached_bytes).await, bytes);
    let gets = cluster.store.counters().gets;
    cluster.check("/train/shard", 77, 130 * MIB).await;
    cluster.check("/train/1/4", 4, 14_000).await;
    assert_eq!(cluster.store.counters().gets, gets, "what was loaded is read from the cache");
    // Again: nothing to do. One file: its share only.
    for worker in 0..3 {
        load(&cluster, worker, "/train").await.unwrap();
    }
    assert_eq!(cluster.store.counters().gets, gets);
    let mut one = 0;
    for worker in 0..3 {
        one += load(&cluster, worker, "/train/1/4").await.unwrap().total_files;
    }
    assert_eq!(one, 1);

    let mut freed = 0;
    for worker in 0..3 {
        let mut control = cluster.client.control(&format!("w-{worker}")).await.unwrap();
        let request = FreeRequest { dataset: cluster.id.to_bytes(), path: Bytes::from_static(b"/train/shard") };
        freed += control.free(request).await.unwrap().into_inner().freed_bytes;
    }
    assert_eq!(freed, 130 * MIB);
    assert_eq!(cluster.sum(|status| status.cached_bytes).await, bytes - 130 * MIB);
    cluster.check("/train/shard", 77, 130 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_takes_what_is_selected_and_no_more() {
    let cluster = Cluster::start(2).await;
    tree(&cluster).await;
    cluster.put("train/1/größe: 7 .tmp", 7, 20_000).await;
    cluster.refresh("/").await;
    // Of the files 1, 4, ... 28 of directory 1 with 10,000 + 1,000 i bytes.
    let selection = Selection {
        include: vec!["train/1/*".into(), "train/empty".into()],
        exclude: vec!["**/*.tmp".into(), "train/1/28".into()],
        min_size: 14_000,
        max_size: Some(32_000),
        ..Selection::default()
    };
    let mut sum = LoadProgress::default();
    for worker in 0..2 {
        let share = load_selected(&cluster, worker, "/train", Some(selection.clone())).await.unwrap();
        sum.total_files += share.total_files;
        sum.done_files += share.done_files;
        sum.done_bytes += share.done_bytes;
    }
    let bytes: u64 = [4, 7, 10, 13, 16, 19, 22].map(|i| 10_000 + i * 1_000).iter().sum();
    assert_eq!((sum.total_files, sum.done_files, sum.done_bytes), (7, 7, bytes));
    assert_eq!(cluster.store.counters().gets, 7);
    assert_eq!(cluster.sum(|status| status.cached_bytes).await, bytes);

    let bad = Selection { include: vec!["train/[".into()], ..Selection::default() };
    let error = load_selected(&cluster, 0, "/", Some(bad)).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("'train/['"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused_clearly() {
    let cluster = Cluster::start(1).await;
    cluster.put("f", 1, 1).await;
    cluster.refresh("/").await;
    let code = |result: Result<LoadProgress, Status>| result.map(|_| ()).map_err(|status| status.code());
    assert_eq!(code(load(&cluster, 0, "/gone").await), Err(Code::NotFound));
    assert_eq!(code(load(&cluster, 0, "relative").await), Err(Code::InvalidArgument));
    let mut control = cluster.client.control("w-0").await.unwrap();
    let unknown = forebay_protocol::DatasetId::local("no", "such").to_bytes();
    let refused = control.free(FreeRequest { dataset: unknown, path: Bytes::from_static(b"/") }).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("does not serve"), "{refused}");
    let short = FreeRequest { dataset: Bytes::from_static(b"x"), path: Bytes::from_static(b"/") };
    assert_eq!(control.free(short).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_beyond_the_quota_fetches_nothing_in_vain() {
    let cluster = Cluster::start_with(1, |_| {}, |dataset| dataset.quota = Some(5 * MIB)).await;
    for i in 0..100 {
        cluster.put(&format!("f{i}"), i, MIB).await;
    }
    cluster.refresh("/").await;
    let loaded = load(&cluster, 0, "/").await.unwrap();
    assert_eq!((loaded.done_files, loaded.done_bytes, loaded.failed_files), (100, 100 * MIB, 0));
    assert!(loaded.bypassed_bytes >= 95 * MIB, "{loaded:?}");
    let fetched: u64 = (0..100).map(|i| cluster.store.bytes_of(&format!("f{i}"))).sum();
    // Those that were under way when it was full: 32 at once.
    assert!(fetched <= 45 * MIB, "{fetched}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pins_hold_or_are_refused() {
    let mut cluster = Cluster::start_with(1, |_| {}, |dataset| dataset.quota = Some(20 * MIB)).await;
    for i in 0..4 {
        cluster.put(&format!("a/{i}"), i, 2 * MIB).await;
    }
    cluster.put_virtual("big", 9, 40 * MIB);
    cluster.refresh("/").await;
    let refused = pin(&cluster, 0, "/big", false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&(40 * MIB).to_string()), "{refused}");
    assert_eq!(cluster.store.bytes_of("big"), 0, "nothing is loaded that cannot be pinned");

    let pinned = pin(&cluster, 0, "/a", false).await.unwrap();
    assert_eq!((pinned.done_files, pinned.failed_files), (4, 0), "{pinned:?}");
    assert_eq!(cluster.status(0).await.pinned_bytes, 8 * MIB);
    let free = |cluster: &Cluster| {
        let (client, id) = (cluster.client.clone(), cluster.id);
        async move {
            let mut control = client.control("w-0").await.unwrap();
            control
                .free(FreeRequest { dataset: id.to_bytes(), path: Bytes::from_static(b"/") })
                .await
                .unwrap()
                .into_inner()
        }
    };
    let kept = free(&cluster).await;
    assert_eq!((kept.freed_bytes, kept.pinned_bytes_kept), (0, 8 * MIB));

    cluster.workers[0].stop().await;
    cluster.restart(0).await;
    assert_eq!(cluster.status(0).await.pinned_bytes, 8 * MIB);
    let gets = cluster.store.counters().gets;
    for i in 0..4 {
        cluster.check(&format!("/a/{i}"), i, 2 * MIB).await;
    }
    assert_eq!(cluster.store.counters().gets, gets);
    let version = cluster.version("/a/1").await.unwrap();
    let inspected = cluster.names().inspect(&path("/a/1"), &version).await.unwrap();
    assert!(inspected.pinned && inspected.cached_bytes == 2 * MIB);

    pin(&cluster, 0, "/a", true).await.unwrap();
    assert_eq!(cluster.status(0).await.pinned_bytes, 0);
    assert_eq!(free(&cluster).await.freed_bytes, 8 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scans_count_exactly_and_refresh_sees_changes() {
    let cluster = Cluster::start(3).await;
    let (files, bytes) = tree(&cluster).await;
    // The root may have been listed, empty, before the files were there.
    let first = cluster.refresh("/").await;
    assert_eq!((first.state(), first.files, first.bytes), (ScanState::Complete, files, bytes), "{}", first.error);
    assert_eq!(first.directories, 5);
    for i in [2, 5] {
        cluster.check(&format!("/train/2/{i}"), i, 10_000 + i * 1_000).await;
    }
    let watch = cluster.names().watch();
    tokio::pin!(watch);
    let mut changed = Vec::new();
    // All streams are up before something changes.
    tokio::time::sleep(Duration::from_millis(500)).await;

    cluster.put("train/2/2", 99, 555).await;
    cluster.store.delete(BUCKET, "train/2/5").await;
    cluster.put("train/2/new", 98, 100).await;
    cluster.put("added/dir/x", 97, 10).await;
    for i in (0..30).filter(|i| i % 3 == 0) {
        cluster.store.delete(BUCKET, &format!("train/0/{i}")).await;
    }
    // Until a refresh, the old listing is answered.
    assert_eq!(cluster.version("/train/2/new").await, Err(ClientError::NotFound));
    let second = cluster.refresh("/").await;
    assert_eq!(second.state(), ScanState::Complete, "{}", second.error);
    assert_eq!(second.generation, first.generation + 1);
    assert_eq!(second.files, files - 10 + 1);
    assert_eq!(second.directories, 6, "/, train, 1, 2, added, dir");
    assert!(second.changed >= 5, "{}", second.changed);

    cluster.check("/train/2/2", 99, 555).await;
    cluster.check("/train/2/new", 98, 100).await;
    cluster.check("/added/dir/x", 97, 10).await;
    assert_eq!(cluster.version("/train/2/5").await, Err(ClientError::NotFound));
    assert_eq!(cluster.version("/train/0/0").await, Err(ClientError::NotFound));

    let wanted = |changed: &[(String, Vec<Bytes>)]| {
        let in_two: Vec<&Bytes> =
            changed.iter().filter(|(dir, _)| dir == "/train/2").flat_map(|(_, names)| names).collect();
        ["2", "5", "new"].iter().all(|name| in_two.iter().any(|other| other[..] == *name.as_bytes()))
    };
    let until = tokio::time::Instant::now() + Duration::from_secs(10);
    let mut reset = false;
    while !wanted(&changed) && !reset {
        match tokio::time::timeout_at(until, watch.next()).await.expect("no invalidations").unwrap() {
            Event::Changed { directory, names } => changed.push((directory.to_string(), names)),
            // The first connection is a reset; a later one would do as well.
            Event::Reset => reset = !changed.is_empty(),
        }
    }

    // Whoever coordinates knows the same, in its status.
    eventually("exact counts in a status", || async {
        let mut found = false;
        for worker in 0..3 {
            let scan = cluster.status(worker).await.scan;
            found |= scan.is_some_and(|scan| scan.state() == ScanState::Complete && scan.files == second.files);
        }
        found
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_begins_by_itself() {
    let cluster = Cluster::start(2).await;
    eventually("a complete scan", || async {
        cluster.sum(|status| u64::from(status.scan.as_ref().is_some_and(|s| s.state() == ScanState::Complete))).await
            == 1
    })
    .await;
}
