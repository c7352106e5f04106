//! `Dataset`: what is cached, and from where.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Phase, Quantity, rules};

/// What is cached, and from where.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "forebay.io",
    version = "v1alpha1",
    kind = "Dataset",
    namespaced,
    status = "DatasetStatus",
    derive = "PartialEq",
    category = "forebay",
    doc = "A directory tree made of one or more places in object stores, served read-only from the workers of a \
           CacheRuntime.",
    validation = Rule::from(rules::DATASET_NAME),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase", description = "Where it stands"),
    printcolumn(name = "Files", type_ = "integer", json_path = ".status.files", description = "Files in its sources"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size", description = "Bytes of these files"),
    printcolumn(name = "Cached", type_ = "string", json_path = ".status.cached", description = "Bytes on workers"),
    printcolumn(
        name = "Hit%",
        type_ = "integer",
        json_path = ".status.hitRatioPercent",
        description = "Of the bytes that were read, how many were on workers, in percent"
    ),
    printcolumn(
        name = "Revision",
        type_ = "string",
        json_path = ".status.revision",
        description = "Digest of all files with their versions",
        priority = 1
    ),
    printcolumn(
        name = "Runtime",
        type_ = "string",
        json_path = ".spec.runtimeRef.name",
        description = "The CacheRuntime that serves it",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct DatasetSpec {
    /// The CacheRuntime, in the same namespace, whose workers serve this dataset.
    #[x_kube(validation = Rule::from(rules::RUNTIME_REF_IMMUTABLE))]
    pub runtime_ref: RuntimeRef,
    /// The places that the tree is made of, by the path at which each appears. Paths may be nested: within its path, the
    /// longer one hides the shorter.
    #[schemars(length(min = 1, max = rules::MAX_SOURCES))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["path".into()]))]
    pub sources: Vec<Source>,
    /// When changes at the sources are looked for. Besides, each new value of the annotation
    /// `forebay.io/refreshRequestedAt` of the Dataset has them listed again.
    #[serde(default)]
    pub sync: MetadataSync,
    /// What workers keep.
    #[serde(default)]
    pub cache: Cache,
    /// How it is mounted.
    #[serde(default)]
    pub volume: Volume,
}

/// A CacheRuntime by name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeRef {
    /// Name of the CacheRuntime.
    #[schemars(length(max = rules::MAX_LABEL))]
    #[x_kube(validation = Rule::from(rules::LABEL))]
    pub name: String,
}

/// A place that becomes a directory of the dataset.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::S3_OPTIONS), validation = Rule::from(rules::SECRET_REF))]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Where it appears in the dataset: `/` or a directory such as `/labels`.
    #[schemars(length(max = rules::MAX_PATH))]
    #[x_kube(validation = Rule::from(rules::PATH))]
    pub path: String,
    /// The place: `s3://BUCKET/PREFIX/`, `file:///DIRECTORY` on every machine that runs a worker, or
    /// `https://HOST/DIRECTORY/` (or `http://`) of a web server with WebDAV, without credentials. Taken as it is written,
    /// without percent-decoding.
    #[schemars(length(max = rules::MAX_URI))]
    #[x_kube(
        validation = Rule::from(rules::URI_SCHEME),
        validation = Rule::from(rules::URI_S3),
        validation = Rule::from(rules::URI_FILE),
        validation = Rule::from(rules::URI_HTTP),
        validation = Rule::from(rules::URI_PLAIN)
    )]
    pub uri: String,
    /// Secret, in the same namespace, with the credentials: keys `accessKeyId`, `secretAccessKey` and, for temporary
    /// ones, `sessionToken`. Absent: the workers' own identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// How to speak to the store; for `s3://` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Options>,
    /// What all workers together may ask of it in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_budget: Option<RequestBudget>,
}

/// Requests that a source may get in a second from all workers together, those that are tried again included. When the
/// source answers 429 or 503 it gets fewer for a while.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestBudget {
    /// For bytes of files (GET). Absent: as many as the workers send.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub get_per_second: Option<u32>,
    /// For pages of listings (LIST, PROPFIND). Absent: as many as the workers send.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list_per_second: Option<u32>,
    /// For the versions of single files (HEAD). Absent: as many as the workers send.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_per_second: Option<u32>,
}

impl DatasetSpec {
    /// GET requests that all sources together may get in a second; `None`: as many as the workers send to one of them.
    pub fn gets_per_second(&self) -> Option<u64> {
        let budgets = self.sources.iter().map(|source| source.request_budget?.get_per_second.map(u64::from));
        budgets.sum()
    }
}

/// A Secret by name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Name of the Secret.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::from(rules::SUBDOMAIN))]
    pub name: String,
}

/// How to speak to a store that speaks S3.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct S3Options {
    /// URL of the service, such as `https://s3.example.com`. Absent: Amazon S3 in `region`.
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::from(rules::ENDPOINT))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Region that requests are signed for. Absent: that of the workers' own identity if they use it, else `us-east-1`.
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::from(rules::REGION))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Where the bucket stands in the URL of a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addressing: Option<Addressing>,
}

/// Where the bucket stands in the URL of a request: `Path` is `https://ENDPOINT/BUCKET/KEY`, `VirtualHost` is
/// `https://BUCKET.ENDPOINT/KEY`. Absent: `VirtualHost` for Amazon S3 and buckets without a dot, else `Path`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Addressing {
    /// `https://ENDPOINT/BUCKET/KEY`.
    Path,
    /// `https://BUCKET.ENDPOINT/KEY`.
    VirtualHost,
}

/// When changes at the sources are looked for. A file that is read and turns out to be another version than the one that
/// is known is corrected at once, whatever the mode.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::SYNC_INTERVAL))]
#[serde(rename_all = "camelCase")]
pub struct MetadataSync {
    /// `Snapshot`: what was listed stays as it is until somebody asks for a refresh. `Periodic`: the sources are listed
    /// again and again; nobody waits for it, and while a source is away what is known is served.
    #[serde(default)]
    pub mode: SyncMode,
    /// How soon what changes at a source is seen, such as `5m`; of `Periodic`. The sources are listed as often as that
    /// takes; if a listing takes longer than half of it, with pauses as long as a listing.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::from(rules::DURATION))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
}

impl MetadataSync {
    /// The interval; `None`: the sources are listed when somebody asks for it.
    pub fn interval(&self) -> Option<Duration> {
        let interval = self.interval.as_deref().filter(|_| self.mode == SyncMode::Periodic)?;
        Some(Duration::from_secs(rules::seconds(interval)?.max(1)))
    }
}

/// When changes at the sources are looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SyncMode {
    /// When somebody asks for it.
    #[default]
    Snapshot,
    /// All the time.
    Periodic,
}

/// What workers keep of a dataset.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cache {
    /// What happens when the quota or the disk is full. `Hold`: what is there stays, what comes is streamed and not
    /// stored, so that a dataset larger than the cache does not push itself out. With the others what comes takes the
    /// place of what was used longest ago (`LRU`) or least often (`LFU`), of the oldest that was not used since it was
    /// last looked at (`SIEVE`), or of what came first (`FIFO`). When the disk is full, all datasets of the same `priority`
    /// but those that `Hold` make room, to new data of any of them, each as much as it has among what was used longest ago.
    #[serde(default)]
    pub policy: Policy,
    /// Most bytes of this dataset on all workers together. Absent: as much as their disks hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quantity>,
    /// Bytes on all workers together that other datasets never bring it below. They are not set aside: room that this
    /// dataset does not use is used by others. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve: Option<Quantity>,
    /// Where the disk is full and this dataset needs room, datasets of lower priority lose what they have beyond their
    /// `reserve`, whatever their policy, the lowest first; those of higher priority lose nothing to it.
    #[schemars(range(min = -1000, max = 1000))]
    #[serde(default)]
    pub priority: i32,
    /// How long workers hold what nobody reads, such as `72h`. What is pinned stays, and nothing is deleted at the sources.
    /// Absent: as long as there is room for it.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::from(rules::DURATION))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    /// How many workers hold the same bytes.
    #[serde(default)]
    pub replicas: Replicas,
}

/// How many workers hold the same bytes; all of them, when there are fewer.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::REPLICAS))]
#[serde(rename_all = "camelCase")]
pub struct Replicas {
    /// Copies of whatever is held whole. They are made in the background, from worker to worker; after a worker is lost,
    /// those that it had are made again. `quota` counts each of them.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default = "one")]
    pub min: u32,
    /// Copies, at most, of what is read so often that one worker is busy with it. They are made when that is seen, and
    /// give way first when room is needed. Absent: `min`.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
}

fn one() -> u32 {
    1
}

impl Default for Replicas {
    fn default() -> Self {
        Self { min: one(), max: None }
    }
}

impl Replicas {
    /// `max`, or what stands for it.
    pub fn most(&self) -> u32 {
        self.max.unwrap_or(self.min)
    }
}

impl Cache {
    /// The lifetime of what nobody reads; `None`: there is none.
    pub fn ttl(&self) -> Option<Duration> {
        Some(Duration::from_secs(rules::seconds(self.ttl.as_deref()?)?.max(1)))
    }
}

/// How a dataset is mounted.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// What a mount is made for, from when a node mounts it until it is unmounted there. `Large`: large files, each opened
    /// by a request to the daemon. `Small`: many small files, opened by the kernel itself, so that what it has in memory
    /// is read again without a request. `Auto`: `Small` when all files are counted and have less than 1 MiB on the average,
    /// else `Large`.
    #[serde(default)]
    pub shape: VolumeShape,
}

/// What a mount is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VolumeShape {
    /// What suits the files that were counted.
    #[default]
    Auto,
    /// Large files.
    Large,
    /// Many small files.
    Small,
}

/// What happens when the quota or the disk is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Policy {
    /// What is there stays; what comes is streamed and not stored.
    #[default]
    Hold,
    /// What comes takes the place of what was used longest ago.
    #[serde(rename = "LRU")]
    Lru,
    /// What comes takes the place of what was used least often.
    #[serde(rename = "LFU")]
    Lfu,
    /// What comes takes the place of the oldest that was not used since the last look at it.
    #[serde(rename = "SIEVE")]
    Sieve,
    /// What comes takes the place of what came first.
    #[serde(rename = "FIFO")]
    Fifo,
}

/// What was last seen of a dataset.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetStatus {
    /// `metadata.generation` that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the dataset stands; the conditions say why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Digest of all files with their paths and versions: the same revision is the same data, whenever it was listed, and by
    /// whom. Absent until they have been counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// What changed at the sources before this time is seen. Of sync mode `Periodic`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sync_time: Option<Time>,
    /// Value of the annotation `forebay.io/refreshRequestedAt` for which the sources were last listed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_refresh: Option<String>,
    /// Files in all sources. Absent until they have been counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
    /// Bytes of these files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Bytes on the disks of workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_bytes: Option<u64>,
    /// Of `cachedBytes`, those of copies: bytes on a worker that are, or would be, on another one first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicated_bytes: Option<u64>,
    /// Bytes on the disks of workers that are pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_bytes: Option<u64>,
    /// `bytes` for people, such as `138Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// `cachedBytes` for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached: Option<String>,
    /// Bytes that readers asked workers for and that were there, since the dataset was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hits: Option<u64>,
    /// Bytes that readers asked workers for and that had to be fetched, since the dataset was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub misses: Option<u64>,
    /// `hits` of `hits` and `misses` together, in percent, rounded down. Absent until something was read.
    #[schemars(range(min = 0, max = 100))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hit_ratio_percent: Option<u8>,
    /// Bytes dropped from the workers' disks to make room, or because there is a newer version, since the dataset was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evicted_bytes: Option<u64>,
    /// Bytes dropped because nobody read them for the dataset's `ttl`, since it was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expired_bytes: Option<u64>,
    /// The PersistentVolumeClaim that pods mount. Absent until it was made, and again once it is gone: workers forget a
    /// dataset that is being deleted only then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim_name: Option<String>,
    /// What is the case, by type: `Ready`, `Progressing`, `Degraded`.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
