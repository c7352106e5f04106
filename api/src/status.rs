//! What the statuses of several kinds share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where an object stands; its conditions say why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not usable yet.
    #[default]
    Pending,
    /// All of it works.
    Ready,
    /// It works, with less than was asked for.
    Degraded,
    /// It does not work, and will not by itself.
    Failed,
}

/// The workers that serve, as clients place data on them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerTable {
    /// Number of this version of the table; it only grows.
    pub epoch: u64,
    /// The workers, by unique name.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub members: Vec<WorkerMember>,
}

/// A worker of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerMember {
    /// Name of its pod; what placement hashes.
    pub name: String,
    /// Where it listens, `host:port`.
    pub address: String,
    /// Its share of the data relative to the others.
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
    /// Whether it takes new data.
    pub state: MemberState,
}

/// Whether a worker takes new data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MemberState {
    /// It owns its share.
    #[default]
    Serving,
    /// It owns nothing any more and still serves what it holds.
    Draining,
}
