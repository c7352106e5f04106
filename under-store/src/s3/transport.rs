//! Signed requests, one attempt each, and the one place where their failures get a meaning.

use std::{sync::Arc, time::Duration};

use forebay_protocol::errors::chain;
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use object_store::{
    ClientOptions, RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsAuthorizer, AwsCredential, AwsCredentialProvider},
    client::{HttpClient, HttpConnector, HttpRequestBody, HttpResponse, ReqwestConnector},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::listing::Query;
use crate::{
    Limits, S3Addressing, S3Credentials, SourceSpec, StoreError,
    limits::{Grant, Limiter},
    patience::{Failure, Patience, Retry},
    requests::{RequestCounters, Verb},
};

/// What a URL carries as it is: the unreserved characters of RFC 3986, which SigV4 wants unencoded.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// In a path also the slash.
const PATH: &AsciiSet = &UNRESERVED.remove(b'/');
const DEFAULT_REGION: &str = "us-east-1";
/// Longer than this no reachable server takes to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Of the body of an error that is read.
const MAX_ERROR: usize = 64 << 10;
/// Of what a server writes into messages of ours.
const MAX_MESSAGE: usize = 300;
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>
const NO_SUCH_BUCKET: &str = "NoSuchBucket";

/// The way to one bucket.
pub(crate) struct Transport {
    client: HttpClient,
    credentials: AwsCredentialProvider,
    region: String,
    bucket: String,
    /// URL of the bucket, without a slash at its end.
    base: String,
    limiter: Limiter,
    progress_timeout: Duration,
    pub(crate) requests: RequestCounters,
}

/// A request, before it is signed.
#[derive(Debug)]
pub(crate) struct Call {
    verb: Verb,
    method: Method,
    /// Path and query below the bucket, encoded.
    target: String,
    headers: HeaderMap,
    /// What it is about, for messages.
    subject: String,
    body: HttpRequestBody,
}

impl Call {
    /// HEAD or GET of an object.
    pub(crate) fn object(verb: Verb, key: &str) -> Self {
        let method = if verb == Verb::Head { Method::HEAD } else { Method::GET };
        let target = format!("/{}", utf8_percent_encode(key, PATH));
        Self {
            verb,
            method,
            target,
            headers: HeaderMap::new(),
            subject: key.to_owned(),
            body: HttpRequestBody::empty(),
        }
    }

    /// With a header.
    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// A page of a listing.
    pub(crate) fn list(query: &Query<'_>) -> Self {
        let Query { prefix, start_after, token, max_keys } = query;
        let max_keys = max_keys.to_string();
        let pairs = [
            ("continuation-token", *token),
            ("delimiter", Some("/")),
            ("encoding-type", Some("url")),
            ("list-type", Some("2")),
            ("max-keys", Some(max_keys.as_str())),
            ("prefix", Some(prefix)),
            ("start-after", *start_after),
        ];
        let encode = |value| utf8_percent_encode(value, UNRESERVED);
        let pairs = pairs.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", encode(value?))));
        Self {
            verb: Verb::List,
            method: Method::GET,
            target: format!("?{}", pairs.collect::<Vec<_>>().join("&")),
            headers: HeaderMap::new(),
            subject: (*prefix).to_owned(),
            body: HttpRequestBody::empty(),
        }
    }

    /// PUT (with a body) or DELETE of an object: what the conformance suite needs.
    #[cfg(test)]
    pub(crate) fn change(key: &str, body: Option<bytes::Bytes>) -> Self {
        let method = if body.is_some() { Method::PUT } else { Method::DELETE };
        let body = body.map_or_else(HttpRequestBody::empty, HttpRequestBody::from);
        Self { method, body, ..Self::object(Verb::Get, key) }
    }

    /// Creates the bucket.
    #[cfg(test)]
    pub(crate) fn create_bucket() -> Self {
        Self { method: Method::PUT, target: String::new(), ..Self::object(Verb::Get, "") }
    }
}

impl Transport {
    pub(crate) fn new(spec: &SourceSpec, bucket: &str, limits: &Limits) -> Result<Self, StoreError> {
        let SourceSpec { uri, s3, credentials } = spec;
        let options = s3.clone().unwrap_or_default();
        let invalid = |why: String| StoreError::Invalid(format!("source '{uri}': {why}"));
        let client_options = ClientOptions::new()
            .with_user_agent(HeaderValue::from_static(concat!("forebay/", env!("CARGO_PKG_VERSION"))))
            .with_allow_http(true)
            // Ours rule: one for the answer to begin and for each of its pieces, one for the whole call.
            .with_timeout_disabled()
            .with_connect_timeout(CONNECT_TIMEOUT.min(limits.progress_timeout))
            .with_pool_max_idle_per_host(limits.concurrency);
        let connected = ReqwestConnector::default().connect(&client_options);
        let client = connected.map_err(|error| invalid(format!("no HTTP client: {error}")))?;
        let (credentials, region) = match credentials {
            Some(S3Credentials { access_key_id, secret_access_key, session_token }) => {
                let credential = AwsCredential {
                    key_id: access_key_id.clone(),
                    secret_key: secret_access_key.clone(),
                    token: session_token.clone(),
                };
                (Arc::new(StaticCredentialProvider::new(credential)) as AwsCredentialProvider, options.region)
            }
            None => {
                let retry = RetryConfig { max_retries: 2, retry_timeout: limits.deadline, ..RetryConfig::default() };
                let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
                if let Some(region) = &options.region {
                    builder = builder.with_region(region);
                }
                let region = builder.get_config_value(&AmazonS3ConfigKey::Region);
                let store = builder.build().map_err(|error| invalid(format!("no credentials: {error}")))?;
                (store.credentials().clone(), region)
            }
        };
        let region = region.unwrap_or_else(|| DEFAULT_REGION.to_owned());
        let base = base_url(options.endpoint.as_deref(), options.addressing, &region, bucket)
            .ok_or_else(|| invalid("the endpoint must be an http:// or https:// URL without a query".to_owned()))?;
        Ok(Self {
            client,
            credentials,
            region,
            bucket: bucket.to_owned(),
            base,
            limiter: Limiter::new(limits),
            progress_timeout: limits.progress_timeout,
            requests: RequestCounters::default(),
        })
    }

    /// How messages name an object.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("s3://{}/{key}", self.bucket)
    }

    /// How long a store may be silent.
    pub(crate) fn progress_timeout(&self) -> Duration {
        self.progress_timeout
    }

    /// Waits until a request that brings `bytes` may go out.
    pub(crate) async fn grant(&self, patience: &mut Patience, bytes: u64) -> Result<Grant, Failure> {
        self.limiter.grant(patience, bytes).await
    }

    /// Sends a request and waits for the headers of its answer; any status but success is a failure.
    pub(crate) async fn call(&self, patience: &mut Patience, call: Call) -> Result<HttpResponse, Failure> {
        let Call { verb, method, target, headers, subject, body } = call;
        let name = self.name(&subject);
        let is_head = method == Method::HEAD;
        let silent = |what: &str| Failure::passing(format!("{name}: {what} in time"));
        let credential = match patience.wait(self.progress_timeout, self.credentials.get_credential()).await {
            Some(Ok(credential)) => Ok(credential),
            Some(Err(error)) => Err(of_credentials(&name, &error)),
            None => Err(silent("no credentials")),
        };
        let credential = credential.inspect_err(|failure| self.requests.failed(verb, failure))?;
        let request = http::Request::builder().method(method).uri(format!("{}{target}", self.base)).body(body);
        let bad_request = |why: &dyn std::fmt::Display| Failure::fatal(StoreError::Invalid(format!("{name}: {why}")));
        let mut request = request.map_err(|error| bad_request(&error))?;
        *request.headers_mut() = headers;
        // The signer panics on these; ours were checked, those of the environment come from elsewhere.
        if [Some(&credential.key_id), credential.token.as_ref()].into_iter().flatten().any(|text| !is_plain(text)) {
            let why = format!("{name}: the credentials have characters that no header can carry");
            return Err(Failure::fatal(StoreError::PermissionDenied(why)));
        }
        let signed = AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(&mut request, None);
        signed.map_err(|error| bad_request(&error))?;
        self.requests.sent(verb);
        let answer = patience.wait(self.progress_timeout, self.client.execute(request)).await;
        let mut no_bucket = false;
        let failure = match answer {
            Some(Ok(response)) if response.status().is_success() => {
                self.requests.answered(verb);
                return Ok(response);
            }
            Some(Ok(response)) => {
                let (status, retry_after) = (response.status(), retry_after(response.headers()));
                let region = response.headers().get("x-amz-bucket-region").and_then(|value| value.to_str().ok());
                let region = region.map(|region| format!(" (the bucket is in region {region})")).unwrap_or_default();
                let document = match is_head {
                    true => ErrorDocument::default(),
                    false => self.error_document(patience, response).await,
                };
                // A prefix without keys is an empty listing.
                no_bucket = status == StatusCode::NOT_FOUND && (verb == Verb::List || document.code == NO_SUCH_BUCKET);
                of_status(&format!("{name}{region}"), status, &document, retry_after)
            }
            // Refused, reset, broken, not HTTP, a bad certificate: all of that passes when somebody mends the store.
            Some(Err(error)) => Failure::passing(format!("{name} at {}: {}", self.base, chain(&error))),
            None => silent(&format!("no answer of {}", self.base)),
        };
        if no_bucket {
            self.requests.broken(verb, &failure);
        } else {
            self.requests.failed(verb, &failure);
        }
        Err(failure)
    }

    /// The body of an answer to a listing, at most `most` bytes.
    pub(crate) async fn text(
        &self,
        patience: &mut Patience,
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
                Some(Some(Ok(_))) => break format!("an answer of over {most} bytes"),
                Some(Some(Err(error))) => break chain(&error),
                None => break "the answer stalled".to_owned(),
            }
        };
        let failure = Failure::passing(format!("{}: {why}", self.name("")));
        self.requests.failed(Verb::List, &failure);
        Err(failure)
    }

    async fn error_document(&self, patience: &mut Patience, response: HttpResponse) -> ErrorDocument {
        // An error whose explanation cannot be read is one without.
        let mut stream = response.into_body().bytes_stream();
        let mut text = Vec::new();
        while let Some(Some(Ok(bytes))) = patience.wait(self.progress_timeout, stream.next()).await {
            if text.len() + bytes.len() > MAX_ERROR {
                break;
            }
            text.extend_from_slice(&bytes);
        }
        quick_xml::de::from_reader(text.as_slice()).unwrap_or_default()
    }
}

/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ErrorDocument {
    code: String,
    message: String,
}

/// What a status means for the caller.
fn of_status(name: &str, status: StatusCode, document: &ErrorDocument, retry_after: Option<Duration>) -> Failure {
    let ErrorDocument { code, message } = document;
    let message: String = message.chars().take(MAX_MESSAGE).collect();
    let text = format!("{name}: {status} {code} {message}").trim_end().to_owned();
    let fatal = |error: fn(String) -> StoreError| Failure::fatal(error(text.clone()));
    let passing = || Failure {
        error: StoreError::Unavailable(text.clone()),
        retry: retry_after.map_or(Retry::Later, Retry::After),
    };
    match (status.as_u16(), code.as_str()) {
        // Temporary credentials that ran out: whoever renews them must do so.
        (400, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => fatal(StoreError::PermissionDenied),
        (400, "RequestTimeout") => passing(),
        (401 | 403, _) => fatal(StoreError::PermissionDenied),
        (404 | 410, _) => fatal(StoreError::NotFound),
        // We ask for ranges within the size of the version: when there is none such, it is another version.
        (412 | 416, _) => fatal(StoreError::VersionMismatch),
        (408 | 409 | 425 | 429, _) => passing(),
        (501 | 505, _) => fatal(StoreError::Invalid),
        (500..=599, _) => passing(),
        // Redirects to another region or endpoint, and requests that the store does not understand.
        _ => fatal(StoreError::Invalid),
    }
}

/// What it means that there are no credentials.
fn of_credentials(name: &str, error: &object_store::Error) -> Failure {
    let text = format!("{name}: no credentials: {}", chain(error));
    match error {
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            Failure::fatal(StoreError::PermissionDenied(text))
        }
        // A metadata service or token service that does not answer.
        _ => Failure::passing(text),
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

/// URL of the bucket.
fn base_url(endpoint: Option<&str>, addressing: Option<S3Addressing>, region: &str, bucket: &str) -> Option<String> {
    let (endpoint, default) = match endpoint {
        Some(endpoint) => (endpoint.trim_end_matches('/').to_owned(), S3Addressing::Path),
        // No certificate covers more than one label before the endpoint.
        None if bucket.contains('.') => (format!("https://s3.{region}.amazonaws.com"), S3Addressing::Path),
        None => (format!("https://s3.{region}.amazonaws.com"), S3Addressing::VirtualHost),
    };
    let url = url::Url::parse(&endpoint).ok()?;
    if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
        return None;
    }
    match addressing.unwrap_or(default) {
        S3Addressing::Path => Some(format!("{endpoint}/{bucket}")),
        S3Addressing::VirtualHost => {
            let (scheme, host) = endpoint.split_once("://")?;
            Some(format!("{scheme}://{bucket}.{host}"))
        }
    }
}

fn is_plain(text: &str) -> bool {
    HeaderValue::from_str(text).is_ok_and(|value| value.to_str().is_ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn statuses_mean_what_the_caller_can_do() {
        let kind = |status: u16, code: &str| {
            let document = ErrorDocument { code: code.to_owned(), message: String::new() };
            let failure = of_status("s3://b/k", StatusCode::from_u16(status).unwrap(), &document, None);
            let name = format!("{:?}", failure.error);
            (name.split('(').next().unwrap().to_owned(), failure.retry)
        };
        let fatal = |name: &str| (name.to_owned(), Retry::Never);
        let passing = ("Unavailable".to_owned(), Retry::Later);
        assert_eq!(kind(301, "PermanentRedirect"), fatal("Invalid"));
        assert_eq!(kind(400, "ExpiredToken"), fatal("PermissionDenied"));
        assert_eq!(kind(400, "RequestTimeout"), passing);
        assert_eq!(kind(400, "AuthorizationHeaderMalformed"), fatal("Invalid"));
        assert_eq!(kind(403, ""), fatal("PermissionDenied"));
        assert_eq!(kind(404, "NoSuchBucket"), fatal("NotFound"));
        assert_eq!(kind(412, ""), fatal("VersionMismatch"));
        assert_eq!(kind(416, ""), fatal("VersionMismatch"));
        assert_eq!(kind(501, "NotImplemented"), fatal("Invalid"));
        for status in [429, 500, 502, 503, 504, 520] {
            assert_eq!(kind(status, ""), passing, "{status}");
        }
    }

    #[test]
    fn bucket_urls() {
        let url = |endpoint, addressing| base_url(endpoint, addressing, "eu-west-1", "data");
        assert_eq!(url(None, None).unwrap(), "https://data.s3.eu-west-1.amazonaws.com");
        assert_eq!(url(None, Some(S3Addressing::Path)).unwrap(), "https://s3.eu-west-1.amazonaws.com/data");
        assert_eq!(url(Some("http://h:1/"), None).unwrap(), "http://h:1/data");
        assert_eq!(url(Some("http://h:1"), Some(S3Addressing::VirtualHost)).unwrap(), "http://data.h:1");
        assert_eq!(base_url(None, None, "r", "a.b").unwrap(), "https://s3.r.amazonaws.com/a.b");
        assert_eq!(url(Some("h:1"), None), None);
        assert_eq!(url(Some("ftp://h"), None), None);
    }

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
