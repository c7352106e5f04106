//! An S3 server in process, on 127.0.0.1, for tests and the demo.
//!
//! The protocol is somebody else's: `s3s` (HTTP, SigV4, XML) and `s3s-fs` (objects in a folder). Around them stand
//! what 0.14.1 lacks and what tests need:
//!
//! - `backend`: If-Match and the other conditions on GET and HEAD, ETags in listings, exact listings (delimiter,
//!   start-after, continuation tokens, max-keys, encoding-type=url) over an index in memory, keys that no file system
//!   holds (`a` beside `a/b`, `a//b`, control characters), virtual objects that are generated as they are read.
//! - `faults`: statuses, delays, stalled, truncated and reset connections, by verb, key and turn.
//! - [`content`]: generated contents, for whoever must know what a reader has to find.
//! - `server`: latency, counters, the HTTP connections.
//!
//! Invariants: an object never changes under a stream that reads it (every put is a new file); what [`TestStore::put`]
//! returned is visible to every later request; dropping the [`TestStore`] ends its connections and removes its files.
//!
//! Not handled: multipart uploads, versions, persistence. It panics where a test could not go on.
#![allow(clippy::expect_used, clippy::panic, reason = "a server for tests: when its set-up breaks the test must stop")]

mod backend;
pub mod content;
mod faults;
mod index;
mod server;

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{net::TcpListener, task::JoinHandle};

use self::{backend::Backend, server::Shared};
pub use self::{
    backend::Generator,
    faults::{Action, Fault, FaultId, Faults, Verb},
    server::Counters,
};

/// How a [`TestStore`] starts.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Added before each request is answered.
    pub latency: Duration,
    /// Where the objects go: a folder of its own is made in it, and removed at the end. Default: the system's place
    /// for temporary files.
    pub dir: Option<PathBuf>,
}

/// A running S3 server; it stops when dropped.
#[derive(Debug)]
pub struct TestStore {
    address: std::net::SocketAddr,
    backend: Backend,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl TestStore {
    /// Starts a server on a free port of 127.0.0.1, on the runtime of the caller.
    pub async fn start(options: Options) -> Self {
        let Options { latency, dir } = options;
        let backend = Backend::new(dir.as_deref());
        let shared = Arc::new(Shared::new(backend.clone(), latency));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("the address of a bound socket");
        let task = tokio::spawn(server::serve(listener, shared.clone()));
        Self { address, backend, shared, task }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The access key that requests must be signed with.
    pub fn access_key(&self) -> &str {
        server::ACCESS_KEY
    }

    /// Its secret.
    pub fn secret_key(&self) -> &str {
        server::SECRET_KEY
    }

    /// Makes a bucket; one that exists stays as it is. Names have 3 to 63 characters, lower case.
    pub async fn create_bucket(&self, name: &str) {
        self.backend.create_bucket_now(name);
    }

    /// Puts an object, past HTTP, faults and counters; returns its ETag as sent on the wire (with quotes).
    pub async fn put(&self, bucket: &str, key: &str, bytes: Bytes) -> String {
        let (backend, bucket, key) = (self.backend.clone(), bucket.to_owned(), key.to_owned());
        tokio::task::spawn_blocking(move || backend.put_now(&bucket, &key, &bytes)).await.expect("put does not panic")
    }

    /// Removes an object, past HTTP, faults and counters.
    pub async fn delete(&self, bucket: &str, key: &str) {
        self.backend.delete_now(bucket, key);
    }

    /// Puts an object of `size` bytes that is never stored: `generator(offset, buffer)` fills `buffer` with the bytes
    /// from `offset` on. Every call gives the object a new ETag, which is returned.
    pub fn put_virtual(&self, bucket: &str, key: &str, size: u64, generator: Generator) -> String {
        self.backend.put_virtual_now(bucket, key, size, generator)
    }

    /// The faults to inject.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Changes the latency of requests from now on.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.set_latency(latency);
    }

    /// Sends all ETags as weak ones (`W/"..."`) from now on, as gateways that compress do; listings have none then.
    /// If-Match never holds for them.
    pub fn set_weak_etags(&self, weak: bool) {
        self.backend.set_weak_etags(weak);
    }

    /// What was asked and sent so far.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Bytes of the object at `key` (any bucket) sent so far; cheaper than [`TestStore::counters`].
    pub fn bytes_of(&self, key: &str) -> u64 {
        self.shared.bytes_of(key)
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        // The task owns the connections' tasks: they end with it.
        self.task.abort();
    }
}

#[cfg(test)]
mod tests;
