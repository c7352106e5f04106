//! The agent itself: whenever something changes, and from time to time, the files are brought up to date.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use forebay_api::Dataset;
use forebay_cache_worker::TableFile;
use kube::Client;
use rand::RngExt as _;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{DATASETS, TABLE, files::Replaced, plan, secrets::Secrets, watch::Watched};

/// Changes come in bursts; what comes within this time is one change.
const SETTLE: Duration = Duration::from_millis(50);
/// How often Secrets are read again: nobody tells when they change.
const LOOK: Duration = Duration::from_secs(15);
/// The same while credentials are missing or refused.
const LOOK_SOON: Duration = Duration::from_secs(3);
/// Secrets that one worker asks for in a second, at most, in the long run.
const SECRETS_PER_SECOND: f64 = 10.0;

/// What the agent is told.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of its CacheRuntime.
    pub runtime: String,
    /// Where the files go.
    pub state_dir: PathBuf,
}

/// Keeps the files up to date for as long as it is polled. An error: the API server's address or the pod's token is not to
/// be had, or the files cannot be written.
pub async fn run(options: AgentOptions) -> anyhow::Result<()> {
    run_with(Client::try_default().await.context("no way to the API server is known")?, options).await
}

/// The same with a client that somebody else made.
pub async fn run_with(client: Client, options: AgentOptions) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    let watched = Watched::start(&client, &options.namespace, &options.runtime, &mut tasks);
    let mut agent = Agent {
        secrets: Secrets::new(client, &options.namespace),
        table: Replaced::new(options.state_dir.join(TABLE)),
        datasets: Replaced::new(options.state_dir.join(DATASETS)),
        asked: None,
        watched,
        options,
    };
    agent.watched.ready().await?;
    let mut look = LOOK;
    loop {
        look = agent.update(look).await?;
        let changed = agent.watched.changed.clone();
        if timeout(look, changed.notified()).await.is_ok() {
            sleep(SETTLE).await;
        }
    }
}

struct Agent {
    options: AgentOptions,
    watched: Watched,
    secrets: Secrets,
    /// When all Secrets were asked for.
    asked: Option<Instant>,
    table: Replaced,
    datasets: Replaced,
}

impl Agent {
    /// Brings the files up to date; gives when to look again. Secrets that are known are asked for again after `look`.
    async fn update(&mut self, look: Duration) -> anyhow::Result<Duration> {
        let runtime = self.watched.runtimes.state().first().cloned();
        if let Some(table) = runtime.as_ref().and_then(|runtime| plan::table(runtime)) {
            self.write_table(&table)?;
        }
        let datasets: Vec<Arc<Dataset>> = self
            .watched
            .datasets
            .state_filter(|dataset| dataset.spec.runtime_ref.name == self.options.runtime && plan::is_served(dataset));
        let datasets = || datasets.iter().map(Arc::as_ref);
        let names = plan::secrets(datasets());
        if !self.secrets.has_all(&names) || self.asked.is_none_or(|asked| asked.elapsed() >= look) {
            if !self.secrets.refresh(&names).await {
                return Ok(LOOK_SOON);
            }
            self.asked = Some(Instant::now());
        }
        // Without its runtime a worker is about to end; until then it goes on as it was.
        if let Some(runtime) = runtime {
            let file = plan::datasets(datasets(), &self.secrets.known, runtime.spec.replicas);
            if self.datasets.write(&file)? {
                info!(datasets = file.datasets.len(), "the datasets changed");
            }
        }
        let lacking = self.secrets.are_lacking() || datasets().any(plan::complains_of_credentials);
        let least = Duration::from_secs_f64(names.len() as f64 / SECRETS_PER_SECOND);
        let look = if lacking { LOOK_SOON } else { LOOK }.max(least);
        // Spread out, or all workers would ask at once.
        Ok(look.mul_f64(rand::rng().random_range(0.8..1.2)))
    }

    /// A table of the same runtime replaces one of a lower epoch only: a watch may begin with an old answer.
    fn write_table(&mut self, table: &TableFile) -> anyhow::Result<()> {
        let known: Option<TableFile> = self.table.read();
        if known.is_some_and(|known| known.runtime_uid == table.runtime_uid && known.epoch > table.epoch) {
            warn!(epoch = table.epoch, "the API server gave an old table");
            return Ok(());
        }
        if self.table.write(table)? {
            info!(epoch = table.epoch, members = table.members.len(), "the table changed");
        }
        Ok(())
    }
}
