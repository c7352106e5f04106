//! Files of a web server: `http://` and `https://`.
//!
//! Files are read by GET; they are listed and looked up by PROPFIND (WebDAV, RFC 4918), which alone says in a form that
//! is defined what is in a directory, and what is one: GET of a directory answers with a page of HTML in the best case.
//!
//! Invariants:
//! - Every GET carries the version as a condition, and the answer's version, size and range are compared all the same:
//!   servers exist that do not look at conditions.
//! - Looking up and listing ask the same question, so they give the same version of a file. It is the strong ETag where
//!   there is one, else the time and the size ([`crate::version`]).
//! - A version from PROPFIND must be one by which GET can be asked. Servers exist whose two ETags differ. So the first
//!   file with an ETag is asked for by HEAD as well: when that gives another ETag for the same time, the ETags of this
//!   server count nowhere. Every process comes to the same conclusion, for it is a property of the server.
//! - An answer that does not name what was asked about is refused: behind a proxy that changes paths it would show an
//!   empty directory.
//!
//! Redirects of the client: up to ten are followed. A PROPFIND that leads to another path is refused as above.
//!
//! Not handled: servers without WebDAV (neither pages of HTML nor a manifest are read), credentials, directories whose
//! listing is over 64 MiB (some 100,000 files).

mod listing;
mod multistatus;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use forebay_protocol::{VersionKey, identity::is_valid_name};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use object_store::client::{HttpRequestBody, HttpResponse};
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use url::Url;

use self::{
    listing::{Kept, Listing, Place, components, place, state},
    multistatus::Entry,
};
use crate::{
    ByteStream, Item, Limits, Page, Requests, StoreError, StoreFuture, UnderStore,
    limits::Limiter,
    origin::{self, Origin},
    patience::{Failure, Patience},
    requests::Verb,
    version::State,
    wire::{self, Wire},
};

/// What a path carries as it is: the unreserved characters of RFC 3986 and the slash.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
/// Most bytes of a listing: 100,000 files with 600 bytes around each.
const MAX_LISTING: usize = 64 << 20;

/// A directory of a web server.
pub(crate) struct HttpStore {
    inner: Arc<Inner>,
}

struct Inner {
    wire: Wire,
    /// With a slash at its end.
    root: Url,
    propfind: Method,
    /// Whether the ETags of PROPFIND are those of GET, once that is known.
    etags: OnceLock<bool>,
    kept: Mutex<Kept>,
}

/// How much a PROPFIND is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// The file or directory itself.
    Itself,
    /// The directory and what is directly below.
    Children,
}

impl HttpStore {
    /// `root` has a slash at its end.
    pub(crate) fn new(root: Url, limits: &Limits, limiter: Limiter) -> Result<Self, StoreError> {
        let propfind = Method::from_bytes(b"PROPFIND").map_err(|error| StoreError::Invalid(error.to_string()))?;
        let wire = Wire::new(limits, limiter)?;
        let inner = Inner { wire, root, propfind, etags: OnceLock::new(), kept: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl UnderStore for HttpStore {
    fn list<'a>(&'a self, directory: &'a [u8], after: Option<&'a [u8]>, limit: usize) -> StoreFuture<'a, Page> {
        Box::pin(self.inner.list(directory, after, limit.max(1)))
    }

    fn head<'a>(&'a self, key: &'a [u8]) -> StoreFuture<'a, Item> {
        Box::pin(async move { origin::head(&*self.inner, key, &encode(key)?).await })
    }

    fn get<'a>(
        &'a self,
        key: &'a [u8],
        version: &'a VersionKey,
        size: u64,
        range: Range<u64>,
    ) -> StoreFuture<'a, ByteStream> {
        Box::pin(async move { origin::get(&self.inner, encode(key)?, version, size, range).await })
    }

    fn requests(&self) -> Requests {
        self.inner.wire.requests.snapshot()
    }

    fn check(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.inner.check())
    }

    fn problem(&self) -> Option<StoreError> {
        self.inner.wire.requests.problem()
    }

    fn has_directories(&self) -> bool {
        true
    }
}

/// The key as it stands in a URL. What cannot be in a listing is not there.
fn encode(key: &[u8]) -> Result<String, StoreError> {
    if !key.split(|byte| *byte == b'/').all(is_valid_name) {
        return Err(StoreError::NotFound(String::from_utf8_lossy(key).into_owned()));
    }
    Ok(percent_encode(key, PATH).to_string())
}

impl Inner {
    async fn list(&self, directory: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Page, StoreError> {
        let target = match directory {
            [] => String::new(),
            _ => encode(directory)? + "/",
        };
        let kept = after.and_then(|_| self.kept.lock().get(directory));
        let listing = match kept {
            Some(listing) => listing,
            None => {
                let listing = Arc::new(self.fetch_listing(&target).await?);
                self.kept.lock().put(directory, listing.clone());
                listing
            }
        };
        let page = listing.page(after, limit);
        if page.next.is_none() {
            self.kept.lock().remove(directory);
        }
        Ok(page)
    }

    async fn fetch_listing(&self, target: &str) -> Result<Listing, StoreError> {
        let mut patience = self.wire.patience();
        loop {
            match self.try_list(&mut patience, target).await {
                Ok(listing) => return Ok(listing),
                Err(failure) => patience.pause(failure).await?,
            }
        }
    }

    async fn try_list(&self, patience: &mut Patience, target: &str) -> Result<Listing, Failure> {
        let (itself, children) = self.propfind(patience, Verb::List, target, Depth::Children).await?;
        self.check_directory(target, &itself)?;
        let file = children.iter().find(|(name, entry)| is_valid_name(name) && has_etag(entry));
        let with_etags = match file {
            Some((name, entry)) => {
                let target = format!("{target}{}", percent_encode(name, PATH));
                self.trusts_etags(patience, &target, entry).await?
            }
            None => true,
        };
        Ok(Listing::new(children, with_etags))
    }

    /// Whether the source is there and can be listed.
    async fn check(&self) -> Result<(), StoreError> {
        let mut patience = self.wire.patience();
        loop {
            let asked = self.propfind(&mut patience, Verb::List, "", Depth::Itself).await;
            match asked.and_then(|(itself, _)| self.check_directory("", &itself)) {
                Ok(()) => return Ok(()),
                Err(failure) => patience.pause(failure).await?,
            }
        }
    }

    fn check_directory(&self, target: &str, entry: &Entry) -> Result<(), Failure> {
        if entry.collection {
            return Ok(());
        }
        let failure = Failure::fatal(StoreError::NotFound(format!("{}: it is no directory", self.name(target))));
        if target.is_empty() {
            self.wire.requests.broken(Verb::List, &failure);
        }
        Err(failure)
    }

    /// What the server says about `target`, and about the children with their names.
    async fn propfind(
        &self,
        patience: &mut Patience,
        verb: Verb,
        target: &str,
        depth: Depth,
    ) -> Result<(Entry, Vec<(Vec<u8>, Entry)>), Failure> {
        let _grant = self.wire.grant(patience, verb, 0).await?;
        let depth = HeaderValue::from_static(if depth == Depth::Itself { "0" } else { "1" });
        let headers = HeaderMap::from_iter([
            (header::HeaderName::from_static("depth"), depth),
            (header::CONTENT_TYPE, HeaderValue::from_static("application/xml; charset=utf-8")),
        ]);
        let response = self.call(patience, verb, self.propfind.clone(), target, headers).await?;
        let name = self.name(target);
        let body = self.wire.text(patience, verb, &name, response, MAX_LISTING).await?;
        let failed = |failure: Failure| {
            self.wire.requests.failed(verb, &failure);
            failure
        };
        let entries = multistatus::parse(&body)
            .map_err(|why| failed(Failure::passing(format!("{name}: bad answer to PROPFIND: {why}"))))?;
        let path = components(&name);
        let (mut itself, mut children) = (None, Vec::new());
        let mut elsewhere = None;
        for entry in entries {
            match place(&entry, &path) {
                Place::Itself => itself = Some(entry),
                Place::Child(name) => children.push((name, entry)),
                Place::Elsewhere => elsewhere = elsewhere.or(Some(entry.href)),
            }
        }
        let itself = itself.ok_or_else(|| {
            let other = elsewhere.or_else(|| children.first().map(|(_, entry)| entry.href.clone()));
            failed(Failure::fatal(StoreError::Invalid(format!(
                "{name}: the server answers about '{}'; let uri be the URL by which the server knows itself",
                other.unwrap_or_default()
            ))))
        })?;
        Ok((itself, children))
    }

    /// Whether the ETags of PROPFIND count, found out with the file `target` when it is not known yet.
    async fn trusts_etags(&self, patience: &mut Patience, target: &str, entry: &Entry) -> Result<bool, Failure> {
        if let Some(known) = self.etags.get() {
            return Ok(*known);
        }
        let Some(listed) = state(entry, true) else { return Ok(true) };
        let _grant = self.wire.grant(patience, Verb::Head, 0).await?;
        let answered = match self.call(patience, Verb::Head, Method::HEAD, target, HeaderMap::new()).await {
            Ok(response) => State::of_headers(response.headers(), listed.size),
            Err(failure) => match failure.error {
                StoreError::Unavailable(_) => return Err(failure),
                // It went away, or may be listed but not read: the next file tells.
                _ => return Ok(true),
            },
        };
        // Another time: it changed in between, and the next file tells.
        let changed = answered.etag != listed.etag && answered.modified != listed.modified;
        if changed && answered.modified.is_some() {
            return Ok(true);
        }
        let same = answered.etag == listed.etag;
        if !same {
            let (headers, listing) = (answered.etag.unwrap_or_default(), listed.etag.unwrap_or_default());
            tracing::warn!(
                url = self.name(target),
                headers,
                listing,
                "the server's ETags differ between HEAD and PROPFIND: versions are times and sizes"
            );
        }
        Ok(*self.etags.get_or_init(|| same))
    }

    /// Sends a request and waits for the headers of its answer; any status but success is a failure.
    async fn call(
        &self,
        patience: &mut Patience,
        verb: Verb,
        method: Method,
        target: &str,
        headers: HeaderMap,
    ) -> Result<HttpResponse, Failure> {
        let name = self.name(target);
        let is_propfind = method == self.propfind;
        let body = match is_propfind {
            true => Bytes::from_static(multistatus::QUESTION.as_bytes()).into(),
            false => HttpRequestBody::empty(),
        };
        let request = http::Request::builder().method(method).uri(&name).body(body);
        let mut request = request.map_err(|error| Failure::fatal(StoreError::Invalid(format!("{name}: {error}"))))?;
        *request.headers_mut() = headers;
        // The bytes of the file and no others have its ETag and its size.
        request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let failure = match self.wire.send(patience, verb, &name, request).await {
            Ok(response) => {
                let status = response.status();
                let answered = if is_propfind { status == StatusCode::MULTI_STATUS } else { status.is_success() };
                if answered {
                    self.wire.requests.answered(verb);
                    return Ok(response);
                }
                of_status(&name, is_propfind, status, response.headers())
            }
            Err(failure) => failure,
        };
        match failure.error {
            // The root itself.
            StoreError::NotFound(_) if target.is_empty() => self.wire.requests.broken(verb, &failure),
            _ => self.wire.requests.failed(verb, &failure),
        }
        Err(failure)
    }
}

/// Whether an entry is a file with a strong ETag.
fn has_etag(entry: &Entry) -> bool {
    state(entry, true).is_some_and(|state| state.etag.is_some())
}

/// What a status means for the caller, with what WebDAV adds to it.
fn of_status(name: &str, is_propfind: bool, status: StatusCode, headers: &HeaderMap) -> Failure {
    let text = format!("{name}: {status}");
    match status {
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED if is_propfind => {
            let why = format!("{text}: the server does not list directories (PROPFIND); serve them by WebDAV");
            Failure::fatal(StoreError::Invalid(why))
        }
        status if is_propfind && status.is_success() => {
            let why =
                format!("{text} as an answer to PROPFIND, which is none of WebDAV; serve the directory by WebDAV");
            Failure::fatal(StoreError::Invalid(why))
        }
        // A directory, which is not read (RFC 4918, section 9.4).
        StatusCode::METHOD_NOT_ALLOWED => Failure::fatal(StoreError::NotFound(text)),
        status => wire::of_status(status, headers, text),
    }
}

impl Origin for Inner {
    fn wire(&self) -> &Wire {
        &self.wire
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.root)
    }

    async fn look_up(&self, patience: &mut Patience, key: &str) -> Result<State, Failure> {
        let (entry, _) = self.propfind(patience, Verb::Head, key, Depth::Itself).await?;
        if entry.collection {
            return Err(Failure::fatal(StoreError::NotFound(format!("{}: it is a directory", self.name(key)))));
        }
        let with_etag = !has_etag(&entry) || self.trusts_etags(patience, key, &entry).await?;
        state(&entry, with_etag).ok_or_else(|| Failure::passing(format!("{}: no getcontentlength", self.name(key))))
    }

    async fn fetch(&self, patience: &mut Patience, key: &str, headers: HeaderMap) -> Result<HttpResponse, Failure> {
        self.call(patience, Verb::Get, Method::GET, key, headers).await
    }
}
