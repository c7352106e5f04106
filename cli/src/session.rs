//! Talking to a running instance: which Datasets it serves, and its workers.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bytes::Bytes;
use forebay_cache_worker::TableFile;
use forebay_client::{Client, ClientConfig, ControlClient, DatasetClient, MemoryBudget};
use forebay_protocol::{
    DatasetPath,
    table::WorkerTable,
    worker::{DatasetStatus, StatusRequest, StatusResponse},
};
use futures::future::join_all;
use tokio::sync::watch;
use tonic::{Code, transport::Channel};

use crate::{
    args::Global,
    pod,
    up::{DatasetRecord, Layout, Record, RuntimeRecord, read_key},
};

/// How long a verb waits for one answer of a worker.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A running instance, as its record describes it; or the runtime of the worker in whose pod this is.
pub struct Session {
    /// Where an instance keeps its state.
    pub layout: Option<Layout>,
    /// What it runs.
    pub record: Record,
}

/// A Dataset of the instance and the client of its runtime.
pub struct DatasetSession {
    /// What is served.
    pub record: DatasetRecord,
    /// The runtime's workers.
    pub client: Client,
    /// The Dataset.
    pub dataset: DatasetClient,
}

impl Session {
    /// Finds the running instance.
    pub fn open(global: &Global) -> anyhow::Result<Self> {
        if let Some(runtime) = &global.in_pod {
            return Ok(Self { layout: None, record: pod::record(runtime)? });
        }
        let layout = Layout::new(global.state_dir.clone())?;
        let record = layout.read_record()?;
        Ok(Self { layout: Some(layout), record })
    }

    /// A Dataset by its name, or by `NAMESPACE/NAME`.
    pub fn dataset(&self, name: &str) -> anyhow::Result<DatasetSession> {
        let record = self
            .record
            .datasets
            .iter()
            .find(|dataset| dataset.name == name || format!("{}/{}", dataset.namespace, dataset.name) == name);
        let Some(record) = record else {
            let served: Vec<&str> = self.record.datasets.iter().map(|dataset| dataset.name.as_str()).collect();
            bail!("no Dataset '{name}' is served here; there is: {}", served.join(", "));
        };
        let runtime = self.record.runtime_of(record)?;
        let client = client_of(runtime)?;
        Ok(DatasetSession { record: record.clone(), dataset: client.dataset(record.id), client })
    }
}

/// The client of a runtime.
pub fn client_of(runtime: &RuntimeRecord) -> anyhow::Result<Client> {
    let table = read_table(&runtime.table)?;
    let config = ClientConfig {
        name: "forebay".into(),
        key: read_key(&runtime.key)?,
        // Verbs read no file contents; this is for the protocol's own buffers.
        memory: MemoryBudget::new(16 << 20),
        deadline: ANSWER_DEADLINE,
        max_read_ahead: 0,
        connections_per_worker: 1,
    };
    // The table is read once: a verb is short. A closed channel keeps its last value.
    let (_, receiver) = watch::channel(Arc::new(table));
    Ok(Client::new(config, receiver))
}

/// Reads a worker table.
pub fn read_table(path: &Path) -> anyhow::Result<WorkerTable> {
    let text = std::fs::read(path).with_context(|| format!("reading the worker table {}", path.display()))?;
    // As workers know it: in a pod it says whose table it is.
    let TableFile { epoch, members, runtime_uid: _ } =
        serde_json::from_slice(&text).with_context(|| format!("reading the worker table {}", path.display()))?;
    Ok(WorkerTable { epoch, members })
}

/// A path of a Dataset as a person types it: `/a/b`, `a/b`, `/a/b/`.
pub fn dataset_path(text: &str) -> anyhow::Result<DatasetPath> {
    let trimmed = text.trim_matches('/');
    DatasetPath::parse(Bytes::from(format!("/{trimmed}"))).with_context(|| format!("'{text}' is no path"))
}

/// A worker and what it says of itself, or why it says nothing.
pub struct WorkerAnswer {
    /// Its name in the table.
    pub name: String,
    /// Its address in the table.
    pub address: String,
    /// Its status.
    pub status: Result<StatusResponse, String>,
}

/// Asks all workers of a client for their status.
pub async fn worker_status(client: &Client) -> Vec<WorkerAnswer> {
    let table = client.members();
    join_all(table.members.iter().map(|member| async {
        let status = match member_control(client, &member.name).await {
            Ok(mut control) => {
                let mut request = tonic::Request::new(StatusRequest::default());
                request.set_timeout(ANSWER_DEADLINE);
                control.status(request).await.map(tonic::Response::into_inner).map_err(|status| explain(&status))
            }
            Err(error) => Err(format!("{error:#}")),
        };
        WorkerAnswer { name: member.name.clone(), address: member.address.clone(), status }
    }))
    .await
}

/// A control connection to a member.
pub async fn member_control(client: &Client, member: &str) -> anyhow::Result<ControlClient<Channel>> {
    client.control(member).await.with_context(|| format!("worker {member}"))
}

/// What a gRPC status says to a person.
pub fn explain(status: &tonic::Status) -> String {
    match status.code() {
        Code::DeadlineExceeded => "no answer in time".into(),
        _ if status.message().is_empty() => status.code().description().into(),
        _ => status.message().into(),
    }
}

/// Sums of a Dataset over the workers that answered.
#[derive(Clone, Debug, Default)]
pub struct DatasetTotals {
    /// Sums of the counters; `scan` is the one of the highest generation.
    pub sums: DatasetStatus,
    /// Workers that serve it.
    pub workers: usize,
}

impl DatasetTotals {
    /// Adds up what workers say of one Dataset.
    pub fn of<'a>(answers: impl IntoIterator<Item = &'a DatasetStatus>) -> Self {
        let mut totals = Self::default();
        for answer in answers {
            totals.workers += 1;
            totals.add(answer);
        }
        totals
    }

    fn add(&mut self, answer: &DatasetStatus) {
        // Without `..`: a new counter must be summed here.
        let DatasetStatus {
            dataset,
            namespace,
            name,
            generation,
            cached_bytes,
            replicated_bytes,
            pinned_bytes,
            cached_chunks,
            hit_bytes,
            miss_bytes,
            store_bytes,
            store_gets,
            store_lists,
            store_heads,
            store_errors,
            store_throttled,
            evicted_bytes,
            expired_bytes,
            bypassed_bytes,
            corrupt_blocks,
            served_bytes,
            scan,
            source_problem,
            version_conflicts,
            source_problem_reason,
            volume_shape,
            runs: _,
            listing_generation: _,
        } = answer;
        let sums = &mut self.sums;
        sums.dataset.clone_from(dataset);
        sums.namespace.clone_from(namespace);
        sums.name.clone_from(name);
        sums.generation = sums.generation.max(*generation);
        sums.volume_shape = *volume_shape;
        sums.cached_bytes += cached_bytes;
        sums.replicated_bytes += replicated_bytes;
        sums.pinned_bytes += pinned_bytes;
        sums.cached_chunks += cached_chunks;
        sums.hit_bytes += hit_bytes;
        sums.miss_bytes += miss_bytes;
        sums.store_bytes += store_bytes;
        sums.store_gets += store_gets;
        sums.store_lists += store_lists;
        sums.store_heads += store_heads;
        sums.store_errors += store_errors;
        sums.store_throttled += store_throttled;
        sums.evicted_bytes += evicted_bytes;
        sums.expired_bytes += expired_bytes;
        sums.bypassed_bytes += bypassed_bytes;
        sums.corrupt_blocks += corrupt_blocks;
        sums.served_bytes += served_bytes;
        sums.version_conflicts += version_conflicts;
        if sums.source_problem.is_empty() {
            sums.source_problem.clone_from(source_problem);
            sums.source_problem_reason.clone_from(source_problem_reason);
        }
        if let Some(scan) = scan
            && sums.scan.as_ref().is_none_or(|best| (scan.generation, scan.state) > (best.generation, best.state))
        {
            sums.scan = Some(scan.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_as_typed() {
        for (text, path) in [("", "/"), ("/", "/"), ("a/b", "/a/b"), ("/a/b/", "/a/b")] {
            assert_eq!(dataset_path(text).unwrap().as_bytes(), path.as_bytes());
        }
        assert!(dataset_path("/a/../b").is_err());
    }

    #[test]
    fn totals_add_up_and_keep_the_newest_scan() {
        use forebay_protocol::worker::{ScanProgress, ScanState};
        let scan = |generation, files| ScanProgress {
            generation,
            files,
            state: ScanState::Complete.into(),
            ..ScanProgress::default()
        };
        let answers = [
            DatasetStatus { cached_bytes: 5, scan: Some(scan(1, 10)), ..DatasetStatus::default() },
            DatasetStatus { cached_bytes: 7, scan: Some(scan(2, 20)), ..DatasetStatus::default() },
        ];
        let totals = DatasetTotals::of(&answers);
        assert_eq!((totals.sums.cached_bytes, totals.workers), (12, 2));
        assert_eq!(totals.sums.scan.unwrap().files, 20);
    }
}
