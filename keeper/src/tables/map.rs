//! A memfd, mapped: bounds-checked atomic words, and nothing else.
//!
//! The file has its full (sparse) length from the start and is sealed against shrinking and growing, so no access
//! within the length can fault for its place; memory is used only where something was written. Holding a whole table's
//! address range for ever is what makes references into it stable.
//!
//! The only unsafe code of the tables. Other processes map the same file, so every access is that of an atomic word:
//! whatever another process does, the worst is a wrong value. Right values come from the writer's discipline: words are
//! written (Relaxed) before the one that publishes them is stored (Release).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// `include/uapi/linux/magic.h`.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// Page size that offsets of regions are rounded to.
pub(super) const PAGE: u64 = 4096;

pub(super) struct Map {
    base: NonNull<u8>,
    len: u64,
    fd: OwnedFd,
}

// SAFETY: the mapping is memory that stays valid until drop, and is only accessed as atomics.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// A new file of `len` bytes, all zero.
    pub(super) fn create(name: &str, len: u64) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, len)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::over(fd, len)
    }

    /// Maps a file that another process created. Refused unless it is sealed against shrinking, and of ordinary pages: a
    /// shorter file, or huge pages that ran out, would turn an access into SIGBUS.
    pub(super) fn attach(fd: OwnedFd) -> io::Result<Self> {
        // First: only files in memory have seals, so nothing that is asked below can wait for anybody.
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the table is not sealed against shrinking"));
        }
        if rustix::fs::fstatfs(&fd)?.f_type != TMPFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the table is not of ordinary pages"));
        }
        let len = u64::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        if len < PAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the table is shorter than its header"));
        }
        Self::over(fd, len)
    }

    fn over(fd: OwnedFd, len: u64) -> io::Result<Self> {
        let bytes = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust memory.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, len, fd })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is a mapping of the same file.
    pub(super) fn same(&self, other: &Self) -> io::Result<bool> {
        let (mine, theirs) = (rustix::fs::fstat(&self.fd)?, rustix::fs::fstat(&other.fd)?);
        Ok((mine.st_dev, mine.st_ino) == (theirs.st_dev, theirs.st_ino))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The word at `offset`. Panics when it is not aligned or beyond the end: callers pass offsets that they checked
    /// against the table's layout, so this is the second fence, not the first.
    pub(super) fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset.checked_add(8).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds and aligned (just checked; the base is page-aligned), and valid for the life of the map.
        // The conversion is lossless: `len` fitted into usize when it was mapped. All access is by this function, so
        // no word is ever anything but an atomic.
        unsafe { &*self.base.as_ptr().add(offset as usize).cast::<AtomicU64>() }
    }

    /// Reads consecutive words. What was published before is seen whole by who has seen the publishing store.
    pub(super) fn read(&self, offset: u64, words: &mut [u64]) {
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.word(offset + 8 * index as u64).load(Relaxed);
        }
    }

    /// Writes consecutive words, to be published by a later Release store.
    pub(super) fn write(&self, offset: u64, words: &[u64]) {
        for (index, word) in words.iter().enumerate() {
            self.word(offset + 8 * index as u64).store(*word, Relaxed);
        }
    }

    /// Gives the memory of a range back; it reads as zeros afterwards. `offset` and `len` are whole pages.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE) && offset.checked_add(len).is_some_and(|end| end <= self.len));
        rustix::fs::fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    /// Memory in use, in bytes.
    pub(super) fn resident(&self) -> u64 {
        rustix::fs::fstat(&self.fd).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `map` got from mmap; no reference into it outlives `self`.
        // A failure leaves an unused mapping and nothing to do about it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::{Acquire, Release};

    #[test]
    fn two_mappings_see_one_memory() {
        let a = Map::create("test", 16 * PAGE).unwrap();
        let b = Map::attach(a.fd().try_clone_to_owned().unwrap()).unwrap();
        a.write(104, &[5, 6]);
        a.word(0).store(1, Release);
        assert_eq!(b.word(0).load(Acquire), 1);
        let mut words = [0; 2];
        b.read(104, &mut words);
        assert_eq!(words, [5, 6]);
        assert_eq!(a.resident(), PAGE);
        a.punch(0, PAGE).unwrap();
        assert_eq!(a.resident(), 0);
        assert_eq!(b.word(0).load(Acquire), 0);
    }

    #[test]
    fn the_file_can_not_shrink_and_others_are_refused() {
        let a = Map::create("test", PAGE).unwrap();
        assert!(rustix::fs::ftruncate(a.fd(), 0).is_err());
        let plain = rustix::fs::memfd_create("plain", MemfdFlags::CLOEXEC).unwrap();
        assert!(Map::attach(plain).is_err());
        let flags = rustix::io::fcntl_getfd(a.fd()).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    #[should_panic]
    fn beyond_the_end_is_refused() {
        Map::create("test", PAGE).unwrap().word(PAGE);
    }
}
