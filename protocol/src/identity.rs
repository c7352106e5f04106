//! Names of things: datasets, paths, file versions, chunks, blocks.
//!
//! Invariant: a [`FileIdentity`] is a pure function of (dataset, path, version key, size). Bytes are stored, placed and
//! checked under it, so bytes of two versions can never be taken for each other.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

/// Unit of validity and of checksums, in bytes.
pub const BLOCK_SIZE: u64 = 64 * 1024;
/// Unit of placement and of files in the cache, in bytes: 1,024 blocks.
pub const CHUNK_SIZE: u64 = 64 * 1024 * 1024;
/// Longest path within a dataset, in bytes (PATH_MAX).
pub const MAX_PATH: usize = 4096;
/// Longest component of a path, in bytes (NAME_MAX).
pub const MAX_NAME: usize = 255;
/// Longest version key, in bytes.
pub const MAX_VERSION_KEY: usize = 255;

/// A Dataset, by the UID of its object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DatasetId(pub Uuid);

impl DatasetId {
    /// The identity of a dataset that no API server named: stable for the same namespace and name.
    pub fn local(namespace: &str, name: &str) -> Self {
        // Neither may contain '/', so the pair is unambiguous.
        Self(Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("forebay.io/dataset/{namespace}/{name}").as_bytes()))
    }

    /// From the 16 bytes of a message; `None` for any other length.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Uuid::from_slice(bytes).ok().map(Self)
    }

    /// Of what [`Display`](fmt::Display) shows.
    pub fn from_text(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().map(Self)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The 16 bytes, as a message carries them.
    pub fn to_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self.0.as_bytes())
    }
}

impl fmt::Debug for DatasetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for DatasetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Why bytes are no path of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// It does not begin with `/`.
    #[error("a path must begin with '/'")]
    NotAbsolute,
    /// It is longer than [`MAX_PATH`].
    #[error("a path has at most {MAX_PATH} bytes")]
    TooLong,
    /// A component is empty, `.`, `..`, over [`MAX_NAME`] bytes or holds a NUL.
    #[error("path component '{0}' is empty, '.', '..', over {MAX_NAME} bytes or has a NUL")]
    Component(String),
}

/// An absolute, normalised path within a dataset: `/` or `/a/b`, bytes, no trailing slash.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DatasetPath(Bytes);

impl DatasetPath {
    /// The root, `/`.
    pub fn root() -> Self {
        Self(Bytes::from_static(b"/"))
    }

    /// Checks and takes bytes as a path. A trailing slash is refused, except for the root.
    pub fn parse(bytes: impl Into<Bytes>) -> Result<Self, InvalidPath> {
        let bytes = bytes.into();
        if bytes.first() != Some(&b'/') {
            return Err(InvalidPath::NotAbsolute);
        }
        if bytes.len() > MAX_PATH {
            return Err(InvalidPath::TooLong);
        }
        if bytes.len() > 1 {
            for component in bytes[1..].split(|b| *b == b'/') {
                if !is_valid_name(component) {
                    return Err(InvalidPath::Component(String::from_utf8_lossy(component).into_owned()));
                }
            }
        }
        Ok(Self(bytes))
    }

    /// The bytes, `/` first.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, as a message carries them.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// Whether this is `/`.
    pub fn is_root(&self) -> bool {
        self.0.len() == 1
    }

    /// The path of an entry of this directory.
    pub fn join(&self, name: &[u8]) -> Result<Self, InvalidPath> {
        if !is_valid_name(name) {
            return Err(InvalidPath::Component(String::from_utf8_lossy(name).into_owned()));
        }
        let prefix = if self.is_root() { 0 } else { self.0.len() };
        if prefix + 1 + name.len() > MAX_PATH {
            return Err(InvalidPath::TooLong);
        }
        let mut joined = Vec::with_capacity(prefix + 1 + name.len());
        joined.extend_from_slice(&self.0[..prefix]);
        joined.push(b'/');
        joined.extend_from_slice(name);
        Ok(Self(joined.into()))
    }

    /// Directory and name; `None` for the root.
    pub fn split(&self) -> Option<(Self, Bytes)> {
        if self.is_root() {
            return None;
        }
        // A path that is not the root has a slash that is not its last byte.
        let slash = self.0.iter().rposition(|b| *b == b'/')?;
        let directory = if slash == 0 { Self::root() } else { Self(self.0.slice(..slash)) };
        Some((directory, self.0.slice(slash + 1..)))
    }

    /// The components, none for the root.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0[1..].split(|b| *b == b'/').filter(|c| !c.is_empty())
    }

    /// Whether `self` is `ancestor` or below it.
    pub fn starts_with(&self, ancestor: &Self) -> bool {
        ancestor.is_root()
            || (self.0.starts_with(&ancestor.0)
                && (self.0.len() == ancestor.0.len() || self.0[ancestor.0.len()] == b'/'))
    }
}

impl fmt::Debug for DatasetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Display for DatasetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// Whether bytes can be the name of a directory entry.
pub fn is_valid_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.contains(&0)
        && !name.contains(&b'/')
}

/// What the under store calls a version of an object: an ETag, a version id, or mtime + size. Opaque, at most
/// [`MAX_VERSION_KEY`] bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VersionKey(Bytes);

impl VersionKey {
    /// `None` when it is longer than [`MAX_VERSION_KEY`].
    pub fn new(bytes: impl Into<Bytes>) -> Option<Self> {
        let bytes = bytes.into();
        (bytes.len() <= MAX_VERSION_KEY).then_some(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, as a message carries them.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl fmt::Debug for VersionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

/// A version of a file's contents.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileVersion {
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since the epoch, as the source reports it.
    pub mtime_ns: i64,
    /// What the source calls this version.
    pub key: VersionKey,
}

impl FileVersion {
    /// The name under which bytes of this version at `path` are stored, placed and checked. The modification time is
    /// left out: the key decides.
    pub fn identity(&self, dataset: DatasetId, path: &DatasetPath) -> FileIdentity {
        let mut hasher = Xxh3::new();
        hasher.update(dataset.as_bytes());
        hasher.update(&(path.as_bytes().len() as u64).to_le_bytes());
        hasher.update(path.as_bytes());
        hasher.update(&(self.key.as_bytes().len() as u64).to_le_bytes());
        hasher.update(self.key.as_bytes());
        hasher.update(&self.size.to_le_bytes());
        FileIdentity(hasher.digest128())
    }
}

/// xxh3-128 of (dataset, path, version key, size).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIdentity(pub u128);

impl fmt::Debug for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// One chunk of a file version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey {
    /// Whose bytes.
    pub file: FileIdentity,
    /// Position: the chunk covers `[index * CHUNK_SIZE, (index + 1) * CHUNK_SIZE)` of the file.
    pub index: u32,
}

impl ChunkKey {
    /// Bytes of this chunk in a file of `size` bytes (0 when it lies beyond the end).
    pub fn len(&self, size: u64) -> u64 {
        let start = u64::from(self.index) * CHUNK_SIZE;
        size.saturating_sub(start).min(CHUNK_SIZE)
    }

    /// A 64-bit key for placement.
    pub fn placement_key(&self) -> u64 {
        let mut hasher = Xxh3::new();
        hasher.update(&self.file.0.to_le_bytes());
        hasher.update(&self.index.to_le_bytes());
        hasher.digest()
    }
}

/// A 64-bit key for the placement of a directory's metadata.
pub fn directory_placement_key(dataset: DatasetId, directory: &DatasetPath) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(b"dir");
    hasher.update(dataset.as_bytes());
    hasher.update(directory.as_bytes());
    hasher.digest()
}

/// A range of whole blocks of a file: `first` and `count` in blocks of [`BLOCK_SIZE`] from the start of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRange {
    /// The blocks that cover `len` bytes at `offset`.
    pub fn covering(offset: u64, len: u64) -> Self {
        if len == 0 {
            return Self { first: offset / BLOCK_SIZE, count: 0 };
        }
        let first = offset / BLOCK_SIZE;
        let last = (offset + len - 1) / BLOCK_SIZE;
        Self { first, count: last - first + 1 }
    }

    /// Offset of the first byte.
    pub fn offset(&self) -> u64 {
        self.first * BLOCK_SIZE
    }

    /// Bytes covered in a file of `size` bytes: the last block of a file may be short.
    pub fn len(&self, size: u64) -> u64 {
        size.min((self.first + self.count) * BLOCK_SIZE).saturating_sub(self.offset())
    }

    /// Whether no block is covered.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// crc32c of a block's bytes, seeded with its place: (file identity, block index from the start of the file). A block
/// that was flipped fails, and so does a good block of another file or another place. It is no MAC.
pub fn block_checksum(file: FileIdentity, block: u64, bytes: &[u8]) -> u32 {
    let mut place = [0u8; 24];
    place[..16].copy_from_slice(&file.0.to_le_bytes());
    place[16..].copy_from_slice(&block.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> DatasetPath {
        DatasetPath::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[test]
    fn paths_are_normal_or_refused() {
        for bad in ["", "a", "/a/", "//", "/a//b", "/.", "/a/..", "/a\0b"] {
            assert!(DatasetPath::parse(Bytes::copy_from_slice(bad.as_bytes())).is_err(), "{bad:?}");
        }
        assert!(DatasetPath::parse(Bytes::from(format!("/{}", "x".repeat(256)))).is_err());
        assert_eq!(path("/a/b").split(), Some((path("/a"), Bytes::from_static(b"b"))));
        assert_eq!(path("/a").split(), Some((path("/"), Bytes::from_static(b"a"))));
        assert_eq!(path("/").split(), None);
        assert_eq!(path("/").join(b"a").unwrap(), path("/a"));
        assert_eq!(path("/a").join(b"b c\n").unwrap(), path("/a/b c\n"));
        assert!(path("/a").join(b"b/c").is_err());
        assert!(path("/a/b").starts_with(&path("/a")));
        assert!(!path("/ab").starts_with(&path("/a")));
        assert!(path("/ab").starts_with(&path("/")));
    }

    #[test]
    fn identity_depends_on_every_part_but_the_time() {
        let dataset = DatasetId::local("default", "a");
        let version = |size, key: &'static [u8]| FileVersion {
            size,
            mtime_ns: 1,
            key: VersionKey::new(Bytes::from_static(key)).unwrap(),
        };
        let base = version(10, b"e1").identity(dataset, &path("/x"));
        assert_ne!(base, version(11, b"e1").identity(dataset, &path("/x")));
        assert_ne!(base, version(10, b"e2").identity(dataset, &path("/x")));
        assert_ne!(base, version(10, b"e1").identity(dataset, &path("/y")));
        assert_ne!(base, version(10, b"e1").identity(DatasetId::local("default", "b"), &path("/x")));
        let later = FileVersion { mtime_ns: 2, ..version(10, b"e1") };
        assert_eq!(base, later.identity(dataset, &path("/x")));
    }

    #[test]
    fn a_block_elsewhere_fails_its_checksum() {
        let (a, b) = (FileIdentity(1), FileIdentity(2));
        assert_ne!(block_checksum(a, 0, b"same"), block_checksum(b, 0, b"same"));
        assert_ne!(block_checksum(a, 0, b"same"), block_checksum(a, 1, b"same"));
        assert_ne!(block_checksum(a, 0, b"same"), block_checksum(a, 0, b"sane"));
    }

    #[test]
    fn block_ranges_cover_exactly() {
        assert_eq!(BlockRange::covering(0, 1), BlockRange { first: 0, count: 1 });
        assert_eq!(BlockRange::covering(BLOCK_SIZE - 1, 2), BlockRange { first: 0, count: 2 });
        assert_eq!(BlockRange::covering(5, 0).count, 0);
        assert_eq!(BlockRange { first: 1, count: 1 }.len(BLOCK_SIZE + 5), 5);
        assert_eq!(BlockRange { first: 1, count: 4 }.len(BLOCK_SIZE), 0);
    }

    #[test]
    fn chunk_lengths() {
        let chunk = |index| ChunkKey { file: FileIdentity(0), index };
        assert_eq!(chunk(0).len(10), 10);
        assert_eq!(chunk(0).len(CHUNK_SIZE + 1), CHUNK_SIZE);
        assert_eq!(chunk(1).len(CHUNK_SIZE + 1), 1);
        assert_eq!(chunk(2).len(CHUNK_SIZE + 1), 0);
    }
}
