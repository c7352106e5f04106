//! `CacheRuntime`: the workers that cache and serve.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Phase, PodTemplate, Quantity, WorkerTable, rules};

/// The workers that cache and serve.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "forebay.io",
    version = "v1alpha1",
    kind = "CacheRuntime",
    namespaced,
    status = "CacheRuntimeStatus",
    derive = "PartialEq",
    shortname = "crt",
    category = "forebay",
    doc = "A group of workers, equal to each other, that keep and serve the bytes of Datasets.",
    validation = Rule::from(rules::RUNTIME_NAME),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase", description = "Where it stands"),
    printcolumn(name = "Workers", type_ = "integer", json_path = ".spec.replicas", description = "Workers wanted"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas", description = "Workers serving"),
    printcolumn(name = "Capacity", type_ = "string", json_path = ".status.capacity", description = "Bytes they can keep"),
    printcolumn(name = "Used", type_ = "string", json_path = ".status.used", description = "Bytes they keep"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct CacheRuntimeSpec {
    /// How many workers.
    #[schemars(range(min = 1, max = rules::MAX_REPLICAS))]
    #[serde(default = "one")]
    pub replicas: u32,
    /// Where each worker keeps bytes, by name. Exactly one for now.
    #[schemars(length(min = 1, max = 1))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]), validation = Rule::from(rules::TIER_NAMES))]
    pub tiers: Vec<Tier>,
    /// What is added to the pods of workers: where they run, with what, and as whom. Without a cluster it is checked
    /// and has no effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PodTemplate>,
}

/// A place where each worker keeps bytes.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tier {
    /// Name of the tier.
    #[schemars(length(max = rules::MAX_LABEL))]
    #[x_kube(validation = Rule::from(rules::LABEL))]
    pub name: String,
    /// What the volume is on: on an `HDD`, workers get more time to open their cache before they count as broken.
    pub medium: Medium,
    /// Most bytes on each worker.
    pub capacity: Quantity,
    /// The volume; one member is set.
    pub volume: TierVolume,
    /// How full it gets before workers make room.
    #[serde(default)]
    pub watermarks: Watermarks,
}

/// What a volume is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Medium {
    /// Flash.
    #[serde(rename = "SSD")]
    Ssd,
    /// Rotating disks.
    #[serde(rename = "HDD")]
    Hdd,
}

/// The volume of a tier: exactly one member is set.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::ONE_VOLUME))]
#[serde(rename_all = "camelCase")]
pub struct TierVolume {
    /// A directory of the machine; it outlives the workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPathVolume>,
    /// A directory that lives and dies with the worker; in local mode, below the state directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDirVolume>,
}

/// A directory of the machine.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPathVolume {
    /// The directory; each worker makes one of its own below it.
    #[schemars(length(max = rules::MAX_PATH))]
    #[x_kube(validation = Rule::from(rules::HOST_PATH))]
    pub path: String,
}

/// A directory that lives and dies with the worker; it has no options.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDirVolume {}

/// How full a tier gets before workers make room.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::WATERMARKS))]
#[serde(rename_all = "camelCase")]
pub struct Watermarks {
    /// Percent of the capacity above which room is made.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default = "high_percent")]
    pub high_percent: u8,
    /// Percent of the capacity at which making room ends.
    #[schemars(range(min = 1, max = 99))]
    #[serde(default = "low_percent")]
    pub low_percent: u8,
}

impl Default for Watermarks {
    fn default() -> Self {
        Self { high_percent: high_percent(), low_percent: low_percent() }
    }
}

fn one() -> u32 {
    1
}

fn high_percent() -> u8 {
    95
}

fn low_percent() -> u8 {
    85
}

/// What was last seen of the workers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheRuntimeStatus {
    /// `metadata.generation` that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the runtime stands; the conditions say why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Workers that exist.
    #[serde(default)]
    pub replicas: u32,
    /// Workers that serve.
    #[serde(default)]
    pub ready_replicas: u32,
    /// Label selector of the workers' pods, for autoscalers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The workers as clients see them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<WorkerTable>,
    /// Bytes that all workers together can keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    /// Bytes that they keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// `capacityBytes` for people, such as `16Ti`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<String>,
    /// `usedBytes` for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<String>,
    /// What is the case, by type: `Ready`, `Progressing`, `Degraded`.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
