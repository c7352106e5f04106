//! The worker table: who the workers of a runtime are. Written by `forebay up` or the operator, read by everybody.

use serde::{Deserialize, Serialize};

/// Most members a table may have; a bound for decoders, well above the thousand nodes we aim at.
pub const MAX_MEMBERS: usize = 4096;

/// A version of the table. Epochs only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkerTable {
    /// Number of this version.
    pub epoch: u64,
    /// The workers, in no particular order; names are unique.
    pub members: Vec<Member>,
}

/// A worker of the runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Member {
    /// Stable name (the pod's name in a cluster); what placement hashes.
    pub name: String,
    /// Where it listens, `host:port`.
    pub address: String,
    /// Share of the keys relative to the others; 1 to 1,000.
    #[serde(default = "one")]
    pub weight: u32,
    /// Whether it takes new data.
    #[serde(default)]
    pub state: MemberState,
}

/// What a worker may be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberState {
    /// Owns keys.
    #[default]
    Serving,
    /// Owns nothing any more, still serves what it holds until its grace ends.
    Draining,
}

fn one() -> u32 {
    1
}
