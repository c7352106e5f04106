//! A dataset whose policy is LRU: what is used stays, whatever passes; and its edit.

use forebay_cache_worker::{DatasetConfig, Policy};

use crate::harness::{Cluster, MIB, at, eventually, source};

/// Of a MiB, with its trailer and the rounding to pages.
const PLACE: u64 = MIB + 16 * 1024;
const HOT: u64 = 2;
const FILES: u64 = 12;

async fn read(cluster: &Cluster, file: u64) {
    cluster.check(&format!("/f{file}"), file, MIB).await;
}

/// Bytes of a file that the store gave, so far.
fn fetched(cluster: &Cluster, file: u64) -> u64 {
    cluster.store.bytes_of(&format!("f{file}"))
}

async fn cached(cluster: &Cluster) -> u64 {
    cluster.status(0).await.cached_bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hot_set_stays_while_others_pass_until_the_policy_is_hold() {
    let lru = |dataset: &mut DatasetConfig| (dataset.policy, dataset.quota) = (Policy::Lru, Some(6 * PLACE));
    let cluster = Cluster::start_with(1, |_| {}, lru).await;
    for file in 0..FILES {
        cluster.put(&format!("f{file}"), file, MIB).await;
    }
    cluster.refresh("/").await;
    for _ in 0..3 {
        for cold in HOT..FILES {
            for hot in 0..HOT {
                read(&cluster, hot).await;
            }
            read(&cluster, cold).await;
        }
    }
    assert!((0..HOT).all(|hot| fetched(&cluster, hot) == MIB), "a hot file was fetched again");
    // Room that six files leave takes blocks of a seventh.
    assert!(cached(&cluster).await <= 6 * PLACE);

    // What becomes hot finds its place: who was refused has asked for it.
    let last = FILES - 1;
    eventually("room for what is read again", || async {
        let before = fetched(&cluster, last);
        read(&cluster, last).await;
        fetched(&cluster, last) == before
    })
    .await;

    // The quota shows when the edit is in effect: four of at least five files fit it.
    eventually("a full cache", || async {
        for cold in HOT..FILES {
            read(&cluster, cold).await;
        }
        cached(&cluster).await > 4 * PLACE
    })
    .await;
    let sources = vec![at("/", source(&cluster.store, ""))];
    let (policy, quota) = (Policy::Hold, Some(4 * PLACE));
    cluster.configure(&[DatasetConfig { policy, quota, ..cluster.with_sources(sources) }]);
    eventually("the new quota", || async { cached(&cluster).await <= 4 * PLACE }).await;
    let (mut rounds, mut evicted) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let before: Vec<u64> = (0..FILES).map(|file| fetched(&cluster, file)).collect();
        for file in 0..FILES {
            read(&cluster, file).await;
        }
        rounds.push((0..FILES).map(|file| fetched(&cluster, file) - before[file as usize]).collect::<Vec<_>>());
        evicted.push(cluster.status(0).await.evicted_bytes);
    }
    // Room that is left still takes blocks; what is held is not fetched again.
    assert_eq!(evicted[0], evicted[2]);
    assert!(rounds[1].iter().zip(&rounds[2]).all(|(before, after)| after <= before), "{rounds:?}");
    assert!(rounds[2].iter().sum::<u64>() <= (FILES - 3) * MIB, "{rounds:?}");
}
