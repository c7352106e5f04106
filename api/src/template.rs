//! The pieces of a pod template that a CacheRuntime adds to its workers' own. They need a cluster: without one they are
//! checked and have no effect.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::api::core::v1::Affinity;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Quantity, rules};

/// What is added to the pods of workers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplate {
    /// Labels and annotations of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<PodMetadata>,
    /// Where the pods run, with what, and as whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<PodPieces>,
}

/// Labels and annotations of the pods of workers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodMetadata {
    /// Labels beside the operator's own.
    #[schemars(extend("maxProperties" = rules::MAX_PAIRS))]
    #[x_kube(validation = Rule::from(rules::POD_LABELS), validation = Rule::from(rules::LABEL_MAP))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, LabelValue>,
    /// Annotations.
    #[schemars(extend("maxProperties" = rules::MAX_PAIRS))]
    #[x_kube(validation = Rule::from(rules::ANNOTATION_KEYS))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Where the pods of workers run, with what, and as whom.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodPieces {
    /// Labels that a node must have.
    #[schemars(extend("maxProperties" = rules::MAX_PAIRS))]
    #[x_kube(validation = Rule::from(rules::LABEL_MAP))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, LabelValue>,
    /// Taints of nodes that are no hindrance.
    #[schemars(length(max = rules::MAX_TOLERATIONS), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Which nodes and neighbours are wanted, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// What a worker asks for and may use. An item takes the place of the operator's own: requests of `cpu: 100m`,
    /// `memory: 256Mi` and, for an emptyDir, its capacity as `ephemeral-storage`; a limit of `memory: 1Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// ServiceAccount, in the same namespace, that workers run as: the identity with which they reach sources that have
    /// no `secretRef`. Absent: one of their own.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::from(rules::SUBDOMAIN))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account_name: Option<String>,
    /// PriorityClass. Absent: the one that the operator was given.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::from(rules::SUBDOMAIN))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
}

/// A taint that is no hindrance.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::from(rules::TOLERATION_KEY),
    validation = Rule::from(rules::TOLERATION_VALUE),
    validation = Rule::from(rules::TOLERATION_SECONDS)
)]
#[serde(rename_all = "camelCase")]
pub struct Toleration {
    /// Key of the taint. Absent: any.
    #[schemars(length(max = 317))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Whether the value matters. Absent: `Equal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<TolerationOperator>,
    /// Value of the taint.
    #[schemars(length(max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Effect of the taint. Absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// How long a worker stays on a node that got the taint. Absent: as long as it has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toleration_seconds: Option<i64>,
}

/// Whether the value of a taint matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// It does not.
    Exists,
    /// It does.
    Equal,
}

/// What a taint does to pods that do not tolerate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TaintEffect {
    /// They are not put on the node.
    NoSchedule,
    /// They are put on another one, if there is one.
    PreferNoSchedule,
    /// They have to leave.
    NoExecute,
}

/// What a worker asks for and may use.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What its node must have free, by resource.
    #[schemars(extend("maxProperties" = rules::MAX_PAIRS))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Amount>,
    /// What it may use at most, by resource.
    #[schemars(extend("maxProperties" = rules::MAX_PAIRS))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Amount>,
}

/// The value of a label: its length is in the schema, so that the API server can bound what a rule over a map costs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelValue(pub String);

impl JsonSchema for LabelValue {
    fn schema_name() -> Cow<'static, str> {
        "LabelValue".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "maxLength": rules::MAX_LABEL})
    }
}

/// An amount of any resource, as Kubernetes writes them: `2`, `500m`, `1.5Gi`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Amount(pub String);

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Both are written as a number or a text.
        Quantity::deserialize(deserializer).map(|quantity| Self(quantity.as_str().to_owned()))
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "An amount of a resource: a whole number, or a string such as 500m or 1.5Gi.",
            "x-kubernetes-int-or-string": true,
            "pattern": rules::AMOUNT_PATTERN,
            "minimum": 0,
        })
    }
}
