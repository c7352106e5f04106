//! What a volume is: the JSON that whoever mounts hands to the keeper, and the keeper to its daemons.
//!
//! Three things can be said in two ways, of which exactly one must be chosen:
//!
//! | what | as it is in a cluster | as `forebay up` has it |
//! |---|---|---|
//! | the workers | `service`: a name that leads to some of them | `tableFile` |
//! | the runtime's key | `key`: the key itself, from a Secret | `keyFile` |
//! | the dataset | `dataset`, or `"resolve": true` when only its name is known | `dataset` |
//!
//! The key is never shown: not by `Debug`, not by an error.

mod json;

use std::{path::PathBuf, time::Duration};

use forebay_protocol::{
    DatasetId,
    handshake::{KeyFileError, RuntimeKey},
};
use serde::{Deserialize, Serialize};

use self::json::Json;
pub(crate) use self::json::split_name;

/// A volume of the daemon. Unknown fields are refused: a daemon of another version must not half-understand it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Json", into = "Json")]
pub struct VolumeConfig {
    /// The dataset.
    pub dataset: DatasetRef,
    /// `namespace/name` of the dataset.
    pub name: String,
    /// How the workers are found.
    pub table: TableSource,
    /// The runtime's key.
    pub key: KeySource,
    /// Bytes that reads and read-ahead of this volume may hold in memory, unless its daemon has a budget over all of its
    /// volumes.
    pub budget_bytes: u64,
    /// How long one read, look-up or listing may take, with all its retries, until the program sees `EIO`.
    pub deadline_ms: u64,
    /// Most that one reader reads ahead, in bytes.
    pub max_read_ahead_bytes: u64,
    /// Data connections to each worker.
    pub connections_per_worker: u32,
    /// How long the kernel may keep names and attributes, and the absence of names, without asking. Changes are pushed,
    /// so this is the bound for a push that got lost.
    pub ttl_seconds: u64,
    /// The times of directories, which object stores do not have: when the volume was mounted, in nanoseconds since the
    /// epoch. Part of the configuration so that every daemon answers the same.
    pub mounted_at_ns: i64,
}

/// Which dataset a volume shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatasetRef {
    /// This one.
    Id(DatasetId),
    /// The one that its workers serve under [`VolumeConfig::name`]; asked for until one of them knows it.
    ByName,
}

/// Where the worker table comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableSource {
    /// A file (JSON) that is watched.
    File(PathBuf),
    /// `host:port` that resolves to some of the workers, who tell it.
    Service(String),
}

/// Where the runtime's key comes from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// A file: 64 hexadecimal digits.
    File(PathBuf),
    /// The key itself.
    Inline(RuntimeKey),
}

impl PartialEq for KeySource {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(a), Self::File(b)) => a == b,
            (Self::Inline(a), Self::Inline(b)) => a.expose() == b.expose(),
            (Self::File(_), Self::Inline(_)) | (Self::Inline(_), Self::File(_)) => false,
        }
    }
}

impl Eq for KeySource {}

impl KeySource {
    /// The key; read from its file if it is in one.
    pub fn load(&self) -> Result<RuntimeKey, KeyFileError> {
        match self {
            Self::File(path) => RuntimeKey::read(path),
            Self::Inline(key) => Ok(key.clone()),
        }
    }
}

/// 128 readers with a 1 MiB request each; more readers share.
const BUDGET_BYTES: u64 = 128 << 20;
const DEADLINE_MS: u64 = 30_000;
/// Half a chunk: hides 20 ms of latency at 1.6 GB/s.
const MAX_READ_AHEAD_BYTES: u64 = 32 << 20;
const CONNECTIONS_PER_WORKER: u32 = 2;
const TTL_SECONDS: u64 = 24 * 60 * 60;

/// Why a volume's configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No JSON of a [`VolumeConfig`], or a field that makes no sense; the cause names it.
    #[error("the volume's configuration cannot be used: {0}")]
    Json(#[from] serde_json::Error),
    /// There is no key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
}

impl VolumeConfig {
    /// With the usual budget, deadlines and times.
    pub fn new(dataset: DatasetRef, table: TableSource, key: KeySource) -> Self {
        Self {
            name: match dataset {
                DatasetRef::Id(id) => id.to_string(),
                DatasetRef::ByName => String::new(),
            },
            dataset,
            table,
            key,
            budget_bytes: BUDGET_BYTES,
            deadline_ms: DEADLINE_MS,
            max_read_ahead_bytes: MAX_READ_AHEAD_BYTES,
            connections_per_worker: CONNECTIONS_PER_WORKER,
            ttl_seconds: TTL_SECONDS,
            mounted_at_ns: 0,
        }
    }

    /// Decodes and checks.
    pub fn decode(json: &[u8]) -> Result<Self, ConfigError> {
        Ok(serde_json::from_slice(json)?)
    }

    /// The JSON that [`Self::decode`] reads.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// [`Self::deadline_ms`].
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }

    /// [`Self::ttl_seconds`].
    pub fn ttl(&self) -> Duration {
        Duration::from_secs(self.ttl_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"dataset": "7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11", "name": "default/pictures",
        "tableFile": "/run/table.json", "keyFile": "/run/key", "mountedAtNs": 5}"#;

    fn cluster(key: &RuntimeKey) -> String {
        let key = key.to_text();
        format!(
            r#"{{"resolve": true, "name": "default/pictures", "service": "runtime-forebay.default.svc:7400",
                "key": "{key}\n", "mountedAtNs": 5}}"#
        )
    }

    #[test]
    fn defaults_round_trip() {
        let config = VolumeConfig::decode(MINIMAL.as_bytes()).unwrap();
        assert_eq!(config.ttl(), Duration::from_secs(86_400));
        assert_eq!(VolumeConfig::decode(&config.encode().unwrap()).unwrap(), config);

        let key = RuntimeKey::generate();
        let config = VolumeConfig::decode(cluster(&key).as_bytes()).unwrap();
        assert_eq!(config.dataset, DatasetRef::ByName);
        assert_eq!(config.key.load().unwrap().expose(), key.expose());
        assert_eq!(VolumeConfig::decode(&config.encode().unwrap()).unwrap(), config);
    }

    #[test]
    fn nonsense_is_refused_and_the_field_is_named() {
        let key = r#""key": "0f""#;
        for (from, to, named) in [
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"more\": 1", "more"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"deadlineMs\": 0", "deadlineMs"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"budgetBytes\": 5", "budgetBytes"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"connectionsPerWorker\": 0", "connectionsPerWorker"),
            ("\"mountedAtNs\": 5", "\"resolve\": false", "mountedAtNs"),
            ("\"tableFile\": \"/run/table.json\", ", "", "service or tableFile"),
            ("\"tableFile\"", "\"service\": \"a:1\", \"tableFile\"", "service or tableFile"),
            ("\"tableFile\": \"/run/table.json\"", "\"service\": \"a\"", "service"),
            ("\"tableFile\": \"/run/table.json\"", "\"service\": \":7400\"", "service"),
            ("\"tableFile\": \"/run/table.json\"", "\"service\": \"a:0\"", "service"),
            ("\"tableFile\": \"/run/table.json\"", "\"service\": \"a:65536\"", "service"),
            ("\"keyFile\": \"/run/key\", ", "", "key or keyFile"),
            ("\"keyFile\"", "\"key\": \"00\", \"keyFile\"", "key or keyFile"),
            ("\"keyFile\": \"/run/key\"", key, "key"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"resolve\": true", "dataset or resolve"),
            ("\"dataset\": \"7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11\", ", "", "dataset or resolve"),
            (
                "\"dataset\": \"7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11\", \"name\": \"default/pictures\"",
                "\"resolve\": true, \"name\": \"pictures\"",
                "name",
            ),
        ] {
            assert!(MINIMAL.contains(from), "{from}");
            let error = VolumeConfig::decode(MINIMAL.replace(from, to).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(named), "{to}: {error}");
        }
    }

    #[test]
    fn the_key_is_never_shown() {
        let key = RuntimeKey::generate();
        let text = key.to_text();
        let good = cluster(&key);
        let config = VolumeConfig::decode(good.as_bytes()).unwrap();
        let bytes = format!("{:?}", key.expose());
        let shows = |shown: &str| shown.contains(&text[..8]) || shown.contains(&bytes[1..20]);
        assert!(!shows(&format!("{config:?} {config:#?}")));
        assert!(shows(&String::from_utf8(config.encode().unwrap()).unwrap()), "that is what it is for");
        // Whatever else is wrong with the configuration or with the key itself.
        let half = &text[..32];
        for bad in [
            good.replace(&text, half),
            good.replace(&text, &format!("{text}{half}")),
            good.replace(&format!("\"{text}\\n\""), &format!("[\"{text}\"]")),
            good[..good.len() - 30].to_owned(),
        ] {
            let Err(error) = VolumeConfig::decode(bad.as_bytes()) else { panic!("{bad}") };
            let shown = format!("{error} {error:?}");
            let source = std::error::Error::source(&error).map(|source| format!("{source} {source:?}"));
            assert!(!shows(&format!("{shown} {source:?}")), "{shown}");
        }
    }
}
