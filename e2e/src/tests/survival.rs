//! Pods read while one part after another goes away: no error, no wrong byte.

use anyhow::ensure;

use crate::{
    Env, Outcome, TestResult, data,
    kubectl::text,
    readers::flawless,
    runner::say,
    wait::{eventually, until},
};

/// Readers past the kernel's page cache, one on each node, so that every read needs the daemon and the workers.
const READERS: [&str; 2] = ["r0", "r1"];
/// Files that each reads before and after what happens.
const SOME: u64 = 300;

/// Starts the readers, does something to the system, and sees them read on.
fn survive(env: &Env, ns: &str, workers: u32, harm: impl FnOnce() -> anyhow::Result<()>) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, workers)?;
    let nodes = env.nodes()?;
    for (index, reader) in READERS.iter().enumerate() {
        env.reader(ns, reader, Some(&nodes[index % nodes.len()]), &["--loop", "--direct"])?;
    }
    for reader in READERS {
        env.reads_on(ns, reader, SOME)?;
    }
    harm()?;
    for reader in READERS {
        let seen = env.reads_on(ns, reader, SOME)?;
        say!("{reader}: {} files, longest read {:.2} s", seen.files, seen.longest);
    }
    Ok(Outcome::Passed)
}

pub fn a_worker_pod_is_deleted(env: &Env, ns: &str) -> TestResult {
    survive(env, ns, 2, || {
        env.kubectl.run(&["--namespace", ns, "delete", "pod", "cache-forebay-0", "--grace-period=0", "--force"])?;
        until("the worker is back", 60, || {
            Ok(env.kubectl.get(ns, "cacheruntime", "cache")?["status"]["readyReplicas"] == 2)
        })
    })
}

/// kill -9 of the container's process that serves; the standby takes over.
pub fn the_daemon_is_killed(env: &Env, ns: &str) -> TestResult {
    let cluster = match env.own() {
        Ok(cluster) => cluster,
        Err(skipped) => return Ok(skipped),
    };
    survive(env, ns, 1, || {
        for node in 1..=cluster.nodes() {
            // All but the newest: one of the two serves, and both go, one after the other.
            let daemons = cluster.processes(node, "forebay fuse")?;
            ensure!(daemons.len() == 2, "node {node} has {} daemons", daemons.len());
            cluster.kill(node, daemons[0])?;
            std::thread::sleep(std::time::Duration::from_secs(3));
            cluster.kill(node, daemons[1])?;
        }
        Ok(())
    })
}

pub fn the_daemon_pod_is_deleted(env: &Env, ns: &str) -> TestResult {
    survive(env, ns, 1, || roll(env, "fuse"))
}

pub fn the_node_plugin_restarts(env: &Env, ns: &str) -> TestResult {
    survive(env, ns, 1, || {
        roll(env, "csi")?;
        // And once more without a warning, where we can.
        if let Some(cluster) = &env.cluster {
            for (node, process) in cluster.everywhere("forebay-csi")? {
                cluster.kill(node, process)?;
            }
        }
        Ok(())
    })?;
    // The restarted plugin serves new pods, and takes down what the old one mounted.
    let files = data::usual();
    env.reader(ns, "later", None, &[])?;
    env.read_once(ns, "later", &files)?;
    Ok(Outcome::Passed)
}

/// Deletes all pods of a DaemonSet of the chart, and waits until new ones are ready.
fn roll(env: &Env, component: &str) -> anyhow::Result<()> {
    let selector = format!("app.kubernetes.io/component={component}");
    let old = env.kubectl.list(&env.system, "pods", &selector)?;
    ensure!(!old.is_empty(), "no pods of {component}");
    env.kubectl.run(&["--namespace", &env.system, "delete", "pods", "--selector", &selector, "--timeout=60s"])?;
    let name = format!("daemonset/forebay-{component}");
    env.kubectl.run(&["--namespace", &env.system, "rollout", "status", &name, "--timeout=90s"])?;
    Ok(())
}

pub fn the_operator_is_deleted(env: &Env, ns: &str) -> TestResult {
    survive(env, ns, 1, || {
        let selector = "app.kubernetes.io/component=operator";
        env.kubectl.run(&["--namespace", &env.system, "delete", "pods", "--selector", selector, "--timeout=60s"])?;
        env.kubectl.run(&[
            "--namespace",
            &env.system,
            "rollout",
            "status",
            "deployment/forebay-operator",
            "--timeout=90s",
        ])?;
        // It leads again: an edit takes effect.
        env.kubectl.patch(ns, "cacheruntime", "cache", r#"{"spec": {"replicas": 2}}"#)?;
        until("the new operator scales", 90, || {
            Ok(env.kubectl.get(ns, "cacheruntime", "cache")?["status"]["readyReplicas"] == 2)
        })
    })
}

/// 2 -> 3 -> 2 workers. The new owner of a chunk fills from the old one: the source is not read again.
pub fn workers_scale_under_readers(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, 2)?;
    env.reader(ns, "warm", None, &[])?;
    env.read_once(ns, "warm", &files)?;
    let before = env.store.reads(ns)?;
    env.reader(ns, "reader", None, &["--loop", "--direct"])?;
    env.reads_on(ns, "reader", SOME)?;
    for replicas in [3, 2] {
        env.kubectl.run(&["--namespace", ns, "scale", "cacheruntime", "cache", &format!("--replicas={replicas}")])?;
        until(&format!("{replicas} workers are ready"), 90, || {
            let status = &env.kubectl.get(ns, "cacheruntime", "cache")?["status"];
            Ok(status["readyReplicas"] == replicas && status["replicas"] == replicas)
        })?;
        let members = eventually("the table follows", 20, || {
            let table = env.kubectl.get(ns, "cacheruntime", "cache")?["status"]["table"].clone();
            let members = table["members"].as_array().cloned().unwrap_or_default();
            Ok((members.len() == replicas).then_some(members))
        })?;
        ensure!(members.iter().all(|member| text(&member["address"]).ends_with(":7400")), "{members:?}");
        env.reads_on(ns, "reader", 2 * files.len() as u64)?;
        if let (Some(before), Some(after)) = (before, env.store.reads(ns)?) {
            say!("{replicas} workers: {} requests to the source for {} files", after - before, files.len());
            ensure!(after - before <= files.len() as u64 / 10, "the new owners filled from the source");
        }
    }
    flawless("reader", &env.seen(ns, "reader")?)?;
    Ok(Outcome::Passed)
}
