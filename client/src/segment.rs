//! Blocks of a file that were asked for once and may be wanted by several reads: what is read ahead, and small files.
//!
//! A task fetches; reads wait for the blocks that they want and take slices. The task ends when the last holder of the
//! segment is gone (its reader's table and the reads that wait), which cancels the request.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use forebay_protocol::{BLOCK_SIZE, BlockRange};
use parking_lot::Mutex;
use tokio::{sync::watch, task::AbortHandle, time::Instant};

use crate::{budget::until, error::ClientError, fetch::Piece};

/// Without progress for so long, a read no longer counts on somebody else's request and makes its own.
const STUCK: Duration = Duration::from_secs(3);
/// A small file's request ends at the deadline of the read that made it, and says why; this is how long it may take.
const GRACE: Duration = Duration::from_millis(250);

pub(crate) struct Segment {
    pub(crate) range: BlockRange,
    /// Length in bytes.
    pub(crate) len: u64,
    /// The stream that it was read ahead for; `None` for a small file that a reader waits for.
    pub(crate) stream: Option<u64>,
    /// When its request ends.
    pub(crate) deadline: Instant,
    progress: watch::Sender<Progress>,
    pieces: Mutex<Vec<Piece>>,
    used: AtomicU64,
    task: OnceLock<AbortHandle>,
}

#[derive(Clone, Debug)]
struct Progress {
    /// The first block that is not there.
    next: u64,
    ended: Option<Result<(), Option<ClientError>>>,
}

/// Why a segment does not help.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unhelpful {
    /// It failed or is stuck; fetch the blocks yourself.
    Stuck,
    /// It gave its memory to others, and bytes came when there was none; fetch the blocks yourself.
    Starved,
    /// Its request was the reader's own, and failed.
    Failed(ClientError),
}

impl Segment {
    pub(crate) fn new(range: BlockRange, len: u64, stream: Option<u64>, deadline: Instant) -> Arc<Self> {
        Arc::new(Self {
            range,
            len,
            stream,
            deadline,
            progress: watch::Sender::new(Progress { next: range.first, ended: None }),
            pieces: Mutex::default(),
            used: AtomicU64::new(0),
            task: OnceLock::new(),
        })
    }

    pub(crate) fn end(&self) -> u64 {
        self.range.first + self.range.count
    }

    pub(crate) fn run_by(&self, task: AbortHandle) {
        let _ = self.task.set(task);
    }

    pub(crate) fn push(&self, piece: Piece) {
        let next = piece.first + (piece.bytes.len() as u64).div_ceil(BLOCK_SIZE);
        self.pieces.lock().push(piece);
        self.progress.send_modify(|progress| progress.next = next);
    }

    /// `Err(None)` when it was starved.
    pub(crate) fn finish(&self, outcome: Result<(), Option<ClientError>>) {
        self.progress.send_modify(|progress| progress.ended = Some(outcome));
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.progress.borrow().ended.is_some()
    }

    /// Ready when its request has ended.
    pub(crate) async fn ended(&self) {
        // The sender is this segment's own.
        let _ = self.progress.subscribe().wait_for(|progress| progress.ended.is_some()).await;
    }

    /// Bytes that no read took yet.
    pub(crate) fn unused(&self) -> u64 {
        self.len.saturating_sub(self.used.load(Ordering::Relaxed))
    }

    /// A read took so many bytes; true when all were taken.
    pub(crate) fn consume(&self, bytes: u64) -> bool {
        self.used.fetch_add(bytes, Ordering::Relaxed) + bytes >= self.len
    }

    /// Waits until the blocks of `range` (within this one) are there, and gives them.
    pub(crate) async fn blocks(&self, range: BlockRange, deadline: Instant) -> Result<Vec<Piece>, Unhelpful> {
        let wanted = range.first + range.count;
        let mut receiver = self.progress.subscribe();
        loop {
            {
                let progress = receiver.borrow_and_update();
                if progress.next >= wanted {
                    break;
                }
                match &progress.ended {
                    None => {}
                    // Somebody who came late has more time than the request had.
                    Some(Err(Some(error))) if self.stream.is_none() && deadline <= self.deadline => {
                        return Err(Unhelpful::Failed(error.clone()));
                    }
                    Some(Err(None)) => return Err(Unhelpful::Starved),
                    Some(_) => return Err(Unhelpful::Stuck),
                }
            }
            if self.stream.is_some() {
                let patience = (Instant::now() + STUCK).min(deadline);
                if until(patience, receiver.changed()).await.is_none() {
                    return Err(Unhelpful::Stuck);
                }
            } else if until(deadline + GRACE, receiver.changed()).await.is_none() {
                return Err(Unhelpful::Failed(ClientError::Unavailable("no answer by the deadline".into())));
            }
        }
        Ok(self.cut(range))
    }

    fn cut(&self, range: BlockRange) -> Vec<Piece> {
        let end = range.first + range.count;
        let pieces = self.pieces.lock();
        pieces
            .iter()
            .filter_map(|piece| {
                let blocks = (piece.bytes.len() as u64).div_ceil(BLOCK_SIZE);
                let first = piece.first.max(range.first);
                let last = (piece.first + blocks).min(end);
                (first < last).then(|| {
                    let from = ((first - piece.first) * BLOCK_SIZE) as usize;
                    let to = (((last - piece.first) * BLOCK_SIZE) as usize).min(piece.bytes.len());
                    Piece { first, bytes: piece.bytes.slice(from..to) }
                })
            })
            .collect()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}
