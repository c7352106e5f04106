//! What this process shows over HTTP.

use std::{fmt, sync::Arc};

use forebay_exposition::Exposed;

use crate::{calls::Calls, metrics::Metrics, registration::Registered};

/// What is asked about.
pub struct Http {
    /// By whom the keeper is asked.
    pub calls: Calls,
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// What the kubelet says; `None` when it is not asked.
    pub registered: Option<Registered>,
}

impl Exposed for Http {
    async fn metrics(&self) -> Result<String, fmt::Error> {
        let status = self.calls.look(|volumes| volumes.stages().status()).await.map_err(|_| fmt::Error)?;
        self.metrics.text(&status)
    }

    fn not_ready(&self) -> Option<String> {
        let refused = self.registered.as_ref().is_some_and(|registered| !registered.is_registered());
        refused.then(|| "not registered with the kubelet".to_owned())
    }
}
