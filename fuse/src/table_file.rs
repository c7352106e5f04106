//! The worker table as a file: written whole and renamed into place by `forebay up`, watched here.
//!
//! The last good table stays in force while the file is missing or unreadable: workers are found without whoever writes
//! it. A table whose epoch is lower than the one known is refused.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use forebay_protocol::table::{MAX_MEMBERS, WorkerTable};
use tokio::sync::watch;

/// How often the file is looked at. A stat of a local file costs microseconds; twice a second is well below the seconds
/// that a client takes to avoid a dead worker by itself.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// Largest file that is read: the most members at half a KiB each.
const MAX_BYTES: u64 = MAX_MEMBERS as u64 * 512;

/// Why the table was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TableFileError {
    /// The file cannot be read.
    #[error("worker table {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no table.
    #[error("worker table {path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Identity of a file's contents as far as stat tells.
type Stamp = (u64, u64, i64, i64, u64);

/// A watched table.
#[derive(Debug)]
pub struct TableFile {
    path: PathBuf,
    seen: Option<Stamp>,
    sender: watch::Sender<Arc<WorkerTable>>,
}

impl TableFile {
    /// Reads the table. A file that is missing or bad gives an empty table (epoch 0, nobody serves) until it is good,
    /// so that a daemon starts, and answers `EIO` within the deadline, also before there are workers.
    pub fn open(path: &Path) -> (Self, watch::Receiver<Arc<WorkerTable>>) {
        let (sender, receiver) = watch::channel(Arc::new(WorkerTable::default()));
        let mut file = Self { path: path.to_owned(), seen: None, sender };
        if let Err(error) = file.poll() {
            tracing::warn!(error = %error, cause = ?std::error::Error::source(&error), "no worker table yet");
        }
        (file, receiver)
    }

    /// Reads the file if it changed; `true` when a new table is in force.
    pub fn poll(&mut self) -> Result<bool, TableFileError> {
        let failed = |source| TableFileError::Io { path: self.path.clone(), source };
        let metadata = fs::metadata(&self.path).map_err(failed)?;
        let stamp: Stamp = (metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len());
        if self.seen == Some(stamp) {
            return Ok(false);
        }
        let invalid = |reason: String| TableFileError::Invalid { path: self.path.clone(), reason };
        let mut json = Vec::new();
        let file = fs::File::open(&self.path).map_err(failed)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut json).map_err(failed)?;
        // A bad file is complained about once, not twice a second.
        self.seen = Some(stamp);
        if json.len() as u64 > MAX_BYTES {
            return Err(invalid(format!("larger than {MAX_BYTES} bytes")));
        }
        let table: WorkerTable = serde_json::from_slice(&json).map_err(|error| invalid(error.to_string()))?;
        if table.members.len() > MAX_MEMBERS {
            return Err(invalid(format!("more than {MAX_MEMBERS} members")));
        }
        let known = self.sender.borrow().epoch;
        if table.epoch < known {
            return Err(invalid(format!("epoch {} is older than {known}", table.epoch)));
        }
        Ok(self.sender.send_if_modified(|current| {
            let changed = **current != table;
            if changed {
                *current = Arc::new(table);
            }
            changed
        }))
    }

    /// Watches until every receiver is gone.
    pub async fn watch(mut self) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut missing = false;
        let closed = self.sender.clone();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = closed.closed() => return,
            }
            match self.poll() {
                Ok(changed) => {
                    if changed {
                        let table = self.sender.borrow();
                        tracing::info!(epoch = table.epoch, members = table.members.len(), "worker table changed");
                    }
                    missing = false;
                }
                // A missing file is missed at every look, and said once.
                Err(TableFileError::Io { .. }) if missing => {}
                Err(error) => {
                    missing = matches!(error, TableFileError::Io { .. });
                    tracing::warn!(error = %error, "the worker table stays as it was");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_protocol::table::{Member, MemberState};

    use super::*;

    fn write(path: &Path, epoch: u64, names: &[&str]) {
        let members = names
            .iter()
            .map(|name| Member {
                name: (*name).to_owned(),
                address: "127.0.0.1:1".to_owned(),
                weight: 1,
                state: MemberState::Serving,
            })
            .collect();
        let json = serde_json::to_vec(&WorkerTable { epoch, members }).unwrap();
        let staged = path.with_extension("new");
        fs::write(&staged, json).unwrap();
        fs::rename(&staged, path).unwrap();
    }

    #[test]
    fn the_last_good_table_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        let (mut file, table) = TableFile::open(&path);
        assert_eq!(table.borrow().epoch, 0);
        assert!(file.poll().is_err());
        write(&path, 3, &["a", "b"]);
        assert!(file.poll().unwrap());
        assert!(!file.poll().unwrap());
        assert_eq!(table.borrow().members.len(), 2);
        write(&path, 2, &["old"]);
        assert!(matches!(file.poll(), Err(TableFileError::Invalid { .. })));
        fs::write(&path, b"{\"epoch\": 9").unwrap();
        assert!(matches!(file.poll(), Err(TableFileError::Invalid { .. })));
        fs::remove_file(&path).unwrap();
        assert!(matches!(file.poll(), Err(TableFileError::Io { .. })));
        assert_eq!(table.borrow().epoch, 3);
        write(&path, 4, &["c"]);
        assert!(file.poll().unwrap());
        assert_eq!(table.borrow().members[0].name, "c");
    }

    #[tokio::test]
    async fn watching_sees_a_change_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        write(&path, 1, &["a"]);
        let (file, mut table) = TableFile::open(&path);
        assert_eq!(table.borrow_and_update().epoch, 1);
        let task = tokio::spawn(file.watch());
        write(&path, 2, &["a"]);
        tokio::time::timeout(Duration::from_secs(10), table.changed()).await.unwrap().unwrap();
        assert_eq!(table.borrow().epoch, 2);
        drop(table);
        tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
    }
}
