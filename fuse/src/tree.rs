//! The seam between the file system and where names and bytes come from: the client library ([`crate::remote`]), or
//! memory ([`crate::memory`], for tests and for trying a mount without workers).

use std::{
    future::{self, Future},
    sync::Arc,
};

use bytes::Bytes;
pub use forebay_client::{Ahead, ClientError as TreeError, Entry, EntryKind, Inspection, ListPage};
use forebay_keeper::{Health, tables::Shape};
use forebay_protocol::{DatasetId, DatasetPath, FileVersion};
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};

/// The sort key of a name; see [`Entry::sort_key`]. Directories sort as if their names ended with `/`: the order in which
/// object stores list.
pub fn sort_key(name: &Bytes, directory: bool) -> Bytes {
    if !directory {
        return name.clone();
    }
    let mut key = Vec::with_capacity(name.len() + 1);
    key.extend_from_slice(name);
    key.push(b'/');
    key.into()
}

/// Sums over the whole tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Digest of all of them with their versions, when they have all been counted.
    pub revision: Option<u64>,
}

/// Something changed at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Names of one directory were added, changed or removed; none: too many to name.
    Names {
        /// The directory.
        directory: DatasetPath,
        /// The names.
        names: Vec<Bytes>,
    },
    /// Anything may have changed.
    Everything,
}

/// Names and bytes. Every call has a deadline of its own.
pub trait Tree: Send + Sync + 'static {
    /// Reads one version of one file.
    type Reader: Reader;

    /// One entry of a directory.
    fn lookup(&self, directory: &DatasetPath, name: &[u8]) -> impl Future<Output = Result<Entry, TreeError>> + Send;

    /// The entries whose sort keys follow `after` (empty: from the start), at most `limit`.
    fn list(
        &self,
        directory: &DatasetPath,
        after: &[u8],
        limit: u32,
    ) -> impl Future<Output = Result<ListPage, TreeError>> + Send;

    /// A reader of this version. No request is made: the first read finds out whether it still exists.
    fn open(&self, path: DatasetPath, version: FileVersion) -> Arc<Self::Reader>;

    /// The dataset, as soon as it is known, where a volume's configuration only names it.
    fn dataset(&self) -> impl Future<Output = Option<DatasetId>> + Send {
        future::ready(None)
    }

    /// What the cache holds of a version, and whose it is.
    fn inspect(
        &self,
        path: &DatasetPath,
        version: &FileVersion,
    ) -> impl Future<Output = Result<Inspection, TreeError>> + Send;

    /// The worker that answers for a directory; `None` when there are no workers.
    fn directory_owner(&self, path: &DatasetPath) -> Option<String>;

    /// What changes from now on. It begins with [`Change::Everything`] when it cannot tell what changed before.
    fn changes(&self) -> BoxStream<'static, Change>;

    /// Sums, as far as they are known; asked now and then in the background, never by a request.
    fn totals(&self) -> impl Future<Output = Option<Totals>> + Send;

    /// The shape that suits a mount of it; `None` when that cannot be told.
    fn shape(&self) -> impl Future<Output = Option<Shape>> + Send {
        future::ready(Some(Shape::Large))
    }

    /// How the volume is, and then its changes. What cannot be away is healthy.
    fn health(&self) -> BoxStream<'static, Health> {
        stream::iter([Health::default()]).boxed()
    }
}

/// Reads one version of one file.
pub trait Reader: Send + Sync + 'static {
    /// Exactly `min(len, size - offset)` bytes, in order, in as many pieces as they came.
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = Result<Vec<Bytes>, TreeError>> + Send;

    /// Begins to fetch what a first read will want. Nothing can be fetched ahead where bytes are at hand.
    fn fetch_ahead(&self) -> impl Future<Output = Ahead> + Send {
        future::ready(Ahead::There)
    }
}
