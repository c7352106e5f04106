//! A directory of this machine: a local disk or a mounted network file system.
//!
//! It is read with system calls on blocking threads, not through `object_store`'s `LocalFileSystem`: that one has no
//! names that are not UTF-8, follows symlinks out of its root, makes ETags that miss changes of the same size within a
//! tick, cannot page a listing and stats every file of a directory at once.
//!
//! Invariants:
//! - Nothing outside the root is opened, whatever symlinks say and whoever renames meanwhile ([`beneath`]).
//! - A version is mtime, ctime, size and inode; bytes are given out only when the file was that version before and
//!   after they were read. Not seen: a change within one tick of the file system's clock that keeps the size, and
//!   writes through a mapping that has not been synchronised.
//! - A call that hangs (a network file system that is away) ends by its deadline; its thread goes on to count as a
//!   request until it returns, so no more threads hang than requests are allowed.
//!
//! The root is opened by each call: it may be mounted after this program starts, or again.

mod beneath;
mod directory;
#[cfg(test)]
mod tests;

use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_protocol::{VersionKey, identity::is_valid_name};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use rustix::{
    fs::{FileType, OFlags, Stat, fstat},
    io::Errno,
};

use self::{beneath::Root, directory::Remainders};
use crate::{
    ByteStream, Item, ItemKind, Limits, Page, Requests, StoreError, StoreFuture, UnderStore,
    limits::{Grant, Limiter},
    patience::{Failure, Patience},
    requests::{RequestCounters, Verb},
};

/// Bytes that are read at a time: one block of work for a disk, sixteen blocks of the cache.
const PIECE: u64 = 1 << 20;

/// A directory tree.
pub(crate) struct FileStore {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    limiter: Limiter,
    deadline: Duration,
    requests: RequestCounters,
    remainders: Mutex<Remainders>,
}

impl FileStore {
    pub(crate) fn new(root: PathBuf, limits: &Limits, limiter: Limiter) -> Self {
        let inner = Inner {
            root,
            limiter,
            deadline: limits.deadline,
            requests: RequestCounters::default(),
            remainders: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl UnderStore for FileStore {
    fn list<'a>(&'a self, directory: &'a [u8], after: Option<&'a [u8]>, limit: usize) -> StoreFuture<'a, Page> {
        Box::pin(async move {
            if !directory.is_empty() {
                check_key(directory)?;
            }
            let subject = if directory.is_empty() { Subject::Root } else { Subject::Below };
            let (directory, after) = (directory.to_vec(), after.map(<[u8]>::to_vec));
            let mut patience = Patience::new(self.inner.deadline);
            let work = move |inner: &Inner| directory::page(inner, &directory, after.as_deref(), limit.max(1));
            self.inner.retry(&mut patience, Verb::List, subject, Arc::new(work)).await
        })
    }

    fn head<'a>(&'a self, key: &'a [u8]) -> StoreFuture<'a, Item> {
        Box::pin(async move {
            check_key(key)?;
            let owned = key.to_vec();
            let mut patience = Patience::new(self.inner.deadline);
            let work = move |inner: &Inner| {
                let root = inner.open_root()?;
                let stat = root.stat(&owned).map_err(|errno| of_errno(&owned, errno))?;
                file_kind(&stat).ok_or_else(|| of_errno(&owned, Errno::NOENT))
            };
            let kind = self.inner.retry(&mut patience, Verb::Head, Subject::Below, Arc::new(work)).await?;
            Ok(Item { name: key.rsplit(|byte| *byte == b'/').next().unwrap_or(key).to_vec(), kind })
        })
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        version: &'a VersionKey,
        size: u64,
        range: Range<u64>,
    ) -> StoreFuture<'a, ByteStream> {
        Box::pin(async move {
            check_key(key)?;
            if range.start > range.end || range.end > size {
                let Range { start, end } = range;
                return Err(StoreError::Invalid(format!("range {start}..{end} of a file of {size} bytes")));
            }
            let mut patience = Patience::new(self.inner.deadline);
            let asked = Arc::new(Asked { key: key.to_vec(), version: version.clone(), size });
            let opened = asked.clone();
            let work = move |inner: &Inner| opened.open(inner);
            let file = self.inner.retry(&mut patience, Verb::Get, Subject::Below, Arc::new(work)).await?;
            let grant = self.inner.limiter.admit(&mut patience, range.end - range.start).await;
            let grant = Arc::new(grant.map_err(|failure| failure.error)?);
            let reader =
                Reader { inner: self.inner.clone(), asked, file: Arc::new(file), rest: range, patience, grant };
            let pieces = stream::try_unfold(reader, |mut reader| async move {
                Ok(reader.next().await?.map(|bytes| (bytes, reader)))
            });
            Ok(pieces.boxed())
        })
    }

    fn requests(&self) -> Requests {
        self.inner.requests.snapshot()
    }

    fn check(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let mut patience = Patience::new(self.inner.deadline);
            let work = |inner: &Inner| {
                let opened = inner.open_root()?.open_beneath(b"", OFlags::RDONLY | OFlags::DIRECTORY);
                opened.map(drop).map_err(|errno| inner.root_error(errno))
            };
            self.inner.retry(&mut patience, Verb::List, Subject::Root, Arc::new(work)).await
        })
    }

    fn problem(&self) -> Option<StoreError> {
        self.inner.requests.problem()
    }

    fn has_directories(&self) -> bool {
        true
    }
}

impl Inner {
    fn open_root(&self) -> Result<Root, Failure> {
        Root::open(&self.root).map_err(|errno| self.root_error(errno))
    }

    fn root_error(&self, errno: Errno) -> Failure {
        of_errno(self.root.as_os_str().as_encoded_bytes(), errno)
    }

    /// Does blocking work until it succeeds, fails for good or the deadline passes.
    async fn retry<T, W>(
        self: &Arc<Self>,
        patience: &mut Patience,
        verb: Verb,
        subject: Subject,
        work: Arc<W>,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        W: Fn(&Inner) -> Result<T, Failure> + Send + Sync + 'static,
    {
        loop {
            let grant = self.limiter.grant(patience, verb, 0).await.map_err(|failure| failure.error)?;
            self.requests.sent(verb);
            match self.block(patience, Arc::new(grant), work.clone()).await {
                Ok(output) => {
                    self.requests.answered(verb);
                    return Ok(output);
                }
                Err(failure) => {
                    match subject {
                        Subject::Root => self.requests.broken(verb, &failure),
                        Subject::Below => self.requests.failed(verb, &failure),
                    }
                    patience.pause(failure).await?;
                }
            }
        }
    }

    /// Does blocking work once. The thread holds the grant until it returns, which may be after the deadline.
    async fn block<T, W>(
        self: &Arc<Self>,
        patience: &mut Patience,
        grant: Arc<Grant>,
        work: Arc<W>,
    ) -> Result<T, Failure>
    where
        T: Send + 'static,
        W: Fn(&Inner) -> Result<T, Failure> + Send + Sync + 'static,
    {
        let inner = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let output = work(&inner);
            drop(grant);
            output
        });
        match patience.wait(Duration::MAX, task).await {
            Some(Ok(output)) => output,
            Some(Err(error)) => Err(Failure::fatal(StoreError::Unavailable(format!("reading failed: {error}")))),
            None => Err(Failure::fatal(StoreError::Unavailable("the file system did not answer in time".to_owned()))),
        }
    }
}

/// What work is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    /// The root itself: when it is not there, the source is not.
    Root,
    /// Something below it.
    Below,
}

/// The version of a file that somebody wants.
struct Asked {
    key: Vec<u8>,
    version: VersionKey,
    size: u64,
}

impl Asked {
    fn open(&self, inner: &Inner) -> Result<File, Failure> {
        let of_errno = |errno| of_errno(&self.key, errno);
        let root = inner.open_root()?;
        // Looked at before it is opened: opening a device or a pipe does things.
        self.check(&root.stat(&self.key).map_err(of_errno)?)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(root.open_beneath(&self.key, flags).map_err(of_errno)?);
        self.check_open(&file)?;
        Ok(file)
    }

    fn check_open(&self, file: &File) -> Result<(), Failure> {
        self.check(&fstat(file).map_err(|errno| of_errno(&self.key, errno))?)
    }

    fn check(&self, stat: &Stat) -> Result<(), Failure> {
        match file_kind(stat) {
            Some(ItemKind::File { size, mtime_ns: _, version }) if size == self.size && version == self.version => {
                Ok(())
            }
            Some(_) => Err(Failure::fatal(StoreError::VersionMismatch(show(&self.key)))),
            None => Err(of_errno(&self.key, Errno::NOENT)),
        }
    }

    /// Bytes that were this version's before and after they were read.
    fn read(&self, file: &File, offset: u64, length: u64) -> Result<Bytes, Failure> {
        self.check_open(file)?;
        // At most PIECE.
        let mut buffer = vec![0; length as usize];
        let read = file.read_exact_at(&mut buffer, offset);
        // Whatever reading says: when the file changed, that is the reason.
        self.check_open(file)?;
        match read {
            Ok(()) => Ok(Bytes::from(buffer)),
            Err(error) => Err(of_errno(&self.key, Errno::from_io_error(&error).unwrap_or(Errno::IO))),
        }
    }
}

/// A range that is being read.
struct Reader {
    inner: Arc<Inner>,
    asked: Arc<Asked>,
    file: Arc<File>,
    rest: Range<u64>,
    patience: Patience,
    grant: Arc<Grant>,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let Range { start, end } = self.rest;
        if start == end {
            return Ok(None);
        }
        let length = PIECE.min(end - start);
        let (asked, file) = (self.asked.clone(), self.file.clone());
        let work = Arc::new(move |_: &Inner| asked.read(&file, start, length));
        loop {
            match self.inner.block(&mut self.patience, self.grant.clone(), work.clone()).await {
                Ok(bytes) => {
                    self.inner.requests.received(bytes.len());
                    self.rest.start += length;
                    return Ok(Some(bytes));
                }
                Err(failure) => {
                    self.inner.requests.failed(Verb::Get, &failure);
                    self.patience.pause(failure).await?;
                }
            }
        }
    }
}

/// A key that no listing gives is not there.
fn check_key(key: &[u8]) -> Result<(), StoreError> {
    if key.split(|byte| *byte == b'/').all(is_valid_name) { Ok(()) } else { Err(StoreError::NotFound(show(key))) }
}

fn show(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

/// Size, time and version of a regular file; `None` for anything else.
#[allow(clippy::unnecessary_cast, reason = "the fields' types differ between architectures")]
fn file_kind(stat: &Stat) -> Option<ItemKind> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    let mtime_ns = nanoseconds(stat.st_mtime as i64, stat.st_mtime_nsec as i64);
    let ctime_ns = nanoseconds(stat.st_ctime as i64, stat.st_ctime_nsec as i64);
    let size = u64::try_from(stat.st_size).ok()?;
    // The device is left out: the same network file system has other numbers on other machines.
    let version = VersionKey::new(format!("{mtime_ns}-{ctime_ns}-{size}-{}", stat.st_ino))?;
    Some(ItemKind::File { size, mtime_ns, version })
}

/// What an errno means for the caller.
fn of_errno(key: &[u8], errno: Errno) -> Failure {
    let text = format!("{}: {errno}", show(key));
    match errno {
        // XDEV: a symlink out of the root.
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG | Errno::ISDIR | Errno::NXIO => {
            Failure::fatal(StoreError::NotFound(text))
        }
        Errno::ACCESS | Errno::PERM => Failure::fatal(StoreError::PermissionDenied(text)),
        Errno::NOSYS => Failure::fatal(StoreError::Invalid(format!("{text}: file:// needs Linux 5.6 or later"))),
        _ => Failure::passing(text),
    }
}
