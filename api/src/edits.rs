//! What can be edited of an object that exists, and what that does: the table of docs/api.md, field by field.
//!
//! A test holds it against the schemas: each field is in it once, and those that are refused have a rule that says so.
//! The operator's tests make each edit on an API server (operator/tests/api_server/edits.rs).

/// A field of a spec and what its edit does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// Kind of the object.
    pub kind: &'static str,
    /// Path of the field; `[]` stands for every item of a list.
    pub field: &'static str,
    /// What an edit does; `None`: the API server refuses it.
    pub effect: Option<&'static str>,
}

const fn takes(kind: &'static str, field: &'static str, effect: &'static str) -> Edit {
    Edit { kind, field, effect: Some(effect) }
}

const fn refused(kind: &'static str, field: &'static str) -> Edit {
    Edit { kind, field, effect: None }
}

const RUNTIME: &str = "CacheRuntime";
const DATASET: &str = "Dataset";
const POLICY: &str = "PreloadPolicy";
/// What a change of what a run does, or of its Job, does.
const NEXT_RUN: &str = "The next run; one that is active goes on as it began.";
/// What a change of the workers' pods does.
const REPLACED: &str = "Workers are replaced, one after another; those on an emptyDir begin with empty caches.";

/// What a change of a request budget does.
const BUDGET: &str = "Live: within a second or two, and without a word to readers.";

/// Every field of the specs.
pub const EDITS: &[Edit] = &[
    takes(
        RUNTIME,
        "spec.replicas",
        "Workers come or go. One that goes serves until its end; no data is moved, the new owner of a chunk fetches it \
         from the old one when it is read.",
    ),
    refused(RUNTIME, "spec.tiers[].name"),
    takes(RUNTIME, "spec.tiers[].medium", REPLACED),
    takes(RUNTIME, "spec.tiers[].capacity", REPLACED),
    takes(
        RUNTIME,
        "spec.tiers[].volume.emptyDir",
        "Workers are replaced, one after another, and begin with empty caches.",
    ),
    takes(
        RUNTIME,
        "spec.tiers[].volume.hostPath.path",
        "Workers are replaced, one after another, and use what they find in the new directory; the old one is left as it is.",
    ),
    takes(RUNTIME, "spec.tiers[].watermarks.highPercent", REPLACED),
    takes(RUNTIME, "spec.tiers[].watermarks.lowPercent", REPLACED),
    takes(RUNTIME, "spec.template.metadata.labels", REPLACED),
    takes(RUNTIME, "spec.template.metadata.annotations", REPLACED),
    takes(RUNTIME, "spec.template.spec.nodeSelector", REPLACED),
    takes(RUNTIME, "spec.template.spec.tolerations", REPLACED),
    takes(RUNTIME, "spec.template.spec.affinity", REPLACED),
    takes(RUNTIME, "spec.template.spec.resources.requests", REPLACED),
    takes(RUNTIME, "spec.template.spec.resources.limits", REPLACED),
    takes(
        RUNTIME,
        "spec.template.spec.serviceAccountName",
        "Workers are replaced, one after another, and are the new ServiceAccount, which gets the rights that workers need.",
    ),
    takes(RUNTIME, "spec.template.spec.priorityClassName", REPLACED),
    refused(DATASET, "spec.runtimeRef.name"),
    takes(
        DATASET,
        "spec.sources[].path",
        "Live: the directory appears at its new place and is gone from the old one; open files stay.",
    ),
    takes(DATASET, "spec.sources[].uri", "Live: files are those of the new place; open files keep their content."),
    takes(DATASET, "spec.sources[].secretRef.name", "Live: the next request to the source uses it."),
    takes(DATASET, "spec.sources[].s3.endpoint", "Live: the next request to the source goes there."),
    takes(DATASET, "spec.sources[].s3.region", "Live: the next request to the source is signed for it."),
    takes(DATASET, "spec.sources[].s3.addressing", "Live: the next request to the source is written like this."),
    takes(DATASET, "spec.sources[].requestBudget.getPerSecond", BUDGET),
    takes(DATASET, "spec.sources[].requestBudget.listPerSecond", BUDGET),
    takes(DATASET, "spec.sources[].requestBudget.headPerSecond", BUDGET),
    takes(DATASET, "spec.sync.mode", "Live: the sources are listed again from now on, or no more."),
    takes(DATASET, "spec.sync.interval", "Live: from the listing that is under way, or was the last, on."),
    takes(
        DATASET,
        "spec.cache.policy",
        "Live: what is stored stays; what comes is stored or streamed as the new policy says.",
    ),
    takes(
        DATASET,
        "spec.cache.quota",
        "Live: more is stored, or what is above the new quota is dropped from the workers' disks.",
    ),
    takes(DATASET, "spec.cache.reserve", "Live: from the next time on that others need room."),
    takes(DATASET, "spec.cache.priority", "Live: from the next time on that somebody needs room."),
    takes(
        DATASET,
        "spec.cache.ttl",
        "Live: what nobody read for so long is dropped; after an edit as after a restart it has its time.",
    ),
    takes(DATASET, "spec.cache.replicas.min", "Live: copies are made, or those above it give way first."),
    takes(DATASET, "spec.cache.replicas.max", "Live: copies above it are read no more, and give way first."),
    takes(DATASET, "spec.volume.shape", "Where it is mounted from now on; a mount keeps its shape."),
    refused(POLICY, "spec.datasetRef.name"),
    takes(
        POLICY,
        "spec.triggers[].datasetReady",
        "Live: a Dataset for which no run was started by it starts one, if it is Ready.",
    ),
    takes(POLICY, "spec.triggers[].sourceChanged", "Live: a revision that is not that of the last run starts one."),
    takes(POLICY, "spec.triggers[].schedule.cron", "Live: the next time is that of the new schedule."),
    takes(POLICY, "spec.triggers[].schedule.timeZone", "Live: the next time is that of the new zone."),
    takes(POLICY, "spec.select.path", NEXT_RUN),
    takes(POLICY, "spec.select.include", NEXT_RUN),
    takes(POLICY, "spec.select.exclude", NEXT_RUN),
    takes(POLICY, "spec.select.minSize", NEXT_RUN),
    takes(POLICY, "spec.select.maxSize", NEXT_RUN),
    takes(POLICY, "spec.select.minAge", NEXT_RUN),
    takes(POLICY, "spec.select.maxAge", NEXT_RUN),
    takes(POLICY, "spec.select.manifest.path", NEXT_RUN),
    takes(POLICY, "spec.select.manifest.configMapRef.name", NEXT_RUN),
    takes(POLICY, "spec.select.manifest.configMapRef.key", NEXT_RUN),
    takes(POLICY, "spec.order", NEXT_RUN),
    takes(POLICY, "spec.priority", NEXT_RUN),
    takes(POLICY, "spec.load.pin", NEXT_RUN),
    takes(POLICY, "spec.load.verify", NEXT_RUN),
    takes(POLICY, "spec.load.replicas", NEXT_RUN),
    takes(POLICY, "spec.limits.bandwidth", NEXT_RUN),
    takes(POLICY, "spec.limits.requestsPerSecond", NEXT_RUN),
    takes(POLICY, "spec.concurrencyPolicy", "Live: the next run that is to start while another one is active."),
    takes(POLICY, "spec.suspend", "Live: no run starts, or what was due meanwhile does; one that is active goes on."),
    takes(POLICY, "spec.deadline", NEXT_RUN),
    takes(POLICY, "spec.backoffLimit", NEXT_RUN),
    takes(POLICY, "spec.historyLimits.succeeded", "Live: older runs are dropped from the status, with their Jobs."),
    takes(POLICY, "spec.historyLimits.failed", "Live: older runs are dropped from the status, with their Jobs."),
    takes(POLICY, "spec.ttlAfterFinished", NEXT_RUN),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;
    use crate::crds;

    /// Fields without fields of their own, and whether a rule there or above refuses their change.
    fn leaves(path: &str, schema: &Value, refused: bool, found: &mut BTreeMap<String, bool>) {
        let rules = schema["x-kubernetes-validations"].as_array().map(Vec::as_slice).unwrap_or_default();
        let here = |rule: &Value| rule["rule"].as_str().is_some_and(|rule| rule.contains("oldSelf"));
        // The rule of a list by name speaks of the names.
        let names = rules.iter().any(|rule| here(rule) && schema["type"] == "array");
        let refused = refused || rules.iter().any(|rule| here(rule) && schema["type"] != "array");
        if let Some(properties) = schema["properties"].as_object().filter(|_| !path.ends_with(".affinity")) {
            if properties.is_empty() {
                found.insert(path.to_owned(), refused);
            }
            for (name, property) in properties {
                leaves(&format!("{path}.{name}"), property, refused, found);
            }
        } else if schema["items"]["properties"].is_object() && !path.ends_with(".tolerations") {
            leaves(&format!("{path}[]"), &schema["items"], refused, found);
            if names {
                found.insert(format!("{path}[].name"), true);
            }
        } else {
            found.insert(path.to_owned(), refused);
        }
    }

    #[test]
    fn every_field_is_in_the_table_and_what_is_refused_has_a_rule() {
        for crd in crds() {
            let kind = crd.spec.names.kind.as_str();
            let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
            let mut fields = BTreeMap::new();
            leaves("spec", &schema["openAPIV3Schema"]["properties"]["spec"], false, &mut fields);
            let table: BTreeMap<String, bool> = EDITS
                .iter()
                .filter(|edit| edit.kind == kind)
                .map(|edit| (edit.field.to_owned(), edit.effect.is_none()))
                .collect();
            assert_eq!(fields, table, "{kind}");
        }
    }
}
