//! What happens to whole nodes and to the API server; only on our own cluster.

use std::{thread::sleep, time::Duration};

use anyhow::ensure;

use crate::{
    Env, Outcome, TestResult, data,
    kubectl::text,
    readers::flawless,
    runner::say,
    wait::{eventually, until},
};

macro_rules! own {
    ($env:expr) => {
        match $env.own() {
            Ok(cluster) => cluster,
            Err(skipped) => return Ok(skipped),
        }
    };
}

/// Rounds of [`no_pod_is_unkillable`], half of each grace.
const ROUNDS: u32 = 20;
const SHORT_ROUNDS: u32 = 6;

/// The source changes while 16 readers hold files open and the pod is deleted: nothing of it stays on the node.
pub fn no_pod_is_unkillable(env: &Env, ns: &str) -> TestResult {
    let cluster = own!(env);
    let files = data::small(64, 4);
    env.usual_ready(ns, &files, 1)?;
    let rounds = if std::env::var_os("FOREBAY_LONG").is_some() { ROUNDS } else { SHORT_ROUNDS };
    for round in 0..rounds {
        let versions = (round + 2).to_string();
        env.reader(ns, "reader", Some("node1"), &["--loop", "--hold", "--versions", &versions])?;
        env.reads_on(ns, "reader", 100)?;
        let grace = if round % 2 == 0 { 0 } else { 30 };
        // The source changes before, while and after the pod is deleted.
        let (head, tail) = files.split_at(files.len() / 2);
        env.store.put(ns, head, round + 1)?;
        let grace_option = format!("--grace-period={grace}");
        let mut delete = vec!["--namespace", ns, "delete", "pod", "reader", "--wait=false", grace_option.as_str()];
        if grace == 0 {
            delete.push("--force");
        }
        env.kubectl.run(&delete)?;
        env.store.put(ns, tail, round + 1)?;
        until(&format!("the pod is gone from the API (round {round})"), grace + 30, || {
            Ok(env.kubectl.find(ns, "pod", "reader")?.is_none())
        })?;
        until(&format!("its processes are gone from the node (round {round})"), grace + 30, || {
            Ok(cluster.processes(1, "/code/read.py")?.is_empty())
        })?;
        until(&format!("its mounts are gone from the node (round {round})"), grace + 30, || {
            Ok(!cluster.mounts(1)?.lines().any(|line| line.contains("/pods/") && line.contains("fuse.forebay")))
        })?;
        let stuck = cluster.uninterruptible(1)?;
        ensure!(stuck.is_empty(), "processes in D state: {stuck:?}");
    }
    say!("{rounds} rounds");
    Ok(Outcome::Passed)
}

/// A node is powered off and on again: its pods come back and read.
pub fn a_node_loses_power(env: &Env, ns: &str) -> TestResult {
    let cluster = own!(env);
    let files = data::usual();
    env.usual_ready(ns, &files, 2)?;
    // A Deployment would do; a pod that is started again on its node shows more: its volume is staged anew.
    env.reader(ns, "there", Some("node2"), &["--loop"])?;
    env.reads_on(ns, "there", 100)?;
    env.kubectl.delete(ns, "pod", "there")?;
    let restarting =
        crate::manifests::pod("there", "data", Some("node2"), &["python3", "/code/read.py", "/data", "--loop"])
            .replace("restartPolicy: Never", "restartPolicy: Always");
    env.kubectl.apply(ns, &restarting)?;
    env.started(ns, "there")?;
    env.reads_on(ns, "there", 100)?;
    env.reader(ns, "here", Some("node1"), &["--loop", "--direct"])?;
    env.reads_on(ns, "here", 100)?;

    cluster.power_off(2)?;
    until("the node is known to be away", 60, || Ok(!env.node_is_ready("node2")?))?;
    let seen = env.reads_on(ns, "here", 200)?;
    say!("longest read meanwhile {:.1} s", seen.longest);
    cluster.power_on(2)?;
    until("the node is back", 120, || env.node_is_ready("node2"))?;
    let restarts = eventually("the pod runs again", 120, || {
        let status = env.kubectl.get(ns, "pod", "there")?["status"]["containerStatuses"][0].clone();
        Ok((status["ready"] == true && status["restartCount"].as_u64() > Some(0))
            .then(|| status["restartCount"].clone()))
    })?;
    env.reads_on(ns, "there", 100)?;
    say!("restarted {restarts} times");
    flawless("here", &env.seen(ns, "here")?)?;
    until("nothing is stuck", 90, || {
        let pods: serde_json::Value =
            serde_json::from_str(&env.kubectl.run(&["get", "pods", "--all-namespaces", "-o", "json"])?)?;
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        let stuck: Vec<String> = items
            .iter()
            .filter(|pod| !pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| text(&pod["metadata"]["name"]))
            .collect();
        ensure!(stuck.is_empty(), "terminating: {stuck:?}");
        Ok(true)
    })?;
    until("both workers are back", 90, || {
        Ok(env.kubectl.get(ns, "cacheruntime", "cache")?["status"]["readyReplicas"] == 2)
    })?;
    Ok(Outcome::Passed)
}

/// The API server is away for two minutes (half a minute in the short form), and a worker is restarted meanwhile.
pub fn the_api_server_is_away(env: &Env, ns: &str) -> TestResult {
    let cluster = own!(env);
    let files = data::usual();
    env.usual_ready(ns, &files, 1)?;
    env.reader(ns, "reader", Some("node1"), &["--loop", "--direct"])?;
    let before = env.reads_on(ns, "reader", 200)?;
    let worker = env.kubectl.get(ns, "pod", "cache-forebay-0")?;
    let node = if worker["spec"]["nodeName"] == "node2" { 2 } else { 1 };
    let away = if std::env::var_os("FOREBAY_LONG").is_some() { 120 } else { 30 };
    cluster.stop_api_server()?;
    let result = (|| -> anyhow::Result<()> {
        sleep(Duration::from_secs(away / 3));
        let workers = cluster.processes(node, "forebay worker")?;
        ensure!(!workers.is_empty(), "no worker on node {node}");
        for process in workers {
            cluster.kill(node, process)?;
        }
        sleep(Duration::from_secs(away - away / 3));
        Ok(())
    })();
    cluster.start_api_server()?;
    result?;
    let seen =
        eventually("the API server is back, and the reader can be asked", 90, || Ok(env.seen(ns, "reader").ok()))?;
    flawless("reader", &seen)?;
    say!("{} files read meanwhile, longest read {:.1} s", seen.files - before.files, seen.longest);
    ensure!(seen.files > before.files + 500, "reads did not go on: {} files", seen.files - before.files);
    // The kubelet tells what happened meanwhile in its own time.
    until("the worker's restart is in its status", 60, || {
        let worker = env.kubectl.get(ns, "pod", "cache-forebay-0")?;
        Ok(worker["status"]["containerStatuses"][0]["restartCount"] == 1)
    })?;
    env.reads_on(ns, "reader", 200)?;
    Ok(Outcome::Passed)
}
