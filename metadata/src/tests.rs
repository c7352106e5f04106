//! Tests of whole datasets over stores in memory.

mod listing;
mod model;
mod refresh;
mod restart;
mod sources;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_protocol::{DatasetId, DatasetPath};
use forebay_under_store::UnderStore;

use crate::{
    DatasetIndex, DatasetOptions, EntryKind, Index, IndexOptions, MetadataError, Namespace, Source,
    memory_store::MemoryStore,
};

fn path(text: &str) -> DatasetPath {
    DatasetPath::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

/// A dataset of one source at `/`, and the directory that its index is in.
struct Fixture {
    directory: tempfile::TempDir,
    store: Arc<MemoryStore>,
    index: Arc<Index>,
    dataset: Arc<DatasetIndex>,
    options: DatasetOptions,
}

fn options() -> DatasetOptions {
    DatasetOptions {
        failure_ttl: Duration::from_millis(500),
        recheck_interval: Duration::from_millis(400),
        deadline: Duration::from_secs(10),
        ..DatasetOptions::default()
    }
}

fn namespace(store: &Arc<MemoryStore>) -> Arc<Namespace> {
    sources(&[("/", store, 0)])
}

/// Stores at paths, with fingerprints.
fn sources(sources: &[(&str, &Arc<MemoryStore>, u64)]) -> Arc<Namespace> {
    let source = |(at, store, fingerprint): &(&str, &Arc<MemoryStore>, u64)| {
        let store: Arc<dyn UnderStore> = (*store).clone();
        Source { path: path(at), store, fingerprint: *fingerprint }
    };
    Arc::new(Namespace::new(sources.iter().map(source).collect()).unwrap())
}

fn open_index(directory: &std::path::Path) -> Arc<Index> {
    let options = IndexOptions { cache_bytes: 8 * 1024 * 1024, sync_interval: Duration::from_millis(50) };
    Index::open_with(directory, options).unwrap()
}

fn id() -> DatasetId {
    DatasetId::local("default", "test")
}

impl Fixture {
    async fn new() -> Self {
        Self::with(options()).await
    }

    async fn with(options: DatasetOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let index = open_index(directory.path());
        Self::on(directory, index, options).await
    }

    async fn on(directory: tempfile::TempDir, index: Arc<Index>, options: DatasetOptions) -> Self {
        let store = MemoryStore::new();
        let dataset = DatasetIndex::open(index.clone(), id(), namespace(&store), options.clone()).await.unwrap();
        Self { directory, store, index, dataset, options }
    }

    async fn restart(self) -> Self {
        let Self { directory, store, index, dataset, options } = self;
        dataset.close().await;
        drop(dataset);
        drop(index);
        let index = open_index(directory.path());
        let dataset = DatasetIndex::open(index.clone(), id(), namespace(&store), options.clone()).await.unwrap();
        Self { directory, store, index, dataset, options }
    }

    /// All names of a directory, `/` appended to directories, in pages of `limit`.
    async fn names_by(&self, dir: &str, limit: usize) -> Result<Vec<String>, MetadataError> {
        let mut names = Vec::new();
        let mut after = Vec::new();
        loop {
            let page = self.dataset.list(0, &path(dir), &after, limit).await?;
            assert!(page.entries.len() <= limit);
            assert!(page.end || !page.entries.is_empty(), "an empty page that is not the end");
            for entry in &page.entries {
                assert!(entry.sort_key() > after, "out of order");
                after = entry.sort_key();
                names.push(String::from_utf8_lossy(&after).into_owned());
            }
            if page.end {
                return Ok(names);
            }
        }
    }

    async fn names(&self, dir: &str) -> Result<Vec<String>, MetadataError> {
        self.names_by(dir, 100).await
    }

    /// The version key of a file; `/` for a directory.
    async fn lookup(&self, dir: &str, name: &str) -> Result<String, MetadataError> {
        Ok(match self.dataset.lookup(0, &path(dir), name.as_bytes()).await?.kind {
            EntryKind::File { version } => String::from_utf8_lossy(version.key.as_bytes()).into_owned(),
            EntryKind::Directory => "/".to_owned(),
        })
    }

    /// Waits until a directory of the store was asked for so often in all.
    async fn asked(&self, directory: &str, times: u64) {
        let asked = async {
            while self.store.listed(directory) < times {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), asked).await.unwrap();
        assert_eq!(self.store.listed(directory), times);
    }

    async fn raise(&self) -> u64 {
        self.dataset.raise_generation().await.unwrap()
    }
}
