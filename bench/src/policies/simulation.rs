//! A worker's chunk store under a trace, without the network, the source and the clock.

use std::{path::Path, time::Duration};

use anyhow::{Context, ensure};
use forebay_cache_store::{ChunkSpec, ChunkStore, DatasetPolicy, Policy, StoreOptions, Tuning};
use forebay_protocol::{ChunkKey, DatasetId, DatasetPath, FileVersion, VersionKey};

/// Bytes of a file: what they are does not matter, all are equal.
const BYTES: u64 = 1 << 12;
/// A store that is never full: the quota is what limits.
const CAPACITY: u64 = 1 << 40;

/// Part of the reads from `counted` on that a store answers whose Dataset has this policy and room for so many files.
pub fn hit_ratio(
    dir: &Path,
    policy: Policy,
    trace: &[u32],
    counted: usize,
    files: usize,
    room: usize,
) -> anyhow::Result<f64> {
    let dataset = DatasetId::local("default", "data");
    let specs = (0..files).map(|file| spec(dataset, file)).collect::<anyhow::Result<Vec<_>>>()?;
    let dir = tempfile::tempdir_in(dir)?;
    let options = StoreOptions {
        dir: dir.path().to_owned(),
        owner: "bench/worker-0".into(),
        capacity: CAPACITY,
        high_percent: 95,
        low_percent: 85,
    };
    // Every read is a use of its own: between two of a file there is an epoch.
    let tuning = Tuning { one_use: Duration::ZERO, watch_space: false, ..Tuning::default() };
    let store = ChunkStore::open_tuned(options, tuning)?;
    store.set_dataset(dataset, DatasetPolicy { policy, ..DatasetPolicy::default() });
    let bytes = vec![7; BYTES as usize];
    let fetch = |spec: &ChunkSpec| {
        let written = store.chunk(spec, true).is_some_and(|chunk| chunk.write(0, &bytes, &[]).is_ok());
        if !written {
            store.make_due_room();
        }
    };
    let first = specs.first().context("no files")?;
    fetch(first);
    let charge = store.totals().used;
    ensure!(charge > 0, "nothing is stored in {}", dir.path().display());
    store.remove(first.key);
    store.set_dataset(dataset, DatasetPolicy { policy, quota: Some(charge * room as u64), ..DatasetPolicy::default() });
    let mut hits = 0;
    for (place, file) in trace.iter().enumerate() {
        let spec = &specs[*file as usize];
        let hit = store.chunk(spec, false).is_some_and(|chunk| chunk.send(0, 1).is_some());
        if hit {
            hits += usize::from(place >= counted);
        } else {
            fetch(spec);
        }
    }
    store.close();
    Ok(hits as f64 / (trace.len() - counted) as f64)
}

fn spec(dataset: DatasetId, file: usize) -> anyhow::Result<ChunkSpec> {
    let path = DatasetPath::parse(format!("/f{file:06}").into_bytes())?;
    let version =
        FileVersion { size: BYTES, mtime_ns: 0, key: VersionKey::new(b"\"e\"".to_vec()).context("a version")? };
    let key = ChunkKey { file: version.identity(dataset, &path), index: 0 };
    Ok(ChunkSpec { dataset, path, version, key })
}
