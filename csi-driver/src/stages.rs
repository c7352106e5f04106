//! The keeper, as volumes need it: what is staged where, and whether it lives. All that this crate knows of the keeper's
//! ways is here.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_keeper::{
    Keeper, KeeperOptions, KeeperStatus, MountSpec, VolumeState, VolumeStatus,
    mount::{Device, TakenDown},
};

use crate::{binds, error::VolumeError, source::Source};

/// How long daemons that have outlived the last keeper have to come back (the keeper's own default). After that the keeper
/// aborts what none of them holds, so nobody waits for ever.
const REJOIN: Duration = Duration::from_secs(10);
/// How long a volume of an earlier keeper is waited for: until the keeper has made up its mind.
const RETURN: Duration = REJOIN.saturating_add(Duration::from_secs(5));
/// How long a daemon has to serve a volume: it takes milliseconds, and a take-over a second or two.
const ATTACH: Duration = Duration::from_secs(5);
/// How often to look.
const LOOK: Duration = Duration::from_millis(5);
/// How long a stage mount that somebody still uses is asked to go before it is taken.
const UNMOUNT_GRACE: Duration = Duration::from_secs(2);

/// The mounts that the keeper has.
#[derive(Clone)]
pub struct Stages {
    keeper: Arc<Keeper>,
}

/// What a keeper of pods' mounts does, beside what it is told.
pub fn keeper_options(socket: PathBuf) -> KeeperOptions {
    KeeperOptions { resume: true, rejoin: REJOIN, ..KeeperOptions::new(socket) }
}

/// Where a volume is staged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The place of the mount.
    pub target: PathBuf,
    /// Its device number, and that of all bind mounts of it.
    pub device: Device,
    /// Whether requests are answered, or will be.
    pub lives: bool,
}

impl Stages {
    /// Over a keeper.
    pub fn new(keeper: Arc<Keeper>) -> Self {
        Self { keeper }
    }

    /// The place of the mount, now.
    pub fn place(&self, volume: &str) -> Result<Option<PathBuf>, VolumeError> {
        Ok(self.volume(volume)?.map(|status| status.mount.target))
    }

    /// Everything that the keeper knows.
    pub fn status(&self) -> Result<KeeperStatus, VolumeError> {
        Ok(self.keeper.status()?)
    }

    /// What the keeper says of a volume.
    pub fn volume(&self, volume: &str) -> Result<Option<VolumeStatus>, VolumeError> {
        let status = self.status()?;
        Ok(status.volumes.into_iter().find(|status| status.mount.volume == volume))
    }

    /// Where a volume is staged. One that an earlier keeper has mounted is there when a daemon has given it back, or none has
    /// in time.
    pub fn find(&self, volume: &str) -> Result<Option<Stage>, VolumeError> {
        let deadline = Instant::now() + RETURN;
        loop {
            let Some(VolumeStatus { mount, state, .. }) = self.volume(volume)? else { return Ok(None) };
            let served = match state {
                VolumeState::Returning if Instant::now() < deadline => {
                    std::thread::sleep(LOOK);
                    continue;
                }
                // Without a daemon, requests wait for the next one; the keeper bounds that.
                VolumeState::Vacant | VolumeState::Attaching | VolumeState::Served => true,
                VolumeState::Returning | VolumeState::Aborted => false,
            };
            // Somebody else may have unmounted it, and the keeper would not know yet.
            let there = binds::look(&mount.target)?.is_some_and(|mounted| mounted.device == mount.device);
            return Ok(Some(Stage { target: mount.target, device: mount.device, lives: served && there }));
        }
    }

    /// Waits until a daemon serves a volume. A pod must not be started before: whatever sets up its containers looks at the
    /// mount, and would hang.
    pub fn served(&self, volume: &str) -> Result<(), VolumeError> {
        let deadline = Instant::now() + ATTACH;
        while self.volume(volume)?.is_some_and(|status| status.state != VolumeState::Served) {
            if Instant::now() >= deadline {
                let text = match self.status()?.daemons.len() {
                    0 => "no FUSE daemon is connected on this node; is the pod of the DaemonSet forebay-fuse running?",
                    _ => "no FUSE daemon serves the volume yet",
                };
                return Err(VolumeError::Unavailable(text.to_owned()));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Mounts a volume at a directory that nothing is mounted on.
    pub fn mount(&self, volume: &str, target: &Path, source: &Source) -> Result<Stage, VolumeError> {
        let spec = MountSpec {
            fsname: format!("forebay:{}", source.dataset.name),
            ..MountSpec::new(volume, target, source.config()?)
        };
        let info = self.keeper.mount(spec)?;
        for loss in &info.losses {
            tracing::warn!(volume, "{loss}");
        }
        Ok(Stage { target: info.target, device: info.device, lives: true })
    }

    /// Unmounts what the keeper has mounted; readers that are left get errors.
    pub fn unmount(&self, volume: &str) -> Result<TakenDown, VolumeError> {
        Ok(self.keeper.unmount(volume, UNMOUNT_GRACE)?)
    }

    /// The same for a mount that is dead: there is nobody to wait for.
    pub fn bury(&self, volume: &str) -> Result<TakenDown, VolumeError> {
        Ok(self.keeper.unmount(volume, Duration::ZERO)?)
    }
}
