//! The worker table: who serves, and at which address.
//!
//! A worker is in it from its first address until its ordinal is no longer wanted and its pod is gone. One that is away
//! for a moment keeps its place: data moves only when the number of workers changes.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use forebay_api::{MemberState, WORKER_PORT, WorkerMember, WorkerTable};

use crate::views::WorkerPod;

/// All workers have tiers of the same capacity.
const WEIGHT: u32 = 1;

/// The table that follows `before`; `None` when nothing changed. `stateful_set` is the name of the pods without their
/// ordinals.
pub fn next(
    before: Option<&WorkerTable>,
    stateful_set: &str,
    replicas: u32,
    pods: &[(u32, Arc<WorkerPod>)],
) -> Option<WorkerTable> {
    let pods: BTreeMap<u32, &WorkerPod> = pods.iter().map(|(ordinal, pod)| (*ordinal, &**pod)).collect();
    let mut known: BTreeMap<u32, &WorkerMember> = BTreeMap::new();
    for member in before.into_iter().flat_map(|table| &table.members) {
        let ordinal = member.name.strip_prefix(stateful_set).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
        known.extend(ordinal.map(|ordinal| (ordinal, member)));
    }

    let ordinals = known.keys().chain(pods.keys()).copied().collect::<std::collections::BTreeSet<u32>>();
    let mut members: Vec<(u32, WorkerMember)> = Vec::new();
    for ordinal in ordinals {
        let (pod, wanted) = (pods.get(&ordinal), ordinal < replicas);
        let name = format!("{stateful_set}-{ordinal}");
        let member = match (pod.and_then(|pod| Some((pod, address(pod)?))), known.get(&ordinal)) {
            (Some((pod, address)), _) => {
                let serves = wanted && !pod.is_terminating();
                let state = if serves { MemberState::Serving } else { MemberState::Draining };
                WorkerMember { name, address, weight: WEIGHT, state }
            }
            (None, Some(member)) if wanted => (*member).clone(),
            (None, _) => continue,
        };
        members.push((ordinal, member));
    }
    // Somebody has to own the data: if all of them are about to be replaced, they do until they are.
    if members.iter().all(|(_, member)| member.state == MemberState::Draining) {
        for (_, member) in members.iter_mut().filter(|(ordinal, _)| *ordinal < replicas) {
            member.state = MemberState::Serving;
        }
    }

    let members: Vec<WorkerMember> = members.into_iter().map(|(_, member)| member).collect();
    let unchanged = before.map_or(members.is_empty(), |table| table.members == members);
    let epoch = before.map_or(0, |table| table.epoch) + 1;
    (!unchanged).then_some(WorkerTable { epoch, members })
}

/// Where a worker listens, once its container was started.
fn address(pod: &WorkerPod) -> Option<String> {
    let ip: IpAddr = pod.status.pod_ip.parse().ok()?;
    (pod.status.phase == "Running").then(|| SocketAddr::new(ip, WORKER_PORT).to_string())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;
    use crate::views::PodStatus;

    fn pod(ordinal: u32, ip: &str, phase: &str) -> (u32, Arc<WorkerPod>) {
        let status = PodStatus { phase: phase.into(), pod_ip: ip.into(), conditions: Vec::new() };
        let mut pod = WorkerPod { status, ..WorkerPod::default() };
        pod.metadata.name = Some(format!("w-{ordinal}"));
        (ordinal, Arc::new(pod))
    }

    fn terminating(ordinal: u32, ip: &str) -> (u32, Arc<WorkerPod>) {
        let (_, pod) = pod(ordinal, ip, "Running");
        let mut pod = (*pod).clone();
        pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        (ordinal, Arc::new(pod))
    }

    fn shown(table: &WorkerTable) -> Vec<String> {
        let member = |m: &WorkerMember| format!("{} {} {:?}", m.name, m.address, m.state);
        table.members.iter().map(member).collect()
    }

    #[test]
    fn workers_appear_with_their_addresses() {
        assert_eq!(next(None, "w", 2, &[]), None);
        assert_eq!(next(None, "w", 2, &[pod(0, "", "Pending"), pod(1, "10.0.0.2", "Pending")]), None);
        let first = next(None, "w", 2, &[pod(1, "10.0.0.2", "Running")]).unwrap();
        assert_eq!((first.epoch, shown(&first)), (1, vec!["w-1 10.0.0.2:7400 Serving".to_owned()]));
        let pods = [pod(0, "fd00::1", "Running"), pod(1, "10.0.0.2", "Running")];
        let second = next(Some(&first), "w", 2, &pods).unwrap();
        assert_eq!(second.epoch, 2);
        assert_eq!(shown(&second), ["w-0 [fd00::1]:7400 Serving", "w-1 10.0.0.2:7400 Serving"]);
        assert_eq!(next(Some(&second), "w", 2, &pods), None);
    }

    #[test]
    fn a_worker_that_is_away_keeps_its_place() {
        let pods = [pod(0, "10.0.0.1", "Running"), pod(1, "10.0.0.2", "Running")];
        let table = next(None, "w", 2, &pods).unwrap();
        assert_eq!(next(Some(&table), "w", 2, &pods[..1]), None);
        let failed = [pod(0, "10.0.0.1", "Running"), pod(1, "", "Failed")];
        assert_eq!(next(Some(&table), "w", 2, &failed), None);
        let back = [pod(0, "10.0.0.1", "Running"), pod(1, "10.0.0.9", "Running")];
        let moved = next(Some(&table), "w", 2, &back).unwrap();
        assert_eq!(shown(&moved)[1], "w-1 10.0.0.9:7400 Serving");
    }

    #[test]
    fn a_pod_that_is_replaced_drains_until_the_new_one_runs() {
        let pods = [pod(0, "10.0.0.1", "Running"), pod(1, "10.0.0.2", "Running")];
        let table = next(None, "w", 2, &pods).unwrap();
        let going = [pod(0, "10.0.0.1", "Running"), terminating(1, "10.0.0.2")];
        let draining = next(Some(&table), "w", 2, &going).unwrap();
        assert_eq!(shown(&draining)[1], "w-1 10.0.0.2:7400 Draining");
        assert_eq!(next(Some(&draining), "w", 2, &going[..1]), None);
        let back = next(Some(&draining), "w", 2, &[pod(0, "10.0.0.1", "Running"), pod(1, "10.0.0.3", "Running")]);
        assert_eq!(shown(&back.unwrap())[1], "w-1 10.0.0.3:7400 Serving");
    }

    #[test]
    fn what_is_scaled_away_drains_and_goes() {
        let pods = [pod(0, "10.0.0.1", "Running"), pod(1, "10.0.0.2", "Running")];
        let table = next(None, "w", 2, &pods).unwrap();
        let fewer = next(Some(&table), "w", 1, &pods).unwrap();
        assert_eq!(shown(&fewer)[1], "w-1 10.0.0.2:7400 Draining");
        let gone = next(Some(&fewer), "w", 1, &pods[..1]).unwrap();
        assert_eq!((gone.epoch, shown(&gone)), (3, vec!["w-0 10.0.0.1:7400 Serving".to_owned()]));
    }

    #[test]
    fn the_last_worker_owns_the_data_until_it_is_replaced() {
        let table = next(None, "w", 1, &[pod(0, "10.0.0.1", "Running")]).unwrap();
        assert_eq!(next(Some(&table), "w", 1, &[terminating(0, "10.0.0.1")]), None);
        assert_eq!(next(Some(&table), "w", 1, &[]), None);
    }
}
