//! How loads are carried out: paced, pinned, verified.

use std::{os::unix::fs::FileExt as _, time::Duration};

use bytes::Bytes;
use forebay_protocol::worker::{LoadOrder, LoadProgress, LoadRequest, LoadTerms, Selection};
use tokio::time::Instant;

use crate::harness::{Cluster, eventually, files_below};

const FILES: u64 = 30;
const SIZE: u64 = 100_000;

async fn fill(cluster: &Cluster) {
    for file in 0..FILES {
        cluster.put(&format!("d/{file:02}"), file, SIZE).await;
    }
    cluster.refresh("/").await;
}

async fn begin(cluster: &Cluster, worker: usize, request: LoadRequest) -> tonic::Streaming<LoadProgress> {
    let mut control = cluster.client.control(&cluster.workers[worker].options.name).await.unwrap();
    let request = LoadRequest { dataset: cluster.id.to_bytes(), path: Bytes::from_static(b"/"), ..request };
    control.load(request).await.unwrap().into_inner()
}

async fn load(cluster: &Cluster, worker: usize, request: LoadRequest) -> LoadProgress {
    let mut stream = begin(cluster, worker, request).await;
    let mut last = LoadProgress::default();
    while let Some(progress) = stream.message().await.unwrap() {
        last = progress;
    }
    assert!(last.finished);
    last
}

fn with(terms: LoadTerms) -> LoadRequest {
    LoadRequest { terms: Some(terms), ..LoadRequest::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_together_keep_the_pace() {
    let cluster = Cluster::start(2).await;
    fill(&cluster).await;
    let pace = |worker| load(&cluster, worker, with(LoadTerms { requests_per_second: 10, ..LoadTerms::default() }));
    let begin = Instant::now();
    let (first, second) = tokio::join!(pace(0), pace(1));
    assert_eq!(first.done_files + second.done_files, FILES);
    // Each has five a second, and a burst of a tenth of that; one of them has half of the files or more.
    let least = Duration::from_secs_f64((FILES as f64 / 2.0 - 1.5) / 5.0);
    assert!(begin.elapsed() >= least, "{:?}", begin.elapsed());
    assert_eq!(cluster.store.counters().gets, FILES);
    // Bytes are counted as requests are; what is held is not.
    let slow = LoadTerms { bytes_per_second: 1, ..LoadTerms::default() };
    let (first, second) = tokio::join!(load(&cluster, 0, with(slow)), load(&cluster, 1, with(slow)));
    assert_eq!(first.done_bytes + second.done_bytes, FILES * SIZE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_do_not_wait_for_a_pace_and_nothing_waits_for_a_load_that_ended() {
    let cluster = Cluster::start(1).await;
    fill(&cluster).await;
    // A file every 100 s, of which one goes out at once.
    let slow = with(LoadTerms { bytes_per_second: SIZE / 100, ..LoadTerms::default() });
    let mut loading = begin(&cluster, 0, slow).await;
    eventually("the first file", || async { cluster.store.counters().gets >= 1 }).await;
    for file in [29, 7] {
        cluster.check(&format!("/d/{file:02}"), file, SIZE).await;
    }
    loop {
        let progress = loading.message().await.unwrap().unwrap();
        assert!(!progress.finished, "{progress:?}");
        // The first may be one of the two that were read.
        if progress.total_files == FILES && progress.done_files >= 2 {
            break;
        }
    }
    drop(loading);
    // What the slow one had queued is not waited for.
    let all = load(&cluster, 0, LoadRequest::default()).await;
    assert_eq!((all.done_files, all.failed_files), (FILES, 0));
    assert_eq!(cluster.store.counters().gets, FILES, "nothing is fetched twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_selected_is_pinned() {
    let cluster = Cluster::start(1).await;
    fill(&cluster).await;
    let request = LoadRequest {
        selection: Some(Selection { include: vec!["d/0*".into()], ..Selection::default() }),
        ..with(LoadTerms { pin: true, ..LoadTerms::default() })
    };
    assert_eq!(load(&cluster, 0, request).await.done_files, 10);
    let status = cluster.status(0).await;
    assert_eq!((status.pinned_bytes, status.cached_bytes), (10 * SIZE, 10 * SIZE));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rots_is_found_by_a_load_that_verifies() {
    let cluster = Cluster::start(1).await;
    fill(&cluster).await;
    load(&cluster, 0, LoadRequest::default()).await;
    let mut chunks = files_below(&cluster.workers[0].options.cache_dir.join("chunks"));
    chunks.retain(|file| std::fs::metadata(file).unwrap().len() > SIZE);
    assert_eq!(chunks.len() as u64, FILES);
    for chunk in &chunks[..3] {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(chunk).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 77_777).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 77_777).unwrap();
    }
    let gets = cluster.store.counters().gets;
    assert_eq!(load(&cluster, 0, LoadRequest::default()).await.done_files, FILES);
    assert_eq!(cluster.store.counters().gets, gets, "held is held");
    let verified = load(&cluster, 0, with(LoadTerms { verify: true, ..LoadTerms::default() })).await;
    assert_eq!((verified.done_files, verified.failed_files), (FILES, 0));
    assert_eq!(cluster.store.counters().gets, gets + 3);
    assert_eq!(cluster.status(0).await.corrupt_blocks, 3);
    for file in 0..FILES {
        cluster.check(&format!("/d/{file:02}"), file, SIZE).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_loaded_in_the_order_that_is_asked_for() {
    for order in [LoadOrder::Name, LoadOrder::Size] {
        let cluster = Cluster::start(1).await;
        let (name, size) = (|at: u64| format!("d/{:02}", at * 37 % 60), |at: u64| 1000 + at * 11 % 60);
        for file in 0..60 {
            cluster.put(&name(file), file, size(file)).await;
        }
        cluster.refresh("/").await;
        let mut files: Vec<u64> = (0..60).collect();
        match order {
            LoadOrder::Size => files.sort_by_key(|file| size(*file)),
            _ => files.sort_by_key(|file| name(*file)),
        }
        // Slow, so that what is asked for can be seen: up to 32 chunks wait for their turn at once.
        let slow = LoadTerms { requests_per_second: 20, order: order.into(), ..LoadTerms::default() };
        let mut stream = begin(&cluster, 0, with(slow)).await;
        while stream.message().await.unwrap().unwrap().done_files < 10 {}
        drop(stream);
        let asked: Vec<bool> = files.iter().map(|file| cluster.store.bytes_of(&name(*file)) > 0).collect();
        let (first, last) = asked.split_at(48);
        assert!(first[..32].iter().any(|asked| *asked) && !last.contains(&true), "{order:?}: {asked:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_waits_for_one_of_a_higher_priority() {
    let cluster = Cluster::start(1).await;
    fill(&cluster).await;
    let only = |glob: &str| Some(Selection { include: vec![glob.into()], ..Selection::default() });
    let urgent = LoadTerms { priority: 5, requests_per_second: 5, ..LoadTerms::default() };
    let urgent = LoadRequest { selection: only("d/0*"), ..with(urgent) };
    let mut first = begin(&cluster, 0, urgent).await;
    while first.message().await.unwrap().unwrap().done_files < 1 {}
    let mut second = begin(&cluster, 0, LoadRequest { selection: only("d/1*"), ..LoadRequest::default() }).await;
    while !second.message().await.unwrap().unwrap().listed {}
    while first.message().await.unwrap().unwrap().done_files < 8 {}
    let meanwhile = second.message().await.unwrap().unwrap();
    assert_eq!((meanwhile.total_files, meanwhile.done_files), (10, 0));
    while !first.message().await.unwrap().unwrap().finished {}
    let mut last = meanwhile;
    while let Some(progress) = second.message().await.unwrap() {
        last = progress;
    }
    assert!(last.finished && last.done_files == 10, "{last:?}");
}
