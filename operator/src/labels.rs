//! Labels and names that everything we make has in common.

use std::collections::BTreeMap;

use forebay_api::object_name;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt as _};

/// Name under which fields are applied, and label of what is made.
pub const MANAGER: &str = "forebay-operator";
/// Label with the name of a CacheRuntime.
pub const RUNTIME: &str = "forebay.io/runtime";
/// Label with the name of a Dataset.
pub const DATASET: &str = "forebay.io/dataset";
/// Label with the name of a PreloadPolicy.
pub const POLICY: &str = "forebay.io/preload-policy";
/// Finalizer of Datasets: their claim, their volume and the bytes on workers are to be removed.
pub const FINALIZER: &str = "forebay.io/dataset";
/// Selects everything we made.
pub const SELECTOR: &str = "app.kubernetes.io/name=forebay,app.kubernetes.io/managed-by=forebay-operator";

type Labels = BTreeMap<String, String>;

fn map<const N: usize>(pairs: [(&str, &str); N]) -> Labels {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Labels of the pods of a CacheRuntime by which Services and the like select them. They are in immutable fields.
pub fn worker_selector(runtime: &str) -> Labels {
    map([("app.kubernetes.io/name", "forebay"), ("app.kubernetes.io/component", "worker"), (RUNTIME, runtime)])
}

/// Labels of what is made for a CacheRuntime.
pub fn of_runtime(runtime: &str) -> Labels {
    let mut labels = worker_selector(runtime);
    labels.insert("app.kubernetes.io/managed-by".into(), MANAGER.into());
    labels
}

/// Labels of what is made for a Dataset.
pub fn of_dataset(dataset: &str) -> Labels {
    map([("app.kubernetes.io/name", "forebay"), ("app.kubernetes.io/managed-by", MANAGER), (DATASET, dataset)])
}

/// Labels of what is made for a PreloadPolicy.
pub fn of_policy(policy: &str) -> Labels {
    map([
        ("app.kubernetes.io/name", "forebay"),
        ("app.kubernetes.io/component", "preload"),
        ("app.kubernetes.io/managed-by", MANAGER),
        (POLICY, policy),
    ])
}

/// Who an object is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl Owner {
    /// `None` for an object that no API server has seen.
    pub fn of<K: Resource>(object: &K) -> Option<Self> {
        Some(Self { namespace: object.namespace()?, name: object.name_any(), uid: object.uid()? })
    }

    /// The reference by which the garbage collector finds what is left when the owner is gone.
    pub fn reference<K: Resource<DynamicType = ()>>(&self) -> OwnerReference {
        OwnerReference {
            api_version: K::api_version(&()).into_owned(),
            kind: K::kind(&()).into_owned(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }

    /// Metadata of the one object of its kind that is made for this CacheRuntime.
    pub fn runtime_meta(&self) -> ObjectMeta {
        ObjectMeta {
            name: Some(object_name(&self.name)),
            namespace: Some(self.namespace.clone()),
            labels: Some(of_runtime(&self.name)),
            owner_references: Some(vec![self.reference::<forebay_api::CacheRuntime>()]),
            ..ObjectMeta::default()
        }
    }

    /// Whether an object is made for this owner.
    pub fn owns(&self, meta: &ObjectMeta) -> bool {
        meta.owner_references.iter().flatten().any(|reference| reference.uid == self.uid)
    }
}
