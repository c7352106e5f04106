//! What a worker shows of itself over HTTP.

use std::{fmt, sync::Arc};

use forebay_exposition::{Exposed, serve};
use tokio::net::TcpListener;

use crate::worker::Worker;

struct Shown(Arc<Worker>);

impl Exposed for Shown {
    async fn metrics(&self) -> Result<String, fmt::Error> {
        self.0.sample_metrics().await;
        self.0.metrics.text()
    }

    fn not_ready(&self) -> Option<String> {
        self.0.not_ready().map(str::to_owned)
    }

    fn refused(&self) {
        self.0.metrics.connections_refused.inc();
    }
}

/// Serves `/metrics`, `/healthz` and `/readyz` until the worker stops.
pub(crate) async fn run(worker: Arc<Worker>, listener: TcpListener) {
    let stop = worker.stop.clone();
    serve(listener, Arc::new(Shown(worker)), stop).await;
}
