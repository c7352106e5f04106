//! The HTTP side: connections, latency, faults, counters. The S3 protocol itself is behind [`S3Service`].

use std::{
    collections::HashMap,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use s3s::{
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::Sleep,
};

use crate::{
    backend::{Backend, IgnoreConditions},
    faults::{Faults, Plan, Verb},
};

pub(crate) const ACCESS_KEY: &str = "FOREBAYTESTKEY";
pub(crate) const SECRET_KEY: &str = "forebay-test-secret";

/// Before a body breaks, so that what came before it is on its way.
const FLUSH: Duration = Duration::from_millis(5);

/// What a [`crate::TestStore`] was asked and what it sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// GET requests of objects.
    pub gets: u64,
    /// HEAD requests.
    pub heads: u64,
    /// Listings.
    pub lists: u64,
    /// PUT requests.
    pub puts: u64,
    /// Bytes of objects sent.
    pub bytes_out: u64,
    per_key: HashMap<String, u64>,
}

impl Counters {
    /// Bytes of the object at `key` (any bucket) sent.
    pub fn bytes_of(&self, key: &str) -> u64 {
        self.per_key.get(key).copied().unwrap_or(0)
    }
}

/// What the connections share.
pub(crate) struct Shared {
    service: S3Service,
    pub(crate) faults: Faults,
    latency_ns: AtomicU64,
    counters: Mutex<Counters>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn new(backend: Backend, latency: Duration) -> Self {
        let mut builder = S3ServiceBuilder::new(backend);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let shared = Self {
            service: builder.build(),
            faults: Faults::new(),
            latency_ns: AtomicU64::new(0),
            counters: Mutex::default(),
        };
        shared.set_latency(latency);
        shared
    }

    pub(crate) fn set_latency(&self, latency: Duration) {
        self.latency_ns.store(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters.lock().clone()
    }

    pub(crate) fn bytes_of(&self, key: &str) -> u64 {
        self.counters.lock().bytes_of(key)
    }

    fn count(&self, verb: Verb) {
        let mut counters = self.counters.lock();
        match verb {
            Verb::Get => counters.gets += 1,
            Verb::Head => counters.heads += 1,
            Verb::List => counters.lists += 1,
            Verb::Put => counters.puts += 1,
            Verb::Other => {}
        }
    }

    fn count_bytes(&self, key: &str, bytes: u64) {
        let mut counters = self.counters.lock();
        counters.bytes_out += bytes;
        match counters.per_key.get_mut(key) {
            Some(sum) => *sum += bytes,
            None => drop(counters.per_key.insert(key.to_owned(), bytes)),
        }
    }
}

/// Accepts until aborted; the connections end with it.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(connection(stream, shared.clone()))),
                // Out of descriptors, most likely: those of ended connections come back.
                Err(_) => tokio::time::sleep(FLUSH).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    // Without it small answers wait for acknowledgements; with an error the connection is gone anyway.
    let _ = stream.set_nodelay(true);
    let reset = Arc::new(AtomicBool::new(false));
    let socket = Socket { stream, reset: reset.clone() };
    let service = service_fn(move |request| answer(request, shared.clone(), reset.clone()));
    // An error is a client that went away, or a fault that was asked for.
    let _ = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(socket), service).await;
}

async fn answer(
    mut request: Request<Incoming>,
    shared: Arc<Shared>,
    reset: Arc<AtomicBool>,
) -> Result<Response<FaultyBody>, io::Error> {
    let (verb, key) = classify(request.method(), request.uri());
    shared.count(verb);
    let Plan { delay, status, stall, truncate, reset: resets, headers, ignore_conditions } =
        shared.faults.plan(verb, &key);
    let wait = delay + Duration::from_nanos(shared.latency_ns.load(Ordering::Relaxed));
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
    if resets == Some(None) {
        reset.store(true, Ordering::Relaxed);
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let response = match status {
        Some((status, retry_after)) => failure(status, retry_after),
        None => {
            if ignore_conditions {
                request.extensions_mut().insert(IgnoreConditions);
            }
            let answered = hyper::service::Service::call(&shared.service, request).await;
            answered.unwrap_or_else(|_| failure(500, None))
        }
    };
    let (mut parts, body) = response.into_parts();
    for (name, value) in headers {
        parts.headers.insert(name, HeaderValue::from_str(&value).expect("a fault sets a valid header"));
    }
    let breaks = match (truncate, resets.flatten()) {
        (_, Some(after)) => Some((after, true)),
        (Some(after), None) => Some((after, false)),
        (None, None) => None,
    };
    let counted = (verb == Verb::Get && parts.status.is_success()).then_some(key);
    let body = FaultyBody {
        body,
        pending: Bytes::new(),
        sent: 0,
        stall,
        breaks,
        breaking: None,
        pause: None,
        reset,
        counted,
        shared,
    };
    Ok(Response::from_parts(parts, body))
}

/// The verb, and the key (of a listing: the prefix).
fn classify(method: &Method, uri: &Uri) -> (Verb, String) {
    let path = percent_decode_str(uri.path()).decode_utf8_lossy().into_owned();
    let key = path.trim_start_matches('/').split_once('/').map_or("", |(_, key)| key);
    let verb = match (method, key.is_empty()) {
        (&Method::GET, true) => {
            let query = uri.query().unwrap_or_default();
            let prefix = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "prefix");
            return (Verb::List, prefix.map_or_else(String::new, |(_, prefix)| prefix.into_owned()));
        }
        (&Method::GET, false) => Verb::Get,
        (&Method::HEAD, false) => Verb::Head,
        (&Method::PUT, false) => Verb::Put,
        _ => Verb::Other,
    };
    (verb, key.to_owned())
}

fn failure(status: u16, retry_after: Option<u64>) -> Response<s3s::Body> {
    let code = match status {
        403 => "AccessDenied",
        404 => "NoSuchKey",
        412 => "PreconditionFailed",
        429 | 503 => "SlowDown",
        _ => "InternalError",
    };
    let text = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>");
    let mut response = Response::new(s3s::Body::from(text));
    *response.status_mut() = StatusCode::from_u16(status).expect("a fault answers with a valid status");
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A body that counts, and stalls or breaks where it is told.
struct FaultyBody {
    body: s3s::Body,
    /// Taken from `body`, not sent yet.
    pending: Bytes,
    sent: u64,
    stall: Option<(u64, Duration)>,
    /// After so many bytes; whether by a reset.
    breaks: Option<(u64, bool)>,
    /// The break has been reached and comes after the pause.
    breaking: Option<bool>,
    pause: Option<Pin<Box<Sleep>>>,
    reset: Arc<AtomicBool>,
    /// The key that bytes are counted for.
    counted: Option<String>,
    shared: Arc<Shared>,
}

impl Body for FaultyBody {
    type Data = Bytes;
    type Error = s3s::StdError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, s3s::StdError>>> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            if let Some(by_reset) = this.breaking {
                this.reset.store(by_reset, Ordering::Relaxed);
                return Poll::Ready(Some(Err(io::Error::from(io::ErrorKind::ConnectionAborted).into())));
            }
            if let Some((at, pause)) = this.stall
                && this.sent >= at
            {
                this.stall = None;
                this.pause = Some(Box::pin(tokio::time::sleep(pause)));
                continue;
            }
            if let Some((at, by_reset)) = this.breaks
                && this.sent >= at
            {
                this.breaking = Some(by_reset);
                this.pause = Some(Box::pin(tokio::time::sleep(FLUSH)));
                continue;
            }
            if this.pending.is_empty() {
                match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => this.pending = data,
                        Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                    },
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => return Poll::Ready(None),
                }
                continue;
            }
            // Both are ahead, or they would have been met above.
            let ahead = this.stall.map(|(at, _)| at).into_iter().chain(this.breaks.map(|(at, _)| at)).min();
            let room = ahead.map_or(u64::MAX, |at| at - this.sent).min(this.pending.len() as u64);
            let piece = this.pending.split_to(room as usize);
            this.sent += room;
            if let Some(key) = &this.counted {
                this.shared.count_bytes(key, room);
            }
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that is reset instead of closed when told so.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Relaxed) {
            // Without lingering, closing sends RST. If it fails the client sees the end instead: a fault as well.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
