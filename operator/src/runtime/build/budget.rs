//! Drains of nodes take one worker at a time; one that does not work may go at any time.

use k8s_openapi::{
    api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use crate::{labels, runtime::validate::ValidRuntime};

pub fn build(runtime: &ValidRuntime) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: runtime.owner.runtime_meta(),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector {
                match_labels: Some(labels::worker_selector(&runtime.owner.name)),
                match_expressions: None,
            }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            min_available: None,
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    #[test]
    fn one_worker_at_a_time() {
        let spec = build(&testing::runtime(ValidVolume::EmptyDir)).spec.unwrap();
        assert_eq!(spec.max_unavailable, Some(IntOrString::Int(1)));
        assert_eq!(spec.unhealthy_pod_eviction_policy.as_deref(), Some("AlwaysAllow"));
    }
}
