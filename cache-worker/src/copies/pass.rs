//! Passes: all that a worker holds is offered to those who are to have it.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use forebay_protocol::{ChunkKey, DatasetId, DatasetPath};
use futures::StreamExt;
use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use super::{BATCH, Offer, offer};
use crate::{
    dataset::Dataset,
    load::{self, Found, files},
    worker::Worker,
};

/// How often it is looked whether a pass is due.
const LOOK: Duration = Duration::from_millis(500);
/// How long the table must have been the same: workers come and go together.
const SETTLED: Duration = Duration::from_secs(1);
/// When a pass that was not complete is made again, at first and at most.
const AGAIN: Duration = Duration::from_secs(5);
const AGAIN_LONGEST: Duration = Duration::from_secs(300);
/// How often everything is looked at though nothing is known to be missing: what somebody had no room for, or lost to a
/// damaged disk.
const ALL: Duration = Duration::from_secs(3600);
/// How often copies are counted, at most; it takes a hundredth of the time.
const COUNT: Duration = Duration::from_secs(2);

/// Makes passes when they are due. Ends with the dataset.
pub(crate) async fn keep_up(worker: Arc<Worker>, dataset: Arc<Dataset>) {
    tokio::select! {
        () = make_passes(&worker, &dataset) => {}
        () = dataset.closed() => {}
        () = worker.stop.cancelled() => {}
    }
}

async fn make_passes(worker: &Arc<Worker>, dataset: &Arc<Dataset>) {
    let copies = &dataset.copies;
    let (mut seen, mut since) = ((0, 0), Instant::now());
    let mut due = Some(Instant::now());
    let mut again = AGAIN;
    loop {
        sleep(LOOK).await;
        let epoch = worker.members.table().epoch;
        let wanted = (epoch, copies.min());
        if wanted != seen {
            (seen, since, again) = (wanted, Instant::now(), AGAIN);
            due = Some(since + SETTLED);
        }
        if copies.incomplete.swap(false, Ordering::AcqRel) {
            let soon = Instant::now() + again;
            again = (again * 2).min(AGAIN_LONGEST);
            due = Some(due.map_or(soon, |due| due.min(soon)));
        }
        if due.is_none_or(|due| Instant::now() < due) {
            continue;
        }
        if copies.min() < 2 && worker.store.usage(dataset.id).pinned_bytes == 0 {
            copies.offered_for.store(epoch, Ordering::Release);
            // A pin may come later, and a change of the table after it.
            due = None;
            continue;
        }
        let complete = pass(worker, dataset).await;
        copies.offered_for.store(epoch, Ordering::Release);
        if complete {
            (due, again) = (Some(Instant::now() + ALL), AGAIN);
        } else {
            due = Some(Instant::now() + again);
            again = (again * 2).min(AGAIN_LONGEST);
            debug!(dataset = %dataset.name, since = ?since.elapsed(), "not all copies could be made");
        }
    }
}

/// Offers everything that is held; whether all have it that can.
async fn pass(worker: &Arc<Worker>, dataset: &Arc<Dataset>) -> bool {
    let found = match files(worker, dataset, &DatasetPath::root()).await {
        Ok(found) => found,
        Err(error) => {
            debug!(dataset = %dataset.name, %error, "what is held cannot be listed");
            return false;
        }
    };
    let mut complete = true;
    let (mut offered, start) = (0, Instant::now());
    let mut batches = found
        .map(|found| match found {
            Ok(file) => held(worker, dataset, &file),
            Err(error) => {
                debug!(dataset = %dataset.name, %error, "what is held cannot be listed to the end");
                complete = false;
                Vec::new()
            }
        })
        .flat_map(futures::stream::iter)
        .ready_chunks(BATCH)
        .boxed();
    let mut all = true;
    while let Some(offers) = batches.next().await {
        offered += offers.len();
        let misplaced = |offer: &&Offer| is_misplaced_pin(worker, dataset, offer);
        let moved: Vec<ChunkKey> = offers.iter().filter(misplaced).map(|offer| offer.key).collect();
        let taken = offer(worker, dataset, offers).await;
        all &= taken;
        if taken {
            unpin(worker, moved).await;
        }
    }
    drop(batches);
    if offered > 0 {
        info!(dataset = %dataset.name, chunks = offered, took = ?start.elapsed(), "offered what others are to have, too");
    }
    complete && all
}

/// Of a file, what others are to have.
fn held(worker: &Arc<Worker>, dataset: &Arc<Dataset>, file: &Found) -> Vec<Offer> {
    let min = dataset.copies.min();
    let offers = load::chunks(dataset, file).filter_map(|key| {
        let held = worker.store.holds(key).filter(|held| held.whole)?;
        let count = if held.pinned { min.max(1) } else { min };
        let others = || count > 1 || worker.members.place(key.placement_key(), 1).is_none();
        ((count > 1 || held.pinned) && others()).then(|| Offer {
            path: file.path.clone(),
            version: file.version.clone(),
            key,
            count,
            pin: held.pinned,
            done: None,
        })
    });
    offers.collect()
}

/// Whether it is pinned here though others are to have it, and not this worker.
fn is_misplaced_pin(worker: &Worker, dataset: &Dataset, offer: &Offer) -> bool {
    offer.pin && worker.members.place(offer.key.placement_key(), dataset.copies.most() as usize).is_none()
}

/// Others have it pinned: here it is a copy like others.
async fn unpin(worker: &Arc<Worker>, keys: Vec<ChunkKey>) {
    let store = worker.store.clone();
    let unpinned = worker.engine.disk().call(move || {
        for key in keys {
            if let Err(error) = store.pin(key, false) {
                debug!(%error, "a pin that was handed on stays");
            }
        }
    });
    if let Err(error) = unpinned.await {
        debug!(%error, "pins that were handed on stay");
    }
}

/// Counts copies now and then, and says which of them are spare. Ends with the worker.
pub(crate) async fn count(worker: Arc<Worker>) {
    let (mut epoch, mut since) = (worker.members.table().epoch, Instant::now());
    let mut pause = COUNT;
    while worker.stop.run_until_cancelled(sleep(pause)).await.is_some() {
        let start = Instant::now();
        let now = worker.members.table().epoch;
        if now != epoch {
            (epoch, since) = (now, start);
        }
        let settled = since.elapsed() >= worker.options.spare_after && worker.members.counts_on_self();
        let counting = worker.clone();
        let counted = tokio::task::spawn_blocking(move || count_once(&counting, settled)).await;
        if let Err(error) = counted {
            debug!(%error, "counting copies failed");
        }
        pause = COUNT.max(start.elapsed() * 100);
    }
}

fn count_once(worker: &Worker, settled: bool) {
    let datasets = worker.datasets.all();
    let mut known: HashMap<DatasetId, (usize, u64)> =
        datasets.iter().map(|dataset| (dataset.id, (dataset.copies.min().max(1) as usize, 0))).collect();
    worker.store.mark_spare(|id, key, bytes| {
        let Some((min, replicated)) = known.get_mut(&id) else { return false };
        let place = worker.members.place(key.placement_key(), *min);
        *replicated += if place == Some(0) { 0 } else { bytes };
        settled && place.is_none()
    });
    for dataset in datasets {
        let replicated = known.get(&dataset.id).map_or(0, |(_, replicated)| *replicated);
        dataset.copies.replicated.store(replicated, Ordering::Relaxed);
    }
}
