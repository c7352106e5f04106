//! The finalizer of a Dataset. Only Datasets have one: their volume and the bytes on workers are in nobody's namespace.

use forebay_api::Dataset;
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
};
use serde_json::json;

use crate::{
    context::{CallError, Context, within},
    labels::{FINALIZER, MANAGER},
};

pub fn is_set(dataset: &Dataset) -> bool {
    dataset.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

pub async fn set(context: &Context, dataset: &Dataset) -> Result<(), CallError> {
    let mut finalizers = dataset.finalizers().to_vec();
    finalizers.push(FINALIZER.to_owned());
    write(context, dataset, finalizers).await
}

pub async fn remove(context: &Context, dataset: &Dataset) -> Result<(), CallError> {
    write(context, dataset, dataset.finalizers().iter().filter(|f| *f != FINALIZER).cloned().collect()).await
}

/// With the resource version that it was read at: finalizers of others are not lost.
async fn write(context: &Context, dataset: &Dataset, finalizers: Vec<String>) -> Result<(), CallError> {
    let namespace = dataset.namespace().unwrap_or_default();
    let api: Api<PartialObjectMeta<Dataset>> = Api::namespaced(context.client.clone(), &namespace);
    let patch = json!({"metadata": {"resourceVersion": dataset.resource_version(), "finalizers": finalizers}});
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    within(api.patch(&dataset.name_any(), &params, &Patch::Merge(&patch))).await?;
    Ok(())
}
