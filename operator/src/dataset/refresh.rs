//! Refreshes that somebody asks for: each new value of an annotation has the sources listed again.
//!
//! The worker that coordinates scans is asked, which goes on by itself; the status says for which value. Until then it is
//! tried again.

use std::time::Duration;

use forebay_api::{CacheRuntime, Dataset, MemberState};
use forebay_client::{ControlClient, transport};
use forebay_protocol::{
    DatasetId, DatasetPath,
    handshake::RuntimeKey,
    identity::directory_placement_key,
    placement::Placement,
    table::{Member, MemberState as PlacedState, WorkerTable},
    worker::RefreshRequest,
};
use kube::ResourceExt as _;
use tokio::time::timeout;
use tracing::{info, warn};

use super::dereference::Found;
use crate::{context::Context, poll::dataset_id};

/// Annotation of a Dataset: each new value has its sources listed again.
pub const REQUESTED: &str = "forebay.io/refreshRequestedAt";
/// How long a worker may take to begin.
const DEADLINE: Duration = Duration::from_secs(10);
/// Workers that are asked, one after another, until one begins.
const CANDIDATES: usize = 3;

/// What somebody asks for and nobody has begun yet.
pub fn requested(dataset: &Dataset) -> Option<&str> {
    let asked = dataset.annotations().get(REQUESTED)?.as_str();
    let begun = dataset.status.as_ref().and_then(|status| status.last_refresh.as_deref());
    (begun != Some(asked)).then_some(asked)
}

/// Has a worker begin; whether one did.
pub async fn begin(context: &Context, dataset: &Dataset, found: &Found) -> bool {
    let (Some(id), Some(runtime)) = (dataset_id(dataset), &found.runtime) else { return false };
    let (namespace, name) = (dataset.namespace().unwrap_or_default(), &dataset.spec.runtime_ref.name);
    let key = context.master.runtime_key(&namespace, name);
    for member in order(runtime, id) {
        match timeout(DEADLINE, ask(&member.address, &key, id)).await {
            Ok(Ok(())) => {
                info!(dataset = %dataset.name_any(), worker = %member.name, "a refresh has begun");
                return true;
            }
            Ok(Err(error)) => warn!(worker = %member.name, %error, "a worker does not refresh"),
            Err(_) => warn!(worker = %member.name, "a worker does not begin a refresh within {DEADLINE:?}"),
        }
    }
    false
}

/// Workers by how much it is theirs: the first one that lives coordinates scans.
fn order(runtime: &CacheRuntime, id: DatasetId) -> Vec<Member> {
    let Some(table) = runtime.status.as_ref().and_then(|status| status.table.as_ref()) else { return Vec::new() };
    let members = table.members.iter().map(|member| Member {
        name: member.name.clone(),
        address: member.address.clone(),
        weight: member.weight,
        state: match member.state {
            MemberState::Serving => PlacedState::Serving,
            MemberState::Draining => PlacedState::Draining,
        },
    });
    let table = WorkerTable { epoch: table.epoch, members: members.collect() };
    let key = directory_placement_key(id, &DatasetPath::root());
    let order = Placement::new(&table).order(key, CANDIDATES);
    order.into_iter().map(|index| table.members[index].clone()).collect()
}

/// Asks a worker, and hears its first word: from then on the generation is raised, and it goes on alone.
async fn ask(address: &str, key: &RuntimeKey, id: DatasetId) -> Result<(), String> {
    let channel = transport::channel(address, key).await.map_err(|error| error.to_string())?;
    let request = RefreshRequest { dataset: id.to_bytes(), path: DatasetPath::root().to_bytes() };
    let said = |status: tonic::Status| status.message().to_owned();
    let mut progress = ControlClient::new(channel).refresh(request).await.map_err(said)?.into_inner();
    match progress.message().await.map_err(said)? {
        Some(_) => Ok(()),
        None => Err("it broke off".to_owned()),
    }
}
