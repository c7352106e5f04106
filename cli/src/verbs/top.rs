//! `forebay top`: rates, refreshed until interrupted.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;
use tokio::signal;

use super::status::{RuntimeView, phase, totals, view};
use crate::{
    args::{Global, Output},
    output,
    session::{DatasetTotals, Session},
};

/// Arguments of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Seconds between refreshes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Stop after this many refreshes
    #[arg(long)]
    count: Option<u64>,
}

/// Prints rates between two looks, again and again.
pub async fn top(global: Global, args: TopArgs) -> anyhow::Result<ExitCode> {
    let session = Session::open(&global)?;
    let mut before = (Instant::now(), sums(&session, &view(&session).await?));
    let mut left = args.count;
    while left != Some(0) {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(args.interval)) => {}
            interrupted = signal::ctrl_c() => { interrupted?; break }
        }
        let now = (Instant::now(), sums(&session, &view(&session).await?));
        let seconds = now.0.duration_since(before.0).as_secs_f64();
        print(&global, &session, &before.1, &now.1, seconds)?;
        before = now;
        left = left.map(|left| left - 1);
    }
    Ok(ExitCode::SUCCESS)
}

/// Totals of every Dataset of the record, in its order, and the number of workers of its runtime.
fn sums(session: &Session, views: &[RuntimeView]) -> Vec<(DatasetTotals, usize)> {
    session
        .record
        .datasets
        .iter()
        .map(|dataset| {
            views
                .iter()
                .find(|view| view.runtime.namespace == dataset.namespace && view.runtime.name == dataset.runtime)
                .map(|view| (totals(view, dataset), view.workers.len()))
                .unwrap_or_default()
        })
        .collect()
}

fn print(
    global: &Global,
    session: &Session,
    before: &[(DatasetTotals, usize)],
    now: &[(DatasetTotals, usize)],
    seconds: f64,
) -> anyhow::Result<()> {
    // A worker that restarted counts from zero again: a rate is never negative.
    let rate = |now: u64, before: u64| (now.saturating_sub(before) as f64 / seconds) as u64;
    let mut rows = Vec::new();
    for ((record, (before, _)), (now, workers)) in session.record.datasets.iter().zip(before).zip(now) {
        let (old, new) = (&before.sums, &now.sums);
        let served = rate(new.served_bytes, old.served_bytes);
        let store = rate(new.store_bytes, old.store_bytes);
        let hits = new.hit_bytes.saturating_sub(old.hit_bytes);
        let misses = new.miss_bytes.saturating_sub(old.miss_bytes);
        let requests = rate(
            new.store_gets + new.store_lists + new.store_heads,
            old.store_gets + old.store_lists + old.store_heads,
        );
        if global.output == Output::Json {
            output::json_line(&json!({
                "name": record.name,
                "namespace": record.namespace,
                "phase": phase(now, *workers),
                "servedBytesPerSecond": served,
                "storeBytesPerSecond": store,
                "storeRequestsPerSecond": requests,
                "hitBytes": hits,
                "missBytes": misses,
                "cachedBytes": new.cached_bytes,
            }))?;
        }
        rows.push(vec![
            record.name.clone(),
            phase(now, *workers).into(),
            format!("{}/s", output::bytes(served)),
            format!("{}/s", output::bytes(store)),
            requests.to_string(),
            output::percent(hits, hits + misses),
            output::bytes(new.cached_bytes),
        ]);
    }
    if global.output == Output::Table {
        let headings = ["DATASET", "PHASE", "SERVED>", "FROM STORE>", "REQUESTS/S>", "HIT%>", "CACHED>"];
        println!("{}", output::table(&headings, rows));
    }
    Ok(())
}
