//! `forebay load`, `pin`, `free` and `refresh`: what moves or forgets bytes, with progress.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use forebay_preload::{asked::nanoseconds, run::sum};
use forebay_protocol::{
    DatasetPath,
    identity::directory_placement_key,
    placement::Placement,
    worker::{
        FreeRequest, LoadOrder, LoadProgress, LoadRequest, LoadTerms, PinRequest, RefreshRequest, ScanProgress,
        ScanState, Selection, selection,
    },
};
use futures::{StreamExt as _, future::join_all, stream};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde_json::json;
use tonic::Streaming;

use crate::{
    args::{Global, Output},
    output,
    session::{DatasetSession, Session, dataset_path, explain, member_control},
    up::{quantity, quantity_or_none},
};

/// A Dataset and a path in it.
#[derive(Debug, Args)]
pub struct PathArgs {
    /// Name of the Dataset
    dataset: String,
    /// A file or directory of it
    #[arg(default_value = "/")]
    path: String,
}

impl PathArgs {
    /// Name of the Dataset.
    pub fn dataset(&self) -> &str {
        &self.dataset
    }
}

/// Arguments of `load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    #[command(flatten)]
    at: PathArgs,
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    terms: TermsArgs,
}

impl LoadArgs {
    /// Name of the Dataset.
    pub fn dataset(&self) -> &str {
        self.at.dataset()
    }
}

/// Most bytes of a manifest that goes with a request: half of what workers take.
const MAX_MANIFEST: u64 = 4 << 20;

/// Which files below a path.
#[derive(Clone, Debug, Args)]
pub struct SelectionArgs {
    /// Only files whose path below the Dataset matches, as in 'train/**' or '**/*.jpg'; may be given again
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
    /// No files whose path matches; may be given again
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Only files of at least so many bytes
    #[arg(long, value_parser = quantity_or_none, default_value = "0", hide_default_value = true, value_name = "QUANTITY")]
    min_size: u64,
    /// Only files of at most so many bytes
    #[arg(long, value_parser = quantity_or_none, value_name = "QUANTITY")]
    max_size: Option<u64>,
    /// Only files that were not modified before, as 2026-01-31T08:00:00Z
    #[arg(long, value_name = "TIME")]
    modified_after: Option<Timestamp>,
    /// Only files that were modified before
    #[arg(long, value_name = "TIME")]
    modified_before: Option<Timestamp>,
    /// Only what this file of the Dataset names, one path a line, in its order
    #[arg(long, value_name = "PATH", value_parser = dataset_path, conflicts_with = "manifest_file")]
    manifest: Option<DatasetPath>,
    /// Only what this file here names, of at most 4 MiB
    #[arg(long, value_name = "FILE")]
    manifest_file: Option<PathBuf>,
}

impl SelectionArgs {
    /// As workers are told.
    pub fn to_wire(&self) -> anyhow::Result<Selection> {
        let Self { include, exclude, min_size, max_size, modified_after, modified_before, manifest, manifest_file } =
            self.clone();
        let (modified_after_ns, modified_before_ns) =
            (modified_after.map(nanoseconds), modified_before.map(nanoseconds));
        let here = manifest_file.map(|file| read_manifest(&file)).transpose()?;
        let manifest = match (manifest, here) {
            (Some(path), _) => Some(selection::Manifest::ManifestPath(path.to_bytes())),
            (None, here) => here.map(selection::Manifest::ManifestText),
        };
        Ok(Selection { include, exclude, min_size, max_size, modified_after_ns, modified_before_ns, manifest })
    }
}

fn read_manifest(file: &Path) -> anyhow::Result<Bytes> {
    let about = || format!("reading the manifest {}", file.display());
    let size = std::fs::metadata(file).with_context(about)?.len();
    if size > MAX_MANIFEST {
        bail!(
            "the manifest {} has {size} bytes, more than {MAX_MANIFEST}: put it into the Dataset, and name it there with --manifest",
            file.display()
        );
    }
    Ok(std::fs::read(file).with_context(about)?.into())
}

/// How files are loaded.
#[derive(Clone, Copy, Debug, Args)]
pub struct TermsArgs {
    /// Pin what is loaded: it is never evicted
    #[arg(long)]
    pin: bool,
    /// Read what is held again, and load again what is damaged
    #[arg(long)]
    verify: bool,
    /// Have so many workers hold each file
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16), value_name = "COUNT")]
    replicas: Option<u32>,
    /// Which files come first, on each worker, if not as they are found or as a manifest names them
    #[arg(long, value_enum, value_name = "ORDER")]
    order: Option<OrderArg>,
    /// Wait while a load of a higher priority is under way at a worker
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "NUMBER")]
    priority: i32,
    /// Bytes that all workers together ask the sources for in a second, at most
    #[arg(long, value_parser = quantity, value_name = "QUANTITY")]
    bandwidth: Option<u64>,
    /// GET requests that they send in a second, at most
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), value_name = "COUNT")]
    requests_per_second: Option<u64>,
}

/// Which files come first.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum OrderArg {
    /// By path
    Name,
    /// The smallest first
    Size,
}

impl TermsArgs {
    /// As workers are told.
    pub fn to_wire(self) -> LoadTerms {
        let Self { pin, verify, replicas, order, priority, bandwidth, requests_per_second } = self;
        let order = match order {
            None => LoadOrder::Unspecified,
            Some(OrderArg::Name) => LoadOrder::Name,
            Some(OrderArg::Size) => LoadOrder::Size,
        };
        LoadTerms {
            order: order.into(),
            priority,
            pin,
            verify,
            replicas: replicas.unwrap_or_default(),
            bytes_per_second: bandwidth.unwrap_or_default(),
            requests_per_second: requests_per_second.unwrap_or_default(),
        }
    }
}

/// Arguments of `pin`.
#[derive(Debug, Args)]
pub struct PinArgs {
    #[command(flatten)]
    at: PathArgs,
    /// Unpin: the bytes stay until their space is wanted
    #[arg(long)]
    remove: bool,
}

impl PinArgs {
    /// Name of the Dataset.
    pub fn dataset(&self) -> &str {
        self.at.dataset()
    }
}

/// Loads every worker's share.
pub async fn load(global: Global, args: LoadArgs) -> anyhow::Result<ExitCode> {
    let LoadArgs { at, selection, terms } = args;
    let session = Session::open(&global)?.dataset(&at.dataset)?;
    let path = dataset_path(&at.path)?;
    let request = LoadRequest {
        dataset: session.record.id.to_bytes(),
        path: path.to_bytes(),
        selection: Some(selection.to_wire()?),
        terms: Some(terms.to_wire()),
        ..LoadRequest::default()
    };
    let streams = ask_all(&session, |mut control| {
        let request = request.clone();
        async move { control.load(request).await }
    })
    .await?;
    follow(&global, "load", &path, streams).await
}

/// Pins or unpins every worker's share.
pub async fn pin(global: Global, args: PinArgs) -> anyhow::Result<ExitCode> {
    let session = Session::open(&global)?.dataset(&args.at.dataset)?;
    let path = dataset_path(&args.at.path)?;
    let request = PinRequest { dataset: session.record.id.to_bytes(), path: path.to_bytes(), remove: args.remove };
    let streams = ask_all(&session, |mut control| {
        let request = request.clone();
        async move { control.pin(request).await }
    })
    .await?;
    follow(&global, if args.remove { "unpin" } else { "pin" }, &path, streams).await
}

/// Drops what is cached below a path.
pub async fn free(global: Global, args: PathArgs) -> anyhow::Result<ExitCode> {
    let session = Session::open(&global)?.dataset(&args.dataset)?;
    let path = dataset_path(&args.path)?;
    let request = FreeRequest { dataset: session.record.id.to_bytes(), path: path.to_bytes() };
    let answers = ask_all(&session, |mut control| {
        let request = request.clone();
        async move { control.free(request).await }
    })
    .await?;
    let (mut bytes, mut chunks, mut pinned) = (0, 0, 0);
    for (_, answer) in answers {
        bytes += answer.freed_bytes;
        chunks += answer.freed_chunks;
        pinned += answer.pinned_bytes_kept;
    }
    match global.output {
        Output::Json => output::json(&json!({"freedBytes": bytes, "freedChunks": chunks, "pinnedBytesKept": pinned}))?,
        Output::Table => {
            print!("freed {} in {chunks} chunks below {path}", output::bytes(bytes));
            match pinned {
                0 => println!(),
                pinned => println!("; {} are pinned and stay (forebay pin --remove)", output::bytes(pinned)),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists the source again.
pub async fn refresh(global: Global, args: PathArgs) -> anyhow::Result<ExitCode> {
    let session = Session::open(&global)?.dataset(&args.dataset)?;
    let path = dataset_path(&args.path)?;
    let request = RefreshRequest { dataset: session.record.id.to_bytes(), path: path.to_bytes() };
    // The coordinator is the first worker of the root's order that answers.
    let table = session.client.members();
    let key = directory_placement_key(session.record.id, &DatasetPath::root());
    let mut problems = Vec::new();
    for index in Placement::new(&table).order(key, table.members.len()) {
        let member = &table.members[index].name;
        let stream = match member_control(&session.client, member).await {
            Ok(mut control) => control.refresh(request.clone()).await.map_err(|status| explain(&status)),
            Err(error) => Err(format!("{error:#}")),
        };
        match stream {
            Ok(stream) => return follow_scan(&global, &path, stream.into_inner()).await,
            Err(problem) => problems.push(format!("{member}: {problem}")),
        }
    }
    bail!("no worker refreshes {path}: {}", problems.join("; "))
}

async fn follow_scan(
    global: &Global,
    path: &DatasetPath,
    mut stream: Streaming<ScanProgress>,
) -> anyhow::Result<ExitCode> {
    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}")?);
    let mut last = ScanProgress::default();
    while let Some(progress) = stream.next().await {
        last = progress.map_err(|status| anyhow::anyhow!("refresh of {path} broke off: {}", explain(&status)))?;
        match global.output {
            Output::Json => output::json_line(&scan_json(&last))?,
            Output::Table => bar.set_message(format!(
                "{} directories, {} files, {} changed",
                last.directories, last.files, last.changed
            )),
        }
        bar.tick();
    }
    bar.finish_and_clear();
    if last.state() != ScanState::Complete {
        bail!("refresh of {path} failed: {}", if last.error.is_empty() { "it broke off" } else { &last.error });
    }
    if global.output == Output::Table {
        println!(
            "{path}: {} files, {} in {} directories; {} entries changed (generation {})",
            last.files,
            output::bytes(last.bytes),
            last.directories,
            last.changed,
            last.generation
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn scan_json(scan: &ScanProgress) -> serde_json::Value {
    json!({
        "complete": scan.state() == ScanState::Complete,
        "generation": scan.generation,
        "files": scan.files,
        "bytes": scan.bytes,
        "directories": scan.directories,
        "hiddenKeys": scan.hidden,
        "changed": scan.changed,
        "revision": format!("{:016x}", scan.digest),
        "error": scan.error,
    })
}

/// Asks every worker; fails with all reasons unless all agree to begin.
async fn ask_all<T, F>(
    session: &DatasetSession,
    ask: impl Fn(forebay_client::ControlClient<tonic::transport::Channel>) -> F,
) -> anyhow::Result<Vec<(String, T)>>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    let table = session.client.members();
    let answers = join_all(table.members.iter().map(|member| async {
        let control = member_control(&session.client, &member.name).await?;
        let answer = ask(control)
            .await
            .map_err(|status| anyhow::anyhow!("{}", explain(&status)))
            .with_context(|| format!("worker {}", member.name))?;
        Ok((member.name.clone(), answer.into_inner()))
    }))
    .await;
    let (good, bad): (Vec<_>, Vec<_>) = answers.into_iter().partition(anyhow::Result::is_ok);
    if !bad.is_empty() {
        let reasons: Vec<String> = bad.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        bail!("{}", reasons.join("; "));
    }
    good.into_iter().collect()
}

/// Follows the workers' shares to their end, as a progress bar or as JSON lines; exact totals, all failures.
async fn follow(
    global: &Global,
    verb: &str,
    path: &DatasetPath,
    streams: Vec<(String, Streaming<LoadProgress>)>,
) -> anyhow::Result<ExitCode> {
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(
        "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}",
    )?);
    let mut shares: BTreeMap<String, LoadProgress> =
        streams.iter().map(|(name, _)| (name.clone(), LoadProgress::default())).collect();
    let mut broken = Vec::new();
    let mut all = stream::select_all(
        streams.into_iter().map(|(name, stream)| stream.map(move |progress| (name.clone(), progress)).boxed()),
    );
    while let Some((name, progress)) = all.next().await {
        match progress {
            Ok(progress) => {
                shares.insert(name, progress);
            }
            Err(status) => broken.push(format!("worker {name}: {}", explain(&status))),
        }
        let total = sum(shares.values());
        match global.output {
            Output::Json => output::json_line(&load_json(verb, &total))?,
            Output::Table => {
                bar.set_length(total.total_bytes);
                bar.set_position(total.done_bytes);
                bar.set_message(format!("{}/{} files", total.done_files, total.total_files));
            }
        }
    }
    bar.finish_and_clear();
    let total = sum(shares.values());
    for (name, share) in &shares {
        if !share.finished && !broken.iter().any(|problem| problem.contains(name.as_str())) {
            broken.push(format!("worker {name}: broke off"));
        }
    }
    let complete = broken.is_empty() && total.failed_files == 0;
    if global.output == Output::Table {
        print!(
            "{verb} {path}: {} of {} files, {}",
            total.done_files,
            total.total_files,
            output::bytes(total.done_bytes)
        );
        match total.bypassed_bytes {
            0 => println!(),
            bypassed => println!("; {} were not admitted: the quota or the tier is full", output::bytes(bypassed)),
        }
    }
    for problem in broken.iter().chain(&total.failures) {
        eprintln!("forebay: {problem}");
    }
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn load_json(verb: &str, total: &LoadProgress) -> serde_json::Value {
    json!({
        "verb": verb,
        "totalFiles": total.total_files,
        "totalBytes": total.total_bytes,
        "doneFiles": total.done_files,
        "doneBytes": total.done_bytes,
        "failedFiles": total.failed_files,
        "bypassedBytes": total.bypassed_bytes,
        "failures": total.failures,
        "listed": total.listed,
        "finished": total.finished,
    })
}
