//! The two files that a worker reads again when they change: the table and the datasets.
//!
//! They are looked at twice per second, and at once when a client knows a newer table. A file that cannot be used is
//! logged once and leaves the last good one in force.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use tracing::{error, info};

use crate::{
    budget,
    config::{ConfigError, DatasetConfig, read_datasets, read_table},
    copies, notices, scan,
    worker::Worker,
};

/// How often a file is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How often datasets that could not be served are tried again.
const RETRY: Duration = Duration::from_secs(10);

/// What changes when a file does. Files are replaced by renaming, so the inode alone nearly always tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Mark {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self { inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) })
    }
}

/// A file that is read when it has changed.
struct Watched<'a> {
    path: &'a Path,
    read: Option<Mark>,
    failure: Option<String>,
}

impl<'a> Watched<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, read: None, failure: None }
    }

    /// Its contents, if they changed and can be used. A failure is given once.
    fn look<T>(&mut self, read: impl FnOnce(&Path) -> Result<T, ConfigError>) -> Option<Result<T, ConfigError>> {
        let mark = Mark::of(self.path).map_err(|source| ConfigError::Read { path: self.path.to_owned(), source });
        let result = match mark {
            Ok(mark) if self.read == Some(mark) => return None,
            // Marked before it is read: what is written in between is read next time.
            Ok(mark) => {
                self.read = Some(mark);
                read(self.path)
            }
            Err(error) => {
                self.read = None;
                Err(error)
            }
        };
        match result {
            Ok(contents) => {
                self.failure = None;
                Some(Ok(contents))
            }
            Err(error) => {
                let text = error.to_string();
                if self.failure.as_ref() == Some(&text) {
                    return None;
                }
                self.failure = Some(text);
                Some(Err(error))
            }
        }
    }
}

/// Follows the table.
pub(crate) async fn table(worker: Arc<Worker>) {
    let mut file = Watched::new(&worker.options.table);
    loop {
        match file.look(read_table) {
            None => {}
            Some(Ok((table, runtime))) => {
                if table.epoch > worker.members.table().epoch {
                    info!(epoch = table.epoch, members = table.members.len(), "a new worker table");
                }
                worker.members.set(table, runtime);
            }
            Some(Err(error)) if error.is_missing() && worker.members.table().members.is_empty() => {
                info!("there is no worker table yet");
            }
            Some(Err(error)) => failed(&worker, &error),
        }
        tokio::select! {
            _ = timeout(LOOK, worker.newer_table.notified()) => {}
            () = worker.stop.cancelled() => return,
        }
    }
}

/// Follows the datasets, and begins with `first`, if there was anything to read at the start.
pub(crate) async fn datasets(worker: Arc<Worker>, first: Option<Vec<DatasetConfig>>) {
    let path = worker.options.datasets.clone();
    let mut file = Watched::new(&path);
    // Read once more: it may have changed since the start.
    let mut known = first;
    let mut incomplete = None::<Instant>;
    let mut changed = true;
    loop {
        match file.look(read_datasets) {
            None => {}
            Some(Ok(read)) => {
                changed |= known.as_ref() != Some(&read);
                known = Some(read);
            }
            Some(Err(error)) if error.is_missing() && known.is_none() => info!("no datasets are named yet"),
            Some(Err(error)) => failed(&worker, &error),
        }
        if let Some(configs) = &known
            && (changed || incomplete.is_some_and(|since| since.elapsed() > RETRY))
        {
            changed = false;
            let applied = worker.datasets.apply(configs.clone()).await;
            incomplete = applied.incomplete.then(Instant::now);
            for dataset in applied.opened {
                worker.tasks.spawn(scan::coordinate(worker.clone(), dataset.clone()));
                worker.tasks.spawn(budget::keep(worker.clone(), dataset.clone()));
                worker.tasks.spawn(copies::serve(worker.clone(), dataset.clone()));
                worker.tasks.spawn(copies::keep_up(worker.clone(), dataset.clone()));
                worker.tasks.spawn(notices::supersedes(worker.clone(), dataset));
            }
            worker.datasets_loaded();
        }
        tokio::select! {
            () = sleep(LOOK) => {}
            () = worker.stop.cancelled() => return,
        }
    }
}

/// Wipes datasets that are configured no longer.
pub(crate) async fn wipe(worker: Arc<Worker>) {
    loop {
        tokio::select! {
            () = sleep(LOOK) => {}
            () = worker.stop.cancelled() => return,
        }
        worker.datasets.wipe().await;
    }
}

fn failed(worker: &Worker, problem: &ConfigError) {
    worker.metrics.reload_errors.inc();
    let error: &dyn std::error::Error = problem;
    error!(error, "a file cannot be used; the last good one stays in force");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_when_it_changed_and_complains_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        let mut file = Watched::new(&path);
        assert!(matches!(file.look(read_table), Some(Err(_))));
        assert!(file.look(read_table).is_none());
        fs::write(&path, r#"{"epoch": 1, "members": []}"#).unwrap();
        assert!(matches!(file.look(read_table), Some(Ok((table, _))) if table.epoch == 1));
        assert!(file.look(read_table).is_none());
        let next = dir.path().join("next");
        fs::write(&next, r#"{"epoch": 2, "members": []}"#).unwrap();
        fs::rename(&next, &path).unwrap();
        assert!(matches!(file.look(read_table), Some(Ok((table, _))) if table.epoch == 2));
        fs::write(&path, "{").unwrap();
        assert!(matches!(file.look(read_table), Some(Err(_))));
        assert!(file.look(read_table).is_none());
    }
}
