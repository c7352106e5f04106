//! Chunk files and their entries: made, loaded, given up. Everything here runs under the name's stripe.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use forebay_protocol::ChunkKey;

use crate::blocks::BlockSet;
use crate::catalog::{Entry, Name, PINNED, SUPERSEDED, TRUSTED, Tick};
use crate::chunk::Chunk;
use crate::error::{Refusal, WriteError};
use crate::root::Root;
use crate::shared::Shared;
use crate::trailer::{self, Header, Layout, MAX_TRAILER, Trailer};

/// A chunk file that was found good.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) trailer: Trailer,
    pub(crate) file: File,
    /// Of its entry.
    pub(crate) order: Tick,
    /// Its blocks were verified in this process before.
    pub(crate) trusted: bool,
}

/// What became of an attempt to load a chunk's file.
#[derive(Debug)]
pub(crate) enum Load {
    Good(Box<Loaded>),
    /// There is none (any more): what was no good was deleted, with its entry.
    Absent,
    /// It may be good, but cannot be opened now.
    Unavailable(io::Error),
}

impl Shared {
    /// Opens a chunk's file, checks that it is what its name says (and `expected`), and accounts for what it holds.
    pub(crate) fn load(&self, root: &Root, key: ChunkKey, expected: Option<&Header>) -> Load {
        let name = Name::from(key);
        let (file, len) = match root.open_chunk(key) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.discard(name, None);
                return Load::Absent;
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return self.reject(root, key, &error),
            Err(error) => return Load::Unavailable(error),
        };
        let read = || {
            let tail_len = len.min(MAX_TRAILER as u64);
            let mut tail = vec![0; tail_len as usize];
            file.read_exact_at(&mut tail, len - tail_len).ok()?;
            let trailer = trailer::decode_tail(&tail, len).ok()?;
            let fits = trailer.header.chunk_key() == key && expected.is_none_or(|expected| *expected == trailer.header);
            let layout = Layout::of(&trailer.header)?;
            fits.then_some((trailer, layout))
        };
        let Some((trailer, layout)) = read() else {
            return self.reject(root, key, &"it is damaged, or another file's");
        };
        match self.account(name, &trailer, &layout) {
            Ok((order, trusted)) => Load::Good(Box::new(Loaded { trailer, file, order, trusted })),
            Err(refusal) => self.reject(root, key, &refusal),
        }
    }

    /// Makes a chunk's file and its entry; refuses if these and `first_write` bytes of blocks would not fit.
    pub(crate) fn create(
        &self,
        slot: u32,
        key: ChunkKey,
        header: &Header,
        layout: &Layout,
        first_write: u64,
    ) -> Result<(File, Tick), WriteError> {
        let name = Name::from(key);
        let root = self.root().ok_or(Refusal::Closed)?;
        let overhead = layout.overhead();
        // A place that a pinned chunk keeps is paid for.
        let kept = self.catalog.get(name).is_some_and(|entry| entry.has(PINNED));
        let wanted = if kept { 0 } else { u64::from(overhead) + first_write };
        if let Err(refusal) = self.catalog.ledger(|ledger| ledger.would_admit(slot, wanted)) {
            return Err(self.refused(slot, name, refusal).into());
        }
        if let Err(refusal) = self.disk.admit(&root, u64::from(overhead)) {
            return Err(self.refused(slot, name, refusal).into());
        }
        let order = self.catalog.next_order();
        let mut pinned = false;
        let entered = self.catalog.apply(name, true, |before| {
            // An entry without a file is the place that a pinned chunk keeps.
            let kept = before.map_or(0, |entry| entry.flags & (PINNED | SUPERSEDED));
            pinned = kept & PINNED != 0;
            // A chunk's length is at most 64 MiB.
            let (data, len, flags) = (0, layout.len as u32, kept | TRUSTED);
            Some(Entry { order, used: order, hits: 0, slot, data, len, overhead, flags })
        });
        if let Err(refusal) = entered {
            return Err(self.refused(slot, name, refusal).into());
        }
        let trailer = Trailer {
            header: header.clone(),
            pinned,
            valid: BlockSet::new(layout.blocks),
            checksums: vec![0; layout.blocks as usize],
        };
        let made = || {
            let file = match root.create_chunk(key) {
                // Nobody's: the catalog did not know it, or it would have been loaded.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    root.unlink_chunk(key)?;
                    root.create_chunk(key)?
                }
                other => other?,
            };
            let bytes = trailer::encode(&trailer).ok_or(io::ErrorKind::InvalidData)?;
            if let Err(error) = file.write_all_at(&bytes, layout.trailer) {
                // Without a trailer it would be dropped at the next start.
                let _ = root.unlink_chunk(key);
                return Err(error);
            }
            Ok(file)
        };
        made().map(|file| (file, order)).map_err(|error| {
            self.discard(name, Some(order));
            WriteError::Disk(self.disk_failed("create a chunk", &error))
        })
    }

    /// Notes in a chunk's file whether it is pinned. It is only for when the index is lost, so a failure does not matter.
    pub(crate) fn mark_pinned(&self, key: ChunkKey, pinned: bool) {
        if let Some(chunk) = self.catalog.live(key.into()) {
            chunk.mark_pinned(pinned);
        } else if let Some(root) = self.root()
            && let Load::Good(loaded) = self.load(&root, key, None)
            && let Some(layout) = Layout::of(&loaded.trailer.header)
        {
            let _ = loaded.file.write_all_at(&trailer::marks(pinned), layout.marks);
        }
    }

    /// Gives up the entry of a file that is gone (that of the given order, or any). A pinned chunk keeps its place.
    pub(crate) fn discard(&self, name: Name, order: Option<Tick>) {
        let fresh = self.catalog.next_order();
        // Never refused: nothing grows.
        let _ = self.catalog.apply(name, false, |entry| match entry {
            Some(entry) if order.is_some_and(|order| order != entry.order) => Some(entry),
            Some(entry) if entry.has(PINNED) => {
                Some(Entry { order: fresh, data: 0, flags: entry.flags & !TRUSTED, ..entry })
            }
            _ => None,
        });
    }

    /// Gives up a chunk whose file is gone, also the open one.
    pub(crate) fn vanish(&self, name: Name, order: Option<Tick>) {
        self.discard(name, order);
        self.detach(name);
    }

    /// The open chunk of this name, if any, has lost its file's name.
    pub(crate) fn detach(&self, name: Name) {
        if let Some(chunk) = self.catalog.live(name)
            && chunk.has_body()
        {
            chunk.detach();
            self.catalog.clear_live(name, &chunk);
        }
        self.open.remove(&name);
    }

    /// A writer found that somebody deleted the chunk's file. Takes the stripe itself.
    pub(crate) fn vanished(&self, chunk: &Chunk, order: Tick, epoch: u32) {
        let name = Name::from(chunk.key());
        let _name = self.stripe(name);
        // Evicted or replaced by ourselves meanwhile?
        if chunk.is_detached() || !chunk.epoch_is(epoch) {
            return;
        }
        tracing::warn!(file = %chunk.key().file, chunk = chunk.key().index, "a cache file was deleted by somebody");
        // Another file may have the name now: the catalog does not know it.
        if let Some(Err(error)) = self.root().map(|root| root.unlink_chunk(chunk.key())) {
            tracing::warn!(file = %chunk.key().file, chunk = chunk.key().index, %error, "cannot delete a cache file");
        }
        self.discard(name, Some(order));
        chunk.detach();
        self.catalog.clear_live(name, chunk);
        self.open.remove(&name);
        self.signals.kick();
    }

    /// The entry of a file, corrected by what the file says; a new one for a file that the catalog did not know.
    fn account(&self, name: Name, trailer: &Trailer, layout: &Layout) -> Result<(Tick, bool), Refusal> {
        let slot = self.catalog.ledger(|ledger| ledger.slot(trailer.header.dataset));
        // At most a chunk.
        let (data, len, overhead) = (layout.bytes_in(&trailer.valid) as u32, layout.len as u32, layout.overhead());
        let fresh = self.catalog.next_order();
        let enter = |mark: u8| {
            self.catalog.apply(name, true, |before| {
                let new = Entry { order: fresh, used: fresh, hits: 0, slot, data, len, overhead, flags: mark };
                Some(before.map_or(new, |entry| Entry { slot, data, len, overhead, ..entry }))
            })
        };
        let before = match enter(if trailer.pinned { PINNED } else { 0 }) {
            // Its index was lost, and since then others took the place: better unpinned than gone.
            Err(_) if trailer.pinned => enter(0)?,
            other => other?,
        };
        Ok(before.map_or((fresh, false), |entry| (entry.order, entry.has(TRUSTED))))
    }

    fn reject(&self, root: &Root, key: ChunkKey, reason: &dyn std::fmt::Display) -> Load {
        tracing::warn!(file = %key.file, chunk = key.index, %reason, "dropping a cache file");
        self.events.dropped_files.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = root.unlink_chunk(key) {
            tracing::warn!(file = %key.file, chunk = key.index, %error, "cannot delete a cache file");
        }
        self.discard(key.into(), None);
        Load::Absent
    }
}
