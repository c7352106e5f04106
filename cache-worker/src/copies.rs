//! Copies: what a dataset wants held by several workers, the first ones of each chunk's order.
//!
//! Whoever comes to hold a chunk whole from a source offers it to the others of its first `min` workers; each takes it from
//! him, and from nobody else, so nothing is fetched twice. What an offer did not bring about, because somebody was away,
//! the table changed or offers came too fast, a **pass** makes good: every worker walks the tree and offers what it holds.
//! So the copies that a lost worker had are made again, from whoever has the others. Pinned chunks take part in passes
//! whatever `min` is: a worker that leaves, or that a new one took its place from, hands them on with their pins.
//!
//! What a worker holds without being one of those first is spare ([`ChunkStore::mark_spare`]): old places after the table
//! changed, and copies of what was hot once. It serves as long as there is room for it.
//!
//! [`ChunkStore::mark_spare`]: forebay_cache_store::ChunkStore::mark_spare

mod pass;
mod take;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use forebay_protocol::{
    ChunkKey, DatasetPath, FileVersion,
    table::Member,
    worker::{ChunkToCopy, CopyOutcome, CopyRequest, CopyState},
};
use futures::{StreamExt, future::join_all};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::debug;

pub(crate) use self::{
    pass::{count, keep_up},
    take::take,
};
use crate::{config::Replicas, dataset::Dataset, load::Found, notices, worker::Worker};

/// Offers that wait at most: at 300 bytes each 5 MB. Beyond, a pass finds what they would have brought.
const WAITING: usize = 16_384;
/// Chunks of one message, and bytes: at 5 MB/s they come within its deadline.
const BATCH: usize = 256;
const BATCH_BYTES: u64 = 256 << 20;
/// Batches under way.
const BATCHES: usize = 4;
/// How long a batch may take: the call at the other side has a minute.
const CALL: Duration = Duration::from_secs(65);

/// A chunk that others are to have.
pub(crate) struct Offer {
    pub(crate) path: DatasetPath,
    pub(crate) version: FileVersion,
    pub(crate) key: ChunkKey,
    /// Workers that are to have it, this one among them if it is one of the first.
    pub(crate) count: u32,
    /// They pin it, those among the first that the dataset has copies on at most.
    pub(crate) pin: bool,
    /// Told what became of it.
    pub(crate) done: Option<oneshot::Sender<Result<(), String>>>,
}

impl Offer {
    fn bytes(&self) -> u64 {
        self.key.len(self.version.size)
    }
}

/// What a dataset's copies need; its tasks are [`serve`] and [`keep_up`].
pub(crate) struct Copies {
    min: AtomicU32,
    max: AtomicU32,
    offers: mpsc::Sender<Offer>,
    queue: Mutex<Option<mpsc::Receiver<Offer>>>,
    /// An offer was lost, or failed: a pass is due.
    incomplete: AtomicBool,
    /// Epoch of the last table under which everything was offered.
    offered_for: AtomicU64,
    /// Bytes held that another worker is the first to be asked for.
    replicated: AtomicU64,
}

impl Copies {
    pub(crate) fn new(replicas: Replicas) -> Self {
        let (offers, queue) = mpsc::channel(WAITING);
        Self {
            min: AtomicU32::new(replicas.min),
            max: AtomicU32::new(replicas.max),
            offers,
            queue: Mutex::new(Some(queue)),
            incomplete: AtomicBool::new(false),
            offered_for: AtomicU64::new(0),
            replicated: AtomicU64::new(0),
        }
    }

    pub(crate) fn set(&self, replicas: Replicas) {
        self.min.store(replicas.min, Ordering::Relaxed);
        self.max.store(replicas.max, Ordering::Relaxed);
    }

    /// Workers that are to hold what is held.
    pub(crate) fn min(&self) -> u32 {
        self.min.load(Ordering::Relaxed)
    }

    /// Workers that may hold the same, at most.
    pub(crate) fn most(&self) -> u32 {
        self.max.load(Ordering::Relaxed).max(self.min())
    }

    /// Bytes held that another worker is the first to be asked for, when they were last counted.
    pub(crate) fn replicated(&self) -> u64 {
        self.replicated.load(Ordering::Relaxed)
    }

    /// Whether everything was offered to those who are to have it by this table.
    pub(crate) fn were_offered(&self, epoch: u64) -> bool {
        self.offered_for.load(Ordering::Acquire) >= epoch
    }

    /// A chunk came from a source and is held whole.
    pub(crate) fn came(&self, path: &DatasetPath, version: &FileVersion, key: ChunkKey) {
        let count = self.min();
        if count < 2 {
            return;
        }
        let offer = Offer { path: path.clone(), version: version.clone(), key, count, pin: false, done: None };
        if self.offers.try_send(offer).is_err() {
            self.incomplete.store(true, Ordering::Release);
        }
    }

    /// Has `count` workers hold a chunk that this one holds; ends when they do, or with the reason why not.
    pub(crate) async fn ensure(&self, file: &Found, key: ChunkKey, count: u32, pin: bool) -> Result<(), String> {
        let (done, told) = oneshot::channel();
        let Found { path, version } = file.clone();
        let closed = || "the dataset is no longer served like this".to_owned();
        let offer = Offer { path, version, key, count, pin, done: Some(done) };
        self.offers.send(offer).await.map_err(|_| closed())?;
        told.await.unwrap_or_else(|_| Err(closed()))
    }
}

/// Makes the copies that are offered. Ends with the dataset.
pub(crate) async fn serve(worker: Arc<Worker>, dataset: Arc<Dataset>) {
    let Some(queue) = dataset.copies.queue.lock().take() else { return };
    let work = ReceiverStream::new(queue).ready_chunks(BATCH).for_each_concurrent(BATCHES, |offers| async {
        if !offer(&worker, &dataset, offers).await {
            dataset.copies.incomplete.store(true, Ordering::Release);
        }
    });
    tokio::select! {
        () = work => {}
        () = dataset.closed() => {}
        () = worker.stop.cancelled() => {}
    }
}

/// An offer, by its number, as one worker gets it.
#[derive(Clone, Copy)]
struct Told {
    offer: usize,
    pin: bool,
}

/// What became of an offer.
#[derive(Default)]
struct Fate {
    /// Why somebody does not have it, the first reason.
    problem: Option<String>,
    /// Asking again may help.
    again: bool,
}

/// Offers chunks to the others of their first workers. Whether all have them that can; where there is no room for one,
/// nobody can.
async fn offer(worker: &Arc<Worker>, dataset: &Arc<Dataset>, offers: Vec<Offer>) -> bool {
    let most = dataset.copies.most() as usize;
    let mut targets: BTreeMap<String, (Member, Vec<Told>)> = BTreeMap::new();
    for (number, offer) in offers.iter().enumerate() {
        let order = worker.members.order(offer.key.placement_key(), offer.count as usize);
        for (place, member) in order.into_iter().enumerate().filter(|(_, member)| !worker.members.is_self(member)) {
            let told = Told { offer: number, pin: offer.pin && place < most };
            targets.entry(member.name.clone()).or_insert_with(|| (member, Vec::new())).1.push(told);
        }
    }
    let asked = targets.values().flat_map(|(member, told)| {
        batches(&offers, told).into_iter().map(move |batch| (member, batch)).collect::<Vec<_>>()
    });
    let answers = join_all(asked.map(|(member, batch)| {
        let chunks = batch.iter().map(|told| to_wire(&offers[told.offer], told.pin)).collect();
        async move { (member, call(worker, dataset, member, chunks).await, batch) }
    }));
    let mut fates: Vec<Fate> = offers.iter().map(|_| Fate::default()).collect();
    for (member, answer, batch) in answers.await {
        let outcomes = match answer {
            Ok(outcomes) => outcomes,
            Err(status) => {
                debug!(worker = %member.name, %status, dataset = %dataset.name, "copies were not taken");
                let failed = CopyOutcome { state: CopyState::Failed.into(), reason: status.message().to_owned() };
                vec![failed; batch.len()]
            }
        };
        for (told, outcome) in batch.into_iter().zip(outcomes) {
            let fate = &mut fates[told.offer];
            let state = outcome.state();
            match state {
                CopyState::Held => continue,
                CopyState::NoRoom => dataset.metrics.copies_without_room.inc(),
                CopyState::Failed | CopyState::Unspecified => dataset.metrics.copies_failed.inc(),
            };
            fate.again |= state != CopyState::NoRoom;
            fate.problem.get_or_insert_with(|| format!("no copy on worker {}: {}", member.name, outcome.reason));
        }
    }
    let complete = fates.iter().all(|fate| !fate.again);
    for (offer, fate) in offers.into_iter().zip(fates) {
        if let Some(done) = offer.done {
            // Who asked may have gone.
            let _ = done.send(fate.problem.map_or(Ok(()), Err));
        }
    }
    complete
}

/// Splits what is offered to one worker into messages.
fn batches(offers: &[Offer], told: &[Told]) -> Vec<Vec<Told>> {
    let mut batches: Vec<(u64, Vec<Told>)> = Vec::new();
    for one in told {
        let bytes = offers[one.offer].bytes();
        match batches.last_mut() {
            Some((sum, batch)) if *sum + bytes <= BATCH_BYTES && batch.len() < BATCH => {
                *sum += bytes;
                batch.push(*one);
            }
            _ => batches.push((bytes, vec![*one])),
        }
    }
    batches.into_iter().map(|(_, batch)| batch).collect()
}

fn to_wire(offer: &Offer, pin: bool) -> ChunkToCopy {
    ChunkToCopy { file: Some(notices::to_wire(&offer.path, &offer.version)), chunk: offer.key.index, pin }
}

async fn call(
    worker: &Worker,
    dataset: &Dataset,
    member: &Member,
    chunks: Vec<ChunkToCopy>,
) -> Result<Vec<CopyOutcome>, Status> {
    let count = chunks.len();
    let request = CopyRequest { dataset: dataset.id.to_bytes(), from: worker.options.name.clone(), chunks };
    let calling = async {
        let mut client = worker.members.control(member).await?;
        client.copy(request).await
    };
    let late = |_| Status::deadline_exceeded(format!("no answer within {CALL:?}"));
    let outcomes = timeout(CALL, calling).await.map_err(late)??.into_inner().outcomes;
    if outcomes.len() != count {
        return Err(Status::internal(format!("{} outcomes of {count}", outcomes.len())));
    }
    Ok(outcomes)
}
