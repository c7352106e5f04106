//! Datasets.

use serde_json::{Value, json};

use crate::{
    cluster::{CLAIM, Cluster, DATASET, VOLUME, condition},
    deletion::{delete, wait_until_gone},
};

pub(crate) async fn make(cluster: &Cluster, namespace: &str, name: &str) -> String {
    cluster.namespace(namespace).await;
    let spec = json!({"runtimeRef": {"name": "pool"}, "sources": [{"path": "/", "uri": "file:///data"}]});
    let dataset = cluster.create(DATASET, namespace, json!({"metadata": {"name": name}, "spec": spec})).await;
    dataset["metadata"]["uid"].as_str().unwrap().to_owned()
}

pub(crate) async fn wait_for_claim(cluster: &Cluster, namespace: &str, name: &str) {
    cluster.wait(DATASET, namespace, name, |dataset| dataset["status"]["claimName"] == name).await;
}

pub(crate) async fn a_claim_and_its_volume(cluster: &Cluster) {
    let uid = make(cluster, "claims", "pictures").await;
    let volume_name = format!("forebay-{uid}");
    let claim = cluster.wait(CLAIM, "claims", "pictures", |_| true).await;
    assert_eq!(claim["spec"]["volumeName"], volume_name);
    assert_eq!(claim["metadata"]["ownerReferences"][0]["uid"], uid);
    let volume = cluster.wait(VOLUME, "", &volume_name, |_| true).await;
    assert_eq!(volume["spec"]["claimRef"]["uid"], claim["metadata"]["uid"]);
    assert_eq!(volume["spec"]["csi"]["volumeHandle"], uid);
    // The binder looks at a claim that changes.
    let touched = |claim: &Value| claim["metadata"]["annotations"]["forebay.io/touched"].is_string();
    cluster.wait(CLAIM, "claims", "pictures", touched).await;
    let waits = |dataset: &Value| condition(dataset, "Ready", "False").is_some_and(|(r, _)| r == "RuntimeNotFound");
    let dataset = cluster.wait(DATASET, "claims", "pictures", waits).await;
    assert_eq!((&dataset["status"]["phase"], &dataset["status"]["claimName"]), (&json!("Pending"), &json!("pictures")));
    assert_eq!(dataset["status"]["observedGeneration"], dataset["metadata"]["generation"]);
    cluster.wait_for_event("claims", "pictures", "RuntimeNotFound").await;

    delete(cluster, "claims", "pictures").await;
    wait_until_gone(cluster, "claims", "pictures").await;
    cluster.wait_until_gone(VOLUME, "", &volume_name).await;
}

pub(crate) async fn a_foreign_claim_is_left_alone(cluster: &Cluster) {
    cluster.namespace("taken").await;
    let spec = json!({"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1"}}});
    let foreign = cluster.create(CLAIM, "taken", json!({"metadata": {"name": "pictures"}, "spec": spec})).await;
    make(cluster, "taken", "pictures").await;
    let named = |dataset: &Value| condition(dataset, "Ready", "False").is_some_and(|(r, _)| r == "ClaimNameTaken");
    let dataset = cluster.wait(DATASET, "taken", "pictures", named).await;
    assert_eq!(dataset["status"]["phase"], "Failed");
    assert!(dataset["status"]["claimName"].is_null());
    cluster.wait_for_event("taken", "pictures", "ClaimNameTaken").await;
    let same = cluster.get(CLAIM, "taken", "pictures").await.unwrap();
    assert_eq!(same["metadata"]["resourceVersion"], foreign["metadata"]["resourceVersion"]);
    // Nor is it deleted with the Dataset.
    delete(cluster, "taken", "pictures").await;
    cluster.wait_until_gone(DATASET, "taken", "pictures").await;
    let same = cluster.get(CLAIM, "taken", "pictures").await.unwrap();
    assert_eq!(same["metadata"]["resourceVersion"], foreign["metadata"]["resourceVersion"]);
}

pub(crate) async fn equal_names_in_two_namespaces(cluster: &Cluster) {
    let uids = [make(cluster, "one", "same").await, make(cluster, "two", "same").await];
    for (namespace, uid) in ["one", "two"].into_iter().zip(&uids) {
        let claim = cluster.wait(CLAIM, namespace, "same", |_| true).await;
        let volume = cluster.wait(VOLUME, "", &format!("forebay-{uid}"), |_| true).await;
        assert_eq!(volume["spec"]["claimRef"]["uid"], claim["metadata"]["uid"]);
        assert_eq!(volume["spec"]["csi"]["volumeAttributes"]["name"], format!("{namespace}/same"));
    }
    // One goes, the other one stays.
    delete(cluster, "one", "same").await;
    wait_until_gone(cluster, "one", "same").await;
    let other = cluster.get(CLAIM, "two", "same").await.unwrap();
    assert!(other["metadata"]["deletionTimestamp"].is_null());
    assert!(cluster.get(VOLUME, "", &format!("forebay-{}", uids[1])).await.is_some());
}

pub(crate) async fn names_of_63_characters(cluster: &Cluster) {
    let name = format!("{}9", "d".repeat(62));
    make(cluster, "long", &name).await;
    let claim = cluster.wait(CLAIM, "long", &name, |_| true).await;
    assert_eq!(claim["metadata"]["labels"]["forebay.io/dataset"], name);
}

pub(crate) async fn the_volume_grows_with_the_dataset(cluster: &Cluster) {
    let uid = make(cluster, "sizes", "pictures").await;
    let capacity = |volume: &Value| volume["spec"]["capacity"]["storage"].clone();
    let volume = format!("forebay-{uid}");
    cluster.wait(VOLUME, "", &volume, |volume| capacity(volume) == "1Gi").await;
    // As if its files had been counted.
    wait_for_claim(cluster, "sizes", "pictures").await;
    cluster.merge(DATASET, "sizes", "pictures", json!({"status": {"bytes": 5_u64 << 30}})).await;
    cluster.wait(VOLUME, "", &volume, |volume| capacity(volume) == "5Gi").await;
}
