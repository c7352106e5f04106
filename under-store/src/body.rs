//! The bytes of a range, resumed where they stopped until all are there.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use forebay_protocol::{VersionKey, errors::chain};
use futures::{StreamExt, stream, stream::BoxStream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use object_store::client::{HttpError, HttpResponse};

use crate::{
    ByteStream, StoreError,
    limits::Grant,
    origin::Origin,
    patience::{Failure, Patience},
    requests::Verb,
    version::{State, condition, content_length, content_range},
};

/// A connection that brought so much before it broke counts as working: the next pause is a short one again. A store
/// that breaks every connection earlier is asked ever more rarely.
const WORKING: u64 = 64 << 10;

/// A range of one version of an object, being read.
pub(crate) struct Body<O> {
    origin: Arc<O>,
    key: String,
    version: VersionKey,
    condition: (HeaderName, HeaderValue),
    size: u64,
    /// What has not been yielded yet.
    rest: Range<u64>,
    patience: Patience,
    connection: Option<Connection>,
}

struct Connection {
    stream: BoxStream<'static, Result<Bytes, HttpError>>,
    received: u64,
    /// Held until the body is done with: read, broken or dropped.
    _grant: Grant,
}

impl<O: Origin> Body<O> {
    /// Asks for the range; the answer has begun when this returns.
    pub(crate) async fn open(
        origin: Arc<O>,
        key: String,
        version: &VersionKey,
        size: u64,
        range: Range<u64>,
    ) -> Result<Self, StoreError> {
        // A key that this store never gave is no version that it has.
        let condition = condition(version).ok_or_else(|| StoreError::VersionMismatch(origin.name(&key)))?;
        let patience = origin.wire().patience();
        let version = version.clone();
        let mut body = Self { origin, key, version, condition, size, rest: range, patience, connection: None };
        body.connect().await?;
        Ok(body)
    }

    /// As a stream that ends after the range or with an error.
    pub(crate) fn into_stream(self) -> ByteStream {
        stream::try_unfold(self, |mut body| async move { Ok(body.next().await?.map(|bytes| (bytes, body))) }).boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        while !self.rest.is_empty() {
            let Some(connection) = &mut self.connection else {
                self.connect().await?;
                continue;
            };
            let silence = self.origin.wire().progress_timeout();
            let why = match self.patience.wait(silence, connection.stream.next()).await {
                Some(Some(Ok(mut bytes))) => {
                    self.origin.wire().requests.received(bytes.len());
                    connection.received += bytes.len() as u64;
                    // The headers promised no more than the range; a server that sends more is not listened to.
                    let wanted = usize::try_from(self.rest.end - self.rest.start).unwrap_or(usize::MAX);
                    bytes.truncate(wanted);
                    if bytes.is_empty() {
                        continue;
                    }
                    self.rest.start += bytes.len() as u64;
                    if self.rest.is_empty() {
                        self.connection = None;
                    }
                    return Ok(Some(bytes));
                }
                Some(Some(Err(error))) => chain(&error),
                Some(None) => "the body ended early".to_owned(),
                None => "the body stalled".to_owned(),
            };
            if connection.received >= WORKING {
                self.patience.progressed();
            }
            self.connection = None;
            let name = self.origin.name(&self.key);
            let Range { start, end } = self.rest;
            let failure = Failure::passing(format!("{name}: at {start} of {start}..{end}: {why}"));
            self.origin.wire().requests.failed(Verb::Get, &failure);
            self.patience.pause(failure).await?;
        }
        Ok(None)
    }

    async fn connect(&mut self) -> Result<(), StoreError> {
        loop {
            match self.try_connect().await {
                Ok(connection) => {
                    self.connection = Some(connection);
                    return Ok(());
                }
                Err(failure) => self.patience.pause(failure).await?,
            }
        }
    }

    async fn try_connect(&mut self) -> Result<Connection, Failure> {
        let wire = self.origin.wire();
        let Range { start, end } = self.rest;
        let grant = wire.grant(&mut self.patience, Verb::Get, end - start).await?;
        // Digits and punctuation: always a header value.
        let range = HeaderValue::from_str(&format!("bytes={start}-{}", end - 1))
            .map_err(|error| Failure::fatal(StoreError::Invalid(error.to_string())))?;
        let headers = HeaderMap::from_iter([(header::RANGE, range), self.condition.clone()]);
        let response = self.origin.fetch(&mut self.patience, &self.key, headers).await?;
        self.check(&response).inspect_err(|failure| wire.requests.failed(Verb::Get, failure))?;
        Ok(Connection { stream: response.into_body().bytes_stream(), received: 0, _grant: grant })
    }

    /// Whether an answer is to the question: another version is a mismatch, whatever the condition; other bytes of the
    /// same version are a fault of the server that may pass.
    fn check(&self, response: &HttpResponse) -> Result<(), Failure> {
        let name = || self.origin.name(&self.key);
        let fault = |what: &str| Failure::passing(format!("{}: {what}", name()));
        let headers = response.headers();
        let length = content_length(headers);
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        let (start, end, size) = match partial {
            true => content_range(headers).ok_or_else(|| fault("a partial answer without Content-Range"))?,
            false => {
                let size = length.ok_or_else(|| fault("an answer without Content-Length"))?;
                (0, size, size)
            }
        };
        if !State::of_headers(headers, size).is(&self.version, self.size) {
            return Err(Failure::fatal(StoreError::VersionMismatch(name())));
        }
        if !partial && (start..end) != self.rest {
            // The whole object, for a server need not know ranges. From its beginning on it serves, and the connection
            // is dropped after the range; to read it anew for every range further on would be endless.
            return match self.rest.start {
                0 => Ok(()),
                _ => Err(Failure::fatal(StoreError::Invalid(format!(
                    "{}: the server does not send ranges of files; serve them by one that does (Accept-Ranges: bytes)",
                    name()
                )))),
            };
        }
        if (start..end) != self.rest || length.is_some_and(|length| length != end - start) {
            let Range { start: wanted, end: until } = self.rest;
            return Err(fault(&format!("bytes {start}..{end} were sent for {wanted}..{until}")));
        }
        Ok(())
    }
}
