//! The chart and the examples, as the README tells a user to use them.

use std::{fs, process::Command};

use anyhow::{Context as _, ensure};

use crate::{
    Env, Outcome, TestResult, data,
    kubectl::text,
    runner::say,
    wait::{eventually, until},
};

/// Where the examples' endpoint leads in our own cluster (its DNS): the store of the tests.
const EXAMPLES_NEED: &str = "the examples' endpoint s3.example.com leads to the store in our own cluster only";

/// The commands of README.md between two markers, one a line; a `\` at the end goes on.
fn readme_commands(env: &Env) -> anyhow::Result<Vec<String>> {
    let readme = fs::read_to_string(env.root.join("README.md"))?;
    let (_, rest) = readme.split_once("<!-- e2e: cluster quickstart -->").context("README.md has no marker")?;
    let (_, block) = rest.split_once("```\n").context("README.md has no commands after the marker")?;
    let (block, _) = block.split_once("```").context("the commands of README.md have no end")?;
    Ok(block.replace("\\\n", " ").lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
}

/// A bucket with a directory of images for each class.
fn flowers(env: &Env) -> anyhow::Result<()> {
    env.store.make_bucket("flowers")?;
    for (class, shade) in [("daisies", 40), ("tulips", 200)] {
        for n in 0..24u8 {
            env.store.put_bytes("flowers", &format!("{class}/{n:02}.ppm"), image(shade, n))?;
        }
    }
    Ok(())
}

/// A 96 x 96 image without a library: PPM, which Pillow reads.
fn image(shade: u8, n: u8) -> Vec<u8> {
    let mut bytes = b"P6 96 96 255\n".to_vec();
    bytes.extend((0..96u32 * 96).flat_map(|pixel| [shade, (pixel % 251) as u8, n.wrapping_mul(9)]));
    bytes
}

/// The commands of the README for a cluster, as they stand there: chart, Dataset, training pod.
pub fn the_quickstart_word_by_word(env: &Env, _: &str) -> TestResult {
    if env.cluster.is_none() {
        return Ok(Outcome::Skipped(EXAMPLES_NEED.to_owned()));
    }
    flowers(env)?;
    let commands = readme_commands(env)?;
    ensure!(commands.len() >= 4, "{commands:?}");
    let result = (|| -> anyhow::Result<()> {
        for command in &commands {
            say!("$ {command}");
            let output = Command::new("bash").args(["-ec", command]).current_dir(&env.root).output()?;
            let printed =
                String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{command}: {printed}");
            for line in printed.lines() {
                say!("  {line}");
            }
        }
        let log = eventually("the training ends", 180, || {
            let phase = text(&env.kubectl.get("vision", "pod", "train")?["status"]["phase"]);
            Ok(matches!(phase.as_str(), "Succeeded" | "Failed").then(|| env.kubectl.logs("vision", "train")))
        })??;
        say!("  {}", log.trim().replace('\n', "\n          "));
        ensure!(log.contains("epoch 1: 48 images"), "the training pod: {log}");
        Ok(())
    })();
    if result.is_err() {
        env.kubectl.describe_all("vision", &env.system);
    }
    let removed = env.kubectl.remove_namespace("vision");
    result?;
    removed?;
    Ok(Outcome::Passed)
}

/// The example with two Datasets on one runtime, a claim and an inline volume in one Job.
pub fn the_examples_work(env: &Env, ns: &str) -> TestResult {
    if env.cluster.is_none() {
        return Ok(Outcome::Skipped(EXAMPLES_NEED.to_owned()));
    }
    flowers(env)?;
    env.store.make_bucket("labels")?;
    env.store.put_bytes("labels", "classes.txt", b"daisies\ntulips\n".to_vec())?;
    env.kubectl.apply(ns, &fs::read_to_string(env.root.join("examples/two-datasets.yaml"))?)?;
    env.kubectl.run(&["--namespace", ns, "wait", "--for=condition=Complete", "job/count", "--timeout=110s"])?;
    let log = env.kubectl.run(&["--namespace", ns, "logs", "job/count"])?;
    ensure!(log.split_whitespace().eq(["48", "15"]), "the Job counted {log}");
    // The others are taken by the API server, whole.
    for example in fs::read_dir(env.root.join("examples"))? {
        let path = example?.path();
        let path = path.to_str().context("a path")?;
        let apart = ["several-sources.yaml", "training.yaml"].iter().any(|name| path.ends_with(name));
        if path.ends_with(".yaml") && !apart {
            env.kubectl.run(&["--namespace", ns, "apply", "--dry-run=server", "-f", path])?;
        }
    }
    Ok(Outcome::Passed)
}

/// `helm uninstall` names the Datasets that are still there, and leaves everything working.
pub fn uninstalling_is_refused_while_datasets_exist(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    env.usual_ready(ns, &files, 1)?;
    let helm =
        || Command::new("helm").args(["uninstall", "forebay", "--namespace", &env.system, "--timeout=60s"]).output();
    let output = match helm() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Outcome::Skipped("helm is not on the PATH".to_owned()));
        }
        output => output?,
    };
    ensure!(!output.status.success(), "uninstalled under a living Dataset");
    let hook = env.kubectl.run(&["--namespace", &env.system, "logs", "job/forebay-guard"])?;
    say!("{}", hook.trim());
    ensure!(hook.contains(&format!("{ns}/data")), "the Dataset is not named: {hook}");
    env.reader(ns, "reader", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    let Some(cluster) = &env.cluster else { return Ok(Outcome::Passed) };

    // Without Datasets it goes, and leaves nothing but the CRDs. This is the last test: it is installed again for others.
    env.kubectl.delete(ns, "pod", "reader")?;
    env.kubectl.delete(ns, "dataset", "data")?;
    env.kubectl.delete(ns, "cacheruntime", "cache")?;
    let output = helm()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    until("nothing is left in the release's namespace", 90, || {
        let kinds =
            "all,secrets,configmaps,serviceaccounts,roles,rolebindings,poddisruptionbudgets,networkpolicies,leases";
        let left = env.kubectl.run(&["--namespace", &env.system, "get", kinds, "-o", "name"])?;
        let ours = |line: &&str| !line.contains("kube-root-ca.crt") && !line.contains("serviceaccount/default");
        let left: Vec<&str> = left.lines().filter(ours).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(true)
    })?;
    let kinds = "clusterroles,clusterrolebindings,priorityclasses,csidrivers,persistentvolumes";
    let left = env.kubectl.run(&["get", kinds, "-o", "name"])?;
    let left: Vec<&str> = left.lines().filter(|line| line.contains("forebay")).collect();
    ensure!(left.is_empty(), "{left:?}");
    for node in 1..=cluster.nodes() {
        let mounts = cluster.mounts(node)?;
        ensure!(!mounts.contains("fuse.forebay"), "{mounts}");
    }
    cluster.install(&env.root, &[])?;
    Ok(Outcome::Passed)
}
