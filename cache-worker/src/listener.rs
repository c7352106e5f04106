//! The one listener: accepts, shakes hands, and gives each connection to whom it is for.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use forebay_protocol::handshake::{self, ConnectionPurpose};
use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::sleep,
};
use tracing::{debug, warn};

use crate::{data, worker::Worker};

/// Handshakes at once. Each takes 3 s at most, so strangers cannot hold more than these.
const HANDSHAKES: usize = 256;
/// Connections at once: a thousand clients with a handful each. Beyond, new ones are closed.
const CONNECTIONS: usize = 8192;
/// Silence after which the kernel probes a connection, between probes, and probes until it gives up.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
/// Pause when accepting fails (no descriptors left, usually).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A message at most once per second, with the number of those that were not shown.
#[derive(Default)]
struct Quiet {
    last: Mutex<Option<Instant>>,
    hidden: AtomicUsize,
}

impl Quiet {
    /// The messages that were hidden since, when this one may be shown.
    fn may_show(&self) -> Option<usize> {
        let mut last = self.last.lock();
        if last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.hidden.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        *last = Some(Instant::now());
        Some(self.hidden.swap(0, Ordering::Relaxed))
    }
}

/// A control connection whose handshake is done.
pub(crate) struct ControlSocket {
    pub(crate) socket: TcpStream,
    /// Its place among the connections.
    pub(crate) place: OwnedSemaphorePermit,
}

/// Accepts until the worker stops. Control connections go to `control`.
pub(crate) async fn run(worker: Arc<Worker>, listener: TcpListener, control: mpsc::Sender<ControlSocket>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let quiet = Arc::new(Quiet::default());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = worker.stop.cancelled() => return,
        };
        let (mut socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "accepting a connection failed");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (Ok(handshake), Ok(place)) =
            (handshakes.clone().try_acquire_owned(), connections.clone().try_acquire_owned())
        else {
            worker.metrics.connections_refused.inc();
            continue;
        };
        if let Err(error) = set_options(&socket) {
            debug!(%error, %peer, "a connection ended at once");
            continue;
        }
        let (task, control, quiet) = (worker.clone(), control.clone(), quiet.clone());
        worker.tasks.spawn(async move {
            let shaken = tokio::select! {
                shaken = handshake::accept(&mut socket, &task.key) => shaken,
                () = task.stop.cancelled() => return,
            };
            drop(handshake);
            match shaken {
                Ok(ConnectionPurpose::Data) => {
                    task.metrics.data_connections.inc();
                    data::serve(task.clone(), socket).await;
                    task.metrics.data_connections.dec();
                    drop(place);
                }
                // A full queue is a server that does not come to accept: the client tries another worker.
                Ok(ConnectionPurpose::Control) => {
                    if control.try_send(ControlSocket { socket, place }).is_err() {
                        task.metrics.connections_refused.inc();
                    }
                }
                Err(error) => {
                    task.metrics.handshakes_failed.inc();
                    if let Some(hidden) = quiet.may_show() {
                        warn!(%error, %peer, hidden, "a connection failed its handshake");
                    }
                }
            }
        });
    }
}

fn set_options(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, idle)?;
    sockopt::set_tcp_keepintvl(socket, interval)?;
    sockopt::set_tcp_keepcnt(socket, count)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line() {
        let quiet = Quiet::default();
        assert_eq!(quiet.may_show(), Some(0));
        assert!((0..1000).all(|_| quiet.may_show().is_none()));
        *quiet.last.lock() = Instant::now().checked_sub(Duration::from_secs(2));
        assert_eq!(quiet.may_show(), Some(1000));
    }
}
