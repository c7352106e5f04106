//! The command line.

use std::{io::IsTerminal as _, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::{crds, guard, run};

/// Makes workers, volumes and claims for the Datasets and CacheRuntimes of a cluster.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Args {
    /// How to print logs
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "FOREBAY_LOG_FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

/// Form of logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reconcile until interrupted
    Run(Box<RunArgs>),
    /// Fail, and name them, while there are Datasets or CacheRuntimes in any namespace
    Guard,
    /// Install or upgrade the CustomResourceDefinitions
    Crds,
}

/// What `run` needs to know.
#[derive(Clone, Debug, ClapArgs)]
pub struct RunArgs {
    /// Where to answer /healthz, /readyz and /metrics
    #[arg(long, env = "FOREBAY_HTTP", default_value = "0.0.0.0:8080", value_name = "ADDRESS")]
    pub http: SocketAddr,
    /// The secret that the keys of all CacheRuntimes are derived from: a file with 64 hexadecimal digits
    #[arg(long, env = "FOREBAY_MASTER_KEY_FILE", value_name = "FILE")]
    pub master_key_file: PathBuf,
    #[command(flatten)]
    pub workers: WorkerArgs,
    /// Namespace of the Lease by which one of several operators leads
    #[arg(long, env = "POD_NAMESPACE", default_value = "forebay-system")]
    pub namespace: String,
    /// Name of this operator among them
    #[arg(long, env = "POD_NAME", default_value = "forebay-operator")]
    pub identity: String,
    /// Lead without asking: for a single operator that is run by hand
    #[arg(long)]
    pub no_leader_election: bool,
}

/// What the pods of workers are made with.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct WorkerArgs {
    /// Image of workers
    #[arg(long = "worker-image", env = "FOREBAY_WORKER_IMAGE", value_name = "IMAGE")]
    pub image: String,
    /// When nodes pull it: Always, IfNotPresent or Never
    #[arg(long, env = "FOREBAY_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_name = "POLICY",
        value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: String,
    /// Secret with credentials for the registry, in the namespace of the CacheRuntime
    #[arg(long = "image-pull-secret", env = "FOREBAY_IMAGE_PULL_SECRETS", value_delimiter = ',', value_name = "NAME")]
    pub image_pull_secrets: Vec<String>,
    /// PriorityClass of workers whose CacheRuntime names none; empty: none
    #[arg(
        long = "worker-priority-class",
        env = "FOREBAY_WORKER_PRIORITY_CLASS",
        default_value = "",
        value_name = "NAME"
    )]
    pub priority_class: String,
    /// Filters of the workers' log
    #[arg(long = "worker-log", env = "FOREBAY_WORKER_LOG", default_value = "warn,forebay=info", value_name = "FILTER")]
    pub log: String,
}

impl Args {
    /// Runs the command.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Self { log_format, command } = self;
        init_logs(log_format);
        // One thread: the work is waiting for others, and each thread more keeps memory of its own.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        match command {
            Command::Run(args) => runtime.block_on(run::run(*args)),
            Command::Guard => runtime.block_on(guard::run()),
            Command::Crds => runtime.block_on(crds::run()),
        }
    }
}

fn init_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_env("FOREBAY_LOG")
        .unwrap_or_else(|_| EnvFilter::new("warn,kube_client=off,forebay=info,forebay_operator=info"));
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
