//! What a server says about an object, and the version key made of it.
//!
//! The key is the ETag as sent, with its quotes (some stores leave them out in listings: they are added, so that
//! listing, HEAD and GET agree). A weak ETag (`W/"..."`) promises nothing about bytes and never satisfies If-Match;
//! without a strong one the key is `lm:SECONDS:SIZE`, from Last-Modified and size. The two forms cannot be confused:
//! only ETags begin with a quote.

use chrono::DateTime;
use forebay_protocol::{VersionKey, identity::MAX_VERSION_KEY};
use http::{HeaderMap, HeaderName, HeaderValue, header};

/// An object as a listing or the headers of an answer show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    /// A strong one.
    pub(crate) etag: Option<String>,
    /// Seconds since the epoch.
    pub(crate) modified: Option<i64>,
    pub(crate) size: u64,
}

impl State {
    /// From the headers of a HEAD or GET; `size` is the whole object's.
    pub(crate) fn of_headers(headers: &HeaderMap, size: u64) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        Self::new(text(header::ETAG), text(header::LAST_MODIFIED), size)
    }

    /// From the texts of headers or of an entry of a listing: S3 lists times by RFC 3339, WebDAV by RFC 9110 as
    /// headers have them.
    pub(crate) fn new(etag: Option<&str>, modified: Option<&str>, size: u64) -> Self {
        let time = |text| DateTime::parse_from_rfc2822(text).or_else(|_| DateTime::parse_from_rfc3339(text)).ok();
        let modified = modified.and_then(|text| time(text.trim()));
        Self { etag: etag.and_then(strong_etag), modified: modified.map(|time| time.timestamp()), size }
    }

    /// The version key; `None` when the store says nothing to make one of.
    pub(crate) fn version(&self) -> Option<VersionKey> {
        let key = match &self.etag {
            Some(etag) => etag.clone(),
            None => self.weak_key()?,
        };
        VersionKey::new(key.into_bytes())
    }

    /// Nanoseconds since the epoch.
    pub(crate) fn mtime_ns(&self) -> i64 {
        self.modified.unwrap_or(0).saturating_mul(1_000_000_000)
    }

    /// Whether this is `version` with `size` bytes.
    pub(crate) fn is(&self, version: &VersionKey, size: u64) -> bool {
        let key = if version.as_bytes().starts_with(b"\"") { self.etag.clone() } else { self.weak_key() };
        self.size == size && key.is_some_and(|key| key.as_bytes() == version.as_bytes())
    }

    fn weak_key(&self) -> Option<String> {
        Some(format!("lm:{}:{}", self.modified?, self.size))
    }
}

/// The header that makes a request conditional on `version`; `None`: that is no version key of ours.
pub(crate) fn condition(version: &VersionKey) -> Option<(HeaderName, HeaderValue)> {
    let key = std::str::from_utf8(version.as_bytes()).ok()?;
    if key.starts_with('"') {
        return Some((header::IF_MATCH, HeaderValue::from_str(key).ok()?));
    }
    let (seconds, _) = key.strip_prefix("lm:")?.split_once(':')?;
    let time = DateTime::from_timestamp(seconds.parse().ok()?, 0)?;
    let date = time.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
    Some((header::IF_UNMODIFIED_SINCE, HeaderValue::from_str(&date).ok()?))
}

/// Content-Length.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// Content-Range (RFC 9110, section 14.4): first byte, one past the last, size of the whole.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<(u64, u64, u64)> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?, size.parse().ok()?))
}

/// An ETag that identifies bytes, in quotes; `None` for weak ones and what no header can carry.
fn strong_etag(sent: &str) -> Option<String> {
    let sent = sent.trim();
    let inner = sent.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(sent);
    // RFC 9110, section 8.8.3: visible characters, no quote. A weak one has quotes within.
    let valid = !inner.is_empty() && inner.len() + 2 <= MAX_VERSION_KEY && !inner.starts_with("W/");
    (valid && inner.bytes().all(|byte| byte == b'!' || (b'#'..=b'~').contains(&byte))).then(|| format!("\"{inner}\""))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    const HEADER_TIME: &str = "Wed, 21 Oct 2015 07:28:00 GMT";
    const LISTED_TIME: &str = "2015-10-21T07:28:00.789Z";

    #[test]
    fn listing_and_headers_agree() {
        for (listed, sent) in [("\"ab-2\"", "\"ab-2\""), ("ab", "\"ab\""), ("W/\"ab\"", "W/\"ab\""), ("", "W/\"x\"")] {
            let listed = State::new(Some(listed), Some(LISTED_TIME), 7);
            let sent = headers(&[(header::ETAG, sent), (header::LAST_MODIFIED, HEADER_TIME)]);
            let sent = State::of_headers(&sent, 7);
            assert_eq!(listed, sent);
            let version = listed.version().unwrap();
            assert!(sent.is(&version, 7) && !sent.is(&version, 8));
            assert!(condition(&version).is_some());
        }
    }

    #[test]
    fn conditions_are_those_of_http() {
        let etag = VersionKey::new("\"ab\"").unwrap();
        assert_eq!(condition(&etag), Some((header::IF_MATCH, HeaderValue::from_static("\"ab\""))));
        let weak = State::new(Some("W/\"ab\""), Some(LISTED_TIME), 7).version().unwrap();
        assert_eq!(weak.as_bytes(), b"lm:1445412480:7");
        assert_eq!(condition(&weak), Some((header::IF_UNMODIFIED_SINCE, HeaderValue::from_static(HEADER_TIME))));
        assert_eq!(condition(&VersionKey::new("what").unwrap()), None);
        assert_eq!(State::new(None, Some("yesterday"), 1).version(), None);
        assert_eq!(State::new(Some("a\"b"), None, 1).version(), None);
    }

    #[test]
    fn content_ranges_are_parsed_or_refused() {
        let parse = |text| content_range(&headers(&[(header::CONTENT_RANGE, text)]));
        assert_eq!(parse("bytes 0-9/100"), Some((0, 10, 100)));
        for bad in ["", "bytes 0-9", "bytes */100", "bytes 0-18446744073709551615/3", "0-9/100", "bytes 0-9/*"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
