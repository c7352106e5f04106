//! What a volume shows: which Dataset, served by whom, under which key. From a volume's context and secrets to the
//! configuration that a FUSE daemon gets.

use std::{
    collections::HashMap,
    time::{SystemTime, UNIX_EPOCH},
};

use forebay_protocol::handshake::RuntimeKey;
use serde::Serialize;
use uuid::Uuid;

use crate::error::VolumeError;

/// Volume attributes of a PersistentVolume: the UID of the Dataset. Of an inline volume: its name.
pub const DATASET: &str = "dataset";
/// `namespace/name` of the Dataset.
pub const NAME: &str = "name";
/// `host:port` that leads to some of the workers; in the Secret as well.
pub const SERVICE: &str = "service";
/// In the Secret: the runtime's key.
const KEY: &str = "key";
/// What the kubelet adds begins with it.
const KUBERNETES: &str = "csi.storage.k8s.io/";
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
/// Longest DNS name.
const MAX_HOST: usize = 253;

/// The Dataset of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// Its UID; an inline volume has only the name, and its daemon asks the workers.
    pub id: Option<Uuid>,
    /// `namespace/name`.
    pub name: String,
}

/// A Dataset, and how its workers are reached. The key is never shown: [`RuntimeKey`] has no `Debug` that does.
#[derive(Clone, Debug)]
pub struct Source {
    /// The Dataset.
    pub dataset: Dataset,
    service: String,
    key: RuntimeKey,
}

/// The JSON that a daemon reads (`VolumeConfig` of the crate `forebay-fuse`, which this privileged process does not link).
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct VolumeConfig<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    dataset: Option<Uuid>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    resolve: bool,
    name: &'a str,
    service: &'a str,
    key: String,
    mounted_at_ns: i64,
}

fn invalid<T>(text: impl Into<String>) -> Result<T, VolumeError> {
    Err(VolumeError::Invalid(text.into()))
}

/// Whether a volume is declared in a pod, without a PersistentVolume.
pub fn is_inline(context: &HashMap<String, String>) -> bool {
    context.get(EPHEMERAL).is_some_and(|value| value == "true")
}

impl Dataset {
    /// From the attributes of a volume.
    pub fn check(context: &HashMap<String, String>) -> Result<Self, VolumeError> {
        if is_inline(context) { Self::inline(context) } else { Self::persistent(context) }
    }

    /// Attributes that are not ours are those of provisioners.
    fn persistent(context: &HashMap<String, String>) -> Result<Self, VolumeError> {
        let id = context.get(DATASET).map_or("", String::as_str);
        let Ok(id) = Uuid::try_parse(id) else {
            return invalid(format!("volume attribute '{DATASET}' must be the UID of a Dataset, and is '{id}'"));
        };
        let name = context.get(NAME).map_or("", String::as_str);
        let is_name = |(namespace, name)| is_label(namespace) && is_label(name);
        if !name.split_once('/').is_some_and(is_name) {
            return invalid(format!("volume attribute '{NAME}' must be NAMESPACE/NAME of a Dataset, and is '{name}'"));
        }
        Ok(Self { id: Some(id), name: name.to_owned() })
    }

    /// A person wrote the attributes, so what is unknown is a mistake.
    fn inline(context: &HashMap<String, String>) -> Result<Self, VolumeError> {
        let ours = |name: &&String| !name.starts_with(KUBERNETES) && name.as_str() != DATASET;
        if let Some(unknown) = context.keys().find(ours) {
            return invalid(format!("volume attribute '{unknown}' is unknown; an inline volume has '{DATASET}' only"));
        }
        let name = context.get(DATASET).map_or("", String::as_str);
        if !is_label(name) {
            return invalid(format!(
                "volume attribute '{DATASET}' must be the name of a Dataset in the pod's namespace, and is '{name}'"
            ));
        }
        match context.get(POD_NAMESPACE) {
            Some(namespace) if is_label(namespace) => Ok(Self { id: None, name: format!("{namespace}/{name}") }),
            _ => invalid("the pod's namespace is not known; the CSIDriver object must have podInfoOnMount: true"),
        }
    }
}

impl Source {
    /// From the attributes and secrets of a volume. The Secret's service goes before that of the attributes: it is the
    /// operator's word, and newer.
    pub fn check(context: &HashMap<String, String>, secrets: &HashMap<String, String>) -> Result<Self, VolumeError> {
        let dataset = Dataset::check(context)?;
        let Some(key) = secrets.get(KEY) else {
            return invalid(format!("the secret has no '{KEY}'; is it the Secret of the Dataset's CacheRuntime?"));
        };
        let Some(key) = RuntimeKey::parse(key.as_bytes()) else {
            return invalid(format!("'{KEY}' in the secret is no runtime's key, which is 64 hexadecimal digits"));
        };
        let given = if is_inline(context) { None } else { context.get(SERVICE) };
        let Some(service) = secrets.get(SERVICE).or(given) else {
            return invalid(format!("the secret has no '{SERVICE}'; is it the Secret of the Dataset's CacheRuntime?"));
        };
        let service = service.trim();
        if !is_service(service) {
            return invalid(format!("'{SERVICE}' must be host:port, and is '{service}'"));
        }
        Ok(Self { dataset, service: service.to_owned(), key })
    }

    /// The configuration of a daemon's volume that is mounted now.
    pub fn config(&self) -> Result<Vec<u8>, VolumeError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let config = VolumeConfig {
            dataset: self.dataset.id,
            resolve: self.dataset.id.is_none(),
            name: &self.dataset.name,
            service: &self.service,
            key: self.key.to_text(),
            mounted_at_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        };
        // Fails for maps with odd keys only, of which there is none.
        serde_json::to_vec(&config).or_else(|error| invalid(error.to_string()))
    }
}

/// A DNS label: what a namespace, a Dataset and a CacheRuntime may be called.
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

fn is_service(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    (1..=MAX_HOST).contains(&host.len()) && host.bytes().all(allowed) && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use forebay_fuse::VolumeConfig;

    use super::*;

    const ID: &str = "7f7a1f0e-8f50-5d3e-9f0c-2b8f1f0f7c11";
    const HEX: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn persistent() -> HashMap<String, String> {
        map(&[
            (DATASET, ID),
            (NAME, "default/pictures"),
            (SERVICE, "old.default.svc:7400"),
            ("csi.storage.k8s.io/ephemeral", "false"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "x"),
        ])
    }

    fn inline() -> HashMap<String, String> {
        map(&[
            (DATASET, "pictures"),
            (EPHEMERAL, "true"),
            (POD_NAMESPACE, "team-a"),
            ("csi.storage.k8s.io/pod.name", "p"),
        ])
    }

    fn secrets() -> HashMap<String, String> {
        map(&[(KEY, HEX), (SERVICE, "runtime-forebay.default.svc:7400\n")])
    }

    #[test]
    fn daemons_understand_the_configuration() {
        for (context, id, name) in [(persistent(), Some(ID), "default/pictures"), (inline(), None, "team-a/pictures")] {
            let source = Source::check(&context, &secrets()).unwrap();
            let config = source.config().unwrap();
            VolumeConfig::decode(&config).unwrap();
            let json: serde_json::Value = serde_json::from_slice(&config).unwrap();
            assert_eq!(json.get("dataset").and_then(|id| id.as_str()), id);
            assert_eq!(json.get("resolve").and_then(|resolve| resolve.as_bool()), id.is_none().then_some(true));
            assert_eq!((json["name"].as_str(), json["key"].as_str()), (Some(name), Some(HEX)));
            assert_eq!(json["service"], "runtime-forebay.default.svc:7400");
            assert!(json["mountedAtNs"].as_i64().unwrap() > 1_600_000_000_000_000_000);
            assert!(!format!("{source:?}").contains(HEX));
        }
    }

    #[test]
    fn attributes_name_the_service_when_the_secret_does_not() {
        let secrets = map(&[(KEY, HEX)]);
        assert_eq!(Source::check(&persistent(), &secrets).unwrap().service, "old.default.svc:7400");
        assert!(Source::check(&inline(), &secrets).unwrap_err().to_string().contains("'service'"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let with = |mut map: HashMap<String, String>, name: &str, value: &str| {
            map.insert(name.to_owned(), value.to_owned());
            map
        };
        let without = |mut map: HashMap<String, String>, name: &str| {
            map.remove(name);
            map
        };
        for (context, secrets, named) in [
            (without(persistent(), DATASET), secrets(), "'dataset'"),
            (with(persistent(), DATASET, "pictures"), secrets(), "'pictures'"),
            (without(persistent(), NAME), secrets(), "'name'"),
            (with(persistent(), NAME, "pictures"), secrets(), "'pictures'"),
            (with(persistent(), NAME, "a/b,allow_other"), secrets(), "'name'"),
            (with(persistent(), NAME, "a/b/c"), secrets(), "'name'"),
            (without(inline(), DATASET), secrets(), "'dataset'"),
            (with(inline(), DATASET, "../x"), secrets(), "'../x'"),
            (with(inline(), DATASET, "Pictures"), secrets(), "'Pictures'"),
            (with(inline(), SERVICE, "evil:1"), secrets(), "'service'"),
            (with(inline(), "datset", "x"), secrets(), "'datset'"),
            (without(inline(), POD_NAMESPACE), secrets(), "podInfoOnMount"),
            (persistent(), without(secrets(), KEY), "'key'"),
            (persistent(), with(secrets(), KEY, "hunter2"), "'key'"),
            (persistent(), with(secrets(), SERVICE, "host"), "'host'"),
            (persistent(), with(secrets(), SERVICE, "host:0"), "'host:0'"),
            (persistent(), with(secrets(), SERVICE, "host:99999"), "'host:99999'"),
            (persistent(), with(secrets(), SERVICE, ":7400"), "':7400'"),
            (persistent(), with(secrets(), SERVICE, "a b:7400"), "'a b:7400'"),
        ] {
            let error = Source::check(&context, &secrets).unwrap_err();
            assert!(matches!(error, VolumeError::Invalid(_)), "{error:?}");
            assert!(error.to_string().contains(named), "{named}: {error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
