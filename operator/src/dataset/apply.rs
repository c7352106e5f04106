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
    apply::ApplyError,
    context::{CallError, Context, within},
    labels::{self, MANAGER},
};

/// Annotation that is changed for the sake of change.
const TOUCHED: &str = "forebay.io/touched";
/// Pause between touches.
const TOUCH: Duration = Duration::from_millis(700);

/// How an application ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The claim can be mounted.
    Bound,
    /// It will be; why it is not yet.
    Binding(String),
    /// The claim's name belongs to somebody else.
    NameTaken(String),
    /// What was built is refused.
    Invalid(String),
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
                Self::Binding(format!("{message}; it is made again when no pod uses it any more"))
            }
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
        return Outcome::Bound;
    }
    match touch(context, dataset).await {
        Ok(()) => Outcome::Binding(format!("PersistentVolumeClaim {} is not bound yet", dataset.owner.name)),
        Err(error) => Outcome::Failed(format!("touching the claim failed: {error}")),
    }
}

async fn try_apply(context: &Context, dataset: &ValidDataset) -> Result<(), ApplyError> {
    let owner = &dataset.owner;
    let claims = claims(context, &owner.namespace);
    let claim = build::claim(dataset);
    let applied = &context.applied;
    let uid = applied.apply(&claims, &context.stores.claims, &owner.uid, &claim, |meta| owner.owns(meta)).await?;

    let volumes: Api<PartialObjectMeta<PersistentVolume>> = Api::all(context.client.clone());
    let volume = build::volume(dataset, &uid);
    // Its name is the Dataset's UID: only somebody who wants to deceive has one of that name.
    let expected = labels::of_dataset(&owner.name);
    applied
        .apply(&volumes, &context.stores.volumes, &owner.uid, &volume, |meta| {
            let labels = meta.labels.iter().flatten();
            labels.filter(|(key, value)| expected.get(*key) == Some(*value)).count() == expected.len()
        })
        .await?;
    Ok(())
}

pub fn claims(context: &Context, namespace: &str) -> Api<PartialObjectMeta<PersistentVolumeClaim>> {
    Api::namespaced(context.client.clone(), namespace)
}

async fn touch(context: &Context, dataset: &ValidDataset) -> Result<(), CallError> {
    let owner = &dataset.owner;
    let now = Instant::now();
    let due = context.remember(&owner.uid, |memory| {
        let due = memory.touched.is_none_or(|touched| now.duration_since(touched) >= TOUCH);
        memory.touched = if due { Some(now) } else { memory.touched };
        due
    });
    if !due {
        return Ok(());
    }
    let patch = json!({"metadata": {"annotations": {TOUCHED: Timestamp::now().to_string()}}});
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    within(claims(context, &owner.namespace).patch(&owner.name, &params, &Patch::Merge(&patch))).await?;
    Ok(())
}
