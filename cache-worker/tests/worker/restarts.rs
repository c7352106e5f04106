//! Workers that end and come back, and disks that lie.

use std::{fs, os::unix::fs::FileExt, time::Duration};

use crate::harness::{BLOCK, Cluster, MIB, contents, files_below, read_at};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_the_cache() {
    let mut cluster = Cluster::start(1).await;
    for i in 0..20 {
        cluster.put(&format!("d/{i}"), i, 200_000).await;
    }
    cluster.put("big", 50, 5 * MIB).await;
    cluster.refresh("/").await;
    let check = async |cluster: &Cluster| {
        for i in 0..20 {
            cluster.check(&format!("/d/{i}"), i, 200_000).await;
        }
        cluster.check("/big", 50, 5 * MIB).await;
    };
    check(&cluster).await;
    let gets = cluster.store.counters().gets;
    cluster.workers[0].stop().await;
    cluster.restart(0).await;
    check(&cluster).await;
    assert_eq!(cluster.store.counters().gets, gets, "a restart lost something");
    // A crash loses at most what was not written yet.
    cluster.workers[0].kill().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.restart(0).await;
    check(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bits_are_found_and_fetched_again() {
    let mut cluster = Cluster::start(1).await;
    let size = 4 * MIB;
    cluster.put("f", 1, size).await;
    cluster.refresh("/").await;
    cluster.check("/f", 1, size).await;
    cluster.workers[0].stop().await;
    let chunk = files_below(&cluster.workers[0].options.cache_dir.join("chunks"))
        .into_iter()
        .find(|file| fs::metadata(file).unwrap().len() >= size && !file.to_string_lossy().contains("redb"))
        .unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&chunk).unwrap();
    for block in [3, 17] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, block * BLOCK + 5).unwrap();
        file.write_all_at(&[byte[0] ^ 1], block * BLOCK + 5).unwrap();
    }
    drop(file);
    let before = cluster.store.bytes_of("f");
    cluster.restart(0).await;
    cluster.check("/f", 1, size).await;
    assert_eq!(cluster.store.bytes_of("f") - before, 2 * BLOCK, "exactly the damaged blocks");
    assert!(cluster.status(0).await.corrupt_blocks >= 1);
    cluster.check("/f", 1, size).await;
    assert_eq!(cluster.store.bytes_of("f") - before, 2 * BLOCK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncated_chunk_is_found_and_fetched_again() {
    let mut cluster = Cluster::start(1).await;
    let size = 2 * MIB;
    cluster.put("f", 1, size).await;
    cluster.refresh("/").await;
    cluster.check("/f", 1, size).await;
    cluster.workers[0].stop().await;
    for file in files_below(&cluster.workers[0].options.cache_dir.join("chunks")) {
        if fs::metadata(&file).unwrap().len() >= size && !file.to_string_lossy().contains("redb") {
            fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(MIB).unwrap();
        }
    }
    cluster.restart(0).await;
    cluster.check("/f", 1, size).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_is_not_seen_by_readers() {
    let mut cluster = Cluster::start(3).await;
    let size = 48 * MIB;
    cluster.put_virtual("f", 5, size);
    cluster.refresh("/").await;
    cluster.store.set_latency(Duration::from_millis(10));
    let version = cluster.version("/f").await.unwrap();
    let names = cluster.names();
    let expected = contents(5, size);
    let readers: Vec<_> = (0..8u64)
        .map(|reader| {
            let (names, version, expected) = (names.clone(), version.clone(), expected.clone());
            tokio::spawn(async move {
                for step in 0..96u64 {
                    let offset = (reader * 7 + step) % 96 * (MIB / 2);
                    let got = read_at(&names, "/f", version.clone(), offset, MIB / 2).await.unwrap();
                    assert!(got == expected[offset as usize..(offset + MIB / 2) as usize]);
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    cluster.workers[1].kill().await;
    for reader in readers {
        reader.await.unwrap();
    }
    cluster.restart(1).await;
    cluster.check("/f", 5, size).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_mid_read_is_orderly() {
    let mut cluster = Cluster::start(2).await;
    let size = 16 * MIB;
    cluster.put_virtual("f", 5, size);
    cluster.refresh("/").await;
    cluster.store.set_latency(Duration::from_millis(50));
    let version = cluster.version("/f").await.unwrap();
    let names = cluster.names();
    let reading = tokio::spawn(async move {
        for step in 0..64u64 {
            let offset = step % 16 * MIB;
            let got = read_at(&names, "/f", version.clone(), offset, MIB).await.unwrap();
            assert!(got == contents(5, size)[offset as usize..(offset + MIB) as usize]);
        }
    });
    tokio::time::sleep(Duration::from_millis(70)).await;
    let start = std::time::Instant::now();
    cluster.workers[0].stop().await;
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    reading.await.unwrap();
}
