//! Who the workers are, who owns what, and gRPC channels to the others.

use std::{collections::HashMap, sync::Arc, time::Duration};

use forebay_client::{ControlClient, MetadataClient, transport};
use forebay_protocol::{
    DatasetId, DatasetPath,
    handshake::RuntimeKey,
    identity::directory_placement_key,
    placement::Placement,
    table::{Member, MemberState, WorkerTable},
    worker::TableResponse,
};
use parking_lot::{Mutex, RwLock};
use tokio::{sync::watch, time::timeout};
use tonic::{Status, transport::Channel};

/// How long a connection to another worker may take, its handshake included.
const CONNECT: Duration = Duration::from_secs(3);
/// Owners of a key that are asked until one answers, before the asking worker does it itself.
const CANDIDATES: usize = 3;

struct Placed {
    table: Arc<WorkerTable>,
    /// UID of the runtime whose table it is; empty outside a cluster.
    runtime: String,
    placement: Placement,
}

/// The table in force.
pub(crate) struct Members {
    own_name: String,
    key: RuntimeKey,
    table: watch::Sender<Arc<WorkerTable>>,
    placed: RwLock<Arc<Placed>>,
    /// By address. tonic's channels connect again by themselves.
    channels: Mutex<HashMap<String, Channel>>,
}

impl Members {
    pub(crate) fn new(own_name: String, key: RuntimeKey, table: WorkerTable, runtime: String) -> Self {
        let table = Arc::new(table);
        let placed = Placed { table: table.clone(), runtime, placement: Placement::new(&table) };
        Self {
            own_name,
            key,
            table: watch::Sender::new(table),
            placed: RwLock::new(Arc::new(placed)),
            channels: Mutex::default(),
        }
    }

    /// A new table; an older one of the same runtime is ignored.
    pub(crate) fn set(&self, table: WorkerTable, runtime: String) {
        let table = Arc::new(table);
        {
            let mut placed = self.placed.write();
            if runtime == placed.runtime && table.epoch < placed.table.epoch {
                return;
            }
            *placed = Arc::new(Placed { table: table.clone(), runtime, placement: Placement::new(&table) });
        }
        self.channels.lock().retain(|address, _| table.members.iter().any(|member| member.address == *address));
        self.table.send_replace(table);
    }

    pub(crate) fn table(&self) -> Arc<WorkerTable> {
        self.placed.read().table.clone()
    }

    /// The table as clients get it.
    pub(crate) fn to_wire(&self) -> TableResponse {
        let placed = self.placed.read().clone();
        placed.table.to_wire(&placed.runtime)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<WorkerTable>> {
        self.table.subscribe()
    }

    pub(crate) fn is_self(&self, member: &Member) -> bool {
        member.name == self.own_name
    }

    /// Whether the table names this worker.
    pub(crate) fn has_self(&self) -> bool {
        self.table().members.iter().any(|member| self.is_self(member))
    }

    /// Whether the table gives this worker a share of the data.
    pub(crate) fn counts_on_self(&self) -> bool {
        let serves = |member: &Member| self.is_self(member) && member.state == MemberState::Serving;
        self.table().members.iter().any(serves)
    }

    /// The part of the data that this worker has, by the table: all of it while nobody serves.
    pub(crate) fn part(&self) -> f64 {
        let table = self.table();
        let serving = || table.members.iter().filter(|member| member.state == MemberState::Serving);
        let weight = |members: &mut dyn Iterator<Item = &Member>| members.map(|member| f64::from(member.weight)).sum();
        let (mine, all): (f64, f64) =
            (weight(&mut serving().filter(|member| self.is_self(member))), weight(&mut serving()));
        if all > 0.0 { mine / all } else { 1.0 }
    }

    /// All members but this one.
    pub(crate) fn others(&self) -> Vec<Member> {
        self.table().members.iter().filter(|member| !self.is_self(member)).cloned().collect()
    }

    /// The order of preference for a key; empty while the table is.
    pub(crate) fn order(&self, key: u64, limit: usize) -> Vec<Member> {
        let placed = self.placed.read().clone();
        placed.placement.order(key, limit).into_iter().map(|index| placed.table.members[index].clone()).collect()
    }

    /// This worker's place in the order of preference for a key, if it is one of the first `limit`; the first while the
    /// table is empty.
    pub(crate) fn place(&self, key: u64, limit: usize) -> Option<usize> {
        let placed = self.placed.read().clone();
        let order = placed.placement.order(key, limit);
        let place = order.iter().position(|index| self.is_self(&placed.table.members[*index]));
        if order.is_empty() { Some(0) } else { place }
    }

    /// Who is asked about a directory: its owner and the next in order; this worker last, if it is none of them.
    pub(crate) fn directory_order(&self, dataset: DatasetId, directory: &DatasetPath) -> Vec<Candidate> {
        let mut order: Vec<Candidate> = self
            .order(directory_placement_key(dataset, directory), CANDIDATES)
            .into_iter()
            .map(|member| if self.is_self(&member) { Candidate::Here } else { Candidate::There(member) })
            .collect();
        if !order.iter().any(|candidate| matches!(candidate, Candidate::Here)) {
            order.push(Candidate::Here);
        }
        order
    }

    /// Whether this worker owns a key. While the table has no members, everybody does.
    pub(crate) fn owns(&self, key: u64) -> bool {
        let placed = self.placed.read().clone();
        placed.placement.owner(key).is_none_or(|index| self.is_self(&placed.table.members[index]))
    }

    pub(crate) async fn metadata(&self, member: &Member) -> Result<MetadataClient<Channel>, Status> {
        Ok(MetadataClient::new(self.channel(member).await?))
    }

    pub(crate) async fn control(&self, member: &Member) -> Result<ControlClient<Channel>, Status> {
        Ok(ControlClient::new(self.channel(member).await?))
    }

    async fn channel(&self, member: &Member) -> Result<Channel, Status> {
        if let Some(channel) = self.channels.lock().get(&member.address) {
            return Ok(channel.clone());
        }
        let unreachable = |why: String| Status::unavailable(format!("worker {}: {why}", member.name));
        let channel = timeout(CONNECT, transport::channel(&member.address, &self.key))
            .await
            .map_err(|_| unreachable(format!("no answer within {CONNECT:?}")))?
            .map_err(|error| unreachable(error.to_string()))?;
        let mut channels = self.channels.lock();
        // Two that connected at once share the first's.
        Ok(channels.entry(member.address.clone()).or_insert(channel).clone())
    }
}

/// Who may answer.
#[derive(Debug, Clone)]
pub(crate) enum Candidate {
    /// This worker.
    Here,
    /// Another one.
    There(Member),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(epoch: u64, names: &[&str]) -> WorkerTable {
        let member = |name: &&str| Member {
            name: (*name).to_owned(),
            address: format!("{name}:1"),
            weight: 1,
            state: MemberState::Serving,
        };
        WorkerTable { epoch, members: names.iter().map(member).collect() }
    }

    #[test]
    fn a_worker_always_is_a_candidate_and_old_tables_are_ignored() {
        let members = Members::new("w".into(), RuntimeKey::generate(), table(1, &[]), "u".into());
        let root = DatasetPath::root();
        let id = DatasetId::local("n", "d");
        assert!(members.owns(7));
        assert!(matches!(members.directory_order(id, &root)[..], [Candidate::Here]));
        members.set(table(3, &["a", "b", "c", "d"]), "u".into());
        assert!(!members.owns(7));
        let order = members.directory_order(id, &root);
        assert_eq!(order.len(), 4);
        assert!(matches!(order[3], Candidate::Here));
        members.set(table(2, &["w"]), "u".into());
        assert_eq!(members.table().epoch, 3);
        members.set(table(4, &["w"]), "u".into());
        assert!(members.owns(7) && members.counts_on_self());
        assert!(members.others().is_empty());
        // A runtime that was made again begins anew.
        members.set(table(1, &["a"]), "v".into());
        assert_eq!((members.to_wire().epoch, members.to_wire().runtime_uid.as_str()), (1, "v"));
        assert!(!members.counts_on_self());
    }
}
