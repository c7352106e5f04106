//! One trait over the stores that hold the data: conditional range reads, paged listings, errors by what the caller
//! can do.
//!
//! [`open`] gives the store of a [`SourceSpec`]. Backends: `s3`, `http` and `file`. What they share: `limits`
//! (concurrency, rate, bytes in flight), `allowance` (a rate that is lent) and `patience` (deadline, back-off); those that speak HTTP also `wire` (one
//! request), `version` (what names a version) and `origin` with `body` (conditional reads that are resumed).
//! `conformance` (behind a feature) is the suite that each of them passes.

mod allowance;
mod body;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod error;
mod file;
mod http;
mod limits;
mod origin;
mod patience;
mod requests;
mod s3;
mod source;
mod store;
mod version;
mod wire;

use std::sync::Arc;

pub use self::{
    allowance::{Allowance, Usage},
    error::StoreError,
    limits::Limits,
    requests::Verb,
    source::{S3Addressing, S3Credentials, S3Options, SourceSpec},
    store::{ByteStream, Item, ItemKind, Page, Requests, StoreFuture, UnderStore},
};
use self::{file::FileStore, http::HttpStore, limits::Limiter, s3::S3Store, source::Location};

/// The store at `spec`: `s3://bucket/prefix/`, `file:///dir`, `http://host/dir/` or `https://host/dir/`. Nothing is asked
/// of it yet: a store that is away when this is called may be there when it is needed. Every request waits for `allowance`,
/// which others may change at any time.
pub fn open(spec: &SourceSpec, limits: &Limits, allowance: Arc<Allowance>) -> Result<Arc<dyn UnderStore>, StoreError> {
    limits.validate()?;
    let limiter = Limiter::new(limits, allowance);
    match Location::parse(spec)? {
        Location::S3 { bucket, prefix } => Ok(Arc::new(S3Store::new(spec, bucket, prefix, limits, limiter)?)),
        Location::Http { root } => Ok(Arc::new(HttpStore::new(root, limits, limiter)?)),
        Location::File { root } => Ok(Arc::new(FileStore::new(root, limits, limiter))),
    }
}
