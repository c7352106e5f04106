//! Where a source is and how to reach it.

use std::{fmt, path::PathBuf};

use http::HeaderValue;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::StoreError;

/// A source of data.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceSpec {
    /// `s3://bucket/prefix/`, taken literally as S3 tools do (no percent-encoding), or `file:///dir`, a file URL (RFC
    /// 8089, percent-encoded where needed), or `http://host/dir/` and `https://host/dir/`, a directory of a web server
    /// with WebDAV (percent-encoded where needed).
    pub uri: String,
    /// How to reach an S3 store; for `s3://` only.
    #[serde(default)]
    pub s3: Option<S3Options>,
    /// For `s3://` only. Without them the environment gives them, as AWS defines it: variables, web identity,
    /// container and instance credentials.
    #[serde(default)]
    pub credentials: Option<S3Credentials>,
}

/// How to reach an S3 store.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct S3Options {
    /// `http://` or `https://` URL; default: AWS in the region.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Default: `us-east-1`, or what the environment says when it gives the credentials.
    #[serde(default)]
    pub region: Option<String>,
    /// Default: `Path` with an endpoint, `VirtualHost` without.
    #[serde(default)]
    pub addressing: Option<S3Addressing>,
}

/// Where requests name the bucket.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub enum S3Addressing {
    /// `https://host/bucket/key`.
    Path,
    /// `https://bucket.host/key`.
    VirtualHost,
}

/// Static credentials of S3. `Debug` shows no secret.
#[derive(Clone, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct S3Credentials {
    /// Access key id.
    pub access_key_id: String,
    /// Secret access key.
    pub secret_access_key: String,
    /// Token of temporary credentials.
    #[serde(default)]
    pub session_token: Option<String>,
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { access_key_id, secret_access_key: _, session_token } = self;
        f.debug_struct("S3Credentials")
            .field("access_key_id", access_key_id)
            .field("secret_access_key", &"redacted")
            .field("session_token", &session_token.as_ref().map(|_| "redacted"))
            .finish()
    }
}

/// A parsed URI.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Location {
    S3 {
        bucket: String,
        /// Empty, or with a slash at its end.
        prefix: String,
    },
    File {
        root: PathBuf,
    },
    Http {
        /// With a slash at its end.
        root: Url,
    },
}

impl Location {
    /// Checks a spec as far as that goes without asking the store.
    pub(crate) fn parse(spec: &SourceSpec) -> Result<Self, StoreError> {
        let SourceSpec { uri, s3, credentials } = spec;
        let invalid = |why: &str| Err(StoreError::Invalid(format!("source '{uri}': {why}")));
        if let Some(rest) = uri.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let bucket_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            if !(1..=255).contains(&bucket.len()) || !bucket.bytes().all(bucket_byte) || bucket.starts_with('.') {
                return invalid("that is no bucket name");
            }
            // URLs cannot carry them: every client resolves them before it asks.
            if prefix.split('/').any(|component| component == "." || component == "..") {
                return invalid("a prefix with a component '.' or '..' cannot be reached");
            }
            if let Some(credentials) = credentials {
                let sendable = |text: &str| HeaderValue::from_str(text).is_ok_and(|value| value.to_str().is_ok());
                let token = credentials.session_token.as_deref().unwrap_or_default();
                if credentials.access_key_id.is_empty() || credentials.secret_access_key.is_empty() {
                    return invalid("the credentials are empty");
                }
                if !sendable(&credentials.access_key_id) || !sendable(token) {
                    return invalid("the credentials have characters that no header can carry");
                }
            }
            let slash = if prefix.is_empty() || prefix.ends_with('/') { "" } else { "/" };
            return Ok(Self::S3 { bucket: bucket.to_owned(), prefix: format!("{prefix}{slash}") });
        }
        if uri.starts_with("file://") {
            if s3.is_some() || credentials.is_some() {
                return invalid("'s3' and 'credentials' are for s3:// only");
            }
            let path = Url::parse(uri).ok().filter(|url| url.query().is_none() && url.fragment().is_none());
            return match path.and_then(|url| url.to_file_path().ok()) {
                Some(root) => Ok(Self::File { root }),
                None => invalid("that is no file URL of this machine (file:///dir)"),
            };
        }
        if uri.starts_with("http://") || uri.starts_with("https://") {
            if s3.is_some() || credentials.is_some() {
                return invalid("'s3' and 'credentials' are for s3:// only");
            }
            let Some(mut root) = Url::parse(uri).ok().filter(Url::has_host) else {
                return invalid("that is no URL; write it as http://host/dir/ or https://host/dir/");
            };
            if !root.username().is_empty() || root.password().is_some() {
                return invalid("credentials of web servers are not supported; remove them from the URL");
            }
            if root.query().is_some() || root.fragment().is_some() {
                return invalid("a query or fragment names no directory; remove what begins with '?' or '#'");
            }
            // Every client resolves them before it asks.
            if uri.split('/').any(|component| component == "." || component == "..") {
                return invalid("a path with a component '.' or '..' cannot be reached");
            }
            if !root.path().ends_with('/') {
                root.set_path(&format!("{}/", root.path()));
            }
            return Ok(Self::Http { root });
        }
        invalid("known are s3://bucket/prefix/, file:///dir, http://host/dir/ and https://host/dir/")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(uri: &str) -> Option<Location> {
        Location::parse(&SourceSpec { uri: uri.to_owned(), s3: None, credentials: None }).ok()
    }

    #[test]
    fn uris_are_parsed_or_refused() {
        let s3 =
            |bucket: &str, prefix: &str| Some(Location::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() });
        assert_eq!(parse("s3://b"), s3("b", ""));
        assert_eq!(parse("s3://b/"), s3("b", ""));
        assert_eq!(parse("s3://b/a b/100%"), s3("b", "a b/100%/"));
        assert_eq!(parse("s3://b/a/"), s3("b", "a/"));
        assert_eq!(parse("file:///a%20b/c"), Some(Location::File { root: PathBuf::from("/a b/c") }));
        let http = |root: &str| Some(Location::Http { root: Url::parse(root).unwrap() });
        assert_eq!(parse("http://h"), http("http://h/"));
        assert_eq!(parse("https://h:8443/a b/%63"), http("https://h:8443/a%20b/%63/"));
        assert_eq!(parse("http://[::1]/a/"), http("http://[::1]/a/"));
        for bad in [
            "",
            "b/c",
            "s3://",
            "s3:///x",
            "s3://a b/",
            "s3://b/../c",
            "ftp://b",
            "file://host/x",
            "file:///a?b",
            "http://",
            "http://h:x/",
            "http://me:hush@h/",
            "http://h/?x",
            "http://h/a/../b",
            "https://h/a#b",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        let credentials =
            S3Credentials { access_key_id: "id".to_owned(), secret_access_key: "hush".to_owned(), session_token: None };
        let spec = SourceSpec { uri: "http://h/".to_owned(), s3: None, credentials: Some(credentials) };
        assert!(Location::parse(&spec).is_err());
    }

    #[test]
    fn debug_shows_no_secret_and_serde_keeps_all() {
        let spec: SourceSpec = serde_json::from_str(
            r#"{"uri": "s3://b", "s3": {"endpoint": "http://x", "addressing": "VirtualHost"},
                "credentials": {"accessKeyId": "id", "secretAccessKey": "hush", "sessionToken": "still"}}"#,
        )
        .unwrap();
        let shown = format!("{spec:?}");
        assert!(shown.contains("id") && !shown.contains("hush") && !shown.contains("still"), "{shown}");
        let again: SourceSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(again, spec);
        assert!(serde_json::from_str::<SourceSpec>(r#"{"uri": "s3://b", "bucket": "b"}"#).is_err());
    }

    #[test]
    fn credentials_that_no_header_can_carry_are_refused() {
        let credentials = |id: &str| {
            Some(S3Credentials { access_key_id: id.to_owned(), secret_access_key: "s".to_owned(), session_token: None })
        };
        let parse =
            |id| Location::parse(&SourceSpec { uri: "s3://b".to_owned(), s3: None, credentials: credentials(id) });
        assert!(parse("id").is_ok());
        assert!(parse("").is_err());
        assert!(parse("a\nb").is_err());
    }
}
