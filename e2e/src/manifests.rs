//! The objects of tests, as a user would write them.

use crate::store::{ACCESS_KEY, REGION, SECRET_KEY, Store};

/// The image of reading pods: Python and coreutils, from any registry or none.
pub const TOOLS: &str = "forebay.io/e2e/trainer:1";
/// How soon a pod of a test ends.
const GRACE: u32 = 5;

/// A CacheRuntime with an emptyDir.
pub fn runtime(name: &str, replicas: u32, capacity: &str) -> String {
    format!(
        "apiVersion: forebay.io/v1alpha1
kind: CacheRuntime
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  tiers:
  - {{name: disk, medium: SSD, capacity: {capacity}, volume: {{emptyDir: {{}}}}}}
---
"
    )
}

/// The Secret `s3`.
pub fn secret(secret_key: &str) -> String {
    format!(
        "apiVersion: v1
kind: Secret
metadata: {{name: s3}}
stringData: {{accessKeyId: {ACCESS_KEY}, secretAccessKey: {secret_key}}}
---
"
    )
}

/// A source of the store.
pub fn source(path: &str, bucket: &str, endpoint: &str) -> String {
    format!(
        "  - path: {path}
    uri: s3://{bucket}/
    secretRef: {{name: s3}}
    s3: {{endpoint: \"{endpoint}\", region: {REGION}, addressing: Path}}
"
    )
}

/// A Dataset of these sources.
pub fn dataset(name: &str, runtime: &str, sources: &str) -> String {
    format!(
        "apiVersion: forebay.io/v1alpha1
kind: Dataset
metadata: {{name: {name}}}
spec:
  runtimeRef: {{name: {runtime}}}
  sources:
{sources}---
"
    )
}

/// A PreloadPolicy of the Dataset `data`, with a line of its spec.
pub fn preload_policy(name: &str, line: &str) -> String {
    format!(
        "apiVersion: forebay.io/v1alpha1
kind: PreloadPolicy
metadata: {{name: {name}}}
spec:
  datasetRef: {{name: data}}
  {line}
---
"
    )
}

/// What most tests begin with: the runtime `cache`, the Secret, and the Dataset `data` over a bucket.
pub fn usual(store: &Store, bucket: &str, workers: u32) -> String {
    runtime("cache", workers, "1Gi") + &secret(SECRET_KEY) + &dataset("data", "cache", &source("/", bucket, &store.url))
}

/// A pod that does something with the claim of a Dataset at /data, on a node if one is named.
pub fn pod(name: &str, claim: &str, node: Option<&str>, command: &[&str]) -> String {
    let command = serde_json::to_string(command).unwrap_or_default();
    let node = node.map(|node| format!("  nodeSelector: {{kubernetes.io/hostname: {node}}}\n")).unwrap_or_default();
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: reader}}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: {GRACE}
{node}  containers:
  - name: main
    image: {TOOLS}
    command: {command}
    volumeMounts:
    - {{name: data, mountPath: /data, readOnly: true}}
    - {{name: code, mountPath: /code}}
  volumes:
  - {{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}
  - {{name: code, configMap: {{name: code}}}}
---
"
    )
}
