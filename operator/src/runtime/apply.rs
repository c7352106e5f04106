//! Objects of a CacheRuntime to the cluster, and away with those that are built no more.

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Resource, api::PostParams, core::NamespaceResourceScope};
use serde::{Serialize, de::DeserializeOwned};
use tracing::info;

use super::build::Objects;
use crate::{
    apply::{ApplyError, New, delete},
    context::{CallError, Context, within},
    labels::{MANAGER, Owner},
    watch::Metas,
};

/// How an application ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything is as it was built.
    Applied,
    /// A name belongs to somebody else.
    NameTaken(String),
    /// The spec, or what came out of it, is refused.
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
            ApplyError::Going { .. } => Self::Failed(message),
            ApplyError::Call { source, .. } if source.is_end_of_namespace() => Self::Ending,
            ApplyError::Call { source, .. } => Self::Failed(format!("{message}: {source}")),
        }
    }
}

/// Applies all objects; the first that fails ends it. `settled`: all workers serve, so the Secret is there.
pub async fn apply(context: &Context, owner: &Owner, objects: Objects, settled: bool) -> Outcome {
    match try_apply(context, owner, objects, settled).await {
        Ok(()) => Outcome::Applied,
        Err(error) => error.into(),
    }
}

async fn try_apply(context: &Context, owner: &Owner, objects: Objects, settled: bool) -> Result<(), ApplyError> {
    let Objects { secret, service, service_account, role_binding, policy, budget, stateful_set } = objects;
    let stores = &context.stores;
    if !settled {
        create(context, owner, &secret).await?;
    }
    one(context, owner, &stores.services, Some(service)).await?;
    one(context, owner, &stores.service_accounts, service_account).await?;
    one(context, owner, &stores.role_bindings, Some(role_binding)).await?;
    one(context, owner, &stores.network_policies, Some(policy)).await?;
    one(context, owner, &stores.budgets, Some(budget)).await?;
    one(context, owner, &stores.stateful_sets, Some(stateful_set)).await
}

/// Creates the Secret if there is none: it always has the same content.
async fn create(context: &Context, owner: &Owner, secret: &Secret) -> Result<(), ApplyError> {
    let api: Api<Secret> = Api::namespaced(context.client.clone(), &owner.namespace);
    let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
    match within(api.create(&params, secret)).await {
        Ok(_) => Ok(()),
        Err(error) if error.is(409) => Ok(()),
        Err(source) => Err(failed::<Secret>(secret.metadata.name.as_deref(), source)),
    }
}

fn failed<K: Resource<DynamicType = ()>>(name: Option<&str>, source: CallError) -> ApplyError {
    ApplyError::Call { kind: K::kind(&()).into_owned(), name: name.unwrap_or_default().to_owned(), source }
}

/// Applies the object of a kind, and deletes others of that kind that are owned by the runtime.
async fn one<K>(context: &Context, owner: &Owner, store: &Metas<K>, object: Option<K>) -> Result<(), ApplyError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + Serialize
        + DeserializeOwned
        + 'static,
{
    let api: Api<K> = Api::namespaced(context.client.clone(), &owner.namespace);
    if let Some(object) = &object {
        context.applied.apply(&api, store, &owner.uid, object, New::Applied, |meta| owner.owns(meta)).await?;
    }
    let kept = object.as_ref().and_then(|object| object.meta().name.as_deref());
    for orphan in store.state_filter(|meta| owner.owns(&meta.metadata) && meta.metadata.name.as_deref() != kept) {
        let name = orphan.metadata.name.as_deref();
        if delete(&api, &orphan.metadata).await.map_err(|source| failed::<K>(name, source))? {
            info!(kind = %K::kind(&()), name, "deleted what is no longer needed");
        }
    }
    Ok(())
}
