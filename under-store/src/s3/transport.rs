//! Signed requests, one attempt each, and the one place where their failures get a meaning.

use std::sync::Arc;

use forebay_protocol::errors::chain;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use object_store::{
    RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsAuthorizer, AwsCredential, AwsCredentialProvider},
    client::{HttpRequestBody, HttpResponse},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::listing::Query;
use crate::{
    Limits, S3Addressing, S3Credentials, SourceSpec, StoreError,
    limits::Limiter,
    patience::{Failure, Patience},
    requests::Verb,
    wire::{self, Wire},
};

/// What a URL carries as it is: the unreserved characters of RFC 3986, which SigV4 wants unencoded.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// In a path also the slash.
const PATH: &AsciiSet = &UNRESERVED.remove(b'/');
const DEFAULT_REGION: &str = "us-east-1";
/// Of what a server writes into messages of ours.
const MAX_MESSAGE: usize = 300;
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>
const NO_SUCH_BUCKET: &str = "NoSuchBucket";

/// The way to one bucket.
pub(crate) struct Transport {
    credentials: AwsCredentialProvider,
    region: String,
    bucket: String,
    /// URL of the bucket, without a slash at its end.
    base: String,
    pub(crate) wire: Wire,
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

    /// With headers.
    pub(crate) fn headers(self, headers: HeaderMap) -> Self {
        Self { headers, ..self }
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
    pub(crate) fn new(spec: &SourceSpec, bucket: &str, limits: &Limits, limiter: Limiter) -> Result<Self, StoreError> {
        let SourceSpec { uri, s3, credentials } = spec;
        let options = s3.clone().unwrap_or_default();
        let invalid = |why: String| StoreError::Invalid(format!("source '{uri}': {why}"));
        let wire = Wire::new(limits, limiter)?;
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
        Ok(Self { credentials, region, bucket: bucket.to_owned(), base, wire })
    }

    /// How messages name an object.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("s3://{}/{key}", self.bucket)
    }

    /// Sends a request and waits for the headers of its answer; any status but success is a failure.
    pub(crate) async fn call(&self, patience: &mut Patience, call: Call) -> Result<HttpResponse, Failure> {
        let Call { verb, method, target, headers, subject, body } = call;
        let name = self.name(&subject);
        let is_head = method == Method::HEAD;
        let credential = match patience.wait(self.wire.progress_timeout(), self.credentials.get_credential()).await {
            Some(Ok(credential)) => Ok(credential),
            Some(Err(error)) => Err(of_credentials(&name, &error)),
            None => Err(Failure::passing(format!("{name}: no credentials in time"))),
        };
        let credential = credential.inspect_err(|failure| self.wire.requests.failed(verb, failure))?;
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
        let mut no_bucket = false;
        let failure = match self.wire.send(patience, verb, &name, request).await {
            Ok(response) if response.status().is_success() => {
                self.wire.requests.answered(verb);
                return Ok(response);
            }
            Ok(response) => {
                let (status, headers) = (response.status(), response.headers().clone());
                let region = headers.get("x-amz-bucket-region").and_then(|value| value.to_str().ok());
                let region = region.map(|region| format!(" (the bucket is in region {region})")).unwrap_or_default();
                let document = match is_head {
                    true => ErrorDocument::default(),
                    false => ErrorDocument::parse(&self.wire.explanation(patience, response).await),
                };
                // A prefix without keys is an empty listing.
                no_bucket = status == StatusCode::NOT_FOUND && (verb == Verb::List || document.code == NO_SUCH_BUCKET);
                of_status(&format!("{name}{region}"), status, &headers, &document)
            }
            Err(failure) => failure,
        };
        if no_bucket {
            self.wire.requests.broken(verb, &failure);
        } else {
            self.wire.requests.failed(verb, &failure);
        }
        Err(failure)
    }
}

/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ErrorDocument {
    code: String,
    message: String,
}

impl ErrorDocument {
    fn parse(text: &[u8]) -> Self {
        quick_xml::de::from_reader(text).unwrap_or_default()
    }
}

/// What a status means for the caller, with what S3 adds to it.
fn of_status(name: &str, status: StatusCode, headers: &HeaderMap, document: &ErrorDocument) -> Failure {
    let ErrorDocument { code, message } = document;
    let message: String = message.chars().take(MAX_MESSAGE).collect();
    let text = format!("{name}: {status} {code} {message}").trim_end().to_owned();
    match (status.as_u16(), code.as_str()) {
        // Temporary credentials that ran out: whoever renews them must do so.
        (400, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => {
            Failure::fatal(StoreError::PermissionDenied(text))
        }
        (400, "RequestTimeout") => wire::of_status(StatusCode::REQUEST_TIMEOUT, headers, text),
        _ => wire::of_status(status, headers, text),
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
    use crate::patience::Retry;

    #[test]
    fn statuses_mean_what_the_caller_can_do() {
        let kind = |status: u16, code: &str| {
            let document = ErrorDocument { code: code.to_owned(), message: String::new() };
            let failure = of_status("s3://b/k", StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), &document);
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
}
