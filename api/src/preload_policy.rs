//! `PreloadPolicy`: what is loaded before it is read, and when.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Quantity, rules};

/// What is loaded before it is read, and when.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "forebay.io",
    version = "v1alpha1",
    kind = "PreloadPolicy",
    plural = "preloadpolicies",
    namespaced,
    status = "PreloadPolicyStatus",
    derive = "PartialEq",
    shortname = "plp",
    category = "forebay",
    doc = "Files of a Dataset that its workers load before they are read, and when they do. Each run is a Job.",
    validation = Rule::from(rules::POLICY_NAME),
    printcolumn(name = "Dataset", type_ = "string", json_path = ".spec.datasetRef.name", description = "What is loaded"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.lastRun.phase", description = "Of the last run"),
    printcolumn(
        name = "Files",
        type_ = "integer",
        json_path = ".status.lastRun.files",
        description = "Files that the last run loaded, or found loaded"
    ),
    printcolumn(
        name = "Loaded%",
        type_ = "integer",
        json_path = ".status.lastRun.percent",
        description = "Of the bytes that the last run selects, in percent"
    ),
    printcolumn(name = "Last-Run", type_ = "date", json_path = ".status.lastRun.startTime", description = "Its begin"),
    printcolumn(
        name = "Next-Run",
        type_ = "string",
        json_path = ".status.nextScheduleTime",
        description = "When the next one is scheduled"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::from(rules::ORDER))]
#[serde(rename_all = "camelCase")]
pub struct PreloadPolicySpec {
    /// The Dataset, in the same namespace.
    #[x_kube(validation = Rule::from(rules::DATASET_REF_IMMUTABLE))]
    pub dataset_ref: DatasetRef,
    /// What starts a run. Besides, each new value of the annotation `forebay.io/requestedAt` of the policy starts one.
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub triggers: Vec<Trigger>,
    /// Which files are loaded. Absent: all.
    #[serde(default)]
    pub select: Select,
    /// Which of them come first, on each worker. As the manifest names them, or else as they are found, if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<LoadOrder>,
    /// Among runs at the same workers, those of a lower priority wait until those of a higher one have ended.
    #[schemars(range(min = -1000, max = 1000))]
    #[serde(default)]
    pub priority: i32,
    /// How they are loaded.
    #[serde(default)]
    pub load: Load,
    /// How fast a run may ask the sources, over all workers together. What a reader waits for comes at once all the same.
    #[serde(default)]
    pub limits: Limits,
    /// What happens when a run is to start while another one is active.
    #[serde(default)]
    pub concurrency_policy: ConcurrencyPolicy,
    /// Starts no run while it is true. What was due meanwhile is made up for by one run afterwards.
    #[serde(default)]
    pub suspend: bool,
    /// How long a run may take, such as `2h`; then it has failed. Absent: as long as it takes.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::from(rules::DURATION))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// How often a run that fails is tried again before it has failed. What is loaded stays loaded.
    #[schemars(range(min = 0, max = 100))]
    #[serde(default = "three")]
    pub backoff_limit: u32,
    /// How many ended runs are in the status, and their Jobs kept.
    #[serde(default)]
    pub history_limits: HistoryLimits,
    /// How long the Job of an ended run is kept, such as `30m`.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::from(rules::DURATION))]
    #[serde(default = "one_hour")]
    pub ttl_after_finished: String,
}

/// A Dataset by name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetRef {
    /// Name of the Dataset.
    #[schemars(length(max = rules::MAX_LABEL))]
    #[x_kube(validation = Rule::from(rules::LABEL))]
    pub name: String,
}

/// What starts a run: exactly one member is set.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::ONE_TRIGGER))]
#[serde(rename_all = "camelCase")]
pub struct Trigger {
    /// The Dataset is Ready for the first time: once for each Dataset of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_ready: Option<DatasetReady>,
    /// The Dataset has another revision than the one that the last run began with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_changed: Option<SourceChanged>,
    /// Times of a calendar. Those that pass while no run can start are made up for by one run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
}

/// The Dataset is Ready for the first time; it has no options.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetReady {}

/// The Dataset has another revision; it has no options.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceChanged {}

/// Times of a calendar.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Schedule {
    /// Minute, hour, day of the month, month and day of the week, as cron takes them, or `@hourly`, `@daily`, `@weekly`,
    /// `@monthly`, `@yearly`.
    #[schemars(length(max = 128))]
    #[x_kube(validation = Rule::from(rules::CRON))]
    pub cron: String,
    /// Name of the time zone of the calendar, such as `Europe/Madrid`. Absent: `UTC`.
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::from(rules::TIME_ZONE))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

/// Which files are loaded: those that all of it takes.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Select {
    /// A file or directory of the dataset.
    #[schemars(length(max = rules::MAX_PATH))]
    #[x_kube(validation = Rule::from(rules::PATH))]
    #[serde(default = "root")]
    pub path: String,
    /// Globs of paths below the dataset's root, such as `train/**`; a file matches one of them. `*` and `?` stay within a
    /// directory, `**` does not. Absent: all.
    #[schemars(length(max = 32), inner(length(min = 1, max = rules::MAX_PATH)))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Globs of which a file matches none.
    #[schemars(length(max = 32), inner(length(min = 1, max = rules::MAX_PATH)))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Fewest bytes of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_size: Option<Quantity>,
    /// Most bytes of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<Quantity>,
    /// Only files that were modified at least so long before the run starts, such as `1h`.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::from(rules::DURATION))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_age: Option<String>,
    /// Only files that were modified at most so long before the run starts, such as `24h`.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::from(rules::DURATION))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<String>,
    /// What is loaded, by name. Absent: everything below `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<ManifestRef>,
}

/// Names of what is loaded, in the order in which it is: a line for each file or directory, with its path below the
/// dataset's root. What is not there has failed; an empty line is nothing. Exactly one member is set.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::from(rules::ONE_MANIFEST))]
#[serde(rename_all = "camelCase")]
pub struct ManifestRef {
    /// A file of the dataset, such as `/lists/train.txt`, of at most 64 MiB.
    #[schemars(length(max = rules::MAX_PATH))]
    #[x_kube(validation = Rule::from(rules::PATH))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A key of a ConfigMap in the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ConfigMapRef>,
}

/// A key of a ConfigMap.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapRef {
    /// Name of the ConfigMap.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::from(rules::SUBDOMAIN))]
    pub name: String,
    /// The key whose value has the lines.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::from(rules::CONFIG_KEY))]
    pub key: String,
}

impl Default for Select {
    fn default() -> Self {
        Self {
            path: root(),
            include: Vec::new(),
            exclude: Vec::new(),
            min_size: None,
            max_size: None,
            min_age: None,
            max_age: None,
            manifest: None,
        }
    }
}

/// How files are loaded.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Load {
    /// Whether what is loaded is pinned: never evicted, also not after a restart, until it is unpinned. A file that cannot
    /// be pinned, for want of room, has failed.
    #[serde(default)]
    pub pin: Apply,
    /// Whether what is held is read again from the workers' disks, and loaded again where it is damaged.
    #[serde(default)]
    pub verify: Apply,
    /// Workers that hold each file when the run is complete; all of them, when there are fewer. Copies beyond the Dataset's
    /// `cache.replicas.min` stay as long as there is room for them, those beyond its `max` also when `pin` is `Always`.
    /// Absent, or less than `min`: as the Dataset says.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
}

/// Which files come first. A run begins when its files are known, or 65,536 on a worker; of more than that, each time the
/// first of those that are known is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LoadOrder {
    /// By path, byte by byte.
    Name,
    /// The smallest first.
    Size,
    /// As the manifest names them.
    Manifest,
}

/// Whether something is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Apply {
    /// It is not.
    #[default]
    Never,
    /// It is, to every file.
    Always,
}

/// How fast a run may ask the sources.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Bytes in a second, such as `500Mi`. Absent: as many as come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Quantity>,
    /// GET requests in a second. Absent: as many as the workers send.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
}

/// What happens when a run is to start while another one is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConcurrencyPolicy {
    /// It starts when the other one has ended.
    #[default]
    Forbid,
    /// The other one is ended. What it loaded stays loaded.
    Replace,
}

/// How many ended runs are kept.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryLimits {
    /// Of those that loaded everything.
    #[schemars(range(min = 0, max = 20))]
    #[serde(default = "three")]
    pub succeeded: u32,
    /// Of those that failed.
    #[schemars(range(min = 0, max = 20))]
    #[serde(default = "three")]
    pub failed: u32,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { succeeded: three(), failed: three() }
    }
}

fn three() -> u32 {
    3
}

fn one_hour() -> String {
    "1h".to_owned()
}

fn root() -> String {
    "/".to_owned()
}

/// What was last seen of a policy and its runs.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PreloadPolicyStatus {
    /// `metadata.generation` that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The run that started last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_run: Option<Run>,
    /// Ended runs before it, the latest first.
    #[schemars(length(max = 40))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<Run>,
    /// When the next run is scheduled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_schedule_time: Option<Time>,
    /// The last time of a schedule for which a run started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_schedule_time: Option<Time>,
    /// UID of the Dataset for which trigger `datasetReady` started a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_dataset: Option<String>,
    /// Revision of the Dataset with which the last run began, or with which it was first seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Value of the annotation `forebay.io/requestedAt` for which a run started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_request: Option<String>,
    /// What is the case, by type: `Complete` (the last run loaded everything), `Failed` (the last run, or the policy itself
    /// cannot work) and, where there is a deadline, `DeadlineAtRisk` (at its rate, or by its limits, the run will miss it).
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// A run of a policy.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    /// Name of its Job.
    pub name: String,
    /// UID of its Job, under which workers keep its progress.
    pub uid: String,
    /// What started it.
    pub trigger: RunTrigger,
    /// Where it stands.
    pub phase: RunPhase,
    /// When it started.
    pub start_time: Time,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Files that are loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
    /// Files that are selected. Absent until they have been counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_files: Option<u64>,
    /// Bytes that are loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Bytes that are selected. Absent until they have been counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// `bytes` of `totalBytes`, in percent, rounded down.
    #[schemars(range(min = 0, max = 100))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// Bytes in a second, since it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// When it ends if it goes on like this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_time: Option<Time>,
    /// Files that could not be loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_files: Option<u64>,
    /// The first of them, with the reasons.
    #[schemars(length(max = 10))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_failures: Vec<String>,
    /// Why it failed, or what it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Run {
    /// One that has just started.
    pub fn new(name: String, uid: String, trigger: RunTrigger, start_time: Time) -> Self {
        Self {
            name,
            uid,
            trigger,
            phase: RunPhase::Pending,
            start_time,
            completion_time: None,
            files: None,
            total_files: None,
            bytes: None,
            total_bytes: None,
            percent: None,
            bytes_per_second: None,
            eta_time: None,
            failed_files: None,
            first_failures: Vec::new(),
            message: None,
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, RunPhase::Complete | RunPhase::Failed)
    }
}

/// What started a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RunTrigger {
    /// The Dataset became Ready.
    DatasetReady,
    /// The Dataset has another revision.
    SourceChanged,
    /// A time of a schedule.
    Schedule,
    /// The annotation `forebay.io/requestedAt`.
    Request,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RunPhase {
    /// No worker loads anything for it yet.
    Pending,
    /// Workers load.
    Running,
    /// Everything that was selected is loaded.
    Complete,
    /// It ended before.
    Failed,
}
