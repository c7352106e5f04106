//! PreloadPolicies as far as no worker is needed: schedules, what is wrong with them, history, and the edits that take
//! effect at once. That runs start and load is tested in e2e, what their Jobs are like beside the code.

use serde_json::{Value, json};

use crate::cluster::{Cluster, PRELOAD_POLICY};

const NAMESPACE: &str = "policies";

async fn make(cluster: &Cluster, name: &str, spec: Value) {
    cluster.namespace(NAMESPACE).await;
    cluster.create(PRELOAD_POLICY, NAMESPACE, json!({"metadata": {"name": name}, "spec": spec})).await;
}

fn schedule(cron: &str, zone: &str) -> Value {
    json!({"datasetRef": {"name": "data"}, "triggers": [{"schedule": {"cron": cron, "timeZone": zone}}]})
}

fn next(policy: &Value) -> &str {
    policy["status"]["nextScheduleTime"].as_str().unwrap_or_default()
}

fn reason(policy: &Value) -> &str {
    policy["status"]["conditions"][0]["reason"].as_str().unwrap_or_default()
}

pub(crate) async fn the_next_time_follows_the_schedule(cluster: &Cluster) {
    let (name, spec) = ("clock", schedule("30 5 * * *", "Asia/Tokyo"));
    make(cluster, name, spec.clone()).await;
    // 5:30 in Tokyo, where clocks are never turned.
    let is = |end: &'static str| move |policy: &Value| next(policy).ends_with(end);
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, is("T20:30:00Z")).await;
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, |policy| reason(policy) == "DatasetNotFound").await;
    let respec = async |spec: &Value| cluster.respec(PRELOAD_POLICY, NAMESPACE, name, spec).await;
    respec(&schedule("45 5 * * *", "Asia/Tokyo")).await.unwrap();
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, is("T20:45:00Z")).await;
    respec(&schedule("45 5 * * *", "UTC")).await.unwrap();
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, is("T05:45:00Z")).await;
    let mut suspended = spec.clone();
    suspended["suspend"] = json!(true);
    respec(&suspended).await.unwrap();
    let rests = |policy: &Value| next(policy).is_empty() && reason(policy) == "Suspended";
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, rests).await;
    respec(&spec).await.unwrap();
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, is("T20:30:00Z")).await;

    let mut other = spec;
    other["datasetRef"]["name"] = json!("other");
    let said = respec(&other).await.unwrap_err();
    assert!(said.contains("spec.datasetRef") && said.contains("cannot be changed"), "{said}");
}

pub(crate) async fn a_schedule_without_times_is_told(cluster: &Cluster) {
    for (name, cron, zone, says) in
        [("never", "0 0 30 2 *", "UTC", "30 2"), ("nowhere", "@daily", "Europe/Nowhere", "Europe/Nowhere")]
    {
        make(cluster, name, schedule(cron, zone)).await;
        cluster.wait(PRELOAD_POLICY, NAMESPACE, name, |policy| reason(policy) == "InvalidSchedule").await;
        let policy = cluster.get(PRELOAD_POLICY, NAMESPACE, name).await.unwrap();
        let failed = &policy["status"]["conditions"][1];
        assert_eq!((&failed["type"], &failed["status"]), (&json!("Failed"), &json!("True")));
        let message = failed["message"].as_str().unwrap();
        assert!(message.starts_with("spec.triggers: ") && message.contains(says), "{message}");
        // Mended without being made again.
        cluster.respec(PRELOAD_POLICY, NAMESPACE, name, &schedule("@daily", "UTC")).await.unwrap();
        cluster.wait(PRELOAD_POLICY, NAMESPACE, name, |policy| reason(policy) == "DatasetNotFound").await;
    }
}

pub(crate) async fn history_is_kept_within_its_limits(cluster: &Cluster) {
    let name = "history";
    let spec = json!({"datasetRef": {"name": "data"}});
    make(cluster, name, spec.clone()).await;
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, |policy| reason(policy) == "DatasetNotFound").await;
    let run = |number: u32| {
        let phase = if number.is_multiple_of(2) { "Complete" } else { "Failed" };
        json!({"name": format!("r{number}"), "uid": format!("u{number}"), "trigger": "Request", "phase": phase,
            "startTime": "2026-01-01T00:00:00Z"})
    };
    let runs: Vec<Value> = (0..10).map(run).collect();
    cluster.merge(PRELOAD_POLICY, NAMESPACE, name, json!({"status": {"runs": runs}})).await;
    let names = |policy: &Value| -> Vec<String> {
        let runs = policy["status"]["runs"].as_array().cloned().unwrap_or_default();
        runs.iter().map(|run| run["name"].as_str().unwrap().to_owned()).collect()
    };
    let left = |expected: &'static [&'static str]| move |policy: &Value| names(policy) == expected;
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, left(&["r0", "r1", "r2", "r3", "r4", "r5"])).await;
    let mut fewer = spec;
    fewer["historyLimits"] = json!({"succeeded": 1, "failed": 2});
    cluster.respec(PRELOAD_POLICY, NAMESPACE, name, &fewer).await.unwrap();
    cluster.wait(PRELOAD_POLICY, NAMESPACE, name, left(&["r0", "r1", "r3"])).await;
}
