//! What a worker is told: its options, and the two files that it reads again when they change.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use forebay_cache_store::Policy;
use forebay_protocol::{
    DatasetId,
    handshake::{KeyFileError, RuntimeKey},
    table::{MAX_MEMBERS, Member, WorkerTable},
};
use forebay_under_store::{Limits, SourceSpec, Verb};
use serde::{Deserialize, Serialize};

use crate::dataset::SourceProblem;

/// Largest table or datasets file: 4,096 members or datasets of 1 KiB each, four times.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Most datasets that one worker serves.
const MAX_DATASETS: usize = 4096;

/// Options of a worker process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkerOptions {
    /// Its name in the worker table.
    pub name: String,
    /// Where it listens for data and control connections. Port 0: any.
    pub listen: SocketAddr,
    /// Where it answers `/metrics`, `/healthz` and `/readyz`; `None`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Whose cache the directory is, such as `namespace/runtime/worker`: a directory of another owner is refused.
    pub owner: String,
    /// Directory of chunks and metadata.
    pub cache_dir: PathBuf,
    /// Bytes that the cache may take.
    pub capacity: u64,
    /// Fill level, in percent of the capacity, at which nothing more is admitted and eviction begins.
    pub high_percent: u8,
    /// Fill level at which eviction ends.
    pub low_percent: u8,
    /// The worker table, a [`TableFile`]. One that is not there yet is waited for.
    pub table: PathBuf,
    /// The datasets to serve, a [`DatasetsFile`]. It holds credentials: nobody else may read it. One that is not there
    /// yet is waited for.
    pub datasets: PathBuf,
    /// The runtime's key: 64 hexadecimal digits.
    pub key_file: PathBuf,
    /// Limits towards each source.
    pub limits: Limits,
    /// Bytes of file contents that may be in memory at once.
    pub memory_budget: u64,
    /// How long it goes on serving, at most, when it is told to stop: until the table and everybody's requests go
    /// elsewhere.
    pub drain: Duration,
    /// How long the table must have been the same before what others are to hold is spare here: until then they may ask
    /// for it.
    pub spare_after: Duration,
    /// Blocks of one chunk, and requests for them, in a second with which a worker is busy enough, so that others are to
    /// have a copy, where the dataset may have more. 2,000 are 1,000 small files or 128 MB, a tenth of what a core sends.
    pub hot_blocks_per_second: u64,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            listen: ([127, 0, 0, 1], 0).into(),
            metrics_listen: None,
            owner: String::new(),
            cache_dir: PathBuf::new(),
            capacity: 10 << 30,
            high_percent: 95,
            low_percent: 90,
            table: PathBuf::new(),
            datasets: PathBuf::new(),
            key_file: PathBuf::new(),
            limits: Limits::default(),
            memory_budget: 256 << 20,
            drain: Duration::ZERO,
            spare_after: Duration::from_secs(600),
            hot_blocks_per_second: 2000,
        }
    }
}

/// A worker table, and whose it is. A [`WorkerTable`] is one, too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TableFile {
    /// As in [`WorkerTable`].
    pub epoch: u64,
    /// As in [`WorkerTable`].
    pub members: Vec<Member>,
    /// UID of the CacheRuntime; empty outside a cluster. Epochs are compared within one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub runtime_uid: String,
}

/// The datasets that a worker serves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetsFile {
    /// In no particular order; ids are unique.
    pub datasets: Vec<DatasetConfig>,
}

/// A dataset to serve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetConfig {
    /// Its identity.
    pub id: DatasetId,
    /// Namespace of its object.
    pub namespace: String,
    /// Name of its object.
    pub name: String,
    /// Where its files come from.
    pub sources: Vec<SourceConfig>,
    /// What is admitted and evicted.
    #[serde(default)]
    pub policy: Policy,
    /// Bytes that this worker may hold of it; `None`: what fits.
    #[serde(default)]
    pub quota: Option<u64>,
    /// Bytes on this worker that other datasets never bring it below.
    #[serde(default)]
    pub reserve: u64,
    /// Datasets of lower priority make room for it.
    #[serde(default)]
    pub priority: i32,
    /// How long what nobody reads is held; `None`: as long as there is room for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    /// How many workers hold the same bytes.
    #[serde(default)]
    pub replicas: Replicas,
    /// What its mounts are made for. Daemons ask for it.
    #[serde(default)]
    pub shape: VolumeShape,
    /// How soon what changes at a source is to be seen; `None`: when somebody asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync_interval: Option<Duration>,
}

/// How many workers hold the same bytes; all of them, when there are fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Replicas {
    /// Of what is held whole.
    pub min: u32,
    /// Of what one worker is busy with, at most.
    pub max: u32,
}

impl Default for Replicas {
    fn default() -> Self {
        Self { min: 1, max: 1 }
    }
}

/// What mounts are made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeShape {
    /// What suits the files that were counted.
    #[default]
    Auto,
    /// Large files.
    Large,
    /// Many small files.
    Small,
}

/// One source of a dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceConfig {
    /// Where it appears in the dataset's namespace, such as `/` or `/train`.
    pub path: String,
    /// What it is.
    pub spec: SourceSpec,
    /// What all workers together may ask of it.
    #[serde(default)]
    pub request_budget: RequestBudget,
    /// Why it cannot be used, if whoever wrote this knows: then it is not asked, and answers with this message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<SourceProblem>,
}

/// Requests that a source may get a second, from all workers together and retries included; `None`: as many as can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RequestBudget {
    /// For bytes of objects.
    pub get_per_second: Option<u32>,
    /// For pages of listings.
    pub list_per_second: Option<u32>,
    /// For the versions of single objects.
    pub head_per_second: Option<u32>,
}

impl RequestBudget {
    /// That of one kind of request.
    pub(crate) fn of(&self, verb: Verb) -> Option<f64> {
        let Self { get_per_second, list_per_second, head_per_second } = self;
        let of = match verb {
            Verb::Get => get_per_second,
            Verb::List => list_per_second,
            Verb::Head => head_per_second,
        };
        of.map(f64::from)
    }
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its contents are wrong.
    #[error("{}: {message}", .path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl ConfigError {
    /// Whether the file is not there.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }

    fn invalid(path: &Path, message: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), message: message.into() }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > MAX_FILE {
        return Err(ConfigError::invalid(path, format!("{length} bytes are more than {MAX_FILE}")));
    }
    fs::read(path).map_err(failed)
}

/// Reads and checks a worker table; gives the runtime's UID as well.
pub(crate) fn read_table(path: &Path) -> Result<(WorkerTable, String), ConfigError> {
    let TableFile { epoch, members, runtime_uid } =
        serde_json::from_slice(&read(path)?).map_err(|error| ConfigError::invalid(path, error.to_string()))?;
    if members.len() > MAX_MEMBERS {
        return Err(ConfigError::invalid(path, format!("more than {MAX_MEMBERS} members")));
    }
    let mut names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ConfigError::invalid(path, format!("member '{}' stands twice", twice[0])));
    }
    Ok((WorkerTable { epoch, members }, runtime_uid))
}

/// Reads and checks the datasets. The message of an error never shows contents: they include credentials.
pub(crate) fn read_datasets(path: &Path) -> Result<Vec<DatasetConfig>, ConfigError> {
    let bytes = read(path)?;
    let mode =
        fs::metadata(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?.permissions().mode();
    if mode & 0o007 != 0 {
        let message = format!("mode {:o} lets everybody read its credentials; chmod 600", mode & 0o777);
        return Err(ConfigError::invalid(path, message));
    }
    let file: DatasetsFile = serde_json::from_slice(&bytes).map_err(|error| {
        ConfigError::invalid(path, format!("line {}, column {}: not a list of datasets", error.line(), error.column()))
    })?;
    if file.datasets.len() > MAX_DATASETS {
        return Err(ConfigError::invalid(path, format!("more than {MAX_DATASETS} datasets")));
    }
    let mut ids: Vec<DatasetId> = file.datasets.iter().map(|dataset| dataset.id).collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ConfigError::invalid(path, format!("dataset {} stands twice", twice[0])));
    }
    Ok(file.datasets)
}

/// Reads the runtime's key.
pub(crate) fn read_key(path: &Path) -> Result<RuntimeKey, ConfigError> {
    RuntimeKey::read(path).map_err(|error| match error {
        KeyFileError::Read { path, source } => ConfigError::Read { path, source },
        KeyFileError::Invalid { path } => ConfigError::invalid(&path, "a key is 64 hexadecimal digits"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_round_trip_and_unknown_fields_are_refused() {
        let options = WorkerOptions { name: "w-0".into(), ..WorkerOptions::default() };
        let text = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<WorkerOptions>(&text).unwrap(), options);
        assert!(serde_json::from_str::<WorkerOptions>(r#"{"nmae": "w"}"#).is_err());
    }

    #[test]
    fn bad_files_are_refused_without_showing_credentials() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("datasets.json");
        let write = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        write(r#"{"datasets": []}"#, 0o600);
        assert_eq!(read_datasets(&path).unwrap(), []);
        write(r#"{"datasets": []}"#, 0o644);
        assert!(read_datasets(&path).unwrap_err().to_string().contains("chmod 600"));
        write(r#"{"datasets": ["hunter2"]}"#, 0o600);
        assert!(!read_datasets(&path).unwrap_err().to_string().contains("hunter2"));

        let key = dir.path().join("key");
        fs::write(&key, "0f").unwrap();
        assert!(matches!(read_key(&key), Err(ConfigError::Invalid { .. })));

        let table = dir.path().join("table.json");
        fs::write(&table, r#"{"epoch":1,"members":[{"name":"a","address":""},{"name":"a","address":""}]}"#).unwrap();
        assert!(read_table(&table).unwrap_err().to_string().contains("stands twice"));
        fs::write(&table, r#"{"epoch":1,"members":[]}"#).unwrap();
        assert_eq!(read_table(&table).unwrap(), (WorkerTable { epoch: 1, members: vec![] }, String::new()));
        fs::write(&table, r#"{"epoch":1,"members":[],"runtimeUid":"u"}"#).unwrap();
        assert_eq!(read_table(&table).unwrap().1, "u");
        assert!(read_table(&dir.path().join("none")).unwrap_err().is_missing());
    }
}
