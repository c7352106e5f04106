//! What the keeper says of volumes and daemons, in the words of CSI 1.13's volume and storage health.

use std::path::Path;

use forebay_keeper::{Health, HealthState, KeeperStatus, NO_DAEMON};

use crate::proto::csi::{
    StorageHealthErrorType, VolumeHealth, VolumeHealthErrorType,
    node_get_storage_health_response::StorageBackendHealth, volume_health::VolumeHealthEntry,
};

/// No other daemon is ready to take over.
const NO_STANDBY: &str = "NoStandby";
/// A mount that cannot be served any more.
const DEAD_MOUNT: &str = "DeadMount";

/// Of a volume. What is not known yet (it was mounted a moment ago) is not called bad.
pub fn volume(volume: &str, health: Option<&Health>) -> VolumeHealth {
    let status = |state| match state {
        HealthState::Healthy => None,
        HealthState::Degraded => Some(VolumeHealthErrorType::Degraded),
        HealthState::Inaccessible => Some(VolumeHealthErrorType::Inaccessible),
    };
    let entry = |health: &Health| {
        Some(VolumeHealthEntry {
            status: status(health.state)?.into(),
            reason: health.reason.clone(),
            message: health.message.clone(),
        })
    };
    VolumeHealth { volume_id: volume.to_owned(), health_statuses: health.and_then(entry).into_iter().collect() }
}

/// Of a volume where a mount is left that nobody serves any more: the stage mount was made again since, or is unknown.
pub fn dead_mount(volume: &str, place: &Path) -> VolumeHealth {
    let message = format!(
        "the mount on {} has ended; the kubelet has it mounted again within about a minute, and containers that still \
         have the old one must be restarted",
        place.display()
    );
    self::volume(volume, Some(&Health::new(HealthState::Inaccessible, DEAD_MOUNT, &message)))
}

/// Of this node as a place where Datasets are read.
pub fn storage(status: &KeeperStatus) -> Option<StorageBackendHealth> {
    let (kind, reason, message) = match status.daemons.len() {
        0 => {
            let message = "no FUSE daemon is connected on this node; reads of mounted Datasets wait for one";
            (StorageHealthErrorType::StorageUnreachable, NO_DAEMON, message)
        }
        1 => {
            let message = "one FUSE daemon is connected on this node; if it ends, reads wait until another has started";
            (StorageHealthErrorType::StorageDegraded, NO_STANDBY, message)
        }
        _ => return None,
    };
    Some(StorageBackendHealth { status: kind.into(), reason: reason.to_owned(), message: message.to_owned() })
}

#[cfg(test)]
mod tests {
    use forebay_keeper::{DaemonStatus, Role};

    use super::*;

    #[test]
    fn of_volumes() {
        for (health, expected) in [
            (None, None),
            (Some(Health::default()), None),
            (
                Some(Health::new(HealthState::Degraded, "WorkersUnavailable", "1 of 2")),
                Some((VolumeHealthErrorType::Degraded, "WorkersUnavailable", "1 of 2")),
            ),
            (
                Some(Health::new(HealthState::Inaccessible, "NoWorker", "none of 2")),
                Some((VolumeHealthErrorType::Inaccessible, "NoWorker", "none of 2")),
            ),
        ] {
            let VolumeHealth { volume_id, health_statuses } = volume("v", health.as_ref());
            assert_eq!(volume_id, "v");
            let found: Vec<_> = health_statuses.iter().map(|e| (e.status(), &*e.reason, &*e.message)).collect();
            assert_eq!(found, Vec::from_iter(expected));
        }
    }

    #[test]
    fn of_the_node() {
        let daemon = |pid| DaemonStatus { pid, uid: 1, name: "a".into(), role: Role::Active, silent_millis: 0 };
        for (daemons, expected) in [
            (vec![], Some((StorageHealthErrorType::StorageUnreachable, "NoDaemon"))),
            (vec![daemon(1)], Some((StorageHealthErrorType::StorageDegraded, "NoStandby"))),
            (vec![daemon(1), daemon(2)], None),
        ] {
            let status = KeeperStatus { daemons, ..KeeperStatus::default() };
            let found = storage(&status);
            assert_eq!(found.as_ref().map(|health| (health.status(), &*health.reason)), expected);
        }
    }
}
