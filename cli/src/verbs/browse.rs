//! `forebay ls` and `forebay stat`: the namespace as the workers know it.

use std::process::ExitCode;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use forebay_client::{ClientError, Entry, EntryKind};
use forebay_protocol::{
    CHUNK_SIZE, ChunkKey, DatasetPath, FileVersion, identity::directory_placement_key, placement::Placement, worker,
};
use futures::future::join_all;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    args::{Global, Output},
    output,
    session::{DatasetSession, Session, dataset_path, explain, member_control},
};

/// Arguments of `ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Name of the Dataset
    dataset: String,
    /// A directory of it
    #[arg(default_value = "/")]
    path: String,
    /// Show size, time and version
    #[arg(long, short)]
    long: bool,
}

impl LsArgs {
    /// Name of the Dataset.
    pub fn dataset(&self) -> &str {
        &self.dataset
    }
}

/// Arguments of `stat`.
#[derive(Debug, Args)]
pub struct StatArgs {
    /// Name of the Dataset
    dataset: String,
    /// An entry of it
    path: String,
}

impl StatArgs {
    /// Name of the Dataset.
    pub fn dataset(&self) -> &str {
        &self.dataset
    }
}

/// Entries asked of a worker at a time.
const PAGE: u32 = 1000;

/// Prints a directory page by page: memory does not grow with it.
pub async fn ls(global: Global, args: LsArgs) -> anyhow::Result<ExitCode> {
    let session = Session::open(&global)?.dataset(&args.dataset)?;
    let path = dataset_path(&args.path)?;
    let mut after = Bytes::new();
    loop {
        let page = match session.dataset.list(&path, &after, PAGE).await {
            Ok(page) => page,
            Err(ClientError::NotFound) => bail!("no directory {path} in Dataset {}", args.dataset),
            Err(error) => return Err(error).with_context(|| format!("listing {path}")),
        };
        print_page(&global, args.long, &page.entries)?;
        match page.entries.last() {
            Some(last) if !page.end => after = last.sort_key(),
            _ => return Ok(ExitCode::SUCCESS),
        }
    }
}

fn print_page(global: &Global, long: bool, entries: &[Entry]) -> anyhow::Result<()> {
    if global.output == Output::Json {
        return entries.iter().try_for_each(|entry| output::json_line(&describe(entry)));
    }
    for entry in entries {
        let name = output::name(&entry.name);
        match &entry.kind {
            EntryKind::Directory if long => println!("{:>10}  {:<20}  {name}/", "-", "-"),
            EntryKind::Directory => println!("{name}/"),
            EntryKind::File { version } if long => {
                println!("{:>10}  {:<20}  {name}", output::bytes(version.size), time(version.mtime_ns));
            }
            EntryKind::File { .. } => println!("{name}"),
        }
    }
    Ok(())
}

fn describe(entry: &Entry) -> Value {
    let name = String::from_utf8_lossy(&entry.name);
    match &entry.kind {
        EntryKind::Directory => json!({"name": name, "kind": "Directory"}),
        EntryKind::File { version } => json!({
            "name": name,
            "kind": "File",
            "size": version.size,
            "mtime": time(version.mtime_ns),
            "version": String::from_utf8_lossy(version.key.as_bytes()),
        }),
    }
}

/// Prints one entry: its version, its owners, and what each worker holds of it.
pub async fn stat(global: Global, args: StatArgs) -> anyhow::Result<ExitCode> {
    let session = Session::open(&global)?.dataset(&args.dataset)?;
    let path = dataset_path(&args.path)?;
    let found = match path.split() {
        None => Entry { name: "/".into(), kind: EntryKind::Directory },
        Some((directory, name)) => match session.dataset.lookup(&directory, &name).await {
            Ok(entry) => entry,
            Err(ClientError::NotFound) => bail!("no entry {path} in Dataset {}", args.dataset),
            Err(error) => return Err(error).with_context(|| format!("looking up {path}")),
        },
    };
    let mut description = describe(&found);
    description["path"] = json!(path.to_string());
    if let Some(mount) = &session.record.mount {
        let below = String::from_utf8_lossy(&path.as_bytes()[1..]);
        description["mount"] = json!(mount.join(below.as_ref()).display().to_string());
    }
    match &found.kind {
        EntryKind::Directory => description["owner"] = json!(directory_owner(&session, &path)),
        EntryKind::File { version } => {
            let holders = holders(&session, &path, version).await;
            let cached: u64 =
                holders.iter().filter_map(|(_, held)| held.as_ref().ok()).map(|held| held.cached_bytes).sum();
            description["cachedBytes"] = json!(cached.min(version.size));
            description["owners"] = json!(chunk_owners(&session, &path, version));
            description["workers"] = holders
                .into_iter()
                .map(|(name, held)| match held {
                    Ok(held) => json!({"name": name, "cachedBytes": held.cached_bytes, "pinned": held.pinned}),
                    Err(problem) => json!({"name": name, "problem": problem}),
                })
                .collect();
        }
    }
    match global.output {
        Output::Json => output::json(&description)?,
        Output::Table => print_description(&description, 0),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_description(value: &Value, indent: usize) {
    let Value::Object(fields) = value else { return };
    for (key, value) in fields {
        let pad = " ".repeat(indent);
        match value {
            Value::Array(items) if items.iter().all(Value::is_object) => {
                println!("{pad}{key}:");
                for item in items {
                    print_description(item, indent + 2);
                }
            }
            Value::Array(items) => {
                let items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                println!("{pad}{key}: {}", items.join(", "));
            }
            Value::String(text) => println!("{pad}{key}: {text}"),
            other => println!("{pad}{key}: {other}"),
        }
    }
}

fn directory_owner(session: &DatasetSession, path: &DatasetPath) -> Option<String> {
    let table = session.client.members();
    let owner = Placement::new(&table).owner(directory_placement_key(session.record.id, path))?;
    Some(table.members[owner].name.clone())
}

/// Owners of the file's chunks, each once, in the order of chunks.
fn chunk_owners(session: &DatasetSession, path: &DatasetPath, version: &FileVersion) -> Vec<String> {
    let table = session.client.members();
    let placement = Placement::new(&table);
    let file = version.identity(session.record.id, path);
    let chunks = u32::try_from(version.size.div_ceil(CHUNK_SIZE)).unwrap_or(u32::MAX);
    let mut owners: Vec<String> = Vec::new();
    for index in 0..chunks {
        if let Some(owner) = placement.owner(ChunkKey { file, index }.placement_key()) {
            let name = &table.members[owner].name;
            if !owners.contains(name) {
                owners.push(name.clone());
            }
        }
        if owners.len() == table.members.len() {
            break;
        }
    }
    owners
}

async fn holders(
    session: &DatasetSession,
    path: &DatasetPath,
    version: &FileVersion,
) -> Vec<(String, Result<worker::InspectResponse, String>)> {
    let request = worker::InspectRequest {
        dataset: session.record.id.to_bytes(),
        file: Some(worker::FileVersion {
            path: path.to_bytes(),
            size: version.size,
            mtime_ns: version.mtime_ns,
            version_key: version.key.to_bytes(),
        }),
    };
    let table = session.client.members();
    join_all(table.members.iter().map(|member| async {
        let held = match member_control(&session.client, &member.name).await {
            Ok(mut control) => control
                .inspect(request.clone())
                .await
                .map(tonic::Response::into_inner)
                .map_err(|status| explain(&status)),
            Err(error) => Err(format!("{error:#}")),
        };
        (member.name.clone(), held)
    }))
    .await
}

/// A time as RFC 3339 in UTC, to the second.
fn time(ns: i64) -> String {
    match Timestamp::from_nanosecond(i128::from(ns)) {
        Ok(time) => format!("{time:.0}"),
        // Every i64 of nanoseconds is a Timestamp (1677 to 2262); if that ever changes, the number still tells.
        Err(_) => format!("{ns} ns"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_civil() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_400_000_000_000), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_795_339_200_000_000_000), "2026-11-22T09:20:00Z");
    }
}
