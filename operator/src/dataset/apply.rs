//! Claim and volume to the cluster, in the order in which they bind at once.
//!
//! Kubernetes looks at a claim when it changes, and else every 15 s: so first the claim, then the volume that names it
//! by UID, then a touch of the claim, again and again until it is bound.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
};
use serde_json::json;

use super::{build, dereference::Found, validate::ValidDataset};
use crate::{
    apply::{ApplyError, New},
    context::{CallError, Context, within},
    labels::{self, MANAGER},
};

/// Annotation that is changed for the sake of change.
const TOUCHED: &str = "forebay.io/touched";
/// Pauses between touches: the first, and the longest, after which Kubernetes looks by itself. Each is twice as long as
/// the one before: a binder that is behind is not helped by more changes.
const TOUCH: (Duration, Duration) = (Duration::from_millis(700), Duration::from_secs(15));

/// How an application ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The claim can be mounted.
    Bound,
    /// It will be; why it is not yet, and when to look again.
    Binding(String, Duration),
    /// The claim's name belongs to somebody else.
    NameTaken(String),
    /// What was built is refused.
    Invalid(String),
    /// Its namespace goes, and it with it.
    Ending,
    /// To be tried again.
    Failed(String),
}

impl From<ApplyError> for Outcome {
    fn from(error: ApplyError) -> Self {
        let message = error.to_string();
        match error {
            ApplyError::NameTaken { .. } => Self::NameTaken(message),
            ApplyError::Refused { .. } => Self::Invalid(message),
            ApplyError::Going { .. } => {
                Self::Binding(format!("{message}; it is made again when no pod uses it any more"), TOUCH.1)
            }
            ApplyError::Call { source, .. } if source.is_end_of_namespace() => Self::Ending,
            ApplyError::Call { source, .. } => Self::Failed(format!("{message}: {source}")),
        }
    }
}

pub async fn apply(context: &Context, dataset: &ValidDataset, found: &Found) -> Outcome {
    match try_apply(context, dataset).await {
        Ok(()) => {}
        Err(error) => return error.into(),
    }
    if found.claim.as_ref().is_some_and(|claim| claim.status.phase == "Bound") {
        context.remember(&dataset.owner.uid, |memory| memory.touched = None);
        return Outcome::Bound;
    }
    match touch(context, dataset).await {
        Ok(pause) => Outcome::Binding(format!("PersistentVolumeClaim {} is not bound yet", dataset.owner.name), pause),
        Err(error) => Outcome::Failed(format!("touching the claim failed: {error}")),
    }
}

async fn try_apply(context: &Context, dataset: &ValidDataset) -> Result<(), ApplyError> {
    let owner = &dataset.owner;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), &owner.namespace);
    let claim = build::claim(dataset);
    let applied = &context.applied;
    let uid = applied
        .apply(&claims, &context.stores.claims, &owner.uid, &claim, New::Created, |meta| owner.owns(meta))
        .await?;

    let volumes: Api<PersistentVolume> = Api::all(context.client.clone());
    let volume = build::volume(dataset, &uid);
    // Its name is the Dataset's UID: only somebody who wants to deceive has one of that name.
    let expected = labels::of_dataset(&owner.name);
    applied
        .apply(&volumes, &context.stores.volumes, &owner.uid, &volume, New::Created, |meta| {
            let labels = meta.labels.iter().flatten();
            labels.filter(|(key, value)| expected.get(*key) == Some(*value)).count() == expected.len()
        })
        .await?;
    Ok(())
}

pub fn claims(context: &Context, namespace: &str) -> Api<PartialObjectMeta<PersistentVolumeClaim>> {
    Api::namespaced(context.client.clone(), namespace)
}

/// Touches the claim if it is time. How long to wait for the next time.
async fn touch(context: &Context, dataset: &ValidDataset) -> Result<Duration, CallError> {
    let owner = &dataset.owner;
    let now = Instant::now();
    let wait = context.remember(&owner.uid, |memory| memory.touch(now, TOUCH));
    if let Some(wait) = wait {
        return Ok(wait);
    }
    let patch = json!({"metadata": {"annotations": {TOUCHED: Timestamp::now().to_string()}}});
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    within(claims(context, &owner.namespace).patch(&owner.name, &params, &Patch::Merge(&patch))).await?;
    Ok(TOUCH.0)
}
