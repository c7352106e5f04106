//! The tree of a dataset that cache workers serve: [`Tree`] over the client library.

use std::{fs, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_client::{Client, ClientConfig, ClientMetrics, DatasetClient, Event, FileReader};
use forebay_protocol::{
    DatasetId, DatasetPath, FileVersion, handshake::RuntimeKey, identity::directory_placement_key,
    placement::Placement, table::WorkerTable, worker::StatusRequest,
};
use futures::{StreamExt, stream::BoxStream};

use crate::{
    config::{ConfigError, VolumeConfig},
    daemon::Volumes,
    table_file::TableFile,
    tree::{Change, Entry, Inspection, ListPage, Reader, Totals, Tree, TreeError},
};

/// A worker that does not tell the dataset's sums in this time is not asked again until the next round.
const TOTALS_DEADLINE: Duration = Duration::from_secs(5);
/// Workers asked for sums at once.
const ASKED_AT_ONCE: usize = 16;

/// Opens the trees of volumes: a client for each, fed by the volume's table file.
#[derive(Debug, Default)]
pub struct Workers;

impl Volumes for Workers {
    type Tree = WorkersTree;

    fn open(&mut self, config: &VolumeConfig) -> Result<WorkersTree, ConfigError> {
        let key = read_key(&config.key_file)?;
        let (file, table) = TableFile::open(&config.table_file);
        // It ends when the client, which holds the receiver, is gone.
        tokio::spawn(file.watch());
        let client = Client::new(
            ClientConfig {
                name: config.name.clone(),
                key,
                budget: usize::try_from(config.budget_bytes).unwrap_or(usize::MAX),
                deadline: config.deadline(),
                max_read_ahead: config.max_read_ahead_bytes,
                connections_per_worker: config.connections_per_worker as usize,
            },
            table,
        );
        let dataset = client.dataset(config.dataset);
        // Connects to the owner of the root while nobody waits for it. What it answers does not matter.
        tokio::spawn({
            let dataset = dataset.clone();
            async move {
                let _ = dataset.list(&DatasetPath::root(), b"", 1).await;
            }
        });
        Ok(WorkersTree { client, dataset, id: config.dataset })
    }

    fn metrics(tree: &WorkersTree) -> Option<ClientMetrics> {
        Some(tree.client.metrics())
    }
}

/// 32 bytes, or as many in hexadecimal digits with white space around them.
fn read_key(path: &Path) -> Result<RuntimeKey, ConfigError> {
    let failed = |reason: String| ConfigError::Key { path: path.to_owned(), reason };
    let contents = fs::read(path).map_err(|error| failed(error.to_string()))?;
    if let Ok(key) = <[u8; 32]>::try_from(contents.as_slice()) {
        return Ok(RuntimeKey::new(key));
    }
    let mut key = [0; 32];
    hex::decode_to_slice(contents.trim_ascii(), &mut key)
        .map_err(|_| failed("neither 32 bytes nor 64 hexadecimal digits".to_owned()))?;
    Ok(RuntimeKey::new(key))
}

/// The tree.
#[derive(Clone)]
pub struct WorkersTree {
    client: Client,
    dataset: DatasetClient,
    id: DatasetId,
}

impl Reader for FileReader {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TreeError> {
        FileReader::read(self, offset, len).await
    }
}

impl Tree for WorkersTree {
    type Reader = FileReader;

    async fn lookup(&self, directory: &DatasetPath, name: &[u8]) -> Result<Entry, TreeError> {
        self.dataset.lookup(directory, name).await
    }

    async fn list(&self, directory: &DatasetPath, after: &[u8], limit: u32) -> Result<ListPage, TreeError> {
        self.dataset.list(directory, after, limit).await
    }

    fn open(&self, path: DatasetPath, version: FileVersion) -> Arc<FileReader> {
        self.dataset.open(path, version)
    }

    async fn inspect(&self, path: &DatasetPath, version: &FileVersion) -> Result<Inspection, TreeError> {
        self.dataset.inspect(path, version).await
    }

    fn directory_owner(&self, path: &DatasetPath) -> Option<String> {
        let table = self.client.members();
        let owner = Placement::new(&table).owner(directory_placement_key(self.id, path))?;
        Some(table.members.get(owner)?.name.clone())
    }

    fn changes(&self) -> BoxStream<'static, Change> {
        let change = |event| match event {
            Event::Changed { directory, names } => Change::Names { directory, names },
            Event::Reset => Change::Everything,
        };
        self.dataset.watch().map(change).boxed()
    }

    async fn totals(&self) -> Option<Totals> {
        let table = self.client.members();
        let ask = totals_of(&self.client, &table, self.id);
        tokio::time::timeout(TOTALS_DEADLINE * 2, ask).await.ok()?
    }
}

async fn totals_at(client: &Client, member: String, id: DatasetId) -> Option<(u64, Totals)> {
    let mut control = client.control(&member).await.ok()?;
    let request = StatusRequest { dataset: id.to_bytes() };
    let status = tokio::time::timeout(TOTALS_DEADLINE, control.status(request)).await.ok()?.ok()?.into_inner();
    let scan = status.datasets.into_iter().find(|dataset| dataset.dataset == id.to_bytes())?.scan?;
    Some((scan.generation, Totals { files: scan.files, bytes: scan.bytes }))
}

/// The sums that the coordinator of the dataset's scans knows. Whoever it is, the others do not claim to know any.
async fn totals_of(client: &Client, table: &WorkerTable, id: DatasetId) -> Option<Totals> {
    let names: Vec<String> = table.members.iter().map(|member| member.name.clone()).collect();
    let mut answers =
        futures::stream::iter(names).map(|name| totals_at(client, name, id)).buffer_unordered(ASKED_AT_ONCE);
    let mut newest: Option<(u64, Totals)> = None;
    while let Some(answer) = answers.next().await {
        if let Some((generation, totals)) = answer
            && newest.is_none_or(|(known, _)| generation >= known)
        {
            newest = Some((generation, totals));
        }
    }
    newest.map(|(_, totals)| totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_bytes_or_digits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(matches!(read_key(&path), Err(ConfigError::Key { .. })));
        let raw = [7u8; 32];
        for contents in [raw.to_vec(), hex::encode(raw).into_bytes(), format!("{}\n", hex::encode(raw)).into_bytes()] {
            fs::write(&path, contents).unwrap();
            assert_eq!(read_key(&path).unwrap().expose(), &raw);
        }
        for contents in ["", "00", &"g".repeat(64)] {
            fs::write(&path, contents).unwrap();
            assert!(read_key(&path).is_err());
        }
    }
}
