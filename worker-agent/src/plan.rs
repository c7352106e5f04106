//! From objects to the contents of the worker's files. Pure: no clock, no network.

use std::collections::{BTreeSet, HashMap};

use forebay_api::{Addressing, CacheRuntime, Dataset, MemberState as ApiState, Quantity, Source};
use forebay_cache_worker::{
    DatasetConfig, DatasetsFile, Policy, Replicas, RequestBudget, SourceConfig, SourceProblem, TableFile, VolumeShape,
};
use forebay_protocol::{
    DatasetId,
    table::{Member, MemberState},
};
use forebay_under_store::{S3Addressing, S3Credentials, S3Options, SourceSpec};
use uuid::Uuid;

/// What is known of a Secret.
#[derive(Clone, PartialEq)]
pub(crate) enum Credentials {
    /// They are complete.
    Known(S3Credentials),
    /// There is no such Secret.
    Missing,
    /// The API server says that this worker may not read it.
    Forbidden,
    /// It has no or no readable key of this name.
    Incomplete(&'static str),
}

/// Reasons, as a Dataset's conditions show them.
const SECRET_NOT_FOUND: &str = "SecretNotFound";
const SECRET_INVALID: &str = "SecretInvalid";

/// Whether workers serve a Dataset: from its creation until its claim and its volume are gone.
pub(crate) fn is_served(dataset: &Dataset) -> bool {
    let has_claim = dataset.status.as_ref().is_some_and(|status| status.claim_name.is_some());
    dataset.metadata.deletion_timestamp.is_none() || has_claim
}

/// Names of the Secrets that Datasets need.
pub(crate) fn secrets<'a>(datasets: impl IntoIterator<Item = &'a Dataset>) -> BTreeSet<String> {
    let sources = datasets.into_iter().flat_map(|dataset| &dataset.spec.sources);
    sources.filter_map(|source| Some(source.secret_ref.as_ref()?.name.clone())).collect()
}

/// Whether a Dataset's status says that its credentials are not right: then Secrets are looked at more often.
pub(crate) fn complains_of_credentials(dataset: &Dataset) -> bool {
    let conditions = dataset.status.iter().flat_map(|status| &status.conditions);
    conditions
        .filter(|condition| condition.status == if condition.type_ == "Degraded" { "True" } else { "False" })
        .any(|condition| matches!(condition.reason.as_str(), "CredentialsInvalid" | SECRET_NOT_FOUND | SECRET_INVALID))
}

/// The table, when the runtime has one.
pub(crate) fn table(runtime: &CacheRuntime) -> Option<TableFile> {
    let table = runtime.status.as_ref()?.table.as_ref()?;
    let members = table.members.iter().map(|member| Member {
        name: member.name.clone(),
        address: member.address.clone(),
        weight: member.weight,
        state: match member.state {
            ApiState::Serving => MemberState::Serving,
            ApiState::Draining => MemberState::Draining,
        },
    });
    Some(TableFile {
        epoch: table.epoch,
        members: members.collect(),
        runtime_uid: runtime.metadata.uid.clone().unwrap_or_default(),
    })
}

/// The datasets, each with its share of the quota. `replicas`: the workers that share it.
pub(crate) fn datasets<'a>(
    datasets: impl IntoIterator<Item = &'a Dataset>,
    secrets: &HashMap<String, Credentials>,
    replicas: u32,
) -> DatasetsFile {
    let configs = datasets.into_iter().filter_map(|dataset| {
        let meta = &dataset.metadata;
        // Each worker has its part.
        let part = |quantity: &Quantity| Some(quantity.bytes().ok()?.div_ceil(u64::from(replicas.max(1))));
        let cache = &dataset.spec.cache;
        Some(DatasetConfig {
            // The API server makes UIDs, and names every object.
            id: DatasetId(Uuid::parse_str(meta.uid.as_deref()?).ok()?),
            namespace: meta.namespace.clone()?,
            name: meta.name.clone()?,
            sources: dataset.spec.sources.iter().map(|source| source_config(source, secrets)).collect(),
            policy: policy(cache.policy),
            quota: cache.quota.as_ref().and_then(part),
            reserve: cache.reserve.as_ref().and_then(part).unwrap_or_default(),
            priority: cache.priority,
            shape: shape(dataset.spec.volume.shape),
            ttl: cache.ttl(),
            replicas: self::replicas(cache.replicas),
            sync_interval: dataset.spec.sync.interval(),
        })
    });
    let mut datasets: Vec<DatasetConfig> = configs.collect();
    // One order, so that equal contents are equal bytes.
    datasets.sort_by_key(|dataset| dataset.id);
    DatasetsFile { datasets }
}

/// As the worker is told it.
pub fn policy(policy: forebay_api::Policy) -> Policy {
    match policy {
        forebay_api::Policy::Hold => Policy::Hold,
        forebay_api::Policy::Lru => Policy::Lru,
        forebay_api::Policy::Lfu => Policy::Lfu,
        forebay_api::Policy::Sieve => Policy::Sieve,
        forebay_api::Policy::Fifo => Policy::Fifo,
    }
}

/// As the worker is told it.
pub fn request_budget(budget: forebay_api::RequestBudget) -> RequestBudget {
    let forebay_api::RequestBudget { get_per_second, list_per_second, head_per_second } = budget;
    RequestBudget { get_per_second, list_per_second, head_per_second }
}

/// As the worker is told it.
pub fn replicas(replicas: forebay_api::Replicas) -> Replicas {
    Replicas { min: replicas.min, max: replicas.most() }
}

/// As the worker is told it.
pub fn shape(shape: forebay_api::VolumeShape) -> VolumeShape {
    match shape {
        forebay_api::VolumeShape::Auto => VolumeShape::Auto,
        forebay_api::VolumeShape::Large => VolumeShape::Large,
        forebay_api::VolumeShape::Small => VolumeShape::Small,
    }
}

fn source_config(source: &Source, secrets: &HashMap<String, Credentials>) -> SourceConfig {
    let mut credentials = None;
    let mut problem = None;
    if let Some(secret) = &source.secret_ref {
        let name = &secret.name;
        let said = |reason: &str, message: String| Some(SourceProblem { reason: reason.to_owned(), message });
        match secrets.get(name) {
            Some(Credentials::Known(known)) => credentials = Some(known.clone()),
            Some(Credentials::Incomplete(key)) => {
                problem = said(SECRET_INVALID, format!("Secret {name} has no key {key} with a plain text; add it"));
            }
            Some(Credentials::Forbidden) => {
                let message = format!("Secret {name} may not be read by the workers; let their ServiceAccount get it");
                problem = said(SECRET_NOT_FOUND, message);
            }
            Some(Credentials::Missing) | None => {
                problem = said(SECRET_NOT_FOUND, format!("Secret {name} does not exist; create it in this namespace"));
            }
        }
    }
    let s3 = source.s3.as_ref().map(|s3| S3Options {
        endpoint: s3.endpoint.clone(),
        region: s3.region.clone(),
        addressing: s3.addressing.map(|addressing| match addressing {
            Addressing::Path => S3Addressing::Path,
            Addressing::VirtualHost => S3Addressing::VirtualHost,
        }),
    });
    SourceConfig {
        path: source.path.clone(),
        spec: SourceSpec { uri: source.uri.clone(), s3, credentials },
        request_budget: request_budget(source.request_budget.unwrap_or_default()),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const UID: &str = "7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11";

    fn dataset(spec: Value, more: Value) -> Dataset {
        let mut object = json!({
            "apiVersion": "forebay.io/v1alpha1", "kind": "Dataset",
            "metadata": {"name": "data", "namespace": "vision", "uid": UID},
            "spec": spec,
        });
        for (key, value) in more.as_object().unwrap() {
            match object[key].as_object_mut() {
                Some(old) => old.extend(value.as_object().unwrap().clone()),
                None => object[key] = value.clone(),
            }
        }
        serde_json::from_value(object).unwrap()
    }

    fn usual() -> Value {
        json!({
            "runtimeRef": {"name": "cache"},
            "sources": [
                {"path": "/", "uri": "s3://bucket/", "secretRef": {"name": "s3"},
                 "s3": {"endpoint": "http://store:9000", "region": "us-east-1", "addressing": "Path"}},
                {"path": "/labels", "uri": "s3://labels/", "secretRef": {"name": "other"}},
            ],
            "cache": {"quota": "10"},
        })
    }

    fn known() -> Credentials {
        Credentials::Known(S3Credentials {
            access_key_id: "key".into(),
            secret_access_key: "hunter2".into(),
            session_token: None,
        })
    }

    #[test]
    fn a_dataset_is_served_with_its_credentials_and_its_share_of_the_quota() {
        let dataset = dataset(usual(), json!({}));
        assert_eq!(secrets([&dataset]).into_iter().collect::<Vec<_>>(), ["other", "s3"]);
        let known =
            HashMap::from([("s3".to_owned(), known()), ("other".to_owned(), Credentials::Incomplete("accessKeyId"))]);
        let file = datasets([&dataset], &known, 3);
        let [config] = file.datasets.as_slice() else { panic!() };
        assert_eq!(config.id.to_string(), UID);
        assert_eq!((config.namespace.as_str(), config.name.as_str(), config.quota), ("vision", "data", Some(4)));
        let [first, second] = config.sources.as_slice() else { panic!() };
        assert!(first.problem.is_none() && first.spec.credentials.is_some());
        assert_eq!(first.spec.s3.as_ref().unwrap().addressing, Some(S3Addressing::Path));
        assert_eq!(second.problem.as_ref().unwrap().reason, SECRET_INVALID);
        assert!(second.spec.credentials.is_none());
    }

    #[test]
    fn a_missing_secret_is_the_problem_of_its_source_alone() {
        let file = datasets([&dataset(usual(), json!({}))], &HashMap::from([("s3".to_owned(), known())]), 1);
        let sources = &file.datasets[0].sources;
        assert!(sources[0].problem.is_none());
        let problem = sources[1].problem.as_ref().unwrap();
        assert_eq!(problem.reason, SECRET_NOT_FOUND);
        assert!(problem.message.contains("Secret other"), "{}", problem.message);
    }

    #[test]
    fn what_the_workers_write_they_read() {
        let secrets = HashMap::from([("s3".to_owned(), known()), ("other".to_owned(), Credentials::Forbidden)]);
        let file = datasets([&dataset(usual(), json!({}))], &secrets, 1);
        assert_eq!(file.datasets[0].sources[1].problem.as_ref().unwrap().reason, SECRET_NOT_FOUND);
        let text = serde_json::to_vec(&file).unwrap();
        assert_eq!(serde_json::from_slice::<DatasetsFile>(&text).unwrap(), file);
        assert!(!format!("{file:?}").contains("hunter2"));
    }

    #[test]
    fn a_dataset_that_is_to_go_is_served_until_its_claim_is_gone() {
        let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"claimName": "data"}});
        assert!(is_served(&dataset(usual(), json!({}))));
        assert!(is_served(&dataset(usual(), going)));
        let gone = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {}});
        assert!(!is_served(&dataset(usual(), gone)));
    }

    #[test]
    fn bad_credentials_are_seen_in_the_status() {
        let says = |kind: &str, status: &str, reason: &str| {
            let condition = json!({"type": kind, "status": status, "reason": reason, "message": "",
                                   "lastTransitionTime": "2026-01-01T00:00:00Z"});
            complains_of_credentials(&dataset(usual(), json!({"status": {"conditions": [condition]}})))
        };
        assert!(says("Degraded", "True", "CredentialsInvalid"));
        assert!(says("Ready", "False", "SecretNotFound"));
        assert!(!says("Degraded", "False", "CredentialsInvalid"));
        assert!(!says("Ready", "False", "SourceUnreachable"));
    }

    #[test]
    fn the_table_carries_whose_it_is() {
        let runtime: CacheRuntime = serde_json::from_value(json!({
            "apiVersion": "forebay.io/v1alpha1", "kind": "CacheRuntime",
            "metadata": {"name": "cache", "uid": "u-1"},
            "spec": {"replicas": 2, "tiers": [
                {"name": "disk", "medium": "SSD", "capacity": "1Gi", "volume": {"emptyDir": {}}}]},
            "status": {"table": {"epoch": 4, "members": [
                {"name": "cache-forebay-0", "address": "10.0.0.1:7400", "weight": 1, "state": "Serving"},
                {"name": "cache-forebay-1", "address": "10.0.0.2:7400", "weight": 1, "state": "Draining"}]}},
        }))
        .unwrap();
        let table = table(&runtime).unwrap();
        assert_eq!((table.epoch, table.runtime_uid.as_str()), (4, "u-1"));
        assert_eq!(table.members[0].state, MemberState::Serving);
        assert_eq!(table.members[1].state, MemberState::Draining);
        assert_eq!(table.members[1].address, "10.0.0.2:7400");
    }
}
