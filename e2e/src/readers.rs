//! Pods that read and check (pods/read.py).

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use crate::{
    Env,
    data::File,
    kubectl::text,
    manifests,
    wait::{eventually, until},
};

/// How soon a pod has to run on a busy two-node cluster; the first one of a Dataset waits for its workers, too.
const START: u64 = 90;

/// What a pod runs that is only there; it goes when it is told to.
pub const IDLE: [&str; 3] = ["python3", "-c", "import signal; signal.sigwait({signal.SIGTERM})"];

/// What a reader has seen.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Seen {
    pub files: u64,
    pub bytes: u64,
    pub errors: u64,
    pub wrong: u64,
    pub stale: u64,
    pub passes: u64,
    pub longest: f64,
    pub first: String,
}

impl Env {
    /// A bucket with files, and the runtime, Secret and Dataset `data` over it.
    pub fn usual(&self, namespace: &str, files: &[File], workers: u32) -> anyhow::Result<()> {
        self.store.fill(namespace, files)?;
        self.kubectl.apply(namespace, &manifests::usual(&self.store, namespace, workers))?;
        Ok(())
    }

    /// As [`Self::usual`], and waits until the Dataset is Ready.
    pub fn usual_ready(&self, namespace: &str, files: &[File], workers: u32) -> anyhow::Result<()> {
        self.usual(namespace, files, workers)?;
        self.kubectl.ready(namespace, "dataset/data", 90)
    }

    /// The scripts of reading pods.
    pub fn code(&self, namespace: &str) -> anyhow::Result<()> {
        if self.kubectl.find(namespace, "configmap", "code")?.is_none() {
            let files = format!("--from-file={}", self.root.join("e2e/pods").display());
            self.kubectl.run(&["--namespace", namespace, "create", "configmap", "code", &files])?;
        }
        Ok(())
    }

    /// Starts a pod that runs `read.py /data` with these options; returns when it runs.
    pub fn reader(&self, namespace: &str, name: &str, node: Option<&str>, options: &[&str]) -> anyhow::Result<()> {
        self.reader_of(namespace, name, "data", node, options)
    }

    /// As [`Self::reader`], of the claim of any Dataset.
    pub fn reader_of(
        &self,
        namespace: &str,
        name: &str,
        claim: &str,
        node: Option<&str>,
        options: &[&str],
    ) -> anyhow::Result<()> {
        self.code(namespace)?;
        let command = [&["python3", "/code/read.py", "/data"], options].concat();
        self.kubectl.apply(namespace, &manifests::pod(name, claim, node, &command))?;
        self.started(namespace, name)
    }

    /// A pod with the claim of `data` that only waits, for commands.
    pub fn idle(&self, namespace: &str, name: &str, node: Option<&str>) -> anyhow::Result<()> {
        self.code(namespace)?;
        self.kubectl.apply(namespace, &manifests::pod(name, "data", node, &IDLE))?;
        self.started(namespace, name)
    }

    /// Waits until a pod runs, or has run.
    pub fn started(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        until(&format!("pod {name} runs"), START, || {
            let phase = text(&self.kubectl.get(namespace, "pod", name)?["status"]["phase"]);
            Ok(matches!(phase.as_str(), "Running" | "Succeeded" | "Failed"))
        })
    }

    /// What a looping reader has seen so far.
    pub fn seen(&self, namespace: &str, name: &str) -> anyhow::Result<Seen> {
        let status = self.kubectl.exec(namespace, name, &["cat", "/tmp/status"])?;
        serde_json::from_str(&status).context("the reader's status")
    }

    /// Waits until a looping reader has read `more` files beyond now, without errors and wrong bytes.
    pub fn reads_on(&self, namespace: &str, name: &str, more: u64) -> anyhow::Result<Seen> {
        let from = eventually("the reader has begun", START, || Ok(self.seen(namespace, name).ok()))?.files;
        let seen = eventually(&format!("{name} reads {more} more files"), 90, || {
            let seen = self.seen(namespace, name)?;
            Ok((seen.files >= from + more || seen.errors + seen.wrong > 0).then_some(seen))
        })?;
        flawless(name, &seen)?;
        Ok(seen)
    }

    /// Waits for the end of a reader that reads everything once, and checks that it saw `files` without a flaw.
    pub fn read_once(&self, namespace: &str, name: &str, files: &[File]) -> anyhow::Result<Seen> {
        let phase = eventually(&format!("reader {name} ends"), START, || {
            let phase = text(&self.kubectl.get(namespace, "pod", name)?["status"]["phase"]);
            Ok(matches!(phase.as_str(), "Succeeded" | "Failed").then_some(phase))
        })?;
        let log = self.kubectl.logs(namespace, name)?;
        ensure!(phase == "Succeeded", "reader {name}: {log}");
        let seen: Seen = serde_json::from_str(log.lines().last().unwrap_or_default()).context("the reader's result")?;
        flawless(name, &seen)?;
        ensure!(seen.files == files.len() as u64, "{name} read {} files, not {}", seen.files, files.len());
        ensure!(seen.bytes == crate::data::bytes(files), "{name} read {} bytes", seen.bytes);
        Ok(seen)
    }
}

/// No error, no wrong byte.
pub fn flawless(name: &str, seen: &Seen) -> anyhow::Result<()> {
    ensure!(
        seen.errors == 0 && seen.wrong == 0,
        "{name}: {} errors, {} wrong: {}",
        seen.errors,
        seen.wrong,
        seen.first
    );
    Ok(())
}
