//! S3 and what speaks like it.
//!
//! Credentials, signing and the HTTP client are `object_store`'s; the requests are ours. Its own requests go through
//! its `Path`, which refuses keys that buckets hold (control characters such as a newline, `a//b`, `.`): one such key
//! fails the whole page of a listing, and an object with a newline in its name cannot be read. It also retries on its
//! own terms and hides `Retry-After`, which our deadline and limits must rule.
//!
//! Invariants:
//! - Every GET carries the version as a condition, and the answer's version, size and range are compared all the same:
//!   servers exist that do not look at conditions.
//! - A listing is resumed by sort key alone. To go on after the directory `d/`, it starts after `d/` + U+10FFFF: every
//!   entry that comes later has keys that are greater than anything that begins with `d/`, so none is skipped; what is
//!   listed again is dropped.
//! - A key that cannot be a path of a dataset is counted as hidden; it never fails or shortens a listing.
//! - Times are whole seconds, for HEAD gives no more.
//!
//! Not handled: versioned reads (`versionId`), requester pays, S3 Express.

mod listing;
#[cfg(test)]
mod tests;
mod transport;

use std::{ops::Range, sync::Arc};

use forebay_protocol::{VersionKey, identity::is_valid_name};
use http::HeaderMap;
use object_store::client::HttpResponse;

use self::{
    listing::Query,
    transport::{Call, Transport},
};
use crate::{
    ByteStream, Item, Limits, Page, Requests, SourceSpec, StoreError, StoreFuture, UnderStore,
    limits::Limiter,
    origin::{self, Origin},
    patience::{Failure, Patience},
    requests::Verb,
    version::{State, content_length},
    wire::Wire,
};

/// Most keys of one LIST answer, S3's own limit.
const MAX_KEYS: usize = 1000;
/// Follows every character that a key can have after a directory's slash.
const LAST_CHARACTER: &str = "\u{10FFFF}";

/// A bucket below a prefix.
pub(crate) struct S3Store {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Transport,
    /// Empty, or with a slash at its end.
    prefix: String,
}

impl S3Store {
    pub(crate) fn new(
        spec: &SourceSpec,
        bucket: String,
        prefix: String,
        limits: &Limits,
        limiter: Limiter,
    ) -> Result<Self, StoreError> {
        let transport = Transport::new(spec, &bucket, limits, limiter)?;
        Ok(Self { inner: Arc::new(Inner { transport, prefix }) })
    }
}

impl UnderStore for S3Store {
    fn list<'a>(&'a self, directory: &'a [u8], after: Option<&'a [u8]>, limit: usize) -> StoreFuture<'a, Page> {
        Box::pin(self.inner.list(directory, after, limit.clamp(1, MAX_KEYS)))
    }

    fn head<'a>(&'a self, key: &'a [u8]) -> StoreFuture<'a, Item> {
        Box::pin(async move { origin::head(&*self.inner, key, &self.inner.key(key)?).await })
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        version: &'a VersionKey,
        size: u64,
        range: Range<u64>,
    ) -> StoreFuture<'a, ByteStream> {
        Box::pin(async move { origin::get(&self.inner, self.inner.key(key)?, version, size, range).await })
    }

    fn requests(&self) -> Requests {
        self.inner.transport.wire.requests.snapshot()
    }

    fn check(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.inner.check())
    }

    fn problem(&self) -> Option<StoreError> {
        self.inner.transport.wire.requests.problem()
    }
}

impl Inner {
    /// The key in the bucket. What cannot be a key that we list is not there.
    fn key(&self, key: &[u8]) -> Result<String, StoreError> {
        let shown = || StoreError::NotFound(String::from_utf8_lossy(key).into_owned());
        if !key.split(|byte| *byte == b'/').all(is_valid_name) {
            return Err(shown());
        }
        let key = std::str::from_utf8(key).map_err(|_| shown())?;
        Ok(format!("{}{key}", self.prefix))
    }

    async fn list(&self, directory: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Page, StoreError> {
        let prefix = match directory {
            [] => self.prefix.clone(),
            // Such a directory cannot be in a listing, so nothing is below it.
            _ => match self.key(directory) {
                Ok(key) => key + "/",
                Err(_) => return Ok(Page::default()),
            },
        };
        let start_after = after.map(|after| format!("{prefix}{}", start_after(after)));
        let mut patience = self.transport.wire.patience();
        let mut token: Option<String> = None;
        loop {
            let query = Query {
                prefix: &prefix,
                start_after: start_after.as_deref().filter(|_| token.is_none()),
                token: token.as_deref(),
                max_keys: limit,
            };
            let reply = loop {
                match self.try_list(&mut patience, &query).await {
                    Ok(reply) => break reply,
                    Err(failure) => patience.pause(failure).await?,
                }
            };
            let (page, next_token) = reply.into_page(prefix.as_bytes(), after, limit);
            // A page may hold nothing but what was seen before, or the directory's marker: then go on here, where the
            // store's token leads past it.
            if page.next.is_some() || next_token.is_none() {
                return Ok(page);
            }
            token = next_token;
        }
    }

    /// Lists one key. Credentials that may only list may not HEAD the bucket everywhere.
    async fn check(&self) -> Result<(), StoreError> {
        let query = Query { prefix: &self.prefix, start_after: None, token: None, max_keys: 1 };
        let mut patience = self.transport.wire.patience();
        loop {
            match self.try_list(&mut patience, &query).await {
                Ok(_) => return Ok(()),
                Err(failure) => patience.pause(failure).await?,
            }
        }
    }

    async fn try_list(&self, patience: &mut Patience, query: &Query<'_>) -> Result<listing::Reply, Failure> {
        let _grant = self.transport.wire.grant(patience, Verb::List, 0).await?;
        let response = self.transport.call(patience, Call::list(query)).await?;
        let name = self.transport.name(query.prefix);
        let body = self.transport.wire.text(patience, Verb::List, &name, response, listing::MAX_REPLY).await?;
        let reply = listing::Reply::parse(&body).map_err(|why| Failure::passing(format!("{name}: bad listing: {why}")));
        // Something that is no S3 store answers with success, too.
        reply.inspect_err(|failure| self.transport.wire.requests.failed(Verb::List, failure))
    }
}

impl Origin for Inner {
    fn wire(&self) -> &Wire {
        &self.transport.wire
    }

    fn name(&self, key: &str) -> String {
        self.transport.name(key)
    }

    async fn look_up(&self, patience: &mut Patience, key: &str) -> Result<State, Failure> {
        let _grant = self.transport.wire.grant(patience, Verb::Head, 0).await?;
        let response = self.transport.call(patience, Call::object(Verb::Head, key)).await?;
        let size = content_length(response.headers());
        let size = size.ok_or_else(|| Failure::passing(format!("{}: no Content-Length", self.name(key))))?;
        Ok(State::of_headers(response.headers(), size))
    }

    async fn fetch(&self, patience: &mut Patience, key: &str, headers: HeaderMap) -> Result<HttpResponse, Failure> {
        self.transport.call(patience, Call::object(Verb::Get, key).headers(headers)).await
    }
}

/// What a listing starts after to go on after the sort key `after`; it may be less than that, so results are compared.
fn start_after(after: &[u8]) -> String {
    // Keys are UTF-8: what comes after bytes that are not comes after their valid beginning, too.
    let valid = match std::str::from_utf8(after) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&after[..error.valid_up_to()]).unwrap_or_default(),
    };
    // A name has no slash, so one at the end is a directory's.
    if valid.ends_with('/') { format!("{valid}{LAST_CHARACTER}") } else { valid.to_owned() }
}
