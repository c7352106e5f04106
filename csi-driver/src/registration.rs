//! Making this driver known to the kubelet: a socket in the plugin registration directory, on which the kubelet asks who
//! this is, and says whether it took it.
//!
//! A kubelet that starts again finds the socket by itself. One that refuses is offered a new socket after a pause, because
//! it looks at each socket once.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::TryStreamExt as _;
use tokio::{sync::Notify, time::sleep};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};
use tracing::{info, warn};

use crate::{
    authority::mended,
    identity::NAME,
    proto::registration::{
        InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
        registration_server::{Registration, RegistrationServer},
    },
    socket,
};

/// Type of the plugin, as the kubelet knows it.
const KIND: &str = "CSIPlugin";
/// The version of CSI that the kubelet asks for.
const CSI: &str = "1.0.0";
/// Pauses before another socket is offered.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What the kubelet said last.
#[derive(Clone, Default)]
pub struct Registered(Arc<State>);

#[derive(Default)]
struct State {
    accepted: AtomicBool,
    refused: Notify,
}

impl Registered {
    /// Whether the kubelet uses this driver.
    pub fn is_registered(&self) -> bool {
        self.0.accepted.load(Ordering::Relaxed)
    }
}

struct Answers {
    endpoint: String,
    registered: Registered,
}

#[tonic::async_trait]
impl Registration for Answers {
    async fn get_info(&self, _request: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: KIND.to_owned(),
            name: NAME.to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec![CSI.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        let State { accepted, refused } = &*self.registered.0;
        accepted.store(plugin_registered, Ordering::Relaxed);
        if plugin_registered {
            info!("registered with the kubelet");
        } else {
            warn!(error, "the kubelet refuses this driver");
            refused.notify_one();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// The socket's place.
pub fn socket_in(directory: &Path) -> PathBuf {
    directory.join(format!("{NAME}-reg.sock"))
}

/// Offers the driver at `endpoint` until `stop`.
pub async fn run(socket: PathBuf, endpoint: PathBuf, registered: Registered, stop: CancellationToken) {
    let mut pause = PAUSE_MIN;
    loop {
        if let Err(error) = offer(&socket, &endpoint, &registered, &stop).await {
            warn!(error = format!("{error:#}"), socket = %socket.display(), "cannot be registered");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Until the kubelet refuses, or `stop`.
async fn offer(
    socket: &Path,
    endpoint: &Path,
    registered: &Registered,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let (listener, _name) = socket::listen(socket)?;
    let answers = Answers { endpoint: endpoint.display().to_string(), registered: registered.clone() };
    let end = async {
        tokio::select! {
            () = stop.cancelled() => {}
            () = registered.0.refused.notified() => {}
        }
    };
    let incoming = UnixListenerStream::new(listener).map_ok(mended);
    Ok(Server::builder().serve_with_incoming_shutdown(RegistrationServer::new(answers), incoming, end).await?)
}
