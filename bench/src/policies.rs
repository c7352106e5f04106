//! `make bench-policies`: how much of what is read each eviction policy has in the cache, against the most that any could.
//!
//! The simulation drives the workers' own chunk store by traces, so that hundreds of epochs take a minute. The real run
//! reads epochs through a mount, and asks the workers what they had; it shows that the simulation tells the truth.

mod simulation;
mod trace;

use std::path::Path;

use anyhow::ensure;
use comfy_table::{CellAlignment, Table, presets};
use forebay_cache_store::Policy;
use serde_json::{Value, json};

use crate::{
    Bench,
    data::Set,
    job::Work,
    measure,
    served::{Served, Setup, source},
};

/// Files of a trace.
const FILES: u64 = 2_000;
/// Parts of the data that the cache has room for.
const PARTS: [f64; 4] = [0.1, 0.35, 0.5, 0.8];
const POLICIES: [(&str, Policy); 5] = [
    ("Hold", Policy::Hold),
    ("LRU", Policy::Lru),
    ("LFU", Policy::Lfu),
    ("SIEVE", Policy::Sieve),
    ("FIFO", Policy::Fifo),
];
/// What is read for real: larger than the traces' files, so that the overhead of a chunk counts little.
const SET: Set = Set { seed: 12, files: 600, directories: 6, smallest: 1 << 20, largest: 1 << 20, sparse: false };
/// Part of it that the cache has room for.
const REAL_PART: f64 = 0.5;
/// Epochs of the real run that count, after as many as the traces have.
const REAL_EPOCHS: usize = 2;
/// Those whose uses are not told apart by time: epochs of the real run are short.
const REAL_POLICIES: [&str; 2] = ["Hold", "LRU"];

/// Measures, prints the tables, and gives the report for programs.
pub async fn run(bench: &Bench) -> anyhow::Result<String> {
    let mut rows = simulated(bench)?;
    rows.extend(real(bench).await?);
    Ok(serde_json::to_string_pretty(&rows)?)
}

fn simulated(bench: &Bench) -> anyhow::Result<Vec<Value>> {
    let files = bench.scaled(FILES) as usize;
    ensure!(files >= 10, "--scale leaves {files} files, and needs 10");
    // What is measured is not the disk.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory)? } else { bench.directory("policies")? };
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    let names = POLICIES.map(|(name, _)| name);
    table.set_header(["load", "c"].into_iter().chain(names).chain(["bound"]));
    let mut rows = Vec::new();
    for load in trace::Load::ALL {
        let (trace, counted) = load.trace(files, 1);
        for part in PARTS {
            let room = (files as f64 * part).round() as usize;
            let bound = trace::bound(&trace[counted..], files, room);
            let mut cells = vec![load.name().to_owned(), part.to_string()];
            for (name, policy) in POLICIES {
                let ratio = simulation::hit_ratio(dir.path(), policy, &trace, counted, files, room)?;
                cells.push(format!("{ratio:.3}"));
                rows.push(json!({"run": "simulated", "load": load.name(), "part": part, "policy": name,
                                 "hitRatio": ratio, "bound": bound}));
            }
            cells.push(format!("{bound:.3}"));
            bench.say(format_args!("{}, c = {part}", load.name()));
            table.add_row(cells);
        }
    }
    for column in 1..POLICIES.len() + 3 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}\n\n{files} files; {} epochs after {} that do not count\n", trace::COUNTED, trace::WARMING);
    Ok(rows)
}

async fn real(bench: &Bench) -> anyhow::Result<Vec<Value>> {
    let set = Set { files: bench.scaled(SET.files), ..SET };
    let mut rows = Vec::new();
    for policy in REAL_POLICIES {
        let dir = bench.directory("policies")?;
        let root = source(dir.path())?;
        set.write(&root)?;
        let quota = (set.bytes() as f64 * REAL_PART) as u64;
        let setup =
            Setup { workers: 1, shape: "Small", node_cache: false, cache: Some((policy, quota)), ..Setup::default() };
        let served = Served::start(bench, dir.path(), setup).await?;
        served.scanned().await?;
        let (mut hits, mut all) = (0, 0);
        for epoch in 0..trace::WARMING + REAL_EPOCHS {
            measure::forget(0).await?;
            let before = served.answered().await?;
            let root = served.mount().to_owned();
            served.pass(vec![Work::Files { root, set, first: 0, step: 1, threads: 1, verify: true }], None).await?;
            let after = served.answered().await?;
            if epoch >= trace::WARMING {
                hits += after.0 - before.0;
                all += after.0 + after.1 - before.0 - before.1;
            }
        }
        served.stop().await?;
        let ratio = hits as f64 / all as f64;
        println!("through a mount, one job, shuffled, c = {REAL_PART}: {policy} {ratio:.3}");
        rows.push(json!({"run": "mounted", "load": trace::Load::OneJob.name(), "part": REAL_PART, "policy": policy,
                         "hitRatio": ratio}));
    }
    println!("\n{} files of 1 MiB; {REAL_EPOCHS} epochs after {} that do not count", set.files, trace::WARMING);
    Ok(rows)
}
