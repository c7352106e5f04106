//! CacheRuntimes: from a spec to workers, and from workers to a status.
//!
//! dereference (what exists) -> validate (the only type that builders see) -> build (pure) -> apply -> status.

mod apply;
mod build;
mod dereference;
mod status;
mod table;
mod validate;

use std::{sync::Arc, time::Duration};

use forebay_api::CacheRuntime;
use kube::{ResourceExt as _, runtime::controller::Action};

use self::{apply::Outcome, dereference::Found};
use crate::{
    context::{CallError, Context, ReconcileError, resync},
    labels::Owner,
};

/// How often a runtime is looked at whose objects are in somebody's way, or whose workers do not all serve.
const AGAIN: Duration = Duration::from_secs(5);

/// Why a CacheRuntime is looked at again.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Some of its objects could not be applied.
    #[error("{0}")]
    Apply(String),
    /// Its status could not be written.
    #[error("its status could not be written")]
    Status(#[source] CallError),
}

/// Brings what exists to what is asked for, once.
pub async fn reconcile(runtime: Arc<CacheRuntime>, context: Arc<Context>) -> Result<Action, RuntimeError> {
    let Some(owner) = Owner::of(&*runtime) else { return Ok(Action::await_change()) };
    if runtime.metadata.deletion_timestamp.is_some() {
        // The garbage collector removes what it owns.
        return Ok(Action::await_change());
    }
    let found = Found::new(&runtime, &owner, &context);
    let outcome = match validate::validate(&runtime, owner.clone()) {
        Ok(valid) => {
            let objects = build::build(&valid, &context.workers, &context.master);
            apply::apply(&context, &owner, objects, found.all_serve()).await
        }
        Err(invalid) => Outcome::Invalid(invalid.to_string()),
    };
    if outcome == Outcome::Ending {
        return Ok(Action::requeue(AGAIN));
    }
    let rest = status::publish(&context, &runtime, &found, &outcome).await.map_err(RuntimeError::Status)?;
    match outcome {
        Outcome::Failed(message) => Err(RuntimeError::Apply(message)),
        Outcome::Applied if found.all_serve() => Ok(Action::requeue(rest.unwrap_or_else(resync))),
        Outcome::Applied | Outcome::NameTaken(_) | Outcome::Invalid(_) | Outcome::Ending => {
            Ok(Action::requeue(rest.unwrap_or(AGAIN).min(AGAIN)))
        }
    }
}

impl ReconcileError for RuntimeError {
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Status(source) if source.is(409) || source.is(404))
    }
}

/// When a CacheRuntime whose reconciliation failed is looked at again.
pub fn failed(runtime: Arc<CacheRuntime>, error: &RuntimeError, context: Arc<Context>) -> Action {
    Action::requeue(context.backoff(&runtime.uid().unwrap_or_default(), error))
}
