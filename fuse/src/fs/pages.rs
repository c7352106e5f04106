//! Pages of directory listings, kept for the few moments between one `getdents` and the next.
//!
//! The kernel caches directories itself; this only keeps one walk of a directory from asking a worker once per reply.
//! Bounded in pages and in age. Invariant: a page that was asked for before a change was announced is never kept after
//! it ([`Pages::ticket`]). Look-ups take tickets, too: what the kernel may keep must not be older than what it was told
//! to forget.

use std::{
    cmp::Ordering,
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::tree::{Entry, EntryKind, ListPage};

/// Entries asked for at a time: ten replies of 32 KiB (what glibc asks for), about 300 KiB.
pub(crate) const PAGE_ENTRIES: u32 = 2_000;
/// Pages kept: 32 walks under way, about 10 MiB.
const MAX_PAGES: usize = 32;
/// How long a page serves. Changes are pushed; this bounds a push that got lost.
const MAX_AGE: Duration = Duration::from_secs(10);

/// A page and where it begins.
#[derive(Debug)]
pub(crate) struct Held {
    directory: u64,
    /// The sort key before its first entry.
    after: Bytes,
    pub(crate) page: ListPage,
    /// Of the time before it was asked for.
    pub(crate) ticket: Ticket,
    pub(crate) at: Instant,
}

impl Held {
    /// Index of the first entry whose sort key follows `after`, if this page can tell.
    fn position(&self, after: &[u8]) -> Option<usize> {
        if after < self.after.as_ref() {
            return None;
        }
        let index = self.page.entries.partition_point(|entry| compare(entry, after) != Ordering::Greater);
        // Past its last entry a page knows only whether the directory ends there.
        (index < self.page.entries.len() || self.page.end).then_some(index)
    }
}

/// Compares an entry's sort key with `key`, without building it.
pub(crate) fn compare(entry: &Entry, key: &[u8]) -> Ordering {
    let suffix: &[u8] = match entry.kind {
        EntryKind::Directory => b"/",
        EntryKind::File { .. } => b"",
    };
    entry.name.iter().chain(suffix).cmp(key.iter())
}

/// Changes are counted for so many groups of directories, so that a change in one seldom troubles requests in another.
const GROUPS: usize = 64;

/// Proof that nothing was announced between a request and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    group: usize,
    changes: u64,
}

#[derive(Debug)]
struct Inner {
    /// Most recently used last.
    pages: VecDeque<Arc<Held>>,
    changes: [u64; GROUPS],
}

impl Default for Inner {
    fn default() -> Self {
        Self { pages: VecDeque::new(), changes: [0; GROUPS] }
    }
}

/// Ids of directories are positions of records, so their low bits alone are no good.
fn group(directory: u64) -> usize {
    // The six high bits of a Fibonacci hash: less than GROUPS.
    (directory.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as usize
}

/// The pages of one volume.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    inner: Mutex<Inner>,
}

impl Pages {
    /// The page that holds what follows `after`, and where in it.
    pub(crate) fn find(&self, directory: u64, after: &[u8]) -> Option<(Arc<Held>, usize)> {
        let mut inner = self.inner.lock();
        inner.pages.retain(|held| held.at.elapsed() < MAX_AGE);
        let (at, index) = inner
            .pages
            .iter()
            .enumerate()
            .filter(|(_, held)| held.directory == directory)
            .find_map(|(at, held)| Some((at, held.position(after)?)))?;
        let held = inner.pages.remove(at)?;
        inner.pages.push_back(held.clone());
        Some((held, index))
    }

    /// To be taken before anything of this directory is asked for.
    pub(crate) fn ticket(&self, directory: u64) -> Ticket {
        let group = group(directory);
        Ticket { group, changes: self.inner.lock().changes[group] }
    }

    /// Whether nothing of its directory was announced since the ticket was taken.
    pub(crate) fn is_current(&self, ticket: Ticket) -> bool {
        self.inner.lock().changes[ticket.group] == ticket.changes
    }

    /// Keeps an answer, unless something changed since `ticket`.
    pub(crate) fn keep(&self, ticket: Ticket, directory: u64, after: Bytes, page: ListPage) -> Arc<Held> {
        let held = Arc::new(Held { directory, after, page, ticket, at: Instant::now() });
        let mut inner = self.inner.lock();
        if inner.changes[ticket.group] == ticket.changes {
            if inner.pages.len() == MAX_PAGES {
                inner.pages.pop_front();
            }
            inner.pages.push_back(held.clone());
        }
        held
    }

    /// Forgets a directory, or all of them.
    pub(crate) fn forget(&self, directory: Option<u64>) {
        let mut inner = self.inner.lock();
        match directory {
            Some(directory) => {
                inner.changes[group(directory)] += 1;
                inner.pages.retain(|held| held.directory != directory);
            }
            None => {
                inner.changes.iter_mut().for_each(|changes| *changes += 1);
                inner.pages.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(names: &[&'static str], end: bool) -> ListPage {
        let entries = names
            .iter()
            .map(|name| match name.strip_suffix('/') {
                Some(name) => Entry { name: Bytes::from_static(name.as_bytes()), kind: EntryKind::Directory },
                None => Entry {
                    name: Bytes::from_static(name.as_bytes()),
                    kind: EntryKind::File {
                        version: forebay_protocol::FileVersion {
                            size: 0,
                            mtime_ns: 0,
                            key: forebay_protocol::VersionKey::new(Bytes::new()).unwrap(),
                        },
                    },
                },
            })
            .collect();
        ListPage { entries, end }
    }

    #[test]
    fn positions_follow_sort_keys() {
        let pages = Pages::default();
        pages.keep(pages.ticket(5), 5, Bytes::from_static(b"m"), page(&["n", "o-", "o/", "o0"], false));
        let index = |after: &str| pages.find(5, after.as_bytes()).map(|(_, index)| index);
        assert_eq!(index("a"), None);
        assert_eq!(index("m"), Some(0));
        assert_eq!(index("n"), Some(1));
        assert_eq!(index("nn"), Some(1));
        assert_eq!(index("o"), Some(1));
        assert_eq!(index("o-"), Some(2));
        assert_eq!(index("o/"), Some(3));
        assert_eq!(index("o0"), None);
        assert!(pages.find(6, b"n").is_none());
        pages.keep(pages.ticket(5), 5, Bytes::from_static(b"o0"), page(&["z"], true));
        assert_eq!(index("o0"), Some(0));
        assert_eq!(index("z"), Some(1));
        assert_eq!(index("zz"), Some(1));
    }

    #[test]
    fn an_answer_from_before_a_change_is_not_kept() {
        let pages = Pages::default();
        for change in [Some(5), None] {
            let ticket = pages.ticket(5);
            pages.forget(change);
            assert!(!pages.is_current(ticket));
            pages.keep(ticket, 5, Bytes::new(), page(&["a"], true));
            assert!(pages.find(5, b"").is_none());
        }
        let ticket = pages.ticket(5);
        assert_ne!(group(5), group(9));
        pages.forget(Some(9));
        assert!(pages.is_current(ticket));
        pages.keep(ticket, 5, Bytes::new(), page(&["a"], true));
        pages.forget(Some(9));
        assert!(pages.find(5, b"").is_some());
        pages.forget(None);
        assert!(pages.find(5, b"").is_none());
    }

    #[test]
    fn pages_are_bounded() {
        let pages = Pages::default();
        for directory in 0..100 {
            pages.keep(pages.ticket(directory), directory, Bytes::new(), page(&["a"], true));
        }
        assert_eq!(pages.inner.lock().pages.len(), MAX_PAGES);
        assert!(pages.find(99, b"").is_some());
        assert!(pages.find(0, b"").is_none());
    }
}
