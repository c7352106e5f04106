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
    data::{self, File},
    kubectl::text,
    manifests,
    wait::until,
};

/// The namespace, and the bucket.
const NAMESPACE: &str = "e2e-figures-warm";
const SMALL: usize = 20_000;
const LARGE: usize = 1 << 30;
/// Times that each reads everything.
const ROUNDS: usize = 5;

/// What `pods/time.py` prints.
#[derive(Deserialize)]
struct Seconds {
    sequential: f64,
    small: f64,
    /// Of the large file, and of the others.
    bytes: [u64; 2],
}

pub(super) fn measure(env: &Env) -> anyhow::Result<Vec<Row>> {
    env.kubectl.remove_namespace(NAMESPACE)?;
    env.kubectl.run(&["create", "namespace", NAMESPACE])?;
    let rows = compare(env);
    env.kubectl.remove_namespace(NAMESPACE)?;
    rows
}

fn compare(env: &Env) -> anyhow::Result<Vec<Row>> {
    let ns = NAMESPACE;
    let mut files = data::small(SMALL, 200);
    files.push(File::new("/large", "one", LARGE));
    let expected = [LARGE as u64, data::bytes(&files) - LARGE as u64];
    env.store.fill(ns, &files)?;
    let manifests = manifests::usual(&env.store, ns, 1).replace("1Gi", "4Gi");
    env.kubectl.apply(ns, &manifests)?;
    env.kubectl.ready(ns, "dataset/data", 90)?;
    let worker = env.kubectl.get(ns, "pod", "cache-forebay-0")?;
    env.idle(ns, "timer", Some(&text(&worker["spec"]["nodeName"])))?;
    let up = Up::start(&manifests)?;

    let script = env.root.join("e2e/pods/time.py");
    let in_pod = || seconds(&env.kubectl.exec(ns, "timer", &["python3", "/code/time.py", "/data"])?, expected);
    let at_host = || {
        let output = Command::new("python3").arg(&script).arg(up.data()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        seconds(&String::from_utf8_lossy(&output.stdout), expected)
    };
    // Cold.
    in_pod()?;
    at_host()?;
    let (mut sequential, mut small) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (pod, host) = (in_pod()?, at_host()?);
        sequential.push((host.sequential / pod.sequential, pod.sequential));
        small.push((host.small / pod.small, pod.small));
    }
    let row = |what, mut ratios: Vec<(f64, f64)>| {
        ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (least, (ratio, seconds), most) = (ratios[0].0, ratios[ROUNDS / 2], ratios[ROUNDS - 1].0);
        Row { what, value: format!("{ratio:.2} ({least:.2} to {most:.2}; {seconds:.2} s in the pod)"), goal: ">= 0.95" }
    };
    Ok(vec![
        row("warm, 1 GiB in sequence: speed in a pod / under `forebay up`", sequential),
        row("warm, 20,000 files of 10 to 60 KB: the same", small),
    ])
}

fn seconds(printed: &str, expected: [u64; 2]) -> anyhow::Result<Seconds> {
    let seconds: Seconds = serde_json::from_str(printed).with_context(|| printed.to_owned())?;
    ensure!(seconds.bytes == expected, "read {:?} bytes of {expected:?}", seconds.bytes);
    Ok(seconds)
}

/// `forebay up` of the same manifests.
struct Up {
    process: Child,
    directory: PathBuf,
}

impl Up {
    fn start(manifests: &str) -> anyhow::Result<Self> {
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
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("forebay up")?;
        let up = Self { process, directory };
        until("forebay up serves", 60, || Ok(up.data().join("large").is_dir()))?;
        Ok(up)
    }

    fn data(&self) -> PathBuf {
        self.directory.join("mnt/data")
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
