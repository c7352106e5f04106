//! FUSE_INIT: what the kernel offers, what we accept, and what successors are offered.
//!
//! The keeper answers the kernel itself, so that a daemon that dies before it could does no harm. Every daemon then runs
//! its library's handshake against a replayed INIT whose flags are exactly the accepted ones: whatever a library of
//! another version would like, it agrees with what the kernel was told.
//!
//! Formats: `fuse_in_header`, `fuse_init_in`, `fuse_out_header`, `fuse_init_out` of `include/uapi/linux/fuse.h`.

/// Major version of the protocol.
const MAJOR: u32 = 7;
/// What `fuser` 0.18 speaks: structures of requests and replies are those of 7.40.
const MINOR: u32 = 40;
/// FUSE_INIT.
const OPCODE: u32 = 26;
const IN_HEADER: usize = 40;
/// major, minor, max_readahead, flags, flags2, 11 unused.
const INIT_IN: usize = 64;
/// Offset of `flags` in a request.
const AT_FLAGS: usize = IN_HEADER + 12;
/// Offset of `max_readahead`.
const AT_READ_AHEAD: usize = IN_HEADER + 8;

/// 64 requests of read-ahead and asynchronous direct I/O in the background: at 1 MiB each, more than hides the latency of
/// a worker; the kernel's default is 12.
const MAX_BACKGROUND: u16 = 64;
/// 3/4 of it, as the kernel's own default.
const CONGESTION_THRESHOLD: u16 = 48;
/// 256 pages of 4 KiB: 1 MiB, the kernel's default limit (fs.fuse.max_pages_limit).
const MAX_PAGES: u16 = 256;
/// The same in bytes. Nothing is ever written, but the kernel derives its buffers from it.
const MAX_WRITE: u32 = 1 << 20;
/// Files that are passed through are on a plain file system.
const MAX_STACK_DEPTH: u32 = 1;
/// Nanoseconds: time stamps are exact.
const TIME_GRAN: u32 = 1;

pub(crate) const ASYNC_READ: u64 = 1 << 0;
const DO_READDIRPLUS: u64 = 1 << 13;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES_FLAG: u64 = 1 << 22;
const CACHE_SYMLINKS: u64 = 1 << 23;
const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
const INIT_EXT: u64 = 1 << 30;
const HAS_EXPIRE_ONLY: u64 = 1 << 35;
pub(crate) const PASSTHROUGH: u64 = 1 << 37;
pub(crate) const HAS_RESEND: u64 = 1 << 39;
pub(crate) const ALLOW_IDMAP: u64 = 1 << 40;

/// What is accepted where offered. Left out, with the reason:
/// - BIG_WRITES, WRITEBACK_CACHE and the like: nothing is written;
/// - AUTO_INVAL_DATA: a node id never gets other bytes, so pages are dropped only on request;
/// - READDIRPLUS_AUTO: a program that lists first and stats later (`ls -l`) would get its attributes one by one;
/// - NO_OPEN_SUPPORT, NO_OPENDIR_SUPPORT: by these the kernel says that it understands ENOSYS as the answer to an open; it
///   does, whatever is accepted;
/// - OVER_IO_URING: requests in flight would be lost with a daemon; clone_fd is avoided for the same reason;
/// - REQUEST_TIMEOUT: a hand-over may take longer; nobody there at all is the keeper's own deadline;
/// - PASSTHROUGH, unless files are to be passed through.
const WANTED: u64 = ASYNC_READ
    | DO_READDIRPLUS
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES_FLAG
    | CACHE_SYMLINKS
    | EXPLICIT_INVAL_DATA
    | INIT_EXT
    | HAS_EXPIRE_ONLY
    | HAS_RESEND
    | ALLOW_IDMAP;

/// Why an INIT can not be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// Not an INIT, or too short.
    #[error("the kernel's first request is no FUSE_INIT")]
    Malformed,
    /// Another major version.
    #[error("the kernel speaks FUSE {0}.{1}, this program 7.x")]
    Version(u32, u32),
    /// Requests could not be sent again.
    #[error(
        "the kernel (FUSE {0}.{1}) cannot send requests again (FUSE_NOTIFY_RESEND): Linux 6.9 or later is needed for \
         mounts that survive their daemon"
    )]
    NoResend(u32, u32),
}

/// An INIT that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Negotiated {
    /// To be written to the descriptor.
    pub(crate) reply: Vec<u8>,
    /// The INIT that daemons are offered.
    pub(crate) offered: Vec<u8>,
    /// Accepted flags.
    pub(crate) flags: u64,
    /// Bytes of read-ahead that the kernel offered and were accepted.
    pub(crate) max_readahead: u32,
}

/// Decides on the kernel's INIT. `default_permissions`: whether the mount has that option, without which the kernel fails
/// a reply with ALLOW_IDMAP. `passthrough`: whether files are to be passed through, where the kernel can.
pub(crate) fn negotiate(init: &[u8], default_permissions: bool, passthrough: bool) -> Result<Negotiated, InitError> {
    let u32_at = |at: usize| init.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    let field = |at: usize| u32_at(at).ok_or(InitError::Malformed);
    if init.len() < IN_HEADER + INIT_IN || field(4)? != OPCODE || field(0)? as usize != init.len() {
        return Err(InitError::Malformed);
    }
    let (major, minor) = (field(IN_HEADER)?, field(IN_HEADER + 4)?);
    if major != MAJOR {
        return Err(InitError::Version(major, minor));
    }
    let max_readahead = field(AT_READ_AHEAD)?;
    let mut kernel = u64::from(field(AT_FLAGS)?);
    if kernel & INIT_EXT != 0 {
        kernel |= u64::from(field(AT_FLAGS + 4)?) << 32;
    }
    let mut flags = kernel & (WANTED | if passthrough { PASSTHROUGH } else { 0 });
    if !default_permissions {
        flags &= !ALLOW_IDMAP;
    }
    if flags & HAS_RESEND == 0 {
        return Err(InitError::NoResend(major, minor));
    }

    let mut reply = Vec::with_capacity(80);
    reply.extend_from_slice(&80u32.to_ne_bytes());
    reply.extend_from_slice(&0i32.to_ne_bytes());
    reply.extend_from_slice(&init[8..16]); // unique
    for word in [MAJOR, MINOR.min(minor), max_readahead, flags as u32] {
        reply.extend_from_slice(&word.to_ne_bytes());
    }
    reply.extend_from_slice(&MAX_BACKGROUND.to_ne_bytes());
    reply.extend_from_slice(&CONGESTION_THRESHOLD.to_ne_bytes());
    reply.extend_from_slice(&MAX_WRITE.to_ne_bytes());
    reply.extend_from_slice(&TIME_GRAN.to_ne_bytes());
    reply.extend_from_slice(&MAX_PAGES.to_ne_bytes());
    reply.extend_from_slice(&0u16.to_ne_bytes()); // map_alignment
    reply.extend_from_slice(&((flags >> 32) as u32).to_ne_bytes());
    let depth = if flags & PASSTHROUGH == 0 { 0 } else { MAX_STACK_DEPTH };
    reply.extend_from_slice(&depth.to_ne_bytes());
    reply.resize(80, 0); // request_timeout, unused

    let mut offered = init.to_vec();
    offered[AT_FLAGS..AT_FLAGS + 4].copy_from_slice(&(flags as u32).to_ne_bytes());
    offered[AT_FLAGS + 4..AT_FLAGS + 8].copy_from_slice(&((flags >> 32) as u32).to_ne_bytes());
    Ok(Negotiated { reply, offered, flags, max_readahead })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(minor: u32, flags: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [104, OPCODE, 2, 0, 0, 0, 0, 0, 0, 0, MAJOR, minor, 131_072, flags as u32, (flags >> 32) as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.resize(104, 0);
        bytes
    }

    #[test]
    fn accepts_what_is_wanted_and_offered_and_offers_that() {
        let all = u64::MAX;
        let first = negotiate(&init(45, all), true, false).unwrap();
        assert_eq!(first.flags, WANTED);
        assert_eq!(first.reply.len(), 80);
        assert_eq!(first.max_readahead, 131_072);
        // Negotiating the offered INIT changes nothing: every generation sees the same.
        let again = negotiate(&first.offered, true, false).unwrap();
        assert_eq!((again.flags, &again.offered), (first.flags, &first.offered));
        assert_eq!(negotiate(&init(45, all), false, false).unwrap().flags, WANTED & !ALLOW_IDMAP);
        let few = negotiate(&init(41, HAS_RESEND | INIT_EXT), true, false).unwrap();
        assert_eq!(few.flags, HAS_RESEND | INIT_EXT);
    }

    #[test]
    fn refuses_old_kernels_and_garbage() {
        assert_eq!(negotiate(&init(39, INIT_EXT | ASYNC_READ), true, false), Err(InitError::NoResend(7, 39)));
        // The upper flags count only with INIT_EXT.
        assert_eq!(negotiate(&init(39, HAS_RESEND), true, false), Err(InitError::NoResend(7, 39)));
        assert_eq!(negotiate(&[], true, false), Err(InitError::Malformed));
        assert_eq!(negotiate(&init(45, u64::MAX)[..100], true, false), Err(InitError::Malformed));
        let mut other = init(45, u64::MAX);
        other[40] = 8;
        assert_eq!(negotiate(&other, true, false), Err(InitError::Version(8, 45)));
    }
}
