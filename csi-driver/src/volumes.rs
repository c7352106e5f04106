//! The life of volumes on this node: staged once, published to pods, and taken down.
//!
//! Every operation can be repeated, and finds out what is there from the keeper and the mount table, so that it goes on
//! from wherever the last attempt, or the last process, ended. The record in memory is for one purpose only: to see that
//! a repeated call asks for something else than the call before. It is lost with the process, and then nothing is seen.
//!
//! All of it blocks, for a bounded time; callers hold the volume's lock ([`crate::locks`]).

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

use crate::{
    binds,
    capability::Capability,
    error::VolumeError,
    proto::csi::VolumeUsage,
    source::{Dataset, Source},
    stages::{Stage, Stages},
    stats::Stats,
};

/// For what a volume is published at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Use {
    capability: Capability,
    readonly: bool,
}

/// What was asked for. Secrets and services are not compared: a Secret may change, and its service with it.
#[derive(Debug)]
struct Record {
    dataset: Dataset,
    staged: Option<Capability>,
    published: BTreeMap<PathBuf, Use>,
}

/// A checked NodeStageVolume.
#[derive(Clone, Debug)]
pub struct StageRequest {
    /// The volume.
    pub volume: String,
    /// Where to stage it.
    pub stage: PathBuf,
    /// For what.
    pub capability: Capability,
    /// What it shows.
    pub source: Source,
}

/// A checked NodePublishVolume.
#[derive(Clone, Debug)]
pub struct PublishRequest {
    /// The volume.
    pub volume: String,
    /// Where it is staged; `None` for an inline volume, which is staged here.
    pub stage: Option<PathBuf>,
    /// Where the pod looks for it.
    pub target: PathBuf,
    /// For what.
    pub capability: Capability,
    /// Volumes are never anything else; kept to compare.
    pub readonly: bool,
    /// What it shows.
    pub source: Source,
}

/// The volumes of this node.
pub struct Volumes {
    stages: Stages,
    stats: Stats,
    /// Where inline volumes are staged.
    inline: PathBuf,
    records: Mutex<HashMap<String, Record>>,
}

impl Volumes {
    /// Over what the keeper has mounted. Inline volumes are staged in `inline`.
    pub fn new(stages: Stages, inline: PathBuf) -> Self {
        Self { stages, stats: Stats::default(), inline, records: Mutex::default() }
    }

    /// The stage mounts.
    pub fn stages(&self) -> &Stages {
        &self.stages
    }

    /// How large a volume is that is mounted at `path`.
    pub fn usage(&self, volume: &str, path: &Path) -> Result<Vec<VolumeUsage>, VolumeError> {
        self.stats.usage(&self.stages, volume, path)
    }

    /// Mounts a volume for all pods of this node.
    pub fn stage(&self, request: &StageRequest) -> Result<(), VolumeError> {
        let StageRequest { volume, stage, capability, source } = request;
        let (_, found) = self.ensure_staged(volume, stage, source)?;
        let mut records = self.records.lock();
        let Some(record) = records.get_mut(volume) else { return Ok(()) };
        if found == Found::Living && record.staged.is_some_and(|before| before != *capability) {
            return Err(VolumeError::Incompatible(format!("volume '{volume}' is staged for another use already")));
        }
        record.staged = Some(*capability);
        Ok(())
    }

    /// Undoes [`Self::stage`], also when the mount is dead, or the keeper has never heard of it.
    pub fn unstage(&self, volume: &str, stage: &Path) -> Result<(), VolumeError> {
        self.take_stage_down(volume, stage)?;
        self.forget(volume, |record| record.staged = None);
        Ok(())
    }

    /// Shows a volume to a pod. What died meanwhile, here or in the stage mount, is mounted again.
    pub fn publish(&self, request: &PublishRequest) -> Result<(), VolumeError> {
        let PublishRequest { volume, stage, source, .. } = request;
        let place = stage.clone().unwrap_or_else(|| self.inline.join(volume));
        let (staged, found) = self.ensure_staged(volume, &place, source)?;
        let published = self.ensure_published(request, &staged);
        if published.is_err() && stage.is_none() && found == Found::Nothing {
            // Nobody will unpublish what was not published.
            if let Err(error) = self.unstage_inline(volume) {
                tracing::warn!(volume, %error, "an inline volume that could not be published is still staged");
            }
        }
        published
    }

    /// Undoes [`Self::publish`].
    pub fn unpublish(&self, volume: &str, target: &Path) -> Result<(), VolumeError> {
        if let Some(target) = binds::resolve(target)? {
            if binds::take_down(&target)? {
                tracing::info!(volume, target = %target.display(), "unpublished");
            }
            binds::remove(&target)?;
            self.forget(volume, |record| {
                record.published.remove(&target);
            });
        }
        if is_component(volume) { self.unstage_inline(volume) } else { Ok(()) }
    }

    /// Has a volume staged at a place.
    fn ensure_staged(&self, volume: &str, stage: &Path, source: &Source) -> Result<(Stage, Found), VolumeError> {
        let place = binds::prepare(stage)?;
        let known = self.stages.find(volume)?;
        let (stage, found) = match known {
            Some(known) if known.lives && known.target == place => (known, Found::Living),
            Some(known) if known.lives => {
                let text = format!("volume '{volume}' is staged at {}", known.target.display());
                return Err(VolumeError::Precondition(text));
            }
            Some(known) => {
                tracing::warn!(volume, stage = %known.target.display(), "the stage mount is dead; it is made again");
                self.stages.bury(volume)?;
                (self.mount(volume, &place, source)?, Found::Dead)
            }
            None => (self.mount(volume, &place, source)?, Found::Nothing),
        };
        let dataset = source.dataset.clone();
        let mut records = self.records.lock();
        let record = records.entry(volume.to_owned()).or_insert_with(|| Record::new(dataset.clone()));
        if found == Found::Living && record.dataset != dataset {
            let text = format!("volume '{volume}' shows Dataset {} already", record.dataset.name);
            return Err(VolumeError::Incompatible(text));
        }
        record.dataset = dataset;
        Ok((stage, found))
    }

    fn mount(&self, volume: &str, place: &Path, source: &Source) -> Result<Stage, VolumeError> {
        if let Some(other) = self.stages.status()?.volumes.iter().find(|other| other.mount.target == place) {
            let text = format!("volume '{}' is staged at {}", other.mount.volume, place.display());
            return Err(VolumeError::Incompatible(text));
        }
        if binds::take_down(place)? {
            tracing::warn!(volume, stage = %place.display(), "took down a mount that no keeper knows");
        }
        let stage = self.stages.mount(volume, place, source)?;
        tracing::info!(volume, dataset = source.dataset.name, stage = %place.display(), "staged");
        Ok(stage)
    }

    /// Has a staged volume published at the target of a request.
    fn ensure_published(&self, request: &PublishRequest, stage: &Stage) -> Result<(), VolumeError> {
        let PublishRequest { volume, target, capability, readonly, .. } = request;
        let asked = Use { capability: *capability, readonly: *readonly };
        if !capability.shared()
            && let Some(other) = self.other_target(volume, target)?
        {
            let text = format!("volume '{volume}' is published at {} and may be at one place only", other.display());
            return Err(VolumeError::Precondition(text));
        }
        let target = binds::prepare(target)?;
        match binds::look(&target)? {
            Some(top) if top.device == stage.device => {
                let records = self.records.lock();
                let before = records.get(volume).and_then(|record| record.published.get(&target));
                if before.is_some_and(|before| *before != asked) {
                    let text = format!("volume '{volume}' is published at {} for another use", target.display());
                    return Err(VolumeError::Incompatible(text));
                }
            }
            Some(top) if binds::is_ours(&top) => {
                binds::replace(&stage.target, stage.device, &target, capability.noexec)?;
                tracing::warn!(volume, target = %target.display(), "published again in the place of a dead mount");
            }
            Some(top) => return Err(binds::foreign(&target, &top)),
            None => {
                self.stages.served(volume)?;
                if let Err(error) = binds::bind(&stage.target, stage.device, &target, capability.noexec) {
                    // Made by us or, before, by the one who asks, who will ask again.
                    let _ = binds::remove(&target);
                    return Err(error);
                }
                tracing::info!(volume, target = %target.display(), "published");
            }
        }
        if let Some(record) = self.records.lock().get_mut(volume) {
            record.published.insert(target, asked);
        }
        Ok(())
    }

    /// Another place where a volume is still published.
    fn other_target(&self, volume: &str, target: &Path) -> Result<Option<PathBuf>, VolumeError> {
        let target = binds::resolve(target)?;
        let others: Vec<PathBuf> = match self.records.lock().get(volume) {
            Some(record) => record.published.keys().filter(|other| Some(*other) != target.as_ref()).cloned().collect(),
            None => return Ok(None),
        };
        for other in others {
            if binds::look(&other)?.is_some_and(|top| binds::is_ours(&top)) {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    /// Takes down what is staged at a place, whoever knows of it.
    fn take_stage_down(&self, volume: &str, stage: &Path) -> Result<(), VolumeError> {
        let resolved = binds::resolve(stage)?;
        let place = resolved.as_deref().unwrap_or(stage);
        if self.stages.place(volume)?.is_some_and(|known| known == place) {
            let taken = self.stages.unmount(volume)?;
            tracing::info!(volume, stage = %place.display(), ?taken, "unstaged");
        }
        if resolved.is_some() {
            binds::take_down(place)?;
        }
        Ok(())
    }

    /// Nothing happens to a volume that is not staged as an inline one.
    fn unstage_inline(&self, volume: &str) -> Result<(), VolumeError> {
        let stage = self.inline.join(volume);
        self.take_stage_down(volume, &stage)?;
        binds::remove(&stage)
    }

    fn forget(&self, volume: &str, change: impl FnOnce(&mut Record)) {
        let mut records = self.records.lock();
        if let Some(record) = records.get_mut(volume) {
            change(record);
            if record.staged.is_none() && record.published.is_empty() {
                records.remove(volume);
            }
        }
    }
}

impl Record {
    fn new(dataset: Dataset) -> Self {
        Self { dataset, staged: None, published: BTreeMap::new() }
    }
}

/// What was staged before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Living,
    Dead,
}

/// Whether a volume's id can be the name of a directory: those of inline volumes, which the kubelet makes, can.
pub fn is_component(volume: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    volume.bytes().all(allowed) && !volume.starts_with('.') && !volume.is_empty()
}
