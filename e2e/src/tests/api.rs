//! What kubectl shows.

use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    Env, Outcome, TestResult, data,
    kubectl::text,
    runner::say,
    wait::{eventually, until},
};

pub fn kubectl_explains_waits_scales_and_shows(env: &Env, ns: &str) -> TestResult {
    let explained = env.kubectl.run(&["explain", "dataset.spec.sources.uri"])?;
    ensure!(explained.contains("s3://BUCKET/PREFIX/"), "{explained}");
    let explained = env.kubectl.run(&["explain", "crt.spec.tiers.watermarks"])?;
    ensure!(explained.contains("highPercent"), "{explained}");

    let files = data::usual();
    env.usual(ns, &files, 1)?;
    env.kubectl.ready(ns, "crt/cache", 60)?;
    env.kubectl.ready(ns, "dataset/data", 60)?;
    let volume_claim = env.kubectl.get(ns, "pvc", "data")?;
    ensure!(volume_claim["status"]["phase"] == "Bound", "{}", volume_claim["status"]);

    env.reader(ns, "reader", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    let row = eventually("the columns show the files, the size and what is cached", 60, || {
        let table = env.kubectl.run(&["--namespace", ns, "get", "dataset"])?;
        let mut lines = table.lines();
        let (head, row) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        ensure!(head.split_whitespace().eq(["NAME", "PHASE", "FILES", "SIZE", "CACHED", "HIT%", "AGE"]), "{head}");
        let cells: Vec<String> = row.split_whitespace().map(str::to_owned).collect();
        Ok((cells.len() == 7 && cells[2] == files.len().to_string() && cells[4] == cells[3]).then_some(cells))
    })?;
    say!("{}", row.join("  "));
    ensure!(row[1] == "Ready", "{row:?}");
    let status = env.kubectl.get(ns, "dataset", "data")?["status"].clone();
    ensure!(status["cachedBytes"] == data::bytes(&files), "{status}");
    ensure!(status["claimName"] == "data", "{status}");
    ensure!(status["misses"].as_u64().unwrap_or(0) > 0, "{status}");

    env.kubectl.run(&["--namespace", ns, "scale", "crt", "cache", "--replicas=2"])?;
    until("the scaled runtime shows two ready workers", 60, || {
        let table = env.kubectl.run(&["--namespace", ns, "get", "crt", "cache", "--no-headers"])?;
        let cells: Vec<&str> = table.split_whitespace().collect();
        Ok(cells.get(2) == Some(&"2") && cells.get(3) == Some(&"2"))
    })?;
    let runtime = env.kubectl.get(ns, "crt", "cache")?;
    let selector = text(&runtime["status"]["selector"]);
    ensure!(env.kubectl.list(ns, "pods", &selector)?.len() == 2, "the selector {selector} finds the workers");
    ensure!(runtime["status"]["capacityBytes"].as_u64() == Some(2 << 30), "{}", runtime["status"]);
    Ok(Outcome::Passed)
}

/// `kubectl forebay`, as kubectl finds it.
pub fn verbs_work_as_a_kubectl_plugin(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, 2)?;
    let dir = tempfile::tempdir()?;
    let program = std::env::current_exe()?.with_file_name("forebay");
    std::os::unix::fs::symlink(&program, dir.path().join("kubectl-forebay"))
        .with_context(|| program.display().to_string())?;
    let path = std::env::var("PATH").unwrap_or_default();
    let forebay = |line: &str| -> anyhow::Result<Result<String, String>> {
        let mut command = Command::new("kubectl");
        command.arg("forebay").args(line.split(' ')).args(["-n", ns]);
        command.env("PATH", format!("{}:{path}", dir.path().display())).env_remove("KUBECTL");
        let output = command.output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) })
    };
    let json = |line: &str| -> anyhow::Result<Value> {
        let text = forebay(line)?.map_err(anyhow::Error::msg).with_context(|| line.to_owned())?;
        // With progress, the last line is the end.
        Ok(serde_json::from_str(&text).or_else(|_| serde_json::from_str(text.lines().last().unwrap_or_default()))?)
    };
    let dataset = |status: &Value| status["datasets"][0].clone();

    json("load data / --output json")?;
    let status = dataset(&json("status --output json")?);
    ensure!(status["cachedBytes"] == data::bytes(&files) && status["phase"] == "Ready", "{status}");
    let table = forebay("status")?.map_err(anyhow::Error::msg)?;
    ensure!(table.contains("cache-forebay-1") && table.contains("Ready"), "{table}");
    json("pin data / --output json")?;
    let status = dataset(&json("status --runtime cache --output json")?);
    ensure!(status["pinnedBytes"] == data::bytes(&files), "{status}");
    json("pin data / --remove --output json")?;
    json("free data / --output json")?;
    let status = dataset(&json("status --output json")?);
    ensure!((&status["cachedBytes"], &status["pinnedBytes"]) == (&0.into(), &0.into()), "{status}");
    let rates = forebay("top --count 1 --interval 1")?.map_err(anyhow::Error::msg)?;
    ensure!(rates.contains("data"), "{rates}");

    for (line, why) in [
        ("load nothing", "\"nothing\" not found"),
        ("status --runtime nobody", "\"nobody\" not found"),
        ("up -f x.yaml --mount /x", "in a cluster there are status"),
    ] {
        let said = forebay(line)?.err().unwrap_or_default();
        ensure!(said.contains(why), "{line}: {said}");
    }
    Ok(Outcome::Passed)
}

/// The kubelet's summary has the volume's bytes and inodes.
pub fn volume_stats_reach_the_kubelet(env: &Env, ns: &str) -> TestResult {
    let files = data::usual();
    env.usual_ready(ns, &files, 1)?;
    env.idle(ns, "idle", None)?;
    let node = text(&env.kubectl.get(ns, "pod", "idle")?["spec"]["nodeName"]);
    let path = format!("/api/v1/nodes/{node}/proxy/stats/summary");
    let volume = eventually("the summary has the volume with its size", 120, || {
        let summary: serde_json::Value = serde_json::from_str(&env.kubectl.run(&["get", "--raw", &path])?)?;
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        let volumes = pods
            .iter()
            .filter(|pod| pod["podRef"]["namespace"] == ns)
            .flat_map(|pod| pod["volume"].as_array().cloned().unwrap_or_default());
        let mut found = volumes.filter(|volume| volume["pvcRef"]["name"] == "data");
        Ok(found.find(|volume| volume["usedBytes"].as_u64().unwrap_or(0) > 0))
    })?;
    say!("{volume}");
    ensure!(volume["usedBytes"].as_u64().unwrap_or(0) >= data::bytes(&files), "{volume}");
    ensure!(volume["inodesUsed"].as_u64().unwrap_or(0) >= files.len() as u64, "{volume}");
    Ok(Outcome::Passed)
}
