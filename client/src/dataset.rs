//! Names of one dataset: look-ups, listings, and where a file's bytes are.
//!
//! A directory's owner is asked first, then whoever follows in its order. What a worker's gRPC status means:
//!
//! | status | means |
//! |---|---|
//! | `NOT_FOUND` | the directory or the name does not exist: final |
//! | `FAILED_PRECONDITION` | the path names a file: final |
//! | `PERMISSION_DENIED` | the source refuses the credentials: final |
//! | `INVALID_ARGUMENT`, `OUT_OF_RANGE`, `UNIMPLEMENTED` | a defect of this side: final |
//! | everything else | this worker cannot (unknown dataset, stopping, source away, broken transport): the next one |
//!
//! The dataset's generation travels with every request and answer, and everybody adopts the highest.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use forebay_protocol::{
    ChunkKey, DatasetId, DatasetPath, FileVersion, VersionKey,
    errors::chain,
    identity::{directory_placement_key, is_valid_name},
    worker::{self, InspectRequest, ListRequest, LookupRequest, metadata_client::MetadataClient},
};
use futures::{
    StreamExt,
    future::{BoxFuture, FutureExt},
};
use tonic::{Code, Request, Status, transport::Channel};

use crate::{
    budget::until,
    client::Inner,
    error::ClientError,
    failover::Rotation,
    fetch::Target,
    members::{Member, count},
    reader::FileReader,
    walk::{self, Walk},
    watch::{self, Watch},
};

/// Entries in one page of a listing at most: with the longest names and keys about 2.3 MB, below the 4 MiB that a gRPC
/// message may have.
pub const MAX_PAGE: u32 = 4096;
/// Workers that are inspected at once.
const INSPECTIONS: usize = 16;

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, one path component.
    pub name: Bytes,
    /// What it is.
    pub kind: EntryKind,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A file, in its current version.
    File {
        /// Size, time, key.
        version: FileVersion,
    },
    /// A directory.
    Directory,
}

impl Entry {
    /// Where it stands in a listing: its name, with `/` after it if it is a directory.
    pub fn sort_key(&self) -> Bytes {
        match self.kind {
            EntryKind::File { .. } => self.name.clone(),
            EntryKind::Directory => [&self.name[..], b"/"].concat().into(),
        }
    }

    fn decode(entry: worker::Entry) -> Result<Self, String> {
        let worker::Entry { name, kind, size, mtime_ns, version_key } = entry;
        if !is_valid_name(&name) {
            return Err("an entry with an impossible name".into());
        }
        let kind = match worker::EntryKind::try_from(kind) {
            Ok(worker::EntryKind::File) => {
                let key = VersionKey::new(version_key).ok_or("an entry with a version key that is too long")?;
                EntryKind::File { version: FileVersion { size, mtime_ns, key } }
            }
            Ok(worker::EntryKind::Directory) => EntryKind::Directory,
            Ok(worker::EntryKind::Unspecified) | Err(_) => return Err("an entry of an unknown kind".into()),
        };
        Ok(Self { name, kind })
    }
}

/// A page of a directory, in the order of sort keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListPage {
    /// The entries.
    pub entries: Vec<Entry>,
    /// Whether it is the last page.
    pub end: bool,
}

/// What workers hold of a file version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Bytes of it that its owners hold.
    pub cached_bytes: u64,
    /// Whether one of them holds it pinned.
    pub pinned: bool,
    /// The worker that owns the first chunk; "" when nobody serves.
    pub owner: String,
}

/// Access to one dataset. Clones are cheap and share what they know.
#[derive(Clone)]
pub struct DatasetClient {
    pub(crate) client: Arc<Inner>,
    pub(crate) id: DatasetId,
    pub(crate) generation: Arc<AtomicU64>,
}

/// Why a worker did not answer as it should.
enum Refusal {
    Status(Status),
    /// It answered something that cannot be.
    Nonsense(String),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl DatasetClient {
    pub(crate) fn new(client: Arc<Inner>, id: DatasetId, generation: Arc<AtomicU64>) -> Self {
        Self { client, id, generation }
    }

    /// Whose names these are.
    pub fn id(&self) -> DatasetId {
        self.id
    }

    /// The highest generation that anybody told.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// One entry of a directory.
    pub async fn lookup(&self, directory: &DatasetPath, name: &[u8]) -> Result<Entry, ClientError> {
        if !is_valid_name(name) {
            return Err(ClientError::Invalid(format!("'{}' is no name", String::from_utf8_lossy(name))));
        }
        let request = LookupRequest {
            dataset: self.id.to_bytes(),
            generation: 0,
            directory: directory.to_bytes(),
            name: Bytes::copy_from_slice(name),
        };
        let call = |mut metadata: MetadataClient<Channel>, generation, within| {
            let mut request = Request::new(LookupRequest { generation, ..request.clone() });
            request.set_timeout(within);
            async move {
                let answer = metadata.lookup(request).await?.into_inner();
                let wanted = answer.entry.ok_or_else(|| Refusal::Nonsense("an answer without its entry".into()))?;
                Ok((answer.generation, Entry::decode(wanted).map_err(Refusal::Nonsense)?))
            }
            .boxed()
        };
        self.ask(directory, call).await
    }

    /// A page of a directory: at most `limit` entries (and at most [`MAX_PAGE`]) whose sort keys are above `after`,
    /// which is empty for the first page, else [`Entry::sort_key`] of the last entry of the page before.
    pub async fn list(&self, directory: &DatasetPath, after: &[u8], limit: u32) -> Result<ListPage, ClientError> {
        let request = ListRequest {
            dataset: self.id.to_bytes(),
            generation: 0,
            directory: directory.to_bytes(),
            after: Bytes::copy_from_slice(after),
            limit: limit.clamp(1, MAX_PAGE),
        };
        let call = |mut metadata: MetadataClient<Channel>, generation, within| {
            let mut request = Request::new(ListRequest { generation, ..request.clone() });
            request.set_timeout(within);
            async move {
                let answer = metadata.list(request).await?.into_inner();
                let entries: Result<_, _> = answer.entries.into_iter().map(Entry::decode).collect();
                Ok((answer.generation, ListPage { entries: entries.map_err(Refusal::Nonsense)?, end: answer.end }))
            }
            .boxed()
        };
        self.ask(directory, call).await
    }

    /// Everything below a directory, in no particular order. A directory that cannot be listed is an error in the
    /// stream, which goes on; one that vanishes meanwhile is left out.
    pub fn walk(&self, directory: DatasetPath) -> Walk {
        walk::start(self.clone(), directory)
    }

    /// Changes of this dataset, from all workers.
    pub fn watch(&self) -> Watch {
        watch::start(self.clone())
    }

    /// A reader of one version of a file.
    pub fn open(&self, path: DatasetPath, version: FileVersion) -> Arc<FileReader> {
        let identity = version.identity(self.id, &path);
        let target = Target { dataset: self.id, path, version, identity, generation: self.generation.clone() };
        FileReader::new(self.client.clone(), target)
    }

    /// What the owners of a file version's chunks hold of it. Workers that do not answer count as holding nothing,
    /// unless nobody answers.
    pub async fn inspect(&self, path: &DatasetPath, version: &FileVersion) -> Result<Inspection, ClientError> {
        let deadline = self.client.deadline();
        let snapshot = self.client.members.snapshot();
        let file = version.identity(self.id, path);
        let mut owners: Vec<Arc<Member>> = Vec::new();
        let chunks = version.size.div_ceil(forebay_protocol::CHUNK_SIZE).max(1);
        for index in 0..chunks {
            // All own something: no need to look at the rest of a huge file.
            if owners.len() == snapshot.members.len() {
                break;
            }
            let owner =
                u32::try_from(index).ok().and_then(|index| snapshot.owner(ChunkKey { file, index }.placement_key()));
            if let Some(owner) = owner
                && !owners.iter().any(|other| Arc::ptr_eq(other, owner))
            {
                owners.push(owner.clone());
            }
        }
        let mut inspection = Inspection {
            owner: owners.first().map(|owner| owner.name.clone()).unwrap_or_default(),
            ..Default::default()
        };
        let request = InspectRequest {
            dataset: self.id.to_bytes(),
            file: Some(worker::FileVersion {
                path: path.to_bytes(),
                size: version.size,
                mtime_ns: version.mtime_ns,
                version_key: version.key.to_bytes(),
            }),
        };
        let answers = futures::stream::iter(owners.into_iter().map(|owner| {
            let request = request.clone();
            async move {
                let channel = owner.channel().await.map_err(|error| error.to_string())?;
                let mut control = crate::ControlClient::new(channel);
                control.inspect(request).await.map(tonic::Response::into_inner).map_err(|status| chain(&status))
            }
        }));
        let answers = until(deadline, answers.buffer_unordered(INSPECTIONS).collect::<Vec<_>>()).await;
        let Some(answers) = answers else { return Err(ClientError::Unavailable("no answer in time".into())) };
        let mut last_error = None;
        let mut answered = false;
        for answer in answers {
            match answer {
                Ok(answer) => {
                    answered = true;
                    inspection.cached_bytes += answer.cached_bytes;
                    inspection.pinned |= answer.pinned;
                }
                Err(error) => last_error = Some(error),
            }
        }
        match last_error {
            Some(error) if !answered => Err(ClientError::Unavailable(error)),
            _ => Ok(inspection),
        }
    }

    pub(crate) fn adopt(&self, generation: u64) {
        self.generation.fetch_max(generation, Ordering::Relaxed);
    }

    /// Asks the workers of a directory's order until one answers.
    async fn ask<T>(
        &self,
        directory: &DatasetPath,
        call: impl Fn(MetadataClient<Channel>, u64, std::time::Duration) -> BoxFuture<'static, Result<(u64, T), Refusal>>,
    ) -> Result<T, ClientError> {
        let deadline = self.client.deadline();
        let mut rotation = Rotation::new(&self.client, directory_placement_key(self.id, directory), deadline);
        loop {
            let member = rotation.next().await?;
            count(&self.client.counters.metadata_calls, 1);
            let channel = match until(deadline, member.channel()).await {
                Some(Ok(channel)) => channel,
                Some(Err(error)) => {
                    rotation.failed(&member, &error);
                    continue;
                }
                None => return Err(rotation.expired()),
            };
            let downs = member.health.condition().downs;
            let within = deadline.saturating_duration_since(tokio::time::Instant::now());
            let answer = tokio::select! {
                answer = until(deadline, call(MetadataClient::new(channel), self.generation(), within)) => answer,
                // Somebody found it dead: no use to wait for what it owes.
                error = member.health.goes_down(downs) => {
                    rotation.failed(&member, &error);
                    continue;
                }
            };
            match answer {
                Some(Ok((generation, answer))) => {
                    member.health.mark_ok();
                    self.adopt(generation);
                    return Ok(answer);
                }
                Some(Err(Refusal::Nonsense(text))) => {
                    tracing::warn!(worker = member.name, error = text, "refused what a worker answered");
                    rotation.distrust(&member);
                    rotation.failed(&member, &text);
                }
                Some(Err(Refusal::Status(status))) => rotation.failed(&member, &judge(&member, status)?),
                None => {
                    rotation.failed(&member, "no answer by the deadline");
                    return Err(rotation.expired());
                }
            }
        }
    }
}

/// What a refusal means: an error that is final, or why to ask the next.
fn judge(member: &Member, status: Status) -> Result<String, ClientError> {
    let text = member.refused(&status);
    // Made here, by the transport: the worker said nothing.
    if std::error::Error::source(&status).is_some() {
        return Ok(text);
    }
    let said = status.message().to_owned();
    match status.code() {
        Code::NotFound => Err(ClientError::NotFound),
        Code::FailedPrecondition => Err(ClientError::NotDirectory),
        Code::PermissionDenied => Err(ClientError::PermissionDenied(said)),
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => Err(ClientError::Invalid(said)),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => Ok(text),
    }
}
