//! The command line.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::{preload, up, verbs};

/// A data cache in front of GPUs: serves Datasets from object stores at local-disk speed.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Clone, Debug, ClapArgs)]
pub struct Global {
    /// Where the running instance keeps its state [default: /var/lib/forebay, or ~/.local/state/forebay without root]
    #[arg(long, global = true, env = "FOREBAY_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Namespace and name of the CacheRuntime of the pod in which this runs (`kubectl forebay` runs it there)
    #[arg(long, global = true, hide = true, conflicts_with = "state_dir", value_name = "NAMESPACE/NAME")]
    pub in_pod: Option<String>,
    /// How to print results
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// How to print logs
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "FOREBAY_LOG_FORMAT")]
    pub log_format: LogFormat,
}

/// Form of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs: one document; for commands with progress, one line a step.
    Json,
}

/// Form of logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the Datasets of manifests on this machine until interrupted
    Up(up::UpArgs),
    /// Check manifests without starting anything
    Validate(verbs::ValidateArgs),
    /// Show Datasets, workers and mounts
    Status(verbs::StatusArgs),
    /// Show rates, refreshed until interrupted
    Top(verbs::TopArgs),
    /// List a directory of a Dataset
    Ls(verbs::LsArgs),
    /// Show an entry of a Dataset: version, where it is cached
    Stat(verbs::StatArgs),
    /// Load what is below a path into the cache
    Load(verbs::LoadArgs),
    /// Drop cached bytes below a path; the source is never touched
    Free(verbs::PathArgs),
    /// Load everything below a path and keep it, whatever else is read
    Pin(verbs::PinArgs),
    /// List the source again, and tell the mounts what changed
    Refresh(verbs::PathArgs),
    /// Run a cache worker (started by `up` and by the operator's StatefulSet)
    #[command(hide = true)]
    Worker(Box<up::WorkerChildArgs>),
    /// Run a FUSE daemon (started by `up` and by the chart's DaemonSet)
    #[command(hide = true)]
    Fuse(up::FuseChildArgs),
    /// Drive a run of a PreloadPolicy (started by the operator's Jobs)
    #[command(hide = true)]
    Preload(preload::PreloadArgs),
}

impl Args {
    /// The Dataset that a verb is about, if it is about one. An error for commands that have no sense in a worker's pod.
    pub fn dataset_of_verb(&self) -> anyhow::Result<Option<&str>> {
        Ok(match &self.command {
            Command::Status(_) | Command::Top(_) => None,
            Command::Ls(args) => Some(args.dataset()),
            Command::Stat(args) => Some(args.dataset()),
            Command::Load(args) => Some(args.dataset()),
            Command::Pin(args) => Some(args.dataset()),
            Command::Free(args) | Command::Refresh(args) => Some(args.dataset()),
            Command::Up(_) | Command::Validate(_) => {
                anyhow::bail!("in a cluster there are status, top, ls, stat, load, free, pin and refresh")
            }
            Command::Worker(_) | Command::Fuse(_) | Command::Preload(_) => anyhow::bail!("the operator runs this"),
        })
    }

    /// Whether it only shows what is the case.
    pub fn is_status(&self) -> bool {
        matches!(self.command, Command::Status(_))
    }

    /// Runs the command.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Self { global, command } = self;
        // Children change their credentials first: that must happen before there are threads.
        match &command {
            Command::Worker(args) => args.child.enter()?,
            Command::Fuse(args) => args.child.enter()?,
            _ => {}
        }
        init_logs(global.log_format);
        match command {
            Command::Worker(args) => args.run(),
            Command::Fuse(args) => args.run(),
            Command::Preload(args) => block_on(preload::preload(args)),
            Command::Up(args) => block_on(up::run(global, args)),
            Command::Validate(args) => verbs::validate(&global, args),
            Command::Status(args) => block_on(verbs::status(global, args)),
            Command::Top(args) => block_on(verbs::top(global, args)),
            Command::Ls(args) => block_on(verbs::ls(global, args)),
            Command::Stat(args) => block_on(verbs::stat(global, args)),
            Command::Load(args) => block_on(verbs::load(global, args)),
            Command::Free(args) => block_on(verbs::free(global, args)),
            Command::Pin(args) => block_on(verbs::pin(global, args)),
            Command::Refresh(args) => block_on(verbs::refresh(global, args)),
        }
    }
}

fn block_on(future: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}

fn init_logs(format: LogFormat) {
    // What cannot be asked of an API server is said by who asked, once and with a back-off.
    let filter =
        EnvFilter::try_from_env("FOREBAY_LOG").unwrap_or_else(|_| EnvFilter::new("warn,kube_client=off,forebay=info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).compact().init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }
}
