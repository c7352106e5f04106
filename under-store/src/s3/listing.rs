//! ListObjectsV2: the question and its answer.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html>

use forebay_protocol::identity::is_valid_name;
use percent_encoding::percent_decode;
use serde::Deserialize;

use crate::{Item, ItemKind, Page, version::State};

/// Most bytes of an answer: 1,000 keys of 1 KiB, percent-encoded (three times the size), with 1 KiB around each, twice
/// over.
pub(crate) const MAX_REPLY: usize = 8 << 20;

/// A page that is asked for.
#[derive(Debug)]
pub(crate) struct Query<'a> {
    pub(crate) prefix: &'a str,
    pub(crate) start_after: Option<&'a str>,
    pub(crate) token: Option<&'a str>,
    pub(crate) max_keys: usize,
}

/// An answer. Values that one entry may have wrong are taken as text: they must not fail the others.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Reply {
    /// Required: it tells a listing from other documents, such as an error that came with status 200.
    is_truncated: bool,
    next_continuation_token: Option<String>,
    encoding_type: Option<String>,
    #[serde(default)]
    contents: Vec<Content>,
    #[serde(default)]
    common_prefixes: Vec<CommonPrefix>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Content {
    #[serde(default)]
    key: String,
    size: Option<String>,
    last_modified: Option<String>,
    #[serde(rename = "ETag")]
    e_tag: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CommonPrefix {
    #[serde(default)]
    prefix: String,
}

/// An entry by its sort key; `None`: it cannot be shown.
type Line = (Vec<u8>, Option<ItemKind>);

impl Reply {
    /// From XML.
    pub(crate) fn parse(xml: &[u8]) -> Result<Self, String> {
        let reply: Self = quick_xml::de::from_reader(xml).map_err(|error| error.to_string())?;
        if reply.is_truncated && reply.next_continuation_token.is_none() {
            return Err("it is truncated, but has no continuation token".to_owned());
        }
        Ok(reply)
    }

    /// The page of the directory at `prefix` that follows `after`, and the token to go on with when the store has
    /// more. The page has a `next` if and only if the store has more and this page got past `after`.
    pub(crate) fn into_page(self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> (Page, Option<String>) {
        let Self { is_truncated, next_continuation_token, encoding_type, contents, common_prefixes } = self;
        let encoded = encoding_type.is_some_and(|encoding| encoding.eq_ignore_ascii_case("url"));
        let mut stray = 0;
        let mut lines = Vec::with_capacity(contents.len() + common_prefixes.len());
        for Content { key, size, last_modified, e_tag } in contents {
            let key = decode(key, encoded);
            match key.strip_prefix(prefix) {
                // The directory's own marker.
                Some([]) => {}
                Some(name) => lines.push(file(name, size, e_tag.as_deref(), last_modified.as_deref())),
                // The store says something else than it was asked, or than it meant.
                None => stray += 1,
            }
        }
        for CommonPrefix { prefix: common } in common_prefixes {
            let common = decode(common, encoded);
            match common.strip_prefix(prefix).filter(|rest| rest.ends_with(b"/")) {
                Some(rest) => {
                    let shown = is_valid_name(&rest[..rest.len() - 1]);
                    lines.push((rest.to_vec(), shown.then_some(ItemKind::Directory)));
                }
                None => stray += 1,
            }
        }
        lines.sort_by(|(left, _), (right, _)| left.cmp(right));
        lines.retain(|(sort_key, _)| after.is_none_or(|after| sort_key.as_slice() > after));
        // More than was asked for: what is cut off is asked for again.
        let cut = lines.len() > limit;
        lines.truncate(limit);
        let last = lines.last().map(|(sort_key, _)| sort_key.clone());
        let next = if is_truncated || cut { last } else { None };
        let mut page = Page { items: Vec::with_capacity(lines.len()), next, hidden: stray };
        for (mut name, kind) in lines {
            match kind {
                Some(kind) => {
                    if matches!(kind, ItemKind::Directory) {
                        name.pop();
                    }
                    page.items.push(Item { name, kind });
                }
                None => page.hidden += 1,
            }
        }
        (page, next_continuation_token.filter(|_| is_truncated))
    }
}

fn file(name: &[u8], size: Option<String>, etag: Option<&str>, modified: Option<&str>) -> Line {
    let size = size.and_then(|size| size.trim().parse().ok());
    let kind = size.filter(|_| is_valid_name(name)).and_then(|size| {
        let state = State::new(etag, modified, size);
        Some(ItemKind::File { size, mtime_ns: state.mtime_ns(), version: state.version()? })
    });
    (name.to_vec(), kind)
}

/// `encoding-type=url` is the encoding of forms: a space is `+`.
fn decode(text: String, encoded: bool) -> Vec<u8> {
    if !encoded {
        return text.into_bytes();
    }
    percent_decode(text.replace('+', " ").as_bytes()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn content(key: &str) -> String {
        format!(
            "<Contents><Key>{key}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>\
             <ETag>&quot;e&quot;</ETag><Size>3</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    }

    fn reply(inside: &str) -> Reply {
        Reply::parse(
            format!("<ListBucketResult><EncodingType>url</EncodingType>{inside}</ListBucketResult>").as_bytes(),
        )
        .unwrap()
    }

    fn names(page: &Page) -> Vec<String> {
        page.items.iter().map(|item| String::from_utf8_lossy(&item.sort_key()).into_owned()).collect()
    }

    #[test]
    fn odd_keys_are_shown_or_counted() {
        let long = "x".repeat(256);
        let keys = ["d/", "d/a+b", "d/a%2Bb", "d/%0A", "d/100%25", "d/.", "d/..", "d/%00", &format!("d/{long}"), "e/x"];
        let contents: String = keys.iter().map(|key| content(key)).collect();
        let prefixes: String = ["d/s/", "d//", "d/../", "d/s"]
            .iter()
            .map(|prefix| format!("<CommonPrefixes><Prefix>{prefix}</Prefix></CommonPrefixes>"))
            .collect();
        let (page, token) =
            reply(&format!("<IsTruncated>false</IsTruncated>{contents}{prefixes}")).into_page(b"d/", None, 99);
        assert_eq!(names(&page), ["\n", "100%", "a b", "a+b", "s/"]);
        assert_eq!((page.hidden, page.next, token), (8, None, None));
        let ItemKind::File { size, mtime_ns, version } = &page.items[0].kind else { panic!("a file") };
        assert_eq!((*size, *mtime_ns, version.as_bytes()), (3, 1_445_412_480_000_000_000, b"\"e\"".as_slice()));
    }

    #[test]
    fn one_bad_entry_does_not_fail_the_others() {
        let bad = "<Contents><Key>b</Key><Size>many</Size></Contents><Contents><Size>1</Size></Contents>";
        let xml = format!("<IsTruncated>false</IsTruncated>{}{bad}{}", content("a"), content("c"));
        let (page, _) = reply(&xml).into_page(b"", None, 99);
        assert_eq!(names(&page), ["a", "c"]);
        assert_eq!(page.hidden, 1);
    }

    #[test]
    fn pages_end_where_they_say() {
        let truncated = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>";
        let xml = format!("{truncated}{}<CommonPrefixes><Prefix>b/</Prefix></CommonPrefixes>", content("a"));
        let (page, token) = reply(&xml).into_page(b"", None, 99);
        assert_eq!((page.next.as_deref(), token.as_deref()), (Some(b"b/".as_slice()), Some("t")));
        // Nothing new: the caller goes on with the token.
        let (page, token) = reply(&xml).into_page(b"", Some(b"b/"), 99);
        assert_eq!((page, token.as_deref()), (Page::default(), Some("t")));
        // More than was asked for.
        let xml = format!("<IsTruncated>false</IsTruncated>{}{}", content("a"), content("b"));
        let (page, token) = reply(&xml).into_page(b"", None, 1);
        assert_eq!((names(&page), page.next.as_deref(), token), (vec!["a".to_owned()], Some(b"a".as_slice()), None));
    }

    #[test]
    fn other_documents_are_refused() {
        for xml in ["", "<Error><Code>InternalError</Code></Error>", "<ListBucketResult><Contents>", "nonsense"] {
            assert!(Reply::parse(xml.as_bytes()).is_err(), "{xml}");
        }
        assert!(Reply::parse(b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>").is_err());
    }
}
