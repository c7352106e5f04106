//! The Metadata service: a thin layer over the dataset's index.
//!
//! A dataset that is not served here is UNAVAILABLE, not NOT_FOUND: the caller is to ask the next worker, not to believe
//! that the file does not exist.

use std::sync::Arc;

use forebay_metadata::{Entry, EntryKind, InvalidationKind, ListPage};
use forebay_protocol::worker::{
    self as wire, ListRequest, ListResponse, LookupRequest, LookupResponse, RecheckRequest, RecheckResponse,
    ScanDirectoryRequest, ScanDirectoryResponse, WatchRequest, invalidation::What, metadata_server::Metadata,
};
use futures::StreamExt;
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, dataset_of, to_status, within};
use crate::{dataset::Dataset, load::path_of, worker::Worker};

/// Entries in a page when the caller does not say.
const PAGE: u32 = 1000;

#[derive(Clone)]
pub(super) struct MetadataService {
    worker: Arc<Worker>,
}

impl MetadataService {
    pub(super) fn new(worker: Arc<Worker>) -> Self {
        Self { worker }
    }

    fn dataset(&self, id: &[u8]) -> Result<Arc<Dataset>, Status> {
        dataset_of(&self.worker, id, Status::unavailable)
    }
}

fn to_wire(entry: Entry) -> wire::Entry {
    match entry.kind {
        EntryKind::File { version } => wire::Entry {
            name: entry.name,
            kind: wire::EntryKind::File.into(),
            size: version.size,
            mtime_ns: version.mtime_ns,
            version_key: version.key.to_bytes(),
        },
        EntryKind::Directory => {
            wire::Entry { name: entry.name, kind: wire::EntryKind::Directory.into(), ..wire::Entry::default() }
        }
    }
}

#[async_trait]
impl Metadata for MetadataService {
    async fn lookup(&self, request: Request<LookupRequest>) -> Result<Response<LookupResponse>, Status> {
        let LookupRequest { dataset, generation, directory, name } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let directory = path_of(directory)?;
        within(async {
            let entry = dataset.index.lookup(generation, &directory, &name).await.map_err(to_status)?;
            let generation = dataset.index.generation();
            Ok(Response::new(LookupResponse { generation, entry: Some(to_wire(entry)) }))
        })
        .await
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let ListRequest { dataset, generation, directory, after, limit } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let directory = path_of(directory)?;
        let limit = if limit == 0 { PAGE } else { limit };
        within(async {
            let page = dataset.index.list(generation, &directory, &after, limit as usize).await;
            let ListPage { entries, end } = page.map_err(to_status)?;
            let entries = entries.into_iter().map(to_wire).collect();
            Ok(Response::new(ListResponse { generation: dataset.index.generation(), entries, end }))
        })
        .await
    }

    async fn scan_directory(
        &self,
        request: Request<ScanDirectoryRequest>,
    ) -> Result<Response<ScanDirectoryResponse>, Status> {
        let ScanDirectoryRequest { dataset, generation, directory, after, sources, ahead } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let directory = path_of(directory)?;
        let same_sources = || sources == 0 || sources == dataset.namespace().fingerprint();
        let others = || Status::unavailable("this worker knows other sources of the dataset");
        if !same_sources() {
            return Err(others());
        }
        // Bounded by the index, for each step of a listing: a directory of millions takes longer than a call may.
        let scan = match ahead {
            true => dataset.index.scan_ahead(generation, &directory, &after).await,
            false => dataset.index.scan_directory(generation, &directory, &after).await,
        };
        let scan = scan.map_err(to_status)?;
        // They may have changed under the listing.
        if !same_sources() {
            return Err(others());
        }
        let forebay_metadata::DirectoryScan { files, bytes, hidden, changed, digest, subdirectories, end } = scan;
        Ok(Response::new(ScanDirectoryResponse {
            generation: dataset.index.generation(),
            files,
            bytes,
            hidden,
            changed,
            digest,
            subdirectories,
            end,
        }))
    }

    type WatchStream = Answers<wire::Invalidation>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let WatchRequest { dataset, incarnation, after } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let stopping = self.worker.stop.clone().cancelled_owned();
        let messages = dataset.index.watch(incarnation, after).take_until(stopping).map(|message| {
            let what = match message.kind {
                InvalidationKind::Reset => What::Reset(wire::invalidation::Reset {}),
                InvalidationKind::Heartbeat => What::Heartbeat(wire::invalidation::Heartbeat {}),
                InvalidationKind::Directory { directory, names } => {
                    What::Directory(wire::invalidation::DirectoryChanged { directory: directory.to_bytes(), names })
                }
            };
            Ok(wire::Invalidation {
                incarnation: message.incarnation,
                number: message.number,
                generation: message.generation,
                what: Some(what),
            })
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn recheck(&self, request: Request<RecheckRequest>) -> Result<Response<RecheckResponse>, Status> {
        let RecheckRequest { dataset, path } = request.into_inner();
        let dataset = self.dataset(&dataset)?;
        let path = path_of(path)?;
        within(async { dataset.index.recheck_now(&path).await.map_err(to_status) }).await?;
        Ok(Response::new(RecheckResponse {}))
    }
}
