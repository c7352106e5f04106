//! PreloadPolicies: what is declared is loaded before it is read, by each trigger, whoever dies meanwhile.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    Env, Outcome, TestResult,
    data::{self, File},
    kubectl::text,
    manifests::{self, preload_policy},
    runner::say,
    store::SECRET_KEY,
    wait::{eventually, until},
};

/// How soon a run ends that has little to do: a pod has to start, and workers are asked every few seconds.
const RUN: u64 = 90;

fn last_run(env: &Env, ns: &str, name: &str) -> anyhow::Result<Value> {
    Ok(env.kubectl.get(ns, "preloadpolicy", name)?["status"]["lastRun"].clone())
}

/// Waits for the end of a run by this trigger.
fn run_by(env: &Env, ns: &str, name: &str, trigger: &str, phase: &str) -> anyhow::Result<Value> {
    eventually(&format!("a run of {name} by {trigger} is {phase}"), RUN, || {
        let run = last_run(env, ns, name)?;
        Ok((run["trigger"] == trigger && run["phase"] == phase).then_some(run))
    })
}

/// Waits for the end of a run before which so many have ended.
fn run_by_request(env: &Env, ns: &str, name: &str, before: usize) -> anyhow::Result<Value> {
    eventually(&format!("another run of {name}"), RUN, || {
        let status = env.kubectl.get(ns, "preloadpolicy", name)?["status"].clone();
        let (run, runs) = (&status["lastRun"], status["runs"].as_array().map_or(0, Vec::len));
        Ok((runs == before && run["phase"] == "Complete").then(|| run.clone()))
    })
}

/// A run that loaded these files, all of them and no others.
fn is_all(run: &Value, files: &[File]) -> anyhow::Result<()> {
    let (count, bytes) = (files.len(), data::bytes(files));
    ensure!(run["files"] == count && run["totalFiles"] == count, "{run}");
    ensure!(run["bytes"] == bytes && run["totalBytes"] == bytes && run["percent"] == 100, "{run}");
    ensure!(run["failedFiles"] == 0 && run["completionTime"].is_string(), "{run}");
    Ok(())
}

pub fn preloads_start_by_each_trigger(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.store.fill(ns, &files)?;
    let all = manifests::usual(&env.store, ns, 2)
        .replace("  sources:", "  sync: {mode: Periodic, interval: 5s}\n  sources:")
        + &preload_policy("changes", "triggers: [{sourceChanged: {}}]")
        + &preload_policy("ready", "triggers: [{datasetReady: {}}]")
        + &preload_policy("clock", "triggers: [{schedule: {cron: '* * * * *', timeZone: Asia/Tokyo}}]")
        + &preload_policy("part", "select: {include: ['d000/**'], maxSize: 1Mi}");
    env.kubectl.apply(ns, &all)?;
    let run = run_by(env, ns, "ready", "DatasetReady", "Complete")?;
    is_all(&run, &files)?;
    env.kubectl.run(&["--namespace", ns, "wait", "--for=condition=Complete", "plp/ready", "--timeout=5s"])?;
    let shown = env.kubectl.run(&["--namespace", ns, "get", "plp", "ready", "--no-headers"])?;
    let columns: Vec<&str> = shown.split_whitespace().collect();
    let expected = ["ready", "data", "Complete", &files.len().to_string(), "100"];
    ensure!(columns.starts_with(&expected), "{shown}");

    // What is loaded is not asked of the source when it is read.
    let loaded = env.store.reads(ns)?;
    env.reader(ns, "reader", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    ensure!(env.store.reads(ns)? == loaded, "the source was asked for what was loaded");

    is_all(&run_by(env, ns, "clock", "Schedule", "Complete")?, &files)?;
    env.kubectl.patch(ns, "plp", "clock", r#"{"spec": {"suspend": true}}"#)?;
    until("no run is scheduled", 20, || {
        Ok(env.kubectl.get(ns, "plp", "clock")?["status"]["nextScheduleTime"].is_null())
    })?;

    ensure!(last_run(env, ns, "part")?.is_null(), "nobody asked for it");
    let ask = |name: &str, value: &str| {
        let annotation = format!("forebay.io/requestedAt={value}");
        env.kubectl.run(&["--namespace", ns, "annotate", "plp", name, &annotation, "--overwrite"]).map(drop)
    };
    ask("part", "1")?;
    let part: Vec<File> = files.iter().filter(|file| file.path.starts_with("/d000/")).cloned().collect();
    is_all(&run_by(env, ns, "part", "Request", "Complete")?, &part)?;
    ensure!(env.store.reads(ns)? == loaded, "the source was asked for what was loaded");

    // What cannot be selected fails, says why, and is mended.
    env.kubectl.patch(ns, "plp", "part", r#"{"spec": {"select": {"include": ["d000/["]}, "backoffLimit": 0}}"#)?;
    ask("part", "2")?;
    run_by(env, ns, "part", "Request", "Failed")?;
    let failed = eventually("the condition", 10, || env.kubectl.condition(ns, "plp", "part", "Failed"))?;
    ensure!(failed.is && failed.reason == "RunFailed", "{failed:?}");
    env.kubectl.patch(ns, "plp", "part", r#"{"spec": {"select": {"include": ["d000/**"]}}}"#)?;
    ask("part", "3")?;
    is_all(&run_by(env, ns, "part", "Request", "Complete")?, &part)?;
    let history = env.kubectl.get(ns, "plp", "part")?["status"]["runs"].clone();
    let phases: Vec<String> = history.as_array().context("runs")?.iter().map(|run| text(&run["phase"])).collect();
    ensure!(phases == ["Failed", "Complete"], "{history}");

    // What a ConfigMap names is loaded, and nothing else.
    let named = &files[..3];
    let lines: String = named.iter().map(|file| format!("      {}\n", file.path)).collect();
    let lists = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: lists}\ndata:\n  one.txt: |\n";
    env.kubectl.apply(ns, &format!("{lists}{lines}"))?;
    let select = r#"{"include": [], "manifest": {"configMapRef": {"name": "lists", "key": "one.txt"}}}"#;
    env.kubectl.patch(ns, "plp", "part", &format!(r#"{{"spec": {{"select": {select}}}}}"#))?;
    ask("part", "4")?;
    is_all(&run_by_request(env, ns, "part", 3)?, named)?;

    // What comes at the source is loaded, too.
    let dataset = || Ok::<_, anyhow::Error>(env.kubectl.get(ns, "dataset", "data")?["status"].clone());
    let before = dataset()?["revision"].clone();
    ensure!(before.is_string() && last_run(env, ns, "changes")?.is_null(), "nothing changed yet: {before}");
    let mut files = files;
    files.push(File::new("/new", "file", 40_000));
    env.store.put(ns, &files[files.len() - 1..], 0)?;
    is_all(&run_by(env, ns, "changes", "SourceChanged", "Complete")?, &files)?;
    let status = dataset()?;
    ensure!(status["revision"] != before && status["lastSyncTime"].is_string(), "{status}");
    Ok(Outcome::Passed)
}

/// Its pod, a worker and the operator die in mid-load: it is complete and exact all the same.
pub fn a_preload_outlives_who_drives_it(env: &Env, ns: &str) -> TestResult {
    let files = data::small(1_500, 10);
    env.store.fill(ns, &files)?;
    let runtime = manifests::runtime("cache", 2, "1Gi");
    let dataset = manifests::dataset("data", "cache", &manifests::source("/", ns, &env.store.url));
    // So slow that there is something to meet.
    let policy = preload_policy("all", "triggers: [{datasetReady: {}}]\n  limits: {requestsPerSecond: 50}");
    env.kubectl.apply(ns, &(runtime + &manifests::secret(SECRET_KEY) + &dataset + &policy))?;
    let loaded = |least: usize| {
        eventually(&format!("{least} files are loaded"), RUN, || {
            let run = last_run(env, ns, "all")?;
            ensure!(run["phase"] != "Complete", "it was too fast to be met: {run}");
            Ok(run["files"].as_u64().filter(|files| *files >= least as u64))
        })
    };
    let first = loaded(50)?;
    let selector = "forebay.io/preload-policy=all";
    let pods = || env.kubectl.list(ns, "pods", selector);
    let driver = text(&pods()?.first().context("no pod drives the run")?["metadata"]["name"]);
    env.kubectl.run(&["--namespace", ns, "delete", "pod", &driver, "--grace-period=0", "--force"])?;
    until("another pod drives it", 60, || {
        Ok(pods()?.iter().any(|pod| text(&pod["metadata"]["name"]) != driver && pod["status"]["phase"] == "Running"))
    })?;
    let second = loaded(usize::try_from(first)? + 50)?;
    let operators = "app.kubernetes.io/component=operator";
    env.kubectl.run(&["--namespace", &env.system, "delete", "pods", "--selector", operators, "--wait=false"])?;
    let reads = env.store.reads(ns)?;
    env.kubectl.run(&["--namespace", ns, "delete", "pod", "cache-forebay-1", "--grace-period=0", "--force"])?;
    say!("met: the pod at {first} files, operator and worker at {second}, {reads:?} requests");
    let run = eventually("the run is complete", 240, || {
        let run = last_run(env, ns, "all")?;
        ensure!(run["phase"] != "Failed", "{run}");
        Ok((run["phase"] == "Complete").then_some(run))
    })?;
    is_all(&run, &files)?;
    let rollout = ["--namespace", &env.system, "rollout", "status", "deployment/forebay-operator", "--timeout=90s"];
    env.kubectl.run(&rollout)?;
    // What the deleted worker held went with it; nothing else is fetched twice.
    if let (Some(before), Some(after)) = (reads, env.store.reads(ns)?) {
        say!("{after} requests for {} files", files.len());
        ensure!(after <= files.len() as u64 + before, "{after} requests, {before} before the worker went");
    }
    let cached = eventually("all bytes are cached", 60, || {
        let cached = env.kubectl.get(ns, "dataset", "data")?["status"]["cachedBytes"].as_u64();
        Ok(cached.filter(|cached| *cached == data::bytes(&files)))
    })?;
    say!("{cached} bytes cached");
    Ok(Outcome::Passed)
}
