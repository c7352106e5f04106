//! Every metric of a daemon: names, units, help. `docs/metrics-fuse.md` is generated from this file.

use std::fmt;

use forebay_client::{ClientMetrics, MemoryUsage};
use forebay_keeper::{
    HealthState,
    tables::{Counter, Shape},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use super::VolumeMetrics;
use crate::node_cache::NodeCacheUsage;

/// All that is shown, at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    /// A keeper is connected.
    pub(crate) linked: bool,
    /// The memory budget; the sum, if every volume has its own.
    pub(crate) memory: MemoryUsage,
    pub(crate) node_cache: NodeCacheUsage,
    pub(crate) volumes: Vec<VolumeMetrics>,
}

/// A metric of the process.
struct OfProcess {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    value: fn(&Snapshot) -> u64,
}

/// A metric of each volume.
struct OfVolume {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    value: fn(&VolumeMetrics) -> u64,
}

macro_rules! metrics {
    ($of:ident: $($kind:ident $name:literal $($unit:ident)?, $help:literal, $value:expr;)*) => {
        &[$($of {
            name: $name,
            help: $help,
            unit: metrics!(@unit $($unit)?),
            kind: MetricType::$kind,
            value: $value,
        },)*]
    };
    (@unit $unit:ident) => { Some(Unit::$unit) };
    (@unit) => { None };
}

const PROCESS: &[OfProcess] = metrics! { OfProcess:
    Gauge "keeper_linked", "1 while a keeper is connected", |now| u64::from(now.linked);
    Gauge "volumes", "Volumes that this daemon serves; 0 for one that stands by", |now| now.volumes.len() as u64;
    Gauge "memory_budget" Bytes, "Memory that file contents may take", |now| now.memory.total;
    Gauge "memory_used" Bytes, "Memory that file contents take", |now| now.memory.used;
    Gauge "memory_peak" Bytes, "Most memory that file contents ever took", |now| now.memory.peak;
    Counter "memory_waits", "Reads that had to wait for memory", |now| now.memory.waits;
    Gauge "node_cache_capacity" Bytes, "Disk that whole files on this node may take", |now| now.node_cache.capacity;
    Gauge "node_cache_used" Bytes, "Disk that they take, as far as this daemon looked", |now| now.node_cache.used;
    Gauge "node_cache_small_files", "Small files that are here", |now| now.node_cache.small;
    Counter "node_cache_read" Bytes, "Bytes that were read from small files here", |now| now.node_cache.read;
    Counter "node_cache_fetched", "Files that were fetched whole", |now| now.node_cache.fetched;
    Counter "node_cache_bypassed", "Files for which there was no room", |now| now.node_cache.bypassed;
    Counter "node_cache_failures", "Files that could not be fetched or written", |now| now.node_cache.failed;
    Counter "node_cache_corrupt", "Files that did not match their checksums, and were dropped",
        |now| now.node_cache.corrupt;
};

const VOLUME: &[OfVolume] = metrics! { OfVolume:
    Counter "resent_requests", "Requests that the kernel sent again after a take-over", |v| kept(v, Counter::Resent);
    Counter "errors", "Requests answered with an error that is not the program's fault", |v| kept(v, Counter::Errors);
    Counter "read" Bytes, "Bytes given to programs", |v| kept(v, Counter::BytesRead);
    Counter "forgotten_nodes", "Nodes that the kernel forgot", |v| kept(v, Counter::Forget);
    Counter "invalidated_entries", "Names that the kernel was told to forget", |v| kept(v, Counter::InvalidatedEntries);
    Counter "invalidated_directories", "Listings that the kernel was told to forget",
        |v| kept(v, Counter::InvalidatedDirectories);
    Counter "expirations", "Times that all names were expired, because changes may have been missed",
        |v| kept(v, Counter::Expired);
    Counter "received" Bytes, "Bytes of file contents received from workers", |v| kept(v, Counter::WorkerBytes);
    Counter "hit_blocks", "Blocks that workers held when they were asked", |v| kept(v, Counter::HitBlocks);
    Counter "miss_blocks", "Blocks that workers had to fetch", |v| kept(v, Counter::MissBlocks);
    Gauge "names", "Names that were looked up, of all versions", |v| v.nodes.names;
    Gauge "node_table" Bytes, "Memory of the table of names", |v| v.nodes.resident_bytes;
    Gauge "small_shape", "1 for a mount for small files, 0 for one for large files",
        |v| u64::from(v.opens.shape == Some(Shape::Small));
    Gauge "open_handles", "Files and directories that are open", |v| v.opens.handles;
    Counter "notice_overflows", "Times that changes came faster than the kernel took them", |v| v.notice_overflows;
    Gauge "health", "0 healthy, 1 degraded, 2 inaccessible", |v| match v.health.as_ref().map(|health| health.state) {
        None | Some(HealthState::Healthy) => 0,
        Some(HealthState::Degraded) => 1,
        Some(HealthState::Inaccessible) => 2,
    };
    Gauge "workers", "Workers in the table", |v| client(v, |c| c.members.len() as u64);
    Gauge "workers_down", "Workers that are avoided because they do not answer",
        |v| client(v, |c| c.members.iter().filter(|member| !member.up).count() as u64);
    Gauge "table_epoch", "Epoch of the worker table in force", |v| client(v, |c| c.table_epoch);
    Counter "worker_requests", "Reads sent to workers", |v| client(v, |c| c.requests);
    Counter "metadata_calls", "Look-ups and pages of listings asked of workers", |v| client(v, |c| c.metadata_calls);
    Counter "failovers", "Requests that went from one worker to the next", |v| client(v, |c| c.failovers);
    Counter "retries", "Rounds in which no worker could answer", |v| client(v, |c| c.retries);
    Counter "checksum_failures", "Blocks or frames that did not match what was asked; never delivered",
        |v| client(v, |c| c.checksum_failures);
    Counter "read_ahead" Bytes, "Bytes asked for ahead of readers", |v| client(v, |c| c.read_ahead_bytes);
    Counter "read_ahead_used" Bytes, "Of these, bytes that were then read", |v| client(v, |c| c.read_ahead_used_bytes);
    Counter "read_ahead_wasted" Bytes, "Of these, bytes that were thrown away",
        |v| client(v, |c| c.read_ahead_wasted_bytes);
    Counter "starved_requests", "Reads that gave their memory to others while a source stalled", |v| client(v, |c| c.starved);
};

/// The one metric with a label of its own.
const REQUESTS: (&str, &str) = ("requests", "Requests of the kernel, by operation");

/// Since the volume was mounted.
fn kept(volume: &VolumeMetrics, counter: Counter) -> u64 {
    volume.counters.get(counter)
}

/// Since this daemon prepared the volume.
fn client(volume: &VolumeMetrics, number: fn(&ClientMetrics) -> u64) -> u64 {
    volume.client.as_ref().map_or(0, number)
}

impl Snapshot {
    /// In the OpenMetrics text format.
    pub(crate) fn text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("forebay_fuse");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for OfProcess { name, help, unit, kind, value } in PROCESS {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), *kind)?;
            put(&mut metric, *kind, value(self))?;
        }
        let mut requests = encoder.encode_descriptor(REQUESTS.0, REQUESTS.1, None, MetricType::Counter)?;
        for volume in &self.volumes {
            for counter in Counter::ALL.iter().filter(|counter| counter.is_request()) {
                let [of, dataset] = labels(volume);
                let labels = [of, dataset, ("operation", counter.name())];
                put(&mut requests.encode_family(&labels)?, MetricType::Counter, kept(volume, *counter))?;
            }
        }
        for OfVolume { name, help, unit, kind, value } in VOLUME {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), *kind)?;
            for volume in &self.volumes {
                put(&mut metric.encode_family(&labels(volume))?, *kind, value(volume))?;
            }
        }
        Ok(())
    }
}

fn labels(volume: &VolumeMetrics) -> [(&str, &str); 2] {
    [("volume", &volume.volume), ("dataset", &volume.dataset)]
}

fn put(metric: &mut MetricEncoder<'_>, kind: MetricType, value: u64) -> Result<(), fmt::Error> {
    match kind {
        MetricType::Counter => metric.encode_counter::<NoLabelSet, u64, u64>(&value, None),
        _ => metric.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use forebay_keeper::{
        Health,
        tables::{Counters, NodeTable, OpenTable},
    };

    use super::*;

    fn example() -> Snapshot {
        let counters = Counters::create().unwrap();
        counters.add(Counter::Read, 7);
        counters.add(Counter::BytesRead, 4096);
        let volume = VolumeMetrics {
            volume: "volume".to_owned(),
            dataset: "default/example".to_owned(),
            counters: counters.snapshot(),
            nodes: NodeTable::create(1 << 20).unwrap().stats(),
            opens: OpenTable::create(16).unwrap().stats(),
            notice_overflows: 0,
            health: Some(Health::new(HealthState::Degraded, "WorkersUnavailable", "one is away")),
            client: Some(ClientMetrics { table_epoch: 5, ..ClientMetrics::default() }),
        };
        let memory = MemoryUsage { total: 1 << 20, ..MemoryUsage::default() };
        Snapshot { linked: true, memory, node_cache: NodeCacheUsage::default(), volumes: vec![volume] }
    }

    #[test]
    fn numbers_have_their_names() {
        let text = example().text().unwrap();
        let of = r#"{volume="volume",dataset="default/example""#;
        for line in [
            format!(r#"forebay_fuse_requests_total{of},operation="read"}} 7"#),
            format!("forebay_fuse_read_bytes_total{of}}} 4096"),
            format!("forebay_fuse_health{of}}} 1"),
            format!("forebay_fuse_table_epoch{of}}} 5"),
            "forebay_fuse_memory_budget_bytes 1048576".to_owned(),
            "forebay_fuse_keeper_linked 1".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_page_lists_every_metric() {
        let mut page = String::from(
            "# Metrics of a FUSE daemon\n\n\
             Generated from `fuse/src/metrics/text.rs` (`UPDATE_DOCS=1 cargo test -p forebay-fuse metrics`).\n\
             Served in the OpenMetrics text format on `/metrics` of `forebay fuse --http ADDR`, beside `/healthz` (the process\n\
             answers) and `/readyz` (a keeper is connected). What the kernel asks is counted from the mount on, over all daemons;\n\
             what workers are asked, since this daemon was told of the volume.\n\n",
        );
        page.push_str(&forebay_exposition::table(&example().text().unwrap()));
        assert_eq!(page.matches("| `forebay_fuse_").count(), PROCESS.len() + 1 + VOLUME.len());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics-fuse.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&path, &page).unwrap();
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == page, "docs/metrics-fuse.md is not what text.rs says; run with UPDATE_DOCS=1");
    }
}
