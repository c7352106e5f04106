//! The client of one runtime.

use std::{
    collections::HashMap,
    sync::{Arc, Weak, atomic::AtomicU64},
    time::Duration,
};

use forebay_protocol::{DatasetId, handshake::RuntimeKey, table::WorkerTable, worker::control_client::ControlClient};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

use crate::{
    budget::{Budget, until},
    dataset::DatasetClient,
    discovery::Discovery,
    error::ClientError,
    hot::Hot,
    members::Members,
    memory::MemoryBudget,
    metrics::{ClientMetrics, Counters, MemberMetrics, load},
    reclaim::Holders,
};

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Who this is, for logs.
    pub name: String,
    /// The runtime's key.
    pub key: RuntimeKey,
    /// Memory for file contents; its own, or shared with other clients.
    pub memory: MemoryBudget,
    /// How long one read, look-up or page of a listing may take, fail-over included.
    pub deadline: Duration,
    /// Largest window ahead of one sequential reader, in bytes; 0 turns read-ahead off. 32 MiB is a good value.
    pub max_read_ahead: u64,
    /// Data connections to each worker for what readers wait for; half as many more carry read-ahead and loads.
    pub connections_per_worker: usize,
}

/// Access to the workers of one runtime. Clones share everything.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: ClientConfig,
    pub(crate) budget: Budget,
    pub(crate) members: Members,
    pub(crate) counters: Counters,
    pub(crate) hot: Hot,
    pub(crate) holders: Arc<Holders>,
    /// Highest known generation by dataset; shared by all handles of one dataset.
    generations: Mutex<HashMap<DatasetId, Weak<AtomicU64>>>,
    pub(crate) epochs: watch::Sender<u64>,
    /// Counts the times that somebody wanted to ask and no member was known to answer.
    pub(crate) stranded: watch::Sender<u64>,
    /// Why whoever feeds the table gets none; `None` when it does.
    pub(crate) table_problem: Mutex<Option<String>>,
    _closed: DropGuard,
}

impl Client {
    /// A client of the workers in `table`, which may change at any time: whoever feeds it decides which table is newer.
    /// To be called within a tokio runtime.
    pub fn new(config: ClientConfig, table: watch::Receiver<Arc<WorkerTable>>) -> Client {
        let closed = CancellationToken::new();
        let MemoryBudget { budget, holders } = config.memory.clone();
        let connections = config.connections_per_worker.max(1);
        let epoch = table.borrow().epoch;
        let inner = Arc::new(Inner {
            members: Members::new(table, config.key.clone(), budget.clone(), connections),
            config,
            budget,
            counters: Counters::default(),
            hot: Hot::default(),
            holders,
            generations: Mutex::default(),
            epochs: watch::Sender::new(epoch),
            stranded: watch::Sender::new(0),
            table_problem: Mutex::default(),
            _closed: closed.clone().drop_guard(),
        });
        tokio::spawn(follow_table(inner.members.tables(), Arc::downgrade(&inner), closed));
        Client { inner }
    }

    /// A client of the workers that are found by way of `service` (`host:port`): any of them tells the table. Nothing is
    /// asked before this returns; calls wait for a table, as for workers, until their deadline.
    pub fn of_service(config: ClientConfig, service: String) -> Client {
        let (sender, table) = watch::channel(Arc::default());
        let client = Self::new(config, table);
        tokio::spawn(Discovery::new(service, sender, &client.inner).run());
        client
    }

    /// Access to one dataset.
    pub fn dataset(&self, id: DatasetId) -> DatasetClient {
        let generation = {
            let mut generations = self.inner.generations.lock();
            generations.retain(|_, generation| generation.strong_count() > 0);
            let known = generations.get(&id).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let fresh = Arc::new(AtomicU64::new(0));
                generations.insert(id, Arc::downgrade(&fresh));
                fresh
            })
        };
        DatasetClient::new(self.inner.clone(), id, generation)
    }

    /// The newest worker table.
    pub fn members(&self) -> Arc<WorkerTable> {
        self.inner.members.snapshot().table.clone()
    }

    /// A control client of the worker of this name. The channel is shared, and reconnects when it must. Calls on it
    /// have no deadline but their own.
    pub async fn control(&self, member: &str) -> Result<ControlClient<Channel>, ClientError> {
        let snapshot = self.inner.members.snapshot();
        let Some(found) = snapshot.find(member) else {
            return Err(ClientError::Invalid(format!("no worker '{member}' in the table")));
        };
        match until(self.inner.deadline(), found.channel()).await {
            Some(Ok(channel)) => Ok(ControlClient::new(channel)),
            Some(Err(error)) => Err(ClientError::Unavailable(error.to_string())),
            None => Err(ClientError::Unavailable(format!("no answer within {:?}", self.inner.config.deadline))),
        }
    }

    /// Somebody mentioned this epoch of the worker table (a worker in its status, say).
    pub fn note_epoch(&self, epoch: u64) {
        self.inner.epochs.send_if_modified(|highest| {
            let higher = epoch > *highest;
            *highest = epoch.max(*highest);
            higher
        });
    }

    /// The highest epoch that anybody mentioned: when it is above that of [`Client::members`], whoever feeds the table
    /// reads it again.
    pub fn epochs(&self) -> watch::Receiver<u64> {
        self.inner.epochs.subscribe()
    }

    /// What was counted so far.
    pub fn metrics(&self) -> ClientMetrics {
        let inner = &self.inner;
        let snapshot = inner.members.snapshot();
        let usage = inner.budget.usage();
        // Without `..`: a new counter must be exported here.
        let Counters {
            bytes_from_workers,
            requests,
            blocks_requested,
            hit_blocks,
            miss_blocks,
            checksum_failures,
            failovers,
            retries,
            read_ahead_bytes,
            read_ahead_used_bytes,
            read_ahead_wasted_bytes,
            starved,
            metadata_calls,
        } = &inner.counters;
        ClientMetrics {
            bytes_from_workers: load(bytes_from_workers),
            requests: load(requests),
            blocks_requested: load(blocks_requested),
            hit_blocks: load(hit_blocks),
            miss_blocks: load(miss_blocks),
            checksum_failures: load(checksum_failures),
            failovers: load(failovers),
            retries: load(retries),
            read_ahead_bytes: load(read_ahead_bytes),
            read_ahead_used_bytes: load(read_ahead_used_bytes),
            read_ahead_wasted_bytes: load(read_ahead_wasted_bytes),
            starved: load(starved),
            metadata_calls: load(metadata_calls),
            budget_total: usage.total as u64,
            budget_used: usage.used as u64,
            budget_peak: usage.peak as u64,
            budget_waits: usage.waits,
            table_epoch: snapshot.table.epoch,
            highest_epoch: (*inner.epochs.borrow()).max(snapshot.table.epoch),
            members: snapshot
                .members
                .iter()
                .map(|member| {
                    let condition = member.health.condition();
                    MemberMetrics {
                        name: member.name.clone(),
                        up: !condition.down,
                        downs: condition.downs,
                        last_error: condition.error.to_string(),
                        requests: load(&member.counters.requests),
                        bytes: load(&member.counters.bytes),
                        failovers: load(&member.counters.failovers),
                        checksum_failures: load(&member.counters.checksum_failures),
                    }
                })
                .collect(),
        }
    }
}

impl Inner {
    /// When a call that begins now must have ended.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.config.deadline
    }
}

/// Closes connections to members that left, also while nobody asks for anything.
async fn follow_table(mut tables: watch::Receiver<Arc<WorkerTable>>, client: Weak<Inner>, closed: CancellationToken) {
    loop {
        tokio::select! {
            () = closed.cancelled() => return,
            changed = tables.changed() => {
                // Nobody feeds the table any more: the last one stays.
                if changed.is_err() {
                    return;
                }
                let Some(client) = client.upgrade() else { return };
                let epoch = client.members.snapshot().table.epoch;
                // Who waits for somebody to ask looks at the new table at once.
                client.members.recovered.notify_waiters();
                tracing::debug!(client = client.config.name, epoch, "worker table");
            }
        }
    }
}
