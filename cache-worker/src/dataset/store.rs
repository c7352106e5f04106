//! Stores as datasets use them: one that can be replaced, and one that there is none of.

use std::{future::Future, ops::Range, sync::Arc};

use forebay_protocol::VersionKey;
use forebay_under_store::{ByteStream, Item, Page, Requests, StoreError, StoreFuture, UnderStore};
use tokio_util::sync::CancellationToken;

/// A store whose calls end when it is replaced: one that tries a wrong address again and again would hold up those who
/// wait for the right one. Bodies that have begun go on.
pub(super) struct Replaceable {
    store: Arc<dyn UnderStore>,
    replaced: CancellationToken,
}

impl Replaceable {
    pub(super) fn new(store: Arc<dyn UnderStore>, replaced: CancellationToken) -> Self {
        Self { store, replaced }
    }

    async fn unless_replaced<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let replaced = || Err(StoreError::Unavailable("the source was changed; try again".to_owned()));
        self.replaced.run_until_cancelled(call).await.unwrap_or_else(replaced)
    }
}

impl UnderStore for Replaceable {
    fn list<'a>(&'a self, directory: &'a [u8], after: Option<&'a [u8]>, limit: usize) -> StoreFuture<'a, Page> {
        Box::pin(self.unless_replaced(self.store.list(directory, after, limit)))
    }

    fn head<'a>(&'a self, key: &'a [u8]) -> StoreFuture<'a, Item> {
        Box::pin(self.unless_replaced(self.store.head(key)))
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        version: &'a VersionKey,
        size: u64,
        range: Range<u64>,
    ) -> StoreFuture<'a, ByteStream> {
        Box::pin(self.unless_replaced(self.store.get(key, version, size, range)))
    }

    fn check(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.unless_replaced(self.store.check()))
    }

    fn requests(&self) -> Requests {
        self.store.requests()
    }

    fn problem(&self) -> Option<StoreError> {
        self.store.problem()
    }

    fn has_directories(&self) -> bool {
        self.store.has_directories()
    }
}

/// What stands where no store can be: it answers everything with the reason.
pub(super) struct NoStore(pub(super) StoreError);

impl NoStore {
    fn refuse<T: Send + 'static>(&self) -> StoreFuture<'_, T> {
        Box::pin(std::future::ready(Err(self.0.clone())))
    }
}

impl UnderStore for NoStore {
    fn list<'a>(&'a self, _: &'a [u8], _: Option<&'a [u8]>, _: usize) -> StoreFuture<'a, Page> {
        self.refuse()
    }

    fn head<'a>(&'a self, _: &'a [u8]) -> StoreFuture<'a, Item> {
        self.refuse()
    }

    fn get<'a>(&'a self, _: &'a [u8], _: &'a VersionKey, _: u64, _: Range<u64>) -> StoreFuture<'a, ByteStream> {
        self.refuse()
    }

    fn check(&self) -> StoreFuture<'_, ()> {
        self.refuse()
    }

    fn requests(&self) -> Requests {
        Requests::default()
    }

    fn problem(&self) -> Option<StoreError> {
        Some(self.0.clone())
    }
}
