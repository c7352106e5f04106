//! A document against the schema of its kind: what the API server does with the schema of the CRD, with better words.
//!
//! Invariants: the schema of `spec` is the CRD's own, so a field that is not in the CRD is not in a manifest; every
//! rule of a schema is in [`CHECKS`] (a test says so); the values of Secrets are never quoted.

use std::{collections::HashMap, sync::OnceLock};

use serde_json::{Value as Schema, json};

use super::{
    checks::{CHECKS, Holds, Object},
    error::shown,
    node::{Node, Step, Value},
    report::Report,
};
use crate::{
    API_VERSION, Quantity, crds,
    rules::{self, Rule},
};

/// A kind of object that a manifest may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Dataset,
    CacheRuntime,
    PreloadPolicy,
    Secret,
    ConfigMap,
}

impl Kind {
    pub(super) const ALL: [Kind; 5] =
        [Kind::Dataset, Kind::CacheRuntime, Kind::PreloadPolicy, Kind::Secret, Kind::ConfigMap];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Dataset => "Dataset",
            Kind::CacheRuntime => "CacheRuntime",
            Kind::PreloadPolicy => "PreloadPolicy",
            Kind::Secret => "Secret",
            Kind::ConfigMap => "ConfigMap",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Kind::Dataset | Kind::CacheRuntime | Kind::PreloadPolicy => API_VERSION,
            Kind::Secret | Kind::ConfigMap => "v1",
        }
    }

    fn schema(self) -> &'static Schema {
        static SCHEMAS: OnceLock<[Schema; 5]> = OnceLock::new();
        let [dataset, runtime, policy, secret, config_map] = SCHEMAS.get_or_init(|| Kind::ALL.map(schema_of));
        match self {
            Kind::Dataset => dataset,
            Kind::CacheRuntime => runtime,
            Kind::PreloadPolicy => policy,
            Kind::Secret => secret,
            Kind::ConfigMap => config_map,
        }
    }
}

/// The schema of a whole document: the CRD's `spec`, and what Kubernetes itself says of the rest.
fn schema_of(kind: Kind) -> Schema {
    let name_rules = match kind {
        Kind::Dataset | Kind::PreloadPolicy => vec![rules::LABEL],
        // What begins with a letter and is a label is what the API server takes.
        Kind::CacheRuntime => vec![rules::LABEL, rules::RUNTIME_NAME],
        Kind::Secret | Kind::ConfigMap => vec![rules::SUBDOMAIN],
    };
    let text_rules = |rules: &[Rule]| {
        rules.iter().map(|(rule, message)| json!({"rule": rule, "message": message})).collect::<Schema>()
    };
    let texts = json!({"type": "object", "additionalProperties": {"type": "string"}});
    let metadata = json!({
        "type": "object",
        "required": ["name"],
        "description": "Name, namespace, labels and annotations.",
        "properties": {
            "name": {"type": "string", "x-kubernetes-validations": text_rules(&name_rules),
                "description": "Name of the object."},
            "namespace": {"type": "string", "x-kubernetes-validations": text_rules(&[rules::LABEL])},
            "labels": texts,
            "annotations": texts,
            // What the API server adds; `kubectl get -o yaml` shows it.
            "creationTimestamp": {}, "deletionGracePeriodSeconds": {}, "deletionTimestamp": {}, "finalizers": {},
            "generation": {}, "managedFields": {}, "ownerReferences": {}, "resourceVersion": {}, "selfLink": {},
            "uid": {},
        },
    });
    let mut schema = json!({
        "type": "object",
        "required": ["apiVersion", "kind", "metadata"],
        "properties": {"apiVersion": {}, "kind": {}, "metadata": metadata},
    });
    match kind {
        Kind::Secret => {
            for (field, value) in [
                ("type", json!({"type": "string"})),
                ("immutable", json!({"type": "boolean"})),
                ("data", texts.clone()),
                ("stringData", texts),
            ] {
                schema["properties"][field] = value;
            }
        }
        Kind::ConfigMap => {
            for (field, value) in
                [("immutable", json!({"type": "boolean"})), ("data", texts.clone()), ("binaryData", texts)]
            {
                schema["properties"][field] = value;
            }
        }
        Kind::Dataset | Kind::CacheRuntime | Kind::PreloadPolicy => {
            let spec = crds()
                .into_iter()
                .find(|crd| crd.spec.names.kind == kind.name())
                .and_then(|mut crd| crd.spec.versions.pop()?.schema?.open_api_v3_schema?.properties?.remove("spec"))
                .and_then(|spec| serde_json::to_value(spec).ok())
                .unwrap_or_default();
            schema["properties"]["spec"] = spec;
            schema["properties"]["status"] = json!({});
            schema["required"] = json!(["apiVersion", "kind", "metadata", "spec"]);
        }
    }
    schema
}

/// Checks a document of a kind; everything that is wrong goes to the report.
pub(super) fn check<'a>(kind: Kind, root: &'a Node, report: &mut Report<'a>) {
    Walker { report, steps: Vec::new() }.visit(root, kind.schema());
}

struct Walker<'a, 'r> {
    report: &'r mut Report<'a>,
    steps: Vec<Step<'a>>,
}

impl<'a> Walker<'a, '_> {
    fn fail(&mut self, message: impl Into<String>, remedy: impl Into<String>) {
        self.report.at(&self.steps, message, remedy);
    }

    fn within(&mut self, step: Step<'a>, work: impl FnOnce(&mut Self)) {
        self.steps.push(step);
        work(self);
        self.steps.pop();
    }

    fn visit(&mut self, node: &'a Node, schema: &'static Schema) {
        if self.report.is_full() {
            return;
        }
        if schema["x-kubernetes-int-or-string"] == true {
            return match schema["pattern"] == rules::AMOUNT_PATTERN {
                true => self.amount(node),
                false => self.quantity(node),
            };
        }
        let Some(expected) = schema["type"].as_str() else {
            return;
        };
        if matches!(node.value, Value::Null) {
            let remedy = match expected {
                "object" => "write {} for one without settings, or remove the field",
                "array" => "give it items, or remove the field",
                _ => "give it a value, or remove the field",
            };
            return self.fail("is empty", remedy);
        }
        match (expected, &node.value) {
            ("object", Value::Map(_)) => self.object(node, schema),
            ("array", Value::List(items)) => self.list(items, schema),
            ("string", Value::Text(text)) => self.text(text, schema),
            ("integer", Value::Integer(number)) => self.integer(*number, schema),
            ("boolean", Value::Boolean(_)) => {}
            _ => {
                let (wanted, remedy) = match expected {
                    "object" => ("a map", "write its fields below it, indented"),
                    "array" => ("a list", "begin each item with '- '"),
                    "string" => ("text", "put it into quotes"),
                    "integer" => ("a whole number", "write digits only, without quotes"),
                    _ => ("true or false", "write true or false"),
                };
                return self.fail(format!("must be {wanted}, not {}", node.type_name()), remedy);
            }
        }
        self.rules(node, schema);
    }

    fn object(&mut self, node: &'a Node, schema: &'static Schema) {
        let Value::Map(entries) = &node.value else {
            return;
        };
        if let Some(most) = schema["maxProperties"].as_u64().filter(|most| entries.len() as u64 > *most) {
            self.fail(format!("has {} items", entries.len()), format!("give it at most {most}"));
        }
        let properties = schema["properties"].as_object();
        let others = &schema["additionalProperties"];
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for entry in entries {
            if self.report.is_full() {
                return;
            }
            let key = Step::Key(entry.key.as_str());
            if let Some(first) = seen.insert(&entry.key, entry.line) {
                let message = format!("is given twice, first on line {first}");
                self.within(key, |walker| {
                    walker.report.at_line(entry.line, &walker.steps, message, "keep one of the two");
                });
                continue;
            }
            match properties.and_then(|properties| properties.get(&entry.key)) {
                Some(property) => self.within(key, |walker| walker.visit(&entry.value, property)),
                None if others.is_object() => self.within(key, |walker| walker.visit(&entry.value, others)),
                None => self.within(key, |walker| {
                    let known: Vec<&str> = properties.into_iter().flat_map(|p| p.keys()).map(String::as_str).collect();
                    walker.fail("is no field", unknown_remedy(&entry.key, &known));
                }),
            }
        }
        for field in schema["required"].as_array().into_iter().flatten().filter_map(Schema::as_str) {
            if node.get(field).is_none() {
                let about = schema["properties"][field]["description"].as_str().map(first_sentence);
                self.within(Step::Key(field), |walker| {
                    walker.fail("is missing", about.map_or("add it".into(), |about| format!("add it: {about}")));
                });
            }
        }
    }

    fn list(&mut self, items: &'a [Node], schema: &'static Schema) {
        if schema["minItems"].as_u64().is_some_and(|least| (items.len() as u64) < least) {
            self.fail("has no items", "give it at least one");
        }
        if let Some(most) = schema["maxItems"].as_u64().filter(|most| items.len() as u64 > *most) {
            self.fail(format!("has {} items", items.len()), format!("give it at most {most}"));
        }
        let keys: Vec<&str> =
            schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Schema::as_str).collect();
        let mut seen: HashMap<(&str, &str), usize> = HashMap::new();
        for (index, item) in items.iter().enumerate() {
            self.within(Step::Index(index), |walker| {
                for key in &keys {
                    let Some(value) = item.get(key).and_then(Node::text) else { continue };
                    let line = item.line_of(&[Step::Key(key)]);
                    if let Some(first) = seen.insert((key, value), line) {
                        let message = format!("{} is given twice, first on line {first}", shown(value));
                        walker.within(Step::Key(key), |walker| {
                            let remedy = format!("give each item a {key} of its own");
                            walker.report.at_line(line, &walker.steps, message, remedy);
                        });
                    }
                }
                walker.visit(item, &schema["items"]);
            });
        }
    }

    fn text(&mut self, text: &str, schema: &'static Schema) {
        if schema["minLength"].as_u64().is_some_and(|least| (text.chars().count() as u64) < least) {
            self.fail("is empty", "give it a value, or remove it");
        }
        if let Some(most) = schema["maxLength"].as_u64().filter(|most| text.chars().count() as u64 > *most) {
            self.fail(format!("is longer than {most} characters"), "shorten it");
        }
        if let Some(values) = schema["enum"].as_array().filter(|values| !values.iter().any(|value| value == text)) {
            let values: Vec<&str> = values.iter().filter_map(Schema::as_str).collect();
            let remedy = format!("use {}{}", if values.len() > 1 { "one of " } else { "" }, values.join(", "));
            self.fail(format!("{} is no known value", shown(text)), remedy);
        }
    }

    fn integer(&mut self, number: i128, schema: &'static Schema) {
        let bound = |name: &str| schema[name].as_f64().map(|bound| bound as i128);
        let (least, most) = (bound("minimum"), bound("maximum"));
        if least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most) {
            let remedy = match (least, most) {
                (Some(least), Some(most)) => format!("use {least} to {most}"),
                (Some(least), None) => format!("use {least} or more"),
                (_, Some(most)) => format!("use {most} or less"),
                (None, None) => String::new(),
            };
            self.fail(format!("{number} is out of range"), remedy);
        }
    }

    /// An amount of any resource.
    fn amount(&mut self, node: &Node) {
        const REMEDY: &str = "write 2, 500m or 1.5Gi";
        match &node.value {
            Value::Text(text) if rules::is_amount(text) => {}
            Value::Integer(number) if *number >= 0 => {}
            Value::Text(text) => self.fail(format!("{} is no amount", shown(text)), REMEDY),
            Value::Integer(number) => self.fail(format!("{number} is negative"), REMEDY),
            Value::Float(_) => self.fail("must be a whole number or text", "put it into quotes, or write 500m for 0.5"),
            _ => self.fail(format!("must be an amount, not {}", node.type_name()), REMEDY),
        }
    }

    fn quantity(&mut self, node: &Node) {
        let quantity = match &node.value {
            Value::Text(text) => Quantity::new(text.as_str()),
            Value::Integer(number) => Quantity::new(number.to_string()),
            _ => {
                let message = format!("must be an amount of bytes, not {}", node.type_name());
                return self.fail(message, "write a number and a unit, such as 2Ti, 500G or 1.5Gi");
            }
        };
        if let Err(error) = quantity.bytes() {
            self.fail(format!("{} {error}", shown(quantity.as_str())), error.remedy());
        }
    }

    fn rules(&mut self, node: &'a Node, schema: &'static Schema) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let Some(check) = CHECKS.iter().find(|check| rule["rule"] == check.rule.0) else {
                continue; // A test makes sure that there is one.
            };
            match (&check.holds, &node.value) {
                (Holds::Text(holds), Value::Text(text)) if !holds(text) => {
                    self.fail(format!("{} {}", shown(text), check.rule.1), check.remedy);
                }
                (Holds::Object(field, holds), Value::Map(_)) if !holds(&Object { node, schema }) => {
                    if field.is_empty() {
                        self.fail(check.rule.1, check.remedy);
                    } else {
                        self.within(Step::Key(field), |walker| walker.fail(check.rule.1, check.remedy));
                    }
                }
                _ => {}
            }
        }
    }
}

fn first_sentence(text: &str) -> &str {
    text.split_once(". ").map_or(text, |(first, _)| first).trim_end_matches('.')
}

fn unknown_remedy(name: &str, known: &[&str]) -> String {
    match closest(name, known) {
        Some(similar) => format!("write {similar} if that is meant; the fields here are {}", known.join(", ")),
        None if known.is_empty() => "remove it; nothing can be set here".into(),
        None => format!("remove it; the fields here are {}", known.join(", ")),
    }
}

/// The known name that was probably meant.
pub(super) fn closest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    // A name that is far longer than any of ours is no slip; this also bounds the work.
    if name.len() > 64 {
        return None;
    }
    let distances = known.iter().map(|known| (distance(&name.to_lowercase(), &known.to_lowercase()), *known));
    distances.min().filter(|(distance, known)| *distance <= 1 + known.len() / 4).map(|(_, known)| known)
}

/// Insertions, deletions and replacements from one text to the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules_in(schema: &Schema, found: &mut Vec<String>) {
        match schema {
            Schema::Object(map) => {
                for rule in map.get("x-kubernetes-validations").and_then(Schema::as_array).into_iter().flatten() {
                    found.push(rule["rule"].as_str().unwrap().to_owned());
                }
                map.values().for_each(|value| rules_in(value, found));
            }
            Schema::Array(items) => items.iter().for_each(|item| rules_in(item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_rule_of_the_schemas_is_checked_here() {
        let mut found = Vec::new();
        rules_in(&serde_json::to_value(crds()).unwrap(), &mut found);
        Kind::ALL.iter().for_each(|kind| rules_in(kind.schema(), &mut found));
        assert!(found.len() > CHECKS.len());
        for rule in &found {
            assert!(CHECKS.iter().any(|check| check.rule.0 == rule), "no check for {rule}");
        }
        for check in CHECKS {
            assert!(found.iter().any(|rule| rule == check.rule.0), "no schema has {}", check.rule.0);
        }
    }

    /// Keywords that neither the walk nor `Quantity` knows would be rules that only the API server has.
    #[test]
    fn the_schemas_say_nothing_that_the_walk_does_not_know() {
        const KNOWN: [&str; 20] = [
            "additionalProperties",
            "default",
            "description",
            "enum",
            "format",
            "items",
            "maxItems",
            "maxLength",
            "maxProperties",
            "maximum",
            "minItems",
            "minLength",
            "minimum",
            "properties",
            "required",
            "type",
            "x-kubernetes-int-or-string",
            "x-kubernetes-list-map-keys",
            "x-kubernetes-list-type",
            "x-kubernetes-validations",
        ];
        fn walk(schema: &Schema) {
            for (keyword, value) in schema.as_object().unwrap() {
                let of_quantity = keyword == "pattern" && schema["x-kubernetes-int-or-string"] == true;
                assert!(KNOWN.contains(&keyword.as_str()) || of_quantity, "{keyword} in {schema}");
                match keyword.as_str() {
                    "properties" => value.as_object().unwrap().values().for_each(walk),
                    "items" | "additionalProperties" => walk(value),
                    _ => {}
                }
            }
        }
        Kind::ALL.iter().for_each(|kind| walk(kind.schema()));
        assert!(Kind::Dataset.schema()["properties"]["spec"]["properties"]["sources"].is_object());
        assert!(Kind::CacheRuntime.schema()["properties"]["spec"]["properties"]["tiers"].is_object());
    }

    #[test]
    fn slips_of_the_pen_are_recognised() {
        let known = ["path", "s3", "secretRef", "uri"];
        assert_eq!(closest("secretref", &known), Some("secretRef"));
        assert_eq!(closest("url", &known), Some("uri"));
        assert_eq!(closest("paht", &known), Some("path"));
        assert_eq!(closest("bucket", &known), None);
        assert_eq!(closest(&"x".repeat(1000), &known), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
