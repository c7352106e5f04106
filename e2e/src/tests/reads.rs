//! From `kubectl apply` to bytes in a pod.

use anyhow::ensure;

use crate::{Env, Outcome, TestResult, data, kubectl::text, manifests, runner::say, wait::eventually};

pub fn a_pod_reads_verified_bytes(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual(ns, &files, 1)?;
    env.reader(ns, "reader", None, &[])?;
    let seen = env.read_once(ns, "reader", &files)?;
    say!("{} files, {} bytes", seen.files, seen.bytes);
    let dataset = eventually("the Dataset counts its files", 40, || {
        let dataset = env.kubectl.get(ns, "dataset", "data")?;
        Ok((dataset["status"]["files"] == files.len()).then_some(dataset))
    })?;
    ensure!(dataset["status"]["bytes"] == data::bytes(&files), "status: {}", dataset["status"]);
    ensure!(dataset["status"]["phase"] == "Ready", "status: {}", dataset["status"]);
    read_ahead_is_set(env)?;
    Ok(Outcome::Passed)
}

/// The node plugin's pod reaches what says how far the kernel reads ahead.
fn read_ahead_is_set(env: &Env) -> anyhow::Result<()> {
    let plugins = env.kubectl.list(&env.system, "pods", "app.kubernetes.io/component=csi")?;
    for plugin in plugins {
        let log = env.kubectl.logs(&env.system, &text(&plugin["metadata"]["name"]))?;
        ensure!(!log.contains("read-ahead stays"), "{log}");
    }
    Ok(())
}

/// Two pods on two nodes: what the first read is read from workers by the second.
pub fn two_nodes_share_one_read_of_the_source(env: &Env, ns: &str) -> TestResult {
    let nodes = env.nodes()?;
    let [first, second, ..] = nodes.as_slice() else { return Ok(Outcome::Skipped("needs two nodes".to_owned())) };
    let files = data::usual();
    env.usual(ns, &files, 2)?;
    env.reader(ns, "first", Some(first), &[])?;
    env.read_once(ns, "first", &files)?;
    let Some(once) = env.store.reads(ns)? else {
        return Ok(Outcome::Skipped("the source is not counted: no log of the store".to_owned()));
    };
    env.reader(ns, "second", Some(second), &["--direct"])?;
    env.read_once(ns, "second", &files)?;
    let twice = env.store.reads(ns)?;
    say!("{once} requests for {} files, and no more for the second node", files.len());
    ensure!(once >= files.len() as u64, "the log counts {once} requests for {} files", files.len());
    ensure!(twice == Some(once), "the second node asked the source again: {once}, then {twice:?}");
    Ok(Outcome::Passed)
}

pub fn an_inline_volume_reads(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, 1)?;
    // A pod as the others, but for its volume.
    let command = ["python3", "/code/read.py", "/data"];
    let inline = "csi: {driver: csi.forebay.io, readOnly: true, volumeAttributes: {dataset: data}, \
                  nodePublishSecretRef: {name: cache-forebay}}";
    let pod =
        manifests::pod("inline", "data", None, &command).replace("persistentVolumeClaim: {claimName: data}", inline);
    ensure!(pod.contains("nodePublishSecretRef"));
    env.code(ns)?;
    env.kubectl.apply(ns, &pod)?;
    env.started(ns, "inline")?;
    env.read_once(ns, "inline", &files)?;
    Ok(Outcome::Passed)
}

/// A pod that knows where a worker is, and has no key, is told nothing.
pub fn a_stranger_gets_nothing(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, 1)?;
    env.reader(ns, "friend", None, &[])?;
    env.read_once(ns, "friend", &files)?;
    let worker = env.kubectl.get(ns, "pod", "cache-forebay-0")?;
    let address = text(&worker["status"]["podIP"]);
    // The same manifest from another namespace: the Dataset of this one is not to be had there, whatever secret is named.
    let script = format!(
        "import socket
for say in (b'', b'GET / HTTP/1.1\\r\\nHost: w\\r\\n\\r\\n', b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n', bytes(4096), b'\\xff' * 65536):
    s = socket.create_connection(('{address}', 7400), 10)
    s.settimeout(20)
    heard = 0
    try:
        s.sendall(say)
        while part := s.recv(65536):
            heard += len(part)
    except (ConnectionError, socket.timeout) as error:
        pass
    print(len(say), heard)
    assert heard < 256, heard
print('nothing')
"
    );
    let pod = format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: stranger}}
spec:
  restartPolicy: Never
  containers:
  - {{name: main, image: {}, command: [python3, -c, {}]}}
",
        manifests::TOOLS,
        serde_json::to_string(&script)?
    );
    env.kubectl.apply(ns, &pod)?;
    let phase = eventually("the stranger gives up", 150, || {
        let phase = text(&env.kubectl.get(ns, "pod", "stranger")?["status"]["phase"]);
        Ok(matches!(phase.as_str(), "Succeeded" | "Failed").then_some(phase))
    })?;
    let log = env.kubectl.logs(ns, "stranger")?;
    ensure!(phase == "Succeeded" && log.trim().ends_with("nothing"), "the stranger was told something: {log}");
    Ok(Outcome::Passed)
}
