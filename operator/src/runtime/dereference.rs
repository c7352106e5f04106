//! What there is of a CacheRuntime, besides itself.

use std::sync::Arc;

use forebay_api::{CacheRuntime, object_name};
use kube::ResourceExt as _;

use crate::{
    context::Context,
    labels::{self, Owner},
    poll::RuntimeSeen,
    views::WorkerPod,
};

/// What there is of a CacheRuntime.
pub struct Found {
    /// Its pods with their ordinals, in order.
    pub pods: Vec<(u32, Arc<WorkerPod>)>,
    /// What its workers said; `None`: they have not been asked.
    pub seen: Option<Arc<RuntimeSeen>>,
    /// Workers wanted.
    pub replicas: u32,
}

impl Found {
    pub fn new(runtime: &CacheRuntime, owner: &Owner, context: &Context) -> Self {
        let pods = context.stores.pods.state_filter(|pod| {
            pod.metadata.namespace.as_deref() == Some(&owner.namespace)
                && pod.labels().get(labels::RUNTIME) == Some(&owner.name)
        });
        Self {
            pods: by_ordinal(&object_name(&owner.name), pods),
            seen: context.observations.of(&owner.uid),
            replicas: runtime.spec.replicas,
        }
    }

    /// Pods of ordinals that are wanted.
    pub fn wanted(&self) -> impl Iterator<Item = &WorkerPod> {
        self.pods.iter().filter(|(ordinal, _)| *ordinal < self.replicas).map(|(_, pod)| &**pod)
    }

    /// Workers whose probes say that they serve, and who answered when they were asked last.
    pub fn serving(&self) -> usize {
        let answered = |pod: &WorkerPod| {
            let seen = self.seen.as_ref().and_then(|seen| seen.workers.get(pod.metadata.name.as_ref()?));
            seen.is_some_and(|worker| worker.answered)
        };
        self.wanted().filter(|pod| pod.is_ready() && !pod.is_terminating() && answered(pod)).count()
    }

    /// Whether all that are wanted serve.
    pub fn all_serve(&self) -> bool {
        self.serving() == self.replicas as usize
    }
}

/// Pods of a StatefulSet with their ordinals.
pub fn by_ordinal(stateful_set: &str, pods: Vec<Arc<WorkerPod>>) -> Vec<(u32, Arc<WorkerPod>)> {
    let ordinal = |pod: &WorkerPod| {
        pod.metadata.name.as_deref()?.strip_prefix(stateful_set)?.strip_prefix('-')?.parse::<u32>().ok()
    };
    let mut pods: Vec<_> = pods.into_iter().filter_map(|pod| Some((ordinal(&pod)?, pod))).collect();
    pods.sort_by_key(|(ordinal, _)| *ordinal);
    pods
}
