//! The command line.

use std::{io::IsTerminal as _, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::driver::{self, Options};

/// Two serve calls; what blocks is elsewhere.
const WORKERS: usize = 2;
/// Calls that block at once; more wait.
const BLOCKING: usize = 16;
/// A blocking thread without work goes, with its memory.
const IDLE: Duration = Duration::from_secs(10);
/// What still blocks when everything has ended is left behind.
const LAST: Duration = Duration::from_millis(100);

/// Mounts Datasets for the pods of a node, and keeps the descriptors of the mounts
#[derive(Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Name of the node, as the kubelet knows it
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_id: String,
    /// The kubelet's directory, the same path in here and on the node
    #[arg(long, env = "FOREBAY_KUBELET_DIR", default_value = "/var/lib/kubelet", value_name = "DIR")]
    kubelet_dir: PathBuf,
    /// This driver's directory below it: its socket, the keeper's socket, stage mounts of inline volumes [default:
    /// KUBELET_DIR/plugins/csi.forebay.io]
    #[arg(long, env = "FOREBAY_PLUGIN_DIR", value_name = "DIR")]
    plugin_dir: Option<PathBuf>,
    /// Socket of the driver, as unix:///PATH or PATH [default: PLUGIN_DIR/csi.sock]
    #[arg(long, env = "CSI_ENDPOINT", value_name = "ENDPOINT", value_parser = endpoint)]
    endpoint: Option<PathBuf>,
    /// Where the kubelet looks for plugins [default: KUBELET_DIR/plugins_registry]; empty: do not register
    #[arg(long, env = "FOREBAY_REGISTRATION_DIR", value_name = "DIR")]
    registration_dir: Option<String>,
    /// The keeper's record of its mounts. It holds keys of runtimes, so it should be on a tmpfs
    #[arg(long, env = "FOREBAY_STATE_DIR", default_value = "/run/forebay-csi", value_name = "DIR")]
    state_dir: PathBuf,
    /// User of the FUSE daemons
    #[arg(long, env = "FOREBAY_DAEMON_UID", default_value_t = 10001, value_name = "UID")]
    daemon_uid: u32,
    /// Directory of their node cache, which is made theirs [default: they have none]
    #[arg(long, env = "FOREBAY_NODE_CACHE", value_name = "DIR")]
    node_cache: Option<PathBuf>,
    /// How long nobody may serve a mount before its readers get errors, in seconds
    #[arg(long, env = "FOREBAY_ABORT_AFTER", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86400), value_name = "SECONDS")]
    abort_after: u64,
    /// Where to answer /healthz, /readyz and /metrics
    #[arg(long, env = "FOREBAY_HTTP", value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Serve a Controller as well, whose volumes are Datasets that exist
    #[arg(long)]
    controller: bool,
    /// How to print logs
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "FOREBAY_LOG_FORMAT")]
    log_format: LogFormat,
}

/// Form of logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
}

fn endpoint(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text.strip_prefix("unix://").or(text.strip_prefix("unix:")).unwrap_or(text));
    if path.is_absolute() { Ok(path) } else { Err("must be unix:///PATH or an absolute path".to_owned()) }
}

impl Args {
    /// Serves until SIGTERM or SIGINT.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        init_logs(self.log_format);
        let options = self.options();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING)
            .thread_keep_alive(IDLE)
            .enable_all()
            .build()
            .context("starting the runtime")?;
        let ended = runtime.block_on(driver::run(options));
        runtime.shutdown_timeout(LAST);
        ended.map(|()| ExitCode::SUCCESS)
    }

    fn options(self) -> Options {
        let Self {
            node_id,
            kubelet_dir,
            plugin_dir,
            endpoint,
            registration_dir,
            state_dir,
            daemon_uid,
            node_cache,
            abort_after,
            http,
            controller,
            log_format: _,
        } = self;
        let plugin_dir = plugin_dir.unwrap_or_else(|| kubelet_dir.join("plugins").join(crate::identity::NAME));
        let registration_dir = match registration_dir {
            None => Some(kubelet_dir.join("plugins_registry")),
            Some(directory) if directory.is_empty() => None,
            Some(directory) => Some(PathBuf::from(directory)),
        };
        Options {
            node_id,
            endpoint: endpoint.unwrap_or_else(|| plugin_dir.join("csi.sock")),
            plugin_dir,
            registration_dir,
            state_dir,
            daemon_uid,
            node_cache,
            abort_after: Duration::from_secs(abort_after),
            http,
            controller,
        }
    }
}

fn init_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_env("FOREBAY_LOG").unwrap_or_else(|_| EnvFilter::new("warn,forebay=info"));
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

    fn parse(arguments: &[&str]) -> Options {
        Args::try_parse_from([&["forebay-csi", "--node-id=n"], arguments].concat()).unwrap().options()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn places_follow_the_kubelets_directory() {
        let options = parse(&["--kubelet-dir=/k"]);
        assert_eq!(options.endpoint, PathBuf::from("/k/plugins/csi.forebay.io/csi.sock"));
        assert_eq!(options.registration_dir, Some(PathBuf::from("/k/plugins_registry")));
        let options = parse(&["--endpoint=unix:///e/csi.sock", "--plugin-dir=/p", "--registration-dir="]);
        assert_eq!(options.endpoint, PathBuf::from("/e/csi.sock"));
        assert_eq!((options.plugin_dir, options.registration_dir), (PathBuf::from("/p"), None));
        for bad in ["--endpoint=tcp://h:1", "--endpoint=csi.sock", "--abort-after=0"] {
            assert!(Args::try_parse_from(["forebay-csi", "--node-id=n", bad]).is_err(), "{bad}");
        }
    }
}
