//! A Dataset that is to go: claim, volume, bytes on workers, finalizer, in this order.
//!
//! Each step is taken as often as it is looked at, until its result is seen in the cluster. Nothing here needs the
//! CacheRuntime; workers that do not answer are waited for, but not for ever.

use std::time::{Duration, Instant};

use forebay_api::{Dataset, DatasetStatus};
use k8s_openapi::{
    api::core::v1::{PersistentVolume, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, ResourceExt,
    api::ListParams,
    core::PartialObjectMeta,
    runtime::{controller::Action, reflector::ObjectRef},
};
use tracing::{info, warn};

use super::{DatasetError, apply::claims, dereference::Found, doing, finalizer, status, validate::volume_name};
use crate::{
    apply::delete,
    conditions::{self, Finding, PROGRESSING, READY},
    context::{CallError, Context, within},
    labels::Owner,
    poll::dataset_id,
};

/// How often it is looked whether workers forgot it.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is looked whether a claim or a volume is gone; that is also told.
const GONE: Duration = Duration::from_secs(10);
/// How often the pods that use a claim are listed.
const LIST: Duration = Duration::from_secs(15);
/// How long workers may take to forget a Dataset, and to say so. One that is away forgets it when it is back.
const FORGET: Duration = Duration::from_secs(60);
/// Most pods that are listed in search of those that use a claim, and most that are named.
const PODS: (u32, usize) = (500, 5);

/// Takes the next step.
pub async fn step(context: &Context, dataset: &Dataset, owner: &Owner, found: &Found) -> Result<Action, DatasetError> {
    if !finalizer::is_set(dataset) {
        return Ok(Action::await_change());
    }
    let claims = claims(context, &owner.namespace);
    // What the watch knows is there; what it does not know may have been made a moment ago.
    let claim = match &found.claim {
        Some(claim) => Some(claim.metadata.clone()),
        None => within(claims.get_opt(&owner.name)).await.map_err(doing("reading the claim"))?.map(|c| c.metadata),
    };
    if let Some(claim) = claim.filter(|claim| owner.owns(claim)) {
        if claim.deletion_timestamp.is_none() {
            delete(&claims, &claim).await.map_err(doing("deleting the claim"))?;
        }
        let began = context.remember(&owner.uid, |memory| *memory.deleting.get_or_insert_with(Instant::now));
        if began.elapsed() < LOOK {
            // Nobody uses it, most likely, and it is gone in a moment.
            return Ok(Action::requeue(LOOK));
        }
        if let Some(message) = waiting_for_claim(context, owner).await {
            say(context, dataset, message, true).await?;
        }
        return Ok(Action::requeue(GONE));
    }

    let volumes: Api<PartialObjectMeta<PersistentVolume>> = Api::all(context.client.clone());
    let name = volume_name(&owner.uid);
    let volume = match context.stores.volumes.get(&ObjectRef::new(&name)) {
        Some(volume) => Some(volume.metadata.clone()),
        None => within(volumes.get_opt(&name)).await.map_err(doing("reading the volume"))?.map(|v| v.metadata),
    };
    if let Some(volume) = volume {
        if volume.deletion_timestamp.is_none() {
            delete(&volumes, &volume).await.map_err(doing("deleting the volume"))?;
        }
        return Ok(Action::requeue(GONE));
    }

    // Workers forget it when it has no claim any more.
    if dataset.status.as_ref().is_some_and(|status| status.claim_name.is_some()) {
        say(context, dataset, "waiting for workers to forget its bytes".into(), false).await?;
        return Ok(Action::requeue(LOOK));
    }
    let began = context.remember(&owner.uid, |memory| *memory.forgetting.get_or_insert_with(Instant::now));
    if remembers(context, dataset, found, began) {
        if began.elapsed() < FORGET {
            return Ok(Action::requeue(LOOK));
        }
        warn!(namespace = %owner.namespace, name = %owner.name, "workers did not forget a Dataset in time");
    }
    match finalizer::remove(context, dataset).await {
        Ok(()) => info!(namespace = %owner.namespace, name = %owner.name, "deleted a Dataset"),
        Err(error) if error.is(404) => {}
        Err(source) => return Err(doing("removing the finalizer")(source)),
    }
    Ok(Action::await_change())
}

/// Whether a worker may serve it or hold something of it: what was said before `began` does not count. Workers that have
/// not been asked since then are asked now.
fn remembers(context: &Context, dataset: &Dataset, found: &Found, began: Instant) -> bool {
    let Some(runtime) = &found.runtime else { return false };
    let uid = runtime.metadata.uid.as_deref().unwrap_or_default();
    if let Some(seen) = context.observations.since(uid, began) {
        return dataset_id(dataset).is_some_and(|id| seen.may_hold(&id));
    }
    context.observations.wake(uid);
    let table = runtime.status.as_ref().and_then(|status| status.table.as_ref());
    table.is_some_and(|table| !table.members.is_empty())
}

/// What keeps the claim; `None`: nothing new since it was last said.
async fn waiting_for_claim(context: &Context, owner: &Owner) -> Option<String> {
    let now = Instant::now();
    let due = context.remember(&owner.uid, |memory| {
        let due = memory.listed.is_none_or(|listed| now.duration_since(listed) >= LIST);
        memory.listed = if due { Some(now) } else { memory.listed };
        due
    });
    if !due {
        return None;
    }
    let users = match users(context, owner).await {
        Ok(users) => users,
        Err(error) => {
            warn!(namespace = %owner.namespace, %error, "pods could not be listed");
            Vec::new()
        }
    };
    Some(match users.as_slice() {
        [] => format!("waiting for PersistentVolumeClaim {} to go", owner.name),
        users => {
            let named = users.iter().take(PODS.1).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = if users.len() > PODS.1 { " and others" } else { "" };
            format!("PersistentVolumeClaim {} is in use by pods {named}{more}", owner.name)
        }
    })
}

/// Pods that use the claim and have not ended.
async fn users(context: &Context, owner: &Owner) -> Result<Vec<String>, CallError> {
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &owner.namespace);
    let params = ListParams::default().limit(PODS.0).fields("status.phase!=Succeeded,status.phase!=Failed");
    let pods = within(api.list(&params)).await?;
    let uses = |pod: &&Pod| {
        pod.spec
            .iter()
            .flat_map(|spec| spec.volumes.iter().flatten())
            .any(|volume| volume.persistent_volume_claim.as_ref().is_some_and(|claim| claim.claim_name == owner.name))
    };
    Ok(pods.items.iter().filter(uses).map(ResourceExt::name_any).collect())
}

/// Says what is waited for, if that is new. `claim`: whether there is still something to mount.
async fn say(context: &Context, dataset: &Dataset, message: String, claim: bool) -> Result<(), DatasetError> {
    let before = dataset.status.clone().unwrap_or_default();
    let findings =
        [Finding::new(READY, false, "Deleting", &message), Finding::new(PROGRESSING, true, "Deleting", &message)];
    let generation = dataset.metadata.generation;
    let urgent = findings.iter().any(|finding| finding.is_urgent(&before.conditions, generation));
    if !urgent && claim == before.claim_name.is_some() {
        return Ok(());
    }
    let mut merged = conditions::merge(&before.conditions, &findings, generation, Timestamp::now());
    merged.extend(conditions::get(&before.conditions, conditions::DEGRADED).cloned());
    let after = DatasetStatus {
        observed_generation: generation,
        conditions: merged,
        claim_name: before.claim_name.clone().filter(|_| claim),
        ..before.clone()
    };
    status::write(context, dataset, after, &before, &findings).await.map_err(doing("writing the status"))
}
