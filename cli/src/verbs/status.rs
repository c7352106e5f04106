//! `forebay status`: Datasets, workers and mounts, once.

use std::process::ExitCode;

use clap::Args;
use forebay_protocol::worker::ScanState;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::{
    args::{Global, Output},
    output,
    session::{DatasetTotals, Session, WorkerAnswer, client_of, worker_status},
    up::{self, RuntimeRecord},
};

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {}

/// What is known of a runtime and its Datasets at one moment.
pub struct RuntimeView {
    /// Namespace and name.
    pub runtime: RuntimeRecord,
    /// Its workers.
    pub workers: Vec<WorkerAnswer>,
}

/// A Dataset's state in a word, as its `status.phase` says it in a cluster.
pub fn phase(totals: &DatasetTotals, workers: usize) -> &'static str {
    match (&totals.sums.scan, totals.workers) {
        (_, 0) => "Failed",
        _ if !totals.sums.source_problem.is_empty() => "Degraded",
        (_, answering) if answering < workers => "Degraded",
        (Some(scan), _) if scan.state() == ScanState::Failed => "Degraded",
        (None, _) => "Pending",
        _ => "Ready",
    }
}

/// Asks all runtimes of the instance.
pub async fn view(session: &Session) -> anyhow::Result<Vec<RuntimeView>> {
    let clients = session
        .record
        .runtimes
        .iter()
        .map(|runtime| Ok((runtime.clone(), client_of(runtime)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(join_all(
        clients
            .into_iter()
            .map(|(runtime, client)| async move { RuntimeView { runtime, workers: worker_status(&client).await } }),
    )
    .await)
}

/// The totals of a Dataset in what its runtime's workers said.
pub fn totals(view: &RuntimeView, dataset: &up::DatasetRecord) -> DatasetTotals {
    DatasetTotals::of(
        view.workers
            .iter()
            .filter_map(|worker| worker.status.as_ref().ok())
            .flat_map(|status| &status.datasets)
            .filter(|status| status.dataset == dataset.id.to_bytes()),
    )
}

/// Prints the state of the instance.
pub async fn status(global: Global, args: StatusArgs) -> anyhow::Result<ExitCode> {
    let StatusArgs {} = args;
    let session = Session::open(&global)?;
    let views = view(&session).await?;
    let supervisor = match &session.layout {
        Some(layout) => Some(up::ask(layout).await),
        None => None,
    };
    let answer = supervisor.as_ref().and_then(|answer| answer.as_ref().ok());
    let of_instance = |field: &str| answer.map_or_else(|| json!([]), |answer| answer[field].clone());
    let datasets = dataset_rows(&session, &views);
    let workers: Vec<Value> = views.iter().flat_map(worker_rows).collect();
    let document = json!({
        "pid": session.record.pid,
        "datasets": datasets,
        "workers": workers,
        "workerProcesses": of_instance("workers"),
        "mounts": of_instance("mounts"),
        "policies": of_instance("policies"),
        "daemons": of_instance("daemons"),
    });
    match global.output {
        Output::Json => output::json(&document)?,
        Output::Table => {
            print!("{}", dataset_table(&document));
            println!();
            print!("{}", worker_table(&document));
            // In a cluster the other objects say the rest.
            let Some(supervisor) = supervisor else { return Ok(ExitCode::SUCCESS) };
            println!();
            if !rows(&document, "policies").is_empty() {
                print!("{}", policy_table(&document));
                println!();
            }
            match supervisor {
                Ok(_) => print!("{}", mount_table(&document)),
                Err(error) => println!("the instance does not answer: {error:#}"),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn dataset_rows(session: &Session, views: &[RuntimeView]) -> Vec<Value> {
    session
        .record
        .datasets
        .iter()
        .map(|dataset| {
            let view = views
                .iter()
                .find(|view| view.runtime.namespace == dataset.namespace && view.runtime.name == dataset.runtime);
            let workers = view.map_or(0, |view| view.workers.len());
            let totals = view.map(|view| totals(view, dataset)).unwrap_or_default();
            let sums = &totals.sums;
            let scan = sums.scan.clone().unwrap_or_default();
            json!({
                "namespace": dataset.namespace,
                "name": dataset.name,
                "id": dataset.id,
                "phase": phase(&totals, workers),
                "mount": dataset.mount,
                "generation": sums.generation,
                "revision": (scan.state() == ScanState::Complete).then(|| format!("{:016x}", scan.digest)),
                "scan": {"state": scan_state(&scan), "error": scan.error, "directories": scan.directories,
                         "hiddenKeys": scan.hidden},
                "files": scan.files,
                "bytes": scan.bytes,
                "cachedBytes": sums.cached_bytes,
                "replicatedBytes": sums.replicated_bytes,
                "pinnedBytes": sums.pinned_bytes,
                "hitBytes": sums.hit_bytes,
                "missBytes": sums.miss_bytes,
                "hitRatioPercent": percent(sums.hit_bytes, sums.hit_bytes + sums.miss_bytes),
                "servedBytes": sums.served_bytes,
                "evictedBytes": sums.evicted_bytes,
                "expiredBytes": sums.expired_bytes,
                "bypassedBytes": sums.bypassed_bytes,
                "corruptBlocks": sums.corrupt_blocks,
                "versionConflicts": sums.version_conflicts,
                "store": {"bytes": sums.store_bytes, "gets": sums.store_gets, "lists": sums.store_lists,
                          "heads": sums.store_heads, "errors": sums.store_errors,
                          "throttled": sums.store_throttled},
                "sourceProblem": sums.source_problem,
            })
        })
        .collect()
}

fn percent(part: u64, whole: u64) -> Option<u64> {
    (whole > 0).then(|| (part as f64 * 100.0 / whole as f64) as u64)
}

fn scan_state(scan: &forebay_protocol::worker::ScanProgress) -> &'static str {
    match scan.state() {
        ScanState::Unspecified => "Pending",
        ScanState::Running => "Running",
        ScanState::Complete => "Complete",
        ScanState::Failed => "Failed",
    }
}

fn worker_rows(view: &RuntimeView) -> Vec<Value> {
    view.workers
        .iter()
        .map(|worker| match &worker.status {
            Ok(status) => json!({
                "runtime": view.runtime.name,
                "name": worker.name,
                "address": worker.address,
                "state": if status.tier_problem.is_empty() { "Serving" } else { "NotCaching" },
                "problem": status.tier_problem,
                "usedBytes": status.used_bytes,
                "capacityBytes": status.capacity_bytes,
                "connections": status.connections,
                "requestsInFlight": status.requests_in_flight,
                "uptimeSeconds": status.uptime_seconds,
                "tableEpoch": status.table_epoch,
            }),
            Err(problem) => json!({
                "runtime": view.runtime.name,
                "name": worker.name,
                "address": worker.address,
                "state": "Away",
                "problem": problem,
            }),
        })
        .collect()
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn size(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".into(), output::bytes)
}

fn rows(document: &Value, key: &str) -> Vec<Value> {
    document[key].as_array().cloned().unwrap_or_default()
}

fn dataset_table(document: &Value) -> String {
    output::table(
        &["DATASET", "PHASE", "FILES>", "SIZE>", "CACHED>", "HIT%>", "SCAN", "MOUNT", "PROBLEM"],
        rows(document, "datasets").iter().map(|row| {
            let problem = match row["scan"]["error"].as_str() {
                Some(error) if !error.is_empty() => error.to_owned(),
                _ => text(&row["sourceProblem"]),
            };
            vec![
                text(&row["name"]),
                text(&row["phase"]),
                text(&row["files"]),
                size(&row["bytes"]),
                size(&row["cachedBytes"]),
                text(&row["hitRatioPercent"]),
                text(&row["scan"]["state"]),
                text(&row["mount"]),
                problem,
            ]
        }),
    )
}

fn worker_table(document: &Value) -> String {
    output::table(
        &["WORKER", "STATE", "USED>", "CAPACITY>", "CONNECTIONS>", "UPTIME>", "ADDRESS", "PROBLEM"],
        rows(document, "workers").iter().map(|row| {
            vec![
                text(&row["name"]),
                text(&row["state"]),
                size(&row["usedBytes"]),
                size(&row["capacityBytes"]),
                text(&row["connections"]),
                row["uptimeSeconds"].as_u64().map_or_else(|| "-".into(), |seconds| format!("{seconds}s")),
                text(&row["address"]),
                text(&row["problem"]),
            ]
        }),
    )
}

fn policy_table(document: &Value) -> String {
    output::table(
        &["POLICY", "DATASET", "PHASE", "FILES>", "LOADED>", "LOADED%>", "RATE>", "NEXT RUN", "PROBLEM"],
        rows(document, "policies").iter().map(|row| {
            let run = &row["lastRun"];
            vec![
                text(&row["name"]),
                text(&row["dataset"]),
                text(&run["phase"]),
                text(&run["files"]),
                size(&run["bytes"]),
                text(&run["percent"]),
                run["bytesPerSecond"].as_u64().map_or_else(|| "-".into(), |rate| format!("{}/s", output::bytes(rate))),
                text(&row["nextScheduleTime"]),
                text(&run["message"]),
            ]
        }),
    )
}

fn mount_table(document: &Value) -> String {
    output::table(
        &["MOUNT", "DAEMON", "TAKEOVERS>", "REQUESTS>", "RESENT>", "WAITING>"],
        rows(document, "mounts").iter().map(|row| {
            vec![
                text(&row["target"]),
                text(&row["daemonPid"]),
                text(&row["takeovers"]),
                text(&row["requests"]),
                text(&row["resent"]),
                text(&row["waiting"]),
            ]
        }),
    )
}
