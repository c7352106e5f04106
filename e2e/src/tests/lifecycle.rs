//! Names, and objects that come and go in every order.

use anyhow::ensure;

use crate::{
    Env, Outcome, TestResult, data,
    kubectl::text,
    manifests::{dataset, runtime, secret, source},
    runner::say,
    store::SECRET_KEY,
    wait::{eventually, stays, until},
};

/// 63-character names, two that differ only in their last character, and equal names in two namespaces.
pub fn long_names_and_equal_names(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    env.store.fill(ns, &files)?;
    let stem = "n".repeat(62);
    let names = [format!("{stem}a"), format!("{stem}b")];
    let mut manifests = secret(SECRET_KEY);
    for name in &names {
        manifests += &(runtime(name, 1, "1Gi") + &dataset(name, name, &source("/", ns, &env.store.url)));
    }
    env.kubectl.apply(ns, &manifests)?;
    for (index, name) in names.iter().enumerate() {
        let dataset = format!("dataset/{name}");
        env.kubectl.ready(ns, &dataset, 90)?;
        let reader = format!("reader-{index}");
        env.reader_of(ns, &reader, name, None, &[])?;
        env.read_once(ns, &reader, &files)?;
    }
    // The same names over there, with other contents; deleting them over there changes nothing here.
    let there = format!("{ns}-there");
    env.kubectl.remove_namespace(&there)?;
    env.kubectl.run(&["create", "namespace", &there])?;
    let result = (|| -> anyhow::Result<()> {
        let others = data::small(5, 1);
        env.store.fill(&there, &others)?;
        let name = &names[0];
        let source = source("/", &there, &env.store.url);
        env.kubectl.apply(&there, &(runtime(name, 1, "1Gi") + &secret(SECRET_KEY) + &dataset(name, name, &source)))?;
        env.reader_of(&there, "reader", name, None, &[])?;
        env.read_once(&there, "reader", &others).map(drop)
    })();
    env.kubectl.remove_namespace(&there)?;
    result?;
    env.reader_of(ns, "again", &names[0], None, &[])?;
    env.read_once(ns, "again", &files)?;
    Ok(Outcome::Passed)
}

/// A claim of the Dataset's name that is somebody else's stays so; when it is gone, the Dataset gets its own.
pub fn a_foreign_claim_is_not_adopted(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    let foreign = "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec:
  accessModes: [ReadOnlyMany]
  storageClassName: none-such
  resources: {requests: {storage: 1Gi}}
";
    env.kubectl.apply(ns, foreign)?;
    let uid = text(&env.kubectl.get(ns, "pvc", "data")?["metadata"]["uid"]);
    env.usual(ns, &files, 1)?;
    let condition = eventually("the Dataset says that the claim's name is taken", 30, || {
        let condition = env.kubectl.condition(ns, "dataset", "data", "Ready")?;
        Ok(condition.filter(|condition| condition.reason == "ClaimNameTaken"))
    })?;
    say!("{}", condition.message);
    stays("the foreign claim is untouched", 5, || {
        let claim = env.kubectl.get(ns, "pvc", "data")?;
        Ok(text(&claim["metadata"]["uid"]) == uid && claim["spec"]["volumeName"].is_null())
    })?;
    env.kubectl.delete(ns, "pvc", "data")?;
    env.kubectl.ready(ns, "dataset/data", 60)?;
    env.reader(ns, "reader", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    Ok(Outcome::Passed)
}

/// Nothing of ours is left in a namespace: no claim, no volume, no worker.
fn all_gone(env: &Env, ns: &str) -> anyhow::Result<()> {
    until("nothing of Forebay is left", 90, || {
        let here = env.kubectl.run(&[
            "--namespace",
            ns,
            "get",
            "pvc,statefulset,service,pdb,networkpolicy,serviceaccount,rolebinding,secret,pod",
            "--selector=app.kubernetes.io/managed-by=forebay-operator",
            "-o",
            "name",
        ])?;
        let volumes = env.kubectl.list(ns, "pv", "app.kubernetes.io/managed-by=forebay-operator")?;
        let ours = volumes.iter().filter(|volume| volume["spec"]["claimRef"]["namespace"] == ns).count();
        ensure!(
            here.trim().is_empty() && ours == 0,
            "{ours} volumes, and {}",
            here.split_whitespace().collect::<Vec<_>>().join(" ")
        );
        Ok(true)
    })
}

/// Dataset, CacheRuntime and pod are deleted in each of the six orders, without waiting in between.
pub fn objects_go_in_every_order(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    let objects = [("dataset", "data"), ("cacheruntime", "cache"), ("pod", "reader")];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        env.usual(ns, &files, 1)?;
        env.reader(ns, "reader", None, &["--loop"])?;
        for index in order {
            let (kind, name) = objects[index];
            env.kubectl.delete_later(ns, kind, name)?;
        }
        for (kind, name) in objects {
            until(&format!("{kind} {name} is gone (order {order:?})"), 90, || {
                Ok(env.kubectl.find(ns, kind, name)?.is_none())
            })?;
        }
        all_gone(env, ns)?;
    }
    Ok(Outcome::Passed)
}

/// What is deleted while the operator is away is cleaned up when it is back; so is what was made meanwhile.
pub fn objects_go_while_the_operator_is_away(env: &Env, ns: &str) -> TestResult {
    let files = data::small(12, 2);
    env.usual_ready(ns, &files, 1)?;
    let scale = |replicas: u32| {
        let replicas = format!("--replicas={replicas}");
        env.kubectl.run(&["--namespace", &env.system, "scale", "deployment/forebay-operator", &replicas])
    };
    scale(0)?;
    let result = (|| -> anyhow::Result<()> {
        until("the operator is away", 60, || {
            Ok(env.kubectl.list(&env.system, "pods", "app.kubernetes.io/component=operator")?.is_empty())
        })?;
        env.kubectl.delete_later(ns, "dataset", "data")?;
        env.kubectl.delete_later(ns, "cacheruntime", "cache")?;
        env.kubectl
            .apply(ns, &(runtime("other", 1, "1Gi") + &dataset("more", "other", &source("/", ns, &env.store.url))))?;
        Ok(())
    })();
    scale(2)?;
    result?;
    until("the deleted Dataset is gone", 90, || Ok(env.kubectl.find(ns, "dataset", "data")?.is_none()))?;
    env.kubectl.ready(ns, "dataset/more", 90)?;
    env.reader_of(ns, "reader", "more", None, &[])?;
    env.read_once(ns, "reader", &files)?;
    env.kubectl.delete(ns, "pod", "reader")?;
    env.kubectl.delete(ns, "dataset", "more")?;
    env.kubectl.delete(ns, "cacheruntime", "other")?;
    all_gone(env, ns)?;
    Ok(Outcome::Passed)
}
