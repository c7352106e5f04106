//! Datasets: a claim that pods mount, the volume behind it, and a status.
//!
//! dereference (what exists) -> validate (the only type that builders see) -> build (pure) -> apply -> status. A
//! Dataset that is to go takes the way back: claim, volume, bytes on workers, finalizer.

mod apply;
mod build;
mod delete;
mod dereference;
mod finalizer;
mod orphans;
mod refresh;
mod status;
mod validate;

use std::{sync::Arc, time::Duration};

use forebay_api::Dataset;
use kube::{ResourceExt as _, runtime::controller::Action};

pub use self::orphans::remove as remove_orphans;
use self::{apply::Outcome, dereference::Found};
use crate::{
    context::{CallError, Context, ReconcileError, resync},
    labels::Owner,
};

/// How often a Dataset is looked at that waits for somebody whom nobody tells us about, such as a foreign claim to go.
const AGAIN: Duration = Duration::from_secs(5);

/// Why a Dataset is looked at again.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// Its claim or volume could not be applied.
    #[error("{0}")]
    Apply(String),
    /// A call failed.
    #[error("{doing} failed")]
    Call {
        doing: &'static str,
        #[source]
        source: CallError,
    },
}

/// Gives the error of a call its place.
fn doing(doing: &'static str) -> impl Fn(CallError) -> DatasetError {
    move |source| DatasetError::Call { doing, source }
}

/// Brings what exists to what is asked for, once.
pub async fn reconcile(dataset: Arc<Dataset>, context: Arc<Context>) -> Result<Action, DatasetError> {
    let Some(owner) = Owner::of(&*dataset) else { return Ok(Action::await_change()) };
    let found = Found::new(&dataset, &owner, &context);
    if dataset.metadata.deletion_timestamp.is_some() {
        return delete::step(&context, &dataset, &owner, &found).await;
    }
    if !finalizer::is_set(&dataset) {
        // The change brings us back here. Workers are asked soon whether they have it.
        finalizer::set(&context, &dataset).await.map_err(doing("adding the finalizer"))?;
        if let Some(uid) = found.runtime.as_ref().and_then(|runtime| runtime.metadata.uid.as_deref()) {
            context.observations.wake(uid);
        }
        return Ok(Action::requeue(AGAIN));
    }
    let valid = validate::validate(&dataset, owner);
    let outcome = apply::apply(&context, &valid, &found).await;
    if outcome == Outcome::Ending {
        return Ok(Action::requeue(AGAIN));
    }
    let refresh = refresh::requested(&dataset);
    let refreshed = match refresh {
        Some(asked) if refresh::begin(&context, &dataset, &found).await => Some(asked.to_owned()),
        _ => None,
    };
    let waits = refresh.is_some() && refreshed.is_none();
    let published = status::publish(&context, &dataset, &found, &outcome, refreshed).await;
    let rest = published.map_err(doing("writing the status"))?;
    match outcome {
        Outcome::Failed(message) => Err(DatasetError::Apply(message)),
        Outcome::Bound if waits => Ok(Action::requeue(AGAIN)),
        Outcome::Bound => Ok(Action::requeue(rest.unwrap_or_else(resync))),
        Outcome::Binding(_, pause) => Ok(Action::requeue(pause)),
        Outcome::NameTaken(_) | Outcome::Invalid(_) | Outcome::Ending => Ok(Action::requeue(AGAIN)),
    }
}

impl ReconcileError for DatasetError {
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Call { source, .. } if source.is(409) || source.is(404))
    }
}

/// When a Dataset whose reconciliation failed is looked at again.
pub fn failed(dataset: Arc<Dataset>, error: &DatasetError, context: Arc<Context>) -> Action {
    Action::requeue(context.backoff(&dataset.uid().unwrap_or_default(), error))
}

#[cfg(test)]
mod testing {
    use super::validate::ValidDataset;
    use crate::labels::Owner;

    pub(super) fn dataset() -> ValidDataset {
        ValidDataset {
            owner: Owner { namespace: "vision".into(), name: "imagenet".into(), uid: "u-2".into() },
            runtime: "gpu-pool".into(),
            capacity: 147_897_477_120,
        }
    }
}
