//! The JSON form of a volume's configuration, and what it must be.

use std::path::PathBuf;

use forebay_client::MIN_BUDGET;
use forebay_protocol::{DatasetId, handshake::RuntimeKey};
use serde::{Deserialize, Serialize};

use super::{
    BUDGET_BYTES, CONNECTIONS_PER_WORKER, DEADLINE_MS, DatasetRef, KeySource, MAX_READ_AHEAD_BYTES, TTL_SECONDS,
    TableSource, VolumeConfig,
};

/// No `Debug`: it holds the key as text.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Json {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dataset: Option<DatasetId>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    resolve: bool,
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    table_file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_file: Option<PathBuf>,
    #[serde(default = "budget_bytes")]
    budget_bytes: u64,
    #[serde(default = "deadline_ms")]
    deadline_ms: u64,
    #[serde(default = "max_read_ahead_bytes")]
    max_read_ahead_bytes: u64,
    #[serde(default = "connections_per_worker")]
    connections_per_worker: u32,
    #[serde(default = "ttl_seconds")]
    ttl_seconds: u64,
    mounted_at_ns: i64,
}

fn budget_bytes() -> u64 {
    BUDGET_BYTES
}

fn deadline_ms() -> u64 {
    DEADLINE_MS
}

fn max_read_ahead_bytes() -> u64 {
    MAX_READ_AHEAD_BYTES
}

fn connections_per_worker() -> u32 {
    CONNECTIONS_PER_WORKER
}

fn ttl_seconds() -> u64 {
    TTL_SECONDS
}

impl TryFrom<Json> for VolumeConfig {
    /// A field that makes no sense, and what would.
    type Error = String;

    fn try_from(json: Json) -> Result<Self, String> {
        let Json {
            dataset,
            resolve,
            name,
            service,
            table_file,
            key,
            key_file,
            budget_bytes,
            deadline_ms,
            max_read_ahead_bytes,
            connections_per_worker,
            ttl_seconds,
            mounted_at_ns,
        } = json;
        let dataset = match dataset {
            Some(id) if !resolve => DatasetRef::Id(id),
            None if resolve => DatasetRef::ByName,
            _ => return Err("exactly one of dataset or resolve must be given".to_owned()),
        };
        if dataset == DatasetRef::ByName && split_name(&name).is_none() {
            return Err(format!("name: '{name}' must be NAMESPACE/NAME of the dataset to be resolved"));
        }
        let table = match (service, table_file) {
            (Some(service), None) if is_address(&service) => TableSource::Service(service),
            (Some(service), None) => return Err(format!("service: '{service}' is not HOST:PORT")),
            (None, Some(path)) => TableSource::File(path),
            _ => return Err("exactly one of service or tableFile must be given".to_owned()),
        };
        let key = match (key, key_file) {
            // What it is instead is never shown.
            (Some(text), None) => KeySource::Inline(
                RuntimeKey::parse(text.as_bytes()).ok_or("key: a key is 64 hexadecimal digits".to_owned())?,
            ),
            (None, Some(path)) => KeySource::File(path),
            _ => return Err("exactly one of key or keyFile must be given".to_owned()),
        };
        if deadline_ms == 0 {
            return Err("deadlineMs must not be 0".to_owned());
        }
        if budget_bytes < MIN_BUDGET as u64 {
            return Err(format!("budgetBytes must be at least {MIN_BUDGET}: a few requests of 1 MiB"));
        }
        if !(1..=64).contains(&connections_per_worker) {
            return Err("connectionsPerWorker must be 1 to 64".to_owned());
        }
        Ok(Self {
            dataset,
            name,
            table,
            key,
            budget_bytes,
            deadline_ms,
            max_read_ahead_bytes,
            connections_per_worker,
            ttl_seconds,
            mounted_at_ns,
        })
    }
}

impl From<VolumeConfig> for Json {
    fn from(config: VolumeConfig) -> Self {
        let VolumeConfig {
            dataset,
            name,
            table,
            key,
            budget_bytes,
            deadline_ms,
            max_read_ahead_bytes,
            connections_per_worker,
            ttl_seconds,
            mounted_at_ns,
        } = config;
        let (dataset, resolve) = match dataset {
            DatasetRef::Id(id) => (Some(id), false),
            DatasetRef::ByName => (None, true),
        };
        let (service, table_file) = match table {
            TableSource::Service(service) => (Some(service), None),
            TableSource::File(path) => (None, Some(path)),
        };
        let (key, key_file) = match key {
            KeySource::Inline(key) => (Some(key.to_text()), None),
            KeySource::File(path) => (None, Some(path)),
        };
        Self {
            dataset,
            resolve,
            name,
            service,
            table_file,
            key,
            key_file,
            budget_bytes,
            deadline_ms,
            max_read_ahead_bytes,
            connections_per_worker,
            ttl_seconds,
            mounted_at_ns,
        }
    }
}

/// The parts of `namespace/name`.
pub(crate) fn split_name(name: &str) -> Option<(&str, &str)> {
    let (namespace, name) = name.split_once('/')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains('/')).then_some((namespace, name))
}

fn is_address(service: &str) -> bool {
    let port = service.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse().ok());
    port.is_some_and(|port: u16| port != 0)
}
