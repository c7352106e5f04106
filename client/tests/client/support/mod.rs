//! A cluster of misbehaving workers, and files whose contents everybody can compute.

pub(crate) mod names;
pub(crate) mod worker;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_client::{Client, ClientConfig, DatasetClient, FileReader, MemoryBudget};
use forebay_protocol::{
    BLOCK_SIZE, ChunkKey, DatasetId, DatasetPath, FileIdentity, FileVersion, VersionKey,
    handshake::RuntimeKey,
    placement::Placement,
    table::{Member, MemberState, WorkerTable},
};
use tokio::sync::watch;

pub(crate) use worker::{FakeWorker, Reply};

pub(crate) const MIB: u64 = 1 << 20;

/// Contents of a file, from `offset`: noise that repeats with each block, stamped with file and place every 4 KiB.
pub(crate) fn content(file: FileIdentity, offset: u64, len: usize) -> Vec<u8> {
    static NOISE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut block = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let block: Vec<u8> = (0..BLOCK_SIZE).map(|_| block()).collect();
        [&block[..], &block[..]].concat()
    });
    let mut out = Vec::with_capacity(len);
    if len == 0 {
        return out;
    }
    while out.len() < len {
        let at = ((offset + out.len() as u64) % BLOCK_SIZE) as usize;
        let part = (len - out.len()).min(BLOCK_SIZE as usize);
        out.extend_from_slice(&NOISE[at..at + part]);
    }
    let mut page = offset / 4096;
    while page * 4096 < offset + len as u64 {
        let stamp = (file.0 as u64 ^ page.wrapping_mul(0x2545_f491_4f6c_dd1d)).to_le_bytes();
        for (i, byte) in stamp.iter().enumerate() {
            let place = page * 4096 + i as u64;
            if place >= offset && place < offset + len as u64 {
                out[(place - offset) as usize] = *byte;
            }
        }
        page += 1;
    }
    out
}

pub(crate) fn path(text: &str) -> DatasetPath {
    DatasetPath::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

pub(crate) fn version(size: u64) -> FileVersion {
    FileVersion { size, mtime_ns: 1, key: VersionKey::new("v1").unwrap() }
}

pub(crate) fn dataset_id() -> DatasetId {
    DatasetId::local("test", "data")
}

pub(crate) struct Cluster {
    pub(crate) workers: Vec<FakeWorker>,
    pub(crate) table: watch::Sender<Arc<WorkerTable>>,
    pub(crate) client: Client,
    pub(crate) dataset: DatasetClient,
}

pub(crate) fn config(key: &RuntimeKey) -> ClientConfig {
    ClientConfig {
        name: "test".into(),
        key: key.clone(),
        memory: MemoryBudget::new(64 << 20),
        deadline: Duration::from_secs(10),
        max_read_ahead: 32 * MIB,
        connections_per_worker: 2,
    }
}

impl Cluster {
    pub(crate) async fn start(workers: usize) -> Self {
        Self::with(workers, |_| {}).await
    }

    pub(crate) async fn with(count: usize, change: impl FnOnce(&mut ClientConfig)) -> Self {
        let key = RuntimeKey::generate();
        let mut workers = Vec::new();
        for _ in 0..count {
            workers.push(FakeWorker::start(key.clone()).await);
        }
        let mut config = config(&key);
        change(&mut config);
        let (table, receiver) = watch::channel(Arc::new(table_of(1, &workers)));
        let client = Client::new(config, receiver);
        let dataset = client.dataset(dataset_id());
        Self { workers, table, client, dataset }
    }

    pub(crate) fn open(&self, name: &str, size: u64) -> OpenFile {
        let (path, version) = (path(name), version(size));
        let identity = version.identity(dataset_id(), &path);
        OpenFile { reader: self.dataset.open(path, version), identity, size }
    }

    /// Workers in the order of preference for the first chunk of a file.
    pub(crate) fn order(&self, file: &OpenFile) -> Vec<usize> {
        let key = ChunkKey { file: file.identity, index: 0 }.placement_key();
        Placement::new(&self.client.members()).order(key, usize::MAX)
    }

    pub(crate) fn all(&self, reply: Reply) {
        for worker in &self.workers {
            worker.always(reply.clone());
        }
    }

    /// Blocks that all workers were asked for.
    pub(crate) fn blocks_asked(&self) -> u64 {
        self.workers.iter().flat_map(|worker| worker.requests()).map(|read| read.range.count).sum()
    }

    pub(crate) fn requests(&self) -> usize {
        self.workers.iter().map(|worker| worker.requests().len()).sum()
    }
}

pub(crate) fn table_of(epoch: u64, workers: &[FakeWorker]) -> WorkerTable {
    let members = workers.iter().enumerate().map(|(i, worker)| Member {
        name: format!("worker-{i}"),
        address: worker.address.clone(),
        weight: 1,
        state: MemberState::Serving,
    });
    WorkerTable { epoch, members: members.collect() }
}

pub(crate) struct OpenFile {
    pub(crate) reader: Arc<FileReader>,
    pub(crate) identity: FileIdentity,
    pub(crate) size: u64,
}

impl OpenFile {
    /// Reads and compares with the generator.
    pub(crate) async fn check(&self, offset: u64, len: usize) {
        let parts = self.reader.read(offset, len).await.unwrap_or_else(|error| panic!("read {offset}+{len}: {error}"));
        let expected = len.min(self.size.saturating_sub(offset) as usize);
        let got = parts.concat();
        assert_eq!(got.len(), expected, "length of {offset}+{len}");
        assert!(got == content(self.identity, offset, expected), "bytes of {offset}+{len}");
    }
}

/// Waits until something holds, for 10 s at most.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
