//! What waits to be loaded, in an order: what comes out is the first of what is there. Where that is to be an order of its
//! own, nothing comes out before all is there, or as much as there is room for.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    sync::Arc,
};

use bytes::Bytes;
use futures::{Stream, stream};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SetOnce};

/// A queue of at most `room`; with `sorted`, it fills before anything comes out.
pub(super) fn queue<T: Send + 'static>(room: usize, sorted: bool) -> (Sender<T>, impl Stream<Item = T> + Send) {
    let shared = Arc::new(Shared {
        waiting: Mutex::new((0, BinaryHeap::new())),
        room: Semaphore::new(room),
        there: Semaphore::new(0),
        filled: SetOnce::new(),
    });
    if !sorted {
        shared.fill();
    }
    let received = stream::unfold(shared.clone(), async |shared| Some((shared.pop().await?, shared)));
    (Sender(shared), received)
}

/// The end where things come in; when it is dropped, what waits comes out, and then nothing.
pub(super) struct Sender<T>(Arc<Shared<T>>);

struct Shared<T> {
    /// With the number of the next.
    waiting: Mutex<(u64, BinaryHeap<Reverse<Waiting<T>>>)>,
    room: Semaphore,
    /// One for each that waits; closed with the sender.
    there: Semaphore,
    /// Things may come out.
    filled: SetOnce<()>,
}

struct Waiting<T> {
    place: Bytes,
    number: u64,
    what: T,
}

impl<T> Waiting<T> {
    fn key(&self) -> (&Bytes, u64) {
        (&self.place, self.number)
    }
}

impl<T> PartialEq for Waiting<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Waiting<T> {}

impl<T> PartialOrd for Waiting<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Waiting<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl<T> Sender<T> {
    /// Puts something behind what is of the same place, or a lower one; waits while the queue is full.
    pub(super) async fn send(&self, place: Bytes, what: T) {
        if self.0.room.available_permits() == 0 {
            self.0.fill();
        }
        // It is never closed.
        if let Ok(room) = self.0.room.acquire().await {
            room.forget();
        }
        let mut waiting = self.0.waiting.lock();
        let number = waiting.0;
        waiting.0 += 1;
        waiting.1.push(Reverse(Waiting { place, number, what }));
        drop(waiting);
        self.0.there.add_permits(1);
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.there.close();
        self.0.fill();
    }
}

impl<T> Shared<T> {
    fn fill(&self) {
        // Perhaps it was before.
        let _ = self.filled.set(());
    }

    async fn pop(&self) -> Option<T> {
        self.filled.wait().await;
        // Closed means that nothing comes any more, not that nothing is there.
        if let Ok(there) = self.there.acquire().await {
            there.forget();
        }
        let Reverse(first) = self.waiting.lock().1.pop()?;
        self.room.add_permits(1);
        Some(first.what)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn what_is_first_comes_first_of_what_is_there() {
        let (sender, received) = queue(4, false);
        let mut received = Box::pin(received);
        let place = |text: &'static str| Bytes::from_static(text.as_bytes());
        sender.send(place("c"), 1).await;
        sender.send(place("a"), 2).await;
        sender.send(place("b"), 3).await;
        sender.send(place("a"), 4).await;
        assert_eq!(received.next().await, Some(2));
        sender.send(place("a"), 5).await;
        let full = sender.send(place("a"), 6);
        assert!(futures::FutureExt::now_or_never(full).is_none());
        drop(sender);
        assert_eq!(received.collect::<Vec<_>>().await, [4, 5, 3, 1]);
    }

    #[tokio::test]
    async fn what_is_sorted_waits_until_it_is_there_or_there_is_no_room() {
        let (sender, received) = queue(2, true);
        let mut received = Box::pin(received);
        let place = |text: &'static str| Bytes::from_static(text.as_bytes());
        sender.send(place("b"), 1).await;
        assert!(futures::FutureExt::now_or_never(received.next()).is_none());
        sender.send(place("a"), 2).await;
        assert!(futures::FutureExt::now_or_never(sender.send(place("c"), 3)).is_none());
        assert_eq!(received.next().await, Some(2));
        drop(sender);
        assert_eq!(received.collect::<Vec<_>>().await, [1]);
        let (sender, received) = queue(9, true);
        sender.send(place("b"), 1).await;
        sender.send(place("a"), 2).await;
        drop(sender);
        assert_eq!(received.collect::<Vec<_>>().await, [2, 1]);
    }
}
