//! Numbered invalidations: what changed in the listings of a dataset, for whoever remembers them.
//!
//! The log keeps the last events, bounded in number and bytes. A subscriber is a cursor into it: one that is too slow,
//! comes from another incarnation or names a number that is gone gets a reset, and nothing is ever queued for it.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_protocol::DatasetPath;
use futures::{Stream, stream};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Names and paths kept in the log, in bytes: 4,096 events of a thousand long names would be 1 GiB.
const LOG_BYTES: usize = 8 * 1024 * 1024;

/// A message to a subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalidation {
    /// Whose numbers these are: another value with every start.
    pub incarnation: u64,
    /// Consecutive for directories; of the last one sent for heartbeats; where the sequence restarts for resets.
    pub number: u64,
    /// The dataset's generation now.
    pub generation: u64,
    /// What happened.
    pub kind: InvalidationKind,
}

/// What an [`Invalidation`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InvalidationKind {
    /// Numbers are missing: everything that is remembered of this dataset is void.
    Reset,
    /// Entries of a directory were added, changed or removed.
    Directory {
        /// Which.
        directory: DatasetPath,
        /// Their names; empty when there are too many to name.
        names: Vec<Bytes>,
    },
    /// Nothing happened; the stream is alive.
    Heartbeat,
}

#[derive(Debug)]
struct Event {
    directory: DatasetPath,
    names: Vec<Bytes>,
}

impl Event {
    fn bytes(&self) -> usize {
        self.directory.as_bytes().len()
            + self.names.iter().map(|name| name.len() + size_of::<Bytes>()).sum::<usize>()
            + size_of::<Self>()
    }
}

#[derive(Debug, Default)]
struct Events {
    held: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Number of the newest event; 0 before the first.
    last: u64,
}

/// The log of one dataset in one process.
#[derive(Debug)]
pub(crate) struct Log {
    incarnation: u64,
    capacity: usize,
    events: Mutex<Events>,
    /// The generation; a change of it wakes subscribers, as an event does.
    wake: watch::Sender<u64>,
}

enum Next {
    Event(u64, Arc<Event>),
    Gap(u64),
    Nothing,
}

impl Log {
    pub(crate) fn new(capacity: usize, generation: u64) -> Self {
        // Zero is what a subscriber names that has seen none.
        let incarnation = rand::random::<u64>().max(1);
        Self { incarnation, capacity, events: Mutex::default(), wake: watch::Sender::new(generation) }
    }

    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    pub(crate) fn push(&self, directory: DatasetPath, names: Vec<Bytes>) {
        let event = Arc::new(Event { directory, names });
        {
            let mut events = self.events.lock();
            events.last += 1;
            events.bytes += event.bytes();
            events.held.push_back(event);
            while events.held.len() > self.capacity || (events.bytes > LOG_BYTES && events.held.len() > 1) {
                if let Some(oldest) = events.held.pop_front() {
                    events.bytes -= oldest.bytes();
                }
            }
        }
        self.wake.send_modify(|_| {});
    }

    pub(crate) fn generation(&self, generation: u64) {
        self.wake.send_modify(|known| *known = (*known).max(generation));
    }

    fn next(&self, after: u64) -> Next {
        let events = self.events.lock();
        if after == events.last {
            return Next::Nothing;
        }
        // Of the events (last - held, last], the one numbered after + 1.
        let first = events.last - events.held.len() as u64;
        match after.checked_sub(first).and_then(|index| events.held.get(usize::try_from(index).ok()?)) {
            Some(event) => Next::Event(after + 1, event.clone()),
            None => Next::Gap(events.last),
        }
    }

    /// Messages after the one numbered `after` of `incarnation`. The first is a reset, or the continuation (an event,
    /// or a heartbeat when there is none). Ends with `closed`.
    pub(crate) fn subscribe(
        self: Arc<Self>,
        incarnation: u64,
        after: u64,
        heartbeat: Duration,
        closed: CancellationToken,
    ) -> impl Stream<Item = Invalidation> + Send + 'static {
        let wake = self.wake.subscribe();
        // No event has the last number of all, so a stranger meets a gap.
        let after = if incarnation == self.incarnation { after } else { u64::MAX };
        let cursor = Cursor { log: self, wake, after, told: None, heartbeat, closed };
        stream::unfold(cursor, |mut cursor| async move { cursor.next().await.map(|message| (message, cursor)) })
    }
}

struct Cursor {
    log: Arc<Log>,
    wake: watch::Receiver<u64>,
    after: u64,
    /// The generation of the last message; `None` before the first.
    told: Option<u64>,
    heartbeat: Duration,
    closed: CancellationToken,
}

impl Cursor {
    async fn next(&mut self) -> Option<Invalidation> {
        if self.closed.is_cancelled() {
            return None;
        }
        let beat = tokio::time::sleep(self.heartbeat);
        tokio::pin!(beat);
        loop {
            let generation = *self.wake.borrow_and_update();
            if let Some(message) = self.poll() {
                return Some(message);
            }
            // The greeting of somebody who is up to date, or a new generation.
            if self.told != Some(generation) {
                return Some(self.message(InvalidationKind::Heartbeat));
            }
            tokio::select! {
                () = self.closed.cancelled() => return None,
                () = &mut beat => return Some(self.message(InvalidationKind::Heartbeat)),
                // The log lives as long as this cursor holds it.
                woken = self.wake.changed() => woken.ok()?,
            }
        }
    }

    fn poll(&mut self) -> Option<Invalidation> {
        let (number, kind) = match self.log.next(self.after) {
            Next::Event(number, event) => {
                let Event { directory, names } = &*event;
                (number, InvalidationKind::Directory { directory: directory.clone(), names: names.clone() })
            }
            Next::Gap(last) => (last, InvalidationKind::Reset),
            Next::Nothing => return None,
        };
        self.after = number;
        Some(self.message(kind))
    }

    fn message(&mut self, kind: InvalidationKind) -> Invalidation {
        let generation = *self.wake.borrow();
        self.told = Some(generation);
        Invalidation { incarnation: self.log.incarnation, number: self.after, generation, kind }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    const BEAT: Duration = Duration::from_secs(2);

    fn log(capacity: usize) -> Arc<Log> {
        Arc::new(Log::new(capacity, 1))
    }

    fn push(log: &Log, name: &'static str) {
        log.push(DatasetPath::root(), vec![Bytes::from_static(name.as_bytes())]);
    }

    fn directory(message: Option<Invalidation>) -> (u64, Vec<Bytes>) {
        match message {
            Some(Invalidation { number, kind: InvalidationKind::Directory { names, .. }, .. }) => (number, names),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_are_reset_and_followers_go_on() {
        let log = log(10);
        push(&log, "a");
        push(&log, "b");
        let closed = CancellationToken::new();
        let mut stranger = Box::pin(log.clone().subscribe(0, 0, BEAT, closed.clone()));
        let first = stranger.next().await.unwrap();
        assert_eq!((first.number, first.kind), (2, InvalidationKind::Reset));
        push(&log, "c");
        assert_eq!(directory(stranger.next().await), (3, vec![Bytes::from_static(b"c")]));

        let mut follower = Box::pin(log.clone().subscribe(log.incarnation(), 1, BEAT, closed.clone()));
        assert_eq!(directory(follower.next().await).0, 2);
        assert_eq!(directory(follower.next().await).0, 3);

        // Up to date: greeted at once, then a heartbeat per interval, and one when the generation rises.
        let mut current = Box::pin(log.clone().subscribe(log.incarnation(), 3, BEAT, closed.clone()));
        let start = tokio::time::Instant::now();
        assert_eq!(current.next().await.unwrap().kind, InvalidationKind::Heartbeat);
        assert_eq!(start.elapsed(), Duration::ZERO);
        let beat = current.next().await.unwrap();
        assert_eq!((beat.kind, beat.number, start.elapsed()), (InvalidationKind::Heartbeat, 3, BEAT));
        log.generation(5);
        let beat = current.next().await.unwrap();
        assert_eq!((beat.generation, start.elapsed()), (5, BEAT));

        closed.cancel();
        assert!(current.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_subscriber_is_reset() {
        let log = log(3);
        let closed = CancellationToken::new();
        let mut slow = Box::pin(log.clone().subscribe(log.incarnation(), 0, BEAT, closed));
        for _ in 0..3 {
            push(&log, "x");
        }
        assert_eq!(directory(slow.next().await).0, 1);
        for _ in 0..3 {
            push(&log, "x");
        }
        let message = slow.next().await.unwrap();
        assert_eq!((message.number, message.kind), (6, InvalidationKind::Reset));
        push(&log, "y");
        assert_eq!(directory(slow.next().await).0, 7);
        // A number from the future is no continuation.
        let mut odd = Box::pin(log.clone().subscribe(log.incarnation(), 9, BEAT, CancellationToken::new()));
        assert_eq!(odd.next().await.unwrap().kind, InvalidationKind::Reset);
    }

    #[test]
    fn the_log_is_bounded_in_bytes() {
        let log = log(1_000);
        let names: Vec<Bytes> = (0..1_000).map(|_| Bytes::from(vec![b'x'; 255])).collect();
        for _ in 0..100 {
            log.push(DatasetPath::root(), names.clone());
        }
        let events = log.events.lock();
        assert!(events.bytes <= LOG_BYTES && events.held.len() > 10, "{}", events.held.len());
        assert_eq!(events.bytes, events.held.iter().map(|e| e.bytes()).sum::<usize>());
    }
}
