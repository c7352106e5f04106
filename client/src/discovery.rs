//! The worker table by way of a service: a name that resolves to some workers, any of which tells who all of them are.
//!
//! Members of the table in force are asked first, over the connections that the client has to them; the name is resolved
//! when none of them answers. A table is taken when its epoch is higher than that in force. Epochs are compared within
//! one runtime: one that was deleted and made again has another UID and begins anew. Its table is taken from a worker
//! that the name leads to (a known address may be anybody's by now), and what was left is never taken up again.
//!
//! The table is asked for every 10 s; within a second when somebody mentioned a higher epoch, or found no member that
//! answers; and about once per second while there is no member at all. The last table stays in force whatever happens.
//!
//! Not handled: an answer that never comes from the resolver holds a thread of the runtime's blocking pool, one for each
//! client, until the resolver gives up.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_protocol::{
    errors::chain,
    handshake::RuntimeKey,
    table::WorkerTable,
    worker::{TableRequest, TableResponse},
};
use futures::{FutureExt, StreamExt, future::BoxFuture};
use rand::seq::SliceRandom;
use tokio::{sync::watch, task::JoinHandle, time::Instant};

use crate::{ControlClient, client::Inner, members::Member, transport};

/// How often the table is asked for, give or take a quarter.
const INTERVAL: Duration = Duration::from_secs(10);
/// The same while nobody is in it, and the least time between two rounds.
const SOON: Duration = Duration::from_secs(1);
/// How long the resolver may take.
const RESOLVE: Duration = Duration::from_secs(3);
/// How long a worker may take: connect and handshake (1 s + 2 s at most), and the answer.
const ANSWER: Duration = Duration::from_secs(3);
/// Members, or addresses, that are asked in one round.
const CANDIDATES: usize = 8;
/// Of these, at once.
const AT_ONCE: usize = 4;
/// Runtimes that were left and are remembered.
const RETIRED: usize = 8;

pub(crate) struct Discovery {
    service: String,
    client: Weak<Inner>,
    table: watch::Sender<Arc<WorkerTable>>,
    epochs: watch::Receiver<u64>,
    stranded: watch::Receiver<u64>,
    rule: Rule,
    /// A question to the resolver that was not answered in time.
    lookup: Option<JoinHandle<io::Result<Vec<SocketAddr>>>>,
}

/// What one candidate says.
type Answer = BoxFuture<'static, Result<TableResponse, String>>;

impl Discovery {
    pub(crate) fn new(service: String, table: watch::Sender<Arc<WorkerTable>>, client: &Arc<Inner>) -> Self {
        Self {
            service,
            client: Arc::downgrade(client),
            table,
            epochs: client.epochs.subscribe(),
            stranded: client.stranded.subscribe(),
            rule: Rule::default(),
            lookup: None,
        }
    }

    /// Runs until the client is gone.
    pub(crate) async fn run(mut self) {
        loop {
            let began = Instant::now();
            let Some(client) = self.client.upgrade() else { return };
            let round = self.round(&client).await;
            self.tell(&client, round.err());
            drop(client);
            let usual = if self.table.borrow().members.is_empty() { SOON } else { INTERVAL };
            let usual = usual.mul_f64(0.75 + rand::random::<f64>() / 2.0);
            tokio::select! {
                () = tokio::time::sleep_until(began + usual) => {}
                gone = self.wanted() => match gone {
                    Ok(()) => tokio::time::sleep_until(began + SOON).await,
                    Err(_) => return,
                },
            }
        }
    }

    /// Resolves when there is a reason to ask now; an error when the client is gone.
    async fn wanted(&mut self) -> Result<(), watch::error::RecvError> {
        let epoch = self.table.borrow().epoch;
        let higher = async {
            // Each mention counts once: what nobody can tell is not asked for without end.
            while self.epochs.changed().await.is_ok() {
                if *self.epochs.borrow_and_update() > epoch {
                    return Ok(());
                }
            }
            // The client is gone; so say the others.
            std::future::pending().await
        };
        tokio::select! {
            higher = higher => higher,
            stranded = self.stranded.changed() => stranded,
        }
    }

    /// Says when it begins and when it ends; in between the reasons may change every second.
    fn tell(&self, client: &Inner, problem: Option<String>) {
        let (name, service) = (&client.config.name, &self.service);
        let before = std::mem::replace(&mut *client.table_problem.lock(), problem.clone());
        match (before, problem) {
            (None, Some(problem)) => {
                tracing::warn!(client = name, service, problem, "no worker tells the worker table")
            }
            (Some(_), Some(problem)) => tracing::debug!(client = name, service, problem, "still no worker table"),
            (Some(_), None) => tracing::info!(client = name, service, "the worker table is told again"),
            (None, None) => {}
        }
    }

    /// Asks until somebody tells what is wanted.
    async fn round(&mut self, client: &Arc<Inner>) -> Result<(), String> {
        // Marked as seen: what is mentioned from here on asks again.
        let wanted = *self.epochs.borrow_and_update();
        self.stranded.mark_unchanged();
        let snapshot = client.members.snapshot();
        // Those that are down are probed already, and are asked again when they are up.
        let members = sample(snapshot.members.iter().filter(|member| !member.health.is_down()).cloned().collect());
        let known = members.into_iter().map(|member| ask_member(member).boxed()).collect();
        if let Ok(Heard::Ours) = self.ask(client, known, wanted, false).await {
            return Ok(());
        }
        let addresses = sample(self.resolve().await?);
        let resolved = addresses.into_iter().map(|address| ask_address(address, client.config.key.clone()).boxed());
        match self.ask(client, resolved.collect(), wanted, true).await? {
            Heard::Ours => Ok(()),
            Heard::Others => Err(format!("{} leads to workers of a runtime that is gone", self.service)),
        }
    }

    /// Asks candidates until one tells the epoch that is wanted, else takes the highest. An error when nobody answers.
    async fn ask(
        &mut self,
        client: &Inner,
        candidates: Vec<Answer>,
        wanted: u64,
        by_name: bool,
    ) -> Result<Heard, String> {
        let mut answers = futures::stream::iter(candidates).buffer_unordered(AT_ONCE);
        let mut heard: Option<Heard> = None;
        let mut problem = format!("{} leads to nobody", self.service);
        while let Some(answer) = answers.next().await {
            let checked = answer.and_then(|table| WorkerTable::from_wire(table).map_err(|error| error.to_string()));
            let (table, runtime) = match checked {
                Ok(told) => told,
                Err(error) => {
                    problem = error;
                    continue;
                }
            };
            let current = self.table.borrow().epoch;
            match self.rule.judge(current, &table, &runtime, by_name) {
                Verdict::Other => {
                    heard.get_or_insert(Heard::Others);
                    continue;
                }
                Verdict::Known => {}
                Verdict::Newer => self.adopt(table),
                Verdict::Successor => {
                    tracing::warn!(service = self.service, runtime, "the runtime was made anew");
                    // Epochs begin anew: what was mentioned before means nothing.
                    client.epochs.send_replace(table.epoch);
                    self.epochs.mark_unchanged();
                    self.adopt(table);
                    return Ok(Heard::Ours);
                }
            }
            heard = Some(Heard::Ours);
            let now = self.table.borrow();
            if now.epoch >= wanted && !now.members.is_empty() {
                return Ok(Heard::Ours);
            }
        }
        heard.ok_or(problem)
    }

    fn adopt(&self, table: WorkerTable) {
        tracing::info!(service = self.service, epoch = table.epoch, members = table.members.len(), "worker table");
        self.table.send_replace(Arc::new(table));
    }

    /// The addresses behind the name. There is one question at a time: one that is late is waited for in later rounds.
    async fn resolve(&mut self) -> Result<Vec<SocketAddr>, String> {
        let service = self.service.clone();
        let lookup = self
            .lookup
            .get_or_insert_with(|| tokio::spawn(async move { Ok(tokio::net::lookup_host(service).await?.collect()) }));
        let failed = |error: &dyn std::fmt::Display| format!("{} cannot be resolved: {error}", self.service);
        let Ok(answer) = tokio::time::timeout(RESOLVE, lookup).await else {
            return Err(failed(&format_args!("no answer within {RESOLVE:?}")));
        };
        self.lookup = None;
        match answer {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(error)) => Err(failed(&error)),
            Err(error) => Err(failed(&error)),
        }
    }
}

/// Whose answers were heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// Of the runtime in force.
    Ours,
    /// Of another one only.
    Others,
}

/// Which tables are taken.
#[derive(Debug, Default)]
struct Rule {
    /// UID of the runtime in force; "" while none was told.
    runtime: String,
    /// UIDs that were in force before.
    retired: VecDeque<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Of the runtime in force, and not newer.
    Known,
    /// Of the runtime in force, and newer.
    Newer,
    /// The first of another runtime.
    Successor,
    /// Of another runtime, and not to be taken.
    Other,
}

impl Rule {
    /// Judges a table; `by_name`: the name led to whoever told it.
    fn judge(&mut self, epoch: u64, table: &WorkerTable, runtime: &str, by_name: bool) -> Verdict {
        if !runtime.is_empty() && self.runtime != runtime {
            if !self.runtime.is_empty() {
                // A worker that was just started knows no table yet.
                if !by_name || table.members.is_empty() || self.retired.iter().any(|retired| retired == runtime) {
                    return Verdict::Other;
                }
                self.retired.truncate(RETIRED - 1);
                self.retired.push_front(std::mem::replace(&mut self.runtime, runtime.to_owned()));
                return Verdict::Successor;
            }
            runtime.clone_into(&mut self.runtime);
        }
        if table.epoch > epoch { Verdict::Newer } else { Verdict::Known }
    }
}

/// A few of them, at random.
fn sample<T>(mut all: Vec<T>) -> Vec<T> {
    all.shuffle(&mut rand::rng());
    all.truncate(CANDIDATES);
    all
}

async fn ask_member(member: Arc<Member>) -> Result<TableResponse, String> {
    let asking = async {
        let channel = member.channel().await.map_err(|error| error.to_string())?;
        let answer = ControlClient::new(channel).table(TableRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| member.refused(&status))
    };
    let answer = tokio::time::timeout(ANSWER, asking).await;
    answer
        .unwrap_or_else(|_| Err(format!("no answer within {ANSWER:?}")))
        .map_err(|error| format!("worker {}: {error}", member.name))
}

async fn ask_address(address: SocketAddr, key: RuntimeKey) -> Result<TableResponse, String> {
    let asking = async {
        let channel = transport::channel(&address.to_string(), &key).await.map_err(|error| chain(&error))?;
        let answer = ControlClient::new(channel).table(TableRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| chain(&status))
    };
    let answer = tokio::time::timeout(ANSWER, asking).await;
    answer
        .unwrap_or_else(|_| Err(format!("no answer within {ANSWER:?}")))
        .map_err(|error| format!("{address}: {error}"))
}

#[cfg(test)]
mod tests {
    use forebay_protocol::table::{Member, MemberState};

    use super::*;

    fn table(epoch: u64) -> WorkerTable {
        let member = Member { name: "w".into(), address: "w:1".into(), weight: 1, state: MemberState::Serving };
        WorkerTable { epoch, members: vec![member] }
    }

    #[test]
    fn epochs_count_within_one_runtime() {
        let mut rule = Rule::default();
        assert_eq!(rule.judge(0, &table(5), "", false), Verdict::Newer);
        assert_eq!(rule.judge(5, &table(6), "a", true), Verdict::Newer, "the first that names its runtime");
        assert_eq!(rule.judge(6, &table(6), "a", false), Verdict::Known);
        assert_eq!(rule.judge(6, &table(4), "a", true), Verdict::Known, "older");
        assert_eq!(rule.judge(6, &table(7), "", false), Verdict::Newer, "one that does not know its runtime");

        assert_eq!(rule.judge(7, &table(9), "b", false), Verdict::Other, "at a known address");
        assert_eq!(rule.judge(7, &WorkerTable::default(), "b", true), Verdict::Other, "empty");
        assert_eq!(rule.judge(7, &table(1), "b", true), Verdict::Successor);
        assert_eq!(rule.judge(1, &table(8), "a", true), Verdict::Other, "what was left is not taken up again");
        assert_eq!(rule.judge(1, &table(2), "b", false), Verdict::Newer);
    }
}
