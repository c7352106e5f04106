//! What there is of a Dataset, besides itself.

use std::sync::Arc;

use forebay_api::{CacheRuntime, Dataset};
use kube::runtime::reflector::ObjectRef;

use crate::{
    context::Context,
    labels::Owner,
    poll::{DatasetSeen, RuntimeSeen, dataset_id},
    views::ClaimView,
};

/// What there is of a Dataset.
#[derive(Default)]
pub struct Found {
    pub runtime: Option<Arc<CacheRuntime>>,
    /// What the runtime's workers said; `None`: they have not been asked.
    pub seen: Option<Arc<RuntimeSeen>>,
    /// What they said of this Dataset.
    pub dataset: Option<DatasetSeen>,
    /// The claim of its name, if it is its own.
    pub claim: Option<Arc<ClaimView>>,
}

impl Found {
    pub fn new(dataset: &Dataset, owner: &Owner, context: &Context) -> Self {
        let stores = &context.stores;
        let name = ObjectRef::new(&dataset.spec.runtime_ref.name).within(&owner.namespace);
        let runtime = stores.runtimes.get(&name);
        let uid = runtime.as_ref().and_then(|runtime| runtime.metadata.uid.as_deref());
        let seen = uid.and_then(|uid| context.observations.of(uid));
        let claim = stores.claims.get(&ObjectRef::new(&owner.name).within(&owner.namespace));
        Self {
            dataset: seen.as_ref().and_then(|seen| seen.datasets.get(&dataset_id(dataset)?).cloned()),
            seen,
            runtime,
            claim: claim.filter(|claim| owner.owns(&claim.metadata)),
        }
    }
}
