//! TCP connections to workers: connect, options, handshake; and gRPC channels over them.

use std::{io, time::Duration};

use forebay_protocol::{
    errors::chain,
    handshake::{self, ConnectionPurpose, HandshakeError, RuntimeKey},
};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// How long a TCP connect may take. Workers are in the same cluster: a connect that takes longer meets a dead machine.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// How long the handshake may take. The kernel accepts connections of a stopped process, so only the handshake shows
/// that it lives.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(2);
/// Silence after which the kernel probes an idle connection, between probes, and probes until it gives up: a machine
/// that vanished is noticed after 10 + 3 * 5 = 25 s on connections that nobody uses.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
/// HTTP/2 pings while calls are open, and how long their answer may take: a stopped worker is noticed within 2 s.
const PING: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(1500));

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP says no.
    #[error("connect to {address} failed")]
    Connect {
        /// Where to.
        address: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nobody answered.
    #[error("no answer from {address} within {after:?}")]
    Deadline {
        /// Where to.
        address: String,
        /// How long it was waited.
        after: Duration,
    },
    /// Who answered is no worker of this runtime.
    #[error("handshake with {address} failed")]
    Handshake {
        /// Where to.
        address: String,
        /// Why.
        source: HandshakeError,
    },
    /// The gRPC transport refused the connection.
    #[error("control connection to {address} failed: {message}")]
    Control {
        /// Where to.
        address: String,
        /// Why.
        message: String,
    },
}

/// Connects to a worker at `address` (`host:port`) and proves the runtime's key both ways.
pub async fn connect(address: &str, key: &RuntimeKey, purpose: ConnectionPurpose) -> Result<TcpStream, ConnectError> {
    let mut stream = match tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(source)) => return Err(ConnectError::Connect { address: address.to_owned(), source }),
        Err(_) => return Err(ConnectError::Deadline { address: address.to_owned(), after: CONNECT_DEADLINE }),
    };
    set_options(&stream).map_err(|source| ConnectError::Connect { address: address.to_owned(), source })?;
    match tokio::time::timeout(HANDSHAKE_DEADLINE, handshake::connect(&mut stream, key, purpose)).await {
        Ok(Ok(())) => Ok(stream),
        Ok(Err(source)) => Err(ConnectError::Handshake { address: address.to_owned(), source }),
        Err(_) => Err(ConnectError::Deadline { address: address.to_owned(), after: HANDSHAKE_DEADLINE }),
    }
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, idle)?;
    sockopt::set_tcp_keepintvl(stream, interval)?;
    sockopt::set_tcp_keepcnt(stream, count)?;
    Ok(())
}

/// A gRPC channel to a worker. It reconnects by itself, each time with a handshake.
pub async fn channel(address: &str, key: &RuntimeKey) -> Result<Channel, ConnectError> {
    let failed =
        |error: tonic::transport::Error| ConnectError::Control { address: address.to_owned(), message: chain(&error) };
    // The URI only fills the authority header: the connector knows where to go.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(failed)?
        .http2_keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1);
    let (target, key) = (address.to_owned(), key.clone());
    let connector = tower::service_fn(move |_: Uri| {
        let (target, key) = (target.clone(), key.clone());
        async move { connect(&target, &key, ConnectionPurpose::Control).await.map(TokioIo::new) }
    });
    endpoint.connect_with_connector(connector).await.map_err(failed)
}
