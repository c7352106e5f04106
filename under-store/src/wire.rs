//! HTTP requests to one server, one attempt each: limits, deadlines and counters around the client, and what a status
//! means.
//!
//! The client follows redirects, up to ten, and leaves credentials out when they lead to another host (reqwest's
//! default). It never asks for a content coding: bytes, sizes and ETags are those of the file.

use std::time::Duration;

use forebay_protocol::errors::chain;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use object_store::{
    ClientOptions,
    client::{HttpClient, HttpConnector, HttpRequest, HttpResponse, ReqwestConnector},
};

use crate::{
    Limits, StoreError,
    limits::{Grant, Limiter},
    patience::{Failure, Patience, Retry},
    requests::{RequestCounters, Verb},
};

/// Longer than this no reachable server takes to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of the body of an error that is read.
const MAX_ERROR: usize = 64 << 10;

/// The way to one server.
pub(crate) struct Wire {
    client: HttpClient,
    limiter: Limiter,
    progress_timeout: Duration,
    deadline: Duration,
    pub(crate) requests: RequestCounters,
}

impl Wire {
    pub(crate) fn new(limits: &Limits, limiter: Limiter) -> Result<Self, StoreError> {
        let options = ClientOptions::new()
            .with_user_agent(HeaderValue::from_static(concat!("forebay/", env!("CARGO_PKG_VERSION"))))
            .with_allow_http(true)
            // Ours rule: one for the answer to begin and for each of its pieces, one for the whole call.
            .with_timeout_disabled()
            .with_connect_timeout(CONNECT_TIMEOUT.min(limits.progress_timeout))
            .with_pool_max_idle_per_host(limits.concurrency);
        let connected = ReqwestConnector::default().connect(&options);
        Ok(Self {
            client: connected.map_err(|error| StoreError::Invalid(format!("no HTTP client: {error}")))?,
            limiter,
            progress_timeout: limits.progress_timeout,
            deadline: limits.deadline,
            requests: RequestCounters::default(),
        })
    }

    /// The time of a new call.
    pub(crate) fn patience(&self) -> Patience {
        Patience::new(self.deadline)
    }

    /// How long a store may be silent.
    pub(crate) fn progress_timeout(&self) -> Duration {
        self.progress_timeout
    }

    /// Waits until a request that brings `bytes` may go out.
    pub(crate) async fn grant(&self, patience: &mut Patience, verb: Verb, bytes: u64) -> Result<Grant, Failure> {
        self.limiter.grant(patience, verb, bytes).await
    }

    /// Sends a request about `name` and waits for the headers of its answer, whatever its status. The caller counts
    /// how it ended.
    pub(crate) async fn send(
        &self,
        patience: &mut Patience,
        verb: Verb,
        name: &str,
        request: HttpRequest,
    ) -> Result<HttpResponse, Failure> {
        self.requests.sent(verb);
        let uri = request.uri().clone();
        let server = format!("{}://{}", uri.scheme_str().unwrap_or("http"), uri.authority().map_or("", |a| a.as_str()));
        match patience.wait(self.progress_timeout, self.client.execute(request)).await {
            Some(Ok(response)) => {
                if matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
                    self.requests.turned_away();
                    self.limiter.allowance().throttled(verb, retry_after(response.headers()));
                }
                Ok(response)
            }
            // Refused, reset, broken, not HTTP, a bad certificate: all of that passes when somebody mends the store.
            Some(Err(error)) => Err(Failure::passing(format!("{name} at {server}: {}", chain(&error)))),
            None => Err(Failure::passing(format!("{name}: no answer of {server} in time"))),
        }
    }

    /// The body of an answer about `name`, at most `most` bytes.
    pub(crate) async fn text(
        &self,
        patience: &mut Patience,
        verb: Verb,
        name: &str,
        response: HttpResponse,
        most: usize,
    ) -> Result<Vec<u8>, Failure> {
        let mut stream = response.into_body().bytes_stream();
        let mut text = Vec::new();
        let why = loop {
            match patience.wait(self.progress_timeout, stream.next()).await {
                Some(Some(Ok(bytes))) if text.len() + bytes.len() <= most => {
                    self.requests.received(bytes.len());
                    text.extend_from_slice(&bytes);
                }
                Some(None) => return Ok(text),
                // It would be as long the next time.
                Some(Some(Ok(_))) => {
                    let why = format!("{name}: a listing of over {} MiB; split the directory", most >> 20);
                    let failure = Failure::fatal(StoreError::Invalid(why));
                    self.requests.failed(verb, &failure);
                    return Err(failure);
                }
                Some(Some(Err(error))) => break chain(&error),
                None => break "the answer stalled".to_owned(),
            }
        };
        let failure = Failure::passing(format!("{name}: {why}"));
        self.requests.failed(verb, &failure);
        Err(failure)
    }

    /// What an error says about itself. One whose explanation cannot be read is one without.
    pub(crate) async fn explanation(&self, patience: &mut Patience, response: HttpResponse) -> Vec<u8> {
        let mut stream = response.into_body().bytes_stream();
        let mut text = Vec::new();
        while let Some(Some(Ok(bytes))) = patience.wait(self.progress_timeout, stream.next()).await {
            if text.len() + bytes.len() > MAX_ERROR {
                break;
            }
            text.extend_from_slice(&bytes);
        }
        text
    }
}

/// What a status means for the caller; `text` says what happened, `headers` may say when to come back.
pub(crate) fn of_status(status: StatusCode, headers: &HeaderMap, text: String) -> Failure {
    let fatal = |error: fn(String) -> StoreError| Failure::fatal(error(text.clone()));
    match status.as_u16() {
        401 | 403 => fatal(StoreError::PermissionDenied),
        404 | 410 => fatal(StoreError::NotFound),
        // We ask for ranges within the size of the version: when there is none such, it is another version.
        412 | 416 => fatal(StoreError::VersionMismatch),
        501 | 505 => fatal(StoreError::Invalid),
        408 | 409 | 425 | 429 | 500..=599 => Failure {
            error: StoreError::Unavailable(text),
            retry: retry_after(headers).map_or(Retry::Later, Retry::After),
        },
        // Redirects that lead nowhere, and requests that the store does not understand.
        _ => fatal(StoreError::Invalid),
    }
}

/// RFC 9110, section 10.2.3: seconds or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let time = chrono::DateTime::parse_from_rfc2822(text).ok()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    let seconds = u64::try_from(time.timestamp()).ok()?.saturating_sub(now.as_secs());
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let parse = |text: &str| {
            retry_after(&[(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap())].into_iter().collect())
        };
        assert_eq!(parse("3"), Some(Duration::from_secs(3)));
        assert_eq!(parse("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(parse("soon"), None);
    }
}
