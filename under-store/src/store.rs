//! The trait that every backend implements.

use std::{
    future::Future,
    ops::{Add, Range},
    pin::Pin,
};

use bytes::Bytes;
use forebay_protocol::VersionKey;
use futures::stream::BoxStream;

use crate::StoreError;

/// Bytes of a range, in order; an error ends the stream.
pub type ByteStream = BoxStream<'static, Result<Bytes, StoreError>>;

/// A future of a store's answer.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// An entry of a directory of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Name within the directory: bytes, no slash, never empty.
    pub name: Vec<u8>,
    /// File or directory.
    pub kind: ItemKind,
}

/// What an [`Item`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ItemKind {
    /// Something below which there are keys.
    Directory,
    /// An object.
    File {
        /// Bytes.
        size: u64,
        /// Nanoseconds since the epoch.
        mtime_ns: i64,
        /// What the store calls this version.
        version: VersionKey,
    },
}

impl Item {
    /// The key by which listings are ordered and resumed: the name, with `/` appended for directories.
    pub fn sort_key(&self) -> Vec<u8> {
        let mut key = self.name.clone();
        if matches!(self.kind, ItemKind::Directory) {
            key.push(b'/');
        }
        key
    }
}

/// A page of a listing, in the order of sort keys. A name may come as file and as directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// The entries.
    pub items: Vec<Item>,
    /// Where the next page begins: pass it as `after`. `None`: this was the last page. It may be past the last item (or
    /// stand in a page without items) when the store listed keys that cannot be shown.
    pub next: Option<Vec<u8>>,
    /// Keys of this page that cannot be shown (empty or over-long components, not UTF-8 where the store wants it, ...).
    pub hidden: u64,
}

/// A store below one prefix. Keys are relative to it, bytes, `/`-separated, without a leading or trailing slash.
///
/// Every method retries what may pass (with jittered back-off) and ends by its deadline; it respects the store's limits
/// of concurrency and rate.
pub trait UnderStore: Send + Sync + 'static {
    /// A page of at most `limit` entries of `directory` (`b""` is the top) that come after the sort key `after`.
    /// A directory that does not exist is an empty one where the store has no directories, [`StoreError::NotFound`]
    /// elsewhere.
    fn list<'a>(&'a self, directory: &'a [u8], after: Option<&'a [u8]>, limit: usize) -> StoreFuture<'a, Page>;

    /// The object at `key` now; [`StoreError::NotFound`] when there is none.
    fn head<'a>(&'a self, key: &'a [u8]) -> StoreFuture<'a, Item>;

    /// Bytes `range` of the object at `key`, on condition that it still is `version` with `size` bytes in all;
    /// [`StoreError::VersionMismatch`] otherwise. The stream yields exactly the range or ends with an error: a short body
    /// is resumed (under the same condition) within the retries.
    fn get<'a>(
        &'a self,
        key: &'a [u8],
        version: &'a VersionKey,
        size: u64,
        range: Range<u64>,
    ) -> StoreFuture<'a, ByteStream>;

    /// Requests made so far, by verb.
    fn requests(&self) -> Requests;

    /// Asks whether the source is there and may be listed: one cheap request, and its retries.
    fn check(&self) -> StoreFuture<'_, ()>;

    /// Why the last request failed, while retries may still go on; `None` when it was answered. An object that is gone or
    /// changed is no problem; [`StoreError::NotFound`] here means that the bucket or the root directory is.
    fn problem(&self) -> Option<StoreError>;

    /// Whether directories exist of themselves, so that an empty listing is an empty directory (files). Otherwise it
    /// means that there is none.
    fn has_directories(&self) -> bool {
        false
    }
}

/// Counters of requests that went to the store, retries included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// GET.
    pub gets: u64,
    /// LIST.
    pub lists: u64,
    /// HEAD.
    pub heads: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Those of them that the store turned away because they were too many (429 and 503).
    pub throttled: u64,
    /// Bytes of bodies received.
    pub bytes: u64,
}

impl Add for Requests {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let Self { gets, lists, heads, errors, throttled, bytes } = other;
        Self {
            gets: self.gets + gets,
            lists: self.lists + lists,
            heads: self.heads + heads,
            errors: self.errors + errors,
            throttled: self.throttled + throttled,
            bytes: self.bytes + bytes,
        }
    }
}
