//! The Control service: what people, the operator and other workers ask.

use std::{future::Future, sync::Arc};

use forebay_cache_store::ChunkSpec;
use forebay_metadata::ScanState;
use forebay_protocol::{
    DatasetId, FileVersion, VersionKey,
    worker::{
        self as wire, CopyRequest, CopyResponse, FreeRequest, FreeResponse, InspectRequest, InspectResponse,
        LeaseRequest, LeaseResponse, LoadProgress, LoadRequest, PinRequest, PruneRequest, PruneResponse,
        RefreshRequest, ScanProgress, StatusRequest, StatusResponse, SupersedeRequest, SupersedeResponse, TableRequest,
        TableResponse, control_server::Control,
    },
};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, dataset_of, to_status, within};
use crate::{
    budget, copies,
    dataset::Dataset,
    load::{self, Found, Progress, Runs, Selection, TICK, Terms, WantedRun, path_of},
    notices, scan,
    worker::Worker,
};

/// Messages of progress that wait for a slow receiver; the work goes on without it, later messages say more.
const PROGRESS_QUEUE: usize = 4;
/// Most versions in one message.
const MAX_SUPERSEDED: usize = 10_000;

#[derive(Clone)]
pub(super) struct ControlService {
    worker: Arc<Worker>,
}

impl ControlService {
    pub(super) fn new(worker: Arc<Worker>) -> Self {
        Self { worker }
    }

    fn dataset(&self, id: &[u8]) -> Result<Arc<Dataset>, Status> {
        dataset_of(&self.worker, id, Status::not_found)
    }

    /// Runs `work`, which tells its progress through what `message` reads, until it ends or nobody listens.
    fn stream<F>(
        &self,
        dataset: &Arc<Dataset>,
        progress: Arc<Progress>,
        work: impl FnOnce(Arc<Worker>, Arc<Dataset>, Arc<Progress>) -> F,
    ) -> Response<Answers<LoadProgress>>
    where
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(PROGRESS_QUEUE);
        let work = work(self.worker.clone(), dataset.clone(), progress.clone());
        let (stop, dataset) = (self.worker.stop.clone(), dataset.clone());
        self.worker.tasks.spawn(async move {
            let telling = async {
                let mut tick = interval(TICK);
                tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    tick.tick().await;
                    if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send(Ok(progress.message(false))) {
                        return;
                    }
                }
            };
            let last = tokio::select! {
                done = work => done.map(|()| progress.message(true)),
                // Nobody listens any more.
                () = telling => return,
                () = dataset.closed() => Err(Status::unavailable("the dataset is no longer served like this")),
                () = stop.cancelled() => Err(Status::unavailable("the worker is stopping")),
            };
            let _ = sender.send(last).await;
        });
        Response::new(Box::pin(ReceiverStream::new(receiver)))
    }
}

pub(crate) fn file_version(file: wire::FileVersion) -> Result<Found, Status> {
    let wire::FileVersion { path, size, mtime_ns, version_key } = file;
    let key = VersionKey::new(version_key).ok_or_else(|| Status::invalid_argument("the version key is too long"))?;
    Ok(Found { path: path_of(path)?, version: FileVersion { size, mtime_ns, key } })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))
}

#[async_trait]
impl Control for ControlService {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let StatusRequest { dataset } = request.into_inner();
        let asked = |id: &DatasetId| dataset.is_empty() || id.as_bytes() == &dataset[..];
        // In this order: what goes over from the one to the other is in one at least.
        let served =
            if dataset.is_empty() { Ok(self.worker.datasets.all()) } else { self.dataset(&dataset).map(|d| vec![d]) };
        let wiping: Vec<DatasetId> = self.worker.datasets.unserved().into_iter().filter(asked).collect();
        let served = match served {
            Err(_) if !wiping.is_empty() => Vec::new(),
            served => served?,
        };
        let worker = self.worker.clone();
        within(async { Ok(Response::new(blocking(move || worker.status(&served, &wiping)).await?)) }).await
    }

    type LoadStream = Answers<LoadProgress>;

    async fn load(&self, request: Request<LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        let LoadRequest { dataset, path, selection, run, epoch, terms } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let path = path_of(path)?;
        let selection = Selection::new(&selection.unwrap_or_default())?;
        let terms = Terms::new(&terms.unwrap_or_default());
        if !run.is_empty() {
            let follower = Runs::follow(&self.worker, &dataset, WantedRun { run, epoch, path, selection, terms })?;
            let progress = follower.progress();
            return Ok(self.stream(&dataset, progress, |_, _, _| async move { follower.ended().await }));
        }
        Ok(self.stream(&dataset, Arc::default(), |worker, dataset, progress| async move {
            let loaded = load::load(&worker, &dataset, &path, &selection, terms, &progress).await;
            loaded.map_err(load::to_status)
        }))
    }

    async fn free(&self, request: Request<FreeRequest>) -> Result<Response<FreeResponse>, Status> {
        let FreeRequest { dataset, path } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let path = path_of(path)?;
        let freed = Arc::new(Mutex::new(FreeResponse::default()));
        let (store, sum) = (self.worker.store.clone(), freed.clone());
        let remove = move |batch: Vec<(forebay_protocol::ChunkKey, u64)>| {
            let mut freed = FreeResponse::default();
            for (key, bytes) in batch {
                let removed = store.remove(key);
                freed.freed_bytes += removed.bytes;
                freed.freed_chunks += u64::from(removed.bytes > 0);
                freed.pinned_bytes_kept += if removed.kept_pinned { bytes } else { 0 };
            }
            let mut sum = sum.lock();
            sum.freed_bytes += freed.freed_bytes;
            sum.freed_chunks += freed.freed_chunks;
            sum.pinned_bytes_kept += freed.pinned_bytes_kept;
            Ok(())
        };
        // Also what this worker holds without owning it. The walk ends with the caller, or by its own deadlines.
        load::for_chunks(&self.worker, &dataset, &path, |_| true, remove).await?;
        let freed = *freed.lock();
        Ok(Response::new(freed))
    }

    type PinStream = Answers<LoadProgress>;

    async fn pin(&self, request: Request<PinRequest>) -> Result<Response<Self::PinStream>, Status> {
        let PinRequest { dataset, path, remove } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let path = path_of(path)?;
        let store = self.worker.store.clone();
        if remove {
            let unpin = move |batch: Vec<(forebay_protocol::ChunkKey, u64)>| {
                for (key, _) in batch.into_iter().filter(|(key, _)| store.is_pinned(*key)) {
                    store.pin(key, false).map_err(|error| Status::internal(error.to_string()))?;
                }
                Ok(())
            };
            load::for_chunks(&self.worker, &dataset, &path, |_| true, unpin).await?;
            let finished = LoadProgress { listed: true, finished: true, ..LoadProgress::default() };
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(finished)))));
        }
        // The numbers first: nothing is loaded that could not be pinned.
        let wanted = Arc::new(Mutex::new(0u64));
        let (counting, sum) = (store.clone(), wanted.clone());
        let count = move |batch: Vec<(forebay_protocol::ChunkKey, u64)>| {
            *sum.lock() +=
                batch.iter().filter(|(key, _)| !counting.is_pinned(*key)).map(|(_, bytes)| bytes).sum::<u64>();
            Ok(())
        };
        let members = &self.worker.members;
        load::for_chunks(&self.worker, &dataset, &path, |key| members.owns(key.placement_key()), count).await?;
        let wanted = *wanted.lock();
        let id = dataset.id;
        blocking(move || store.reserve_pin(id, wanted))
            .await?
            .map_err(|refused| Status::failed_precondition(refused.to_string()))?;
        Ok(self.stream(&dataset, Arc::default(), |worker, dataset, progress| async move {
            let loaded = load::load(&worker, &dataset, &path, &Selection::default(), Terms::pinned(), &progress).await;
            loaded.map_err(load::to_status)
        }))
    }

    type RefreshStream = Answers<ScanProgress>;

    async fn refresh(&self, request: Request<RefreshRequest>) -> Result<Response<Self::RefreshStream>, Status> {
        let RefreshRequest { dataset, path } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let path = path_of(path)?;
        scan::learn_generation(&self.worker, &dataset).await;
        let generation = dataset.index.raise_generation().await.map_err(to_status)?;
        let (sender, receiver) = mpsc::channel(PROGRESS_QUEUE);
        let worker = self.worker.clone();
        self.worker.tasks.spawn(async move {
            let cancel = CancellationToken::new();
            let _end = cancel.clone().drop_guard();
            let handle = scan::start(&worker, &dataset, generation, false, path.clone(), cancel);
            let mut watching = handle.progress.clone();
            let telling = async {
                let mut tick = interval(TICK);
                loop {
                    tick.tick().await;
                    let progress = scan::to_wire(&watching.borrow_and_update());
                    // The last message comes from below.
                    let running = progress.state() == wire::ScanState::Running;
                    if running && matches!(sender.try_send(Ok(progress)), Err(mpsc::error::TrySendError::Closed(_))) {
                        return;
                    }
                }
            };
            let finished = tokio::select! {
                finished = handle.finished() => finished,
                // Nobody listens any more: what was begun is left to the background scan.
                () = telling => return,
                () = worker.stop.cancelled() => return,
            };
            if finished.state == ScanState::Complete {
                scan::prune(&worker, &dataset, generation, &path).await;
            }
            let _ = sender.send(Ok(scan::to_wire(&finished))).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<InspectResponse>, Status> {
        let InspectRequest { dataset, file } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let file = file_version(file.ok_or_else(|| Status::invalid_argument("no file is named"))?)?;
        let store = self.worker.store.clone();
        within(async {
            blocking(move || {
                let mut answer = InspectResponse::default();
                for key in load::chunks(&dataset, &file) {
                    let Found { path, version } = file.clone();
                    answer.pinned |= store.is_pinned(key);
                    if let Some(chunk) = store.chunk(&ChunkSpec { dataset: dataset.id, path, version, key }, false) {
                        answer.cached_bytes += chunk.cached_bytes();
                    }
                }
                Response::new(answer)
            })
            .await
        })
        .await
    }

    async fn supersede(&self, request: Request<SupersedeRequest>) -> Result<Response<SupersedeResponse>, Status> {
        let SupersedeRequest { dataset, files } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        if files.len() > MAX_SUPERSEDED {
            return Err(Status::invalid_argument(format!("at most {MAX_SUPERSEDED} files in one message")));
        }
        let files = files
            .into_iter()
            .map(|file| file_version(file).map(|Found { path, version }| (path, version)))
            .collect::<Result<Vec<_>, _>>()?;
        within(async {
            notices::here(&self.worker, &dataset, files).await;
            Ok(Response::new(SupersedeResponse {}))
        })
        .await
    }

    async fn lease(&self, request: Request<LeaseRequest>) -> Result<Response<LeaseResponse>, Status> {
        let LeaseRequest { dataset, worker, wants } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let leases = budget::lend(&dataset, &worker, &wants).ok_or_else(|| {
            Status::failed_precondition("this worker does not share out the request budgets of the dataset")
        })?;
        Ok(Response::new(LeaseResponse { leases }))
    }

    async fn copy(&self, request: Request<CopyRequest>) -> Result<Response<CopyResponse>, Status> {
        let CopyRequest { dataset, from, chunks } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        within(async {
            let outcomes = copies::take(&self.worker, &dataset, &from, chunks).await?;
            Ok(Response::new(CopyResponse { outcomes }))
        })
        .await
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Result<Response<PruneResponse>, Status> {
        let PruneRequest { dataset, generation, path } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let path = path_of(path)?;
        within(async {
            dataset.index.adopt_generation(generation);
            let directories = dataset.index.prune(generation, &path).await.map_err(to_status)?;
            Ok(Response::new(PruneResponse { directories }))
        })
        .await
    }

    async fn table(&self, _: Request<TableRequest>) -> Result<Response<TableResponse>, Status> {
        Ok(Response::new(self.worker.members.to_wire()))
    }
}
