//! The cache worker: caches the data of Datasets on its disk, answers metadata for the directories it owns, and alone
//! speaks to the sources.
//!
//! - `listener`: one port; every connection begins with the handshake, then carries frames or gRPC;
//! - `data`: the data server; `fill`: the engine that fetches what is not held;
//! - `grpc`: the Metadata and Control services; `load`, `scan`, `notices`: what they do that takes long, and what workers
//!   tell each other;
//! - `dataset`, `datasets`, `members`, `reload`: what is served, by whom, and how that changes;
//! - `metrics`, `http`: what can be observed.
//!
//! Not handled here: how bytes lie on disk (`forebay-cache-store`), how listings do (`forebay-metadata`), who starts
//! workers and writes their files (`forebay up`, the operator).

mod budget;
mod config;
mod copies;
mod data;
mod dataset;
mod datasets;
mod fill;
mod grpc;
mod heat;
mod http;
mod listener;
mod load;
mod members;
mod metrics;
mod notices;
mod reload;
mod scan;
mod worker;

pub use config::{
    ConfigError, DatasetConfig, DatasetsFile, Replicas, RequestBudget, SourceConfig, TableFile, VolumeShape,
    WorkerOptions,
};
pub use dataset::SourceProblem;
pub use forebay_cache_store::Policy;
pub use worker::{RunningWorker, run};
