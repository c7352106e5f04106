//! The node table: an append-only arena of records, and a hash index over (parent, name).
//!
//! A node id is a record's position in the arena (in words), so it is unique by construction, never reused, and means
//! the same to every daemon. A record is written once and names (parent, name, kind, file version).
//!
//! Layout, in words of 8 bytes, native order (the table never leaves the machine or the boot):
//!
//! ```text
//! header   one page: see the constants
//! arena    record*            at PAGE
//! index    region 2^12 | region 2^13 | ...   at PAGE + arena length; region k begins at 8 * 2^k and has 2^k slots
//!
//! record   link | parent | check u32, kind u8, name length u8, key length u8, 0 | (file: size | mtime) | name key pad
//! slot     tag u32 << 32 | id u32, 0 = empty
//! ```
//!
//! All versions of one name form a chain: the slot leads to the *anchor*, the first record of that name, for ever. The
//! anchor's link holds (newest other version, current version); another record's link holds (next older version, 0).
//! Making a new version known is thus one store.
//!
//! Crash consistency: a record is complete before the arena's end is moved past it, and the end is moved before the slot
//! or link that leads to it is stored. A writer killed in between leaves a record that nobody knows. The index grows
//! by filling a fresh region and then storing its number; the old region's memory is given back after that.
//!
//! Readers take no lock. Writers of one process take a mutex; only one process writes at a time (the keeper sees to
//! that). An id from the kernel may be any number: a record carries a check word over its contents and its place, with
//! a seed of this table's own, and an id that does not lead to one is unknown.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use bytes::Bytes;
use forebay_protocol::identity::{MAX_PATH, is_valid_name};
use forebay_protocol::{DatasetPath, FileVersion, VersionKey};
use parking_lot::Mutex;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::map::{Map, PAGE};
use super::{AttachError, TableFull};

/// The id of the root directory, which has no record.
pub const ROOT_ID: u64 = 1;
/// The lowest id of a record.
pub const FIRST_ID: u64 = 16;
/// Address space for records: 4 GiB is about 40 million files at 100 bytes. Memory is used only for what is written.
pub const DEFAULT_NODE_ARENA: u64 = 4 << 30;

/// "FBKNODE" and the version of the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"FBKNODE\x01");
// Offsets in the header, in bytes. The last three change, and have a cache line of their own.
const H_MAGIC: u64 = 0;
const H_ARENA_LEN: u64 = 8;
const H_MAX_LOG2: u64 = 16;
const H_SEED: u64 = 24;
const H_END: u64 = 64;
const H_LOG2: u64 = 72;
const H_NAMES: u64 = 80;

/// The first region has 4,096 slots: 32 KiB.
const MIN_LOG2: u64 = 12;
/// A tag of 32 bits is also the home slot, so a region has at most 2^30 slots (8 GiB).
const MAX_LOG2: u64 = 30;
/// Ids have 32 bits in slots and links, so the arena has at most 2^32 words.
const MAX_ARENA: u64 = 32 << 30;
/// The smallest record: three words of header and one of name.
const MIN_RECORD: u64 = 32;
/// The largest: five words, a name and a key of 255 bytes each.
const MAX_RECORD_WORDS: usize = 5 + (255 + 255usize).div_ceil(8);
/// Versions of one name that are searched for an old one. A version that is not among them gets a new record.
const MAX_CHAIN: usize = 256;

const KIND_DIRECTORY: u8 = 1;
const KIND_FILE: u8 = 2;

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// One version of a file.
    File {
        /// Which one.
        version: FileVersion,
    },
}

/// What an id means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// The id of the directory it is in; the root's is its own.
    pub parent: u64,
    /// Its name there; empty for the root.
    pub name: Bytes,
    /// Directory, or which version of a file.
    pub kind: NodeKind,
}

/// Size of a node table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStats {
    /// Different (parent, name) pairs.
    pub names: u64,
    /// Bytes of records.
    pub arena_bytes: u64,
    /// Memory in use, index included.
    pub resident_bytes: u64,
    /// Bytes of records that fit at most.
    pub max_arena_bytes: u64,
}

/// The table. See the module for what it guarantees.
pub struct NodeTable {
    map: Map,
    arena_len: u64,
    max_log2: u64,
    seed: u64,
    writer: Mutex<()>,
}

/// A decoded record.
struct Record {
    link: u64,
    words: u64,
    node: Node,
}

/// A record as words, ready to be written. `check` is filled in when the place is known.
struct Draft {
    words: [u64; MAX_RECORD_WORDS],
    len: usize,
}

impl Draft {
    fn new(parent: u64, name: &[u8], kind: &NodeKind) -> Option<Self> {
        if !is_valid_name(name) {
            return None;
        }
        let mut words = [0u64; MAX_RECORD_WORDS];
        words[1] = parent;
        let (code, head, key): (u8, usize, &[u8]) = match kind {
            NodeKind::Directory => (KIND_DIRECTORY, 3, &[]),
            NodeKind::File { version: FileVersion { size, mtime_ns, key } } => {
                words[3] = *size;
                words[4] = *mtime_ns as u64; // Same bits; read back the same way.
                (KIND_FILE, 5, key.as_bytes())
            }
        };
        words[2] = pack_lengths(code, name.len() as u8, key.len() as u8); // Both at most 255, by their types.
        for (index, byte) in name.iter().chain(key).enumerate() {
            words[head + index / 8] |= u64::from(*byte) << (8 * (index % 8));
        }
        Some(Self { words, len: head + (name.len() + key.len()).div_ceil(8) })
    }

    fn bytes(&self) -> u64 {
        8 * self.len as u64
    }
}

fn pack_lengths(kind: u8, name: u8, key: u8) -> u64 {
    u64::from(kind) << 32 | u64::from(name) << 40 | u64::from(key) << 48
}

/// The check word of a record: over everything but its link, with the check itself as zero.
fn checksum(seed: u64, id: u64, words: &[u64]) -> u64 {
    let mut bytes = [0u8; 8 * MAX_RECORD_WORDS];
    let len = 8 * (words.len() - 1);
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(&words[1..]) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes[8..12].fill(0);
    xxh3_64_with_seed(&bytes[..len], seed ^ id.rotate_left(32)) & u64::from(u32::MAX)
}

impl NodeTable {
    /// A new table with room for `arena_bytes` of records (rounded, between 1 MiB and 32 GiB).
    pub fn create(arena_bytes: u64) -> io::Result<Self> {
        let arena_len = arena_bytes.clamp(1 << 20, MAX_ARENA).next_multiple_of(PAGE);
        // Enough slots for the smallest records at a load of 3/4.
        let max_log2 = u64::from((arena_len / MIN_RECORD * 4 / 3).next_power_of_two().trailing_zeros());
        let max_log2 = max_log2.clamp(MIN_LOG2, MAX_LOG2);
        let map = Map::create("forebay-nodes", total_len(arena_len, max_log2))?;
        // Random per process and call: enough that no name or key can be made to look like a record.
        let seed = RandomState::new().hash_one(MAGIC);
        map.word(H_ARENA_LEN).store(arena_len, Relaxed);
        map.word(H_MAX_LOG2).store(max_log2, Relaxed);
        map.word(H_SEED).store(seed, Relaxed);
        map.word(H_END).store(8 * FIRST_ID, Relaxed);
        map.word(H_LOG2).store(MIN_LOG2, Relaxed);
        map.word(H_MAGIC).store(MAGIC, Release);
        Ok(Self { map, arena_len, max_log2, seed, writer: Mutex::new(()) })
    }

    /// A table that another process created.
    pub fn attach(fd: OwnedFd) -> Result<Self, AttachError> {
        let map = Map::attach(fd)?;
        let word = |offset| map.word(offset).load(Acquire);
        if word(H_MAGIC) != MAGIC {
            return Err(AttachError::Header("nodes: magic or version"));
        }
        let (arena_len, max_log2, seed) = (word(H_ARENA_LEN), word(H_MAX_LOG2), word(H_SEED));
        if arena_len > MAX_ARENA
            || !arena_len.is_multiple_of(PAGE)
            || !(MIN_LOG2..=MAX_LOG2).contains(&max_log2)
            || total_len(arena_len, max_log2) != map.len()
        {
            return Err(AttachError::Header("nodes: lengths"));
        }
        let (end, log2) = (word(H_END), word(H_LOG2));
        if !(8 * FIRST_ID..=arena_len).contains(&end)
            || !end.is_multiple_of(8)
            || !(MIN_LOG2..=max_log2).contains(&log2)
        {
            return Err(AttachError::Header("nodes: bounds"));
        }
        let table = Self { map, arena_len, max_log2, seed, writer: Mutex::new(()) };
        if log2 > MIN_LOG2 {
            // Its writer may have been killed between growing and giving the old region back. Failing costs memory.
            let _ = table.map.punch(table.region(log2 - 1), 8 << (log2 - 1));
        }
        Ok(table)
    }

    /// Whether it is the same table, perhaps mapped elsewhere.
    pub(crate) fn same(&self, other: &Self) -> io::Result<bool> {
        self.map.same(&other.map)
    }

    /// For handing it over.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd()
    }

    /// How full it is.
    pub fn stats(&self) -> NodeStats {
        NodeStats {
            names: self.map.word(H_NAMES).load(Relaxed),
            arena_bytes: self.map.word(H_END).load(Relaxed) - 8 * FIRST_ID,
            resident_bytes: self.map.resident(),
            max_arena_bytes: self.arena_len,
        }
    }

    /// What an id means. Any number may be asked for; `None` for those that were never given out.
    pub fn resolve(&self, id: u64) -> Option<Node> {
        if id == ROOT_ID {
            return Some(Node { parent: ROOT_ID, name: Bytes::new(), kind: NodeKind::Directory });
        }
        self.record(id).map(|record| record.node)
    }

    /// The id of `name` in `parent` as `kind`, which becomes the current one of that name. The same arguments give the
    /// same id, in this process and its successors.
    ///
    /// `parent` is not checked: an id that is no directory gives nodes without a [`path`](Self::path). A name that no
    /// entry can have is refused like one for which there is no room.
    pub fn intern(&self, parent: u64, name: &[u8], kind: &NodeKind) -> Result<u64, TableFull> {
        // What is usual, without the lock: the name is known and has not changed.
        if let Some((anchor, record)) = self.anchor(parent, name) {
            let (_, current) = unpack(record.link);
            let same = |record: Record| record.node.kind == *kind;
            if if current == anchor { same(record) } else { self.record(current).is_some_and(same) } {
                return Ok(current);
            }
        }
        let draft = Draft::new(parent, name, kind).ok_or(TableFull("node"))?;
        let _writer = self.writer.lock();
        match self.anchor(parent, name) {
            None => {
                let names = self.map.word(H_NAMES);
                if names.load(Relaxed) + 1 > self.slots() / 4 * 3 {
                    self.grow()?;
                }
                let id = self.append(draft, |id| id)?;
                // Counted before it exists: a writer killed here leaves the count too high, never too low.
                names.fetch_add(1, Relaxed);
                self.insert(self.region(self.log2()), self.slots(), slot(self.tag(parent, name), id));
                Ok(id)
            }
            Some((anchor, record)) => {
                let (newest, _) = unpack(record.link);
                let found = self.versions(anchor, record).find(|(_, record)| record.node.kind == *kind);
                let (newest, id) = match found {
                    Some((id, _)) => (newest, id),
                    None => {
                        let id = self.append(draft, |_| newest << 32)?;
                        (id, id)
                    }
                };
                self.link(anchor).store(newest << 32 | id, Release);
                Ok(id)
            }
        }
    }

    /// The id that was interned last for `name` in `parent`.
    pub fn current(&self, parent: u64, name: &[u8]) -> Option<u64> {
        let (_, record) = self.anchor(parent, name)?;
        Some(unpack(record.link).1)
    }

    /// The id of `name` in `parent` as `kind`, if it was interned.
    pub fn find(&self, parent: u64, name: &[u8], kind: &NodeKind) -> Option<u64> {
        let (anchor, record) = self.anchor(parent, name)?;
        self.versions(anchor, record).find(|(_, record)| record.node.kind == *kind).map(|(id, _)| id)
    }

    /// Every id that was given out and what it means, oldest first; the root, which has no record, is left out.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Node)> {
        let mut next = FIRST_ID;
        std::iter::from_fn(move || {
            let id = next;
            let record = self.record(id)?;
            next += record.words;
            Some((id, record.node))
        })
    }

    /// The path of an id; `None` when the id or one of its ancestors is unknown, or no directory.
    pub fn path(&self, id: u64) -> Option<DatasetPath> {
        let mut names: Vec<Bytes> = Vec::new();
        let (mut id, mut len, mut leaf) = (id, 0, true);
        while id != ROOT_ID {
            let node = self.resolve(id)?;
            // A directory is interned before what is in it; this also ends the loop in a damaged table.
            if node.parent >= id || !(leaf || node.kind == NodeKind::Directory) {
                return None;
            }
            len += 1 + node.name.len();
            if len > MAX_PATH {
                return None;
            }
            (id, leaf) = (node.parent, false);
            names.push(node.name);
        }
        if names.is_empty() {
            return Some(DatasetPath::root());
        }
        let mut path = Vec::with_capacity(len);
        for name in names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        DatasetPath::parse(path).ok()
    }

    /// The id of a directory, if it and its ancestors were interned.
    pub fn find_directory(&self, path: &DatasetPath) -> Option<u64> {
        path.components().try_fold(ROOT_ID, |parent, name| self.find(parent, name, &NodeKind::Directory))
    }

    /// All versions of a name, from its anchor: the anchor first, then the newest to the oldest.
    fn versions(&self, anchor: u64, record: Record) -> impl Iterator<Item = (u64, Record)> {
        let first = unpack(record.link).0;
        let mut next = first;
        std::iter::once((anchor, record))
            .chain(std::iter::from_fn(move || {
                let id = next;
                let record = self.record(id)?;
                next = unpack(record.link).0;
                Some((id, record))
            }))
            .take(MAX_CHAIN)
    }

    /// Writes a record and moves the arena's end past it.
    fn append(&self, mut draft: Draft, link: impl FnOnce(u64) -> u64) -> Result<u64, TableFull> {
        let end = self.map.word(H_END).load(Relaxed);
        if end + draft.bytes() > self.arena_len {
            return Err(TableFull("node"));
        }
        let id = end / 8;
        draft.words[0] = link(id);
        draft.words[2] |= checksum(self.seed, id, &draft.words[..draft.len]);
        self.map.write(PAGE + end, &draft.words[..draft.len]);
        self.map.word(H_END).store(end + draft.bytes(), Release);
        Ok(id)
    }

    /// Decodes the record at an id, or finds that there is none.
    fn record(&self, id: u64) -> Option<Record> {
        let end = self.map.word(H_END).load(Acquire).min(self.arena_len) / 8;
        if !(FIRST_ID..end).contains(&id) || end - id < 4 {
            return None;
        }
        let at = PAGE + 8 * id;
        let mut words = [0u64; MAX_RECORD_WORDS];
        self.map.read(at, &mut words[..3]);
        let (kind, name, key) =
            ((words[2] >> 32) as u8, (words[2] >> 40) as u8 as usize, (words[2] >> 48) as u8 as usize);
        let head = match kind {
            KIND_DIRECTORY => 3,
            KIND_FILE => 5,
            _ => return None,
        };
        let len = head + (name + key).div_ceil(8);
        if end - id < len as u64 {
            return None;
        }
        self.map.read(at + 24, &mut words[3..len]);
        // The link is the one word that changes, and what it leads to must be seen whole.
        words[0] = self.map.word(at).load(Acquire);
        if words[2] & u64::from(u32::MAX) != checksum(self.seed, id, &words[..len]) {
            return None;
        }
        let mut text = [0u8; 8 * MAX_RECORD_WORDS];
        for (chunk, word) in text.chunks_exact_mut(8).zip(&words[head..len]) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        let kind = match kind {
            KIND_DIRECTORY => NodeKind::Directory,
            _ => {
                let key = VersionKey::new(Bytes::copy_from_slice(&text[name..name + key]))?;
                NodeKind::File { version: FileVersion { size: words[3], mtime_ns: words[4] as i64, key } }
            }
        };
        Some(Record {
            link: words[0],
            words: len as u64,
            node: Node { parent: words[1], name: Bytes::copy_from_slice(&text[..name]), kind },
        })
    }

    fn link(&self, id: u64) -> &std::sync::atomic::AtomicU64 {
        self.map.word(PAGE + 8 * id)
    }

    fn log2(&self) -> u64 {
        self.map.word(H_LOG2).load(Acquire).clamp(MIN_LOG2, self.max_log2)
    }

    fn slots(&self) -> u64 {
        1 << self.log2()
    }

    fn region(&self, log2: u64) -> u64 {
        PAGE + self.arena_len + (8 << log2)
    }

    fn tag(&self, parent: u64, name: &[u8]) -> u64 {
        let mut bytes = [0u8; 8 + 255];
        let len = name.len().min(255); // A longer name was never interned; it will not be found.
        bytes[..8].copy_from_slice(&parent.to_le_bytes());
        bytes[8..8 + len].copy_from_slice(&name[..len]);
        xxh3_64(&bytes[..8 + len]) & u64::from(u32::MAX)
    }

    /// The first record of a name.
    fn anchor(&self, parent: u64, name: &[u8]) -> Option<(u64, Record)> {
        let tag = self.tag(parent, name);
        loop {
            let log2 = self.log2();
            let (region, mask) = (self.region(log2), (1u64 << log2) - 1);
            for step in 0..=mask {
                let slot = self.map.word(region + 8 * ((tag + step) & mask)).load(Acquire);
                if slot == 0 {
                    break;
                }
                if slot >> 32 == tag
                    && let Some(record) = self.record(slot & u64::from(u32::MAX))
                    && record.node.parent == parent
                    && record.node.name == name
                {
                    return Some((slot & u64::from(u32::MAX), record));
                }
            }
            // A region that was given back while it was searched reads as empty.
            fence(Acquire);
            if self.log2() == log2 {
                return None;
            }
        }
    }

    /// Stores a slot value at the first free place from its home. The load limit leaves one.
    fn insert(&self, region: u64, slots: u64, slot: u64) {
        let (tag, mask) = (slot >> 32, slots - 1);
        for step in 0..=mask {
            let place = self.map.word(region + 8 * ((tag + step) & mask));
            if place.load(Relaxed) == 0 {
                place.store(slot, Release);
                return;
            }
        }
    }

    /// Doubles the index: fills the next region, makes it the one in use, gives the old one's memory back.
    fn grow(&self) -> Result<(), TableFull> {
        let log2 = self.log2();
        if log2 >= self.max_log2 {
            return Err(TableFull("node"));
        }
        let (old, new) = (self.region(log2), self.region(log2 + 1));
        // A writer killed in the middle of growing left slots here.
        self.map.punch(new, 8 << (log2 + 1)).map_err(|_| TableFull("node"))?;
        let mut names = 0;
        for index in 0..1u64 << log2 {
            let slot = self.map.word(old + 8 * index).load(Acquire);
            if slot != 0 {
                self.insert(new, 1 << (log2 + 1), slot);
                names += 1;
            }
        }
        self.map.word(H_NAMES).store(names, Relaxed);
        self.map.word(H_LOG2).store(log2 + 1, Release);
        fence(AcqRel);
        // Failing costs memory and nothing else.
        let _ = self.map.punch(old, 8 << log2);
        Ok(())
    }
}

fn slot(tag: u64, id: u64) -> u64 {
    tag << 32 | id
}

/// (newest other or next older version, current version).
fn unpack(link: u64) -> (u64, u64) {
    (link >> 32, link & u64::from(u32::MAX))
}

/// Regions 2^MIN..=2^MAX end at 8 * 2^(MAX + 1) after the arena.
fn total_len(arena_len: u64, max_log2: u64) -> u64 {
    PAGE + arena_len + (8 << (max_log2 + 1))
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
