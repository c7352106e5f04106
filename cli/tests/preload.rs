//! PreloadPolicies under `forebay up`, and the process that drives a run in a cluster.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::time::Duration;

use forebay_test_store::{Action, Fault, Options, TestStore, Verb};
use serde_json::Value;
use support::{BUCKET, Setup, Up, can_mount, command, content, eventually, manifest_text, test_dir};

const FILES: u64 = 40;
const DEADLINE: Duration = Duration::from_secs(60);

fn name(file: u64) -> String {
    format!("train/ä b:c {}/{file}.jpg", file % 4)
}

fn contents(file: u64) -> bytes::Bytes {
    content::bytes(file, 20_000 + file as usize * 100)
}

/// A store with files in `train` and `other`, whose names are not the simplest.
async fn fill(store: &TestStore) -> u64 {
    store.create_bucket(BUCKET).await;
    let mut bytes = 0;
    for file in 0..FILES {
        store.put(BUCKET, &name(file), contents(file)).await;
        bytes += contents(file).len() as u64;
    }
    store.put(BUCKET, "other/one.jpg", content::bytes(100, 5_000)).await;
    store.put(BUCKET, "train/notes.txt", content::bytes(101, 5_000)).await;
    bytes
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---
apiVersion: forebay.io/v1alpha1
kind: PreloadPolicy
metadata: {{name: {name}}}
spec:
  datasetRef: {{name: data}}
  select: {{include: ['train/**/*.jpg']}}
{spec}"
    )
}

fn last_run(up: &Up, name: &str) -> Value {
    let status = up.status();
    let policies = status["policies"].as_array().unwrap();
    policies.iter().find(|policy| policy["name"] == name).unwrap()["lastRun"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_declared_is_loaded_before_it_is_read() {
    if !can_mount() {
        return;
    }
    let dir = test_dir();
    let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
    let bytes = fill(&store).await;
    let manifest = dir.path().join("data.yaml");
    let documents = [
        manifest_text(&Setup::default(), &store),
        policy("ready", "  triggers: [{datasetReady: {}}]\n"),
        policy("each-minute", "  triggers: [{schedule: {cron: '* * * * *', timeZone: Asia/Tokyo}}]\n"),
        policy("asleep", "  triggers: [{datasetReady: {}}]\n  suspend: true\n"),
    ];
    std::fs::write(&manifest, documents.concat()).unwrap();
    let up = Up::start(&manifest, dir.path(), &Setup::default().arguments);

    eventually("the run", DEADLINE, || last_run(&up, "ready")["phase"] == "Complete");
    let run = last_run(&up, "ready");
    assert_eq!((&run["files"], &run["totalFiles"]), (&FILES.into(), &FILES.into()));
    assert_eq!((&run["bytes"], &run["totalBytes"], &run["percent"]), (&bytes.into(), &bytes.into(), &100.into()));
    assert_eq!(up.status()["datasets"][0]["cachedBytes"], bytes);
    let gets = store.counters().gets;
    for file in 0..FILES {
        assert_eq!(std::fs::read(up.mount.join(name(file))).unwrap(), contents(file));
    }
    assert_eq!(store.counters().gets, gets, "everything was there before it was read");

    // At the next full minute; what is there is counted and not fetched.
    eventually("the schedule", Duration::from_secs(90), || last_run(&up, "each-minute")["phase"] == "Complete");
    let run = last_run(&up, "each-minute");
    assert_eq!((&run["trigger"], &run["bytes"]), (&"Schedule".into(), &bytes.into()));
    assert_eq!(store.counters().gets, gets);
    assert!(last_run(&up, "asleep").is_null());
    up.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_named_is_loaded() {
    if !can_mount() {
        return;
    }
    let dir = test_dir();
    let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
    fill(&store).await;
    let lines = |files: &[u64]| files.iter().map(|file| format!("{}\n", name(*file))).collect::<String>();
    store.put(BUCKET, "lists/three.txt", lines(&[9, 30, 17]).into()).await;
    let manifest = dir.path().join("data.yaml");
    let selecting = |name: &str, select: &str| {
        policy(name, "  triggers: [{datasetReady: {}}]\n").replace("include: ['train/**/*.jpg']", select)
    };
    let documents = [
        manifest_text(&Setup::default(), &store),
        selecting("in-the-dataset", "manifest: {path: /lists/three.txt}"),
        selecting("in-a-map", "manifest: {configMapRef: {name: lists, key: two}}"),
        format!("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: lists}}\ndata:\n  two: '{}'\n", {
            lines(&[1, 2]).replace('\n', "\n\n    ")
        }),
    ];
    std::fs::write(&manifest, documents.concat()).unwrap();
    let up = Up::start(&manifest, dir.path(), &Setup::default().arguments);
    for (policy, files) in [("in-the-dataset", 3), ("in-a-map", 2)] {
        eventually("the run", DEADLINE, || last_run(&up, policy)["phase"] == "Complete");
        assert_eq!(last_run(&up, policy)["totalFiles"], files);
    }
    // The list in the Dataset is one more.
    assert_eq!(store.counters().gets, 3 + 2 + 1);
    let here = dir.path().join("here.txt");
    std::fs::write(&here, lines(&[30, 31, 32])).unwrap();
    up.json(&["load", "data", "--manifest-file", here.to_str().unwrap()]);
    assert_eq!(store.counters().gets, 3 + 2 + 1 + 2);
    up.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_complete_says_why() {
    if !can_mount() {
        return;
    }
    let dir = test_dir();
    let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
    fill(&store).await;
    store.faults().add(Fault::new(Action::Status(403)).on(Verb::Get).key("train/ä b:c 1/37"));
    let manifest = dir.path().join("data.yaml");
    let documents = [
        manifest_text(&Setup::default(), &store),
        policy("ready", "  triggers: [{datasetReady: {}}]\n  backoffLimit: 0\n"),
    ];
    std::fs::write(&manifest, documents.concat()).unwrap();
    let up = Up::start(&manifest, dir.path(), &Setup::default().arguments);
    eventually("the run", DEADLINE, || last_run(&up, "ready")["phase"] == "Failed");
    let run = last_run(&up, "ready");
    assert_eq!((&run["files"], &run["failedFiles"]), (&(FILES - 1).into(), &1.into()));
    let message = run["message"].as_str().unwrap();
    assert!(message.contains("1 of 40 files") && message.contains("train/ä b:c 1/37.jpg"), "{message}");
    up.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_loads_everything_and_ends() {
    if !can_mount() {
        return;
    }
    let dir = test_dir();
    let store = TestStore::start(Options { dir: Some(dir.path().to_owned()), ..Options::default() }).await;
    let bytes = fill(&store).await;
    let manifest = dir.path().join("data.yaml");
    std::fs::write(&manifest, manifest_text(&Setup::default(), &store)).unwrap();
    let up = Up::start(&manifest, dir.path(), &Setup::default().arguments);
    let status = up.status();
    let drive = |run: &str, include: &str| {
        command()
            .args(["preload", "--service", status["workers"][0]["address"].as_str().unwrap()])
            .args(["--dataset", status["datasets"][0]["id"].as_str().unwrap(), "--run", run, "--include", include])
            .arg("--key-file")
            .arg(up.state.join("runtimes/default.runtime/key"))
            .output()
            .unwrap()
    };
    let done = drive("one", "train/**/*.jpg");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success() && said.starts_with("loaded 40 files"),
        "{said}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    assert_eq!(up.status()["datasets"][0]["cachedBytes"], bytes);
    // What no worker understands ends at once, and says so.
    let wrong = drive("two", "train/[");
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(!wrong.status.success() && said.contains("train/["), "{said}");
    up.stop();
}
