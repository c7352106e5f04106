//! What a program says that it will read, in the order in which it will: it is fetched ahead, as far as there is memory.
//!
//! A hint is a path below a directory. Hints are taken one after the other: their names are looked up, and the beginnings of
//! the files (all of a small one) are fetched into the readers that the first read will find. How far ahead depends on how
//! fast they are read: [`FEW`] files, and as many more as were read in the last [`HORIZON`], within half of the memory for
//! read-ahead. So a program that stops reading costs little, and one that reads fast finds everything there.
//!
//! What was read in this mount before may be in the kernel's page cache, and then nobody asks for it. Such files are fetched
//! while more than half of those that were judged lately were asked for; until then they are in doubt. One in doubt that is
//! asked for all the same speaks for the others, and they are taken up again. What the node cache has is not fetched.
//!
//! Hints are kept in memory and bounded; a daemon that takes over has none until it is told some.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_keeper::tables::{NodeKind, ROOT_ID};
use forebay_protocol::identity::MAX_NAME;
use futures::{
    StreamExt,
    stream::{FuturesOrdered, FuturesUnordered},
};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::timeout};

use super::FileSystem;
use crate::{
    errno::Errno,
    local::{Asked, LocalFiles},
    tree::{Ahead, Reader, Tree},
};

/// Hints that wait at most, and bytes of their paths.
const WAITING: usize = 65_536;
const WAITING_BYTES: usize = 8 << 20;
/// Names looked up at once, and files fetched at once.
const AT_ONCE: usize = 64;
/// Files that are ahead of somebody who reads none.
const FEW: u64 = 64;
/// How far ahead of a reader, in time.
const HORIZON: Duration = Duration::from_secs(8);
/// How often it is looked whether more may be fetched.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a hint waits for memory, and a fetch is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Files in doubt, at most.
const DOUBTFUL: usize = 4096;
/// Files by which others are judged.
const REMEMBERED: u64 = 1024;
/// Nodes whose reads are remembered, one bit for each: 2 MiB.
const NODES: u64 = 16 << 20;

/// What was announced, and what became of it.
#[derive(Default)]
pub(super) struct Hints {
    queue: Mutex<Queue>,
    came: Notify,
    pace: Mutex<Pace>,
    /// One bit for each node that was read.
    read: Mutex<Vec<u64>>,
    again: Mutex<Again>,
}

/// Files that had been read before.
#[derive(Default)]
struct Again {
    /// In doubt, in their order, and those of them that nobody asked for yet.
    order: VecDeque<u64>,
    doubtful: HashSet<u64>,
    /// Files that were asked for, or for which nobody asked for so long that nobody will; and the former of them. Halved
    /// now and then.
    judged: u64,
    asked: u64,
}

impl Again {
    fn is_worth(&self) -> bool {
        self.asked * 2 > self.judged
    }

    /// One is hinted: whether it is fetched. If not, it is in doubt.
    fn hinted(&mut self, node: u64) -> bool {
        if self.is_worth() {
            return true;
        }
        if self.doubtful.insert(node) {
            self.order.push_back(node);
        }
        if self.order.len() > DOUBTFUL
            && let Some(oldest) = self.order.pop_front()
            && self.doubtful.remove(&oldest)
        {
            self.judge(false);
        }
        false
    }

    /// One that was not fetched is asked for: whether those in doubt are worth fetching now.
    fn was_asked(&mut self, node: u64) -> bool {
        if !self.doubtful.remove(&node) {
            return false;
        }
        self.judge(true);
        self.is_worth()
    }

    /// The next in doubt, when they are worth fetching.
    fn take_up(&mut self) -> Option<u64> {
        while self.is_worth() {
            let node = self.order.pop_front()?;
            if self.doubtful.remove(&node) {
                return Some(node);
            }
        }
        None
    }

    fn judge(&mut self, asked: bool) {
        self.judged += 1;
        self.asked += u64::from(asked);
        if self.judged >= REMEMBERED {
            (self.judged, self.asked) = (self.judged / 2, self.asked / 2);
        }
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Hint>,
    bytes: usize,
}

struct Hint {
    directory: u64,
    path: Bytes,
}

/// What may be fetched next.
enum Next {
    Hint(Hint),
    /// A file that was in doubt.
    Doubtful(u64),
}

/// How fast what is fetched ahead is read.
struct Pace {
    /// Reads since then, and the rate before.
    reads: u64,
    since: Instant,
    per_second: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { reads: 0, since: Instant::now(), per_second: 0.0 }
    }
}

impl Pace {
    /// Whether one more may be fetched while so many are ahead.
    fn allows(&mut self, ahead: u64, now: Instant) -> bool {
        let passed = now.duration_since(self.since).as_secs_f64();
        if passed >= 1.0 {
            // Half of it is the last second's.
            self.per_second = (self.per_second + self.reads as f64 / passed) / 2.0;
            (self.reads, self.since) = (0, now);
        }
        let rate = self.per_second.max(self.reads as f64 / passed.max(1.0));
        ahead < FEW + (rate * HORIZON.as_secs_f64()) as u64
    }
}

impl Hints {
    /// Takes hints; how many there was room for.
    fn push<'a>(&self, directory: u64, paths: impl Iterator<Item = &'a [u8]>) -> u32 {
        let mut queue = self.queue.lock();
        let mut taken = 0;
        for path in paths {
            if queue.waiting.len() >= WAITING || queue.bytes + path.len() > WAITING_BYTES {
                break;
            }
            queue.bytes += path.len();
            queue.waiting.push_back(Hint { directory, path: Bytes::copy_from_slice(path) });
            taken += 1;
        }
        drop(queue);
        self.came.notify_one();
        taken
    }

    async fn next(&self) -> Next {
        loop {
            if let Some(node) = self.again.lock().take_up() {
                return Next::Doubtful(node);
            }
            if let Some(hint) = self.pop() {
                return Next::Hint(hint);
            }
            self.came.notified().await;
        }
    }

    fn pop(&self) -> Option<Hint> {
        let mut queue = self.queue.lock();
        let hint = queue.waiting.pop_front()?;
        queue.bytes -= hint.path.len();
        Some(hint)
    }

    /// A file is asked for, for the first time since it was fetched ahead if it was (`ahead`).
    pub(super) fn is_asked(&self, node: u64, ahead: bool) {
        if ahead {
            self.pace.lock().reads += 1;
        }
        if !self.is_read(node) {
            return;
        }
        let mut again = self.again.lock();
        if ahead {
            again.judge(true);
        } else if again.was_asked(node) {
            drop(again);
            self.came.notify_one();
        }
    }

    /// So many files were fetched, and nobody asked for them.
    pub(super) fn in_vain(&self, count: u64) {
        let mut again = self.again.lock();
        (0..count).for_each(|_| again.judge(false));
    }

    /// A file was read.
    pub(super) fn was_read(&self, node: u64) {
        if node >= NODES {
            return;
        }
        let (word, bit) = ((node / 64) as usize, 1 << (node % 64));
        let mut read = self.read.lock();
        if read.len() <= word {
            read.resize(word + 1, 0);
        }
        read[word] |= bit;
    }

    fn is_read(&self, node: u64) -> bool {
        self.read.lock().get((node / 64) as usize).is_some_and(|word| word & 1 << (node % 64) != 0)
    }

    /// Whether a file that was hinted is fetched.
    fn is_worth(&self, node: u64) -> bool {
        !self.is_read(node) || self.again.lock().hinted(node)
    }
}

impl<T: Tree> FileSystem<T> {
    /// Takes the paths of files that will be read, in this order: relative to a directory, or from the mount's root where
    /// they begin with `/`; a zero byte ends each. Gives how many were taken, from the first on: when there are too many,
    /// the others are to be said again later.
    pub fn hint(&self, directory: u64, paths: &[u8]) -> Result<u32, Errno> {
        self.opendir(directory)?;
        let paths = paths.split(|byte| *byte == 0).filter(|path| !path.is_empty());
        Ok(self.hints.push(directory, paths))
    }

    /// Fetches ahead what was announced, until it is dropped.
    pub(super) async fn follow_hints(&self) {
        let turn = tokio::sync::Mutex::new(());
        let (mut looking, mut fetching) = (FuturesOrdered::new(), FuturesUnordered::new());
        loop {
            tokio::select! {
                next = self.hints.next(), if looking.len() < AT_ONCE => looking.push_back(self.look(next)),
                Some(node) = looking.next(), if fetching.len() < AT_ONCE => {
                    if let Some(node) = node {
                        fetching.push(self.fetch_ahead(node, &turn));
                    }
                }
                Some(()) = fetching.next() => {}
            }
        }
    }

    async fn look(&self, next: Next) -> Option<u64> {
        match next {
            Next::Hint(hint) => self.hinted(hint).await.filter(|node| self.hints.is_worth(*node)),
            Next::Doubtful(node) => Some(node),
        }
    }

    /// The file that a hint names; `None` if there is none, or nothing is to be fetched of it.
    async fn hinted(&self, hint: Hint) -> Option<u64> {
        let mut node = if hint.path.starts_with(b"/") { ROOT_ID } else { hint.directory };
        let names = hint.path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        for name in names {
            if name.len() > MAX_NAME {
                return None;
            }
            node = self.lookup(node, name).await.ok()?.attributes?.id;
        }
        let NodeKind::File { version } = self.tables.nodes.resolve(node)?.kind else { return None };
        let is_here = |local: &LocalFiles| {
            let path = self.path(node);
            path.is_ok_and(|path| local.has(Asked { node, path: &path, version: &version }))
        };
        (version.size > 0 && !self.local.as_ref().is_some_and(is_here)).then_some(node)
    }

    async fn fetch_ahead(&self, node: u64, turn: &tokio::sync::Mutex<()>) {
        let begun = timeout(PATIENCE, async {
            // In their order.
            let _turn = turn.lock().await;
            loop {
                if self.hints.pace.lock().allows(self.readers.ahead(), Instant::now()) {
                    let held = self.reader(node).ok()?;
                    match held.reader.fetch_ahead().await {
                        Ahead::NoMemory => {}
                        Ahead::There => return None,
                        Ahead::UnderWay(ended) => {
                            held.set_ahead();
                            return Some(ended);
                        }
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        if let Ok(Some(ended)) = begun.await {
            // It ends by its own deadline.
            ended.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_ahead_of_who_reads_fast() {
        let start = Instant::now();
        let mut pace = Pace { since: start, ..Pace::default() };
        assert!(pace.allows(FEW - 1, start) && !pace.allows(FEW, start));
        pace.reads = 100;
        let second = start + Duration::from_secs(1);
        // At least half of what the last second allows.
        assert!(pace.allows(FEW + 399, second) && !pace.allows(FEW + 400, second));
        for passed in 2..=20 {
            pace.reads = 100;
            pace.allows(0, start + Duration::from_secs(passed));
        }
        assert!(pace.allows(FEW + 790, start + Duration::from_secs(20)));
        for passed in 21..40 {
            pace.allows(0, start + Duration::from_secs(passed));
        }
        assert!(!pace.allows(FEW, start + Duration::from_secs(40)), "nobody reads any more");
    }

    #[test]
    fn what_was_read_before_is_in_doubt_until_it_is_asked_for() {
        let mut again = Again::default();
        for node in 0..10 {
            assert!(!again.hinted(node), "it may be in the page cache");
        }
        assert_eq!(again.take_up(), None);
        assert!(!again.was_asked(77), "nobody announced it");
        assert!(again.was_asked(0), "it is not, so the others are not");
        assert!(!again.was_asked(0), "once");
        assert!(again.was_asked(3));
        assert_eq!((again.take_up(), again.take_up(), again.take_up()), (Some(1), Some(2), Some(4)));
        assert!(again.hinted(11));
        // They are fetched in vain.
        (0..4).for_each(|_| again.judge(false));
        assert_eq!((again.take_up(), again.hinted(12)), (None, false));
    }

    #[test]
    fn what_stays_in_doubt_is_forgotten() {
        let mut again = Again::default();
        for node in 0..3 * DOUBTFUL as u64 {
            again.hinted(node);
        }
        assert_eq!((again.order.len(), again.doubtful.len()), (DOUBTFUL, DOUBTFUL));
        assert!(again.judged < REMEMBERED);
        assert!(!again.was_asked(3 * DOUBTFUL as u64 - 1), "one of many");
    }

    #[test]
    fn hints_are_bounded_and_come_in_their_order() {
        let hints = Hints::default();
        assert_eq!(hints.push(7, [&b"a"[..], b"b"].into_iter()), 2);
        let long = vec![b'x'; 4000];
        let taken = hints.push(8, std::iter::repeat_n(&long[..], 10_000));
        assert_eq!(taken as usize, (WAITING_BYTES - 2) / 4000);
        assert_eq!(hints.push(8, [&long[..]].into_iter()), 0);
        let first = hints.pop().unwrap();
        assert_eq!((first.directory, &first.path[..]), (7, &b"a"[..]));
        assert_eq!(hints.queue.lock().bytes, 1 + taken as usize * 4000);
    }
}
