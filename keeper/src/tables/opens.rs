//! The open table: which handles are open, and how each inode is open.
//!
//! A slot is one handle, or one inode's backing id (passthrough: the id of an open backing file, which stays registered
//! with the kernel between opens). The slot's state word is the only truth: it is stored last when a slot is taken and
//! first when it is freed, so a daemon killed in between leaves the slot as it was. Everything else (which slots belong
//! to an inode, which are free) is rebuilt from the slots when a daemon attaches.
//!
//! A file handle is (generation of its slot, slot). It is never 0 and a slot's next use has another generation, so a
//! RELEASE that is sent again can not release somebody else's handle. An OPEN that is sent again carries the `unique` of
//! the first, and gets the handle of the first.
//!
//! Not handled: a reader killed while its OPEN waits to be sent again takes its request along; if the dead daemon had
//! already recorded the handle, the slot stays taken. That is one slot per such coincidence, of a million.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use parking_lot::Mutex;

use super::map::{Map, PAGE};
use super::{AttachError, TableFull};

/// FUSE_UNIQUE_RESEND: set in the `unique` of a request that was sent before.
pub const RESEND_BIT: u64 = 1 << 63;
/// Slots of a table unless said otherwise: 2^20, 32 MiB of address space; memory only for those ever used at once.
pub const DEFAULT_MAX_HANDLES: u64 = 1 << 20;

/// "FBKOPEN" and the version of the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"FBKOPEN\x01");
const H_MAGIC: u64 = 0;
const H_SLOTS: u64 = 8;
/// 0 while it is not decided.
const H_SHAPE: u64 = 16;
/// Slots from here on were never used.
const H_HIGH: u64 = 64;

/// State, unique, node, mode and backing id.
const SLOT_BYTES: u64 = 32;
/// A handle has 24 bits for its slot and 40 for the generation.
const SLOT_BITS: u32 = 24;
const GENERATION_MASK: u64 = (1 << 40) - 1;

const FREE: u64 = 0;
const HANDLE: u64 = 1;
const BACKING: u64 = 2;

const LARGE: u64 = 1;
const SMALL: u64 = 2;

const CACHED: u64 = 0;
const DIRECT: u64 = 1;
const PASSTHROUGH: u64 = 2;

/// What a mount is made for. The kernel keeps to it for the mount's life: once an OPEN was answered with `ENOSYS`, it
/// sends no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Shape {
    /// Large files: each open is a request, and has a handle.
    Large,
    /// Many small files: files and directories are opened without a request, so what is in the page cache needs none.
    Small,
}

/// How a file is open. The kernel refuses an inode that is open both through the page cache and passed through, or
/// passed through to two backing files; direct I/O goes with both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpenMode {
    /// Through the page cache.
    Cached,
    /// FOPEN_DIRECT_IO.
    Direct,
    /// FOPEN_PASSTHROUGH.
    Passthrough {
        /// What BACKING_OPEN gave.
        backing_id: u32,
    },
}

impl OpenMode {
    fn pack(self) -> u64 {
        match self {
            Self::Cached => CACHED,
            Self::Direct => DIRECT,
            Self::Passthrough { backing_id } => PASSTHROUGH | u64::from(backing_id) << 32,
        }
    }

    fn unpack(word: u64) -> Option<Self> {
        match word & u64::from(u32::MAX) {
            CACHED => Some(Self::Cached),
            DIRECT => Some(Self::Direct),
            PASSTHROUGH => Some(Self::Passthrough { backing_id: (word >> 32) as u32 }),
            _ => None,
        }
    }
}

/// An open handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenHandle {
    /// Whose.
    pub node: u64,
    /// The mode in force: of the inode when it was already open in one that excludes what was asked for.
    pub mode: OpenMode,
    /// Of the OPEN that made it, without [`RESEND_BIT`].
    pub unique: u64,
}

/// What a release did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// The handle that was open until now.
    pub handle: OpenHandle,
    /// Whether no handle of its inode is open any more.
    pub last: bool,
}

/// Size of an open table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenStats {
    /// Handles open now.
    pub handles: u64,
    /// Most slots ever in use at once.
    pub high_water: u64,
    /// Slots.
    pub max_handles: u64,
    /// The mount's shape; `None` while it is not decided.
    pub shape: Option<Shape>,
}

/// The table. See the module for what it guarantees.
pub struct OpenTable {
    map: Map,
    slots: u64,
    state: Mutex<State>,
}

/// What follows from the slots.
#[derive(Default)]
struct State {
    by_unique: HashMap<u64, u32>,
    inodes: HashMap<u64, Inode>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Inode {
    handles: Vec<u32>,
    backing: Option<u32>,
}

impl OpenTable {
    /// A new table for `max_handles` (at most 2^24).
    pub fn create(max_handles: u64) -> io::Result<Self> {
        let slots = max_handles.clamp(1, 1 << SLOT_BITS);
        let map = Map::create("forebay-opens", total_len(slots))?;
        map.word(H_SLOTS).store(slots, Relaxed);
        map.word(H_MAGIC).store(MAGIC, Release);
        Ok(Self { map, slots, state: Mutex::default() })
    }

    /// A table that another process created, to be held and handed over: as it was just created, it only knows how many
    /// slots were used. Whoever serves it must [`attach`](Self::attach).
    pub fn observe(fd: OwnedFd) -> Result<Self, AttachError> {
        let map = Map::attach(fd)?;
        if map.word(H_MAGIC).load(Acquire) != MAGIC {
            return Err(AttachError::Header("opens: magic or version"));
        }
        let (slots, high) = (map.word(H_SLOTS).load(Relaxed), map.word(H_HIGH).load(Acquire));
        if !(1..=1 << SLOT_BITS).contains(&slots) || total_len(slots) != map.len() || high > slots {
            return Err(AttachError::Header("opens: bounds"));
        }
        Ok(Self { map, slots, state: Mutex::default() })
    }

    /// A table that another process created; reads every slot that was ever used.
    pub fn attach(fd: OwnedFd) -> Result<Self, AttachError> {
        let table = Self::observe(fd)?;
        let high = table.map.word(H_HIGH).load(Acquire).min(table.slots);
        {
            let mut state = table.state.lock();
            for index in (0..high as u32).rev() {
                match table.slot(index) {
                    Some((HANDLE, handle)) => {
                        state.by_unique.insert(handle.unique, index);
                        state.inodes.entry(handle.node).or_default().handles.push(index);
                    }
                    Some((BACKING, handle)) => state.inodes.entry(handle.node).or_default().backing = Some(index),
                    _ => state.free.push(index),
                }
            }
        }
        Ok(table)
    }

    /// For handing it over.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd()
    }

    /// How full it is: of this process's view, so a keeper asks [`Self::high_water`].
    pub fn stats(&self) -> OpenStats {
        let handles = self.state.lock().by_unique.len() as u64;
        OpenStats { handles, high_water: self.high_water(), max_handles: self.slots, shape: self.shape() }
    }

    /// Most slots ever in use at once, whoever used them.
    pub fn high_water(&self) -> u64 {
        self.map.word(H_HIGH).load(Relaxed)
    }

    /// The mount's shape; `None` while it is not decided.
    pub fn shape(&self) -> Option<Shape> {
        match self.map.word(H_SHAPE).load(Acquire) {
            LARGE => Some(Shape::Large),
            SMALL => Some(Shape::Small),
            _ => None,
        }
    }

    /// Decides the mount's shape and returns it: the first decision holds.
    pub fn decide_shape(&self, wanted: Shape) -> Shape {
        let word = match wanted {
            Shape::Large => LARGE,
            Shape::Small => SMALL,
        };
        // One daemon writes at a time, and its successor sees what it wrote.
        let _ = self.map.word(H_SHAPE).compare_exchange(0, word, Release, Relaxed);
        self.shape().unwrap_or(wanted)
    }

    /// Records an open handle and returns it. A second call with the same `unique` (with or without [`RESEND_BIT`])
    /// returns the same handle while it is open.
    ///
    /// When the inode is already open in a mode that excludes `mode`, the handle gets the mode in force: ask
    /// [`Self::handle`].
    pub fn open(&self, unique: u64, node: u64, mode: OpenMode) -> Result<u64, TableFull> {
        let unique = unique & !RESEND_BIT;
        let mut state = self.state.lock();
        if let Some(index) = state.by_unique.get(&unique)
            && let Some((HANDLE, handle)) = self.slot(*index)
            && handle.node == node
        {
            return Ok(self.handle_of(*index));
        }
        let mode = self.mode_in_force(&state, node, mode);
        let index = self.take(&mut state, HANDLE, OpenHandle { node, mode, unique })?;
        state.by_unique.insert(unique, index);
        state.inodes.entry(node).or_default().handles.push(index);
        Ok(self.handle_of(index))
    }

    /// An open handle; `None` when it is not open (any more).
    pub fn handle(&self, fh: u64) -> Option<OpenHandle> {
        let index = self.index_of(fh)?;
        match self.slot(index) {
            Some((HANDLE, handle)) => Some(handle),
            _ => None,
        }
    }

    /// Closes a handle. `None` when it is not open: a RELEASE that is sent again is answered like the first.
    pub fn release(&self, fh: u64) -> Option<Released> {
        let mut state = self.state.lock();
        let index = self.index_of(fh)?;
        let Some((HANDLE, handle)) = self.slot(index) else { return None };
        self.give_back(&mut state, index);
        state.by_unique.remove(&handle.unique);
        let mut last = true;
        if let Some(inode) = state.inodes.get_mut(&handle.node) {
            inode.handles.retain(|other| *other != index);
            last = inode.handles.is_empty();
            if last && inode.backing.is_none() {
                state.inodes.remove(&handle.node);
            }
        }
        Some(Released { handle, last })
    }

    /// The mode that excludes others in which an inode is open now: `Cached`, `Passthrough`, or `None` when no handle is
    /// open or all are direct.
    pub fn inode_mode(&self, node: u64) -> Option<OpenMode> {
        let state = self.state.lock();
        self.exclusive_mode(&state, node)
    }

    /// The open handles of an inode.
    pub fn handles_of(&self, node: u64) -> Vec<u64> {
        let state = self.state.lock();
        state
            .inodes
            .get(&node)
            .map_or_else(Vec::new, |inode| inode.handles.iter().map(|index| self.handle_of(*index)).collect())
    }

    /// Records the backing id that is registered with the kernel for an inode. The id that was recorded before, if any,
    /// stays in force and is returned: one backing file per inode.
    pub fn set_backing(&self, node: u64, backing_id: u32) -> Result<u32, TableFull> {
        let mut state = self.state.lock();
        if let Some(id) = self.backing_in(&state, node) {
            return Ok(id);
        }
        let mode = OpenMode::Passthrough { backing_id };
        let index = self.take(&mut state, BACKING, OpenHandle { node, mode, unique: 0 })?;
        state.inodes.entry(node).or_default().backing = Some(index);
        Ok(backing_id)
    }

    /// The backing id of an inode.
    pub fn backing(&self, node: u64) -> Option<u32> {
        self.backing_in(&self.state.lock(), node)
    }

    /// Forgets the backing id of an inode and returns it, for BACKING_CLOSE. `None` while it is open passed through, or
    /// when there is none.
    pub fn clear_backing(&self, node: u64) -> Option<u32> {
        let mut state = self.state.lock();
        if matches!(self.exclusive_mode(&state, node), Some(OpenMode::Passthrough { .. })) {
            return None;
        }
        let id = self.backing_in(&state, node)?;
        let inode = state.inodes.get_mut(&node)?;
        let index = inode.backing.take()?;
        if inode.handles.is_empty() {
            state.inodes.remove(&node);
        }
        self.give_back(&mut state, index);
        Some(id)
    }

    /// Every inode that has a backing id, for whoever closes them all.
    pub fn backings(&self) -> Vec<(u64, u32)> {
        let state = self.state.lock();
        state.inodes.keys().filter_map(|node| Some((*node, self.backing_in(&state, *node)?))).collect()
    }

    fn backing_in(&self, state: &State, node: u64) -> Option<u32> {
        match self.slot(state.inodes.get(&node)?.backing?) {
            Some((BACKING, OpenHandle { mode: OpenMode::Passthrough { backing_id }, .. })) => Some(backing_id),
            _ => None,
        }
    }

    fn exclusive_mode(&self, state: &State, node: u64) -> Option<OpenMode> {
        let handles = &state.inodes.get(&node)?.handles;
        handles
            .iter()
            .filter_map(|index| self.slot(*index))
            .map(|(_, handle)| handle.mode)
            .find(|m| *m != OpenMode::Direct)
    }

    fn mode_in_force(&self, state: &State, node: u64, wanted: OpenMode) -> OpenMode {
        match wanted {
            OpenMode::Direct => wanted,
            OpenMode::Cached | OpenMode::Passthrough { .. } => self.exclusive_mode(state, node).unwrap_or(wanted),
        }
    }

    fn place(&self, index: u32) -> u64 {
        PAGE + SLOT_BYTES * u64::from(index)
    }

    /// Kind and contents of a slot that is in use.
    fn slot(&self, index: u32) -> Option<(u64, OpenHandle)> {
        let place = self.place(index);
        let kind = self.map.word(place).load(Acquire) & 0xff;
        if kind == FREE {
            return None;
        }
        let mut words = [0; 3];
        self.map.read(place + 8, &mut words);
        Some((kind, OpenHandle { unique: words[0], node: words[1], mode: OpenMode::unpack(words[2])? }))
    }

    fn take(&self, state: &mut State, kind: u64, handle: OpenHandle) -> Result<u32, TableFull> {
        let index = match state.free.pop() {
            Some(index) => index,
            None => {
                let high = self.high_water();
                if high >= self.slots {
                    return Err(TableFull("open"));
                }
                self.map.word(H_HIGH).store(high + 1, Release);
                high as u32 // At most 2^24.
            }
        };
        let place = self.place(index);
        let old = self.map.word(place).load(Relaxed) >> 8;
        let generation = match (old + 1) & GENERATION_MASK {
            0 => 1,
            generation => generation,
        };
        let OpenHandle { node, mode, unique } = handle;
        self.map.write(place + 8, &[unique, node, mode.pack()]);
        self.map.word(place).store(generation << 8 | kind, Release);
        Ok(index)
    }

    fn give_back(&self, state: &mut State, index: u32) {
        let word = self.map.word(self.place(index));
        word.store(word.load(Relaxed) & !0xff | FREE, Release);
        state.free.push(index);
    }

    fn handle_of(&self, index: u32) -> u64 {
        (self.map.word(self.place(index)).load(Relaxed) >> 8) << SLOT_BITS | u64::from(index)
    }

    /// The slot of a handle of the slot's present generation.
    fn index_of(&self, fh: u64) -> Option<u32> {
        let index = (fh & ((1 << SLOT_BITS) - 1)) as u32;
        (u64::from(index) < self.high_water().min(self.slots) && self.handle_of(index) == fh).then_some(index)
    }
}

fn total_len(slots: u64) -> u64 {
    (PAGE + SLOT_BYTES * slots).next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn again(table: &OpenTable) -> OpenTable {
        OpenTable::attach(table.fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn open_and_release_sent_again() {
        let table = OpenTable::create(8).unwrap();
        let fh = table.open(10, 100, OpenMode::Cached).unwrap();
        assert_ne!(fh, 0);
        assert_eq!(table.open(10 | RESEND_BIT, 100, OpenMode::Cached).unwrap(), fh);
        let next = again(&table);
        assert_eq!(next.open(10 | RESEND_BIT, 100, OpenMode::Cached).unwrap(), fh);
        assert_eq!(next.handle(fh).unwrap().node, 100);
        assert!(next.release(fh).unwrap().last);
        assert_eq!(next.release(fh), None);
        let other = next.open(12, 100, OpenMode::Cached).unwrap();
        assert_ne!(other, fh);
        assert_eq!(next.release(fh), None);
        assert_eq!(next.handle(0), None);
        assert_eq!(next.handle(u64::MAX), None);
    }

    #[test]
    fn modes_exclude_each_other_and_a_backing_stays() {
        let table = OpenTable::create(8).unwrap();
        assert_eq!(table.set_backing(7, 3).unwrap(), 3);
        assert_eq!(table.set_backing(7, 4).unwrap(), 3);
        let passed = table.open(2, 7, OpenMode::Passthrough { backing_id: 3 }).unwrap();
        let cached = table.open(4, 7, OpenMode::Cached).unwrap();
        assert_eq!(table.handle(cached).unwrap().mode, OpenMode::Passthrough { backing_id: 3 });
        let direct = table.open(6, 7, OpenMode::Direct).unwrap();
        assert_eq!(table.handle(direct).unwrap().mode, OpenMode::Direct);
        assert_eq!(table.clear_backing(7), None);
        let next = again(&table);
        assert_eq!(next.backing(7), Some(3));
        assert_eq!(next.handles_of(7).len(), 3);
        assert!(!next.release(passed).unwrap().last);
        assert!(!next.release(cached).unwrap().last);
        assert_eq!(next.inode_mode(7), None);
        assert!(next.release(direct).unwrap().last);
        assert_eq!(next.backings(), vec![(7, 3)]);
        assert_eq!(next.clear_backing(7), Some(3));
        assert_eq!(again(&next).backing(7), None);
    }

    #[test]
    fn the_first_shape_holds() {
        let table = OpenTable::create(2).unwrap();
        assert_eq!(again(&table).shape(), None);
        assert_eq!(table.decide_shape(Shape::Small), Shape::Small);
        let next = again(&table);
        assert_eq!((next.shape(), next.decide_shape(Shape::Large)), (Some(Shape::Small), Shape::Small));
    }

    #[test]
    fn full_and_garbage() {
        let table = OpenTable::create(2).unwrap();
        let first = table.open(2, 20, OpenMode::Cached).unwrap();
        table.open(4, 20, OpenMode::Cached).unwrap();
        assert_eq!(table.open(6, 20, OpenMode::Cached), Err(TableFull("open")));
        table.release(first).unwrap();
        table.open(6, 20, OpenMode::Cached).unwrap();
        let empty = Map::create("x", 4 * PAGE).unwrap();
        assert!(OpenTable::attach(empty.fd().try_clone_to_owned().unwrap()).is_err());
        table.map.word(H_HIGH).store(u64::MAX, Relaxed);
        assert!(OpenTable::attach(table.fd().try_clone_to_owned().unwrap()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn like_a_map(steps in proptest::collection::vec((0u8..10, 0u64..40, 0u64..4), 1..200)) {
            let mut table = OpenTable::create(16).unwrap();
            let mut model: HashMap<u64, (u64, u64)> = HashMap::new(); // fh -> (unique, node)
            let mut unique = 0;
            for (what, pick, node) in steps {
                match what {
                    0..=4 => {
                        unique += 2;
                        match table.open(unique, node, OpenMode::Cached) {
                            Ok(fh) => prop_assert!(model.insert(fh, (unique, node)).is_none()),
                            Err(_) => prop_assert_eq!(model.len(), 16),
                        }
                    }
                    5..=7 => {
                        let fh = model.keys().copied().nth(pick as usize % model.len().max(1));
                        if let Some(fh) = fh {
                            let (unique, node) = model.remove(&fh).unwrap();
                            let released = table.release(fh).unwrap();
                            prop_assert_eq!((released.handle.unique, released.handle.node), (unique, node));
                            prop_assert_eq!(released.last, !model.values().any(|(_, n)| *n == node));
                        }
                    }
                    8 => table = again(&table),
                    _ => {
                        for (fh, (unique, node)) in &model {
                            prop_assert_eq!(table.open(*unique | RESEND_BIT, *node, OpenMode::Cached).unwrap(), *fh);
                        }
                        prop_assert_eq!(table.stats().handles, model.len() as u64);
                    }
                }
            }
        }
    }
}
