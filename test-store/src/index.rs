//! Keys of a bucket in the order of S3 (bytes), and the listing over them.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

/// Keys of one bucket.
pub(crate) type Keys<T> = BTreeMap<Vec<u8>, Arc<T>>;

/// Where a listing goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cursor {
    /// After this key.
    AfterKey(Vec<u8>),
    /// After all keys that begin so.
    AfterPrefix(Vec<u8>),
}

impl Cursor {
    /// As a continuation token.
    pub(crate) fn token(&self) -> String {
        let (letter, bytes) = match self {
            Self::AfterKey(key) => ('k', key),
            Self::AfterPrefix(prefix) => ('p', prefix),
        };
        bytes.iter().fold(letter.to_string(), |token, byte| token + &format!("{byte:02x}"))
    }

    /// From a continuation token.
    pub(crate) fn parse(token: &str) -> Option<Self> {
        let (letter, hex) = token.split_at_checked(1)?;
        let bytes = hex
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect::<Option<Vec<u8>>>()?;
        match letter {
            "k" => Some(Self::AfterKey(bytes)),
            "p" if !bytes.is_empty() => Some(Self::AfterPrefix(bytes)),
            _ => None,
        }
    }
}

/// One line of a listing.
#[derive(Debug)]
pub(crate) enum Line<T> {
    /// A key.
    Key(Vec<u8>, Arc<T>),
    /// All keys that begin so, to the delimiter.
    Prefix(Vec<u8>),
}

/// A page of a listing.
#[derive(Debug)]
pub(crate) struct Listing<T> {
    pub(crate) lines: Vec<Line<T>>,
    /// Where to go on; `None`: that was all.
    pub(crate) next: Option<Cursor>,
}

/// Lists at most `max` lines of `keys` under `prefix`. As on S3, a common prefix counts as one line, and one of whose
/// keys some lie after a key to start after is listed again.
pub(crate) fn list<T>(
    keys: &Keys<T>,
    prefix: &[u8],
    delimiter: Option<&[u8]>,
    start: Option<Cursor>,
    max: usize,
) -> Listing<T> {
    let mut lines = Vec::new();
    let mut cursor = start;
    loop {
        let from = match &cursor {
            Some(Cursor::AfterKey(key)) if key.as_slice() >= prefix => Bound::Excluded(key.clone()),
            Some(Cursor::AfterPrefix(after)) if after.as_slice() >= prefix => Bound::Included(successor(after)),
            _ => Bound::Included(prefix.to_vec()),
        };
        let Some((key, value)) = keys.range((from, Bound::Unbounded)).next().filter(|(key, _)| key.starts_with(prefix))
        else {
            return Listing { lines, next: None };
        };
        if lines.len() == max {
            // S3 answers `max-keys=0` with an empty listing that is complete.
            return Listing { lines, next: cursor.filter(|_| max > 0) };
        }
        let rest = &key[prefix.len()..];
        let end = delimiter.and_then(|delimiter| {
            rest.windows(delimiter.len()).position(|window| window == delimiter).map(|at| at + delimiter.len())
        });
        if let Some(end) = end {
            let common = key[..prefix.len() + end].to_vec();
            lines.push(Line::Prefix(common.clone()));
            cursor = Some(Cursor::AfterPrefix(common));
        } else {
            lines.push(Line::Key(key.clone(), value.clone()));
            cursor = Some(Cursor::AfterKey(key.clone()));
        }
    }
}

/// The smallest key after all that begin with `prefix`.
fn successor(prefix: &[u8]) -> Vec<u8> {
    let mut key = prefix.to_vec();
    // Keys are UTF-8, so no byte is 0xff and there is one to increment (a prefix of a cursor is never empty).
    if let Some(last) = key.last_mut() {
        *last = last.saturating_add(1);
    }
    key
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn name(line: &Line<()>) -> Vec<u8> {
        match line {
            Line::Key(key, _) => key.clone(),
            Line::Prefix(prefix) => prefix.clone(),
        }
    }

    proptest! {
        #[test]
        fn pages_give_what_the_definition_gives(
            keys in prop::collection::btree_set("[a-b/.0é]{1,6}", 0..40),
            prefix in "[a-b/]{0,2}",
            max in 1usize..5,
        ) {
            let index: Keys<()> = keys.iter().map(|key| (key.clone().into_bytes(), Arc::new(()))).collect();
            let mut expected = BTreeSet::new();
            for key in keys.iter().filter(|key| key.starts_with(&prefix)) {
                let end = key[prefix.len()..].find('/').map_or(key.len(), |at| prefix.len() + at + 1);
                expected.insert(key.as_bytes()[..end].to_vec());
            }
            let (mut seen, mut start) = (Vec::new(), None);
            loop {
                let page = list(&index, prefix.as_bytes(), Some(b"/"), start, max);
                prop_assert!(page.lines.len() <= max);
                seen.extend(page.lines.iter().map(name));
                let Some(next) = page.next else { break };
                let parsed = Cursor::parse(&next.token());
                prop_assert_eq!(parsed.as_ref(), Some(&next));
                start = parsed;
            }
            prop_assert_eq!(seen, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn starting_within_a_common_prefix_lists_it_again() {
        let index: Keys<()> =
            ["d-x", "d/a", "d/z", "d0"].iter().map(|key| (key.as_bytes().to_vec(), Arc::new(()))).collect();
        let start = |key: &str| Some(Cursor::AfterKey(key.as_bytes().to_vec()));
        let names = |start| list(&index, b"", Some(b"/"), start, 10).lines.iter().map(name).collect::<Vec<_>>();
        assert_eq!(names(start("d/a")), [b"d/".to_vec(), b"d0".to_vec()]);
        assert_eq!(names(start("d/z")), [b"d0".to_vec()]);
    }
}
