//! Volume health, as the kubelet shows it in the pod's status (gate CSIVolumeHealth, alpha in 1.37).

use anyhow::ensure;

use crate::{
    Env, Outcome, TestResult, data,
    runner::say,
    wait::{eventually, until},
};

pub fn volume_health_reaches_the_pod(env: &Env, ns: &str) -> TestResult {
    let version: serde_json::Value = serde_json::from_str(&env.kubectl.run(&["get", "--raw", "/version"])?)?;
    let minor: u32 = version["minor"].as_str().unwrap_or_default().trim_end_matches('+').parse().unwrap_or(0);
    if minor < 37 {
        return Ok(Outcome::Skipped(format!("Kubernetes 1.{minor} does not know CSI 1.13's volume health")));
    }
    let files = data::usual();
    env.usual_ready(ns, &files, 2)?;
    env.reader(ns, "reader", None, &["--loop"])?;
    env.reads_on(ns, "reader", 100)?;
    let health = |what: &str, seconds, says: &dyn Fn(&str) -> bool| {
        eventually(what, seconds, || {
            let health = env.kubectl.get(ns, "pod", "reader")?["status"]["volumeHealth"].to_string();
            Ok(says(&health).then_some(health))
        })
    };
    // Of a healthy volume nothing is said.
    let bad = |health: &str| {
        ["Degraded", "DEGRADED", "Inaccessible", "INACCESSIBLE"].iter().any(|word| health.contains(word))
    };
    let shown = env.kubectl.get(ns, "pod", "reader")?["status"]["volumeHealth"].to_string();
    ensure!(!bad(&shown), "healthy at first: {shown}");
    // No worker any more: what is cached in the pod's memory reads on, the volume is not accessible.
    env.kubectl.run(&["--namespace", &env.system, "scale", "deployment/forebay-operator", "--replicas=0"])?;
    let result = (|| -> anyhow::Result<()> {
        env.kubectl.run(&["--namespace", ns, "scale", "statefulset/cache-forebay", "--replicas=0"])?;
        let shown = health("the volume is shown as not healthy", 90, &bad)?;
        say!("{shown}");
        ensure!(shown.contains("worker"), "the message names the workers: {shown}");
        Ok(())
    })();
    env.kubectl.run(&["--namespace", &env.system, "scale", "deployment/forebay-operator", "--replicas=2"])?;
    result?;
    until("the operator brings the workers back", 90, || {
        Ok(env.kubectl.get(ns, "cacheruntime", "cache")?["status"]["readyReplicas"] == 2)
    })?;
    health("the volume is healthy again", 90, &|health| !bad(health))?;
    Ok(Outcome::Passed)
}
