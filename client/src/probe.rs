//! How the workers are: some of them are asked for their status, in the background.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_protocol::{
    DatasetId,
    table::MemberState,
    worker::{StatusRequest, StatusResponse},
};
use futures::StreamExt;
use rand::seq::SliceRandom;
use tonic::Code;

use crate::{ControlClient, client::Client, members::Member};

/// Members that are asked in one round at most: the same load for a worker whatever the size of the runtime.
const SAMPLE: usize = 8;
/// How long a member may take: a connect, a handshake (1 s + 2 s at most, both milliseconds as a rule) and the answer.
const ANSWER: Duration = Duration::from_secs(3);

/// What one round showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probe {
    /// Members of the table that own something.
    pub serving: usize,
    /// Those who were asked, and all others that are known not to answer.
    pub members: Vec<ProbedMember>,
    /// Why there is no newer worker table; `None` when there is no reason to doubt the one in force.
    pub table_problem: Option<String>,
}

/// A member, and what it said.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbedMember {
    /// Its name.
    pub name: String,
    /// It is about to leave: its silence is no loss.
    pub draining: bool,
    /// Its status; `None` when it does not serve the dataset that was asked about; or why it does not answer.
    pub answer: Result<Option<StatusResponse>, String>,
}

impl Client {
    /// Asks at most eight members at random about a dataset, and notes the epochs that they tell. It ends within 3 s.
    pub async fn probe(&self, dataset: DatasetId) -> Probe {
        let snapshot = self.inner.members.snapshot();
        let entries = snapshot.table.members.iter().zip(&snapshot.members);
        let all = entries.map(|(entry, member)| (entry.state == MemberState::Draining, member.clone()));
        let (down, mut up): (Vec<_>, Vec<_>) = all.partition(|(_, member)| member.health.is_down());
        let serving = snapshot.table.members.iter().filter(|member| member.state == MemberState::Serving).count();
        up.shuffle(&mut rand::rng());
        up.truncate(SAMPLE);
        let asked = up.into_iter().map(|(draining, member)| async move {
            let answer = self.status_of(&member, dataset.to_bytes()).await;
            ProbedMember { name: member.name.clone(), draining, answer }
        });
        let mut members: Vec<ProbedMember> = futures::stream::iter(asked).buffer_unordered(SAMPLE).collect().await;
        // Their own probes bring them back.
        members.extend(down.into_iter().map(|(draining, member)| ProbedMember {
            name: member.name.clone(),
            draining,
            answer: Err(member.health.condition().error.to_string()),
        }));
        let table_problem = self.inner.table_problem.lock().clone();
        Probe { serving, members, table_problem }
    }

    /// The dataset of this name, if one of at most eight members knows it.
    pub async fn find_dataset(&self, namespace: &str, name: &str) -> Option<DatasetId> {
        let snapshot = self.inner.members.snapshot();
        let mut members = snapshot.members.clone();
        members.shuffle(&mut rand::rng());
        members.sort_by_key(|member| member.health.is_down());
        members.truncate(SAMPLE);
        let asked = members.into_iter().map(|member| async move { self.status_of(&member, Bytes::new()).await });
        let mut answers = futures::stream::iter(asked).buffer_unordered(SAMPLE);
        while let Some(answer) = answers.next().await {
            let Ok(Some(status)) = answer else { continue };
            let found = status.datasets.into_iter().find(|found| found.namespace == namespace && found.name == name);
            if let Some(id) = found.and_then(|found| DatasetId::from_slice(&found.dataset)) {
                return Some(id);
            }
        }
        None
    }

    async fn status_of(&self, member: &Arc<Member>, dataset: Bytes) -> Result<Option<StatusResponse>, String> {
        let asking = async {
            let channel = member.channel().await.map_err(|error| error.to_string())?;
            match ControlClient::new(channel).status(StatusRequest { dataset }).await {
                Ok(status) => Ok(Some(status.into_inner())),
                Err(status) if status.code() == Code::NotFound => Ok(None),
                Err(status) => Err(member.refused(&status)),
            }
        };
        let answer = tokio::time::timeout(ANSWER, asking).await.map_err(|_| format!("no answer within {ANSWER:?}"))?;
        if let Ok(Some(status)) = &answer {
            member.health.mark_ok();
            self.note_epoch(status.table_epoch);
        }
        answer
    }
}
