//! Files that are named, by a file of the dataset or by the request: one path a line, loaded in this order.
//!
//! Nothing of the tree is walked but directories that are named. Every worker reads the manifest and looks up what it
//! names, for only a file's version tells whose it is. What is named and not there has failed; one worker counts it.

use std::ops::Range;

use bytes::Bytes;
use forebay_client::{ClientError, EntryKind};
use forebay_protocol::{DatasetPath, identity::directory_placement_key};
use futures::{Stream, StreamExt, stream};

use super::{Found, files, selection::ManifestAt};
use crate::{dataset::Dataset, worker::Worker};

/// Largest manifest: 1.5 million paths of 42 bytes. It is in memory while its load lasts, with 16 bytes for each line.
const MAX_BYTES: u64 = 64 << 20;
/// Most lines of it that name something.
const MAX_LINES: usize = 2_000_000;
/// Bytes of it that are read at once; a quarter of what the client of a worker may have.
const PIECE: u64 = 1 << 20;
/// Look-ups under way.
const LOOK_UPS: usize = 32;

/// What a manifest names.
pub(super) enum Named {
    File(Found),
    /// There is no such file or directory.
    Missing(DatasetPath),
}

/// A manifest: paths that are valid, none of them twice or below another one.
#[derive(Debug)]
struct Manifest {
    text: Bytes,
    lines: Vec<Range<usize>>,
}

impl Manifest {
    /// The reason names the line.
    fn parse(text: Bytes) -> Result<Self, String> {
        let mut lines = Vec::new();
        let mut begin = 0;
        for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let path = normal(line);
            if !line.trim_ascii().is_empty() {
                path_of(path).map_err(|why| format!("line {}: {why}", number + 1))?;
                // Where it stands: what was cut off is counted in.
                let from = begin + (path.as_ptr() as usize - line.as_ptr() as usize);
                if lines.len() == MAX_LINES {
                    return Err(format!("line {}: it has more than {MAX_LINES}: split it", number + 1));
                }
                lines.push(from..from + path.len());
            }
            begin += line.len() + 1;
        }
        let mut sorted: Vec<usize> = (0..lines.len()).collect();
        sorted.sort_by(|a, b| text[lines[*a].clone()].cmp(&text[lines[*b].clone()]).then(a.cmp(b)));
        let is_named = |path: &[u8]| sorted.binary_search_by(|at| text[lines[*at].clone()].cmp(path)).is_ok();
        let mut keep = vec![true; lines.len()];
        for (place, at) in sorted.iter().enumerate() {
            let path = &text[lines[*at].clone()];
            let twice = place > 0 && text[lines[sorted[place - 1]].clone()] == *path;
            // Of the root the name is empty.
            let above = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(slash, _)| &path[..slash]);
            let below = above.chain((!path.is_empty()).then_some(&b""[..])).any(is_named);
            keep[*at] = !twice && !below;
        }
        let mut kept = keep.into_iter();
        lines.retain(|_| kept.next().unwrap_or_default());
        Ok(Self { text, lines })
    }

    fn paths(self) -> impl Iterator<Item = DatasetPath> {
        let Self { text, lines } = self;
        // They were valid.
        lines.into_iter().filter_map(move |line| path_of(&text[line]).ok())
    }
}

/// A path without what may stand around it: slashes, and the end of a line of some editors.
fn normal(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let line = line.strip_prefix(b"/").unwrap_or(line);
    line.strip_suffix(b"/").unwrap_or(line)
}

fn path_of(below_root: &[u8]) -> Result<DatasetPath, forebay_protocol::InvalidPath> {
    DatasetPath::parse(Bytes::from([b"/", below_root].concat()))
}

/// What the manifest names at or below `path`, in its order.
pub(super) async fn named<'a>(
    worker: &'a Worker,
    dataset: &'a Dataset,
    manifest: &ManifestAt,
    path: &'a DatasetPath,
) -> Result<impl Stream<Item = Result<Named, ClientError>> + Send + Unpin + use<'a>, ClientError> {
    let (text, name) = match manifest {
        ManifestAt::File(at) => {
            let about = |error| match error {
                ClientError::NotFound | ClientError::NotDirectory => {
                    ClientError::Invalid(format!("the manifest {at} is not there"))
                }
                other => other,
            };
            (read(worker, dataset, at).await.map_err(about)?.into(), format!("the manifest {at}"))
        }
        ManifestAt::Here(text) => (text.clone(), "the manifest".to_owned()),
    };
    let parsed = tokio::task::spawn_blocking(|| Manifest::parse(text)).await;
    let parsed = parsed.map_err(|error| ClientError::Unavailable(error.to_string()))?;
    let parsed = parsed.map_err(|why| ClientError::Invalid(format!("{name}, {why}")))?;
    let found = stream::iter(parsed.paths().filter(|named| named.starts_with(path)))
        .map(move |named| async move {
            let found = files(worker, dataset, &named).await;
            match found {
                Ok(found) => found.map(|found| found.map(Named::File)).boxed(),
                Err(ClientError::NotFound | ClientError::NotDirectory) => {
                    stream::iter([Ok(Named::Missing(named))]).boxed()
                }
                Err(error) => stream::iter([Err(error)]).boxed(),
            }
        })
        .buffered(LOOK_UPS)
        .flatten();
    Ok(found.boxed())
}

/// Whether this worker counts what is missing at `path`.
pub(super) fn counts(worker: &Worker, dataset: &Dataset, path: &DatasetPath) -> bool {
    let directory = path.split().map_or_else(DatasetPath::root, |(directory, _)| directory);
    worker.members.owns(directory_placement_key(dataset.id, &directory))
}

async fn read(worker: &Worker, dataset: &Dataset, manifest: &DatasetPath) -> Result<Vec<u8>, ClientError> {
    let (directory, name) = manifest.split().ok_or_else(|| ClientError::Invalid("the root is no manifest".into()))?;
    let names = worker.client.dataset(dataset.id);
    let EntryKind::File { version } = names.lookup(&directory, &name).await?.kind else {
        return Err(ClientError::Invalid(format!("the manifest {manifest} is a directory")));
    };
    let size = version.size;
    if size > MAX_BYTES {
        let why = format!("the manifest {manifest} has {size} bytes; at most {MAX_BYTES} are read: split it");
        return Err(ClientError::Invalid(why));
    }
    let file = names.open(manifest.clone(), version);
    // At most MAX_BYTES.
    let mut text = Vec::with_capacity(size as usize);
    let mut offset = 0;
    while offset < size {
        let pieces = file.read(offset, PIECE.min(size - offset) as usize).await?;
        let before = text.len();
        pieces.iter().for_each(|piece| text.extend_from_slice(piece));
        offset += (text.len() - before) as u64;
        if text.len() == before {
            return Err(ClientError::VersionGone);
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails here")]

    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Vec<String>, String> {
        Ok(Manifest::parse(text.to_owned().into())?.paths().map(|path| path.to_string()).collect())
    }

    #[test]
    fn each_line_is_a_path_in_its_order() {
        assert_eq!(parse("").unwrap(), Vec::<String>::new());
        let text = "b/c d:e\n/größe\r\n\n  \na/\nb/c d:e\n";
        assert_eq!(parse(text).unwrap(), ["/b/c d:e", "/größe", "/a"]);
        assert_eq!(parse("a/b/c\na/b\na.txt\na/bc\na/b/d/e").unwrap(), ["/a/b", "/a.txt", "/a/bc"]);
        assert_eq!(parse("a\n/\nb").unwrap(), ["/"]);
        assert!(parse("a\nb/../c").unwrap_err().starts_with("line 2: "));
        assert!(parse(&"a\n".repeat(MAX_LINES + 1)).unwrap_err().ends_with("split it"));
    }

    proptest! {
        /// As a slow reading of the same words would have it.
        #[test]
        fn nothing_is_named_twice(lines in prop::collection::vec("[ab]{1,2}(/[ab]{1,2}){0,3}", 0..30)) {
            let mut expected = Vec::new();
            for (at, line) in lines.iter().enumerate() {
                let below = lines.iter().any(|other| line.starts_with(&format!("{other}/")));
                if !below && !lines[..at].contains(line) {
                    expected.push(format!("/{line}"));
                }
            }
            prop_assert_eq!(parse(&lines.join("\n")).unwrap(), expected);
        }
    }
}
