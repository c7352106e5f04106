//! Warm reads in a pod against the same reads under `forebay up` on the same machine, in turns.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::Row;
use crate::{
    Env,
    cluster::Cluster,
    data::{self, File},
    kubectl::text,
    manifests, readers,
    store::SECRET_KEY,
    wait::until,
};

/// The namespace; buckets begin with it.
const NAMESPACE: &str = "e2e-figures-warm";
/// Times that each reads everything.
const ROUNDS: usize = 5;
/// Times that each reads everything before, at most: until what is to be kept on the node is there.
const WARMING: usize = 20;
/// For both node caches.
const NODE_CACHE: &str = "4Gi";
/// What reader, daemon and worker ask for each: under `forebay up` they share the CPUs as equals.
const CPU: &str = "300m";

/// A Dataset that is read.
struct Set {
    /// Of the Dataset and of the pod.
    name: &'static str,
    shape: &'static str,
    what: &'static str,
    /// Times that everything is read in one measurement, so that it takes a while.
    passes: u32,
    files: fn() -> Vec<File>,
}

const SETS: [Set; 2] = [
    Set {
        name: "large",
        shape: "Large",
        what: "1 GiB in sequence",
        passes: 10,
        files: || vec![File::new("/large", "one", 1 << 30)],
    },
    Set {
        name: "small",
        shape: "Small",
        what: "20,000 files of 10 to 60 KB",
        passes: 1,
        files: || data::small(20_000, 200),
    },
];

/// What `pods/time.py` prints.
#[derive(Deserialize)]
struct Pass {
    seconds: f64,
    bytes: u64,
}

pub(super) fn measure(env: &Env, cluster: &Cluster) -> anyhow::Result<Vec<Row>> {
    env.kubectl.remove_namespace(NAMESPACE)?;
    env.kubectl.run(&["create", "namespace", NAMESPACE])?;
    let mut rows = Vec::new();
    for node_cache in [false, true] {
        let capacity = if node_cache { NODE_CACHE } else { "0" };
        let (cpu, cache) =
            (format!("fuse.resources.requests.cpu={CPU}"), format!("fuse.nodeCache.capacity={capacity}"));
        cluster.install(&env.root, &[&cpu, &cache])?;
        let more = compare(env, cluster, node_cache);
        cluster.install(&env.root, &[])?;
        rows.append(&mut more?);
    }
    env.kubectl.remove_namespace(NAMESPACE)?;
    Ok(rows)
}

/// With a node cache in both, or in neither.
fn compare(env: &Env, cluster: &Cluster, node_cache: bool) -> anyhow::Result<Vec<Row>> {
    let ns = NAMESPACE;
    let asks = format!("resources: {{requests: {{cpu: {CPU}}}}}");
    let template = format!("  template: {{spec: {{{asks}}}}}\n  tiers:");
    let runtime = manifests::runtime("cache", 1, "4Gi").replace("  tiers:", &template);
    let mut manifests = runtime + &manifests::secret(SECRET_KEY);
    for set in &SETS {
        let bucket = format!("{ns}-{}", set.name);
        env.store.fill(&bucket, &(set.files)())?;
        let source = manifests::source("/", &bucket, &env.store.url);
        let shape = format!("volume: {{shape: {}}}\n  sources:", set.shape);
        manifests += &manifests::dataset(set.name, "cache", &source).replace("sources:", &shape);
    }
    env.kubectl.apply(ns, &manifests)?;
    for set in &SETS {
        env.kubectl.ready(ns, &format!("dataset/{}", set.name), 90)?;
    }
    let worker = env.kubectl.get(ns, "pod", "cache-forebay-0")?;
    let node = text(&worker["spec"]["nodeName"]);
    env.code(ns)?;
    for set in &SETS {
        let pod = manifests::pod(set.name, set.name, Some(&node), &readers::IDLE);
        env.kubectl.apply(ns, &pod.replace("    volumeMounts:", &format!("    {asks}\n    volumeMounts:")))?;
        env.started(ns, set.name)?;
    }
    let up = Up::start(&manifests, if node_cache { NODE_CACHE } else { "0" })?;
    let kept_in_pods = || {
        let node = node.trim_start_matches("node").parse()?;
        bytes_below(&cluster.on(node, &["du", "-s", "--block-size=1", "/var/lib/forebay/node-cache"])?)
    };

    let script = env.root.join("e2e/pods/time.py");
    let mut rows = Vec::new();
    let mut expected = 0;
    for set in &SETS {
        let bytes = data::bytes(&(set.files)());
        let (passes, read) = (set.passes.to_string(), bytes * u64::from(set.passes));
        let in_pod =
            || seconds(&env.kubectl.exec(ns, set.name, &["python3", "/code/time.py", "/data", &passes])?, read);
        let at_host = || {
            let output = Command::new("python3").arg(&script).arg(up.data(set.name)).arg(&passes).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            seconds(&String::from_utf8_lossy(&output.stdout), read)
        };
        expected += bytes;
        for pass in 0.. {
            in_pod()?;
            at_host()?;
            if !node_cache || kept_in_pods()? >= expected && up.kept()? >= expected {
                break;
            }
            ensure!(pass < WARMING, "the node caches do not fill: {} and {} bytes", kept_in_pods()?, up.kept()?);
        }
        let mut ratios = Vec::new();
        for round in 0..ROUNDS {
            // Neither always comes first.
            let (pod, host) = if round % 2 == 0 {
                let pod = in_pod()?;
                (pod, at_host()?)
            } else {
                let host = at_host()?;
                (in_pod()?, host)
            };
            ratios.push((host / pod, pod));
        }
        rows.push(row(set, node_cache, ratios));
    }
    for set in &SETS {
        env.kubectl.run(&["--namespace", ns, "delete", "pod", set.name])?;
    }
    Ok(rows)
}

fn row(set: &Set, node_cache: bool, mut ratios: Vec<(f64, f64)>) -> Row {
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (least, (ratio, seconds), most) = (ratios[0].0, ratios[ROUNDS / 2], ratios[ROUNDS - 1].0);
    let from = if node_cache { "from the node cache" } else { "without a node cache" };
    Row {
        what: format!("warm {from}, {}: speed in a pod / under `forebay up`", set.what),
        value: format!("{ratio:.2} ({least:.2} to {most:.2}; {seconds:.2} s in the pod)"),
        goal: ">= 0.95",
    }
}

fn seconds(printed: &str, expected: u64) -> anyhow::Result<f64> {
    let pass: Pass = serde_json::from_str(printed).with_context(|| printed.to_owned())?;
    ensure!(pass.bytes == expected, "read {} bytes of {expected}", pass.bytes);
    Ok(pass.seconds)
}

/// What `du` printed.
fn bytes_below(printed: &str) -> anyhow::Result<u64> {
    printed.split_whitespace().next().and_then(|bytes| bytes.parse().ok()).with_context(|| printed.to_owned())
}

/// `forebay up` of the same manifests.
struct Up {
    process: Child,
    directory: PathBuf,
}

impl Up {
    fn start(manifests: &str, node_cache: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.with_file_name("forebay");
        // Where an unprivileged user reaches it.
        let directory = std::env::temp_dir().join("forebay-e2e-figures");
        // Of a run that was killed.
        let _ = fs::remove_dir_all(directory.join("state"));
        fs::create_dir_all(directory.join("mnt"))?;
        let file = directory.join("up.yaml");
        fs::write(&file, manifests.trim_end().trim_end_matches("---"))?;
        let log = fs::File::create(directory.join("up.log"))?;
        let process = Command::new(program)
            .args(["up", "-f"])
            .arg(&file)
            .arg("--mount")
            .arg(directory.join("mnt"))
            .arg("--state-dir")
            .arg(directory.join("state"))
            .args(["--node-cache", node_cache])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("forebay up")?;
        let up = Self { process, directory };
        for set in &SETS {
            until("forebay up serves", 60, || Ok(fs::read_dir(up.data(set.name))?.next().is_some()))?;
        }
        Ok(up)
    }

    fn data(&self, dataset: &str) -> PathBuf {
        self.directory.join("mnt").join(dataset)
    }

    /// Bytes in its node cache.
    fn kept(&self) -> anyhow::Result<u64> {
        let output =
            Command::new("du").args(["-s", "--block-size=1"]).arg(self.directory.join("state/node-cache")).output()?;
        bytes_below(&String::from_utf8_lossy(&output.stdout))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let stopped = Command::new("kill").arg(self.process.id().to_string()).status();
        if stopped.is_ok_and(|status| status.success()) {
            let _ = self.process.wait();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}
