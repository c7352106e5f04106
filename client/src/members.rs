//! The members of the current worker table.
//!
//! The table arrives on a watch channel and is looked at before every use, so a new table counts from the next attempt
//! on; a task closes the connections to members that left even when nothing is asked. A member keeps its connections
//! and health for as long as its name and address stay.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use forebay_protocol::{
    errors::chain,
    handshake::RuntimeKey,
    placement::Placement,
    table::{MemberState, WorkerTable},
};
use parking_lot::RwLock;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{budget::Budget, health::Health, pool::Pool, transport};

/// Members of one key's order that are tried at most. The keys' orders differ, so a dead rack is spread over many.
const ORDER: usize = 16;

/// What is counted for each member.
#[derive(Debug, Default)]
pub(crate) struct MemberCounters {
    pub(crate) requests: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) failovers: AtomicU64,
    pub(crate) checksum_failures: AtomicU64,
}

pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) health: Arc<Health>,
    pub(crate) pool: Pool,
    pub(crate) counters: Arc<MemberCounters>,
    pub(crate) closed: CancellationToken,
    key: RuntimeKey,
    control: tokio::sync::Mutex<Option<Channel>>,
}

impl Member {
    /// The gRPC channel, connected when it is first asked for.
    pub(crate) async fn channel(&self) -> Result<Channel, Arc<str>> {
        let downs = self.health.condition().downs;
        let mut control = self.control.lock().await;
        if let Some(channel) = &*control {
            return Ok(channel.clone());
        }
        let condition = self.health.condition();
        if condition.downs > downs {
            return Err(condition.error);
        }
        match transport::channel(&self.address, &self.key).await {
            Ok(channel) => {
                *control = Some(channel.clone());
                Ok(channel)
            }
            Err(error) => {
                let text: Arc<str> = chain(&error).into();
                self.health.mark_down(&text);
                Err(text)
            }
        }
    }
}

impl Member {
    /// It answered a call with this; gives the text. What the transport says, rather than the worker, marks it as down.
    pub(crate) fn refused(&self, status: &tonic::Status) -> String {
        let text = chain(status);
        if std::error::Error::source(status).is_some() {
            self.health.mark_down(&text);
        }
        text
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// One version of the table.
pub(crate) struct Snapshot {
    pub(crate) table: Arc<WorkerTable>,
    placement: Placement,
    /// As in the table.
    pub(crate) members: Vec<Arc<Member>>,
}

impl Snapshot {
    /// Whom to ask for `key`, best first. Draining members come last: they own nothing but serve what they hold.
    pub(crate) fn order(&self, key: u64) -> Vec<Arc<Member>> {
        let draining =
            self.table.members.iter().zip(&self.members).filter(|(entry, _)| entry.state == MemberState::Draining);
        self.placement
            .order(key, ORDER)
            .into_iter()
            .filter_map(|index| self.members.get(index))
            .chain(draining.map(|(_, member)| member))
            .take(ORDER)
            .cloned()
            .collect()
    }

    /// The owner of `key`.
    pub(crate) fn owner(&self, key: u64) -> Option<&Arc<Member>> {
        self.members.get(self.placement.owner(key)?)
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Arc<Member>> {
        self.members.iter().find(|member| member.name == name)
    }
}

pub(crate) struct Members {
    table: watch::Receiver<Arc<WorkerTable>>,
    current: RwLock<Arc<Snapshot>>,
    key: RuntimeKey,
    budget: Budget,
    connections: usize,
    /// Woken when a member that was down comes up, and when the table changes.
    pub(crate) recovered: Arc<Notify>,
}

impl Members {
    pub(crate) fn new(
        table: watch::Receiver<Arc<WorkerTable>>,
        key: RuntimeKey,
        budget: Budget,
        connections: usize,
    ) -> Self {
        let empty = Snapshot { table: Arc::default(), placement: Placement::default(), members: Vec::new() };
        let members = Self {
            table,
            current: RwLock::new(Arc::new(empty)),
            key,
            budget,
            connections,
            recovered: Arc::new(Notify::new()),
        };
        members.adopt();
        members
    }

    /// The members of the newest table.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        let current = self.current.read().clone();
        if Arc::ptr_eq(&*self.table.borrow(), &current.table) { current } else { self.adopt() }
    }

    /// A receiver of tables, for whoever wants to know of changes.
    pub(crate) fn tables(&self) -> watch::Receiver<Arc<WorkerTable>> {
        self.table.clone()
    }

    fn adopt(&self) -> Arc<Snapshot> {
        let mut current = self.current.write();
        // Looked at under the lock: nobody puts an older one in place of what another one just adopted.
        let table = self.table.borrow().clone();
        if Arc::ptr_eq(&table, &current.table) {
            return current.clone();
        }
        let mut known: HashMap<&str, &Arc<Member>> =
            current.members.iter().map(|member| (member.name.as_str(), member)).collect();
        let members = table
            .members
            .iter()
            .map(|entry| match known.remove(entry.name.as_str()) {
                Some(member) if member.address == entry.address => member.clone(),
                other => self.member(&entry.name, &entry.address, other),
            })
            .collect();
        let next = Arc::new(Snapshot { placement: Placement::new(&table), table, members });
        for gone in &current.members {
            if !next.members.iter().any(|member| Arc::ptr_eq(member, gone)) {
                gone.closed.cancel();
            }
        }
        *current = next.clone();
        next
    }

    /// A new member; one that moved keeps its counters.
    fn member(&self, name: &str, address: &str, before: Option<&Arc<Member>>) -> Arc<Member> {
        let closed = CancellationToken::new();
        let health = Health::new(address.to_owned(), self.key.clone(), closed.clone(), self.recovered.clone());
        Arc::new(Member {
            name: name.to_owned(),
            address: address.to_owned(),
            pool: Pool::new(
                address.to_owned(),
                self.key.clone(),
                self.budget.clone(),
                health.clone(),
                closed.clone(),
                self.connections,
            ),
            health,
            counters: before.map(|member| member.counters.clone()).unwrap_or_default(),
            closed,
            key: self.key.clone(),
            control: tokio::sync::Mutex::new(None),
        })
    }
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
