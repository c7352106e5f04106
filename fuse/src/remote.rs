//! The tree of a dataset that cache workers serve: [`Tree`] over the client library.

mod health;
mod named;
mod reader;

use std::{sync::Arc, time::Duration};

use forebay_client::{Client, ClientConfig, ClientMetrics, Event, MemoryBudget};
use forebay_keeper::{Health, tables::Shape};
use forebay_protocol::{
    DatasetId, DatasetPath, FileVersion,
    identity::directory_placement_key,
    placement::Placement,
    worker::{DatasetStatus, ScanProgress, ScanState, StatusRequest, VolumeShape},
};
use futures::{StreamExt, future, stream, stream::BoxStream};

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
/// When there was no answer at all, the next question.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Files of fewer bytes on the average make a mount for small ones.
const SMALL_FILES: u64 = 1 << 20;
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

    async fn dataset(&self) -> Option<DatasetId> {
        loop {
            // An error only says that its deadline passed.
            if let Ok(dataset) = self.dataset.wait().await {
                return Some(dataset.id());
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
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
        let ask = statuses(&self.client, self.dataset.id()?);
        let statuses = tokio::time::timeout(TOTALS_DEADLINE * 2, ask).await.ok()?;
        newest_scan(&statuses).map(|scan| Totals {
            files: scan.files,
            bytes: scan.bytes,
            revision: (scan.state() == ScanState::Complete).then_some(scan.digest),
        })
    }

    async fn shape(&self) -> Option<Shape> {
        loop {
            if self.dataset.wait().await.is_ok()
                && let Some(id) = self.dataset.id()
                && let Some(shape) = shape_of(&statuses(&self.client, id).await)
            {
                return Some(shape);
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    fn health(&self) -> BoxStream<'static, Health> {
        health::follow(self.client.clone(), self.dataset.clone(), self.name.clone()).boxed()
    }
}

async fn status_at(client: &Client, member: String, id: DatasetId) -> Option<DatasetStatus> {
    let mut control = client.control(&member).await.ok()?;
    let request = StatusRequest { dataset: id.to_bytes() };
    let status = tokio::time::timeout(TOTALS_DEADLINE, control.status(request)).await.ok()?.ok()?.into_inner();
    status.datasets.into_iter().find(|dataset| dataset.dataset == id.to_bytes())
}

/// What the members say of a dataset.
async fn statuses(client: &Client, id: DatasetId) -> Vec<DatasetStatus> {
    let names: Vec<String> = client.members().members.iter().map(|member| member.name.clone()).collect();
    let asked = stream::iter(names).map(|name| status_at(client, name, id)).buffer_unordered(ASKED_AT_ONCE);
    asked.filter_map(future::ready).collect().await
}

/// What the coordinator of the dataset's scans knows. Whoever it is, the others do not claim to know anything.
fn newest_scan(statuses: &[DatasetStatus]) -> Option<&ScanProgress> {
    statuses.iter().filter_map(|status| status.scan.as_ref()).max_by_key(|scan| scan.generation)
}

/// The shape that its Dataset wants, or that suits the files that were counted.
fn shape_of(statuses: &[DatasetStatus]) -> Option<Shape> {
    // An edit reaches one worker a moment before another: any answer is as good.
    match statuses.first()?.volume_shape() {
        VolumeShape::Large => return Some(Shape::Large),
        VolumeShape::Small => return Some(Shape::Small),
        VolumeShape::Unspecified | VolumeShape::Auto => {}
    }
    let small = newest_scan(statuses).is_some_and(|scan| {
        scan.state() == ScanState::Complete && scan.files > 0 && scan.bytes / scan.files < SMALL_FILES
    });
    Some(if small { Shape::Small } else { Shape::Large })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_suits_many_small_files_that_were_counted() {
        let scan = |state: ScanState, generation, files, bytes| {
            let mut scan = ScanProgress { generation, files, bytes, ..ScanProgress::default() };
            scan.set_state(state);
            DatasetStatus { scan: Some(scan), ..DatasetStatus::default() }
        };
        let wants = |shape, status: DatasetStatus| {
            let mut status = DatasetStatus { ..status };
            status.set_volume_shape(shape);
            status
        };
        assert_eq!(shape_of(&[]), None);
        assert_eq!(shape_of(&[DatasetStatus::default()]), Some(Shape::Large), "nobody has counted");
        let small = scan(ScanState::Complete, 2, 1000, 1000 * (SMALL_FILES - 1));
        assert_eq!(shape_of(&[DatasetStatus::default(), small.clone()]), Some(Shape::Small));
        assert_eq!(shape_of(&[wants(VolumeShape::Large, small.clone())]), Some(Shape::Large));
        assert_eq!(shape_of(&[scan(ScanState::Running, 2, 1000, 1000)]), Some(Shape::Large));
        assert_eq!(shape_of(&[scan(ScanState::Complete, 1, 0, 0)]), Some(Shape::Large), "there is nothing");
        let large = scan(ScanState::Complete, 3, 1000, 1000 * SMALL_FILES);
        assert_eq!(shape_of(&[small, large.clone()]), Some(Shape::Large), "the newest counts");
        assert_eq!(shape_of(&[wants(VolumeShape::Small, large)]), Some(Shape::Small));
    }
}
