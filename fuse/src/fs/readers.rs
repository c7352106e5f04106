//! Readers of files, by node.
//!
//! A reader carries the read-ahead of one file version and nothing that could not be made again from the node's record,
//! so a successor starts without any. Bounded; one that was idle is dropped with its buffers, and so is that of a file
//! which nobody has open any more.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use quick_cache::sync::Cache;

use crate::node_cache::Key;

/// Most readers kept. One without buffers is about 1 KiB.
const MAX_READERS: usize = 4_096;
/// How long a reader may be idle until its buffers are better used by others.
const MAX_IDLE: Duration = Duration::from_secs(30);

/// A reader and what is remembered about it.
#[derive(Debug)]
pub(crate) struct Held<R> {
    pub(crate) reader: Arc<R>,
    /// Bytes of the file.
    pub(crate) size: u64,
    /// What it is called in the node cache, if it is a small one that is kept there.
    pub(crate) key: Option<Key>,
    /// Bytes that were read.
    read: AtomicU64,
    /// A read was told that this version is gone.
    gone: AtomicBool,
    /// Its beginning was fetched ahead, and nobody has read it since; then it counts.
    ahead: AtomicBool,
    counts: Arc<Counts>,
    /// Milliseconds since the start of [`Readers`].
    used: AtomicU64,
}

impl<R> Held<R> {
    /// So many bytes more were read.
    pub(crate) fn count(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Its beginning is fetched ahead.
    pub(crate) fn set_ahead(&self) {
        if !self.ahead.swap(true, Ordering::Relaxed) {
            self.counts.ahead.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It is read, or will not be: whether its beginning was fetched ahead for that.
    pub(crate) fn take_ahead(&self) -> bool {
        // Nearly always false.
        let ahead = self.ahead.load(Ordering::Relaxed) && self.ahead.swap(false, Ordering::Relaxed);
        if ahead {
            self.counts.ahead.fetch_sub(1, Ordering::Relaxed);
        }
        ahead
    }

    /// `true` for the first who says it.
    pub(crate) fn set_gone(&self) -> bool {
        !self.gone.swap(true, Ordering::Relaxed)
    }
}

impl<R> Drop for Held<R> {
    fn drop(&mut self) {
        if self.take_ahead() {
            self.counts.in_vain.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What was fetched ahead.
#[derive(Debug, Default)]
struct Counts {
    /// Nobody has read it yet.
    ahead: AtomicU64,
    /// Nobody ever did.
    in_vain: AtomicU64,
}

/// The readers of one volume.
#[derive(Debug)]
pub(crate) struct Readers<R> {
    readers: Cache<u64, Arc<Held<R>>>,
    start: Instant,
    counts: Arc<Counts>,
}

impl<R> Readers<R> {
    pub(crate) fn new() -> Self {
        Self { readers: Cache::new(MAX_READERS), start: Instant::now(), counts: Arc::default() }
    }

    /// Those whose beginning was fetched ahead and that nobody has read yet.
    pub(crate) fn ahead(&self) -> u64 {
        self.counts.ahead.load(Ordering::Relaxed)
    }

    /// Those that were dropped without having been read, since this was asked last.
    pub(crate) fn take_in_vain(&self) -> u64 {
        self.counts.in_vain.swap(0, Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// The reader of a node, made if there is none.
    pub(crate) fn get<E>(
        &self,
        node: u64,
        make: impl FnOnce() -> Result<(Arc<R>, u64, Option<Key>), E>,
    ) -> Result<Arc<Held<R>>, E> {
        let held = self.readers.get_or_insert_with(&node, || {
            let (reader, size, key) = make()?;
            Ok(Arc::new(Held {
                reader,
                size,
                key,
                read: AtomicU64::new(0),
                gone: AtomicBool::new(false),
                ahead: AtomicBool::new(false),
                counts: self.counts.clone(),
                used: AtomicU64::new(0),
            }))
        })?;
        held.used.store(self.now(), Ordering::Relaxed);
        Ok(held)
    }

    /// Whether a read of this node was told that its version is gone, and nobody was told otherwise since.
    pub(crate) fn is_gone(&self, node: u64) -> bool {
        self.readers.peek(&node).is_some_and(|held| held.gone.load(Ordering::Relaxed))
    }

    /// The owner of the directory says that this version is current.
    pub(crate) fn is_current(&self, node: u64) {
        if let Some(held) = self.readers.peek(&node) {
            held.gone.store(false, Ordering::Relaxed);
        }
    }

    /// Nobody has the file open any more; the bytes that its reader read. What is known to be gone is remembered.
    pub(crate) fn close(&self, node: u64) -> u64 {
        if self.is_gone(node) {
            return 0;
        }
        let closed = self.readers.remove(&node);
        closed.map_or(0, |(_, held)| held.read.load(Ordering::Relaxed))
    }

    /// Drops those that were idle too long.
    pub(crate) fn sweep(&self) {
        let oldest = self.now().saturating_sub(MAX_IDLE.as_millis() as u64);
        self.readers.retain(|_, held| held.used.load(Ordering::Relaxed) >= oldest);
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.readers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_bounded_and_dropped_when_closed() {
        let readers: Readers<u64> = Readers::new();
        let make = |size: u64| move || Ok::<_, ()>((Arc::new(size), size, None));
        for node in 0..3 * MAX_READERS as u64 {
            assert_eq!(readers.get(node, make(node)).unwrap().size, node);
        }
        assert!(readers.len() <= MAX_READERS);
        let held = readers.get(7, make(70)).unwrap();
        assert!(Arc::ptr_eq(&held, &readers.get(7, make(71)).unwrap()));
        readers.close(7);
        assert_eq!(readers.get(7, make(72)).unwrap().size, 72);
        readers.sweep();
        assert_eq!(readers.get(7, make(73)).unwrap().size, 72);
    }

    #[test]
    fn what_was_fetched_ahead_counts_until_it_is_read_or_dropped() {
        let readers: Readers<u64> = Readers::new();
        let get = |node| readers.get(node, || Ok::<_, ()>((Arc::new(1), 1, None))).unwrap();
        get(1).set_ahead();
        get(1).set_ahead();
        get(2).set_ahead();
        assert_eq!(readers.ahead(), 2);
        assert!(get(1).take_ahead() && !get(1).take_ahead());
        assert_eq!(readers.ahead(), 1);
        readers.close(2);
        assert_eq!((readers.ahead(), readers.take_in_vain(), readers.take_in_vain()), (0, 1, 0));
    }

    #[test]
    fn gone_is_said_once_and_taken_back() {
        let readers: Readers<u64> = Readers::new();
        let held = readers.get(1, || Ok::<_, ()>((Arc::new(1), 1, None))).unwrap();
        assert!(!readers.is_gone(1));
        assert!(held.set_gone());
        assert!(!held.set_gone());
        readers.close(1);
        assert!(readers.is_gone(1));
        readers.is_current(1);
        assert!(!readers.is_gone(1));
    }

    #[test]
    fn a_reader_that_cannot_be_made_is_an_error() {
        let readers: Readers<u64> = Readers::new();
        assert!(readers.get(1, || Err::<(Arc<u64>, u64, _), _>("no")).is_err());
    }
}
