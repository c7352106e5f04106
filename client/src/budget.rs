//! The memory budget: one count of bytes for all buffers of file contents.
//!
//! Invariants: `used` never exceeds `total`; who waits is served in the order of arrival; read-ahead never waits, never
//! overtakes somebody who waits, and never takes the last quarter (at least [`RESERVE`]), so that a reader's own
//! request always finds memory that only other readers' own requests hold, and those end by their deadlines.
//!
//! Who takes a permit for a request takes all of it at once and holds nothing meanwhile: no two can wait for each other.
//!
//! Buffers that are between two uses are beside it: at most a sixteenth of `total`.

use std::{collections::VecDeque, future::Future, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::oneshot, time::Instant};

use crate::buffers::Buffers;

/// What read-ahead leaves free at least: a read of 1 MiB that is not aligned, and as much again.
const RESERVE: usize = 2 << 20;
/// The part of the budget that spare buffers may take beside it.
const SPARE: usize = 16;
/// How often somebody who waits asks the holders of read-ahead to give back.
const PRESSURE_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Clone, Debug)]
pub(crate) struct Budget {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    total: usize,
    read_ahead_limit: usize,
    state: Mutex<State>,
    spare: Buffers,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    peak: usize,
    read_ahead: usize,
    waits: u64,
    next_ticket: u64,
    waiters: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    bytes: usize,
    grant: oneshot::Sender<Permit>,
}

/// Bytes of the budget; they return when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    inner: Arc<Inner>,
    bytes: usize,
    read_ahead: bool,
}

/// A view of the budget.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    pub(crate) total: usize,
    pub(crate) used: usize,
    pub(crate) peak: usize,
    pub(crate) waits: u64,
}

impl Budget {
    pub(crate) fn new(total: usize) -> Self {
        let read_ahead_limit = total - (total / 4).max(RESERVE).min(total);
        let spare = Buffers::new(total / SPARE);
        Self { inner: Arc::new(Inner { total, read_ahead_limit, state: Mutex::default(), spare }) }
    }

    pub(crate) fn total(&self) -> usize {
        self.inner.total
    }

    pub(crate) fn usage(&self) -> Usage {
        let state = self.inner.state.lock();
        Usage { total: self.inner.total, used: state.used, peak: state.peak, waits: state.waits }
    }

    /// Whether somebody waits.
    pub(crate) fn is_short(&self) -> bool {
        !self.inner.state.lock().waiters.is_empty()
    }

    /// Bytes that must come back before the first who waits can go on.
    pub(crate) fn shortage(&self) -> usize {
        let state = self.inner.state.lock();
        state.waiters.front().map_or(0, |waiter| (state.used + waiter.bytes).saturating_sub(self.inner.total))
    }

    /// For a reader's own request, if it need not wait.
    pub(crate) fn try_demand(&self, bytes: usize) -> Option<Permit> {
        self.try_take(bytes, false)
    }

    /// For read-ahead: only from what is free and nobody waits for.
    pub(crate) fn try_read_ahead(&self, bytes: usize) -> Option<Permit> {
        self.try_take(bytes, true)
    }

    /// For what is fetched ahead of a first read: only from the half of what read-ahead may have.
    pub(crate) fn try_hint(&self, bytes: usize) -> Option<Permit> {
        let of_read_ahead = self.inner.state.lock().read_ahead + bytes;
        (of_read_ahead <= self.inner.read_ahead_limit / 2).then(|| self.try_read_ahead(bytes)).flatten()
    }

    fn try_take(&self, bytes: usize, read_ahead: bool) -> Option<Permit> {
        let mut state = self.inner.state.lock();
        let fits = state.waiters.is_empty()
            && state.used + bytes <= self.inner.total
            && (!read_ahead || state.read_ahead + bytes <= self.inner.read_ahead_limit);
        if !fits {
            return None;
        }
        state.take(bytes);
        if read_ahead {
            state.read_ahead += bytes;
        }
        Some(Permit { inner: self.inner.clone(), bytes, read_ahead })
    }

    /// For a reader's own request of at most [`Budget::total`] bytes. `pressure` is called now and then while waiting.
    pub(crate) async fn demand(&self, bytes: usize, pressure: impl Fn()) -> Permit {
        debug_assert!(bytes <= self.inner.total);
        if let Some(permit) = self.try_demand(bytes) {
            return permit;
        }
        let (ticket, mut granted) = self.enqueue(bytes);
        loop {
            pressure();
            if let Ok(Ok(permit)) = tokio::time::timeout(PRESSURE_INTERVAL, &mut granted).await {
                drop(ticket);
                return permit;
            }
        }
    }

    fn enqueue(&self, bytes: usize) -> (Ticket, oneshot::Receiver<Permit>) {
        let (grant, granted) = oneshot::channel();
        let mut state = self.inner.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waits += 1;
        state.waiters.push_back(Waiter { ticket, bytes, grant });
        drop(state);
        self.inner.serve();
        (Ticket { inner: self.inner.clone(), ticket }, granted)
    }
}

impl State {
    fn take(&mut self, bytes: usize) {
        self.used += bytes;
        self.peak = self.peak.max(self.used);
    }
}

impl Inner {
    /// Grants what now fits, in order.
    fn serve(self: &Arc<Self>) {
        let mut grants = Vec::new();
        {
            let mut state = self.state.lock();
            while let Some(waiter) = state.waiters.front() {
                if state.used + waiter.bytes > self.total {
                    break;
                }
                let bytes = waiter.bytes;
                state.take(bytes);
                if let Some(waiter) = state.waiters.pop_front() {
                    grants.push(waiter);
                }
            }
        }
        // Outside the lock: a permit that nobody wants any more returns through `drop`, which locks.
        for Waiter { ticket: _, bytes, grant } in grants {
            let _ = grant.send(Permit { inner: self.clone(), bytes, read_ahead: false });
        }
    }
}

/// A place in the queue; left when it is dropped.
struct Ticket {
    inner: Arc<Inner>,
    ticket: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.inner.state.lock().waiters.retain(|waiter| waiter.ticket != self.ticket);
        self.inner.serve();
    }
}

impl Permit {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// An empty buffer with room for `len` bytes, which are to be paid for by this.
    pub(crate) fn buffer(&self, len: usize) -> Vec<u8> {
        self.inner.spare.take(len)
    }

    /// Takes a part off; at most what is there.
    pub(crate) fn split(&mut self, bytes: usize) -> Permit {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Permit { inner: self.inner.clone(), bytes, read_ahead: self.read_ahead }
    }

    /// Adds a part of the same budget.
    pub(crate) fn merge(&mut self, mut other: Permit) {
        if self.bytes == 0 {
            std::mem::swap(self, &mut other);
        } else if self.read_ahead == other.read_ahead {
            self.bytes += other.bytes;
            other.bytes = 0;
        } else {
            // Both count as what a reader asked itself: only the cap of read-ahead loses its hold on these bytes.
            self.count_as_demand();
            other.count_as_demand();
            self.bytes += other.bytes;
            other.bytes = 0;
        }
    }

    fn count_as_demand(&mut self) {
        if self.read_ahead {
            self.inner.state.lock().read_ahead -= self.bytes;
            self.read_ahead = false;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let waiting = {
            let mut state = self.inner.state.lock();
            state.used -= self.bytes;
            if self.read_ahead {
                state.read_ahead -= self.bytes;
            }
            !state.waiters.is_empty()
        };
        if waiting {
            self.inner.serve();
        }
    }
}

/// A buffer that holds its part of the budget for as long as anybody holds the buffer.
pub(crate) struct Held {
    bytes: Vec<u8>,
    permit: Permit,
}

impl Held {
    pub(crate) fn new(bytes: Vec<u8>, permit: Permit) -> Self {
        Self { bytes, permit }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.permit.inner.spare.give(std::mem::take(&mut self.bytes));
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// `future` until `deadline`; `None` when it passes.
pub(crate) async fn until<T>(deadline: Instant, future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout_at(deadline, future).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_in_order_and_never_exceeds() {
        let budget = Budget::new(8 << 20);
        let first = budget.demand(6 << 20, || {}).await;
        let (a, mut a_granted) = budget.enqueue(4 << 20);
        let (_b, mut b_granted) = budget.enqueue(1 << 20);
        assert!(a_granted.try_recv().is_err(), "does not fit");
        assert!(b_granted.try_recv().is_err(), "fits, but is second");
        assert!(budget.try_demand(1).is_none(), "nobody overtakes");
        assert_eq!(budget.shortage(), 2 << 20);
        drop(first);
        assert_eq!(a_granted.try_recv().unwrap().bytes(), 4 << 20);
        assert_eq!(b_granted.try_recv().unwrap().bytes(), 1 << 20);
        drop(a);
        assert_eq!(budget.usage().used, 0);
        assert_eq!(budget.usage().peak, 6 << 20);
    }

    #[tokio::test]
    async fn one_who_leaves_lets_the_next_pass() {
        let budget = Budget::new(4 << 20);
        let held = budget.demand(3 << 20, || {}).await;
        let (big, _big_granted) = budget.enqueue(4 << 20);
        let (_small, mut small_granted) = budget.enqueue(1 << 20);
        assert!(small_granted.try_recv().is_err());
        drop(big);
        let small = small_granted.try_recv().unwrap();
        assert_eq!(budget.usage().used, 4 << 20);
        drop((held, small));
        assert_eq!(budget.usage().used, 0);
    }

    #[tokio::test]
    async fn read_ahead_leaves_the_reserve() {
        let budget = Budget::new(16 << 20);
        assert!(budget.try_read_ahead((12 << 20) + 1).is_none());
        let ahead = budget.try_read_ahead(12 << 20).unwrap();
        assert!(budget.try_read_ahead(1).is_none());
        let demand = budget.try_demand(4 << 20).unwrap();
        drop((ahead, demand));
        assert!(budget.try_read_ahead(12 << 20).is_some());
    }

    #[tokio::test]
    async fn parts_add_up() {
        let budget = Budget::new(8 << 20);
        let mut demand = budget.try_demand(100).unwrap();
        let part = demand.split(30);
        assert_eq!((demand.bytes(), part.bytes()), (70, 30));
        demand.merge(part);
        let mut ahead = budget.try_read_ahead(50).unwrap();
        ahead.merge(demand);
        assert_eq!(ahead.bytes(), 150);
        drop(ahead);
        assert_eq!(budget.usage().used, 0);
        assert_eq!(budget.inner.state.lock().read_ahead, 0);
    }
}
