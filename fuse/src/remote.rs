//! The tree of a dataset that cache workers serve: [`Tree`] over the client library.

mod health;
mod named;
mod reader;

use std::{sync::Arc, time::Duration};

use forebay_client::{Client, ClientConfig, ClientMetrics, Event, MemoryBudget};
use forebay_keeper::Health;
use forebay_protocol::{
    DatasetId, DatasetPath, FileVersion, identity::directory_placement_key, placement::Placement, table::WorkerTable,
    worker::StatusRequest,
};
use futures::{StreamExt, stream, stream::BoxStream};

use self::named::Named;
pub use self::reader::NamedReader;
use crate::{
    config::{ConfigError, TableSource, VolumeConfig},
    daemon::Volumes,
    table_file::TableFile,
    tree::{Change, Entry, Inspection, ListPage, Totals, Tree, TreeError},
};

/// A worker that does not tell the dataset's sums in this time is not asked again until the next round.
const TOTALS_DEADLINE: Duration = Duration::from_secs(5);
/// Workers asked for sums at once.
const ASKED_AT_ONCE: usize = 16;

/// Opens the trees of volumes: a client for each, fed by the volume's table file or found by its service.
#[derive(Debug, Default)]
pub struct Workers {
    /// Memory that all volumes share; without it each has its own, as its configuration says.
    pub memory: Option<MemoryBudget>,
}

impl Volumes for Workers {
    type Tree = WorkersTree;

    fn open(&mut self, config: &VolumeConfig) -> Result<WorkersTree, ConfigError> {
        let own = || MemoryBudget::new(usize::try_from(config.budget_bytes).unwrap_or(usize::MAX));
        let client_config = ClientConfig {
            name: config.name.clone(),
            key: config.key.load()?,
            memory: self.memory.clone().unwrap_or_else(own),
            deadline: config.deadline(),
            max_read_ahead: config.max_read_ahead_bytes,
            connections_per_worker: config.connections_per_worker as usize,
        };
        let client = match &config.table {
            TableSource::Service(service) => Client::of_service(client_config, service.clone()),
            TableSource::File(path) => {
                let (file, table) = TableFile::open(path);
                // It ends when the client, which holds the receiver, is gone.
                tokio::spawn(file.watch());
                Client::new(client_config, table)
            }
        };
        let dataset = Named::new(&client, &config.dataset, &config.name, config.deadline());
        // Connects to the owner of the root while nobody waits for it. What it answers does not matter.
        tokio::spawn({
            let dataset = dataset.clone();
            async move {
                if let Ok(dataset) = dataset.wait().await {
                    let _ = dataset.list(&DatasetPath::root(), b"", 1).await;
                }
            }
        });
        Ok(WorkersTree { client, dataset, name: config.name.clone() })
    }

    fn metrics(tree: &WorkersTree) -> Option<ClientMetrics> {
        Some(tree.client.metrics())
    }
}

/// The tree.
#[derive(Clone)]
pub struct WorkersTree {
    client: Client,
    dataset: Named,
    /// For messages.
    name: String,
}

impl Tree for WorkersTree {
    type Reader = NamedReader;

    async fn lookup(&self, directory: &DatasetPath, name: &[u8]) -> Result<Entry, TreeError> {
        self.dataset.wait().await?.lookup(directory, name).await
    }

    async fn list(&self, directory: &DatasetPath, after: &[u8], limit: u32) -> Result<ListPage, TreeError> {
        self.dataset.wait().await?.list(directory, after, limit).await
    }

    fn open(&self, path: DatasetPath, version: FileVersion) -> Arc<NamedReader> {
        Arc::new(NamedReader::new(self.dataset.clone(), path, version))
    }

    async fn inspect(&self, path: &DatasetPath, version: &FileVersion) -> Result<Inspection, TreeError> {
        self.dataset.wait().await?.inspect(path, version).await
    }

    fn directory_owner(&self, path: &DatasetPath) -> Option<String> {
        let table = self.client.members();
        let owner = Placement::new(&table).owner(directory_placement_key(self.dataset.id()?, path))?;
        Some(table.members.get(owner)?.name.clone())
    }

    fn changes(&self) -> BoxStream<'static, Change> {
        let change = |event| match event {
            Event::Changed { directory, names } => Change::Names { directory, names },
            Event::Reset => Change::Everything,
        };
        let dataset = self.dataset.clone();
        let found = stream::once(async move {
            loop {
                // An error only says that its deadline passed.
                if let Ok(dataset) = dataset.wait().await {
                    return dataset.watch();
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        found.flatten().map(change).boxed()
    }

    async fn totals(&self) -> Option<Totals> {
        let table = self.client.members();
        let ask = totals_of(&self.client, &table, self.dataset.id()?);
        tokio::time::timeout(TOTALS_DEADLINE * 2, ask).await.ok()?
    }

    fn health(&self) -> BoxStream<'static, Health> {
        health::follow(self.client.clone(), self.dataset.clone(), self.name.clone()).boxed()
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
