//! The record of what was mounted, so that a later keeper takes over or takes down the mounts of one that is gone, and no
//! others. It is what decides: a daemon gives back descriptors, but where they are mounted is read here.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::mountinfo::{self, Device};
use super::{FUSE_KIND, Loss, MountInfo, MountMode, fusectl, teardown};

/// Version of the file. Version 1 had no losses.
const VERSION: u32 = 2;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    pub(crate) volume: String,
    pub(crate) target: PathBuf,
    pub(crate) source: String,
    /// Unknown until the mount was made and its INIT answered.
    pub(crate) device: Option<Device>,
    pub(crate) mode: MountMode,
    #[serde(default)]
    pub(crate) losses: Vec<Loss>,
}

impl Record {
    /// `None` for one that was not made to the end.
    fn info(&self) -> Option<MountInfo> {
        let Self { volume, target, source: _, device, mode, losses } = self.clone();
        let device = device?;
        Some(MountInfo { volume, target, device, connection: device.connection(), mode, losses })
    }
}

#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    mounts: Vec<Record>,
}

/// The file, locked by the keeper that lives. The lock is a file beside it and goes with the process.
pub(crate) struct StateFile {
    path: PathBuf,
    mounts: Vec<Record>,
    _lock: File,
}

/// A stale mount that was taken down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleaned {
    /// Its volume.
    pub volume: String,
    /// Where it was.
    pub target: PathBuf,
}

impl StateFile {
    /// Locks the file and reads it. `WouldBlock` when another keeper lives. A file that can not be read is set aside.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let lock = lock(path)?;
        let mounts = match std::fs::read(path) {
            Ok(bytes) => match serde_json::from_slice::<Contents>(&bytes) {
                Ok(Contents { version: 1..=VERSION, mounts }) => mounts,
                Ok(Contents { version, .. }) => {
                    tracing::warn!(version, path = %path.display(), "mount record of another version is set aside");
                    set_aside(path)?
                }
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "damaged mount record is set aside");
                    set_aside(path)?
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { path: path.to_owned(), mounts, _lock: lock })
    }

    /// Takes down every recorded mount that is still there.
    pub(crate) fn clean(&mut self) -> io::Result<Vec<Cleaned>> {
        Ok(self.sort_out(false)?.1)
    }

    /// What daemons may still hold: recorded mounts that were made to the end and are there. The others are taken down.
    pub(crate) fn resume(&mut self) -> io::Result<(Vec<MountInfo>, Vec<Cleaned>)> {
        self.sort_out(true)
    }

    /// No keeper has these mounts: its lock is ours.
    fn sort_out(&mut self, resume: bool) -> io::Result<(Vec<MountInfo>, Vec<Cleaned>)> {
        let mut returning = Vec::new();
        let mut cleaned = Vec::new();
        let mut left = Vec::new();
        for record in std::mem::take(&mut self.mounts) {
            if resume
                && let Some(info) = record.info()
                && mountinfo::at(&record.target)?.is_some_and(|entry| is_of(&entry, &record))
            {
                returning.push(info);
                left.push(record);
                continue;
            }
            let mut found = false;
            for entry in mountinfo::read()?.into_iter().filter(|entry| is_of(entry, &record)) {
                found = true;
                if let Err(error) = fusectl::abort(entry.device, &record.target) {
                    tracing::warn!(%error, target = %record.target.display(), "stale mount not aborted");
                }
                match teardown::detach(&record.target, entry.device, record.mode) {
                    Ok(()) => {
                        cleaned.push(Cleaned { volume: record.volume.clone(), target: record.target.clone() });
                        found = false;
                    }
                    Err(error) => {
                        tracing::warn!(%error, target = %record.target.display(), "stale mount not taken down");
                    }
                }
            }
            if found {
                left.push(record);
            }
        }
        self.mounts = left;
        self.save()?;
        Ok((returning, cleaned))
    }

    /// Records a mount, or replaces the record of the same target.
    pub(crate) fn put(&mut self, record: Record) -> io::Result<()> {
        self.mounts.retain(|other| other.target != record.target);
        self.mounts.push(record);
        self.save()
    }

    /// Forgets the mount at a target.
    pub(crate) fn remove(&mut self, target: &Path) -> io::Result<()> {
        self.mounts.retain(|other| other.target != target);
        self.save()
    }

    /// Removes the files of a keeper that leaves nothing behind. With mounts left, they stay for the next one.
    pub(crate) fn finish(self) -> io::Result<()> {
        if self.mounts.is_empty() {
            // In this order, and all under the lock: whoever gets it next sees neither or makes its own.
            match std::fs::remove_file(succession_path(&self.path)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            std::fs::remove_file(&self.path)?;
            std::fs::remove_file(lock_path(&self.path))?;
        }
        Ok(())
    }

    fn save(&self) -> io::Result<()> {
        let contents = Contents { version: VERSION, mounts: self.mounts.clone() };
        let mut temporary = self.path.as_os_str().to_owned();
        temporary.push(".new");
        // The directory may belong to an unprivileged user: nothing that lies there is opened or followed.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(&contents)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &self.path)
    }
}

/// Beside the record: which daemons have served.
pub(crate) fn succession_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".daemons");
    PathBuf::from(name)
}

fn lock_path(path: &Path) -> PathBuf {
    let mut lock = path.as_os_str().to_owned();
    lock.push(".lock");
    PathBuf::from(lock)
}

fn lock(path: &Path) -> io::Result<File> {
    let name = lock_path(path);
    loop {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&name)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            let error = io::Error::from(error);
            let text = format!("another keeper uses {} ({error})", path.display());
            io::Error::new(error.kind(), text)
        })?;
        // The one before may have removed the file between our opening and locking it.
        match std::fs::metadata(&name) {
            Ok(metadata) if metadata.ino() == file.metadata()?.ino() => return Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
}

fn is_of(entry: &mountinfo::Entry, record: &Record) -> bool {
    entry.target == record.target
        && entry.kind == FUSE_KIND
        && entry.source == record.source.as_str()
        && record.device.is_none_or(|device| device == entry.device)
}

fn set_aside(path: &Path) -> io::Result<Vec<Record>> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    std::fs::rename(path, aside)?;
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str) -> Record {
        Record {
            volume: "v".to_owned(),
            target: PathBuf::from(target),
            source: "forebay:v".to_owned(),
            device: Some(Device { major: 0, minor: 9 }),
            mode: MountMode::Kernel,
            losses: Vec::new(),
        }
    }

    #[test]
    fn the_format_changes_only_with_its_version() {
        let loss = Loss::ReadAhead { kib: 128, reason: "no".to_owned() };
        let contents = Contents { version: VERSION, mounts: vec![Record { losses: vec![loss], ..record("/a") }] };
        let text = r#"{"version":2,"mounts":[{"volume":"v","target":"/a","source":"forebay:v","device":{"major":0,"minor":9},"mode":"kernel","losses":[{"what":"readAhead","kib":128,"reason":"no"}]}]}"#;
        assert_eq!(serde_json::to_string(&contents).unwrap(), text);
        let old = text
            .replace("\"version\":2", "\"version\":1")
            .replace(r#","losses":[{"what":"readAhead","kib":128,"reason":"no"}]"#, "");
        let Contents { version: 1, mounts } = serde_json::from_str(&old).unwrap() else { panic!() };
        assert_eq!(mounts, vec![record("/a")]);
    }

    #[test]
    fn records_survive_and_are_locked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut state = StateFile::open(&path).unwrap();
        assert_eq!(StateFile::open(&path).err().unwrap().kind(), io::ErrorKind::WouldBlock);
        state.put(record("/a")).unwrap();
        state.put(record("/b")).unwrap();
        state.put(record("/a")).unwrap();
        state.remove(Path::new("/b")).unwrap();
        drop(state);
        let mut state = StateFile::open(&path).unwrap();
        assert_eq!(state.mounts, vec![record("/a")]);
        // Not mounted (any more): forgotten, and nothing is touched.
        assert_eq!(state.clean().unwrap(), vec![]);
        assert_eq!(state.mounts, vec![]);
        drop(state);
        std::fs::write(&path, b"{ torn").unwrap();
        let mut state = StateFile::open(&path).unwrap();
        assert_eq!(state.mounts, vec![]);
        assert!(dir.path().join("state.json.damaged").exists());
        state.clean().unwrap();
        state.finish().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_what_was_recorded_is_ours() {
        let entry = mountinfo::Entry {
            device: Device { major: 0, minor: 9 },
            target: PathBuf::from("/a"),
            kind: FUSE_KIND.to_owned(),
            source: "forebay:v".into(),
        };
        assert!(is_of(&entry, &record("/a")));
        assert!(!is_of(&entry, &record("/b")));
        assert!(!is_of(&mountinfo::Entry { kind: "fuse.other".to_owned(), ..entry.clone() }, &record("/a")));
        assert!(!is_of(&mountinfo::Entry { source: "forebay:w".into(), ..entry.clone() }, &record("/a")));
        let device = Device { major: 0, minor: 10 };
        assert!(!is_of(&mountinfo::Entry { device, ..entry }, &record("/a")));
    }
}
