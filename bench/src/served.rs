//! A Dataset that `forebay up` serves, and passes over it with what they cost.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use forebay_test_instance::Instance;
use forebay_test_store::TestStore;
use tokio::time::{Instant, sleep};

use crate::{
    Bench,
    job::{self, Done, Work},
    measure::{self, Process, Role},
};

/// The bucket of sources that are in a store.
pub const BUCKET: &str = "bench";
/// The directory of sources that are files.
const SOURCE: &str = "source";
/// The Dataset.
const NAME: &str = "data";
/// The resource definition of Datasets: shapes are asked for when it knows them.
const DEFINITION: &str = include_str!("../../crds/datasets.forebay.io.yaml");
/// Counters of a mount are carried over this often (50 ms); a little longer.
const COUNTED: Duration = Duration::from_millis(150);
/// How long a Dataset may take until its files are counted.
const SCANNED: Duration = Duration::from_secs(60);
/// How long a file may take until it is in the node cache.
const KEPT: Duration = Duration::from_secs(120);

/// What is served, and how.
pub struct Setup<'a> {
    /// The store; none: the files of [`source`].
    pub store: Option<&'a TestStore>,
    /// Workers.
    pub workers: u32,
    /// Bytes that they may hold.
    pub capacity: u64,
    /// Memory of the mount, in MiB.
    pub memory: u64,
    /// What the mount is made for: `Small`, `Large` or `Auto`.
    pub shape: &'static str,
    /// Whether files are kept on this node.
    pub node_cache: bool,
    /// Requests in a second that each worker may send to the source.
    pub requests_per_second: Option<u32>,
    /// GET requests in a second that the source may get from all workers.
    pub gets_per_second: Option<u32>,
    /// Eviction policy, and quota in bytes.
    pub cache: Option<(&'static str, u64)>,
    /// How soon changes are to be seen, in seconds.
    pub sync: Option<u64>,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self {
            store: None,
            workers: 2,
            capacity: 64 << 30,
            memory: 128,
            shape: "Auto",
            node_cache: true,
            requests_per_second: None,
            gets_per_second: None,
            cache: None,
            sync: None,
        }
    }
}

/// Where the files of a Dataset that is not in a store are: the local files that a mount is compared with.
pub fn source(dir: &Path) -> anyhow::Result<PathBuf> {
    let source = dir.join(SOURCE);
    std::fs::create_dir_all(&source)?;
    Ok(source)
}

/// A running instance with one Dataset.
pub struct Served {
    instance: Instance,
    program: PathBuf,
    dir: PathBuf,
    arguments: Vec<String>,
}

/// A pass over files: what readers did, and what it cost the others.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// The readers together; the time of the slowest.
    pub done: Done,
    /// CPU of the instance's processes, in seconds.
    pub cpu: HashMap<Role, f64>,
    /// Requests that reached a daemon.
    pub requests: u64,
    /// The processes afterwards.
    pub processes: Vec<Process>,
}

impl Pass {
    /// CPU of everybody, in seconds.
    pub fn total(&self) -> f64 {
        self.done.cpu + self.cpu.values().sum::<f64>()
    }

    /// CPU of one part of the instance.
    pub fn of(&self, role: Role) -> f64 {
        self.cpu.get(&role).copied().unwrap_or_default()
    }
}

/// A pass over local files.
pub async fn direct(works: Vec<Work>, cpu: Option<usize>) -> anyhow::Result<Pass> {
    Ok(Pass { done: together(works, cpu).await?, ..Pass::default() })
}

/// Runs all at the same time.
async fn together(works: Vec<Work>, cpu: Option<usize>) -> anyhow::Result<Done> {
    let mut running = Vec::new();
    for work in works {
        running.push(job::start(work, cpu).await?);
    }
    let mut all = Done::default();
    for reader in running {
        let done = reader.done().await?;
        all.bytes += done.bytes;
        all.files += done.files;
        all.seconds = all.seconds.max(done.seconds);
        all.cpu += done.cpu;
    }
    Ok(all)
}

impl Served {
    /// Starts an instance in `dir`.
    pub async fn start(bench: &Bench, dir: &Path, setup: Setup<'_>) -> anyhow::Result<Self> {
        std::fs::write(dir.join("data.yaml"), manifest(dir, &setup)?)?;
        let mut arguments = vec!["--memory".to_owned(), setup.memory.to_string()];
        if !setup.node_cache {
            arguments.extend(["--node-cache", "0"].map(str::to_owned));
        }
        if let Some(limit) = setup.requests_per_second {
            arguments.extend(["--source-requests-per-second".to_owned(), limit.to_string()]);
        }
        let instance = start(&bench.forebay, dir, &arguments).await?;
        Ok(Self { instance, program: bench.forebay.clone(), dir: dir.to_owned(), arguments })
    }

    /// Stops it and starts it again: workers keep what they hold, the mount is a new one, the node cache is empty.
    pub async fn restart(self) -> anyhow::Result<Self> {
        let Self { instance, program, dir, arguments } = self;
        let node_cache = instance.state().join("node-cache");
        instance.stop().await?;
        std::fs::remove_dir_all(&node_cache).with_context(|| format!("removing {}", node_cache.display()))?;
        let instance = start(&program, &dir, &arguments).await?;
        Ok(Self { instance, program, dir, arguments })
    }

    /// Stops it; nothing may be left of it.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.instance.stop().await
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.instance.mount
    }

    /// Its state directory.
    pub fn state(&self) -> &Path {
        self.instance.state()
    }

    /// Its processes.
    pub fn processes(&self) -> anyhow::Result<Vec<Process>> {
        Ok(measure::tree(self.instance.pid()?))
    }

    /// Has the workers fetch everything, and count the files, so that nothing goes on in the background.
    pub async fn load(&self) -> anyhow::Result<()> {
        self.load_below("/").await.map(drop)
    }

    /// The same for what is below a path; the seconds that the command took.
    pub async fn load_below(&self, path: &str) -> anyhow::Result<f64> {
        let began = Instant::now();
        self.instance.command(&["load", NAME, path]).await?;
        let seconds = began.elapsed().as_secs_f64();
        self.scanned().await?;
        Ok(seconds)
    }

    /// Has the source listed again; ends when that is done.
    pub async fn refresh(&self) -> anyhow::Result<()> {
        self.instance.command(&["refresh", NAME]).await.map(drop)
    }

    /// Waits until the workers have counted the files, and until everything is on disk that can be.
    pub async fn scanned(&self) -> anyhow::Result<()> {
        self.counted().await?;
        measure::settle().await
    }

    /// Waits until the workers have counted the files.
    pub async fn counted(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + SCANNED;
        loop {
            let status = self.instance.status().await?;
            if status["datasets"][0]["scan"]["state"] == "Complete" {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the files were not counted: {}", status["datasets"][0]["scan"]);
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until so many files, which were read, are complete in the node cache.
    pub async fn kept(&self, files: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + KEPT;
        while self.instance.kept()? < files {
            ensure!(Instant::now() < deadline, "not in the node cache within {KEPT:?}");
            sleep(Duration::from_millis(100)).await;
        }
        measure::settle().await
    }

    /// A pass through the mount, by as many readers as there are works. With `cpu` readers and servers share it.
    pub async fn pass(&self, works: Vec<Work>, cpu: Option<usize>) -> anyhow::Result<Pass> {
        let requests = self.requests().await?;
        let before = self.processes()?;
        measure::pin(&before, cpu)?;
        let done = together(works, cpu).await?;
        let processes = self.processes()?;
        let cpu = measure::cpu_between(&before, &processes);
        sleep(COUNTED).await;
        Ok(Pass { done, cpu, requests: self.requests().await? - requests, processes })
    }

    /// Bytes that the workers had, and that they had not, of those that were read so far.
    pub async fn answered(&self) -> anyhow::Result<(u64, u64)> {
        let status = self.instance.status().await?;
        let bytes =
            |field: &str| status["datasets"][0][field].as_u64().with_context(|| format!("no {field} in the status"));
        Ok((bytes("hitBytes")?, bytes("missBytes")?))
    }

    /// Requests that reached a daemon so far; the mount's counters survive its daemon.
    async fn requests(&self) -> anyhow::Result<u64> {
        let status = self.instance.status().await?;
        status["mounts"][0]["requests"].as_u64().context("forebay status counts no requests")
    }
}

async fn start(program: &Path, dir: &Path, arguments: &[String]) -> anyhow::Result<Instance> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Instance::start(program, &dir.join("data.yaml"), dir, &arguments).await
}

fn manifest(dir: &Path, setup: &Setup<'_>) -> anyhow::Result<String> {
    let (keys, source) = match setup.store {
        Some(store) => (
            format!(
                "---
apiVersion: v1
kind: Secret
metadata: {{name: keys}}
stringData: {{accessKeyId: {}, secretAccessKey: {}}}
",
                store.access_key(),
                store.secret_key()
            ),
            format!(
                "uri: s3://{BUCKET}/, secretRef: {{name: keys}}, \
                 s3: {{endpoint: \"{}\", region: us-east-1, addressing: Path}}",
                store.endpoint()
            ),
        ),
        None => (String::new(), format!("uri: \"file://{}\"", source(dir)?.display())),
    };
    let Setup { workers, capacity, shape, .. } = setup;
    let budget =
        setup.gets_per_second.map_or_else(String::new, |gets| format!(", requestBudget: {{getPerSecond: {gets}}}"));
    let cache =
        setup.cache.map_or_else(String::new, |(policy, quota)| format!("cache: {{policy: {policy}, quota: {quota}}}"));
    let sync = setup.sync.map_or_else(String::new, |seconds| format!("sync: {{mode: Periodic, interval: {seconds}s}}"));
    let volume = if DEFINITION.contains(" shape:\n") { format!("volume: {{shape: {shape}}}") } else { String::new() };
    Ok(format!(
        "apiVersion: forebay.io/v1alpha1
kind: CacheRuntime
metadata: {{name: runtime}}
spec:
  replicas: {workers}
  tiers:
  - {{name: disk, medium: SSD, capacity: {capacity}, volume: {{emptyDir: {{}}}}}}
{keys}---
apiVersion: forebay.io/v1alpha1
kind: Dataset
metadata: {{name: {NAME}}}
spec:
  runtimeRef: {{name: runtime}}
  sources: [{{path: /, {source}{budget}}}]
  {volume}
  {cache}
  {sync}
"
    ))
}
