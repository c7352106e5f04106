//! The gRPC services of a fake worker: a tree of names, numbered changes, and what it holds of files.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use forebay_protocol::worker::{
    self, Invalidation,
    control_server::{Control, ControlServer},
    invalidation::{DirectoryChanged, Heartbeat, Reset, What},
    metadata_server::{Metadata, MetadataServer},
};
use futures::{FutureExt, Stream, future::BoxFuture};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use parking_lot::Mutex;
use tokio::{io::DuplexStream, sync::watch};
use tonic::{Code, Request, Response, Status};
use tower::Service;

type Answer<T> = Result<Response<T>, Status>;

#[derive(Default)]
pub(crate) struct Names {
    /// By directory, by sort key.
    pub(crate) tree: Mutex<HashMap<Bytes, BTreeMap<Bytes, worker::Entry>>>,
    pub(crate) generation: AtomicU64,
    /// Every call answers this.
    pub(crate) refusal: Mutex<Option<Code>>,
    /// Every call waits for ever.
    pub(crate) hangs: watch::Sender<bool>,
    pub(crate) calls: AtomicUsize,
    pub(crate) seen_generation: AtomicU64,
    /// What Status and Table answer.
    pub(crate) status: Mutex<worker::StatusResponse>,
    pub(crate) table: Mutex<worker::TableResponse>,
    log: watch::Sender<Log>,
    pub(crate) watchers: AtomicUsize,
}

#[derive(Clone, Default)]
struct Log {
    incarnation: u64,
    /// Number of the first change that is kept.
    first: u64,
    changes: Vec<(Bytes, Bytes)>,
    /// Bumped to cut all streams.
    cuts: u64,
    silent: bool,
}

impl Names {
    pub(crate) fn add(&self, directory: &str, name: &str, size: Option<u64>) {
        let kind = if size.is_some() { worker::EntryKind::File } else { worker::EntryKind::Directory };
        let entry = worker::Entry {
            name: Bytes::copy_from_slice(name.as_bytes()),
            kind: kind.into(),
            size: size.unwrap_or(0),
            mtime_ns: 5,
            version_key: if size.is_some() { Bytes::from_static(b"v1") } else { Bytes::new() },
        };
        let key = if size.is_some() { name.to_owned() } else { format!("{name}/") };
        let mut tree = self.tree.lock();
        tree.entry(Bytes::copy_from_slice(directory.as_bytes())).or_default().insert(key.into(), entry);
    }

    pub(crate) fn directory(&self, directory: &str) {
        self.tree.lock().entry(Bytes::copy_from_slice(directory.as_bytes())).or_default();
    }

    pub(crate) fn changed(&self, directory: &str, name: &str) {
        self.log.send_modify(|log| {
            log.changes.push((Bytes::copy_from_slice(directory.as_bytes()), Bytes::copy_from_slice(name.as_bytes())));
        });
    }

    /// A new incarnation, as after a restart.
    pub(crate) fn incarnate(&self, incarnation: u64) {
        self.log.send_modify(|log| *log = Log { incarnation, cuts: log.cuts + 1, ..Log::default() });
    }

    /// Ends all streams.
    pub(crate) fn cut(&self) {
        self.log.send_modify(|log| log.cuts += 1);
    }

    /// Forgets the changes so far, as a ring that is too short.
    pub(crate) fn forget(&self) {
        self.log.send_modify(|log| {
            log.first += log.changes.len() as u64;
            log.changes.clear();
        });
    }

    async fn admit(&self, generation: u64) -> Result<u64, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.seen_generation.fetch_max(generation, Ordering::SeqCst);
        let _ = self.hangs.subscribe().wait_for(|hangs| !*hangs).await;
        if let Some(code) = *self.refusal.lock() {
            return Err(Status::new(code, "as scripted"));
        }
        Ok(self.generation.fetch_max(generation, Ordering::SeqCst).max(generation))
    }

    pub(crate) async fn serve(self: Arc<Self>, stream: DuplexStream) {
        let mut metadata = MetadataServer::from_arc(self.clone());
        let mut control = ControlServer::from_arc(self);
        type Reply = BoxFuture<'static, Result<hyper::Response<tonic::body::Body>, Infallible>>;
        let router = tower::service_fn(move |request: hyper::Request<hyper::body::Incoming>| -> Reply {
            if request.uri().path().starts_with("/forebay.worker.v1.Metadata/") {
                metadata.call(request).boxed()
            } else {
                control.call(request).boxed()
            }
        });
        let builder = Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(Shared(router))).await;
    }
}

/// `service_fn` with interior state is not `Clone`; one connection needs one only.
#[derive(Clone)]
struct Shared<S>(S);

impl<S, R> Service<R> for Shared<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: R) -> Self::Future {
        self.0.call(request)
    }
}

#[tonic::async_trait]
impl Metadata for Names {
    async fn lookup(&self, request: Request<worker::LookupRequest>) -> Answer<worker::LookupResponse> {
        let request = request.into_inner();
        let generation = self.admit(request.generation).await?;
        let tree = self.tree.lock();
        let found = tree
            .get(&request.directory)
            .and_then(|entries| entries.values().find(|entry| entry.name == request.name))
            .ok_or_else(|| Status::not_found("no such name"))?;
        Ok(Response::new(worker::LookupResponse { generation, entry: Some(found.clone()) }))
    }

    async fn list(&self, request: Request<worker::ListRequest>) -> Answer<worker::ListResponse> {
        let request = request.into_inner();
        let generation = self.admit(request.generation).await?;
        let tree = self.tree.lock();
        let entries = tree.get(&request.directory).ok_or_else(|| Status::not_found("no such directory"))?;
        let after = (std::ops::Bound::Excluded(request.after), std::ops::Bound::Unbounded);
        let mut page: Vec<_> =
            entries.range::<Bytes, _>(after).map(|(_, entry)| entry.clone()).take(request.limit as usize + 1).collect();
        let end = page.len() <= request.limit as usize;
        page.truncate(request.limit as usize);
        Ok(Response::new(worker::ListResponse { generation, entries: page, end }))
    }

    async fn scan_directory(&self, _: Request<worker::ScanDirectoryRequest>) -> Answer<worker::ScanDirectoryResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn recheck(&self, _: Request<worker::RecheckRequest>) -> Answer<worker::RecheckResponse> {
        Err(Status::unimplemented("not here"))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<Invalidation, Status>> + Send>>;

    async fn watch(&self, request: Request<worker::WatchRequest>) -> Answer<Self::WatchStream> {
        let request = request.into_inner();
        let mut log = self.log.subscribe();
        self.watchers.fetch_add(1, Ordering::SeqCst);
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            let start = log.borrow_and_update().clone();
            let cuts = start.cuts;
            let message =
                |number, what| Invalidation { incarnation: start.incarnation, number, generation: 0, what: Some(what) };
            let newest = start.first + start.changes.len() as u64;
            let known = request.incarnation == start.incarnation && (start.first..=newest).contains(&request.after);
            let mut next = if known { request.after } else { newest };
            let hello = if known { What::Heartbeat(Heartbeat {}) } else { What::Reset(Reset {}) };
            let _ = sender.send(Ok(message(next, hello))).await;
            loop {
                let now = log.borrow_and_update().clone();
                if now.cuts != cuts {
                    return;
                }
                while next < now.first + now.changes.len() as u64 {
                    let (directory, name) = now.changes[(next - now.first) as usize].clone();
                    next += 1;
                    let what = What::Directory(DirectoryChanged { directory, names: vec![name] });
                    if sender.send(Ok(message(next, what))).await.is_err() {
                        return;
                    }
                }
                if tokio::time::timeout(Duration::from_millis(100), log.changed()).await.is_err()
                    && !now.silent
                    && sender.send(Ok(message(next, What::Heartbeat(Heartbeat {})))).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }
}

type Progress<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Control for Names {
    type LoadStream = Progress<worker::LoadProgress>;
    type PinStream = Progress<worker::LoadProgress>;
    type RefreshStream = Progress<worker::ScanProgress>;

    async fn status(&self, request: Request<worker::StatusRequest>) -> Answer<worker::StatusResponse> {
        let wanted = request.into_inner().dataset;
        let status = self.status.lock().clone();
        if !wanted.is_empty() && !status.datasets.iter().any(|dataset| dataset.dataset == wanted) {
            return Err(Status::not_found("no such dataset"));
        }
        Ok(Response::new(status))
    }

    async fn table(&self, _: Request<worker::TableRequest>) -> Answer<worker::TableResponse> {
        Ok(Response::new(self.table.lock().clone()))
    }

    async fn inspect(&self, request: Request<worker::InspectRequest>) -> Answer<worker::InspectResponse> {
        let cached_bytes = request.into_inner().file.map_or(0, |file| file.size);
        Ok(Response::new(worker::InspectResponse { cached_bytes, pinned: true }))
    }

    async fn load(&self, _: Request<worker::LoadRequest>) -> Answer<Self::LoadStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn free(&self, _: Request<worker::FreeRequest>) -> Answer<worker::FreeResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn pin(&self, _: Request<worker::PinRequest>) -> Answer<Self::PinStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn refresh(&self, _: Request<worker::RefreshRequest>) -> Answer<Self::RefreshStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn supersede(&self, _: Request<worker::SupersedeRequest>) -> Answer<worker::SupersedeResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn copy(&self, _: Request<worker::CopyRequest>) -> Answer<worker::CopyResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn lease(&self, _: Request<worker::LeaseRequest>) -> Answer<worker::LeaseResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn prune(&self, _: Request<worker::PruneRequest>) -> Answer<worker::PruneResponse> {
        Err(Status::unimplemented("not here"))
    }
}
