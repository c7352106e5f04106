//! What a volume is: the JSON that whoever mounts hands to the keeper, and the keeper to its daemons.

use std::{path::PathBuf, time::Duration};

use forebay_protocol::DatasetId;
use serde::{Deserialize, Serialize};

/// A volume of the daemon. Unknown fields are refused: a daemon of another version must not half-understand it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeConfig {
    /// The dataset.
    pub dataset: DatasetId,
    /// `namespace/name` of the dataset; for messages only.
    pub name: String,
    /// File with the worker table (JSON); watched.
    pub table_file: PathBuf,
    /// File with the runtime's key: 32 bytes, or 64 hexadecimal digits.
    pub key_file: PathBuf,
    /// Bytes that reads and read-ahead of this volume may hold in memory.
    #[serde(default = "default_budget_bytes")]
    pub budget_bytes: u64,
    /// How long one read, look-up or listing may take, with all its retries, until the program sees `EIO`.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    /// Most that one reader reads ahead, in bytes.
    #[serde(default = "default_max_read_ahead_bytes")]
    pub max_read_ahead_bytes: u64,
    /// Data connections to each worker.
    #[serde(default = "default_connections_per_worker")]
    pub connections_per_worker: u32,
    /// How long the kernel may keep names and attributes, and the absence of names, without asking. Changes are pushed,
    /// so this is the bound for a push that got lost.
    #[serde(default = "default_ttl_seconds")]
    pub ttl_seconds: u64,
    /// The times of directories, which object stores do not have: when the volume was mounted, in nanoseconds since the
    /// epoch. Part of the configuration so that every daemon answers the same.
    pub mounted_at_ns: i64,
}

fn default_budget_bytes() -> u64 {
    // 128 readers with a 1 MiB request each; more readers share.
    128 << 20
}

fn default_deadline_ms() -> u64 {
    30_000
}

fn default_max_read_ahead_bytes() -> u64 {
    // Half a chunk: hides 20 ms of latency at 1.6 GB/s.
    32 << 20
}

fn default_connections_per_worker() -> u32 {
    2
}

fn default_ttl_seconds() -> u64 {
    24 * 60 * 60
}

/// Why a volume's configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No JSON of a [`VolumeConfig`].
    #[error("the volume's configuration cannot be read")]
    Json(#[from] serde_json::Error),
    /// A value makes no sense.
    #[error("the volume's configuration: {0}")]
    Value(&'static str),
    /// The key file cannot be read.
    #[error("key file {path}: {reason}")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl VolumeConfig {
    /// With the usual budget, deadlines and times.
    pub fn new(dataset: DatasetId, table_file: impl Into<PathBuf>, key_file: impl Into<PathBuf>) -> Self {
        Self {
            dataset,
            name: dataset.to_string(),
            table_file: table_file.into(),
            key_file: key_file.into(),
            budget_bytes: default_budget_bytes(),
            deadline_ms: default_deadline_ms(),
            max_read_ahead_bytes: default_max_read_ahead_bytes(),
            connections_per_worker: default_connections_per_worker(),
            ttl_seconds: default_ttl_seconds(),
            mounted_at_ns: 0,
        }
    }

    /// Decodes and checks.
    pub fn decode(json: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(json)?;
        if config.deadline_ms == 0 {
            return Err(ConfigError::Value("deadlineMs must not be 0"));
        }
        if config.budget_bytes < forebay_client::MIN_BUDGET as u64 {
            return Err(ConfigError::Value("budgetBytes must be at least 4 MiB: a few requests of 1 MiB"));
        }
        if !(1..=64).contains(&config.connections_per_worker) {
            return Err(ConfigError::Value("connectionsPerWorker must be 1 to 64"));
        }
        Ok(config)
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

    #[test]
    fn defaults_round_trip() {
        let config = VolumeConfig::decode(MINIMAL.as_bytes()).unwrap();
        assert_eq!(config.ttl(), Duration::from_secs(86_400));
        assert_eq!(VolumeConfig::decode(&config.encode().unwrap()).unwrap(), config);
    }

    #[test]
    fn nonsense_is_refused() {
        for (from, to) in [
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"more\": 1"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"deadlineMs\": 0"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"budgetBytes\": 5"),
            ("\"mountedAtNs\": 5", "\"mountedAtNs\": 5, \"connectionsPerWorker\": 0"),
            ("\"mountedAtNs\": 5", "\"x\": 5"),
        ] {
            assert!(VolumeConfig::decode(MINIMAL.replace(from, to).as_bytes()).is_err(), "{to}");
        }
    }
}
