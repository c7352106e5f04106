//! Deletion of Datasets, in each order.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    cluster::{CLAIM, Cluster, DATASET, NAMESPACE, POD, RUNTIME, STATEFUL_SET, VOLUME, condition},
    datasets::{make, wait_for_claim},
    runtimes::{self, start_pod},
};

/// Namespace that goes.
pub(crate) const GOING: &str = "going";
/// How long workers that do not answer are waited for.
const FORGET: Duration = Duration::from_secs(60);

pub(crate) async fn delete(cluster: &Cluster, namespace: &str, name: &str) {
    cluster.delete(DATASET, namespace, name).await;
}

/// Nothing of it is left. There is nobody here who would take the finalizers of claims and volumes away.
pub(crate) async fn wait_until_gone(cluster: &Cluster, namespace: &str, name: &str) {
    let uid = cluster.get(DATASET, namespace, name).await.map(|dataset| dataset["metadata"]["uid"].clone());
    release_claim(cluster, namespace, name).await;
    let volume = uid.as_ref().and_then(Value::as_str).map(|uid| format!("forebay-{uid}"));
    if let Some(volume) = &volume {
        release_volume(cluster, volume).await;
    }
    cluster.wait_until_gone(DATASET, namespace, name).await;
    assert!(cluster.get(CLAIM, namespace, name).await.is_none());
    if let Some(volume) = &volume {
        assert!(cluster.get(VOLUME, "", volume).await.is_none());
    }
}

async fn release_claim(cluster: &Cluster, namespace: &str, name: &str) {
    if cluster.get(CLAIM, namespace, name).await.is_some() {
        cluster.wait(CLAIM, namespace, name, |claim| claim["metadata"]["deletionTimestamp"].is_string()).await;
        cluster.merge(CLAIM, namespace, name, json!({"metadata": {"finalizers": null}})).await;
    }
}

async fn release_volume(cluster: &Cluster, name: &str) {
    if cluster.get(VOLUME, "", name).await.is_some() {
        cluster.wait(VOLUME, "", name, |volume| volume["metadata"]["deletionTimestamp"].is_string()).await;
        cluster.merge(VOLUME, "", name, json!({"metadata": {"finalizers": null}})).await;
    }
}

/// A CacheRuntime without pods, and a Dataset on it with its claim.
async fn make_both(cluster: &Cluster, namespace: &str) -> String {
    runtimes::make(cluster, namespace, "pool", json!({})).await;
    let uid = make(cluster, namespace, "pictures").await;
    wait_for_claim(cluster, namespace, "pictures").await;
    cluster.wait(STATEFUL_SET, namespace, "pool-forebay", |_| true).await;
    uid
}

pub(crate) async fn the_dataset_before_its_runtime(cluster: &Cluster) {
    make_both(cluster, "dataset-first").await;
    delete(cluster, "dataset-first", "pictures").await;
    wait_until_gone(cluster, "dataset-first", "pictures").await;
    cluster.delete(RUNTIME, "dataset-first", "pool").await;
    cluster.wait_until_gone(RUNTIME, "dataset-first", "pool").await;
}

pub(crate) async fn the_runtime_before_its_dataset(cluster: &Cluster) {
    make_both(cluster, "runtime-first").await;
    // With a worker that would have been waited for.
    start_pod(cluster, "runtime-first", "pool-forebay", 0, "127.0.0.4").await;
    cluster.wait(RUNTIME, "runtime-first", "pool", |runtime| runtime["status"]["table"]["epoch"] == 1).await;
    cluster.delete(RUNTIME, "runtime-first", "pool").await;
    cluster.wait_until_gone(RUNTIME, "runtime-first", "pool").await;
    let told = |dataset: &Value| condition(dataset, "Ready", "False").is_some_and(|(r, _)| r == "RuntimeNotFound");
    let dataset = cluster.wait(DATASET, "runtime-first", "pictures", told).await;
    assert_eq!(dataset["status"]["claimName"], "pictures");
    let began = Instant::now();
    delete(cluster, "runtime-first", "pictures").await;
    wait_until_gone(cluster, "runtime-first", "pictures").await;
    assert!(began.elapsed() < FORGET, "nobody is waited for: {:?}", began.elapsed());
}

pub(crate) async fn the_claim_before_its_dataset(cluster: &Cluster) {
    let volume = format!("forebay-{}", make_both(cluster, "claim-first").await);
    let before = cluster.get(CLAIM, "claim-first", "pictures").await.unwrap()["metadata"]["uid"].clone();
    cluster.delete(CLAIM, "claim-first", "pictures").await;
    release_claim(cluster, "claim-first", "pictures").await;
    // Made again, and the volume is its own.
    let again = |claim: &Value| claim["metadata"]["uid"] != before;
    let uid = cluster.wait(CLAIM, "claim-first", "pictures", again).await["metadata"]["uid"].clone();
    cluster.wait(VOLUME, "", &volume, |volume| volume["spec"]["claimRef"]["uid"] == uid).await;
    delete(cluster, "claim-first", "pictures").await;
    wait_until_gone(cluster, "claim-first", "pictures").await;
}

pub(crate) async fn the_claim_is_in_use(cluster: &Cluster) {
    let uid = make(cluster, "used", "pictures").await;
    wait_for_claim(cluster, "used", "pictures").await;
    let volumes = json!([{"name": "data", "persistentVolumeClaim": {"claimName": "pictures"}}]);
    let spec = json!({"containers": [{"name": "c", "image": "a"}], "volumes": volumes, "nodeName": "nowhere"});
    cluster.create(POD, "used", json!({"metadata": {"name": "train"}, "spec": spec})).await;
    delete(cluster, "used", "pictures").await;
    let named = |dataset: &Value| {
        condition(dataset, "Progressing", "True")
            .is_some_and(|(reason, message)| reason == "Deleting" && message.contains("in use by pods train"))
    };
    let dataset = cluster.wait(DATASET, "used", "pictures", named).await;
    // Workers serve it until the claim is gone.
    assert_eq!(dataset["status"]["claimName"], "pictures");
    let volume = cluster.get(VOLUME, "", &format!("forebay-{uid}")).await.unwrap();
    assert!(volume["metadata"]["deletionTimestamp"].is_null());
    cluster.wait_for_event("used", "pictures", "Deleting").await;
    cluster.delete(POD, "used", "train").await;
    wait_until_gone(cluster, "used", "pictures").await;
}

/// They may hold something of it: they are waited for, but not for ever.
pub(crate) async fn workers_that_never_answer(cluster: &Cluster) {
    make_both(cluster, "silent").await;
    start_pod(cluster, "silent", "pool-forebay", 0, "127.0.0.5").await;
    cluster.wait(RUNTIME, "silent", "pool", |runtime| runtime["status"]["table"]["epoch"] == 1).await;
    delete(cluster, "silent", "pictures").await;
    let began = Instant::now();
    wait_until_gone(cluster, "silent", "pictures").await;
    assert!(began.elapsed() > FORGET, "gone after {:?}", began.elapsed());
}

pub(crate) async fn the_finalizer_is_removed_by_force(cluster: &Cluster) {
    let uid = make(cluster, "forced", "pictures").await;
    wait_for_claim(cluster, "forced", "pictures").await;
    delete(cluster, "forced", "pictures").await;
    cluster.merge(DATASET, "forced", "pictures", json!({"metadata": {"finalizers": null}})).await;
    release_volume(cluster, &format!("forebay-{uid}")).await;
    cluster.wait_until_gone(VOLUME, "", &format!("forebay-{uid}")).await;
}

/// Nothing can be made in it any more, and that is not said again and again; what is in it can be deleted.
pub(crate) async fn the_namespace_goes(cluster: &Cluster) {
    make_both(cluster, GOING).await;
    cluster.delete(NAMESPACE, "", GOING).await;
    cluster.delete(STATEFUL_SET, GOING, "pool-forebay").await;
    cluster.delete(CLAIM, GOING, "pictures").await;
    release_claim(cluster, GOING, "pictures").await;
    // Time to try.
    tokio::time::sleep(Duration::from_secs(3)).await;
    for (kind, name) in [(STATEFUL_SET, "pool-forebay"), (CLAIM, "pictures")] {
        assert!(cluster.get(kind, GOING, name).await.is_none());
    }
    delete(cluster, GOING, "pictures").await;
    cluster.delete(RUNTIME, GOING, "pool").await;
    wait_until_gone(cluster, GOING, "pictures").await;
    cluster.wait_until_gone(RUNTIME, GOING, "pool").await;
}
