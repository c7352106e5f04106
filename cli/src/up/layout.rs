//! Where `forebay up` keeps things, and the record by which other commands find it.
//!
//! ```text
//! STATE/up.lock                         flock'ed while an instance runs
//! STATE/up.json                         the record of the running instance
//! STATE/made.json                       the mount points that it made
//! STATE/control.sock                    what the other commands ask
//! STATE/keeper.sock, mounts.json        the keeper's
//! STATE/node-cache/                     the daemons' node cache, kept between runs
//! STATE/runtimes/NS.NAME/table.json     the worker table
//! STATE/runtimes/NS.NAME/key            the runtime's key, hex
//! STATE/runtimes/NS.NAME/datasets.json  what the workers serve, with credentials
//! STATE/runtimes/NS.NAME/cache/NAME-0/  a worker's cache (emptyDir tiers), kept between runs
//! ```
//!
//! As root, all of it is root's, so that the unprivileged user of workers and daemons can put nothing where root writes;
//! that user has `node-cache/`, `cache/` and what is below (a worker makes its cache directory again when it vanishes), and may read the
//! files of a runtime.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use forebay_protocol::{
    DatasetId,
    handshake::{KeyFileError, RuntimeKey},
};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::privileges::{RunAs, is_root};

/// The state directory of an instance.
#[derive(Clone, Debug)]
pub struct Layout {
    state: PathBuf,
}

/// What is running; written when everything is up.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The instance's process.
    pub pid: u32,
    /// Runtimes.
    pub runtimes: Vec<RuntimeRecord>,
    /// Datasets.
    pub datasets: Vec<DatasetRecord>,
}

impl Record {
    /// The runtime that serves a Dataset.
    pub fn runtime_of(&self, dataset: &DatasetRecord) -> anyhow::Result<&RuntimeRecord> {
        self.runtimes
            .iter()
            .find(|runtime| runtime.namespace == dataset.namespace && runtime.name == dataset.runtime)
            .with_context(|| format!("the record names no CacheRuntime '{}'", dataset.runtime))
    }
}

/// A CacheRuntime that is running.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeRecord {
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// Its worker table.
    pub table: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A Dataset that is served.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetRecord {
    /// Identity.
    pub id: DatasetId,
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// Name of its CacheRuntime, in the same namespace.
    pub runtime: String,
    /// Where it is mounted; `None`: nowhere here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<PathBuf>,
}

impl Layout {
    /// The directory given, else the usual place of this user.
    pub fn new(state: Option<PathBuf>) -> anyhow::Result<Self> {
        let state = match state {
            Some(state) => std::path::absolute(&state).with_context(|| format!("resolving {}", state.display()))?,
            None if is_root() => PathBuf::from("/var/lib/forebay"),
            None => match (std::env::var_os("XDG_STATE_HOME"), std::env::var_os("HOME")) {
                (Some(base), _) => PathBuf::from(base).join("forebay"),
                (None, Some(home)) => PathBuf::from(home).join(".local/state/forebay"),
                (None, None) => bail!("neither XDG_STATE_HOME nor HOME is set; give --state-dir"),
            },
        };
        Ok(Self { state })
    }

    /// The directory itself.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The lock of the running instance.
    pub fn lock(&self) -> PathBuf {
        self.state.join("up.lock")
    }

    /// The record of the running instance.
    pub fn record(&self) -> PathBuf {
        self.state.join("up.json")
    }

    /// The socket of the other commands.
    pub fn control_socket(&self) -> PathBuf {
        self.state.join("control.sock")
    }

    /// The keeper's socket.
    pub fn keeper_socket(&self) -> PathBuf {
        self.state.join("keeper.sock")
    }

    /// The keeper's record of mounts.
    pub fn mounts(&self) -> PathBuf {
        self.state.join("mounts.json")
    }

    /// The mount points that an instance made.
    pub fn leavings(&self) -> PathBuf {
        self.state.join("made.json")
    }

    /// The daemons' node cache.
    pub fn node_cache(&self) -> PathBuf {
        self.state.join("node-cache")
    }

    /// The directory of a runtime.
    pub fn runtime(&self, namespace: &str, name: &str) -> PathBuf {
        // Names are DNS labels, without dots.
        self.state.join("runtimes").join(format!("{namespace}.{name}"))
    }

    /// Reads the record of the running instance.
    pub fn read_record(&self) -> anyhow::Result<Record> {
        let path = self.record();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
                "nothing is running with the state directory {}; start `forebay up`, or name its --state-dir",
                self.state.display()
            ),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
    }
}

/// Creates a directory (and its parents), of `owner` or else of this process's user; one that exists is left as it is but
/// for its owner. What is there must be a directory, not a link to one.
pub fn own_directory(path: &Path, owner: Option<RunAs>) -> anyhow::Result<()> {
    make_directory(path, owner, OFlags::NOFOLLOW)
}

/// The same for the state directory, which whoever starts the instance may have made a link.
pub fn state_directory(path: &Path) -> anyhow::Result<()> {
    make_directory(path, None, OFlags::empty())
}

fn make_directory(path: &Path, owner: Option<RunAs>, flags: OFlags) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .with_context(|| format!("creating {}", path.display()))?;
    let flags = flags | OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .with_context(|| format!("opening the directory {}", path.display()))?;
    let directory = fs::File::from(directory);
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let (uid, gid) = owner.map_or(own, |owner| (owner.uid, owner.gid));
    // Only root gives directories away, and takes back what an earlier version gave away.
    if is_root() && directory.metadata()?.uid() != uid {
        fchown(&directory, Some(uid), Some(gid))
            .with_context(|| format!("changing the owner of {}", path.display()))?;
    }
    Ok(())
}

/// Replaces a file whole, readable by its owner only. Nothing that lies there already is opened or followed: the state
/// directory may be below one that is another user's.
pub fn write_private(path: &Path, contents: &[u8], owner: Option<RunAs>) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // create_new is O_EXCL, which refuses a symbolic link as well.
        let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        if let Some(owner) = owner {
            fchown(&file, Some(owner.uid), Some(owner.gid))?;
        }
        file.write_all(contents)?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// The key of a runtime: what the file holds, or a new one.
pub fn runtime_key(path: &Path, owner: Option<RunAs>) -> anyhow::Result<RuntimeKey> {
    if path.exists() {
        return read_key(path);
    }
    let key = RuntimeKey::generate();
    write_private(path, key.to_text().as_bytes(), owner)?;
    Ok(key)
}

/// Reads a runtime's key.
pub fn read_key(path: &Path) -> anyhow::Result<RuntimeKey> {
    RuntimeKey::read(path).map_err(|error| match error {
        KeyFileError::Read { .. } => error.into(),
        KeyFileError::Invalid { .. } => anyhow::Error::new(error).context("remove the key and start again"),
    })
}

/// Whether `user` can reach `path`: every directory above it must let them search. Names the first that does not.
pub fn check_reachable(path: &Path, user: RunAs) -> anyhow::Result<()> {
    for ancestor in path.ancestors().skip(1).filter(|ancestor| !ancestor.as_os_str().is_empty()) {
        let Ok(metadata) = fs::metadata(ancestor) else { continue };
        let bit = match () {
            () if metadata.uid() == user.uid => 0o100,
            () if metadata.gid() == user.gid => 0o010,
            () => 0o001,
        };
        if metadata.mode() & bit == 0 {
            bail!(
                "user {user} cannot enter {}, so cannot use {}; choose another --state-dir, or --run-as a user who can",
                ancestor.display(),
                path.display()
            );
        }
    }
    Ok(())
}
