//! `/metrics`, `/healthz`, `/readyz` over HTTP/1.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::worker::Worker;

/// Connections at once: scrapers and probes are few.
const CONNECTIONS: usize = 64;
/// How long one connection may live; scrapers connect again.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);
/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(5);

const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Serves until the worker stops.
pub(crate) async fn run(worker: Arc<Worker>, listener: TcpListener) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = worker.stop.cancelled() => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                warn!(%error, "accepting a metrics connection failed");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            worker.metrics.connections_refused.inc();
            continue;
        };
        let task = worker.clone();
        worker.tasks.spawn(async move {
            let answering = task.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let worker = answering.clone();
                async move { Ok::<_, Infallible>(answer(&worker, &request).await) }
            });
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(socket), service);
            tokio::select! {
                served = timeout(CONNECTION_LIFE, serving) => {
                    if let Ok(Err(error)) = served {
                        debug!(%error, "a metrics connection ended");
                    }
                }
                () = task.stop.cancelled() => {}
            }
            drop(permit);
        });
    }
}

async fn answer(worker: &Arc<Worker>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, kind, text) = match request.uri().path() {
        "/metrics" => {
            worker.sample_metrics().await;
            match worker.metrics.text() {
                Ok(text) => (StatusCode::OK, OPEN_METRICS, text),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
            }
        }
        "/healthz" => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        "/readyz" => match worker.not_ready() {
            None => (StatusCode::OK, TEXT, "ready\n".to_owned()),
            Some(why) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
        },
        _ => (StatusCode::NOT_FOUND, TEXT, "not found\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
