//! Which daemons have been told to serve, on record for the next keeper.
//!
//! A keeper that starts where another one ended must not give a volume to a standby while the daemon that serves it is
//! merely late: two would read one descriptor. So every daemon is on record before it is told to serve for the first time,
//! by its process id and the time that process was started (a number that comes to mean another process has another).
//!
//! The record holds for one boot, like the mounts, so it is not flushed to disk.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

/// Version of the file.
const VERSION: u32 = 1;

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Server {
    pid: i32,
    /// Clock ticks after boot.
    started: u64,
}

impl Server {
    /// `None` when there is no such process.
    fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything. Field 22 is the 20th after it.
        let started = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }
}

#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    daemons: Vec<Server>,
}

/// The record, and who is on it.
pub(crate) struct Succession {
    path: PathBuf,
    daemons: Vec<Server>,
}

impl Succession {
    /// Reads the record. `false` with it: it can not be told who has served.
    pub(crate) fn open(path: PathBuf) -> (Self, bool) {
        let read = std::fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<Contents>(&bytes)?));
        match read {
            Ok(Contents { version: VERSION, daemons }) => (Self { path, daemons }, true),
            Ok(Contents { version, .. }) => {
                tracing::warn!(version, path = %path.display(), "record of daemons of another version");
                (Self { path, daemons: Vec::new() }, false)
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, path = %path.display(), "damaged record of daemons");
                }
                (Self { path, daemons: Vec::new() }, false)
            }
        }
    }

    /// Those on record that live, as descriptors that go on meaning them.
    pub(crate) fn alive(&self) -> Vec<(i32, OwnedFd)> {
        let open = |server: &Server| {
            let pidfd = rustix::process::pidfd_open(Pid::from_raw(server.pid)?, PidfdFlags::empty()).ok()?;
            // Asked after it was opened: the same process then and now.
            (Server::of(server.pid) == Some(*server)).then_some((server.pid, pidfd))
        };
        self.daemons.iter().filter_map(open).collect()
    }

    /// Puts a daemon on record that is about to serve, and takes off those that are gone.
    pub(crate) fn add(&mut self, pid: i32) {
        let Some(server) = Server::of(pid) else { return };
        if self.daemons.contains(&server) {
            return;
        }
        self.daemons.retain(|server| Server::of(server.pid) == Some(*server));
        self.daemons.push(server);
        if let Err(error) = self.save() {
            // Serving now is worth more than the next keeper's certainty.
            tracing::error!(%error, path = %self.path.display(), "cannot record who serves");
        }
    }

    fn save(&self) -> io::Result<()> {
        let contents = Contents { version: VERSION, daemons: self.daemons.clone() };
        let mut temporary = self.path.as_os_str().to_owned();
        temporary.push(".new");
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(&contents)?)?;
        std::fs::rename(&temporary, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lives_is_found_and_who_is_gone_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemons");
        let (mut succession, known) = Succession::open(path.clone());
        assert!(!known && succession.alive().is_empty());
        let own = std::process::id() as i32;
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        succession.add(child.id() as i32);
        succession.add(own);
        succession.add(own);
        let (succession, known) = Succession::open(path.clone());
        assert!(known);
        let alive: Vec<i32> = succession.alive().iter().map(|(pid, _)| *pid).collect();
        assert_eq!(alive, [child.id() as i32, own]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(succession.alive().len(), 1);
        // The number of a process that is gone, and means another one now.
        let daemons = vec![Server { started: 1, ..Server::of(own).unwrap() }];
        let (mut succession, _) = Succession::open(path.clone());
        succession.daemons = daemons;
        assert_eq!(succession.alive().len(), 0);
        succession.add(own);
        assert_eq!(Succession::open(path.clone()).0.daemons, [Server::of(own).unwrap()]);
        std::fs::write(&path, b"{ torn").unwrap();
        assert!(!Succession::open(path).1);
    }

    #[test]
    fn the_format_changes_only_with_its_version() {
        let contents = Contents { version: VERSION, daemons: vec![Server { pid: 7, started: 9 }] };
        assert_eq!(serde_json::to_string(&contents).unwrap(), r#"{"version":1,"daemons":[{"pid":7,"started":9}]}"#);
    }
}
