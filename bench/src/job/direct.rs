//! Reads in which the page cache takes no part.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt as _, path::Path};

/// What O_DIRECT wants addresses, offsets and lengths to be multiples of.
pub(super) const ALIGNMENT: usize = 4096;

pub(super) fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32).open(path)
}

/// Memory to read into.
pub(super) struct Memory {
    bytes: Vec<u8>,
    len: usize,
}

impl Memory {
    /// For `len` bytes, made a multiple of the alignment.
    pub(super) fn new(len: usize) -> Self {
        let len = len.next_multiple_of(ALIGNMENT);
        Self { bytes: vec![0; len + ALIGNMENT], len }
    }

    pub(super) fn aligned(&mut self) -> &mut [u8] {
        let start = self.bytes.as_ptr().align_offset(ALIGNMENT);
        &mut self.bytes[start..start + self.len]
    }
}
