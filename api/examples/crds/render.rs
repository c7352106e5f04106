//! The generated files as text.

use std::error::Error;

use forebay_api::{API_VERSION, crds, edits::EDITS};
use serde_json::{Map, Value};

/// How to write the files.
pub(crate) const COMMAND: &str = "cargo run -p forebay-api --example crds -- --write";

/// Every generated file: its path in the repository and its content.
pub(crate) fn files() -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let crds = crds().into_iter().map(serde_json::to_value).collect::<Result<Vec<Value>, _>>()?;
    let crds: Vec<Value> = crds.into_iter().map(plain).collect();
    let mut files = Vec::new();
    for crd in &crds {
        let name = crd["metadata"]["name"].as_str().ok_or("a CRD without a name")?;
        let yaml = serde_saphyr::to_string(crd)?;
        let text = format!("# Generated from api/src; write it with: {COMMAND}\n{yaml}");
        files.push((format!("crds/{name}.yaml"), text));
    }
    files.push(("docs/api.md".into(), reference(&crds)));
    Ok(files)
}

/// Sorted, whatever `serde_json` was built with, and whole numbers without a point.
fn plain(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().map(|(key, value)| (key, plain(value))).collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            entries.into_iter().collect::<Map<_, _>>().into()
        }
        Value::Array(items) => items.into_iter().map(plain).collect(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 => (float as i64).into(),
            _ => Value::Number(number),
        },
        other => other,
    }
}

const HEAD: &str = "\
# API reference

Group and version `forebay.io/v1alpha1`; all objects are namespaced. The CRDs are in `crds/`, examples in `examples/`.

`forebay up -f FILE.yaml` takes the same YAML as `kubectl apply -f FILE.yaml`, and refuses what the API server refuses:
each error names file, line, document, field and what to do. A file may hold several documents, of the kinds Dataset,
CacheRuntime, PreloadPolicy, v1 Secret and v1 ConfigMap; an object may use what another file of the same command
defines, in its own namespace.
`spec.template` of a CacheRuntime is about pods: without a cluster it is checked, and has no effect.

Amounts of bytes are Kubernetes quantities: `2Ti`, `500G`, `1.5Gi` or a whole number. They must be a whole number of
bytes, at least 1 and below 8Ei; signs and exponents are refused.
";

const TAIL: &str = "
## Secret

Credentials of a source: a v1 Secret of the Dataset's namespace, named in `spec.sources[].secretRef`.

| Key | | What |
|---|---|---|
| `accessKeyId` | required | Access key of the store |
| `secretAccessKey` | required | Its secret |
| `sessionToken` | optional | Token of temporary credentials |

In manifests, `stringData` wins over `data` (base64), as in Kubernetes. Values with a line break at the end, which
`echo` puts there, are refused. Without `secretRef`, workers use their own identity.

## Choices

- A field is in the schema only when something acts on it, so a manifest that is accepted does what it says.
- Optional fields are left out, never null: an empty `quota:` is a mistake and is refused as one.
- Choices are unions with one member set (`volume: {hostPath: {...}}` or `volume: {emptyDir: {}}`), so that a choice can
  grow options of its own without new fields beside it.
- `sources` and `tiers` are maps by `path` and `name`: server-side apply merges them item by item, and the same path
  cannot be given twice.
- Names of Datasets, CacheRuntimes and PreloadPolicies are DNS labels, without dots: they become names of claims, pods and hosts. A
  CacheRuntime's begins with a letter, because names of Services do. What is made for it is called NAME-forebay; of a
  name that makes this longer than 52 characters (Kubernetes adds to it in labels of 63), it is the beginning and a hash.
- `spec.template` has the pieces of a pod template that a user needs to place workers; the rest of the pods is the
  operator's. Its `resources` replace the operator's own item by item, `labels` and `annotations` are added to them.
- `hits` and `misses` count bytes, not requests: a request of one block and one of a hundred would count alike.
- A condition is of type `Ready` (it can be used), `Progressing` (something is under way) or `Degraded` (it is less than
  was asked for). A CacheRuntime with a hostPath has one more, `PrivilegedPods`: what its namespace has to admit.
- A PreloadPolicy's conditions are `Complete` and `Failed`, as a Job's are, of its last run. All triggers that are due
  start one run: none of them would load more. Times of a schedule that pass while no run can start (the Dataset is not
  Ready, the operator is away, `suspend`) are made up for by one run.
- URIs are taken as they are written: `?`, `#`, `%` and `\\` are refused rather than given a meaning that keys of a
  store do not have.
- The status keeps every amount as an integer (`bytes`) for programs and, where `kubectl get` shows it, as a string
  (`size`) for people, because printer columns show integers as they are.
";

fn reference(crds: &[Value]) -> String {
    let mut text = format!("<!-- Generated from api/src; write it with: {COMMAND} -->\n{HEAD}");
    for crd in crds {
        let names = &crd["spec"]["names"];
        let version = &crd["spec"]["versions"][0];
        let schema = &version["schema"]["openAPIV3Schema"];
        let kind = names["kind"].as_str().unwrap_or_default();
        let short = list(&names["shortNames"]);
        let plural = names["plural"].as_str().unwrap_or_default();
        text.push_str(&format!("\n## {kind}\n\n{}\n\n", describe(schema)));
        let called = if short.is_empty() { String::new() } else { format!(" or `{}`", short.join("`, `")) };
        text.push_str(&format!("`kubectl get {plural}`{called}; `apiVersion: {API_VERSION}`, `kind: {kind}`.\n"));
        if !version["subresources"]["scale"].is_null() {
            text.push_str("`kubectl scale` sets `spec.replicas`.\n");
        }
        for part in ["spec", "status"] {
            let mut rows = Vec::new();
            fields(part, &schema["properties"][part], &mut rows);
            text.push_str(&format!("\n| Field | | What |\n|---|---|---|\n{}", rows.concat()));
        }
        let columns = version["additionalPrinterColumns"].as_array().map(Vec::as_slice).unwrap_or_default();
        let columns: Vec<&str> = columns.iter().filter_map(|column| column["name"].as_str()).collect();
        text.push_str(&editable(kind, schema));
        text.push_str(&format!("\nColumns of `kubectl get`: {}.\n", columns.join(", ")));
    }
    text.push_str(TAIL);
    text
}

/// What can be edited.
fn editable(kind: &str, schema: &Value) -> String {
    let mut text =
        "\nWhat can be edited of one that exists, while it is in use:\n\n| Field | Edit |\n|---|---|\n".to_owned();
    for edit in EDITS.iter().filter(|edit| edit.kind == kind) {
        let what = match edit.effect {
            Some(effect) => effect.to_owned(),
            None => format!("Refused: {}.", refusal(schema, edit.field).unwrap_or_default()),
        };
        text.push_str(&format!("| `{}` | {what} |\n", edit.field));
    }
    text
}

/// The message of the rule that refuses the edit of a field: of its own, or of one that it is in.
fn refusal<'s>(schema: &'s Value, field: &str) -> Option<&'s str> {
    let mut schema = schema;
    let mut message = None;
    for name in field.split('.') {
        schema = &schema["properties"][name.trim_end_matches("[]")];
        let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
        let refuses = |rule: &&Value| rule["rule"].as_str().is_some_and(|rule| rule.contains("oldSelf"));
        message = rules.clone().find(refuses).and_then(|rule| rule["message"].as_str()).or(message);
        if name.ends_with("[]") {
            schema = &schema["items"];
        }
    }
    message
}

/// A row for each field below `path`; required ones first.
fn fields(path: &str, schema: &Value, rows: &mut Vec<String>) {
    let Some(properties) = schema["properties"].as_object() else { return };
    let required = list(&schema["required"]);
    let mut names: Vec<&String> = properties.keys().collect();
    names.sort_by_key(|name| !required.contains(&name.as_str()));
    for name in names {
        let field = &properties[name];
        let path = format!("{path}.{name}");
        let need = match &field["default"] {
            _ if required.contains(&name.as_str()) => "required".to_owned(),
            Value::Null => "optional".to_owned(),
            Value::Object(_) => "optional".to_owned(),
            default => format!("default `{}`", default.to_string().trim_matches('"')),
        };
        let mut what = vec![describe(field)];
        what.extend(bounds(field));
        rows.push(format!("| `{path}` | {}, {need} | {} |\n", type_of(field), what.join(" ").replace('|', "\\|")));
        // These are Kubernetes' own; their fields are known.
        if name != "conditions" && name != "affinity" {
            fields(&path, field, rows);
            fields(&format!("{path}[]"), &field["items"], rows);
        }
    }
}

fn type_of(schema: &Value) -> String {
    if schema["x-kubernetes-int-or-string"] == true {
        return "quantity".into();
    }
    match schema["type"].as_str().unwrap_or_default() {
        "array" if schema["x-kubernetes-list-type"] == "map" => {
            format!("list by `{}`", list(&schema["x-kubernetes-list-map-keys"]).join("`, `"))
        }
        "array" => "list".into(),
        "object" if schema["additionalProperties"].is_object() => "map".into(),
        other => other.into(),
    }
}

fn describe(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() || text.ends_with('.') { text } else { format!("{text}.") }
}

/// What the schema demands, in words.
fn bounds(schema: &Value) -> Vec<String> {
    let mut words = Vec::new();
    let values = list(&schema["enum"]);
    if !values.is_empty() {
        words.push(format!("{} `{}`.", if values.len() > 1 { "One of" } else { "Only" }, values.join("`, `")));
    }
    match (&schema["minimum"], &schema["maximum"]) {
        (Value::Number(least), Value::Number(most)) => words.push(format!("{least} to {most}.")),
        // That counts are not negative goes without saying.
        (Value::Number(least), _) if least.as_i64() != Some(0) => words.push(format!("At least {least}.")),
        _ => {}
    }
    match (&schema["minItems"], &schema["maxItems"]) {
        (Value::Number(least), Value::Number(most)) if least != most => words.push(format!("{least} to {most} items.")),
        _ => {}
    }
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let message = rule["message"].as_str().unwrap_or_default();
        let mut letters = message.chars();
        // Messages that begin with the name of a field keep it as it is written.
        let first = letters.next().filter(|_| message.starts_with("must") || message.starts_with("cannot"));
        words.push(match first {
            Some(first) => format!("{}{}.", first.to_uppercase(), letters.as_str()),
            None => format!("{message}."),
        });
    }
    words
}

fn list(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}
