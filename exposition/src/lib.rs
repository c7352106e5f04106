//! What a process shows of itself: `/metrics`, `/healthz` and `/readyz` over HTTP/1.
//!
//! | path | answer |
//! |---|---|
//! | `/metrics` | the OpenMetrics text of [`Exposed::metrics`] |
//! | `/healthz` | 200: the runtime of the process still answers |
//! | `/readyz` | 200, or 503 and the reason from [`Exposed::not_ready`] |
//!
//! Connections are few, short-lived and bounded; whoever is beyond the bound is closed and counted.

mod page;

use std::{convert::Infallible, fmt, future::Future, sync::Arc, time::Duration};

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
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

pub use page::table;

/// Connections at once: scrapers and probes are few.
const CONNECTIONS: usize = 64;
/// How long one connection may live; scrapers connect again.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);
/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(5);
/// Pause when accepting fails (no descriptors left, usually).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// What is shown.
pub trait Exposed: Send + Sync + 'static {
    /// All metrics in the OpenMetrics text format.
    fn metrics(&self) -> impl Future<Output = Result<String, fmt::Error>> + Send;

    /// Why the process is not ready to do its work; `None` when it is.
    fn not_ready(&self) -> Option<String>;

    /// A connection was closed because there are too many.
    fn refused(&self) {}
}

/// Serves until `stop`; its connections end with it.
pub async fn serve<E: Exposed>(listener: TcpListener, exposed: Arc<E>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok(_) if connections.len() >= CONNECTIONS => exposed.refused(),
            Ok((socket, _)) => {
                connections.spawn(timeout(CONNECTION_LIFE, connection(socket, exposed.clone())));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a metrics connection failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<E: Exposed>(socket: TcpStream, exposed: Arc<E>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let exposed = exposed.clone();
        async move { Ok::<_, Infallible>(answer(&*exposed, request.uri().path()).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(socket), service);
    if let Err(error) = serving.await {
        tracing::debug!(%error, "a metrics connection ended");
    }
}

async fn answer(exposed: &impl Exposed, path: &str) -> Response<Full<Bytes>> {
    let (status, kind, text) = match path {
        "/metrics" => match exposed.metrics().await {
            Ok(text) => (StatusCode::OK, OPEN_METRICS, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
        },
        "/healthz" => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        "/readyz" => match exposed.not_ready() {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[derive(Default)]
    struct Process {
        refused: AtomicUsize,
    }

    impl Exposed for Process {
        async fn metrics(&self) -> Result<String, fmt::Error> {
            Ok("# EOF\n".to_owned())
        }

        fn not_ready(&self) -> Option<String> {
            Some("not yet".to_owned())
        }

        fn refused(&self) {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn every_path_has_its_answer_and_connections_are_bounded() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (process, stop) = (Arc::new(Process::default()), CancellationToken::new());
        let serving = tokio::spawn(serve(listener, process.clone(), stop.clone()));
        let metrics = get(address, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("openmetrics-text"), "{metrics}");
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let ready = get(address, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 503") && ready.ends_with("not yet\n"), "{ready}");
        assert!(get(address, "/else").await.starts_with("HTTP/1.1 404"));

        let mut open = Vec::new();
        for _ in 0..=CONNECTIONS {
            open.push(TcpStream::connect(address).await.unwrap());
        }
        // The last one is closed without an answer.
        assert_eq!(open[CONNECTIONS].read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(process.refused.load(Ordering::Relaxed), 1);
        stop.cancel();
        serving.await.unwrap();
        let end = open[0].read(&mut [0; 1]).await;
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
}
