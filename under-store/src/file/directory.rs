//! Pages of a directory, sorted, in bounded memory.
//!
//! File systems list in no order, and the kind of an entry decides about its place (`d/` comes after `d.`). So a page
//! reads the whole directory and keeps the [`SCAN`] entries that come first after where it begins: the page, and a
//! remainder from which the next pages are answered, until the directory changes or [`FRESH`] has passed. A directory
//! of 200,000 entries is read 7 times for all its pages. Only the files of the page are examined with stat.

use std::{
    collections::{BinaryHeap, VecDeque},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use forebay_protocol::identity::is_valid_name;
use rustix::{
    fs::{AtFlags, Dir, FileType, OFlags, Stat, fstat, statat},
    io::Errno,
};

use super::{Inner, beneath::Root, file_kind, of_errno};
use crate::{Item, ItemKind, Page, patience::Failure};

/// Entries that are kept of one reading: with names of 30 bytes 3 MiB, with the longest 10 MiB.
const SCAN: usize = 32 * 1024;
/// Listings that may go on at a time without a new reading: at most 4 * 10 MiB.
const REMAINDERS: usize = 4;
/// How long a remainder is used. New entries change the directory's times, but these have the clock's resolution.
const FRESH: Duration = Duration::from_secs(10);

/// What listings that are under way left to be answered.
pub(crate) type Remainders = VecDeque<Remainder>;

/// Entries that follow a page.
#[derive(Debug)]
pub(crate) struct Remainder {
    directory: Vec<u8>,
    after: Vec<u8>,
    stamp: Stamp,
    read: Instant,
    scan: Scan,
}

/// Entries by sort key.
#[derive(Debug)]
struct Scan {
    entries: VecDeque<(Vec<u8>, Kind)>,
    /// Whether the directory has no more entries than these.
    complete: bool,
}

/// What an entry is, as far as its place in the listing needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Directory,
    File,
    /// A symlink to a file.
    Link,
    /// Sockets, devices, links to nowhere or out of the root, names that are too long.
    Hidden,
}

/// Tells whether a directory changed.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    node: (u64, u64),
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    #[allow(clippy::unnecessary_cast, reason = "the fields' types differ between architectures")]
    fn of(stat: &Stat) -> Self {
        Self {
            node: node(stat),
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }
}

#[allow(clippy::unnecessary_cast, reason = "the fields' types differ between architectures")]
fn node(stat: &Stat) -> (u64, u64) {
    (stat.st_dev as u64, stat.st_ino as u64)
}

/// A page of at most `limit` entries.
pub(crate) fn page(inner: &Inner, directory: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Page, Failure> {
    let root = inner.open_root()?;
    let failed = |errno| of_errno(directory, errno);
    let fd = root.open_beneath(directory, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
    let listing = Listing { root, fd, directory };
    // Before the entries are read: a change from here on makes the remainder unusable.
    let stamp = Stamp::of(&fstat(&listing.fd).map_err(failed)?);
    let (mut scan, read) = match take(inner, directory, after, &stamp) {
        Some(found) => found,
        None => (listing.scan(after, SCAN).map_err(failed)?, Instant::now()),
    };
    let page = listing.page(&mut scan, limit).map_err(failed)?;
    if let Some(next) = &page.next
        && !scan.entries.is_empty()
    {
        let remainder = Remainder { directory: directory.to_vec(), after: next.clone(), stamp, read, scan };
        let mut remainders = inner.remainders.lock();
        remainders.push_back(remainder);
        while remainders.len() > REMAINDERS {
            remainders.pop_front();
        }
    }
    Ok(page)
}

fn take(inner: &Inner, directory: &[u8], after: Option<&[u8]>, stamp: &Stamp) -> Option<(Scan, Instant)> {
    let mut remainders = inner.remainders.lock();
    remainders.retain(|remainder| remainder.read.elapsed() < FRESH);
    let at = remainders.iter().position(|remainder| {
        remainder.directory == directory && Some(remainder.after.as_slice()) == after && remainder.stamp == *stamp
    })?;
    remainders.remove(at).map(|remainder| (remainder.scan, remainder.read))
}

struct Listing<'a> {
    root: Root,
    fd: OwnedFd,
    directory: &'a [u8],
}

impl Listing<'_> {
    /// The first `most` entries after `after`.
    fn scan(&self, after: Option<&[u8]>, most: usize) -> Result<Scan, Errno> {
        // The largest is on top, to make room for a smaller one.
        let mut first = BinaryHeap::new();
        let mut complete = true;
        let mut above = None;
        for entry in Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let kind = self.kind(name, entry.file_type(), &mut above)?;
            let mut sort_key = name.to_vec();
            if kind == Kind::Directory {
                sort_key.push(b'/');
            }
            if after.is_some_and(|after| sort_key.as_slice() <= after) {
                continue;
            }
            first.push((sort_key, kind));
            if first.len() > most {
                first.pop();
                complete = false;
            }
        }
        Ok(Scan { entries: first.into_sorted_vec().into(), complete })
    }

    fn kind(&self, name: &[u8], listed: FileType, above: &mut Option<Vec<(u64, u64)>>) -> Result<Kind, Errno> {
        let listed = match listed {
            FileType::Unknown => match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                // It went away between the reading and now.
                Err(_) => return Ok(Kind::Hidden),
            },
            known => known,
        };
        Ok(match listed {
            _ if !is_valid_name(name) => Kind::Hidden,
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File,
            FileType::Symlink => match self.root.stat(&self.child(name)) {
                Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                    FileType::RegularFile => Kind::Link,
                    // A link to where the path already leads through would be a tree without end.
                    FileType::Directory if !self.above(above)?.contains(&node(&stat)) => Kind::Directory,
                    _ => Kind::Hidden,
                },
                // Dangling, out of the root, a loop, not ours to see.
                Err(_) => Kind::Hidden,
            },
            _ => Kind::Hidden,
        })
    }

    /// The directories on the path to this one, itself included.
    fn above<'b>(&self, known: &'b mut Option<Vec<(u64, u64)>>) -> Result<&'b [(u64, u64)], Errno> {
        if known.is_none() {
            let mut nodes = vec![node(&self.root.stat(b"")?), node(&fstat(&self.fd)?)];
            for (slash, _) in self.directory.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
                nodes.push(node(&self.root.stat(&self.directory[..slash])?));
            }
            *known = Some(nodes);
        }
        Ok(known.as_deref().unwrap_or_default())
    }

    fn page(&self, scan: &mut Scan, limit: usize) -> Result<Page, Errno> {
        let mut page = Page::default();
        let mut last = None;
        while page.items.len() < limit
            && let Some((sort_key, kind)) = scan.entries.pop_front()
        {
            let kind = match kind {
                Kind::Directory => Some(ItemKind::Directory),
                Kind::Hidden => {
                    page.hidden += 1;
                    None
                }
                // What went away or became something else since it was read is left to the next listing.
                Kind::File => statat(&self.fd, sort_key.as_slice(), AtFlags::SYMLINK_NOFOLLOW)
                    .map_or_else(gone, |stat| Ok(file_kind(&stat)))?,
                Kind::Link => self.root.stat(&self.child(&sort_key)).map_or_else(gone, |stat| Ok(file_kind(&stat)))?,
            };
            if let Some(kind) = kind {
                let end = sort_key.len() - usize::from(matches!(kind, ItemKind::Directory));
                page.items.push(Item { name: sort_key[..end].to_vec(), kind });
            }
            last = Some(sort_key);
        }
        if !scan.entries.is_empty() || !scan.complete {
            page.next = last;
        }
        Ok(page)
    }

    fn child(&self, name: &[u8]) -> Vec<u8> {
        match self.directory {
            [] => name.to_vec(),
            directory => [directory, b"/", name].concat(),
        }
    }
}

/// Errors that say that an entry is no longer what it was are none.
fn gone(errno: Errno) -> Result<Option<ItemKind>, Errno> {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::ACCESS | Errno::PERM => Ok(None),
        other => Err(other),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    #[test]
    fn a_scan_keeps_the_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["c", "a", "b.", "e"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::create_dir(dir.path().join("b")).unwrap();
        let root = Root::open(Path::new(dir.path())).unwrap();
        let fd = root.open_beneath(b"", OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
        let listing = Listing { root, fd, directory: b"" };
        let keys = |scan: &Scan| scan.entries.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
        let scan = listing.scan(None, 3).unwrap();
        assert_eq!((keys(&scan), scan.complete), (vec![b"a".to_vec(), b"b.".to_vec(), b"b/".to_vec()], false));
        let mut scan = listing.scan(Some(b"b/"), 3).unwrap();
        assert_eq!((keys(&scan), scan.complete), (vec![b"c".to_vec(), b"e".to_vec()], true));
        let page = listing.page(&mut scan, 1).unwrap();
        assert_eq!(page.next.as_deref(), Some(b"c".as_slice()));
    }
}
