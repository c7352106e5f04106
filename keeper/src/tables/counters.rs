//! Counters that survive the daemon.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use serde::{Serialize, Serializer};

use super::AttachError;
use super::map::{Map, PAGE};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is counted. The position is the place in shared memory: append only.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Counter { $($(#[$doc])* $name,)* }

        impl Counter {
            /// All of them, in order.
            pub const ALL: &[Counter] = &[$(Counter::$name,)*];

            /// The name, in snake case.
            pub fn name(self) -> &'static str {
                match self { $(Counter::$name => $text,)* }
            }
        }
    };
}

counters! {
    /// LOOKUP requests.
    Lookup = "lookup",
    /// GETATTR requests.
    Getattr = "getattr",
    /// OPEN requests.
    Open = "open",
    /// RELEASE requests.
    Release = "release",
    /// READ requests.
    Read = "read",
    /// OPENDIR requests.
    Opendir = "opendir",
    /// READDIR requests.
    Readdir = "readdir",
    /// READDIRPLUS requests.
    Readdirplus = "readdirplus",
    /// RELEASEDIR requests.
    Releasedir = "releasedir",
    /// STATFS requests.
    Statfs = "statfs",
    /// GETXATTR requests.
    Getxattr = "getxattr",
    /// LISTXATTR requests.
    Listxattr = "listxattr",
    /// READLINK requests.
    Readlink = "readlink",
    /// FLUSH requests.
    Flush = "flush",
    /// ACCESS requests.
    Access = "access",
    /// IOCTL requests.
    Ioctl = "ioctl",
    /// Nodes in FORGET and BATCH_FORGET requests.
    Forget = "forget",
    /// Requests of any other kind.
    Other = "other",
    /// Requests that came a second time (bit 63 of `unique`).
    Resent = "resent",
    /// Requests answered with an error that is the file system's fault (EIO, ESTALE and the like, not ENOENT).
    Errors = "errors",
    /// Bytes of READ replies.
    BytesRead = "bytes_read",
    /// Entry invalidations sent to the kernel.
    InvalidatedEntries = "invalidated_entries",
    /// Directory inode invalidations sent to the kernel.
    InvalidatedDirectories = "invalidated_directories",
    /// Times all entries of the mount were expired.
    Expired = "expired",
    /// Bytes of file contents received from workers.
    WorkerBytes = "worker_bytes",
    /// Blocks that the workers held when they were asked.
    HitBlocks = "hit_blocks",
    /// Blocks that the workers fetched from the source.
    MissBlocks = "miss_blocks",
}

impl Counter {
    /// Whether it counts requests of the kernel, by operation.
    pub fn is_request(self) -> bool {
        // The operations come first, `Other` is the last of them; FORGET has no answer and counts nodes.
        (self as u32) <= Counter::Other as u32 && self != Counter::Forget
    }
}

/// "FBKCNTR" and the version of the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"FBKCNTR\x01");
/// Counters follow the magic, a cache line later.
const FIRST: u64 = 64;

/// Counters in shared memory.
pub struct Counters {
    map: Map,
}

impl Counters {
    /// New, all zero.
    pub fn create() -> io::Result<Self> {
        let map = Map::create("forebay-counters", PAGE)?;
        map.word(0).store(MAGIC, Relaxed);
        Ok(Self { map })
    }

    /// Those of another process.
    pub fn attach(fd: OwnedFd) -> Result<Self, AttachError> {
        let map = Map::attach(fd)?;
        if map.word(0).load(Relaxed) != MAGIC {
            return Err(AttachError::Header("counters: magic or version"));
        }
        Ok(Self { map })
    }

    /// For handing it over.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd()
    }

    /// Adds to one counter.
    pub fn add(&self, counter: Counter, by: u64) {
        self.map.word(FIRST + 8 * u64::from(counter as u32)).fetch_add(by, Relaxed);
    }

    /// One counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.map.word(FIRST + 8 * u64::from(counter as u32)).load(Relaxed)
    }

    /// All of them; each is exact, but they are not of one instant.
    pub fn snapshot(&self) -> CounterSnapshot {
        CounterSnapshot(Counter::ALL.iter().map(|counter| self.get(*counter)).collect())
    }
}

/// Values of all counters. Serialises as a map from name to value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CounterSnapshot(Vec<u64>);

impl CounterSnapshot {
    /// One counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0.get(counter as usize).copied().unwrap_or(0)
    }

    /// Name and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Counter::ALL.iter().map(|counter| (counter.name(), self.get(*counter)))
    }
}

impl Serialize for CounterSnapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_shared_and_fit() {
        let counters = Counters::create().unwrap();
        let other = Counters::attach(counters.fd().try_clone_to_owned().unwrap()).unwrap();
        for (index, counter) in Counter::ALL.iter().enumerate() {
            other.add(*counter, index as u64 + 1);
        }
        for (index, (_, value)) in counters.snapshot().iter().enumerate() {
            assert_eq!(value, index as u64 + 1);
        }
        let json = serde_json::to_value(counters.snapshot()).unwrap();
        assert_eq!(json["lookup"], 1);
        assert!(FIRST + 8 * (Counter::ALL.len() as u64) < PAGE);
        let nothing = Map::create("x", PAGE).unwrap();
        assert!(Counters::attach(nothing.fd().try_clone_to_owned().unwrap()).is_err());
    }
}
