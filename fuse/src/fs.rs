//! The file system: requests with plain types in, plain types or an errno out. It knows no kernel and no `fuser` type.
//!
//! Everything that a successor needs is in the keeper's tables or follows from them:
//! - a node id names a path, and for a file one version of it; the record is written before the id is given out. A file
//!   that changed at the source gets another id, so attributes and bytes of an id never change;
//! - attributes of a file are its record: no request leaves this machine for them;
//! - a read takes the version from the record, so an open file keeps its version, or reads end in `ESTALE`;
//! - a directory offset is the id of the last entry returned, so a listing goes on by name: after a take-over, and after
//!   a change in the middle of it.
//!
//! What is kept here beside the tables (readers, listing pages) only saves time.
//!
//! Modes and owners: object stores have none. Files are `0444`, directories `0555`, all of `root:root`. A directory's
//! times are those of the mount. There are no symbolic links.
//!
//! Not handled: writing of any kind.

mod hints;
mod names;
mod pages;
mod readers;
mod xattr;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_keeper::tables::{
    Counter, Counters, FIRST_ID, Node, NodeKind, NodeTable, OpenMode, OpenTable, ROOT_ID, Shape, TableFull,
};
use forebay_protocol::{
    DatasetPath, FileVersion,
    identity::{MAX_NAME, is_valid_name},
};
use parking_lot::Mutex;
use tokio::{sync::OnceCell, time::timeout};

pub use self::xattr::XattrReply;
use self::{
    hints::Hints,
    names::Names,
    pages::{Held, PAGE_ENTRIES, Pages, Ticket},
    readers::Readers,
    xattr::{Attribute, Place},
};
use crate::{
    errno::{self, During, Errno},
    local::{Asked, LocalFiles, Request},
    node_cache::{Key, SMALLEST},
    notices::Notices,
    throttle::Throttle,
    tree::{Entry, EntryKind, Inspection, Reader, Totals, Tree, TreeError, sort_key},
};

/// Block size that statfs(2) counts in.
pub const STATFS_BLOCK: u32 = 4096;
/// What stat(2) recommends for reads: one request.
pub const PREFERRED_READ: u32 = 1 << 20;

/// Offsets of a directory: 0 begins, 1 follows ".", 2 follows "..", and any other is the id of the entry before it.
const AFTER_DOT: u64 = 1;
const AFTER_DOTS: u64 = 2;
const _: () = assert!(FIRST_ID > AFTER_DOTS, "an entry's id is taken for a dot");

/// How long an absent name is remembered at most: it has no record by which it could be expired when changes were missed.
const ABSENT_TTL: Duration = Duration::from_secs(10);
/// Times that a look-up asks again when something in its directory changed while the answer was on its way.
const ASK_AGAIN: u32 = 3;
/// How long the first open waits until it is known which shape suits.
const SHAPE_PATIENCE: Duration = Duration::from_secs(2);
/// How often idle readers are dropped.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// How often the sums for statfs(2) are asked for.
const TOTALS_INTERVAL: Duration = Duration::from_secs(30);
/// The first pause between two of these questions.
const TOTALS_FIRST: Duration = Duration::from_secs(1);

/// Settings that every daemon of a volume must share.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long the kernel may keep what it was told.
    pub ttl: Duration,
    /// Times of directories, in nanoseconds since the epoch.
    pub directory_time_ns: i64,
}

/// What stat(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Node id, and inode number.
    pub id: u64,
    /// Whether it is a directory; else it is a regular file.
    pub directory: bool,
    /// Bytes; 0 for directories.
    pub size: u64,
    /// All three times, in nanoseconds since the epoch.
    pub time_ns: i64,
}

impl Attributes {
    /// Permission bits.
    pub fn permissions(&self) -> u16 {
        if self.directory { 0o555 } else { 0o444 }
    }

    /// Number of names. 2 for every directory: nobody counts subdirectories before they are listed, and programs take
    /// 2 for "unknown" at worst.
    pub fn links(&self) -> u32 {
        if self.directory { 2 } else { 1 }
    }

    /// Size in units of 512 bytes, rounded up.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(512)
    }
}

/// What a look-up found, and how long the kernel may keep it.
///
/// An answer that was overtaken by the news of a change must not be kept: the kernel would take it for newer than the
/// news. (When it looks up a name again that it knows, it holds no lock, so the notification does not wait for that.)
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The entry; `None`: there is none.
    pub attributes: Option<Attributes>,
    /// How long it may be kept.
    pub ttl: Duration,
    /// `None`: it is not kept.
    ticket: Option<Ticket>,
}

/// An open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its handle.
    pub handle: u64,
    /// How the kernel is to read it.
    pub mode: OpenMode,
}

/// What statfs(2) tells: the dataset's sums, and no free space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Size in units of [`STATFS_BLOCK`].
    pub blocks: u64,
    /// Files.
    pub files: u64,
}

/// An entry of a directory listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryEntry<'a> {
    /// Of what it names.
    pub attributes: Attributes,
    /// Where a listing goes on after it.
    pub offset: u64,
    /// The name.
    pub name: &'a [u8],
}

/// The buffer of a readdir request.
pub trait EntrySink: Send {
    /// Takes an entry; `false` when it did not fit.
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool;
}

/// The tables that the keeper holds.
#[derive(Clone)]
pub struct Tables {
    /// Ids.
    pub nodes: Arc<NodeTable>,
    /// Open handles.
    pub opens: Arc<OpenTable>,
    /// Counters.
    pub counters: Arc<Counters>,
}

/// One volume.
pub struct FileSystem<T: Tree> {
    tree: T,
    tables: Tables,
    notices: Arc<Notices>,
    options: Options,
    shape: OnceCell<Shape>,
    pages: Pages,
    names: Names,
    hints: Hints,
    readers: Readers<T::Reader>,
    totals: Mutex<Totals>,
    complaints: Throttle,
    local: Option<LocalFiles>,
}

impl<T: Tree> FileSystem<T> {
    /// A volume over `tree`. What it finds out about stale names goes to `notices`.
    pub fn new(tree: T, tables: Tables, notices: Arc<Notices>, options: Options) -> Self {
        Self {
            tree,
            tables,
            notices,
            options,
            shape: OnceCell::new(),
            pages: Pages::default(),
            names: Names::new(),
            hints: Hints::default(),
            readers: Readers::new(),
            totals: Mutex::default(),
            complaints: Throttle::default(),
            local: None,
        }
    }

    /// The same, with files on this node.
    pub(crate) fn with_local(self, local: LocalFiles) -> Self {
        Self { local: Some(local), ..self }
    }

    /// How long the kernel may keep names and attributes.
    pub fn ttl(&self) -> Duration {
        self.options.ttl
    }

    /// How long the kernel may remember that a name does not exist.
    fn absent_ttl(&self) -> Duration {
        self.options.ttl.min(ABSENT_TTL)
    }

    /// The counters that survive.
    pub fn counters(&self) -> &Counters {
        &self.tables.counters
    }

    /// The tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The mount's shape. Whoever asks first has it decided, unless a predecessor did: from what suits the tree, and
    /// `Large` when that is not known soon.
    pub async fn shape(&self) -> Shape {
        let decide = async || {
            let opens = &self.tables.opens;
            if let Some(shape) = opens.shape() {
                return shape;
            }
            let suits = timeout(SHAPE_PATIENCE, self.tree.shape()).await.ok().flatten();
            let shape = opens.decide_shape(suits.unwrap_or(Shape::Large));
            tracing::info!(?shape, "the mount's shape");
            shape
        };
        *self.shape.get_or_init(decide).await
    }

    /// Where the names come from.
    pub fn tree(&self) -> &T {
        &self.tree
    }

    /// Work that no request waits for, until it is dropped.
    pub async fn maintain(&self) {
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let totals = async {
            // Often at first, while a scan is likely to go on.
            let mut pause = TOTALS_FIRST;
            loop {
                if let Some(known) = self.tree.totals().await {
                    *self.totals.lock() = known;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(TOTALS_INTERVAL);
            }
        };
        let sweeps = async {
            loop {
                sweep.tick().await;
                self.readers.sweep();
                self.hints.in_vain(self.readers.take_in_vain());
            }
        };
        let name_local = async {
            if let Some(local) = &self.local
                && let Some(dataset) = self.tree.dataset().await
            {
                local.is_of(dataset);
            }
        };
        tokio::join!(self.shape(), totals, sweeps, name_local, self.follow_hints());
    }

    /// Forgets what is kept of a directory's listing, or of all listings. Before the kernel is told to ask again.
    pub fn forget_listing(&self, directory: Option<u64>) {
        self.pages.forget(directory);
    }

    /// An entry of a directory. When the kernel has the answer, [`Self::answered`] is to be called.
    pub async fn lookup(&self, parent: u64, name: &[u8]) -> Result<Found, Errno> {
        if let Some(found) = self.known(parent, name) {
            return Ok(found);
        }
        let directory = self.directory(parent)?;
        if name.len() > MAX_NAME {
            return Err(Errno::ENAMETOOLONG);
        }
        if !is_valid_name(name) {
            return Err(Errno::ENOENT);
        }
        if directory.join(name).is_err() {
            return Err(Errno::ENAMETOOLONG);
        }
        if self.names.missed(parent) {
            self.list_names(parent, &directory).await;
            if let Some(found) = self.known(parent, name) {
                return Ok(found);
            }
        }
        let mut asked = 0;
        let (answer, ticket, at) = loop {
            let (ticket, at) = (self.pages.ticket(parent), Instant::now());
            let answer = self.tree.lookup(&directory, name).await;
            asked += 1;
            if self.pages.is_current(ticket) {
                break (answer, Some(ticket), at);
            }
            if asked > ASK_AGAIN {
                break (answer, None, at);
            }
        };
        let attributes = match answer {
            Ok(entry) => {
                let attributes = self.intern(parent, &entry)?;
                // What a worker says and another one denies is asked for the next time, too.
                let disputed = self.readers.is_gone(attributes.id);
                self.readers.is_current(attributes.id);
                if let Some(ticket) = ticket.filter(|_| !disputed) {
                    self.names.keep(attributes.id, ticket, at, self.ttl());
                }
                Some(attributes)
            }
            Err(TreeError::NotFound) => None,
            Err(error) => return Err(self.refuse("lookup", &directory, &error, During::Metadata)),
        };
        let ttl = match (ticket, attributes) {
            (None, _) => Duration::ZERO,
            (Some(_), Some(_)) => self.ttl(),
            (Some(_), None) => self.absent_ttl(),
        };
        Ok(Found { attributes, ttl, ticket })
    }

    /// An entry that was looked up or listed before, and is still what it was.
    fn known(&self, parent: u64, name: &[u8]) -> Option<Found> {
        let id = self.tables.nodes.current(parent, name)?;
        let ticket = self.pages.ticket(parent);
        let ttl = self.names.good_for(id, ticket)?;
        if self.readers.is_gone(id) {
            return None;
        }
        let attributes = self.getattr(id).ok()?;
        Some(Found { attributes: Some(attributes), ttl, ticket: Some(ticket) })
    }

    /// Has the names of a directory known, if one page holds all of them. Whoever needs one asks for it otherwise.
    async fn list_names(&self, id: u64, directory: &DatasetPath) {
        let Ok((held, _)) = self.fetch(id, directory, &Bytes::new()).await else { return };
        if held.page.end {
            for entry in &held.page.entries {
                if let Ok(attributes) = self.intern(id, entry) {
                    self.keep_name(attributes.id, &held);
                }
            }
        }
        self.names.listed(id, held.page.end);
    }

    /// A listing has led to a node. One that is known to be gone is asked for again.
    fn keep_name(&self, id: u64, held: &Held) {
        if !self.readers.is_gone(id) {
            self.names.keep(id, held.ticket, held.at, self.ttl());
        }
    }

    /// The kernel was given what a look-up found. If something changed between the answer's coming here and its leaving,
    /// the kernel may have heard of that first: it is told once more.
    pub fn answered(&self, parent: u64, name: &[u8], found: &Found) {
        if let Some(ticket) = found.ticket
            && !self.pages.is_current(ticket)
        {
            self.notices.names(parent, vec![Bytes::copy_from_slice(name)]);
        }
    }

    /// Attributes of a node, from its record.
    pub fn getattr(&self, id: u64) -> Result<Attributes, Errno> {
        Ok(self.attributes(id, &self.node(id)?.kind))
    }

    /// Opens a file of a mount for large ones. `unique` is that of the request: one that is sent again gets the same handle.
    pub async fn open(&self, unique: u64, id: u64, flags: i32) -> Result<Opened, Errno> {
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(Errno::EROFS);
        }
        let version = match self.node(id)?.kind {
            NodeKind::Directory => return Err(Errno::EISDIR),
            NodeKind::File { version } => version,
        };
        // The kernel answers ESTALE by looking the path up again, so the program gets the new version and no error.
        if self.readers.is_gone(id) {
            return Err(Errno::ESTALE);
        }
        let opens = &self.tables.opens;
        let opened = match &self.local {
            Some(local) => {
                let path = self.path(id)?;
                let file = Asked { node: id, path: &path, version: &version };
                let request = Request { unique, file };
                local.open(opens, request, || self.tree.open(path.clone(), version.clone())).await
            }
            None => opens.open(unique, id, OpenMode::Cached),
        };
        let handle = opened.map_err(|error| {
            self.complain("open", &error);
            Errno::ENFILE
        })?;
        let mode = opens.handle(handle).map_or(OpenMode::Cached, |handle| handle.mode);
        Ok(Opened { handle, mode })
    }

    /// Bytes of a file: fewer than `size` only at its end.
    pub async fn read(&self, id: u64, offset: u64, size: u32) -> Result<Vec<Bytes>, Errno> {
        let held = self.reader(id)?;
        if offset == 0 {
            self.hints.is_asked(id, held.take_ahead());
        }
        let len = held.size.saturating_sub(offset).min(u64::from(size)) as usize;
        if len == 0 {
            return Ok(Vec::new());
        }
        let small = self.local.as_ref().zip(held.key);
        let here = match small {
            Some((local, key)) => local.read(key, offset, len).await,
            None => None,
        };
        let was_here = here.is_some();
        let answer = match here {
            Some(bytes) => Ok(vec![bytes]),
            None => held.reader.read(offset, len).await,
        };
        let error = match answer {
            Ok(bytes) => {
                let got: usize = bytes.iter().map(Bytes::len).sum();
                if got == len {
                    if let Some((local, key)) = small
                        && !was_here
                    {
                        local.was_read(key, offset, &bytes, len);
                    }
                    self.tables.counters.add(Counter::BytesRead, len as u64);
                    held.count(len as u64);
                    self.hints.was_read(id);
                    // Nobody will say that the file was closed.
                    if offset + len as u64 == held.size && self.shape.get() == Some(&Shape::Small) {
                        self.readers.close(id);
                    }
                    return Ok(bytes);
                }
                // A short reply would be filled up with zeroes by the kernel.
                TreeError::Invalid(format!("{got} bytes instead of {len}"))
            }
            Err(error) => error,
        };
        let errno = errno::of(&error, During::Data);
        if errno == Errno::ESTALE && held.set_gone() {
            // The name leads to a version that is gone: whoever opens it next must ask.
            self.names.forget(id);
            if let Some(node) = self.tables.nodes.resolve(id) {
                self.notices.names(node.parent, vec![node.name]);
            }
        }
        let path = self.path(id)?;
        Err(self.refuse("read", &path, &error, During::Data))
    }

    /// What reads a file.
    fn reader(&self, id: u64) -> Result<Arc<readers::Held<T::Reader>>, Errno> {
        self.readers.get(id, || {
            let node = self.node(id)?;
            let NodeKind::File { version } = node.kind else { return Err(Errno::EISDIR) };
            let path = self.path(id)?;
            let (size, key) = (version.size, self.small_key(id, &path, &version));
            Ok((self.tree.open(path, version), size, key))
        })
    }

    /// What a file is called in the node cache, if it is a small one that is kept there.
    fn small_key(&self, node: u64, path: &DatasetPath, version: &FileVersion) -> Option<Key> {
        let local = self.local.as_ref().filter(|_| version.size < SMALLEST)?;
        local.key(Asked { node, path, version })
    }

    /// Closes a handle. Closing it again (a request that is sent again) is nothing. Called within the runtime.
    pub fn release(&self, handle: u64) {
        if let Some(released) = self.tables.opens.release(handle)
            && released.last
        {
            let id = released.handle.node;
            let bytes = self.readers.close(id);
            if let Some(local) = &self.local
                && let Ok(Node { kind: NodeKind::File { version }, .. }) = self.node(id)
                && let Ok(path) = self.path(id)
            {
                let file = Asked { node: id, path: &path, version: &version };
                let reader = || self.tree.open(path.clone(), version.clone());
                local.closed(&self.tables.opens, file, bytes, reader);
            }
        }
    }

    /// Opens a directory: it is one, and needs no handle.
    pub fn opendir(&self, id: u64) -> Result<(), Errno> {
        match self.node(id)?.kind {
            NodeKind::Directory => Ok(()),
            NodeKind::File { .. } => Err(Errno::ENOTDIR),
        }
    }

    /// Fills `sink` with entries from `offset` on. It ends early rather than wait for a worker with entries in hand: the
    /// reader gets them at once, and asks again.
    pub async fn readdir(&self, id: u64, offset: u64, sink: &mut impl EntrySink) -> Result<(), Errno> {
        let directory = self.directory(id)?;
        let mut dots = offset;
        while dots < AFTER_DOTS {
            let (name, target): (&[u8], u64) =
                if dots < AFTER_DOT { (b".", id) } else { (b"..", self.node(id)?.parent) };
            let attributes = self.attributes(target, &NodeKind::Directory);
            dots += 1;
            if !sink.add(&DirectoryEntry { attributes, offset: dots, name }) {
                return Ok(());
            }
        }
        let mut after = if offset <= AFTER_DOTS { Bytes::new() } else { self.resume(id, offset)? };
        let mut added = false;
        loop {
            let (held, from) = match self.pages.find(id, &after) {
                Some(found) => found,
                None if added => return Ok(()),
                None => self.fetch(id, &directory, &after).await?,
            };
            let Some(entries) = held.page.entries.get(from..) else { return Err(Errno::EIO) };
            for entry in entries {
                after = entry.sort_key();
                // What cannot be looked up is not shown (the path would be too long for any system call).
                if directory.join(&entry.name).is_err() {
                    continue;
                }
                let attributes = match self.intern(id, entry) {
                    Ok(attributes) => attributes,
                    Err(_) if added => return Ok(()),
                    Err(errno) => return Err(errno),
                };
                self.keep_name(attributes.id, &held);
                if !sink.add(&DirectoryEntry { attributes, offset: attributes.id, name: &entry.name }) {
                    return Ok(());
                }
                added = true;
            }
            if held.page.end {
                return Ok(());
            }
            if entries.is_empty() {
                let error = TreeError::Invalid("an empty page that is not the last".to_owned());
                return Err(self.refuse("list", &directory, &error, During::Metadata));
            }
        }
    }

    /// The sort key after which a listing goes on.
    fn resume(&self, directory: u64, last: u64) -> Result<Bytes, Errno> {
        match self.tables.nodes.resolve(last) {
            Some(Node { parent, name, kind }) if parent == directory => {
                Ok(sort_key(&name, matches!(kind, NodeKind::Directory)))
            }
            // No offset that this directory ever gave.
            _ => Err(Errno::EINVAL),
        }
    }

    async fn fetch(&self, id: u64, directory: &DatasetPath, after: &Bytes) -> Result<(Arc<Held>, usize), Errno> {
        let ticket = self.pages.ticket(id);
        match self.tree.list(directory, after, PAGE_ENTRIES).await {
            Ok(page) => Ok((self.pages.keep(ticket, id, after.clone(), page), 0)),
            Err(error) => Err(self.refuse("list", directory, &error, During::Metadata)),
        }
    }

    /// Sums of the dataset, as last heard.
    pub fn statfs(&self) -> Statistics {
        let totals = *self.totals.lock();
        Statistics { blocks: totals.bytes.div_ceil(u64::from(STATFS_BLOCK)), files: totals.files }
    }

    /// An extended attribute. Only `user.forebay.cached_bytes` and `.owner` of files ask a worker, and `.revision` all.
    pub async fn getxattr(&self, id: u64, name: &[u8], size: u32) -> Result<XattrReply, Errno> {
        let kind = self.node(id)?.kind;
        let attribute = Attribute::parse(name, place(id, &kind)).ok_or(Errno::ENODATA)?;
        let value = match (attribute, &kind) {
            (Attribute::Version, NodeKind::File { version }) => version.key.as_bytes().to_vec(),
            (Attribute::CachedBytes, NodeKind::File { version }) => {
                self.inspect(id, version).await?.cached_bytes.to_string().into_bytes()
            }
            (Attribute::Owner, NodeKind::File { version }) => self.inspect(id, version).await?.owner.into_bytes(),
            (Attribute::Owner, NodeKind::Directory) => {
                self.tree.directory_owner(&self.path(id)?).ok_or(Errno::ENODATA)?.into_bytes()
            }
            (Attribute::Revision, NodeKind::Directory) => {
                let revision = self.tree.totals().await.and_then(|totals| totals.revision);
                format!("{:016x}", revision.ok_or(Errno::ENODATA)?).into_bytes()
            }
            (Attribute::Version | Attribute::CachedBytes, NodeKind::Directory)
            | (Attribute::Revision, NodeKind::File { .. }) => return Err(Errno::ENODATA),
        };
        XattrReply::fit(value, size)
    }

    async fn inspect(&self, id: u64, version: &FileVersion) -> Result<Inspection, Errno> {
        let path = self.path(id)?;
        match self.tree.inspect(&path, version).await {
            Ok(inspection) => Ok(inspection),
            Err(error) => Err(self.refuse("inspect", &path, &error, During::Metadata)),
        }
    }

    /// The names of a node's extended attributes.
    pub fn listxattr(&self, id: u64, size: u32) -> Result<XattrReply, Errno> {
        XattrReply::fit(Attribute::names(place(id, &self.node(id)?.kind)), size)
    }

    /// Whether `mask` (of access(2)) is granted. Asked only without `default_permissions`.
    pub fn access(&self, id: u64, mask: i32) -> Result<(), Errno> {
        let attributes = self.getattr(id)?;
        if mask & libc::W_OK != 0 {
            return Err(Errno::EROFS);
        }
        if mask & libc::X_OK != 0 && !attributes.directory {
            return Err(Errno::EACCES);
        }
        Ok(())
    }

    /// There are no symbolic links.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>, Errno> {
        self.node(id)?;
        Err(Errno::EINVAL)
    }

    fn node(&self, id: u64) -> Result<Node, Errno> {
        self.tables.nodes.resolve(id).ok_or(Errno::ESTALE)
    }

    fn path(&self, id: u64) -> Result<DatasetPath, Errno> {
        self.tables.nodes.path(id).ok_or(Errno::ESTALE)
    }

    fn directory(&self, id: u64) -> Result<DatasetPath, Errno> {
        self.opendir(id)?;
        self.path(id)
    }

    /// The node of an entry; its record is in the table when this returns.
    fn intern(&self, parent: u64, entry: &Entry) -> Result<Attributes, Errno> {
        let kind = match &entry.kind {
            EntryKind::File { version } => NodeKind::File { version: version.clone() },
            EntryKind::Directory => NodeKind::Directory,
        };
        match self.tables.nodes.intern(parent, &entry.name, &kind) {
            Ok(id) => Ok(self.attributes(id, &kind)),
            Err(error) => {
                self.complain("lookup", &error);
                Err(Errno::ENOMEM)
            }
        }
    }

    fn attributes(&self, id: u64, kind: &NodeKind) -> Attributes {
        match kind {
            NodeKind::File { version } => {
                Attributes { id, directory: false, size: version.size, time_ns: version.mtime_ns }
            }
            NodeKind::Directory => Attributes { id, directory: true, size: 0, time_ns: self.options.directory_time_ns },
        }
    }

    fn refuse(&self, what: &'static str, path: &DatasetPath, error: &TreeError, during: During) -> Errno {
        let errno = errno::of(error, during);
        match error {
            // Answers, not failures.
            TreeError::NotFound | TreeError::NotDirectory => {}
            TreeError::VersionGone
            | TreeError::PermissionDenied(_)
            | TreeError::Unavailable(_)
            | TreeError::Invalid(_) => {
                if let Some(suppressed) = self.complaints.allow() {
                    tracing::warn!(what, %path, %error, %errno, suppressed, "a request failed");
                }
            }
        }
        errno
    }

    fn complain(&self, what: &'static str, error: &TableFull) {
        if let Some(suppressed) = self.complaints.allow() {
            tracing::error!(what, %error, suppressed, "a request failed");
        }
    }
}

/// Where a node is, as far as its extended attributes depend on it.
fn place(id: u64, kind: &NodeKind) -> Place {
    match kind {
        NodeKind::File { .. } => Place::File,
        NodeKind::Directory if id == ROOT_ID => Place::Root,
        NodeKind::Directory => Place::Directory,
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
