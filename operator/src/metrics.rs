//! Metrics of the operator, in the text format of OpenMetrics.

use std::{fmt, time::Instant};

use forebay_exposition::Exposed;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Upper bounds of the buckets of durations: from what needs no call to a call's deadline.
const SECONDS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0];

/// By kind of object.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Kind {
    pub kind: &'static str,
}

/// What the operator counts.
pub struct Metrics {
    registry: Registry,
    pub leading: Gauge,
    pub datasets: Gauge,
    pub runtimes: Gauge,
    pub reconciliations: Family<Kind, Counter>,
    pub failures: Family<Kind, Counter>,
    pub durations: Family<Kind, Histogram>,
    pub status_writes: Family<Kind, Counter>,
    pub polls: Counter,
    pub poll_failures: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("forebay_operator");
        let metrics = Self {
            leading: Gauge::default(),
            datasets: Gauge::default(),
            runtimes: Gauge::default(),
            reconciliations: Family::default(),
            failures: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            status_writes: Family::default(),
            polls: Counter::default(),
            poll_failures: Counter::default(),
            registry: Registry::default(),
        };
        let r = &mut registry;
        r.register("leading", "Whether this operator is the one that works", metrics.leading.clone());
        r.register("datasets", "Datasets of the cluster", metrics.datasets.clone());
        r.register("runtimes", "CacheRuntimes of the cluster", metrics.runtimes.clone());
        r.register("reconciliations", "Objects looked at, by kind", metrics.reconciliations.clone());
        r.register("reconcile_failures", "Of these, how many failed", metrics.failures.clone());
        r.register_with_unit("reconcile", "How long one took", Unit::Seconds, metrics.durations.clone());
        r.register("status_writes", "Statuses written, by kind", metrics.status_writes.clone());
        r.register("polls", "Workers asked for their status", metrics.polls.clone());
        r.register("poll_failures", "Of these, how many did not answer", metrics.poll_failures.clone());
        Self { registry, ..metrics }
    }

    /// Runs a reconciliation, and counts it.
    pub async fn timed<T, E>(&self, kind: Kind, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let began = Instant::now();
        let done = work.await;
        self.durations.get_or_create(&kind).observe(began.elapsed().as_secs_f64());
        self.reconciliations.get_or_create(&kind).inc();
        if done.is_err() {
            self.failures.get_or_create(&kind).inc();
        }
        done
    }

    fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Exposed for Metrics {
    async fn metrics(&self) -> Result<String, fmt::Error> {
        self.text()
    }

    /// One that waits for its turn to lead is as ready as one that leads.
    fn not_ready(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const HEAD: &str = "# Metrics of the operator\n\nGenerated from `operator/src/metrics.rs` (`UPDATE_DOCS=1 cargo test -p \
                        forebay-operator metrics`).\nServed in the OpenMetrics text format on `/metrics` of its port 8080, \
                        beside `/healthz` and `/readyz`. Those of an\noperator that waits for its turn to lead stay zero.\n\n";

    #[test]
    fn the_documentation_names_every_metric() {
        let metrics = Metrics::new();
        let kind = || Kind { kind: "Dataset" };
        metrics.reconciliations.get_or_create(&kind()).inc();
        metrics.failures.get_or_create(&kind()).inc();
        metrics.status_writes.get_or_create(&kind()).inc();
        metrics.durations.get_or_create(&kind()).observe(0.01);
        let text = metrics.text().unwrap();
        let page = format!("{HEAD}{}", forebay_exposition::table(&text));
        assert_eq!(page.matches("| `forebay_operator_").count(), text.matches("# HELP").count());
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics-operator.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&file, &page).unwrap();
        }
        assert!(
            std::fs::read_to_string(file).unwrap() == page,
            "run UPDATE_DOCS=1 cargo test -p forebay-operator metrics"
        );
    }
}
