//! The worker table: who the workers of a runtime are. Written by `forebay up` or the operator, read by everybody.

use serde::{Deserialize, Serialize};

use crate::worker::{TableMember, TableResponse};

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

/// Why a table that somebody sent is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTable {
    /// More than [`MAX_MEMBERS`].
    #[error("a worker table of {0} members")]
    TooMany(usize),
    /// Its name or its address is empty.
    #[error("a worker table with a member without name or address")]
    Nameless,
    /// Names are what placement goes by.
    #[error("a worker table in which '{0}' stands twice")]
    Twice(String),
    /// Outside 1 to 1,000.
    #[error("a worker table in which '{name}' has weight {weight}")]
    Weight {
        /// Whose.
        name: String,
        /// Which.
        weight: u32,
    },
}

/// Largest [`Member::weight`].
const MAX_WEIGHT: u32 = 1_000;

impl WorkerTable {
    /// As a worker of the runtime with this UID ("" outside a cluster) answers it.
    pub fn to_wire(&self, runtime_uid: &str) -> TableResponse {
        let members = self.members.iter().map(|member| TableMember {
            name: member.name.clone(),
            address: member.address.clone(),
            weight: member.weight,
            draining: member.state == MemberState::Draining,
        });
        TableResponse { epoch: self.epoch, members: members.collect(), runtime_uid: runtime_uid.to_owned() }
    }

    /// Checks what a worker answered; gives the runtime's UID as well.
    pub fn from_wire(response: TableResponse) -> Result<(Self, String), InvalidTable> {
        let TableResponse { epoch, members, runtime_uid } = response;
        if members.len() > MAX_MEMBERS {
            return Err(InvalidTable::TooMany(members.len()));
        }
        let mut names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(InvalidTable::Twice(twice[0].to_owned()));
        }
        let members = members.into_iter().map(Member::from_wire).collect::<Result<_, _>>()?;
        Ok((Self { epoch, members }, runtime_uid))
    }
}

impl Member {
    fn from_wire(member: TableMember) -> Result<Self, InvalidTable> {
        let TableMember { name, address, weight, draining } = member;
        if name.is_empty() || address.is_empty() {
            return Err(InvalidTable::Nameless);
        }
        if !(1..=MAX_WEIGHT).contains(&weight) {
            return Err(InvalidTable::Weight { name, weight });
        }
        let state = if draining { MemberState::Draining } else { MemberState::Serving };
        Ok(Self { name, address, weight, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, weight: u32, state: MemberState) -> Member {
        Member { name: name.to_owned(), address: format!("{name}:7400"), weight, state }
    }

    #[test]
    fn tables_travel_and_are_checked() {
        let members = vec![member("a", 1, MemberState::Serving), member("b", 1_000, MemberState::Draining)];
        let table = WorkerTable { epoch: 7, members };
        let sent = table.to_wire("uid");
        assert_eq!(WorkerTable::from_wire(sent.clone()), Ok((table, "uid".to_owned())));

        let changed = |change: fn(&mut TableResponse)| {
            let mut response = sent.clone();
            change(&mut response);
            WorkerTable::from_wire(response).unwrap_err()
        };
        assert_eq!(changed(|table| table.members[0].name = "b".into()), InvalidTable::Twice("b".into()));
        assert_eq!(changed(|table| table.members[0].name.clear()), InvalidTable::Nameless);
        assert_eq!(changed(|table| table.members[1].address.clear()), InvalidTable::Nameless);
        assert!(matches!(changed(|table| table.members[1].weight = 0), InvalidTable::Weight { weight: 0, .. }));
        assert!(matches!(changed(|table| table.members[1].weight = 1_001), InvalidTable::Weight { .. }));
        let many = |table: &mut TableResponse| table.members = vec![TableMember::default(); MAX_MEMBERS + 1];
        assert_eq!(changed(many), InvalidTable::TooMany(MAX_MEMBERS + 1));
    }
}
