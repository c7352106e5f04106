//! The table at the end.

use std::time::Duration;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use forebay_test_store::Counters as StoreCounters;
use serde_json::Value;

use crate::epoch::Outcome;

/// Counters before or after a pass.
#[derive(Clone, Debug)]
pub struct Sample {
    store_bytes: u64,
    requests: u64,
    resent: u64,
    worker_bytes: u64,
    hit_blocks: u64,
    miss_blocks: u64,
}

impl Sample {
    /// From the store itself and from `forebay status`. The mount's counters survive its daemon.
    pub fn new(store: &StoreCounters, status: &Value) -> anyhow::Result<Self> {
        let mount = &status["mounts"][0];
        let counter = |name: &str| {
            mount["counters"][name].as_u64().with_context(|| format!("forebay status has no counter {name}"))
        };
        Ok(Self {
            store_bytes: store.bytes_out,
            requests: mount["requests"].as_u64().context("forebay status counts no requests")?,
            resent: mount["resent"].as_u64().context("forebay status counts no resent requests")?,
            worker_bytes: counter("worker_bytes")?,
            hit_blocks: counter("hit_blocks")?,
            miss_blocks: counter("miss_blocks")?,
        })
    }

    /// Requests that were resent so far.
    pub fn resent(&self) -> u64 {
        self.resent
    }
}

/// A pass with what happened meanwhile.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was read, and how.
    pub name: String,
    /// What the readers saw.
    pub outcome: Outcome,
    /// Counters before.
    pub before: Sample,
    /// Counters after.
    pub after: Sample,
    /// Requests resent after each kill of the daemon.
    pub resent: Vec<u64>,
    /// Kills of workers.
    pub worker_kills: u64,
}

/// The table, a column a pass.
pub fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(std::iter::once(String::new()).chain(rows.iter().map(|row| row.name.clone())));
    let mut line = |name: &str, cell: &dyn Fn(&Row) -> String| {
        table.add_row(std::iter::once(name.to_owned()).chain(rows.iter().map(cell)));
    };
    let seconds = |row: &Row| row.outcome.wall.as_secs_f64();
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    line("files", &|row| row.outcome.files.to_string());
    line("files/s", &|row| format!("{:.0}", row.outcome.files as f64 / seconds(row)));
    line("MB/s", &|row| format!("{:.0}", row.outcome.bytes as f64 / 1e6 / seconds(row)));
    line("hit ratio at the workers", &|row| {
        let hits = row.after.hit_blocks - row.before.hit_blocks;
        let all = hits + row.after.miss_blocks - row.before.miss_blocks;
        if all == 0 { "not asked".into() } else { format!("{:.1} %", hits as f64 * 100.0 / all as f64) }
    });
    line("bytes from the store", &|row| mb(row.after.store_bytes - row.before.store_bytes));
    line("bytes from workers", &|row| mb(row.after.worker_bytes - row.before.worker_bytes));
    line("requests that reached the daemon", &|row| (row.after.requests - row.before.requests).to_string());
    line("workers killed -9", &|row| row.worker_kills.to_string());
    line("daemons killed -9", &|row| row.resent.len().to_string());
    line("requests resent per kill", &|row| match &row.resent[..] {
        [] => "-".into(),
        kills => kills.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
    });
    line("longest stall", &|row| millis(row.outcome.longest_stall));
    line("errors", &|row| row.outcome.errors.len().to_string());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}
