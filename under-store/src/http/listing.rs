//! A directory as its server listed it, and the pages of it.
//!
//! A WebDAV answer is whole, whatever is wanted of it. So that the pages of a large directory do not each fetch it
//! again, the last few listings are kept for a few seconds. That is right: a page that begins at the top always asks
//! the server, and the pages that follow come from that same answer, which makes them agree with each other, as pages
//! that are asked for one after the other cannot promise. A file that changed since has another version, and reading
//! it says so.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_protocol::identity::is_valid_name;
use percent_encoding::percent_decode_str;

use super::multistatus::Entry;
use crate::{Item, ItemKind, Page, version::State};

/// Listings that may go on at a time without asking again.
const KEPT: usize = 4;
/// Entries of all kept listings: with names of 30 bytes 40 MiB. The newest is kept however large it is; what the size
/// of an answer allows bounds it.
const KEPT_ENTRIES: usize = 256 * 1024;
/// How long a listing is kept.
const FRESH: Duration = Duration::from_secs(10);

/// Where an entry is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is the directory, or the file, that was asked about.
    Itself,
    /// It is directly below and has this name.
    Child(Vec<u8>),
    /// Not ours.
    Elsewhere,
}

/// The components of a path, decoded: of an absolute URL, or of an absolute path, with or without a slash at its end.
/// The host is not looked at: behind a proxy a server may know itself by another name.
pub(crate) fn components(href: &str) -> Vec<Vec<u8>> {
    let path = match href.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => rest.split_once('/').map_or("", |(_, path)| path),
        _ => href,
    };
    path.split('/').filter(|part| !part.is_empty()).map(|part| percent_decode_str(part).collect()).collect()
}

/// Where `entry` is, seen from what is at `place`.
pub(crate) fn place(entry: &Entry, place: &[Vec<u8>]) -> Place {
    let mut path = components(&entry.href);
    if path == place {
        return Place::Itself;
    }
    match path.pop() {
        Some(name) if path == place => Place::Child(name),
        _ => Place::Elsewhere,
    }
}

/// What an entry says about a file; `None` for a directory, and without a size.
pub(crate) fn state(entry: &Entry, with_etag: bool) -> Option<State> {
    let size = entry.length.as_ref()?.parse().ok().filter(|_| !entry.collection)?;
    Some(State::new(entry.etag.as_deref().filter(|_| with_etag), entry.modified.as_deref(), size))
}

/// A directory.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// By sort key.
    items: Vec<(Vec<u8>, ItemKind)>,
    hidden: u64,
}

impl Listing {
    /// Of the children of a directory; `with_etags` says whether their ETags count.
    pub(crate) fn new(children: impl IntoIterator<Item = (Vec<u8>, Entry)>, with_etags: bool) -> Self {
        let mut listing = Self::default();
        for (mut name, entry) in children {
            let kind = match entry.collection {
                true => Some(ItemKind::Directory),
                false => state(&entry, with_etags).and_then(|state| {
                    Some(ItemKind::File { size: state.size, mtime_ns: state.mtime_ns(), version: state.version()? })
                }),
            };
            match kind.filter(|_| is_valid_name(&name)) {
                Some(kind) => {
                    if matches!(kind, ItemKind::Directory) {
                        name.push(b'/');
                    }
                    listing.items.push((name, kind));
                }
                None => listing.hidden += 1,
            }
        }
        listing.items.sort_by(|(left, _), (right, _)| left.cmp(right));
        listing.items.dedup_by(|(later, _), (earlier, _)| later == earlier);
        listing
    }

    /// At most `limit` entries after the sort key `after`. What is hidden is counted in the first page.
    pub(crate) fn page(&self, after: Option<&[u8]>, limit: usize) -> Page {
        let start = after.map_or(0, |after| self.items.partition_point(|(key, _)| key.as_slice() <= after));
        let end = start.saturating_add(limit).min(self.items.len());
        let items = self.items[start..end].iter().map(|(key, kind)| {
            let name = key.strip_suffix(b"/").unwrap_or(key).to_vec();
            Item { name, kind: kind.clone() }
        });
        Page {
            items: items.collect(),
            next: self.items[start..end].last().filter(|_| end < self.items.len()).map(|(key, _)| key.clone()),
            hidden: if after.is_none() { self.hidden } else { 0 },
        }
    }
}

/// The last listings, the newest at the end.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    listings: VecDeque<(Vec<u8>, Instant, Arc<Listing>)>,
}

impl Kept {
    /// The listing of a directory from which its next page may come.
    pub(crate) fn get(&mut self, directory: &[u8]) -> Option<Arc<Listing>> {
        self.listings.retain(|(_, since, _)| since.elapsed() < FRESH);
        self.listings.iter().find(|(known, ..)| known == directory).map(|(.., listing)| listing.clone())
    }

    /// Keeps a listing.
    pub(crate) fn put(&mut self, directory: &[u8], listing: Arc<Listing>) {
        self.remove(directory);
        self.listings.push_back((directory.to_vec(), Instant::now(), listing));
        let entries = |kept: &Self| kept.listings.iter().map(|(.., listing)| listing.items.len()).sum::<usize>();
        while self.listings.len() > KEPT || self.listings.len() > 1 && entries(self) > KEPT_ENTRIES {
            self.listings.pop_front();
        }
    }

    /// Forgets the listing of a directory, as after its last page.
    pub(crate) fn remove(&mut self, directory: &[u8]) {
        self.listings.retain(|(known, since, _)| known != directory && since.elapsed() < FRESH);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn file(href: &str) -> Entry {
        Entry {
            href: href.to_owned(),
            length: Some("3".to_owned()),
            modified: Some("Wed, 21 Oct 2015 07:28:00 GMT".to_owned()),
            etag: Some("\"e\"".to_owned()),
            ..Entry::default()
        }
    }

    #[test]
    fn hrefs_of_all_forms_are_placed() {
        let directory = components("https://host/a%20b/c/");
        for href in ["/a%20b/c", "/a%20b/c/", "http://other:8080/a%20b/c/", "/%61%20b//c", "/a b/c"] {
            assert_eq!(place(&file(href), &directory), Place::Itself, "{href}");
        }
        for href in ["/a%20b/c/x", "/a%20b/c/x/", "HTTPS://host/a%20b/c/%78"] {
            assert_eq!(place(&file(href), &directory), Place::Child(b"x".to_vec()), "{href}");
        }
        for href in ["", "/", "/a%20b", "/a%20b/cx", "/a%20b/c/x/y", "x", "http://host"] {
            assert_eq!(place(&file(href), &directory), Place::Elsewhere, "{href}");
        }
        assert_eq!(place(&file("/a%20b/c/x%2Fy%FF"), &directory), Place::Child(b"x/y\xff".to_vec()));
        assert_eq!(place(&file("http://host"), &[]), Place::Itself);
        assert_eq!(place(&file("/x"), &[]), Place::Child(b"x".to_vec()));
    }

    #[test]
    fn pages_are_in_the_order_of_sort_keys_and_hide_what_is_no_name() {
        let directory = Entry { collection: true, ..Entry::default() };
        let sizeless = Entry { length: None, ..file("") };
        let children = [
            (b"d0".to_vec(), file("")),
            (b"d".to_vec(), directory.clone()),
            (b"d.".to_vec(), file("")),
            (b"d.".to_vec(), file("")),
            (b"x/y".to_vec(), file("")),
            (b"..".to_vec(), directory),
            (b"s".to_vec(), sizeless),
        ];
        let listing = Listing::new(children, true);
        let keys = |page: &Page| page.items.iter().map(Item::sort_key).collect::<Vec<_>>();
        let first = listing.page(None, 2);
        assert_eq!((keys(&first), first.hidden), (vec![b"d.".to_vec(), b"d/".to_vec()], 3));
        let second = listing.page(first.next.as_deref(), 2);
        assert_eq!((keys(&second), second.hidden, second.next), (vec![b"d0".to_vec()], 0, None));
    }

    #[test]
    fn etags_count_only_when_they_may() {
        let version = |with| state(&file(""), with).and_then(|state| state.version()).unwrap();
        assert_eq!(version(true).as_bytes(), b"\"e\"");
        assert_eq!(version(false).as_bytes(), b"lm:1445412480:3");
    }

    #[test]
    fn few_listings_are_kept() {
        let mut kept = Kept::default();
        for directory in 0..=KEPT as u8 {
            kept.put(&[directory], Arc::default());
        }
        assert!(kept.get(&[0]).is_none() && kept.get(&[1]).is_some());
        kept.remove(&[1]);
        assert!(kept.get(&[1]).is_none() && kept.get(&[2]).is_some());
        let items = vec![(b"x".to_vec(), ItemKind::Directory); KEPT_ENTRIES + 1];
        kept.put(b"large", Arc::new(Listing { items, hidden: 0 }));
        assert!(kept.get(&[2]).is_none() && kept.get(b"large").is_some());
    }
}
