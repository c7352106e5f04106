//! Notifications to the kernel that `fuser` 0.18 can not send: a header without a body, written to the FUSE descriptor.

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;

/// `fuse_notify_code` of `include/uapi/linux/fuse.h`.
const FUSE_NOTIFY_RESEND: i32 = 7;
/// Since ABI 7.44, Linux 6.16.
const FUSE_NOTIFY_INC_EPOCH: i32 = 8;

/// Makes the kernel send again every request that was taken from `fuse` and not answered (Linux 6.9). They come with
/// bit 63 of `unique` set. A successor calls this once, after the descriptor is under its session.
pub fn notify_resend(fuse: impl AsFd) -> io::Result<()> {
    Ok(notify(fuse, FUSE_NOTIFY_RESEND)?)
}

/// Makes every entry that the kernel has cached for this mount unknown, in one step: each is looked up again when it is
/// next used. `false` when the kernel is older than 6.16.
pub fn notify_inc_epoch(fuse: impl AsFd) -> io::Result<bool> {
    match notify(fuse, FUSE_NOTIFY_INC_EPOCH) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// `struct fuse_out_header` with unique 0: len, code in place of the error, unique.
fn notify(fuse: impl AsFd, code: i32) -> Result<(), Errno> {
    let mut header = [0u8; 16];
    header[..4].copy_from_slice(&16u32.to_ne_bytes());
    header[4..8].copy_from_slice(&code.to_ne_bytes());
    rustix::io::retry_on_intr(|| rustix::io::write(&fuse, &header)).map(|_| ())
}
