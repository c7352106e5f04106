//! What the API server refuses, with the field and the reason, and what an edit does.

use anyhow::{Context as _, ensure};

use crate::{
    Env, Outcome, TestResult, data,
    manifests::{dataset, runtime, source},
    runner::say,
    wait::{eventually, until},
};

/// Manifests that are refused: what is wrong, what replaces what in a good one, and the field that the message names.
const DATASETS: &[(&str, &str, &str, &str)] = &[
    ("no runtime", "runtimeRef: {name: cache}", "runtimeRef: {}", "spec.runtimeRef.name"),
    ("a runtime that is no name", "runtimeRef: {name: cache}", "runtimeRef: {name: Cache_1}", "spec.runtimeRef.name"),
    ("an unknown field", "sources:", "sorces: 1\n  sources:", "sorces"),
    ("a relative path", "path: /", "path: a", "spec.sources[0].path"),
    ("a path with ..", "path: /", "path: /a/../b", "spec.sources[0].path"),
    ("a path that ends with a slash", "path: /", "path: /a/", "spec.sources[0].path"),
    ("an unknown scheme", "s3://bucket/", "ftp://bucket/", "spec.sources[0].uri"),
    ("a bucket that is too short", "s3://bucket/", "s3://b/", "spec.sources[0].uri"),
    ("a prefix with an empty component", "s3://bucket/", "s3://bucket//a/", "spec.sources[0].uri"),
    ("credentials in the URI", "s3://bucket/", "s3://key:secret@bucket/", "spec.sources[0].uri"),
    ("a query in the URI", "s3://bucket/", "\"s3://bucket/?x=1\"", "spec.sources[0].uri"),
    ("a Secret that is no name", "secretRef: {name: s3}", "secretRef: {name: S3_}", "spec.sources[0].secretRef.name"),
    ("an endpoint without a scheme", "\"http://store:9000\"", "store:9000", "spec.sources[0].s3.endpoint"),
    ("an endpoint with a path", "\"http://store:9000\"", "\"http://store:9000/x\"", "spec.sources[0].s3.endpoint"),
    ("a region that is none", "region: us-east-1", "region: US_EAST", "spec.sources[0].s3.region"),
    ("an unknown addressing", "addressing: Path", "addressing: Virtual", "spec.sources[0].s3.addressing"),
    ("s3 options of a file", "s3://bucket/", "file:///data", "spec.sources[0]"),
    ("a quota that is none", "sources:", "cache: {quota: many}\n  sources:", "spec.cache.quota"),
    ("a policy that is none", "sources:", "cache: {policy: Keep}\n  sources:", "spec.cache.policy"),
];
const RUNTIMES: &[(&str, &str, &str, &str)] = &[
    ("no workers", "replicas: 2", "replicas: 0", "spec.replicas"),
    ("too many workers", "replicas: 2", "replicas: 100000", "spec.replicas"),
    ("an unknown medium", "medium: SSD", "medium: Tape", "spec.tiers[0].medium"),
    ("a capacity that is none", "capacity: 1Gi", "capacity: big", "spec.tiers[0].capacity"),
    ("no volume", "volume: {emptyDir: {}}", "volume: {}", "spec.tiers[0].volume"),
    ("two volumes", "{emptyDir: {}}", "{emptyDir: {}, hostPath: {path: /mnt}}", "spec.tiers[0].volume"),
    ("a relative host path", "{emptyDir: {}}", "{hostPath: {path: mnt}}", "spec.tiers[0].volume.hostPath.path"),
    (
        "crossed watermarks",
        "volume:",
        "watermarks: {highPercent: 50, lowPercent: 60}, volume:",
        "spec.tiers[0].watermarks",
    ),
];

fn refuse(env: &Env, ns: &str, good: &str, cases: &[(&str, &str, &str, &str)]) -> anyhow::Result<usize> {
    for (what, from, to, field) in cases {
        ensure!(good.contains(from), "'{from}' is not in the manifest");
        let said = env.kubectl.refusal(ns, &good.replacen(from, to, 1)).with_context(|| (*what).to_owned())?;
        ensure!(said.contains(field), "{what}: the message does not name {field}: {said}");
    }
    Ok(cases.len())
}

fn no_tiers(runtime: &str) -> String {
    runtime
        .lines()
        .filter(|line| !line.contains("- {name: disk"))
        .map(|line| line.replace("tiers:", "tiers: []") + "\n")
        .collect()
}

pub fn invalid_specs_are_refused_with_the_field(env: &Env, ns: &str) -> TestResult {
    let good = dataset("data", "cache", &source("/", "bucket", "http://store:9000"));
    let good_runtime = runtime("cache", 2, "1Gi");
    env.kubectl.apply(ns, &good_runtime).context("the manifest that the others are made of")?;
    env.kubectl.apply(ns, &good).context("the manifest that the others are made of")?;
    let mut refused = refuse(env, ns, &good, DATASETS)? + refuse(env, ns, &good_runtime, RUNTIMES)?;
    for (manifest, field) in
        [(dataset("data", "cache", "    []\n"), "spec.sources"), (no_tiers(&good_runtime), "spec.tiers")]
    {
        let said = env.kubectl.refusal(ns, &manifest)?;
        ensure!(said.contains(field), "an empty list: the message does not name {field}: {said}");
    }
    let twice = source("/", "bucket", "http://store:9000") + &source("/", "bucket2", "http://store:9000");
    let said = env.kubectl.refusal(ns, &dataset("data", "cache", &twice))?;
    ensure!(said.contains("spec.sources"), "{said}");
    let long = "n".repeat(64);
    for manifest in [good.replace("name: data", &format!("name: {long}")), good.replace("name: data", "name: da.ta")] {
        let said = env.kubectl.refusal(ns, &manifest)?;
        ensure!(said.contains("metadata.name") || said.contains("label"), "{said}");
    }
    refused += 5;
    say!("{refused} manifests refused");
    env.kubectl.delete(ns, "dataset", "data")?;
    Ok(Outcome::Passed)
}

/// Fields that can be edited are followed; the one that cannot is refused.
pub fn edits_take_effect_or_are_refused(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, 1)?;
    let said = env.kubectl.patch(ns, "dataset", "data", r#"{"spec": {"runtimeRef": {"name": "other"}}}"#);
    let said = format!("{:#}", said.err().context("runtimeRef was changed")?);
    ensure!(said.contains("spec.runtimeRef") && said.contains("cannot be changed"), "{said}");

    // A quota below what is cached: the workers make room.
    env.reader(ns, "warm", None, &[])?;
    env.read_once(ns, "warm", &files)?;
    env.kubectl.patch(ns, "dataset", "data", r#"{"spec": {"cache": {"quota": "4Mi"}}}"#)?;
    until("what is above the quota goes", 90, || {
        let cached = env.kubectl.get(ns, "dataset", "data")?["status"]["cachedBytes"].as_u64();
        Ok(cached.is_some_and(|cached| cached <= 4 << 20))
    })?;
    // The tier's capacity: the workers' pods follow, and the status tells.
    let bigger = runtime("cache", 1, "2Gi");
    env.kubectl.apply(ns, &bigger)?;
    let status = eventually("the capacity follows", 90, || {
        let status = env.kubectl.get(ns, "cacheruntime", "cache")?["status"].clone();
        Ok((status["capacityBytes"].as_u64() == Some(2 << 30) && status["readyReplicas"] == 1).then_some(status))
    })?;
    ensure!(status["observedGeneration"].as_u64() > Some(1), "{status}");
    // The pod template.
    let labelled = bigger.replacen("spec:\n", "spec:\n  template: {metadata: {labels: {team: vision}}}\n", 1);
    env.kubectl.apply(ns, &labelled)?;
    until("the workers have the label", 90, || Ok(env.kubectl.list(ns, "pods", "team=vision")?.len() == 1))?;
    env.reader(ns, "after", None, &[])?;
    env.read_once(ns, "after", &files)?;
    Ok(Outcome::Passed)
}
