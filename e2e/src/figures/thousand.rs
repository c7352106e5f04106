//! The operator with 1,000 Datasets: objects only, their runtime's worker fits on no node.

use std::time::{Duration, Instant};

use super::{Row, print, scrape, value};
use crate::{
    Env,
    cluster::Cluster,
    kubectl::text,
    manifests::{dataset, runtime, secret, source},
    store::SECRET_KEY,
    wait::until,
};

const NAMESPACE: &str = "e2e-figures-thousand";
const DATASETS: usize = 1_000;
const OPERATOR: &str = "forebay-operator run";
/// How long nothing is done to see what the operator does then, after a while to come to rest.
const REST: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(60));

pub(super) fn measure(env: &Env, cluster: &Cluster) -> anyhow::Result<()> {
    env.kubectl.remove_namespace(NAMESPACE)?;
    env.kubectl.run(&["create", "namespace", NAMESPACE])?;
    print(observe(env, cluster)?);
    // In good time: each has a finalizer, a claim and a volume.
    env.kubectl.run(&["--namespace", NAMESPACE, "delete", "datasets", "--all", "--wait=false"])?;
    until("all Datasets are gone", 600, || Ok(env.kubectl.list(NAMESPACE, "datasets", "")?.is_empty()))?;
    env.kubectl.remove_namespace(NAMESPACE)
}

fn observe(env: &Env, cluster: &Cluster) -> anyhow::Result<Vec<Row>> {
    let ns = NAMESPACE;
    let nowhere = "  template: {spec: {nodeSelector: {forebay.io/no-such-pool: \"true\"}}}\n---";
    let one = |index| dataset(&format!("data-{index:04}"), "idle", &source("/", "none", &env.store.url));
    let all: String = (0..DATASETS).map(one).collect();
    env.kubectl.apply(ns, &(runtime("idle", 1, "1Gi").replace("---", nowhere) + &secret(SECRET_KEY)))?;

    let begin = Instant::now();
    env.kubectl.apply(ns, &all)?;
    let applied = begin.elapsed();
    until("all claims are bound", 600, || {
        let phases = env.kubectl.run(&["--namespace", ns, "get", "pvc", "-o", "jsonpath={.items[*].status.phase}"])?;
        Ok(phases.split(' ').filter(|phase| *phase == "Bound").count() == DATASETS)
    })?;
    let bound = begin.elapsed();

    // A new leader looks at every one of them.
    let before = operators(env)?;
    let deployment = "deployment/forebay-operator";
    let begin = Instant::now();
    env.kubectl.run(&["--namespace", &env.system, "rollout", "restart", deployment])?;
    until("the new leader has looked at all", 300, || {
        let new: Vec<String> = operators(env)?.into_iter().filter(|pod| !before.contains(pod)).collect();
        Ok(new.iter().any(|pod| reconciled(env, pod) >= DATASETS as u64))
    })?;
    let reconciled = begin.elapsed();
    env.kubectl.run(&["--namespace", &env.system, "rollout", "status", deployment, "--timeout=2m"])?;

    std::thread::sleep(REST.0);
    let mut processes = Vec::new();
    for (node, process) in cluster.everywhere(OPERATOR)? {
        processes.push((node, process, cluster.cpu_seconds(node, process)?));
    }
    std::thread::sleep(REST.1);
    let (mut cpu, mut resident) = (0.0_f64, 0);
    for (node, process, before) in processes {
        cpu = cpu.max(cluster.cpu_seconds(node, process)? - before);
        resident = resident.max(cluster.resident(node, process)?);
    }
    let rss = format!("{:.1} MiB", resident as f64 / 1048576.0);
    let at_rest = format!("{:.2} % of a core", cpu / REST.1.as_secs_f64() * 100.0);
    let (applied, bound) = (applied.as_secs_f64(), bound.as_secs_f64());
    let reconcile = format!(
        "{:.1} s from `rollout restart`, new pods and leader included; {bound:.0} s from the first `apply` to the last \
         claim bound, {applied:.0} s of it kubectl's",
        reconciled.as_secs_f64(),
    );
    Ok(vec![
        Row { what: "operator RSS with 1,000 Datasets".to_owned(), value: rss, goal: "< 64 MiB" },
        Row { what: "its CPU at rest (over 60 s)".to_owned(), value: at_rest, goal: "< 1 %" },
        Row { what: "time to reconcile them after a restart".to_owned(), value: reconcile, goal: "< 60 s" },
    ])
}

/// The operator's pods.
fn operators(env: &Env) -> anyhow::Result<Vec<String>> {
    let pods = env.kubectl.list(&env.system, "pods", "app.kubernetes.io/component=operator")?;
    Ok(pods.iter().map(|pod| text(&pod["metadata"]["name"])).collect())
}

/// Datasets that a pod has looked at; none when it does not answer yet.
fn reconciled(env: &Env, pod: &str) -> u64 {
    let metrics = scrape(env, pod, 8080).unwrap_or_default();
    value(&metrics, "forebay_operator_reconciliations_total{kind=\"Dataset\"}") as u64
}
