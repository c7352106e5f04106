//! Names that the kernel may have forgotten, and this daemon has not.
//!
//! What a look-up or a listing said may be kept until it is announced that it changed, by whoever keeps it: under memory
//! pressure the kernel forgets names long before, and asks again for every one. Those are answered from here. And when it
//! asks for several names of one directory, the directory is listed, which costs a worker about as much as two look-ups.
//!
//! Bounded. Nothing here is older than the last announcement about its directory ([`Ticket`]), nor than the time that the
//! kernel itself might have kept it. Absent names are not kept.

use std::time::{Duration, Instant};

use quick_cache::sync::Cache;

use super::pages::Ticket;

/// Names kept: about 5 MiB.
const MAX_NAMES: usize = 64 * 1024;
/// Directories of which is remembered what they are like.
const MAX_DIRECTORIES: usize = 4096;
/// How long a directory is taken for what it was, and two look-ups in it for one walk.
const MEMORY: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
struct Known {
    ticket: Ticket,
    /// Seconds since the start of [`Names`].
    until: u32,
}

/// What is known of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// A name of it was asked for.
    Asked,
    /// It is being listed, or has so many entries that listing it for a few names is a loss.
    LookUp,
}

/// The names of one volume, by node.
#[derive(Debug)]
pub(crate) struct Names {
    start: Instant,
    known: Cache<u64, Known>,
    directories: Cache<u64, (Habit, Instant)>,
}

impl Names {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), known: Cache::new(MAX_NAMES), directories: Cache::new(MAX_DIRECTORIES) }
    }

    /// A node is what its name leads to; said at `asked` and good for `ttl`, unless something changed since `ticket`.
    pub(crate) fn keep(&self, node: u64, ticket: Ticket, asked: Instant, ttl: Duration) {
        let until = asked.saturating_duration_since(self.start) + ttl;
        let until = u32::try_from(until.as_secs()).unwrap_or(u32::MAX);
        self.known.insert(node, Known { ticket, until });
    }

    /// How long the name of a node may still be kept, with a new ticket of its directory.
    pub(crate) fn good_for(&self, node: u64, ticket: Ticket) -> Option<Duration> {
        let known = self.known.get(&node)?;
        let left = Duration::from_secs(known.until.into()).checked_sub(self.start.elapsed())?;
        (known.ticket == ticket).then_some(left)
    }

    /// What a node's name leads to has to be asked for again.
    pub(crate) fn forget(&self, node: u64) {
        self.known.remove(&node);
    }

    /// A name that is not known is asked for. Whether its directory is to be listed for it, and for those that follow: then
    /// [`Self::listed`] is to be called.
    pub(crate) fn missed(&self, directory: u64) -> bool {
        let habit = self.directories.get(&directory).filter(|(_, since)| since.elapsed() < MEMORY);
        let (next, list) = match habit {
            None => (Habit::Asked, false),
            Some((Habit::Asked, _)) => (Habit::LookUp, true),
            Some((Habit::LookUp, _)) => return false,
        };
        self.directories.insert(directory, (next, Instant::now()));
        list
    }

    /// A directory was listed; whether all of its entries came.
    pub(crate) fn listed(&self, directory: u64, all: bool) {
        if all {
            // When its names are asked for again, it may be listed again.
            self.directories.insert(directory, (Habit::Asked, Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::pages::Pages, *};

    #[test]
    fn a_name_is_good_until_something_changes_or_its_time_is_over() {
        let (names, pages) = (Names::new(), Pages::default());
        let ticket = pages.ticket(5);
        names.keep(20, ticket, Instant::now(), Duration::from_secs(60));
        assert!(names.good_for(20, pages.ticket(5)).unwrap() > Duration::from_secs(50));
        assert_eq!(names.good_for(21, pages.ticket(5)), None);
        names.keep(22, ticket, names.start, Duration::ZERO);
        assert_eq!(names.good_for(22, pages.ticket(5)), None);
        names.keep(23, ticket, Instant::now(), Duration::from_secs(60));
        names.forget(23);
        assert_eq!(names.good_for(23, pages.ticket(5)), None);
        pages.forget(Some(5));
        assert_eq!(names.good_for(20, pages.ticket(5)), None);
        // Kept too late: what was announced meanwhile counts.
        names.keep(20, ticket, Instant::now(), Duration::from_secs(60));
        assert_eq!(names.good_for(20, pages.ticket(5)), None);
    }

    #[test]
    fn a_directory_is_listed_for_its_second_name_unless_it_is_large() {
        let names = Names::new();
        assert!(!names.missed(1) && !names.missed(2));
        assert!(names.missed(1));
        // By one only.
        assert!(!names.missed(1));
        names.listed(1, true);
        assert!(names.missed(1));
        names.listed(1, false);
        assert!(!names.missed(1) && !names.missed(1));
    }
}
