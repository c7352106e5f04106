//! Objects of Kubernetes as far as we look at them: a watch over thousands keeps only this in memory.

use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{PersistentVolume, PersistentVolumeClaim, Pod},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::Resource;
use serde::Deserialize;

macro_rules! view_of {
    ($view:ident, $kind:ty, $scope:ty) => {
        impl Resource for $view {
            type DynamicType = ();
            type Scope = $scope;

            fn kind(_: &()) -> std::borrow::Cow<'_, str> {
                <$kind as Resource>::kind(&())
            }
            fn group(_: &()) -> std::borrow::Cow<'_, str> {
                <$kind as Resource>::group(&())
            }
            fn version(_: &()) -> std::borrow::Cow<'_, str> {
                <$kind as Resource>::version(&())
            }
            fn plural(_: &()) -> std::borrow::Cow<'_, str> {
                <$kind as Resource>::plural(&())
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

/// A worker's pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct WorkerPod {
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub status: PodStatus,
}
view_of!(WorkerPod, Pod, kube::core::NamespaceResourceScope);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    pub phase: String,
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    pub conditions: Vec<PodCondition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodCondition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    pub reason: String,
    pub message: String,
}

impl WorkerPod {
    fn condition(&self, kind: &str) -> Option<&PodCondition> {
        self.status.conditions.iter().find(|condition| condition.kind == kind)
    }

    /// Whether its probes say that it serves.
    pub fn is_ready(&self) -> bool {
        self.condition("Ready").is_some_and(|condition| condition.status == "True")
    }

    /// Why no node takes it.
    pub fn unschedulable(&self) -> Option<&str> {
        let condition = self.condition("PodScheduled")?;
        (condition.status == "False" && condition.reason == "Unschedulable").then_some(&condition.message)
    }

    /// Whether it was asked to go.
    pub fn is_terminating(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}

/// The Job of a run.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct JobView {
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub status: JobStatus,
}
view_of!(JobView, Job, kube::core::NamespaceResourceScope);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct JobStatus {
    pub conditions: Vec<JobCondition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JobCondition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    pub reason: String,
    pub message: String,
    pub last_transition_time: Option<Time>,
}

impl JobView {
    /// How it ended, if it did: the condition `Complete` or `Failed`.
    pub fn end(&self) -> Option<&JobCondition> {
        let ends = |condition: &&JobCondition| {
            condition.status == "True" && matches!(condition.kind.as_str(), "Complete" | "Failed")
        };
        self.status.conditions.iter().find(ends)
    }
}

/// A PersistentVolumeClaim.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ClaimView {
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub status: PhaseView,
}
view_of!(ClaimView, PersistentVolumeClaim, kube::core::NamespaceResourceScope);

/// A PersistentVolume.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct VolumeView {
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub spec: VolumeSpecView,
    #[serde(default)]
    pub status: PhaseView,
}
view_of!(VolumeView, PersistentVolume, kube::core::ClusterResourceScope);

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeSpecView {
    pub claim_ref: ClaimRefView,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ClaimRefView {
    pub namespace: String,
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PhaseView {
    pub phase: String,
}
