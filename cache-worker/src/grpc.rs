//! The gRPC services, over control connections whose handshake is done.

mod control;
mod metadata;

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use forebay_metadata::MetadataError;
use forebay_protocol::{
    DatasetId,
    worker::{control_server::ControlServer, metadata_server::MetadataServer},
};
use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, mpsc},
    time::timeout,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{
    Status,
    body::Body,
    server::NamedService,
    transport::{Server, server::Connected},
};
use tower::Service;
use tracing::warn;

pub(crate) use self::control::file_version;
use self::{control::ControlService, metadata::MetadataService};
use crate::{dataset::Dataset, listener::ControlSocket, worker::Worker};

/// Calls at once on one connection, streams included.
const STREAMS: u32 = 256;
/// Largest message taken: a batch of 1,000 outdated versions with the longest names and keys is 4.4 MB.
const MAX_MESSAGE: usize = 8 << 20;
/// Pings on silent connections, and how long their answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// How long a call that is no stream may take.
const CALL: Duration = Duration::from_secs(60);

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves control connections until the worker stops.
pub(crate) async fn serve(worker: Arc<Worker>, sockets: mpsc::Receiver<ControlSocket>) {
    let counted = worker.clone();
    let incoming = ReceiverStream::new(sockets)
        .map(move |accepted| Ok::<_, io::Error>(CountedSocket::new(accepted, counted.clone())));
    let services = Services {
        metadata: MetadataServer::new(MetadataService::new(worker.clone())).max_decoding_message_size(MAX_MESSAGE),
        control: ControlServer::new(ControlService::new(worker.clone())).max_decoding_message_size(MAX_MESSAGE),
    };
    let served = Server::builder()
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(PING.0))
        .http2_keepalive_timeout(Some(PING.1))
        .serve_with_incoming_shutdown(services, incoming, worker.stop.clone().cancelled_owned())
        .await;
    if let Err(error) = served {
        warn!(%error, "the control server ended");
    }
}

/// Both services; the path of a call begins with the name of its service.
#[derive(Clone)]
struct Services {
    metadata: MetadataServer<MetadataService>,
    control: ControlServer<ControlService>,
}

type HttpRequest = hyper::Request<Body>;
type HttpResponse = hyper::Response<Body>;

impl Service<HttpRequest> for Services {
    type Response = HttpResponse;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Both are always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest) -> Self::Future {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        if service == <MetadataServer<MetadataService> as NamedService>::NAME {
            Box::pin(self.metadata.call(request))
        } else if service == <ControlServer<ControlService> as NamedService>::NAME {
            Box::pin(self.control.call(request))
        } else {
            Box::pin(async { Ok(Status::unimplemented("no such service").into_http()) })
        }
    }
}

/// A socket that counts as a control connection while it is open.
struct CountedSocket {
    socket: TcpStream,
    _place: OwnedSemaphorePermit,
    worker: Arc<Worker>,
}

impl CountedSocket {
    fn new(accepted: ControlSocket, worker: Arc<Worker>) -> Self {
        worker.metrics.control_connections.inc();
        let ControlSocket { socket, place } = accepted;
        Self { socket, _place: place, worker }
    }
}

impl Drop for CountedSocket {
    fn drop(&mut self) {
        self.worker.metrics.control_connections.dec();
    }
}

impl Connected for CountedSocket {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for CountedSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for CountedSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A call with a deadline.
async fn within<T>(work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(CALL, work).await.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {CALL:?}"))))
}

/// The dataset of a request; `missing` makes the refusal of one that is not served here.
fn dataset_of(worker: &Worker, id: &[u8], missing: impl Fn(String) -> Status) -> Result<Arc<Dataset>, Status> {
    let id = DatasetId::from_slice(id).ok_or_else(|| Status::invalid_argument("a dataset id has 16 bytes"))?;
    worker.datasets.get(&id).ok_or_else(|| missing(worker.datasets.why_not(&id)))
}

fn to_status(error: MetadataError) -> Status {
    let text = error.to_string();
    match error {
        MetadataError::NotFound => Status::not_found(text),
        MetadataError::Unavailable(_) | MetadataError::Closed => Status::unavailable(text),
        MetadataError::PermissionDenied(_) => Status::permission_denied(text),
        MetadataError::Deadline => Status::deadline_exceeded(text),
        MetadataError::Internal(_) => Status::internal(text),
    }
}
