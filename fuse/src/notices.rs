//! What the kernel has to be told, on its way to the one thread that tells it.
//!
//! A notification can hang: it waits for a directory's lock, which a look-up may hold that waits for a worker. So it is
//! never sent from a thread that answers requests, and this queue between the two never waits: when it is full, what is
//! in it becomes one notice that says "everything", which is always true enough.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

/// Names in the queue at most: 4 MiB of the longest.
const MAX_NAMES: usize = 16_384;

/// Something that the kernel may hold and must ask for again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// These names in this directory, and its listing.
    Names {
        /// The directory's node.
        directory: u64,
        /// The names.
        names: Vec<Bytes>,
    },
    /// Any name in this directory, and its listing.
    Directory(u64),
    /// All names and all listings.
    Everything,
}

impl Notice {
    fn weight(&self) -> usize {
        match self {
            Self::Names { names, .. } => names.len().max(1),
            Self::Directory(_) | Self::Everything => 1,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Notice>,
    weight: usize,
    closed: bool,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Notices {
    state: Mutex<State>,
    ready: Condvar,
    overflows: AtomicU64,
}

impl Notices {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names of one directory changed.
    pub fn names(&self, directory: u64, names: Vec<Bytes>) {
        self.push(Notice::Names { directory, names });
    }

    /// Any name of one directory may have changed.
    pub fn directory(&self, directory: u64) {
        self.push(Notice::Directory(directory));
    }

    /// Anything may have changed.
    pub fn everything(&self) {
        self.push(Notice::Everything);
    }

    /// Times that the queue was full.
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }

    /// Nothing more comes: [`Self::next`] ends, and what is in the queue is dropped.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.ready.notify_all();
    }

    /// The next notice; waits for it. `None` when the queue was closed.
    pub fn next(&self) -> Option<Notice> {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(notice) = state.queue.pop_front() {
                state.weight -= notice.weight();
                return Some(notice);
            }
            self.ready.wait(&mut state);
        }
    }

    #[cfg(test)]
    pub(crate) fn try_next(&self) -> Option<Notice> {
        let mut state = self.state.lock();
        let notice = state.queue.pop_front()?;
        state.weight -= notice.weight();
        Some(notice)
    }

    fn push(&self, mut notice: Notice) {
        let mut state = self.state.lock();
        if state.weight + notice.weight() > MAX_NAMES {
            self.overflows.fetch_add(1, Ordering::Relaxed);
            notice = Notice::Everything;
        }
        if notice == Notice::Everything {
            // It says all that the others say.
            state.queue.clear();
            state.weight = 0;
        }
        // Nothing is left to be said after "everything" that has not been sent yet.
        if state.queue.front() != Some(&Notice::Everything) {
            state.weight += notice.weight();
            state.queue.push_back(notice);
        }
        self.ready.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &'static str) -> Vec<Bytes> {
        vec![Bytes::from_static(text.as_bytes())]
    }

    #[test]
    fn in_order_and_then_closed() {
        let notices = Notices::new();
        notices.names(5, name("a"));
        notices.directory(6);
        assert_eq!(notices.next(), Some(Notice::Names { directory: 5, names: name("a") }));
        assert_eq!(notices.next(), Some(Notice::Directory(6)));
        notices.directory(7);
        notices.close();
        assert_eq!(notices.next(), None);
    }

    #[test]
    fn everything_says_it_all() {
        let notices = Notices::new();
        notices.names(5, name("a"));
        notices.everything();
        notices.names(5, name("b"));
        notices.everything();
        assert_eq!(notices.next(), Some(Notice::Everything));
        notices.names(5, name("c"));
        assert_eq!(notices.next(), Some(Notice::Names { directory: 5, names: name("c") }));
        assert_eq!(notices.overflows(), 0);
    }

    #[test]
    fn a_full_queue_becomes_everything() {
        let notices = Notices::new();
        for directory in 0..2 * MAX_NAMES as u64 {
            notices.names(directory, name("a"));
        }
        assert_eq!(notices.overflows(), 1);
        assert_eq!(notices.next(), Some(Notice::Everything));
        assert!(notices.state.lock().queue.is_empty());
        assert_eq!(notices.state.lock().weight, 0);
    }

    #[test]
    fn a_waiting_thread_is_woken() {
        let notices = std::sync::Arc::new(Notices::new());
        let thread = std::thread::spawn({
            let notices = notices.clone();
            move || (notices.next(), notices.next())
        });
        notices.directory(1);
        std::thread::sleep(std::time::Duration::from_millis(20));
        notices.close();
        let (first, second) = thread.join().unwrap();
        assert_eq!((first, second.is_none()), (Some(Notice::Directory(1)), true));
    }
}
