//! `forebay preload`: drives one run of a PreloadPolicy, in the pod of its Job.
//!
//! It keeps nothing: workers know how far the run is, under the name that it was given, so another pod goes on with it.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use forebay_client::{Client, ClientConfig, MIN_BUDGET, MemoryBudget};
use forebay_preload::run::{self, Request};
use forebay_protocol::{DatasetId, worker::LoadProgress};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use crate::{
    output,
    session::{ANSWER_DEADLINE, dataset_path},
    up::read_key,
    verbs::{SelectionArgs, TermsArgs},
};

/// How often progress is logged.
const LOG: Duration = Duration::from_secs(10);

/// Arguments of `preload`.
#[derive(Clone, Debug, Args)]
pub struct PreloadArgs {
    /// Where the workers are, as HOST:PORT; any of them tells who the others are
    #[arg(long, value_name = "ADDRESS")]
    service: String,
    /// File with the key of the CacheRuntime
    #[arg(long, default_value = "/etc/forebay/key/key", value_name = "FILE")]
    key_file: PathBuf,
    /// UID of the Dataset
    #[arg(long, value_parser = dataset_id, value_name = "UID")]
    dataset: DatasetId,
    /// Name of the run, under which workers keep its progress: who gives the same goes on with it
    #[arg(long, value_name = "UID")]
    run: String,
    /// A file or directory of the Dataset
    #[arg(long, default_value = "/", value_name = "PATH")]
    path: String,
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    terms: TermsArgs,
}

fn dataset_id(text: &str) -> Result<DatasetId, String> {
    let uid = text.parse::<uuid::Uuid>().map_err(|error| error.to_string())?;
    DatasetId::from_slice(uid.as_bytes()).ok_or_else(|| "it is no UID".to_owned())
}

/// Has all workers load their shares.
pub async fn preload(args: PreloadArgs) -> anyhow::Result<ExitCode> {
    let PreloadArgs { service, key_file, dataset, run, path, selection, terms } = args;
    let config = ClientConfig {
        name: "forebay-preload".into(),
        key: read_key(&key_file)?,
        // No file contents come here.
        memory: MemoryBudget::new(MIN_BUDGET),
        deadline: ANSWER_DEADLINE,
        max_read_ahead: 0,
        connections_per_worker: 1,
    };
    let client = Client::of_service(config, service);
    let request =
        Request { dataset, run, path: dataset_path(&path)?, selection: selection.to_wire()?, terms: terms.to_wire() };
    // The first process of a container is not ended by a signal that it does not ask for.
    let mut stop = signal(SignalKind::terminate())?;
    let mut logged = None;
    let done = tokio::select! {
        done = run::run(&client, &request, |sum| log(sum, &mut logged)) => done?,
        _ = stop.recv() => anyhow::bail!("stopped; what is loaded stays loaded"),
    };
    info!(files = done.done_files, bytes = done.done_bytes, "everything is loaded");
    println!("loaded {} files, {}", done.done_files, output::bytes(done.done_bytes));
    Ok(ExitCode::SUCCESS)
}

fn log(sum: &LoadProgress, logged: &mut Option<Instant>) {
    if logged.is_none_or(|logged| logged.elapsed() >= LOG) {
        *logged = Some(Instant::now());
        let LoadProgress { done_files, total_files, done_bytes, total_bytes, listed, .. } = sum;
        info!(done_files, total_files, done_bytes, total_bytes, listed, "loading");
    }
}
