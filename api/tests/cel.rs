//! The CEL rules of the CRDs, run over whole objects as the API server runs them.
#![allow(clippy::unwrap_used, reason = "the helpers of these tests fail the test")]

use forebay_api::crds;
use kube::core::cel::Validator;
use serde_json::{Value, json};

fn runtime() -> Value {
    json!({
        "apiVersion": "forebay.io/v1alpha1",
        "kind": "CacheRuntime",
        "metadata": {"name": "gpu-pool"},
        "spec": {"tiers": [{"name": "nvme", "medium": "SSD", "capacity": "2Ti", "volume": {"emptyDir": {}}}]},
    })
}

fn dataset() -> Value {
    json!({
        "apiVersion": "forebay.io/v1alpha1",
        "kind": "Dataset",
        "metadata": {"name": "imagenet"},
        "spec": {
            "runtimeRef": {"name": "gpu-pool"},
            "sync": {"mode": "Periodic", "interval": "5m"},
            "cache": {"replicas": {"min": 1, "max": 2}},
            "sources": [
                {"path": "/", "uri": "s3://imagenet/", "secretRef": {"name": "reader"},
                    "s3": {"endpoint": "http://127.0.0.1:9000", "region": "eu-west-1", "addressing": "Path"}},
                {"path": "/labels", "uri": "file:///data/labels"},
            ],
        },
    })
}

fn policy() -> Value {
    json!({
        "apiVersion": "forebay.io/v1alpha1",
        "kind": "PreloadPolicy",
        "metadata": {"name": "before-work"},
        "spec": {
            "datasetRef": {"name": "imagenet"},
            "triggers": [{"datasetReady": {}}, {"schedule": {"cron": "0 5 * * 1-5", "timeZone": "Europe/Madrid"}}],
            "select": {"path": "/train", "include": ["train/**"], "maxSize": "1Gi", "minAge": "1h", "maxAge": "48h"},
            "order": "Name",
            "load": {"pin": "Always"},
            "limits": {"bandwidth": "500Mi", "requestsPerSecond": 100},
            "deadline": "2h",
            "ttlAfterFinished": "1h",
        },
    })
}

/// What the rules say of an object, with the defaults that the API server fills in before.
fn judge(object: &Value, old: Option<&Value>) -> Vec<String> {
    let crd = crds().into_iter().find(|crd| object["kind"] == crd.spec.names.kind.as_str()).unwrap();
    let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
    match Validator::new().validate(&schema["openAPIV3Schema"], object, old) {
        Ok(()) => Vec::new(),
        Err(errors) => errors.into_vec().into_iter().map(|error| error.message).collect(),
    }
}

#[test]
fn good_objects_pass() {
    assert_eq!(judge(&runtime(), None), [""; 0]);
    assert_eq!(judge(&dataset(), None), [""; 0]);
    assert_eq!(judge(&dataset(), Some(&dataset())), [""; 0]);
    assert_eq!(judge(&policy(), None), [""; 0]);
}

#[test]
fn each_rule_of_an_object_refuses() {
    let tier = |path: &str| format!("/spec/tiers/0{path}");
    let cases: Vec<(Value, String, Value, &str)> = vec![
        (dataset(), "/metadata/name".into(), json!("a.b"), "must be a DNS label"),
        (dataset(), "/metadata/name".into(), json!("a".repeat(64)), "must be a DNS label"),
        (dataset(), "/spec/runtimeRef/name".into(), json!("a.b"), "must be a DNS label"),
        (dataset(), "/spec/sources/0/secretRef/name".into(), json!("a..b"), "must be a DNS name"),
        (dataset(), "/spec/sources/1/path".into(), json!("labels"), "must be an absolute path"),
        (dataset(), "/spec/sources/0/uri".into(), json!("s3://x"), "must be s3://BUCKET"),
        (dataset(), "/spec/sources/1/uri".into(), json!("file://x"), "must be file:///"),
        (dataset(), "/spec/sources/1/uri".into(), json!("gs://bucket"), "must begin with"),
        (dataset(), "/spec/sources/1/uri".into(), json!("http://me:hush@host/"), "must be http://HOST"),
        (dataset(), "/spec/sources/1/uri".into(), json!("file:///a?b"), "must not hold"),
        (dataset(), "/spec/sources/0/s3/endpoint".into(), json!("127.0.0.1"), "must be http://"),
        (dataset(), "/spec/sources/0/s3/region".into(), json!("EU"), "must be up to 64"),
        (dataset(), "/spec/sources/1".into(), json!({"path": "/l", "uri": "file:///l", "s3": {}}), "s3 belongs to"),
        (dataset(), "/spec/sources/1".into(), json!({"path": "/l", "uri": "http://h/", "s3": {}}), "s3 belongs to"),
        (
            dataset(),
            "/spec/sources/1".into(),
            json!({"path": "/l", "uri": "file:///l", "secretRef": {"name": "a"}}),
            "secretRef belongs to",
        ),
        (policy(), "/metadata/name".into(), json!("a.b"), "must be a DNS label"),
        (policy(), "/spec/datasetRef/name".into(), json!("a.b"), "must be a DNS label"),
        (policy(), "/spec/triggers/0".into(), json!({}), "exactly one of datasetReady"),
        (
            policy(),
            "/spec/triggers/0".into(),
            json!({"datasetReady": {}, "sourceChanged": {}}),
            "exactly one of datasetReady",
        ),
        (policy(), "/spec/triggers/1/schedule/cron".into(), json!("* * * *"), "five fields"),
        (policy(), "/spec/triggers/1/schedule/timeZone".into(), json!("Europe Madrid"), "name of a time zone"),
        (policy(), "/spec/select/path".into(), json!("train"), "must be an absolute path"),
        (policy(), "/spec/deadline".into(), json!("2 hours"), "must be hours"),
        (policy(), "/spec/ttlAfterFinished".into(), json!("1d"), "must be hours"),
        (policy(), "/spec/order".into(), json!("Manifest"), "order Manifest needs select.manifest"),
        (dataset(), "/spec/cache/replicas".into(), json!({"min": 3, "max": 2}), "max must not be below min"),
        (dataset(), "/spec/sync".into(), json!({"mode": "Periodic"}), "interval goes with mode Periodic"),
        (dataset(), "/spec/sync".into(), json!({"interval": "5m"}), "interval goes with mode Periodic"),
        (dataset(), "/spec/sync".into(), json!({"mode": "Periodic", "interval": "often"}), "must be hours"),
        (runtime(), "/metadata/name".into(), json!("a".repeat(64)), "at most 63"),
        (runtime(), "/metadata/name".into(), json!("0a"), "begins with a letter"),
        (runtime(), tier("/name"), json!("A"), "must be a DNS label"),
        (runtime(), tier("/volume"), json!({}), "exactly one of"),
        (runtime(), tier("/volume"), json!({"emptyDir": {}, "hostPath": {"path": "/a"}}), "exactly one of"),
        (runtime(), tier("/volume"), json!({"hostPath": {"path": "/"}}), "below '/'"),
        (
            runtime(),
            tier(""),
            {
                let mut tier = runtime()["spec"]["tiers"][0].clone();
                tier["watermarks"] = json!({"highPercent": 85});
                tier
            },
            "lowPercent must be below",
        ),
    ];
    for (mut object, pointer, value, expected) in cases {
        *object.pointer_mut(&pointer).unwrap() = value;
        let messages = judge(&object, None);
        assert_eq!(messages.len(), 1, "{pointer}: {messages:?}");
        assert!(messages[0].contains(expected), "{pointer}: {messages:?}");
    }
}

#[test]
fn what_an_object_is_about_cannot_be_changed() {
    let mut changed = dataset();
    changed["spec"]["sync"] = json!({});
    assert_eq!(judge(&changed, Some(&dataset())), [""; 0]);
    let mut changed = dataset();
    changed["spec"]["runtimeRef"]["name"] = json!("other");
    let messages = judge(&changed, Some(&dataset()));
    assert_eq!(messages.len(), 1, "{messages:?}");
    assert!(messages[0].contains("cannot be changed"));
    let mut changed = policy();
    changed["spec"]["datasetRef"]["name"] = json!("other");
    let messages = judge(&changed, Some(&policy()));
    assert!(messages.len() == 1 && messages[0].contains("cannot be changed"), "{messages:?}");
    let mut changed = dataset();
    changed["spec"]["sources"][1]["path"] = json!("/other");
    assert_eq!(judge(&changed, Some(&dataset())), [""; 0]);
}
