//! Every metric of a worker: names, units, help. `docs/metrics.md` is generated from this file.

use std::sync::atomic::{AtomicU64, Ordering};

use forebay_protocol::frame::FailureCode;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// Labels of what belongs to a dataset.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct DatasetLabels {
    namespace: String,
    dataset: String,
}

/// Label of failures.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct CodeLabel {
    code: Code,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Code {
    BadRequest,
    UnknownDataset,
    VersionGone,
    PermissionDenied,
    SourceUnavailable,
    Busy,
    Stopping,
    NotHeld,
    Internal,
}

/// Metrics of the process. Counters are counted where things happen; gauges, and what other crates count, are sampled
/// when somebody asks.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) data_connections: Gauge,
    pub(crate) control_connections: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) protocol_errors: Counter,
    pub(crate) slow_connections: Counter,
    pub(crate) busy_answers: Counter,
    pub(crate) cancelled_requests: Counter,
    pub(crate) requests_in_flight: Gauge,
    read_failures: Family<CodeLabel, Counter>,
    pub(crate) disk_write_errors: Counter,
    pub(crate) disk_timeouts: Counter,
    pub(crate) disk_hung: Gauge,
    pub(crate) rechecks_dropped: Counter,
    pub(crate) supersedes_dropped: Counter,
    pub(crate) reload_errors: Counter,
    pub(crate) capacity: Gauge,
    pub(crate) used: Gauge,
    pub(crate) tier_healthy: Gauge,
    pub(crate) budget_free: Gauge,
    pub(crate) chunks_in_flight: Gauge,
    pub(crate) hot_chunks: Gauge,
    pub(crate) table_epoch: Gauge,
    datasets: DatasetFamilies,
}

/// The metrics of a dataset, each named once: what has a value per dataset, and the values of one dataset.
macro_rules! by_dataset {
    ($($field:ident: $kind:ident = $name:literal $(in $unit:ident)?, $help:literal;)*) => {
        #[derive(Debug, Default)]
        struct DatasetFamilies {
            $($field: Family<DatasetLabels, $kind>,)*
        }

        /// Metrics of one dataset.
        #[derive(Debug, Clone)]
        pub(crate) struct DatasetMetrics {
            $(pub(crate) $field: $kind,)*
        }

        impl DatasetFamilies {
            fn register(&self, r: &mut Registry) {
                $(by_dataset!(@register r, self.$field.clone(), $name, $help $(, $unit)?);)*
            }

            fn of(&self, labels: &DatasetLabels) -> DatasetMetrics {
                DatasetMetrics { $($field: self.$field.get_or_create_owned(labels),)* }
            }

            fn remove(&self, labels: &DatasetLabels) {
                $(self.$field.remove(labels);)*
            }
        }
    };
    (@register $r:ident, $metric:expr, $name:literal, $help:literal) => { $r.register($name, $help, $metric) };
    (@register $r:ident, $metric:expr, $name:literal, $help:literal, $unit:ident) => {
        $r.register_with_unit($name, $help, Unit::$unit, $metric)
    };
}

by_dataset! {
    hit_bytes: Counter = "hit" in Bytes, "Bytes of blocks that readers asked for and that were held";
    miss_bytes: Counter = "miss" in Bytes, "Bytes of blocks that readers asked for and that were not held";
    served_bytes: Counter = "served" in Bytes, "Bytes of blocks sent to clients and workers";
    bypassed_bytes: Counter = "bypassed" in Bytes, "Bytes fetched that the tier did not admit (quota, watermark, disk)";
    peer_bytes: Counter = "peer" in Bytes, "Bytes received from workers that held them before this one";
    peer_errors: Counter = "peer_errors", "Reads from other workers that were slow or broke";
    peer_corrupt_blocks: Counter = "peer_corrupt_blocks", "Blocks from other workers that failed their checksum";
    copies_failed: Counter = "copies_failed", "Copies of chunks held here that another worker did not take";
    copies_without_room: Counter = "copies_without_room", "Copies of chunks held here for which another worker had no room";
    version_conflicts: Counter = "version_conflicts", "Fetches that met another version than the one asked for";
    fill_errors: Counter = "fill_errors", "Fetches that failed for good, version conflicts apart";
    evicted_bytes: Counter = "evicted" in Bytes, "Bytes dropped to make room";
    expired_bytes: Counter = "expired" in Bytes, "Bytes dropped because nobody used them for the Dataset's lifetime";
    corrupt_blocks: Counter = "corrupt_blocks", "Blocks on disk that failed their checksum and were dropped";
    store_gets: Counter = "store_gets", "GET requests to the sources";
    store_lists: Counter = "store_lists", "LIST requests to the sources";
    store_heads: Counter = "store_heads", "HEAD requests to the sources";
    store_throttled: Counter = "store_throttled", "Requests that the sources turned away because they were too many (429 and 503)";
    store_errors: Counter = "store_errors", "Requests to the sources that failed, retries included";
    store_bytes: Counter = "store_received" in Bytes, "Bytes received from the sources";
    cached_bytes: Gauge = "cached" in Bytes, "Bytes of blocks held";
    pinned_bytes: Gauge = "pinned" in Bytes, "Bytes of blocks held that are never evicted";
    replicated_bytes: Gauge = "replicated" in Bytes, "Bytes of blocks held that another worker is the first to be asked for";
    spare_bytes: Gauge = "spare" in Bytes, "Bytes on disk of copies that nobody wants, which go first";
    cached_chunks: Gauge = "cached_chunks", "Chunks of which something is held";
    staleness_seconds: Gauge = "staleness_seconds",
        "How old what is seen of the sources is at most, where this worker has them listed periodically; else 0";
}

/// Sets a counter that somebody else counts.
pub(crate) fn set(counter: &Counter, value: u64) {
    let inner: &AtomicU64 = counter.inner();
    inner.store(value, Ordering::Relaxed);
}

/// Sets a gauge.
pub(crate) fn level(gauge: &Gauge, value: u64) {
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("forebay_worker"),
            data_connections: Gauge::default(),
            control_connections: Gauge::default(),
            connections_refused: Counter::default(),
            handshakes_failed: Counter::default(),
            protocol_errors: Counter::default(),
            slow_connections: Counter::default(),
            busy_answers: Counter::default(),
            cancelled_requests: Counter::default(),
            requests_in_flight: Gauge::default(),
            read_failures: Family::default(),
            disk_write_errors: Counter::default(),
            disk_timeouts: Counter::default(),
            disk_hung: Gauge::default(),
            rechecks_dropped: Counter::default(),
            supersedes_dropped: Counter::default(),
            reload_errors: Counter::default(),
            capacity: Gauge::default(),
            used: Gauge::default(),
            tier_healthy: Gauge::default(),
            budget_free: Gauge::default(),
            chunks_in_flight: Gauge::default(),
            hot_chunks: Gauge::default(),
            table_epoch: Gauge::default(),
            datasets: DatasetFamilies::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("data_connections", "Open data connections", self.data_connections.clone());
        r.register("control_connections", "Open control connections", self.control_connections.clone());
        r.register(
            "connections_refused",
            "Connections closed because too many were open, or in their handshake",
            self.connections_refused.clone(),
        );
        r.register(
            "handshakes_failed",
            "Connections that did not prove the runtime's key, or spoke something else",
            self.handshakes_failed.clone(),
        );
        r.register(
            "protocol_errors",
            "Data connections closed because they broke the protocol",
            self.protocol_errors.clone(),
        );
        r.register(
            "slow_connections",
            "Data connections closed because their client took nothing, or left a frame unfinished, for too long",
            self.slow_connections.clone(),
        );
        r.register("busy_answers", "Reads refused because their connection had too many", self.busy_answers.clone());
        r.register("cancelled_requests", "Reads that their client cancelled", self.cancelled_requests.clone());
        r.register("requests_in_flight", "Reads being answered", self.requests_in_flight.clone());
        r.register("read_failures", "Reads answered by a failure, by its code", self.read_failures.clone());
        r.register(
            "disk_write_errors",
            "Writes of fetched blocks that the tier refused; readers got them from memory",
            self.disk_write_errors.clone(),
        );
        r.register(
            "disk_timeouts",
            "Reads and writes of the tier that were not waited for any longer; readers got the blocks from the source",
            self.disk_timeouts.clone(),
        );
        r.register(
            "disk_hung",
            "1 while the tier's disk does not answer: blocks come from the sources and are not stored",
            self.disk_hung.clone(),
        );
        r.register(
            "rechecks_dropped",
            "Version conflicts that were not told to the metadata because too many waited",
            self.rechecks_dropped.clone(),
        );
        r.register(
            "supersedes_dropped",
            "Outdated file versions that could not be told to another worker; their chunks stay until evicted",
            self.supersedes_dropped.clone(),
        );
        r.register(
            "reload_errors",
            "Tables or dataset files that could not be used; the last good one stays in force",
            self.reload_errors.clone(),
        );
        r.register_with_unit("capacity", "Bytes that the tier may take", Unit::Bytes, self.capacity.clone());
        r.register_with_unit("used", "Bytes that the tier takes", Unit::Bytes, self.used.clone());
        r.register("tier_healthy", "1 while the tier caches, 0 when it cannot", self.tier_healthy.clone());
        r.register_with_unit(
            "memory_budget_free",
            "Budget for blocks in memory that nobody uses",
            Unit::Bytes,
            self.budget_free.clone(),
        );
        r.register("chunks_in_flight", "Chunks of which blocks are being fetched", self.chunks_in_flight.clone());
        r.register(
            "hot_chunks",
            "Chunks so much in demand that their readers are told to ask several workers",
            self.hot_chunks.clone(),
        );
        r.register("table_epoch", "Epoch of the worker table in force", self.table_epoch.clone());
        self.datasets.register(r);
    }

    /// Counts a read that failed.
    pub(crate) fn failed(&self, code: FailureCode) {
        let code = match code {
            FailureCode::BadRequest => Code::BadRequest,
            FailureCode::UnknownDataset => Code::UnknownDataset,
            FailureCode::VersionGone => Code::VersionGone,
            FailureCode::PermissionDenied => Code::PermissionDenied,
            FailureCode::SourceUnavailable => Code::SourceUnavailable,
            FailureCode::Busy => Code::Busy,
            FailureCode::Stopping => Code::Stopping,
            FailureCode::NotHeld => Code::NotHeld,
            FailureCode::Internal => Code::Internal,
        };
        self.read_failures.get_or_create(&CodeLabel { code }).inc();
    }

    /// The metrics of a dataset.
    pub(crate) fn dataset(&self, namespace: &str, name: &str) -> DatasetMetrics {
        self.datasets.of(&DatasetLabels { namespace: namespace.to_owned(), dataset: name.to_owned() })
    }

    /// Drops the metrics of a dataset that is no longer served.
    pub(crate) fn forget_dataset(&self, namespace: &str, name: &str) {
        self.datasets.remove(&DatasetLabels { namespace: namespace.to_owned(), dataset: name.to_owned() });
    }

    /// In the OpenMetrics text format.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// The page, from what the registry says about itself.
    fn page() -> String {
        let metrics = Metrics::new();
        metrics.dataset("default", "example");
        metrics.failed(FailureCode::Busy);
        let text = metrics.text().unwrap();
        let mut page = String::from(
            "# Metrics of a worker\n\n\
             Generated from `cache-worker/src/metrics.rs` (`UPDATE_DOCS=1 cargo test -p forebay-cache-worker metrics`).\n\
             Served in the OpenMetrics text format on `/metrics` of the worker's metrics address, beside `/healthz`\n\
             (the process answers) and `/readyz` (it serves).\n\n",
        );
        page.push_str(&forebay_exposition::table(&text));
        page
    }

    #[test]
    fn the_page_lists_every_metric() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
        let page = page();
        assert!(page.lines().count() > 40, "{page}");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&path, &page).unwrap();
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == page, "docs/metrics.md is not what metrics.rs says; run with UPDATE_DOCS=1");
    }
}
