//! How calls become work: off the gRPC threads, one at a time for each volume, with deadlines, counted and logged.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::spawn_blocking, time::timeout};
use tonic::{Code, Response, Status};
use tracing::{debug, warn};

use crate::{error::VolumeError, locks::Locks, metrics::Metrics, volumes::Volumes};

/// How long a call waits for the one before. With [`WORK`] it stays below the kubelet's own deadline of two minutes, so
/// that a call ends with an answer.
const LOCK: Duration = Duration::from_secs(20);
/// How long a call's work may take; each of its steps has a deadline of its own, and these are its worst case: the old
/// mount goes (20 s), the new one comes (50 s), bind mounts and mount table (20 s).
const WORK: Duration = Duration::from_secs(90);

/// Runs the calls of all services.
#[derive(Clone)]
pub struct Calls {
    volumes: Arc<Volumes>,
    locks: Arc<Locks>,
    metrics: Arc<Metrics>,
}

impl Calls {
    /// For these volumes.
    pub fn new(volumes: Arc<Volumes>, metrics: Arc<Metrics>) -> Self {
        Self { volumes, locks: Arc::default(), metrics }
    }

    /// Changes a volume. The work goes on when its caller gives up, and keeps the volume's lock until it is done.
    pub async fn change<T: Send + 'static>(
        &self,
        volume: String,
        work: impl FnOnce(&Volumes) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, Status> {
        let held = self.locks.hold(&volume, LOCK).await?;
        self.blocking(move |volumes| {
            let _held = held;
            work(volumes)
        })
        .await
    }

    /// Looks, and changes nothing.
    pub async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Volumes) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, Status> {
        self.blocking(work).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Volumes) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, Status> {
        let volumes = Arc::clone(&self.volumes);
        match timeout(WORK, spawn_blocking(move || work(&volumes))).await {
            Ok(Ok(result)) => Ok(result?),
            Ok(Err(error)) => Err(Status::internal(format!("the operation failed: {error}"))),
            Err(_) => Err(VolumeError::Timeout(format!("not done within {WORK:?}, but still under way")).into()),
        }
    }

    /// Counts and logs a call. An error is logged here and nowhere else; a repeated call that finds all well is not.
    pub async fn observe<T>(
        &self,
        method: &'static str,
        volume: &str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let begun = Instant::now();
        let result = call.await;
        let (took, code) = (begun.elapsed(), result.as_ref().map_or_else(Status::code, |_| Code::Ok));
        self.metrics.call(method, code, took);
        match &result {
            Ok(_) => debug!(method, volume, ?took, "answered"),
            Err(status) => warn!(method, volume, ?took, code = ?code, error = status.message(), "refused"),
        }
        result.map(Response::new)
    }
}
