//! What `forebay up` made and must take away, in whatever way it ends.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};

use super::layout::{Layout, write_private};

/// The lock of an instance: held by the open file, so it is free the moment its process ends.
#[derive(Debug)]
pub struct InstanceLock {
    _file: fs::File,
    path: PathBuf,
}

impl InstanceLock {
    /// Takes the lock; says who holds it otherwise.
    pub fn take(layout: &Layout) -> anyhow::Result<Self> {
        let path = layout.lock();
        loop {
            let file = fs::File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .with_context(|| format!("opening {}", path.display()))?;
            if flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive).is_err() {
                let holder =
                    layout.read_record().map_or_else(|_| "starting".into(), |record| format!("pid {}", record.pid));
                bail!(
                    "an instance is already running with the state directory {} ({holder}); stop it, or give another \
                     --state-dir",
                    layout.state().display()
                );
            }
            // The one before may have removed the file between our open and our lock: then ours is not the lock.
            if same_file(&file, &path) {
                return Ok(Self { _file: file, path });
            }
        }
    }
}

fn same_file(file: &fs::File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

impl Drop for InstanceLock {
    fn drop(&mut self) {
        // Removed while it is still held: nobody can take a lock that is about to vanish (see `take`).
        let _ = fs::remove_file(&self.path);
    }
}

/// Files and directories that vanish with the instance. The directories are on record, so that the next instance removes
/// what one that was killed left.
#[derive(Debug)]
pub struct Leavings {
    record: PathBuf,
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Leavings {
    /// Removes what the record says, and begins anew.
    pub fn begin(record: PathBuf) -> Self {
        // An unreadable record costs an empty directory, nothing else.
        let left: Vec<PathBuf> =
            fs::read(&record).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        remove_directories(&left);
        Self { files: vec![record.clone()], record, directories: Vec::new() }
    }

    /// A file (or socket) of this instance; one that a killed predecessor left is removed now.
    pub fn file(&mut self, path: PathBuf) -> anyhow::Result<()> {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
        self.files.push(path);
        Ok(())
    }

    /// Creates a directory to mount on, and its parents; only what did not exist is removed at the end.
    pub fn mount_point(&mut self, path: &Path) -> anyhow::Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
        self.directories.extend(missing.into_iter().rev().map(Path::to_path_buf));
        // On record before they exist: a kill in between leaves nothing.
        write_private(&self.record, &serde_json::to_vec(&self.directories)?, None)?;
        fs::create_dir_all(path).with_context(|| format!("creating the mount point {}", path.display()))?;
        let mut entries = fs::read_dir(path).with_context(|| format!("reading the mount point {}", path.display()))?;
        if entries.next().is_some() {
            bail!("the mount point {} is not empty; choose another --mount", path.display());
        }
        Ok(())
    }
}

impl Drop for Leavings {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
        remove_directories(&self.directories);
    }
}

/// Children before parents; one that somebody put something into stays.
fn remove_directories(directories: &[PathBuf]) {
    for directory in directories.iter().rev() {
        let _ = fs::remove_dir(directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_instance_at_a_time_and_no_lock_left() {
        let state = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(state.path().to_owned())).unwrap();
        let lock = InstanceLock::take(&layout).unwrap();
        assert!(InstanceLock::take(&layout).unwrap_err().to_string().contains("already running"));
        drop(lock);
        assert!(!layout.lock().exists());
        drop(InstanceLock::take(&layout).unwrap());
    }

    #[test]
    fn only_what_was_made_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let record = base.path().join("made.json");
        let mut leavings = Leavings::begin(record.clone());
        leavings.mount_point(&base.path().join("mnt/a")).unwrap();
        leavings.mount_point(&base.path().join("mnt/b")).unwrap();
        fs::write(base.path().join("full"), "").unwrap();
        assert!(leavings.mount_point(base.path()).unwrap_err().to_string().contains("not empty"));
        // Killed: nothing is dropped. The next one takes it away.
        std::mem::forget(leavings);
        assert!(base.path().join("mnt/a").exists());
        let mut leavings = Leavings::begin(record.clone());
        assert!(!base.path().join("mnt").exists());
        leavings.mount_point(&base.path().join("mnt/c")).unwrap();
        drop(leavings);
        assert!(!base.path().join("mnt").exists() && !record.exists());
        assert!(base.path().join("full").exists());
    }
}
