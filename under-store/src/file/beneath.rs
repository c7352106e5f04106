//! Opening below a root, and nowhere else.
//!
//! The kernel resolves (openat2, `RESOLVE_BENEATH`): no `..`, no symlink and no rename at the wrong moment leads out.
//! It also refuses absolute symlinks whose target is within the root; for those the real path is looked up first and
//! then opened by the same rule with no symlink allowed, so that a path that changes in between fails.

use std::{ffi::OsStr, fs, os::fd::OwnedFd, os::unix::ffi::OsStrExt, path::Path, path::PathBuf};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, Stat, fstat, open, openat2},
    io::Errno,
};

/// Times that a resolution disturbed by a rename is tried: each needs a rename of its own to fail.
const ATTEMPTS: u32 = 64;

/// An open root.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens the directory at `path`; symlinks in that path are the operator's and are followed.
    pub(crate) fn open(path: &Path) -> Result<Self, Errno> {
        let fd = open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens what is at `relative` (empty: the root itself) following symlinks that stay below the root.
    /// [`Errno::XDEV`]: it is outside.
    pub(crate) fn open_beneath(&self, relative: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let relative = Path::new(OsStr::from_bytes(relative));
        match self.resolve(relative, flags, ResolveFlags::NO_MAGICLINKS) {
            Err(Errno::XDEV) => {
                let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
                let real = fs::canonicalize(self.path.join(relative)).map_err(errno)?;
                let root = fs::canonicalize(&self.path).map_err(errno)?;
                let relative = real.strip_prefix(&root).map_err(|_| Errno::XDEV)?;
                self.resolve(relative, flags, ResolveFlags::NO_SYMLINKS)
            }
            other => other,
        }
    }

    /// What is at `relative`, symlinks followed as above; nothing is opened in a way that it would notice.
    pub(crate) fn stat(&self, relative: &[u8]) -> Result<Stat, Errno> {
        fstat(self.open_beneath(relative, OFlags::PATH)?)
    }

    fn resolve(&self, relative: &Path, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let mut attempts = 0;
        loop {
            let resolve = ResolveFlags::BENEATH | resolve;
            match openat2(&self.fd, relative, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => attempts += 1,
                other => return other,
            }
        }
    }
}
