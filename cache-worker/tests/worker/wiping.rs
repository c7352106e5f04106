//! Datasets that go, workers that wait for their files, and workers that go.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    slice::from_ref,
    time::{Duration, Instant},
};

use forebay_cache_worker::{DatasetConfig, RunningWorker};
use forebay_protocol::{DatasetId, worker::PinRequest};
use tonic::Code;

use crate::harness::{Cluster, MIB, at, eventually, files_below, read_at, source};

/// Another dataset, over what stands below a prefix.
fn other(cluster: &Cluster, name: &str) -> DatasetConfig {
    let sources = vec![at("/", source(&cluster.store, &format!("{name}/")))];
    DatasetConfig { id: DatasetId::local("default", name), name: name.into(), ..cluster.with_sources(sources) }
}

/// Bytes of the chunks of a worker.
fn on_disk(cluster: &Cluster, index: usize) -> u64 {
    let chunks = cluster.workers[index].options.cache_dir.join("chunks/chunks");
    files_below(&chunks).iter().filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.len()).sum()
}

async fn read_all(cluster: &Cluster, id: DatasetId) {
    let names = cluster.client.dataset(id);
    let entry = names.lookup(&crate::harness::path("/"), b"f").await.unwrap();
    let forebay_client::EntryKind::File { version } = entry.kind else { panic!("a file") };
    assert_eq!(read_at(&names, "/f", version, 0, 4 * MIB).await.unwrap().len() as u64, 4 * MIB);
}

async fn pin(cluster: &Cluster, id: DatasetId) {
    let mut control = cluster.client.control("w-0").await.unwrap();
    let request = PinRequest { dataset: id.to_bytes(), path: "/".into(), remove: false };
    let mut progress = control.pin(request).await.unwrap().into_inner();
    while progress.message().await.unwrap().is_some() {}
}

async fn is_wiped(cluster: &Cluster, id: DatasetId) -> bool {
    match cluster.status_of(0, id).await {
        Ok(status) => {
            assert!(status.datasets.is_empty() || status.wiping.is_empty());
            false
        }
        Err(status) => status.code() == Code::NotFound,
    }
}

/// A worker that holds 4 MiB of each of two datasets, the second pinned.
async fn holding() -> (Cluster, DatasetConfig, DatasetConfig) {
    let cluster = Cluster::start(1).await;
    cluster.put("keep/f", 1, 4 * MIB).await;
    cluster.put("drop/f", 2, 4 * MIB).await;
    let (keep, gone) = (other(&cluster, "keep"), other(&cluster, "drop"));
    cluster.configure(&[keep.clone(), gone.clone()]);
    eventually("both datasets", || async { cluster.status_of(0, gone.id).await.is_ok_and(|s| !s.datasets.is_empty()) })
        .await;
    eventually("the end of the first one", || is_wiped(&cluster, cluster.id)).await;
    read_all(&cluster, keep.id).await;
    pin(&cluster, gone.id).await;
    eventually("both on the disk", || async { on_disk(&cluster, 0) >= 8 * MIB }).await;
    (cluster, keep, gone)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dataset_that_goes_is_wiped_with_its_pins() {
    let (cluster, keep, gone) = holding().await;
    cluster.configure(from_ref(&keep));
    eventually("the end of the wiping", || is_wiped(&cluster, gone.id)).await;
    let left = on_disk(&cluster, 0);
    assert!((4 * MIB..6 * MIB).contains(&left), "{left} bytes are left");
    let status = cluster.status_of(0, keep.id).await.unwrap();
    assert_eq!((status.datasets[0].cached_bytes, status.wiping.len()), (4 * MIB, 0));

    // It comes back as if it had never been there.
    cluster.configure(&[keep.clone(), gone.clone()]);
    eventually("the dataset", || async { cluster.status_of(0, gone.id).await.is_ok_and(|s| !s.datasets.is_empty()) })
        .await;
    let status = cluster.status_of(0, gone.id).await.unwrap().datasets.remove(0);
    assert_eq!((status.cached_bytes, status.pinned_bytes, status.generation), (0, 0, 0));
    read_all(&cluster, gone.id).await;
    // There and back, faster than anything is wiped.
    for round in 0..10 {
        cluster.configure(from_ref(&keep));
        tokio::time::sleep(Duration::from_millis(300 + 70 * round)).await;
        cluster.configure(&[keep.clone(), gone.clone()]);
        tokio::time::sleep(Duration::from_millis(300 + 50 * round)).await;
    }
    eventually("the dataset", || async { cluster.status_of(0, gone.id).await.is_ok_and(|s| !s.datasets.is_empty()) })
        .await;
    read_all(&cluster, gone.id).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = cluster.status_of(0, gone.id).await.unwrap();
    assert_eq!((status.datasets[0].cached_bytes, status.wiping.len()), (4 * MIB, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dataset_that_went_while_nobody_served_is_wiped_once_that_is_known() {
    for clean in [true, false] {
        let (mut cluster, keep, gone) = holding().await;
        if clean {
            cluster.workers[0].stop().await;
        } else {
            cluster.workers[0].kill().await;
            // The directory is released when the last thread is gone.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let file = cluster.dir.path().join("datasets.json");
        // It cannot be read: nothing is served, and nothing wiped.
        fs::write(&file, "{").unwrap();
        let refused = RunningWorker::start(cluster.workers[0].options.clone()).await.map(drop);
        assert!(refused.is_err());
        // It is not there: that says nothing.
        fs::remove_file(&file).unwrap();
        cluster.workers[0].start().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        for id in [keep.id, gone.id] {
            let status = cluster.status_of(0, id).await.unwrap();
            assert!(status.datasets.is_empty(), "nothing is served yet");
            assert_eq!(status.wiping, [id.to_bytes()], "what is on the disk");
        }
        assert!(on_disk(&cluster, 0) >= 8 * MIB);
        assert!(readyz(cluster.workers[0].metrics_address()).contains("not loaded"));

        cluster.configure(from_ref(&keep));
        eventually("the end of the wiping", || is_wiped(&cluster, gone.id)).await;
        let left = on_disk(&cluster, 0);
        assert!((4 * MIB..6 * MIB).contains(&left), "{left} bytes are left");
        let status = cluster.status_of(0, keep.id).await.unwrap();
        // Wiped was the one while the other may still have been taken up; that was never said to be wiped.
        assert!(!status.datasets.is_empty() || status.wiping == [keep.id.to_bytes()]);
        read_all(&cluster, keep.id).await;
        assert_eq!(cluster.status_of(0, keep.id).await.unwrap().datasets[0].cached_bytes, 4 * MIB);
    }
}

/// Status line and body.
fn readyz(address: SocketAddr) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.write_all(b"GET /readyz HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_waits_for_its_first_files() {
    let mut cluster = Cluster::start(1).await;
    cluster.put("f", 1, MIB).await;
    cluster.refresh("/").await;
    cluster.workers[0].stop().await;
    let (table, datasets) = (cluster.dir.path().join("table.json"), cluster.dir.path().join("datasets.json"));
    let kept = (fs::read(&table).unwrap(), fs::read(&datasets).unwrap());
    fs::remove_file(&table).unwrap();
    fs::remove_file(&datasets).unwrap();
    cluster.workers[0].start().await;
    let address = cluster.workers[0].metrics_address();
    assert!(readyz(address).starts_with("HTTP/1.1 503") && readyz(address).contains("not loaded"));
    restore(&datasets, &kept.1);
    eventually("the datasets", || async { readyz(address).contains("not in the table") }).await;
    restore(&table, &kept.0);
    eventually("a worker that is ready", || async { readyz(address).starts_with("HTTP/1.1 200") }).await;
    cluster.check("/f", 1, MIB).await;
}

fn restore(path: &Path, text: &[u8]) {
    use std::os::unix::fs::OpenOptionsExt as _;
    let next = path.with_extension("next");
    let mut file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&next).unwrap();
    file.write_all(text).unwrap();
    fs::rename(next, path).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_go_serves_on_until_nobody_counts_on_it() {
    let patient = |options: &mut forebay_cache_worker::WorkerOptions| options.drain = Duration::from_secs(8);
    let mut cluster = Cluster::start_with(2, patient, |_| {}).await;
    cluster.put("f", 1, MIB).await;
    cluster.refresh("/").await;
    cluster.check("/f", 1, MIB).await;
    let (address, ready) = (cluster.workers[1].address(), cluster.workers[1].metrics_address());
    let mut going = cluster.workers.remove(1);
    let start = Instant::now();
    let drained = tokio::spawn(async move {
        let took = going.drain().await;
        (going, took)
    });
    // Not ready, and there for everybody, also for those who come only now.
    eventually("a worker that is not ready", || async { readyz(ready).contains("stopping") }).await;
    assert!(start.elapsed() < Duration::from_secs(1));
    while start.elapsed() < Duration::from_secs(4) {
        assert!(TcpStream::connect(address).is_ok());
        cluster.check("/f", 1, MIB).await;
    }
    assert!(!drained.is_finished(), "the table still counts on it");
    cluster.publish(vec![0]);
    let (mut worker, took) = drained.await.unwrap();
    assert!((Duration::from_secs(4)..Duration::from_secs(7)).contains(&took), "{took:?}");

    // With nobody to change the table it goes when its time is over.
    worker.start().await;
    worker.options.drain = Duration::from_secs(8);
    cluster.workers.push(worker);
    cluster.publish(vec![0, 1]);
    cluster.ready().await;
    let took = cluster.workers[1].drain().await;
    assert!((Duration::from_secs(8)..Duration::from_secs(10)).contains(&took), "{took:?}");
    cluster.check("/f", 1, MIB).await;
}
