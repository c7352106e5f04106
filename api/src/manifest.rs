//! Manifest files to validated specs: the same YAML that Kubernetes takes, without a cluster.
//!
//! A file holds documents of the kinds Dataset, CacheRuntime, PreloadPolicy, v1 Secret and v1 ConfigMap. Each is read into a tree that knows its
//! lines (`node`), checked against the schema of its CRD and the rules of [`crate::rules`] (`structure`), turned into
//! our types and resolved: a Dataset is joined with its runtime and its credentials (`resolve`).
//!
//! Invariants: every error names file, document, line, field and remedy, and all of them are found at once, as far as
//! the YAML can be parsed; no error, `Debug` or log holds a value of a Secret; input is bounded ([`MAX_FILE_BYTES`],
//! depth and aliases in `node`, [`MAX_FILES`]).

mod checks;
mod error;
mod node;
mod report;
mod resolve;
mod structure;

use std::{
    fmt,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

pub use error::ManifestError;

use crate::{Addressing, Medium, Policy, PreloadPolicySpec, Replicas, RequestBudget, VolumeShape};

/// Most bytes of one file. A Dataset of 64 sources has some 20 KB.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// Most files of one load.
pub const MAX_FILES: usize = 100;
/// The namespace of objects that name none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What a set of files asks for; every name that a Dataset uses is resolved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifest {
    /// The CacheRuntimes, in the order of the files.
    pub runtimes: Vec<ValidatedRuntime>,
    /// The Datasets, in the order of the files.
    pub datasets: Vec<ValidatedDataset>,
    /// The PreloadPolicies, in the order of the files.
    pub policies: Vec<ValidatedPolicy>,
}

/// A PreloadPolicy.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidatedPolicy {
    /// Its namespace.
    pub namespace: String,
    /// Its name, a DNS label.
    pub name: String,
    /// What it asks for, of a Dataset of the manifest in the same namespace.
    pub spec: PreloadPolicySpec,
    /// What the ConfigMap of its manifest says, if it has one.
    pub manifest: Option<String>,
}

/// A CacheRuntime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedRuntime {
    /// Its namespace.
    pub namespace: String,
    /// Its name, a DNS label.
    pub name: String,
    /// Workers, 1 to 1000.
    pub replicas: u32,
    /// Where each worker keeps bytes.
    pub tier: Tier,
}

/// Where a worker keeps bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Name of the tier.
    pub name: String,
    /// What the volume is on.
    pub medium: Medium,
    /// Most bytes on each worker; at least 1.
    pub capacity_bytes: u64,
    /// The volume.
    pub volume: TierVolume,
    /// Percent of the capacity above which room is made.
    pub high_percent: u8,
    /// Percent of the capacity at which making room ends; below `high_percent`.
    pub low_percent: u8,
}

/// The volume of a tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TierVolume {
    /// A directory of the machine, absolute.
    HostPath(PathBuf),
    /// A directory of whoever runs the worker.
    EmptyDir,
}

/// A Dataset, with its credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedDataset {
    /// Its namespace.
    pub namespace: String,
    /// Its name, a DNS label.
    pub name: String,
    /// Name of a runtime of the manifest, in the same namespace.
    pub runtime: String,
    /// Its sources; paths are unique. Never empty.
    pub sources: Vec<ValidatedSource>,
    /// What happens when the quota or the disk is full.
    pub policy: Policy,
    /// Most bytes on all workers together.
    pub quota_bytes: Option<u64>,
    /// Bytes on all workers together that others never bring it below.
    pub reserve_bytes: u64,
    /// Who loses room to whom.
    pub priority: i32,
    /// How long what nobody reads is held.
    pub ttl: Option<Duration>,
    /// How many workers hold the same bytes.
    pub replicas: Replicas,
    /// What its mount is made for.
    pub shape: VolumeShape,
    /// How soon what changes at a source is to be seen; `None`: when somebody asks for it.
    pub sync_interval: Option<Duration>,
}

/// A source of a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedSource {
    /// Where it appears: absolute, normal; `/` or `/a/b`.
    pub path: String,
    /// `s3://BUCKET/PREFIX/`, `file:///DIRECTORY`, `http://HOST/DIRECTORY/` or `https://HOST/DIRECTORY/`, not
    /// percent-encoded; the last slash may be missing.
    pub uri: String,
    /// How to speak to the store; only with `s3://`.
    pub s3: Option<S3>,
    /// Who to be. `None`: the identity of the process.
    pub credentials: Option<Credentials>,
    /// What all workers together may ask of it.
    pub request_budget: RequestBudget,
}

/// How to speak to a store that speaks S3.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3 {
    /// `http://` or `https://`, host, perhaps a port.
    pub endpoint: Option<String>,
    /// Region that requests are signed for.
    pub region: Option<String>,
    /// Where the bucket stands in the URL.
    pub addressing: Option<Addressing>,
}

/// A key pair for a store. `Debug` shows only the access key.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Who.
    pub access_key_id: String,
    /// The proof.
    pub secret_access_key: String,
    /// For temporary credentials.
    pub session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { access_key_id, secret_access_key: _, session_token } = self;
        f.debug_struct("Credentials")
            .field("access_key_id", access_key_id)
            .field("secret_access_key", &"<redacted>")
            .field("session_token", &session_token.as_ref().map(|_| "<redacted>"))
            .finish()
    }
}

/// Reads and validates files together: a Dataset of one may name a CacheRuntime or a Secret of another. The errors come
/// in the order of files and lines.
pub fn load(files: &[PathBuf]) -> Result<Manifest, Vec<ManifestError>> {
    if files.len() > MAX_FILES {
        let message = format!("{} manifest files are too many", files.len());
        return Err(vec![ManifestError::of_file("", message, format!("give at most {MAX_FILES}"))]);
    }
    let mut texts = Vec::with_capacity(files.len());
    let mut errors = Vec::new();
    for file in files {
        let name = file.display().to_string();
        match read(file) {
            Ok(text) => texts.push((name, text)),
            Err((message, remedy)) => errors.push(ManifestError::of_file(&name, message, remedy)),
        }
    }
    let complete = errors.is_empty();
    let result = resolve::resolve(texts.iter().map(|(name, text)| (name.as_str(), text.as_str())), complete);
    match result {
        Ok(manifest) if complete => Ok(manifest),
        Ok(_) => Err(errors),
        Err(more) => {
            errors.extend(more);
            Err(errors)
        }
    }
}

/// As [`load`], of one text; `name` stands for the file's name in errors.
pub fn parse(name: &str, text: &str) -> Result<Manifest, Vec<ManifestError>> {
    if text.len() > MAX_FILE_BYTES {
        let (message, remedy) = too_large();
        return Err(vec![ManifestError::of_file(name, message, remedy)]);
    }
    resolve::resolve([(name, text)], true)
}

/// The text of a file, or what is wrong with it and what to do.
fn read(path: &Path) -> Result<String, (String, &'static str)> {
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file that is too large; the length in its metadata could lie.
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| (format!("cannot be read: {error}"), "give a file that exists and can be read"))?;
    if bytes.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    String::from_utf8(bytes)
        .map_err(|_| ("is not UTF-8 text".into(), "save it as UTF-8, or give the file that was meant"))
}

fn too_large() -> (String, &'static str) {
    (format!("has more than {MAX_FILE_BYTES} bytes"), "spread the objects over several files")
}
