//! Forebay's Kubernetes API, group `forebay.io`, version `v1alpha1`.
//!
//! - [`Dataset`], [`CacheRuntime`] and [`PreloadPolicy`]: the objects as Rust types; their schemas come from these types, and the files in
//!   `crds/` and `docs/api.md` from the schemas (`cargo run -p forebay-api --example crds -- --write`).
//! - [`rules`]: every rule that a schema alone cannot say, once in CEL for the API server and once in Rust. Tests run
//!   both over the same cases.
//! - [`calendar`]: the times that a schedule names.
//! - [`edits`]: what an edit of each field does.
//! - [`manifest`]: YAML files to validated specs, for people who serve Datasets without a cluster.
//!
//! Invariants: a field is in the schema only if something acts on it; what the API server refuses, [`manifest`]
//! refuses; this crate has no I/O but reading manifest files, and knows no other crate of Forebay.

// `KubeSchema` puts a second type, as public as the first, beside each one.
#[allow(unreachable_pub)]
mod cache_runtime;
pub mod calendar;
#[allow(unreachable_pub)]
mod dataset;
pub mod edits;
pub mod manifest;
mod names;
#[allow(unreachable_pub)]
mod preload_policy;
mod quantity;
pub mod rules;
mod schema;
mod status;
#[allow(unreachable_pub)]
mod template;

pub use cache_runtime::{
    CacheRuntime, CacheRuntimeSpec, CacheRuntimeStatus, EmptyDirVolume, HostPathVolume, Medium, Tier, TierVolume,
    Watermarks,
};
pub use dataset::{
    Addressing, Cache, Dataset, DatasetSpec, DatasetStatus, MetadataSync, Policy, Replicas, RequestBudget, RuntimeRef,
    S3Options, SecretRef, Source, SyncMode, Volume, VolumeShape,
};
pub use names::{MAX_OBJECT_NAME, WORKER_HTTP_PORT, WORKER_PORT, object_name, service_address};
pub use preload_policy::{
    Apply, ConcurrencyPolicy, ConfigMapRef, DatasetReady, DatasetRef, HistoryLimits, Limits, Load, LoadOrder,
    ManifestRef, PreloadPolicy, PreloadPolicySpec, PreloadPolicyStatus, Run, RunPhase, RunTrigger, Schedule, Select,
    SourceChanged, Trigger,
};
pub use quantity::{Quantity, QuantityError};
pub use schema::crds;
pub use status::{MemberState, Phase, WorkerMember, WorkerTable};
pub use template::{
    Amount, LabelValue, PodMetadata, PodPieces, PodTemplate, Resources, TaintEffect, Toleration, TolerationOperator,
};

/// The API group.
pub const GROUP: &str = "forebay.io";
/// The version of the API.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of every object of the group.
pub const API_VERSION: &str = "forebay.io/v1alpha1";
