//! How large a volume is: statfs(2) of its mount, which asks the daemon, and so may hang.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use forebay_keeper::{VolumeState, mount::Device};
use parking_lot::Mutex;

use crate::{
    binds, bounded,
    error::{VolumeError, system},
    proto::csi::{VolumeUsage, volume_usage::Unit},
    stages::Stages,
};

/// The daemon answers from memory.
const STATFS: Duration = Duration::from_secs(2);

/// Asks volumes for their size, each by one call at a time.
#[derive(Default)]
pub struct Stats {
    asking: Arc<Mutex<BTreeSet<Device>>>,
}

impl Stats {
    /// Bytes and files of a volume that is staged or published at `path`. All of a Dataset is used, and nothing is free.
    pub fn usage(&self, stages: &Stages, volume: &str, path: &Path) -> Result<Vec<VolumeUsage>, VolumeError> {
        let absent = || VolumeError::NotFound(format!("volume '{volume}' is not mounted on {}", path.display()));
        let status = stages.volume(volume)?.ok_or_else(absent)?;
        let place = if path.is_absolute() { binds::resolve(path)? } else { None };
        let place = place.ok_or_else(absent)?;
        let device = status.mount.device;
        match binds::look(&place)? {
            Some(top) if top.device == device => {}
            Some(top) if binds::is_ours(&top) => {
                return Err(VolumeError::Unavailable(format!("the mount on {} is dead", path.display())));
            }
            _ => return Err(absent()),
        }
        if status.state != VolumeState::Served {
            return Err(VolumeError::Unavailable(format!("no FUSE daemon serves volume '{volume}' now")));
        }
        let asking = Asking::begin(&self.asking, device)
            .ok_or_else(|| VolumeError::Unavailable(format!("volume '{volume}' does not answer statfs")))?;
        let work = move || {
            let answer = rustix::fs::statvfs(&place);
            drop(asking);
            Ok(answer?)
        };
        let answer = bounded::run("statfs", STATFS, work, |_| ()).map_err(system("cannot ask for the size"))?;
        let bytes = to_i64(answer.f_blocks.saturating_mul(answer.f_frsize));
        let files = to_i64(answer.f_files);
        Ok(vec![
            VolumeUsage { available: 0, total: bytes, used: bytes, unit: Unit::Bytes.into() },
            VolumeUsage { available: 0, total: files, used: files, unit: Unit::Inodes.into() },
        ])
    }
}

/// A call under way; when it hangs, until it comes back.
struct Asking {
    all: Arc<Mutex<BTreeSet<Device>>>,
    device: Device,
}

impl Asking {
    fn begin(all: &Arc<Mutex<BTreeSet<Device>>>, device: Device) -> Option<Self> {
        all.lock().insert(device).then(|| Self { all: Arc::clone(all), device })
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.all.lock().remove(&self.device);
    }
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_at_a_time() {
        let all = Arc::default();
        let (a, b) = (Device { major: 0, minor: 1 }, Device { major: 0, minor: 2 });
        let first = Asking::begin(&all, a);
        assert!(first.is_some() && Asking::begin(&all, a).is_none() && Asking::begin(&all, b).is_some());
        drop(first);
        assert!(Asking::begin(&all, a).is_some());
    }
}
