//! Sources that change, and sources that are wrong.

use anyhow::ensure;

use crate::{
    Env, Outcome, TestResult,
    data::{self, File},
    manifests::{dataset, runtime, secret, source},
    readers::flawless,
    runner::say,
    store::SECRET_KEY,
    wait::{eventually, stays, until},
};

/// A source is added to and removed from `spec` while a pod reads what the other one gives.
pub fn sources_come_and_go_under_readers(env: &Env, ns: &str) -> TestResult {
    let files = data::small(60, 3);
    env.usual_ready(ns, &files, 2)?;
    env.reader(ns, "reader", None, &["--loop", "--direct"])?;
    env.reads_on(ns, "reader", 200)?;
    let other = format!("{ns}-labels");
    // As readers see them: below the path of the source.
    let labels = [File::new("/labels", "a", 5_000), File::new("/labels", "b", 70_000)];
    env.store.make_bucket(&other)?;
    for file in &labels {
        env.store.put_bytes(&other, file.path.trim_start_matches("/labels/"), file.contents(0))?;
    }
    let one = source("/", ns, &env.store.url);
    let two = one.clone() + &source("/labels", &other, &env.store.url);
    env.idle(ns, "looker", None)?;
    for round in 0..2 {
        env.kubectl.apply(ns, &dataset("data", "cache", &two))?;
        for file in &labels {
            let path = format!("/data{}", file.path);
            until(&format!("{path} appears (round {round})"), 30, || {
                let size = env.kubectl.exec(ns, "looker", &["stat", "--format=%s", &path])?;
                Ok(size.trim() == file.length.to_string())
            })?;
        }
        env.reads_on(ns, "reader", 100)?;
        env.kubectl.apply(ns, &dataset("data", "cache", &one))?;
        until("the removed source disappears", 30, || {
            Ok(!env.kubectl.exec(ns, "looker", &["ls", "/data"])?.contains("labels"))
        })?;
        env.reads_on(ns, "reader", 100)?;
    }
    flawless("reader", &env.seen(ns, "reader")?)?;
    Ok(Outcome::Passed)
}

/// What changes at the source of a snapshot is seen when somebody asks for it, in pods too, and only then.
pub fn a_snapshot_is_refreshed_on_request(env: &Env, ns: &str) -> TestResult {
    let mut files = data::small(24, 2);
    env.usual_ready(ns, &files, 2)?;
    let status = || Ok::<_, anyhow::Error>(env.kubectl.get(ns, "dataset", "data")?["status"].clone());
    until("the files are counted", 40, || Ok(status()?["files"] == files.len()))?;
    let before = status()?["revision"].clone();
    env.idle(ns, "looker", None)?;
    let root = env.kubectl.exec(
        ns,
        "looker",
        &["python3", "-c", "import os; print(os.getxattr('/data', 'user.forebay.revision').decode())"],
    )?;
    ensure!(before == root.trim(), "the root says {root}, the status {before}");
    files.push(File::new("/new", "file", 12_345));
    env.store.put(ns, &files[files.len() - 1..], 0)?;
    let path = format!("/data{}", files[files.len() - 1].path);
    let is_there = || Ok(env.kubectl.exec(ns, "looker", &["stat", "--format=%s", &path]).is_ok());
    stays("nothing new", 5, || Ok(!is_there()? && status()?["revision"] == before))?;
    for (request, wanted) in [("one", files.len()), ("two", files.len())] {
        let annotation = format!("forebay.io/refreshRequestedAt={request}");
        env.kubectl.run(&["--namespace", ns, "annotate", "dataset", "data", &annotation, "--overwrite"])?;
        until(&format!("request {request} has begun"), 30, || Ok(status()?["lastRefresh"] == request))?;
        until("the new file is counted", 40, || Ok(status()?["files"] == wanted))?;
    }
    until("the pod sees it", 30, is_there)?;
    ensure!(status()?["revision"] != before, "{}", status()?);
    Ok(Outcome::Passed)
}

/// Waits until the Dataset's condition names the cause, and an event does. What is cached is served meanwhile, so it may be
/// Ready all the same.
fn named(env: &Env, ns: &str, reason: &str, hint: &str) -> anyhow::Result<()> {
    let condition = eventually(&format!("the condition says {reason}"), 60, || {
        let condition = env.kubectl.condition(ns, "dataset", "data", "Degraded")?;
        Ok(condition.filter(|condition| condition.is && condition.reason == reason))
    })?;
    say!("{reason}: {}", condition.message);
    ensure!(condition.message.contains(hint), "'{}' does not name '{hint}'", condition.message);
    until(&format!("an event says {reason}"), 20, || {
        Ok(env.kubectl.events(ns, "Dataset", "data")?.iter().any(|(event, _)| event == reason))
    })
}

fn recovers(env: &Env, ns: &str) -> anyhow::Result<()> {
    until("the Dataset recovers without being made again", 60, || {
        let is =
            |of: &str| Ok::<_, anyhow::Error>(env.kubectl.condition(ns, "dataset", "data", of)?.map(|found| found.is));
        Ok(is("Ready")? == Some(true) && is("Degraded")? == Some(false))
    })
}

pub fn wrong_secrets_buckets_and_endpoints_are_named_and_recover(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    env.store.fill(ns, &files)?;
    let with = |bucket: &str, endpoint: &str| dataset("data", "cache", &source("/", bucket, endpoint));
    let right = with(ns, &env.store.url);
    env.kubectl.apply(ns, &(runtime("cache", 1, "1Gi") + &right))?;
    named(env, ns, "SecretNotFound", "s3")?;
    env.kubectl.apply(ns, &secret("wrong"))?;
    named(env, ns, "CredentialsInvalid", "")?;
    env.kubectl.apply(ns, &secret(SECRET_KEY))?;
    recovers(env, ns)?;
    env.kubectl.apply(ns, &with("no-such-bucket", &env.store.url))?;
    named(env, ns, "BucketNotFound", "no-such-bucket")?;
    env.kubectl.apply(ns, &right)?;
    recovers(env, ns)?;
    env.kubectl.apply(ns, &with(ns, "http://nobody.example.com:9"))?;
    named(env, ns, "SourceUnreachable", "nobody.example.com")?;
    env.kubectl.apply(ns, &right)?;
    recovers(env, ns)?;
    env.reader(ns, "reader", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    Ok(Outcome::Passed)
}

/// More disk than any node has, and a host path that is a file: the runtime says so; an edit mends it.
pub fn an_impossible_tier_is_named_and_recovers(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    env.store.fill(ns, &files)?;
    let pod_template = "  template: {spec: {nodeSelector: {forebay.io/no-such-pool: \"true\"}}}\n---";
    let impossible = runtime("cache", 1, "1Gi").replace("---", pod_template);
    let rest = secret(SECRET_KEY) + &dataset("data", "cache", &source("/", ns, &env.store.url));
    env.kubectl.apply(ns, &(impossible + &rest))?;
    let condition = eventually("the runtime says that its workers cannot be scheduled", 60, || {
        let condition = env.kubectl.condition(ns, "cacheruntime", "cache", "Ready")?;
        Ok(condition.filter(|condition| !condition.is && condition.reason == "CannotSchedule"))
    })?;
    say!("{}", condition.message);
    until("an event says so", 20, || {
        Ok(env.kubectl.events(ns, "CacheRuntime", "cache")?.iter().any(|(event, _)| event == "CannotSchedule"))
    })?;
    env.kubectl.apply(ns, &runtime("cache", 1, "1Gi"))?;
    recovers(env, ns)?;
    env.reader(ns, "reader", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    Ok(Outcome::Passed)
}
