//! What docs/benchmarks.md reports of a cluster: `PROFILE=release e2e/run.sh --figures`. It prints a table and judges
//! nothing.

mod thousand;
mod warm;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{
    Env, data,
    kubectl::text,
    manifests::{self, dataset, runtime, secret, source},
    store::SECRET_KEY,
    wait::{eventually, until},
};

/// Times that a pod is started for a median.
const PODS: usize = 7;
/// The namespace of the measurements.
const NAMESPACE: &str = "e2e-figures";

struct Row {
    what: String,
    value: String,
    goal: &'static str,
}

/// Measures the groups `basic`, `warm` and `thousand`, or those that are named, and prints the table.
pub fn run(env: &Env, words: &[String]) -> anyhow::Result<ExitCode> {
    let wanted = |group: &str| words.is_empty() || words.iter().any(|word| group == word);
    println!("| what | measured | goal |\n|---|---|---|");
    if wanted("basic") {
        env.kubectl.remove_namespace(NAMESPACE)?;
        env.kubectl.run(&["create", "namespace", NAMESPACE])?;
        let rows = measure(env);
        env.kubectl.remove_namespace(NAMESPACE)?;
        print(rows?);
    }
    if let Some(cluster) = &env.cluster {
        if wanted("warm") {
            print(warm::measure(env, cluster)?);
        }
        if wanted("thousand") {
            thousand::measure(env, cluster)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// At once: what comes later may fail.
fn print(rows: Vec<Row>) {
    for Row { what, value, goal } in rows {
        println!("| {what} | {value} | {goal} |");
    }
}

fn measure(env: &Env) -> anyhow::Result<Vec<Row>> {
    let ns = NAMESPACE;
    let files = data::usual();
    env.store.fill(ns, &files)?;
    let mut rows = Vec::new();

    let begin = Instant::now();
    env.kubectl.apply(ns, &runtime("cache", 2, "1Gi"))?;
    env.kubectl.ready(ns, "cacheruntime/cache", 90)?;
    rows.push(row("CacheRuntime applied -> 2 workers Ready", begin.elapsed(), "< 10 s"));

    let begin = Instant::now();
    env.kubectl.apply(ns, &(secret(SECRET_KEY) + &dataset("data", "cache", &source("/", ns, &env.store.url))))?;
    until("the claim is bound", 60, || {
        Ok(env.kubectl.find(ns, "pvc", "data")?.is_some_and(|claim| claim["status"]["phase"] == "Bound"))
    })?;
    rows.push(row("Dataset applied -> PVC bound", begin.elapsed(), "< 3 s"));
    env.kubectl.ready(ns, "dataset/data", 90)?;

    env.reader(ns, "warm", Some("node1"), &[])?;
    env.read_once(ns, "warm", &files)?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for index in 0..PODS {
        // In turns, so that noise of the machine meets both.
        with.push(first_byte(env, &format!("with-{index}"), true)?);
        without.push(first_byte(env, &format!("without-{index}"), false)?);
    }
    let (with, without) = (median(with), median(without));
    let value = format!("{:.2} s against {:.2} s with an emptyDir", with.as_secs_f64(), without.as_secs_f64());
    rows.push(Row { what: "pod created -> first byte read (median of 7)".to_owned(), value, goal: "<= +1 s" });

    rows.push(Row {
        what: "NodeStageVolume + NodePublishVolume, mean on node1".to_owned(),
        value: format!("{:.0} ms", node_calls(env, "node1")?.as_secs_f64() * 1e3),
        goal: "< 50 ms",
    });
    if let Some(cluster) = &env.cluster {
        for (what, goal, process) in [
            ("node plugin RSS", "< 32 MiB", "forebay-csi"),
            ("operator RSS", "< 64 MiB", "forebay-operator run"),
            ("FUSE daemon RSS", "reported", "forebay fuse"),
            ("worker RSS", "reported", "forebay worker"),
        ] {
            let mut bytes = Vec::new();
            for (node, process) in cluster.everywhere(process)? {
                bytes.push(cluster.resident(node, process)?);
            }
            let largest = bytes.iter().max().context("no such process")?;
            rows.push(Row { what: what.to_owned(), value: format!("{:.1} MiB", *largest as f64 / 1048576.0), goal });
        }
    }
    Ok(rows)
}

fn row(what: &str, took: Duration, goal: &'static str) -> Row {
    Row { what: what.to_owned(), value: format!("{:.2} s", took.as_secs_f64()), goal }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// From the creation of a pod to the first byte that it has read.
fn first_byte(env: &Env, name: &str, volume: bool) -> anyhow::Result<Duration> {
    let ns = NAMESPACE;
    let path = if volume { format!("/data{}", data::usual()[0].path) } else { "/code/read.py".to_owned() };
    let script = format!("open('{path}', 'rb').read(1); print('read', flush=True); import time; time.sleep(60)");
    let mut pod = manifests::pod(name, "data", Some("node1"), &["python3", "-c", &script]);
    if !volume {
        pod = pod.replace("persistentVolumeClaim: {claimName: data}", "emptyDir: {}");
    }
    let begin = Instant::now();
    env.kubectl.apply(ns, &pod)?;
    let took = eventually("the first byte", 60, || {
        let phase = text(&env.kubectl.get(ns, "pod", name)?["status"]["phase"]);
        Ok((phase == "Running" && env.kubectl.logs(ns, name)?.contains("read")).then(|| begin.elapsed()))
    })?;
    env.kubectl.run(&["--namespace", ns, "delete", "pod", name, "--grace-period=1"])?;
    Ok(took)
}

/// The mean time that the node plugin of a node takes to stage a volume and to publish it.
fn node_calls(env: &Env, node: &str) -> anyhow::Result<Duration> {
    let plugins = env.kubectl.list(&env.system, "pods", "app.kubernetes.io/component=csi")?;
    let here = plugins.iter().find(|pod| pod["spec"]["nodeName"] == node).context("no node plugin there")?;
    let metrics = scrape(env, &text(&here["metadata"]["name"]), 7402)?;
    let mean = |method: &str| {
        let of =
            |part: &str| value(&metrics, &format!("forebay_csi_call_duration_seconds_{part}{{method=\"{method}\"}}"));
        of("sum") / of("count")
    };
    Ok(Duration::from_secs_f64(mean("NodeStageVolume") + mean("NodePublishVolume")))
}

/// The metrics of a pod of the chart.
pub(crate) fn scrape(env: &Env, pod: &str, port: u16) -> anyhow::Result<String> {
    let path = format!("/api/v1/namespaces/{}/pods/{pod}:{port}/proxy/metrics", env.system);
    env.kubectl.run(&["get", "--raw", &path])
}

/// The sum of the values of some lines of a metrics text.
pub(crate) fn sum(metrics: &str, wanted: impl Fn(&str) -> bool) -> f64 {
    let values =
        metrics.lines().filter(|line| wanted(line)).filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    values.sum()
}

/// A value of a metrics text; 0 when it is not there.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}
