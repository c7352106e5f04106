//! The data connections to one member, in two lanes: what readers wait for, and what is only read ahead or loaded. What
//! waits for a stalled source in one lane takes no slot of the other.
//!
//! A connection is made when it is first needed; the least busy one is used. Whoever needs a connection that is being
//! made waits for it, and shares its failure.

use std::sync::Arc;

use forebay_protocol::{
    errors::chain,
    frame::Purpose,
    handshake::{ConnectionPurpose, RuntimeKey},
};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{budget::Budget, connection::Connection, health::Health, transport};

pub(crate) struct Pool {
    address: String,
    key: RuntimeKey,
    budget: Budget,
    health: Arc<Health>,
    closed: CancellationToken,
    demand: Vec<Place>,
    background: Vec<Place>,
}

#[derive(Default)]
struct Place {
    connection: Mutex<Option<Arc<Connection>>>,
    connecting: tokio::sync::Mutex<()>,
}

impl Place {
    fn open(&self) -> Option<Arc<Connection>> {
        self.connection.lock().as_ref().filter(|connection| connection.is_open()).cloned()
    }

    fn load(&self) -> usize {
        self.connection.lock().as_ref().map_or(0, |connection| connection.in_flight())
    }
}

impl Pool {
    pub(crate) fn new(
        address: String,
        key: RuntimeKey,
        budget: Budget,
        health: Arc<Health>,
        closed: CancellationToken,
        connections: usize,
    ) -> Self {
        let places = |count: usize| std::iter::repeat_with(Place::default).take(count.max(1)).collect();
        Self {
            address,
            key,
            budget,
            health,
            closed,
            demand: places(connections),
            background: places(connections.div_ceil(2)),
        }
    }

    /// A connection for requests of this purpose.
    pub(crate) async fn get(&self, purpose: Purpose) -> Result<Arc<Connection>, Arc<str>> {
        let lane = match purpose {
            Purpose::Demand => &self.demand,
            Purpose::ReadAhead | Purpose::Load | Purpose::Peer => &self.background,
        };
        // Each lane has one place at least.
        let Some(place) = lane.iter().min_by_key(|place| place.load()) else { return Err("no connections".into()) };
        if let Some(connection) = place.open() {
            return Ok(connection);
        }
        let downs = self.health.condition().downs;
        let _connecting = place.connecting.lock().await;
        if let Some(connection) = place.open() {
            return Ok(connection);
        }
        // Somebody else tried while this one waited.
        let condition = self.health.condition();
        if condition.downs > downs {
            return Err(condition.error);
        }
        if self.closed.is_cancelled() {
            return Err("the worker left the table".into());
        }
        match transport::connect(&self.address, &self.key, ConnectionPurpose::Data).await {
            Ok(stream) => {
                let closed = self.closed.child_token();
                let connection = Arc::new(Connection::start(stream, self.budget.clone(), self.health.clone(), closed));
                *place.connection.lock() = Some(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                let text: Arc<str> = chain(&error).into();
                self.health.mark_down(&text);
                Err(text)
            }
        }
    }
}
