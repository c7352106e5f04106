//! Documents to specs: who is who, what refers to what.
//!
//! Invariants: a spec is built only from a document without errors; a name is looked up in its own namespace only; when
//! part of the input could not be read, what it may have held is not reported as missing.

use std::collections::HashMap;

use k8s_openapi::ByteString;

use super::{
    Credentials, DEFAULT_NAMESPACE, Manifest, ManifestError, S3, Tier, TierVolume, ValidatedDataset, ValidatedPolicy,
    ValidatedRuntime, ValidatedSource,
    error::shown,
    node::{self, Document, Node, Step, Value},
    report::Report,
    structure::{self, Kind},
};
use crate::{CacheRuntime, Dataset, PreloadPolicy, S3Options, rules};

use Step::{Index, Key};

/// The keys of a Secret with credentials.
const ACCESS_KEY_ID: &str = "accessKeyId";
const SECRET_ACCESS_KEY: &str = "secretAccessKey";
const SESSION_TOKEN: &str = "sessionToken";
const SECRET_KEYS: &str = "accessKeyId and secretAccessKey, and sessionToken for temporary credentials";

/// A document of a known kind.
struct Object<'a> {
    kind: Kind,
    namespace: &'a str,
    /// Absent if the document gives none.
    name: Option<&'a str>,
    root: &'a Node,
}

/// Specs of the texts, given with their names. `complete`: nothing else of the input is missing.
pub(super) fn resolve<'t>(
    texts: impl IntoIterator<Item = (&'t str, &'t str)>,
    mut complete: bool,
) -> Result<Manifest, Vec<ManifestError>> {
    let mut files: Vec<(&str, Vec<Document>)> = Vec::new();
    // Errors with the index of their file, for the order.
    let mut errors: Vec<(usize, ManifestError)> = Vec::new();
    for (index, (name, text)) in texts.into_iter().enumerate() {
        let (documents, unreadable) = node::read(text);
        if documents.is_empty() && unreadable.is_empty() {
            let remedy = "write at least one object of kind Dataset, CacheRuntime, PreloadPolicy, Secret or ConfigMap";
            errors.push((index, ManifestError::of_file(name, "holds no object", remedy)));
        }
        for syntax in unreadable {
            complete = false;
            let remedy = "correct the YAML here; what follows was not looked at";
            let error = ManifestError::of_file(name, syntax.message, remedy);
            errors.push((index, ManifestError { document: Some(syntax.document), line: syntax.line, ..error }));
        }
        files.push((name, documents));
    }

    // Parallel: the objects are looked up while the report of one of them is written.
    let mut objects = Vec::new();
    let mut reports = Vec::new();
    for (index, (name, documents)) in files.iter().enumerate() {
        for document in documents {
            let mut report = Report::new(name, document.number, &document.root);
            match identify(&document.root, &mut report) {
                Some(object) => {
                    structure::check(object.kind, &document.root, &mut report);
                    // Its name and namespace may be what others refer to, once corrected.
                    complete &= object.name.is_some() && rules::is_label(object.namespace);
                    objects.push(object);
                    reports.push((index, report));
                }
                None => {
                    // It could have been what others refer to.
                    complete = false;
                    errors.extend(report.into_errors().into_iter().map(|error| (index, error)));
                }
            }
        }
    }

    let mut resolver =
        Resolver { names: HashMap::new(), objects: &objects, reports, complete, secrets: HashMap::new() };
    resolver.index_names();
    let mut manifest = Manifest::default();
    for (index, object) in objects.iter().enumerate() {
        match object.kind {
            Kind::CacheRuntime => manifest.runtimes.extend(resolver.runtime(index)),
            Kind::Dataset => manifest.datasets.extend(resolver.dataset(index)),
            Kind::PreloadPolicy => manifest.policies.extend(resolver.policy(index)),
            Kind::Secret | Kind::ConfigMap => {}
        }
    }

    for (index, report) in resolver.reports {
        errors.extend(report.into_errors().into_iter().map(|error| (index, error)));
    }
    if errors.is_empty() {
        return Ok(manifest);
    }
    errors.sort_by_key(|(index, error)| (*index, error.document, error.line));
    Err(errors.into_iter().map(|(_, error)| error).collect())
}

/// Kind, namespace and name of a document. `None`: it is none of ours, and the report says so.
fn identify<'a>(root: &'a Node, report: &mut Report<'a>) -> Option<Object<'a>> {
    if !matches!(root.value, Value::Map(_)) {
        let remedy = "write an object with apiVersion, kind, metadata and spec";
        report.at(&[], format!("is {}, not an object", root.type_name()), remedy);
        return None;
    }
    let kinds = Kind::ALL.map(Kind::name);
    let Some(text) = root.get("kind").and_then(Node::text) else {
        report.at(&[Key("kind")], "is missing", format!("add kind: one of {}", kinds.join(", ")));
        return None;
    };
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == text) else {
        let remedy = match structure::closest(text, &kinds) {
            Some(similar) => format!("write {similar} if that is meant"),
            None if text == "List" => "write each item as a document of its own, between lines of '---'".into(),
            None => format!("keep it in another file; manifests hold {}", kinds.join(", ")),
        };
        report.at(&[Key("kind")], format!("{} is no kind that can be served", shown(text)), remedy);
        return None;
    };
    let metadata = |field| root.find(&[Key("metadata"), Key(field)]).and_then(Node::text);
    let namespace = metadata("namespace").unwrap_or(DEFAULT_NAMESPACE);
    let name = metadata("name");
    report.object = match name {
        Some(name) => format!("{} {}/{}", kind.name(), namespace.escape_debug(), name.escape_debug()),
        None => kind.name().to_owned(),
    };
    if let Some(version) = root.get("apiVersion") {
        let expected = kind.api_version();
        if version.text() != Some(expected) {
            let given = version.text().map_or("the value".into(), shown);
            let message = format!("{given} is no version of {}", kind.name());
            report.at(&[Key("apiVersion")], message, format!("write apiVersion: {expected}"));
        }
    }
    Some(Object { kind, namespace, name, root })
}

struct Resolver<'a, 'o> {
    objects: &'o [Object<'a>],
    /// Index of the file, and what is wrong, for each object.
    reports: Vec<(usize, Report<'a>)>,
    /// The first object of a kind, namespace and name.
    names: HashMap<(Kind, &'a str, &'a str), usize>,
    complete: bool,
    /// Credentials of Secrets that were looked at.
    secrets: HashMap<usize, Option<Credentials>>,
}

impl<'a> Resolver<'a, '_> {
    fn report(&mut self, index: usize) -> &mut Report<'a> {
        &mut self.reports[index].1
    }

    fn index_names(&mut self) {
        for (index, object) in self.objects.iter().enumerate() {
            let Some(name) = object.name else { continue };
            let first = *self.names.entry((object.kind, object.namespace, name)).or_insert(index);
            if first != index {
                let place = [Key("metadata"), Key("name")];
                let line = self.objects[first].root.line_of(&place);
                let file = self.reports[first].1.file;
                let message = format!("{} was defined before, at {file}:{line}", shown(name));
                self.report(index).at(&place, message, "remove one of the two, or give it another name or namespace");
            }
        }
    }

    fn runtime(&mut self, index: usize) -> Option<ValidatedRuntime> {
        let object = &self.objects[index];
        let CacheRuntime { metadata: _, spec, status: _ } = self.typed(index)?;
        let built = (|| {
            // Exactly one, says the schema.
            let tier = spec.tiers.into_iter().next()?;
            Some(ValidatedRuntime {
                namespace: object.namespace.to_owned(),
                name: object.name?.to_owned(),
                replicas: spec.replicas,
                tier: Tier {
                    name: tier.name,
                    medium: tier.medium,
                    capacity_bytes: tier.capacity.bytes().ok()?,
                    volume: match tier.volume.host_path {
                        Some(volume) => TierVolume::HostPath(volume.path.into()),
                        None => TierVolume::EmptyDir,
                    },
                    high_percent: tier.watermarks.high_percent,
                    low_percent: tier.watermarks.low_percent,
                },
            })
        })();
        self.built(index, built)
    }

    fn dataset(&mut self, index: usize) -> Option<ValidatedDataset> {
        let object = &self.objects[index];
        let found = self.refers(index, "runtimeRef", Kind::CacheRuntime);
        let credentials = self.secret_refs(index);
        let Dataset { metadata: _, spec, status: _ } = self.typed(index)?;
        if !found || credentials.len() != spec.sources.len() {
            return None;
        }
        let built = (|| {
            let sources = spec.sources.into_iter().zip(credentials).map(|(source, credentials)| ValidatedSource {
                path: source.path,
                uri: source.uri,
                s3: source.s3.map(|S3Options { endpoint, region, addressing }| S3 { endpoint, region, addressing }),
                credentials,
                request_budget: source.request_budget.unwrap_or_default(),
            });
            let ttl = spec.cache.ttl();
            Some(ValidatedDataset {
                namespace: object.namespace.to_owned(),
                name: object.name?.to_owned(),
                runtime: spec.runtime_ref.name,
                sources: sources.collect(),
                policy: spec.cache.policy,
                quota_bytes: spec.cache.quota.map(|quota| quota.bytes()).transpose().ok()?,
                reserve_bytes: spec.cache.reserve.map_or(Ok(0), |reserve| reserve.bytes()).ok()?,
                priority: spec.cache.priority,
                shape: spec.volume.shape,
                ttl,
                replicas: spec.cache.replicas,
                sync_interval: spec.sync.interval(),
            })
        })();
        self.built(index, built)
    }

    fn policy(&mut self, index: usize) -> Option<ValidatedPolicy> {
        let object = &self.objects[index];
        let found = self.refers(index, "datasetRef", Kind::Dataset);
        let lines = self.config_map_ref(index);
        let PreloadPolicy { metadata: _, spec, status: _ } = self.typed(index)?;
        if !found {
            return None;
        }
        let built = object.name.map(|name| ValidatedPolicy {
            namespace: object.namespace.to_owned(),
            name: name.to_owned(),
            spec,
            manifest: lines,
        });
        self.built(index, built)
    }

    /// What the ConfigMap says that a policy's manifest names, if it names one.
    fn config_map_ref(&mut self, index: usize) -> Option<String> {
        let object = &self.objects[index];
        let within = [Key("spec"), Key("select"), Key("manifest"), Key("configMapRef")];
        let text = |field| object.root.find(&within)?.get(field).and_then(Node::text);
        let (name, key) = (text("name")?, text("key")?);
        let Some(map) = self.names.get(&(Kind::ConfigMap, object.namespace, name)) else {
            if self.complete {
                let message = format!("there is no ConfigMap {} in namespace {}", shown(name), shown(object.namespace));
                let place = [&within[..], &[Key("name")]].concat();
                self.report(index).at(&place, message, "add a v1 ConfigMap of this name, or name the file with path");
            }
            return None;
        };
        let lines = self.objects[*map].root.find(&[Key("data"), Key(key)]).and_then(Node::text);
        // What can be no key was reported.
        if lines.is_none() && rules::is_config_key(key) {
            let message = format!("ConfigMap {} has no text {}", shown(name), shown(key));
            let place = [&within[..], &[Key("key")]].concat();
            self.report(index).at(&place, message, "add the key to the data of the ConfigMap");
        }
        lines.map(str::to_owned)
    }

    /// The document as our type, if nothing is wrong with it.
    fn typed<T: serde::de::DeserializeOwned>(&mut self, index: usize) -> Option<T> {
        if !self.reports[index].1.is_clean() {
            return None;
        }
        match serde_json::from_value(self.objects[index].root.to_json()) {
            Ok(object) => Some(object),
            // The schema was made from the type, so this is a mistake of ours.
            Err(error) => {
                self.report(index).at(&[], format!("does not fit its schema: {error}"), "correct what it names");
                None
            }
        }
    }

    /// As [`Self::typed`]: a document without errors that cannot be built is said to be one.
    fn built<T>(&mut self, index: usize, built: Option<T>) -> Option<T> {
        if built.is_none() {
            self.report(index).at(&[], "does not fit its schema", "compare it with docs/api.md");
        }
        built
    }

    /// Whether the object of another kind that `spec.FIELD.name` names is known.
    fn refers(&mut self, index: usize, field: &'static str, kind: Kind) -> bool {
        let object = &self.objects[index];
        let place = [Key("spec"), Key(field), Key("name")];
        let Some(name) = object.root.find(&place).and_then(Node::text) else {
            return false;
        };
        if self.names.contains_key(&(kind, object.namespace, name)) {
            return true;
        }
        if self.complete {
            let (kind_name, others) = (kind.name(), || self.objects.iter().filter(|other| other.kind == kind));
            let elsewhere = others().find(|other| other.name == Some(name)).map(|other| other.namespace);
            let here = others().filter(|other| other.namespace == object.namespace).filter_map(|other| other.name);
            let here: Vec<&str> = here.take(10).collect();
            let remedy = match elsewhere {
                Some(namespace) => {
                    format!("move one of the two: the {kind_name} is in namespace {}", shown(namespace))
                }
                None if here.is_empty() => format!("add a {kind_name} of this name"),
                None => format!("add a {kind_name} of this name, or use {}", here.join(" or ")),
            };
            let message = format!("there is no {kind_name} {} in namespace {}", shown(name), shown(object.namespace));
            self.report(index).at(&place, message, remedy);
        }
        false
    }

    /// Credentials for each source of a dataset; fewer than sources if some could not be found.
    fn secret_refs(&mut self, index: usize) -> Vec<Option<Credentials>> {
        let object = &self.objects[index];
        let Some(Node { value: Value::List(sources), .. }) = object.root.find(&[Key("spec"), Key("sources")]) else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for (number, source) in sources.iter().enumerate() {
            let within = [Key("secretRef"), Key("name")];
            let Some(name) = source.find(&within).and_then(Node::text) else {
                all.push(None);
                continue;
            };
            match self.names.get(&(Kind::Secret, object.namespace, name)) {
                Some(secret) => all.extend(self.credentials(*secret, index).map(Some)),
                None if self.complete => {
                    let message =
                        format!("there is no Secret {} in namespace {}", shown(name), shown(object.namespace));
                    let remedy = format!(
                        "add a v1 Secret of this name with {SECRET_KEYS}, or leave secretRef out for the identity of \
                         the workers"
                    );
                    let place = [Key("spec"), Key("sources"), Index(number), within[0], within[1]];
                    self.report(index).at(&place, message, remedy);
                }
                None => {}
            }
        }
        all
    }

    /// The credentials of a Secret, which a dataset needs.
    fn credentials(&mut self, secret: usize, dataset: usize) -> Option<Credentials> {
        if let Some(known) = self.secrets.get(&secret) {
            return known.clone();
        }
        let access_key_id = self.secret_value(secret, dataset, ACCESS_KEY_ID, true);
        let secret_access_key = self.secret_value(secret, dataset, SECRET_ACCESS_KEY, true);
        let session_token = self.secret_value(secret, dataset, SESSION_TOKEN, false);
        let credentials = access_key_id.zip(secret_access_key).map(|(access_key_id, secret_access_key)| Credentials {
            access_key_id,
            secret_access_key,
            session_token,
        });
        let clean = self.reports[secret].1.is_clean();
        let credentials = credentials.filter(|_| clean);
        self.secrets.insert(secret, credentials.clone());
        credentials
    }

    /// The value of a key of a Secret. As in Kubernetes, `stringData` wins over `data`, which is in base64.
    fn secret_value(&mut self, secret: usize, dataset: usize, key: &str, required: bool) -> Option<String> {
        let root = self.objects[secret].root;
        let (map, node) = ["stringData", "data"]
            .into_iter()
            .find_map(|map| root.find(&[Key(map), Key(key)]).map(|node| (map, Some(node))))
            .unwrap_or((
                if root.get("stringData").is_none() && root.get("data").is_some() { "data" } else { "stringData" },
                None,
            ));
        let Some(node) = node else {
            if required {
                let user = self.reports[dataset].1.object.clone();
                let message = format!("is missing; {user} needs it");
                let remedy = format!("add it to {map}; the keys are {SECRET_KEYS}");
                self.report(secret).at(&[Key(map), Key(key)], message, remedy);
            }
            return None;
        };
        let text = node.text()?; // Anything else was reported.
        let value = if map == "data" {
            let bytes = serde_json::from_value::<ByteString>(text.into()).ok().map(|ByteString(bytes)| bytes);
            bytes.and_then(|bytes| String::from_utf8(bytes).ok())
        } else {
            Some(text.to_owned())
        };
        let wrong = match &value {
            None => Some(("is no text in base64", "encode it with base64, or move it to stringData as it is")),
            Some(value) if value.is_empty() => Some(("is empty", "give it a value")),
            Some(value) if value.ends_with('\n') => {
                Some(("ends with a line break", "encode it with printf %s VALUE | base64, without the line break"))
            }
            Some(value) if value.contains(|c: char| c.is_whitespace() || c.is_control()) => {
                Some(("holds white space or control characters", "give the key as the store gave it"))
            }
            Some(_) => None,
        };
        if let Some((message, remedy)) = wrong {
            self.report(secret).at(&[Key(map), Key(key)], message, remedy);
            return None;
        }
        value
    }
}
