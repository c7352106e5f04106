//! Objects as JSON: get, apply, delete, wait.

use std::time::{Duration, Instant};

use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

/// How long anything may take. The longest: workers that do not answer are waited for 60 s.
const DEADLINE: Duration = Duration::from_secs(150);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub(crate) struct Cluster(Client);

/// API version, kind and plural.
pub(crate) type Kind = (&'static str, &'static str, &'static str);

pub(crate) const NAMESPACE: Kind = ("v1", "Namespace", "namespaces");
pub(crate) const POD: Kind = ("v1", "Pod", "pods");
pub(crate) const SECRET: Kind = ("v1", "Secret", "secrets");
pub(crate) const SERVICE: Kind = ("v1", "Service", "services");
pub(crate) const SERVICE_ACCOUNT: Kind = ("v1", "ServiceAccount", "serviceaccounts");
pub(crate) const CLAIM: Kind = ("v1", "PersistentVolumeClaim", "persistentvolumeclaims");
pub(crate) const VOLUME: Kind = ("v1", "PersistentVolume", "persistentvolumes");
pub(crate) const EVENT: Kind = ("events.k8s.io/v1", "Event", "events");
pub(crate) const STATEFUL_SET: Kind = ("apps/v1", "StatefulSet", "statefulsets");
pub(crate) const BUDGET: Kind = ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets");
pub(crate) const POLICY: Kind = ("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies");
pub(crate) const ROLE_BINDING: Kind = ("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings");
pub(crate) const DATASET: Kind = ("forebay.io/v1alpha1", "Dataset", "datasets");
pub(crate) const RUNTIME: Kind = ("forebay.io/v1alpha1", "CacheRuntime", "cacheruntimes");

pub(crate) const PRELOAD_POLICY: Kind = ("forebay.io/v1alpha1", "PreloadPolicy", "preloadpolicies");

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        Self(client)
    }

    pub(crate) fn client(&self) -> Client {
        self.0.clone()
    }

    fn api(&self, (api_version, kind, plural): Kind, namespace: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = ApiResource {
            group: group.into(),
            version: version.into(),
            api_version: api_version.into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        match namespace {
            "" => Api::all_with(self.0.clone(), &resource),
            namespace => Api::namespaced_with(self.0.clone(), namespace, &resource),
        }
    }

    /// Makes a namespace; one that is there stays.
    pub(crate) async fn namespace(&self, name: &str) {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let namespace: DynamicObject = serde_json::from_value(namespace).unwrap();
        let _ = self.api(NAMESPACE, "").create(&PostParams::default(), &namespace).await;
    }

    pub(crate) async fn create(&self, kind: Kind, namespace: &str, mut object: Value) -> Value {
        (object["apiVersion"], object["kind"]) = (kind.0.into(), kind.1.into());
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        json!(self.api(kind, namespace).create(&PostParams::default(), &object).await.unwrap())
    }

    /// Merges into an object, or into its status.
    pub(crate) async fn merge(&self, kind: Kind, namespace: &str, name: &str, patch: Value) {
        let api = self.api(kind, namespace);
        let (params, subresource) = (PatchParams::default(), patch.get("status").is_some());
        match subresource {
            true => api.patch_status(name, &params, &Patch::Merge(&patch)).await.unwrap(),
            false => api.patch(name, &params, &Patch::Merge(&patch)).await.unwrap(),
        };
    }

    /// Gives an object another spec; what the API server says if it refuses that.
    pub(crate) async fn respec(&self, kind: Kind, namespace: &str, name: &str, spec: &Value) -> Result<(), String> {
        let api = self.api(kind, namespace);
        loop {
            let mut object = api.get(name).await.unwrap();
            object.data["spec"] = spec.clone();
            match api.replace(name, &PostParams::default(), &object).await {
                Ok(_) => return Ok(()),
                // The operator was faster.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(kube::Error::Api(status)) if status.code == 422 => return Err(status.message.clone()),
                Err(error) => panic!("{} {namespace}/{name}: {error}", kind.1),
            }
        }
    }

    /// Scales an object, as `kubectl scale` does; replicas that there are, and the selector of their pods.
    pub(crate) async fn scale(&self, kind: Kind, namespace: &str, name: &str, replicas: u32) -> (i32, String) {
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        let scale = self.api(kind, namespace).patch_scale(name, &PatchParams::default(), &patch).await.unwrap();
        let status = scale.status.unwrap();
        (status.replicas, status.selector.unwrap_or_default())
    }

    pub(crate) async fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.api(kind, namespace).get_opt(name).await.unwrap().map(|object| json!(object))
    }

    pub(crate) async fn list(&self, kind: Kind, namespace: &str) -> Vec<Value> {
        let list = self.api(kind, namespace).list(&ListParams::default()).await.unwrap();
        list.items.into_iter().map(|object| json!(object)).collect()
    }

    pub(crate) async fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let params = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        let _ = self.api(kind, namespace).delete(name, &params).await.unwrap();
    }

    /// Waits until an object is there and `holds`.
    pub(crate) async fn wait(&self, kind: Kind, namespace: &str, name: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let object = self.get(kind, namespace, name).await;
            match object {
                Some(object) if holds(&object) => return object,
                object if began.elapsed() > DEADLINE => panic!("{} {namespace}/{name} is {object:#?}", kind.1),
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    }

    pub(crate) async fn wait_until_gone(&self, kind: Kind, namespace: &str, name: &str) {
        let began = Instant::now();
        while let Some(object) = self.get(kind, namespace, name).await {
            assert!(began.elapsed() < DEADLINE, "{} {namespace}/{name} is still there: {object:#?}", kind.1);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits for an event with this reason about an object of this name.
    pub(crate) async fn wait_for_event(&self, namespace: &str, name: &str, reason: &str) {
        let began = Instant::now();
        loop {
            let events = self.list(EVENT, namespace).await;
            if events.iter().any(|event| event["regarding"]["name"] == name && event["reason"] == reason) {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "no event {reason} about {name}: {events:#?}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Reason and message of a condition that has this status.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str, status: &str) -> Option<(&'a str, &'a str)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let condition = conditions.iter().find(|condition| condition["type"] == kind && condition["status"] == status)?;
    Some((condition["reason"].as_str()?, condition["message"].as_str()?))
}
