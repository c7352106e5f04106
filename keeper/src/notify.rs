//! Notifications to the kernel that `fuser` 0.18 can not send, written to the FUSE descriptor.

use std::io;
use std::os::fd::AsFd;

/// `fuse_notify_code` of `include/uapi/linux/fuse.h`.
const FUSE_NOTIFY_INVAL_ENTRY: i32 = 3;
/// A flag of FUSE_NOTIFY_INVAL_ENTRY, since ABI 7.38, Linux 6.2.
const FUSE_EXPIRE_ONLY: u32 = 1;
const FUSE_NOTIFY_RESEND: i32 = 7;
const HEADER: usize = 16;

/// Makes the kernel send again every request that was taken from `fuse` and not answered (Linux 6.9). They come with
/// bit 63 of `unique` set. A successor calls this once, after the descriptor is under its session.
pub fn notify_resend(fuse: impl AsFd) -> io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::io::write(&fuse, &header(HEADER, FUSE_NOTIFY_RESEND)))?;
    Ok(())
}

/// Makes an entry that the kernel has cached unknown: it is looked up again when it is next used. If it still is the same
/// node, everything cached for it stays, its pages too; that is the difference to invalidating it. Errors: `ENOENT` when
/// the kernel does not know the directory or the name.
///
/// It waits for the directory's lock, which a look-up may hold that waits for a daemon: never call it from a thread that
/// answers requests.
pub fn notify_expire_entry(fuse: impl AsFd, parent: u64, name: &[u8]) -> io::Result<()> {
    // struct fuse_notify_inval_entry_out: parent u64, namelen u32, flags u32; then the name and a NUL.
    let length = HEADER + 16 + name.len() + 1;
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&header(length, FUSE_NOTIFY_INVAL_ENTRY));
    message.extend_from_slice(&parent.to_ne_bytes());
    // A name has at most 255 bytes.
    message.extend_from_slice(&(name.len() as u32).to_ne_bytes());
    message.extend_from_slice(&FUSE_EXPIRE_ONLY.to_ne_bytes());
    message.extend_from_slice(name);
    message.push(0);
    rustix::io::retry_on_intr(|| rustix::io::write(&fuse, &message))?;
    Ok(())
}

/// `struct fuse_out_header` with unique 0: len, code in place of the error, unique.
fn header(length: usize, code: i32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&(length as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&code.to_ne_bytes());
    header
}
