//! A cache disk that stops answering: readers get their bytes from the source.

use crate::{
    disk::Disk,
    harness::{Cluster, MIB, begin_load, eventually, metrics},
};

const SIZE: u64 = 20 * MIB;

async fn cluster_on(disk: &Disk, files: &[(&str, u64)]) -> Cluster {
    let cluster = Cluster::start_with(1, |options| options.cache_dir = disk.cache_dir(), |_| {}).await;
    for (name, seed) in files {
        cluster.put_virtual(name, *seed, SIZE);
    }
    cluster.refresh("/").await;
    cluster
}

async fn hung(cluster: &Cluster) -> bool {
    let metrics = metrics(cluster).await;
    let value = metrics.lines().find_map(|line| line.strip_prefix("forebay_worker_disk_hung "));
    value.unwrap() == "1"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hung_disk_does_not_take_reaches_its_readers() {
    let Some(disk) = Disk::mount() else { return };
    let cluster = cluster_on(&disk, &[("held", 1), ("first", 2), ("second", 3)]).await;
    cluster.check("/held", 1, SIZE).await;
    assert!(!hung(&cluster).await);
    let hang = disk.hang();
    cluster.check("/first", 2, SIZE).await;
    assert!(hung(&cluster).await);

    // It is not asked again, neither to take nor to give.
    let stuck = disk.stuck();
    assert!(stuck > 0);
    for _ in 0..3 {
        cluster.check("/second", 3, SIZE).await;
        cluster.check("/held", 1, SIZE).await;
    }
    assert_eq!(disk.stuck(), stuck);
    assert_eq!(cluster.store.bytes_of("second"), 3 * SIZE);
    assert_eq!(cluster.store.bytes_of("held"), 4 * SIZE);
    // Nor does a load wait for it.
    let mut progress = begin_load(&cluster, "/second").await;
    let mut last = None;
    while let Some(message) = progress.message().await.unwrap() {
        last = Some(message);
    }
    let last = last.unwrap();
    assert_eq!((last.failed_files, last.bypassed_bytes), (0, SIZE), "{last:?}");

    drop(hang);
    eventually("disk that answers", || async { !hung(&cluster).await }).await;
    cluster.check("/held", 1, SIZE).await;
    assert_eq!(cluster.store.bytes_of("held"), 4 * SIZE, "what it held it still holds");
    cluster.check("/second", 3, SIZE).await;
    cluster.check("/second", 3, SIZE).await;
    assert_eq!(cluster.store.bytes_of("second"), 4 * SIZE, "it takes blocks again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hung_disk_holds_comes_from_the_source() {
    let Some(disk) = Disk::mount() else { return };
    let mut cluster = cluster_on(&disk, &[("held", 1)]).await;
    cluster.check("/held", 1, SIZE).await;
    // Afterwards the chunk has to be opened, and verified.
    cluster.workers[0].stop().await;
    cluster.restart(0).await;
    let hang = disk.hang();
    cluster.check("/held", 1, SIZE).await;
    assert!(hung(&cluster).await);
    assert_eq!(cluster.store.bytes_of("held"), 2 * SIZE);
    drop(hang);
    eventually("disk that answers", || async { !hung(&cluster).await }).await;
    cluster.check("/held", 1, SIZE).await;
    assert_eq!(cluster.store.bytes_of("held"), 2 * SIZE, "what it held it still holds");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hung_disk_was_to_send_comes_from_the_source() {
    let Some(disk) = Disk::mount() else { return };
    let cluster = cluster_on(&disk, &[("held", 1)]).await;
    cluster.check("/held", 1, SIZE).await;
    // The chunk is open and known to be right: only the sending reads it.
    let hang = disk.hang();
    cluster.check("/held", 1, SIZE).await;
    let control = cluster.client.control("w-0").await.unwrap();
    let problem = async || {
        let request = forebay_protocol::worker::StatusRequest::default();
        control.clone().status(request).await.unwrap().into_inner().tier_problem
    };
    assert!(problem().await.contains("the cache disk has not answered"));
    let stuck = disk.stuck();
    for _ in 0..3 {
        cluster.check("/held", 1, SIZE).await;
    }
    assert_eq!(disk.stuck(), stuck);
    drop(hang);
    eventually("disk that answers", || async { problem().await.is_empty() }).await;
    let before = cluster.store.bytes_of("held");
    cluster.check("/held", 1, SIZE).await;
    assert_eq!(cluster.store.bytes_of("held"), before, "what it held it still holds");
}
