//! CacheRuntimes.

use forebay_api::object_name;
use serde_json::{Value, json};

use crate::cluster::{
    BUDGET, Cluster, Kind, POD, POLICY, ROLE_BINDING, RUNTIME, SECRET, SERVICE, SERVICE_ACCOUNT, STATEFUL_SET,
    condition,
};

/// All that is made for a CacheRuntime, but for the Secret.
const MADE: [Kind; 6] = [SERVICE, SERVICE_ACCOUNT, ROLE_BINDING, POLICY, BUDGET, STATEFUL_SET];

pub(crate) async fn make(cluster: &Cluster, namespace: &str, name: &str, template: Value) -> Value {
    cluster.namespace(namespace).await;
    let tiers = json!([{"name": "t", "medium": "SSD", "capacity": "1Gi", "volume": {"emptyDir": {}}}]);
    let spec = json!({"replicas": 2, "tiers": tiers, "template": template});
    cluster.create(RUNTIME, namespace, json!({"metadata": {"name": name}, "spec": spec})).await
}

/// Makes a pod of a StatefulSet, as its controller would, and says that it runs, as a kubelet would.
pub(crate) async fn start_pod(cluster: &Cluster, namespace: &str, set: &str, ordinal: u32, ip: &str) {
    let stateful_set = cluster.wait(STATEFUL_SET, namespace, set, |_| true).await;
    let name = format!("{set}-{ordinal}");
    let container = json!({"name": "worker", "image": "forebay:test"});
    let pod = json!({
        "metadata": {"name": name, "labels": stateful_set["spec"]["template"]["metadata"]["labels"]},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0},
    });
    cluster.create(POD, namespace, pod).await;
    let status = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]});
    cluster.merge(POD, namespace, &name, json!({"status": status})).await;
}

pub(crate) async fn objects_are_made_and_mended(cluster: &Cluster) {
    let uid = make(cluster, "made", "pool", json!({})).await["metadata"]["uid"].clone();
    for kind in MADE.into_iter().chain([SECRET]) {
        let object = cluster.wait(kind, "made", "pool-forebay", |_| true).await;
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], uid, "{object:#?}");
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/managed-by"], "forebay-operator");
    }
    let secret = cluster.get(SECRET, "made", "pool-forebay").await.unwrap();
    assert_eq!(secret["type"], "forebay.io/runtime-key");
    let budget = cluster.get(BUDGET, "made", "pool-forebay").await.unwrap();
    let set = cluster.get(STATEFUL_SET, "made", "pool-forebay").await.unwrap();
    assert_eq!(budget["spec"]["maxUnavailable"], 1);
    assert_eq!(budget["spec"]["selector"], set["spec"]["selector"]);

    // What somebody changes is changed back, what somebody deletes is made again.
    cluster.merge(STATEFUL_SET, "made", "pool-forebay", json!({"spec": {"replicas": 7}})).await;
    cluster.wait(STATEFUL_SET, "made", "pool-forebay", |set| set["spec"]["replicas"] == 2).await;
    let ports = json!([{"name": "data", "port": 7400, "targetPort": "nowhere"}]);
    cluster.merge(SERVICE, "made", "pool-forebay", json!({"spec": {"ports": ports}})).await;
    cluster.wait(SERVICE, "made", "pool-forebay", |s| s["spec"]["ports"][0]["targetPort"] == "data").await;
    for kind in MADE {
        let before = cluster.get(kind, "made", "pool-forebay").await.unwrap()["metadata"]["uid"].clone();
        cluster.delete(kind, "made", "pool-forebay").await;
        cluster.wait(kind, "made", "pool-forebay", |object| object["metadata"]["uid"] != before).await;
    }
    cluster.scale(RUNTIME, "made", "pool", 3).await;
    cluster.wait(STATEFUL_SET, "made", "pool-forebay", |set| set["spec"]["replicas"] == 3).await;
}

pub(crate) async fn a_field_that_is_taken_back_is_gone(cluster: &Cluster) {
    let template = json!({"metadata": {"labels": {"team": "a"}}, "spec": {"nodeSelector": {"pool": "cache"}}});
    make(cluster, "fields", "pool", template).await;
    let pod = |set: &Value| set["spec"]["template"].clone();
    cluster
        .wait(STATEFUL_SET, "fields", "pool-forebay", |set| pod(set)["spec"]["nodeSelector"]["pool"] == "cache")
        .await;
    cluster.merge(RUNTIME, "fields", "pool", json!({"spec": {"template": null}})).await;
    let set =
        cluster.wait(STATEFUL_SET, "fields", "pool-forebay", |set| pod(set)["spec"]["nodeSelector"].is_null()).await;
    assert!(pod(&set)["metadata"]["labels"]["team"].is_null());
}

pub(crate) async fn the_users_own_account_replaces_ours(cluster: &Cluster) {
    make(cluster, "accounts", "pool", json!({})).await;
    cluster.wait(STATEFUL_SET, "accounts", "pool-forebay", |_| true).await;
    let template = json!({"spec": {"serviceAccountName": "reader"}});
    cluster.merge(RUNTIME, "accounts", "pool", json!({"spec": {"template": template}})).await;
    cluster.wait_until_gone(SERVICE_ACCOUNT, "accounts", "pool-forebay").await;
    let is_readers = |binding: &Value| binding["subjects"][0]["name"] == "reader";
    cluster.wait(ROLE_BINDING, "accounts", "pool-forebay", is_readers).await;
    cluster.merge(RUNTIME, "accounts", "pool", json!({"spec": {"template": null}})).await;
    cluster.wait(SERVICE_ACCOUNT, "accounts", "pool-forebay", |_| true).await;
}

pub(crate) async fn foreign_objects_are_left_alone(cluster: &Cluster) {
    cluster.namespace("foreign").await;
    let foreign = json!({"metadata": {"name": "pool-forebay"}, "spec": {"ports": [{"port": 1}]}});
    let foreign = cluster.create(SERVICE, "foreign", foreign).await;
    make(cluster, "foreign", "pool", json!({})).await;
    let named = |runtime: &Value| {
        condition(runtime, "Ready", "False")
            .is_some_and(|(reason, message)| reason == "NameTaken" && message.contains("Service pool-forebay"))
    };
    let runtime = cluster.wait(RUNTIME, "foreign", "pool", named).await;
    assert_eq!(runtime["status"]["phase"], "Failed");
    cluster.wait_for_event("foreign", "pool", "NameTaken").await;
    let same = cluster.get(SERVICE, "foreign", "pool-forebay").await.unwrap();
    assert_eq!(same["metadata"]["resourceVersion"], foreign["metadata"]["resourceVersion"]);
    // It recovers without being made again.
    cluster.delete(SERVICE, "foreign", "pool-forebay").await;
    cluster.wait(STATEFUL_SET, "foreign", "pool-forebay", |_| true).await;
    cluster.wait(RUNTIME, "foreign", "pool", |runtime| !named(runtime)).await;
}

pub(crate) async fn pods_make_the_table(cluster: &Cluster) {
    let name = "p".repeat(63);
    let set = object_name(&name);
    make(cluster, "table", &name, json!({})).await;
    let table = |runtime: &Value| runtime["status"]["table"].clone();
    start_pod(cluster, "table", &set, 0, "127.0.0.2").await;
    let one = cluster.wait(RUNTIME, "table", &name, |runtime| table(runtime)["epoch"] == 1).await;
    let member = json!({"name": format!("{set}-0"), "address": "127.0.0.2:7400", "weight": 1, "state": "Serving"});
    assert_eq!(table(&one)["members"], json!([member]));
    start_pod(cluster, "table", &set, 1, "127.0.0.3").await;
    let two = cluster.wait(RUNTIME, "table", &name, |runtime| table(runtime)["epoch"] == 2).await;
    assert_eq!(table(&two)["members"].as_array().unwrap().len(), 2);
    // Nobody listens there.
    cluster.wait(RUNTIME, "table", &name, |runtime| condition(runtime, "Ready", "False").is_some()).await;

    // What an autoscaler sees, and what it does.
    let selector =
        format!("app.kubernetes.io/component=worker,app.kubernetes.io/name=forebay,forebay.io/runtime={name}");
    assert_eq!(cluster.scale(RUNTIME, "table", &name, 1).await, (2, selector));
    let less = cluster.wait(RUNTIME, "table", &name, |runtime| table(runtime)["epoch"] == 3).await;
    assert_eq!(table(&less)["members"][1]["state"], "Draining");
    cluster.delete(POD, "table", &format!("{set}-1")).await;
    let gone = cluster.wait(RUNTIME, "table", &name, |runtime| table(runtime)["epoch"] == 4).await;
    assert_eq!(table(&gone)["members"], json!([member]));
    // A worker that is away keeps its place.
    cluster.delete(POD, "table", &format!("{set}-0")).await;
    cluster.wait(RUNTIME, "table", &name, |runtime| runtime["status"]["replicas"] == 0).await;
    let away = cluster.get(RUNTIME, "table", &name).await.unwrap();
    assert_eq!(table(&away), table(&gone));
}
