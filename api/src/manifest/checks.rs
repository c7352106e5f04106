//! The rules of the schemas, each with the function that judges as CEL does, and what to do when it does not hold.

use serde_json::Value as Schema;

use super::node::{Node, Value};
use crate::rules::{self, Rule};

/// How a rule of a schema is checked.
pub(super) enum Holds {
    /// On a text.
    Text(fn(&str) -> bool),
    /// On an object; the field is the one to blame.
    Object(&'static str, fn(&Object<'_>) -> bool),
    /// Only when an object changes, or said by another rule here.
    Elsewhere,
}

/// An object with its schema, which knows the defaults.
pub(super) struct Object<'a> {
    pub(super) node: &'a Node,
    pub(super) schema: &'a Schema,
}

impl Object<'_> {
    fn has(&self, field: &str) -> bool {
        self.node.get(field).is_some()
    }

    fn has_within(&self, field: &str, inner: &str) -> bool {
        self.node.get(field).is_some_and(|node| node.get(inner).is_some())
    }

    fn text(&self, field: &str) -> Option<&str> {
        self.node.get(field)?.text()
    }

    /// Keys and values of a map; a value that is no text has an error of its own.
    fn pairs(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let entries = match &self.node.value {
            Value::Map(entries) => entries.as_slice(),
            _ => &[],
        };
        entries.iter().map(|entry| (entry.key.as_str(), entry.value.text()))
    }

    fn integer(&self, field: &str) -> Option<i128> {
        match self.node.get(field) {
            Some(Node { value: Value::Integer(value), .. }) => Some(*value),
            Some(_) => None,
            None => self.schema["properties"][field]["default"].as_i64().map(i128::from),
        }
    }
}

/// A rule, how it is checked, and what to do when it does not hold.
pub(super) struct Check {
    pub(super) rule: Rule,
    pub(super) holds: Holds,
    pub(super) remedy: &'static str,
}

pub(super) const CHECKS: &[Check] = &[
    Check {
        rule: rules::LABEL,
        holds: Holds::Text(rules::is_label),
        remedy: "choose a name of lower-case letters, digits and '-', such as gpu-pool",
    },
    Check {
        rule: rules::SUBDOMAIN,
        holds: Holds::Text(rules::is_subdomain),
        remedy: "choose a name of lower-case letters, digits, '-' and '.', such as s3-reader",
    },
    Check {
        rule: rules::RUNTIME_NAME,
        holds: Holds::Text(|name| name.starts_with(|c: char| c.is_ascii_lowercase())),
        remedy: "choose a name that begins with a letter, such as gpu-pool",
    },
    Check { rule: rules::DATASET_REF_IMMUTABLE, holds: Holds::Elsewhere, remedy: "" },
    Check {
        rule: rules::ONE_TRIGGER,
        holds: Holds::Object("", |trigger| {
            ["datasetReady", "sourceChanged", "schedule"].iter().filter(|member| trigger.has(member)).count() == 1
        }),
        remedy: "write datasetReady: {}, sourceChanged: {} or schedule: {cron: 0 5 * * 1-5}, each as an item of its own",
    },
    Check {
        rule: rules::ONE_MANIFEST,
        holds: Holds::Object("", |manifest| manifest.has("path") != manifest.has("configMapRef")),
        remedy: "write manifest: {path: /lists/train.txt} or manifest: {configMapRef: {name: lists, key: train.txt}}",
    },
    Check { rule: rules::CONFIG_KEY, holds: Holds::Text(rules::is_config_key), remedy: "write it as train.txt" },
    Check {
        rule: rules::ORDER,
        holds: Holds::Object("order", |spec| {
            spec.text("order") != Some("Manifest") || spec.has_within("select", "manifest")
        }),
        remedy: "choose Name or Size, or name files with select.manifest",
    },
    Check {
        rule: rules::REPLICAS,
        holds: Holds::Object("max", |replicas| {
            !replicas.has("max") || replicas.integer("max") >= replicas.integer("min")
        }),
        remedy: "write replicas: {min: 2, max: 4}, or leave max out",
    },
    Check {
        rule: rules::SYNC_INTERVAL,
        holds: Holds::Object("interval", |sync| sync.has("interval") == (sync.text("mode") == Some("Periodic"))),
        remedy: "write sync: {mode: Periodic, interval: 5m}, or sync: {mode: Snapshot}",
    },
    Check { rule: rules::CRON, holds: Holds::Text(rules::is_cron), remedy: "write it as 0 5 * * 1-5 or @daily" },
    Check {
        rule: rules::TIME_ZONE,
        holds: Holds::Text(rules::is_time_zone),
        remedy: "write it as Europe/Madrid, or leave it out for UTC",
    },
    Check {
        rule: rules::DURATION,
        holds: Holds::Text(|text| rules::seconds(text).is_some()),
        remedy: "write it as 2h, 1h30m or 90s",
    },
    Check { rule: rules::DATASET_NAME, holds: Holds::Elsewhere, remedy: "" },
    Check { rule: rules::RUNTIME_REF_IMMUTABLE, holds: Holds::Elsewhere, remedy: "" },
    Check {
        rule: rules::PATH,
        holds: Holds::Text(rules::is_path),
        remedy: "write it as / or /a/b, each part with at most 255 bytes",
    },
    Check { rule: rules::HOST_PATH, holds: Holds::Text(rules::is_host_path), remedy: "write it as /mnt/nvme0" },
    Check {
        rule: rules::URI_SCHEME,
        holds: Holds::Text(rules::is_uri_of_known_scheme),
        remedy: "use s3://BUCKET/PREFIX/, file:///DIRECTORY or https://HOST/DIRECTORY/; other stores are not supported \
                 yet",
    },
    Check {
        rule: rules::URI_S3,
        holds: Holds::Text(rules::is_s3_uri_well_formed),
        remedy: "write it as s3://my-bucket/train/; credentials go into a Secret, the host into s3.endpoint",
    },
    Check {
        rule: rules::URI_FILE,
        holds: Holds::Text(rules::is_file_uri_well_formed),
        remedy: "write it as file:///data/train, with three slashes",
    },
    Check {
        rule: rules::URI_HTTP,
        holds: Holds::Text(rules::is_http_uri_well_formed),
        remedy: "write it as https://data.example.com/train/; credentials are not supported for web servers",
    },
    Check {
        rule: rules::URI_PLAIN,
        holds: Holds::Text(rules::is_uri_plain),
        remedy: "name a directory without these characters",
    },
    Check {
        rule: rules::ENDPOINT,
        holds: Holds::Text(rules::is_endpoint),
        remedy: "write it as https://s3.example.com or http://127.0.0.1:9000; the bucket stands in uri, credentials in \
                 a Secret",
    },
    Check { rule: rules::REGION, holds: Holds::Text(rules::is_region), remedy: "write it as us-east-1" },
    Check {
        rule: rules::S3_OPTIONS,
        holds: Holds::Object("s3", |source| !source.has("s3") || is_s3(source)),
        remedy: "remove s3, or use an s3:// uri",
    },
    Check {
        rule: rules::SECRET_REF,
        holds: Holds::Object("secretRef", |source| !source.has("secretRef") || is_s3(source)),
        remedy: "remove secretRef, or use an s3:// uri",
    },
    Check {
        rule: rules::ONE_VOLUME,
        holds: Holds::Object("", |volume| volume.has("hostPath") != volume.has("emptyDir")),
        remedy: "write hostPath: {path: /mnt/nvme0} for a disk of the machine, or emptyDir: {}",
    },
    Check {
        rule: rules::WATERMARKS,
        holds: Holds::Object("lowPercent", |marks| {
            marks.integer("lowPercent").zip(marks.integer("highPercent")).is_none_or(|(low, high)| low < high)
        }),
        remedy: "lower lowPercent or raise highPercent; they are 85 and 95 when left out",
    },
    Check { rule: rules::TIER_NAMES, holds: Holds::Elsewhere, remedy: "" },
    Check {
        rule: rules::LABEL_MAP,
        holds: Holds::Object("", |map| {
            map.pairs().all(|(key, value)| rules::is_label_key(key) && value.is_none_or(rules::is_label_value))
        }),
        remedy: "write them as team: vision or example.com/team: vision",
    },
    Check {
        rule: rules::ANNOTATION_KEYS,
        holds: Holds::Object("", |map| map.pairs().all(|(key, _)| rules::is_label_key(key))),
        remedy: "write them as team or example.com/team",
    },
    Check {
        rule: rules::POD_LABELS,
        holds: Holds::Object("", |map| map.pairs().all(|(key, _)| rules::is_free_label(key))),
        remedy: "choose other keys",
    },
    Check {
        rule: rules::TOLERATION_KEY,
        holds: Holds::Object("key", |toleration| {
            toleration.has("key") || toleration.text("operator") == Some("Exists")
        }),
        remedy: "name the key of the taint, or write operator: Exists",
    },
    Check {
        rule: rules::TOLERATION_VALUE,
        holds: Holds::Object("value", |toleration| {
            !toleration.has("value") || toleration.text("operator") != Some("Exists")
        }),
        remedy: "remove value, or write operator: Equal",
    },
    Check {
        rule: rules::TOLERATION_SECONDS,
        holds: Holds::Object("tolerationSeconds", |toleration| {
            !toleration.has("tolerationSeconds") || toleration.text("effect") == Some("NoExecute")
        }),
        remedy: "write effect: NoExecute, or remove tolerationSeconds",
    },
];

/// A source without a usable uri has an error of its own, and counts as anything.
fn is_s3(source: &Object<'_>) -> bool {
    source.text("uri").is_none_or(|uri| !["file://", "http://", "https://"].iter().any(|other| uri.starts_with(other)))
}
