//! The cache directory: its lock, its owner, its names.
//!
//! ```text
//! superblock          whose it is
//! index.redb          the index; index.redb.damaged: one that could not be read
//! chunks/abc/         4,096 directories by the first three hex digits of the identity
//!   <identity>-<n>    chunk n of a file version
//! trash-<uuid>/       what a former owner left, being deleted
//! ```
//!
//! One level of directories, not two: at ten million chunks each holds 2,400 names, and a small cache does not spend
//! a 4 KiB directory on every file.
//!
//! Invariants: every name is used relative to a descriptor of the directory, which carries the lock, so nothing is
//! ever created in a directory that another process took over. Only names of this list are ever deleted, and never
//! through a symbolic link.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forebay_protocol::{ChunkKey, FileIdentity};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags};
use uuid::Uuid;

use crate::error::OpenError;
use crate::superblock::{self, Found, Superblock};

/// Number of directories under `chunks/`.
pub(crate) const DIRECTORIES: u16 = 4096;
pub(crate) const INDEX: &str = "index.redb";
pub(crate) const INDEX_DAMAGED: &str = "index.redb.damaged";

const SUPERBLOCK: &str = "superblock";
const SUPERBLOCK_NEW: &str = "superblock.new";
const CHUNKS: &str = "chunks";
const TRASH: &str = "trash-";
/// What a fresh file system has of its own.
const LOST_AND_FOUND: &str = "lost+found";

/// An open and locked cache directory. The lock goes with the last reference.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
    path: PathBuf,
    uuid: Uuid,
}

/// What somebody removed or moved away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The directory itself; another one may have its name now.
    Directory {
        /// It has no name at all, so it cannot come back.
        deleted: bool,
    },
    /// Its `chunks/`.
    Chunks,
}

/// Free and total bytes of the file system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space {
    pub(crate) available: u64,
    pub(crate) total: u64,
}

impl Root {
    /// Opens or makes the directory, locks it, and makes it ours. What a former owner left is out of the way, but
    /// perhaps not deleted yet (see [`Self::empty_trash`]).
    pub(crate) fn open(path: &Path, owner: &str) -> Result<Self, OpenError> {
        let io = |action| move |source: io::Error| OpenError::Io { path: path.to_owned(), action, source };
        std::fs::create_dir_all(path).map_err(io("create"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io("open")(e.into()))?;
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::InUse { path: path.to_owned() }),
            Err(error) => return Err(io("lock")(error.into())),
        }
        let mut root = Self { fd, path: path.to_owned(), uuid: Uuid::nil() };
        root.uuid = root.claim(owner)?;
        root.make_chunks().map_err(io("create chunks/ in"))?;
        Ok(root)
    }

    /// Makes `chunks/` unless it is there.
    pub(crate) fn make_chunks(&self) -> io::Result<()> {
        match rustix::fs::mkdirat(&self.fd, CHUNKS, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What the superblock calls this directory; its index carries the same.
    pub(crate) fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What was removed or replaced under us. An error says that it cannot be looked at, not that it is gone.
    pub(crate) fn loss(&self) -> io::Result<Option<Loss>> {
        use rustix::io::Errno;
        let held = rustix::fs::fstat(&self.fd)?;
        let there = match rustix::fs::stat(&self.path) {
            Ok(named) => (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino),
            Err(Errno::NOENT | Errno::NOTDIR) => false,
            Err(error) => return Err(error.into()),
        };
        if held.st_nlink == 0 || !there {
            return Ok(Some(Loss::Directory { deleted: held.st_nlink == 0 }));
        }
        match rustix::fs::statat(&self.fd, CHUNKS, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(None),
            Err(Errno::NOENT) => Ok(Some(Loss::Chunks)),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn space(&self) -> io::Result<Space> {
        let found = rustix::fs::fstatvfs(&self.fd)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Space { available: bytes(found.f_bavail), total: bytes(found.f_blocks) })
    }

    /// A new chunk file; `AlreadyExists` when there is one, `NotFound` when `chunks/` was removed.
    pub(crate) fn create_chunk(&self, key: ChunkKey) -> io::Result<File> {
        let name = chunk_path(key);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::openat(&self.fd, &name, flags, mode) {
            Err(rustix::io::Errno::NOENT) => {}
            other => return Ok(other?.into()),
        }
        match rustix::fs::mkdirat(&self.fd, directory_path(directory_of(key)), Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(rustix::fs::openat(&self.fd, &name, flags, mode)?.into())
    }

    /// An existing chunk file and its length. What is there but no regular file is `InvalidData`.
    pub(crate) fn open_chunk(&self, key: ChunkKey) -> io::Result<(File, u64)> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = match rustix::fs::openat(&self.fd, chunk_path(key), flags, Mode::empty()) {
            // What is there can still be read; a write fails softly.
            Err(rustix::io::Errno::ROFS | rustix::io::Errno::ACCESS) => {
                let flags = flags.difference(OFlags::RDWR) | OFlags::RDONLY;
                rustix::fs::openat(&self.fd, chunk_path(key), flags, Mode::empty())?.into()
            }
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::ISDIR | rustix::io::Errno::NXIO) => {
                return Err(io::ErrorKind::InvalidData.into());
            }
            other => other?.into(),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((file, metadata.len()))
    }

    /// Unlinks a chunk file; one that is not there is unlinked.
    pub(crate) fn unlink_chunk(&self, key: ChunkKey) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, chunk_path(key), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            // Somebody's directory in our place: it holds no bytes of ours and stays where it is.
            Err(rustix::io::Errno::ISDIR) => Err(io::ErrorKind::IsADirectory.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// The chunks with a file in a directory, ascending. Names that are none of ours are left alone.
    pub(crate) fn chunks_in(&self, directory: u16) -> io::Result<Vec<ChunkKey>> {
        let mut keys: Vec<ChunkKey> = match self.list(&directory_path(directory)) {
            Ok(names) => names.iter().filter_map(|name| parse_name(name)).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        keys.retain(|key| directory_of(*key) == directory);
        keys.sort_unstable();
        Ok(keys)
    }

    /// Opens or creates the index's file.
    pub(crate) fn open_index(&self) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, INDEX, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Moves an index that cannot be read out of the way; the one that was there before is deleted.
    pub(crate) fn set_index_aside(&self) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.fd, INDEX, &self.fd, INDEX_DAMAGED)?)
    }

    /// Deletes what former owners left. May take long.
    pub(crate) fn empty_trash(&self) {
        let Ok(names) = self.list(".") else { return };
        for name in names.iter().filter_map(|name| std::str::from_utf8(name).ok()).filter(|name| is_trash(name)) {
            // Does not follow links, within the tree or at its root.
            if let Err(error) = std::fs::remove_dir_all(self.path.join(name)) {
                tracing::warn!(path = %self.path.join(name).display(), %error, "cannot delete an old cache");
            }
        }
    }

    /// Reads the superblock and makes the directory ours, or says why it cannot be.
    fn claim(&self, owner: &str) -> Result<Uuid, OpenError> {
        let io = |action| move |source: io::Error| OpenError::Io { path: self.path.clone(), action, source };
        match self.read_superblock().map_err(io("read the superblock of"))? {
            Some(Found::Ours(Superblock { uuid, owner: holder })) if holder == owner => return Ok(uuid),
            Some(Found::Ours(Superblock { uuid: _, owner: holder })) => {
                tracing::warn!(path = %self.path.display(), former = holder, owner, "emptying another owner's cache");
                self.discard().map_err(io("empty"))?;
            }
            Some(Found::Unusable) => {
                tracing::warn!(path = %self.path.display(), "emptying a cache with an unusable superblock");
                self.discard().map_err(io("empty"))?;
            }
            Some(Found::Foreign) => return Err(OpenError::NotACache { path: self.path.clone() }),
            None => {
                let names = self.list(".").map_err(io("list"))?;
                let stranger =
                    |name: &Vec<u8>| *name != SUPERBLOCK_NEW.as_bytes() && *name != LOST_AND_FOUND.as_bytes();
                if names.iter().any(stranger) {
                    return Err(OpenError::NotACache { path: self.path.clone() });
                }
            }
        }
        let uuid = Uuid::new_v4();
        self.write_superblock(&Superblock { uuid, owner: owner.to_owned() }).map_err(io("write the superblock of"))?;
        Ok(uuid)
    }

    fn read_superblock(&self) -> io::Result<Option<Found>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = match rustix::fs::openat(&self.fd, SUPERBLOCK, flags, Mode::empty()) {
            Ok(fd) => fd.into(),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if !file.metadata()?.is_file() {
            return Ok(Some(Found::Foreign));
        }
        let mut bytes = vec![0; superblock::MAX_LEN];
        let mut len = 0;
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], len as u64)? {
                0 => break,
                read => len += read,
            }
        }
        Ok(Some(superblock::decode(&bytes[..len])))
    }

    fn write_superblock(&self, superblock: &Superblock) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: File = rustix::fs::openat(&self.fd, SUPERBLOCK_NEW, flags, Mode::RUSR | Mode::WUSR)?.into();
        file.write_all_at(superblock::encode(superblock).as_bytes(), 0)?;
        file.sync_all()?;
        rustix::fs::renameat(&self.fd, SUPERBLOCK_NEW, &self.fd, SUPERBLOCK)?;
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    /// Takes everything that a former owner cached out of the way. The superblock stays until it is replaced, so that
    /// an end in the middle is no directory without one.
    fn discard(&self) -> io::Result<()> {
        for name in [INDEX, INDEX_DAMAGED] {
            match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match rustix::fs::renameat(&self.fd, CHUNKS, &self.fd, format!("{TRASH}{}", Uuid::new_v4())) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self, path: &str) -> io::Result<Vec<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, path, flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }
}

/// The directory of a chunk: the first three hex digits of the file's identity.
pub(crate) fn directory_of(key: ChunkKey) -> u16 {
    (key.file.0 >> 116) as u16
}

/// Whether a file is a regular file with no name left: somebody deleted it.
pub(crate) fn is_unlinked(file: &File) -> bool {
    rustix::fs::fstat(file)
        .is_ok_and(|stat| stat.st_nlink == 0 && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}

fn is_trash(name: &str) -> bool {
    name.strip_prefix(TRASH).is_some_and(|uuid| Uuid::try_parse(uuid).is_ok())
}

fn directory_path(directory: u16) -> String {
    format!("{CHUNKS}/{directory:03x}")
}

fn chunk_path(key: ChunkKey) -> String {
    format!("{CHUNKS}/{:03x}/{}-{}", directory_of(key), key.file, key.index)
}

fn parse_name(name: &[u8]) -> Option<ChunkKey> {
    let (file, index) = std::str::from_utf8(name).ok()?.split_once('-')?;
    let key = ChunkKey { file: FileIdentity(u128::from_str_radix(file, 16).ok()?), index: index.parse().ok()? };
    // Only the one way to write it: no sign, no leading zero, no capitals.
    (name == format!("{}-{}", key.file, key.index).as_bytes()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_one_way_only() {
        let key = ChunkKey { file: FileIdentity(0xabc << 116 | 7), index: 12 };
        assert_eq!(chunk_path(key), "chunks/abc/abc00000000000000000000000000007-12");
        assert_eq!(parse_name(b"abc00000000000000000000000000007-12"), Some(key));
        for bad in
            ["abc-1", "ABC00000000000000000000000000007-12", "abc00000000000000000000000000007-012", "x", "-", ""]
        {
            assert_eq!(parse_name(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse_name(b"abc00000000000000000000000000007-+2"), None);
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused_and_one_of_another_owner_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("thesis.tex"), "text").unwrap();
        assert!(matches!(Root::open(&path, "a"), Err(OpenError::NotACache { .. })));
        std::fs::write(path.join("superblock"), "of a disk").unwrap();
        assert!(matches!(Root::open(&path, "a"), Err(OpenError::NotACache { .. })));
        assert!(path.join("thesis.tex").exists());

        let path = dir.path().join("deep/cache");
        let root = Root::open(&path, "a").unwrap();
        let first = root.uuid();
        let key = ChunkKey { file: FileIdentity(9), index: 0 };
        root.create_chunk(key).unwrap();
        assert!(matches!(Root::open(&path, "a"), Err(OpenError::InUse { path: named }) if named == path));
        drop(root);
        let root = Root::open(&path, "a").unwrap();
        assert_eq!(root.uuid(), first);
        assert_eq!(root.chunks_in(0).unwrap(), [key]);
        drop(root);

        std::fs::write(path.join("notes.txt"), "mine").unwrap();
        let root = Root::open(&path, "b").unwrap();
        assert_ne!(root.uuid(), first);
        assert!(root.chunks_in(0).unwrap().is_empty());
        root.empty_trash();
        let mut names: Vec<_> = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["chunks", "notes.txt", "superblock"]);
    }

    #[test]
    fn an_interrupted_first_start_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(SUPERBLOCK_NEW), "forebay").unwrap();
        std::fs::create_dir(dir.path().join(LOST_AND_FOUND)).unwrap();
        assert!(Root::open(dir.path(), "a").is_ok());
    }
}
