//! Tests that look inside.

mod policies;

use std::time::{Duration, Instant};

use forebay_protocol::{ChunkKey, DatasetId, FileIdentity};

use crate::catalog::{Catalog, Entry, Name};
use crate::index::{self, Index, Stop};
use crate::ledger::Ledger;
use crate::root::Root;
use crate::{ChunkStore, StoreOptions};

/// 100,000 chunks that have no file: a start that opened one, or looked for one, would find it out.
#[test]
fn a_start_reads_the_index_and_opens_no_file() {
    const CHUNKS: u32 = 100_000;
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        dir: dir.path().to_owned(),
        owner: "demo/worker-0".into(),
        capacity: 1 << 50,
        high_percent: 95,
        low_percent: 90,
    };
    {
        let root = std::sync::Arc::new(Root::open(&options.dir, &options.owner).unwrap());
        let (catalog, database, _) = index::open(&root, || Catalog::new(Ledger::new(1 << 50, 95, 90)));
        let slot = catalog.ledger(|ledger| ledger.slot(DatasetId::local("n", "a")));
        for index in 0..CHUNKS {
            let file = FileIdentity(u128::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
            let order = catalog.next_order();
            let entry =
                Entry { order, used: order, hits: 0, slot, data: 50_000, len: 50_000, overhead: 7_344, flags: 0 };
            catalog.apply(Name::from(ChunkKey { file, index: 0 }), true, |_| Some(entry)).unwrap();
        }
        let index = Index::default();
        index.stop(Stop::Clean { complete: true });
        let step = Duration::from_millis(1);
        index.run(&catalog, || Some(std::sync::Arc::clone(&root)), database, step, step);
    }
    let started = Instant::now();
    let store = ChunkStore::open(options.clone()).unwrap();
    let took = started.elapsed();
    let totals = store.totals();
    assert_eq!((totals.chunks, totals.cached_bytes), (u64::from(CHUNKS), u64::from(CHUNKS) * 50_000));
    assert!(!totals.sweeping && totals.dropped_files == 0 && totals.open_files == 0);
    // Unoptimised and on a busy machine; some 100 ms otherwise.
    assert!(took < Duration::from_secs(10), "{took:?}");
    store.close();
    // After a crash the sweep finds that they have no files.
    drop(ChunkStore::open(options.clone()).unwrap());
    let store = ChunkStore::open(options).unwrap();
    assert!(store.totals().chunks > 0, "a start does not wait for the sweep");
    while store.totals().sweeping {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(store.totals().chunks, 0);
}
