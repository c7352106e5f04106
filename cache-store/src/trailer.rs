//! What a chunk file says of itself: the format on disk.
//!
//! ```text
//! file     = bytes of the chunk (sparse), zeros to a multiple of 4,096, trailer
//! trailer  = header, zeros to a multiple of 8, marks [8], validity [u64; ceil(blocks / 64)], checksums [u32; blocks],
//!            trailer length u32, "FBTR"
//! header   = "FBCHUNK\0", format u16 = 1, header length u16, chunk index u32, dataset [16], file size u64,
//!            key length u16, path length u16, version key, path, crc32c u32 of all before it
//! marks    = 0xA5 when pinned or 0, zeros
//! ```
//!
//! Integers are little-endian. The bytes come first so that a complete file can be handed to the kernel as it is. The
//! trailer is found from the end of the file: its length is in its last 8 bytes. Checksums are
//! [`block_checksum`](forebay_protocol::block_checksum)s, so neither a block nor a whole file can pass for another.
//!
//! Invariants: [`decode`] is total: any bytes give a trailer or an error, in bounded time and memory. Validity and
//! checksums have no checksum of their own: a flipped validity bit either hides a good block or shows one that fails.

use fixed::{read_u16, read_u32, read_u64};
use forebay_protocol::{BLOCK_SIZE, CHUNK_SIZE, ChunkKey, DatasetId, DatasetPath, FileVersion, VersionKey};

use crate::blocks::BlockSet;

/// Version of the format; a file of another one is dropped.
pub const FORMAT: u16 = 1;
/// Where a trailer begins, and what the disk allocates in.
pub const PAGE: u64 = 4096;
/// The largest trailer: header with the longest key and path (4,399 + padding), marks, 1,024 bits and checksums, end.
pub const MAX_TRAILER: usize = 4400 + 8 + 128 + 4096 + 8;

const MAGIC: &[u8; 8] = b"FBCHUNK\0";
const END_MAGIC: &[u8; 4] = b"FBTR";
const HEADER_FIXED: usize = 8 + 2 + 2 + 4 + 16 + 8 + 2 + 2;
const MARKS: usize = 8;
const END: usize = 8;
const PINNED: u8 = 0xA5;

/// Why bytes are no trailer of a chunk file. The file is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrailerError {
    /// Shorter or longer than it says.
    #[error("chunk file with a trailer of the wrong length")]
    Length,
    /// No magic number.
    #[error("not a chunk file")]
    Magic,
    /// Written by another version.
    #[error("chunk file of format {0}")]
    Format(u16),
    /// The header fails its checksum.
    #[error("chunk file with a damaged header")]
    Checksum,
    /// A field does not hold what it must.
    #[error("chunk file with a bad {0}")]
    Field(&'static str),
}

/// Whose bytes a chunk file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose file.
    pub dataset: DatasetId,
    /// Which file.
    pub path: DatasetPath,
    /// Which version of it.
    pub key: VersionKey,
    /// Bytes of the whole file.
    pub size: u64,
    /// Which chunk of it.
    pub index: u32,
}

impl Header {
    /// The name under which these bytes are stored.
    pub fn chunk_key(&self) -> ChunkKey {
        let version = FileVersion { size: self.size, mtime_ns: 0, key: self.key.clone() };
        ChunkKey { file: version.identity(self.dataset, &self.path), index: self.index }
    }

    fn len(&self) -> usize {
        HEADER_FIXED + self.key.as_bytes().len() + self.path.as_bytes().len() + 4
    }
}

/// A decoded trailer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Whose bytes.
    pub header: Header,
    /// Whether the chunk is pinned: a second copy of what the index says, for when the index is lost.
    pub pinned: bool,
    /// Blocks written in full.
    pub valid: BlockSet,
    /// One per block; only those of valid blocks mean anything.
    pub checksums: Vec<u32>,
}

/// Offsets in a chunk file; a pure function of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the chunk.
    pub len: u64,
    /// Blocks of the chunk.
    pub blocks: u32,
    /// File-relative index of its first block.
    pub first_block: u64,
    /// Where the trailer begins.
    pub trailer: u64,
    /// Where the marks are.
    pub marks: u64,
    /// Where the validity bits are.
    pub validity: u64,
    /// Where the checksums are.
    pub checksums: u64,
    /// Where the file ends.
    pub end: u64,
}

impl Layout {
    /// `None` when the chunk lies beyond the end of its file.
    pub fn of(header: &Header) -> Option<Self> {
        let first_block = u64::from(header.index) * (CHUNK_SIZE / BLOCK_SIZE);
        let len = ChunkKey { file: forebay_protocol::FileIdentity(0), index: header.index }.len(header.size);
        if len == 0 {
            return None;
        }
        // At most 1,024.
        let blocks = len.div_ceil(BLOCK_SIZE) as u32;
        let trailer = len.next_multiple_of(PAGE);
        let marks = trailer + (header.len() as u64).next_multiple_of(8);
        let validity = marks + MARKS as u64;
        let checksums = validity + u64::from(blocks.div_ceil(64)) * 8;
        let end = checksums + u64::from(blocks) * 4 + END as u64;
        Some(Self { len, blocks, first_block, trailer, marks, validity, checksums, end })
    }

    /// Bytes on disk beside the bytes of blocks: the trailer and what rounding to pages adds. At most 16,383.
    pub fn overhead(&self) -> u16 {
        (self.end.next_multiple_of(PAGE) - self.len) as u16
    }

    /// Bytes of `count` blocks from `first`; the chunk's last block may be short.
    pub fn bytes_of(&self, first: u32, count: u32) -> u64 {
        let start = u64::from(first) * BLOCK_SIZE;
        self.len.min((u64::from(first) + u64::from(count)) * BLOCK_SIZE).saturating_sub(start)
    }

    /// Bytes of the blocks of a set.
    pub fn bytes_in(&self, set: &BlockSet) -> u64 {
        set.runs().map(|run| self.bytes_of(run.first, run.count)).sum()
    }
}

/// The trailer's bytes. `None` when the chunk lies beyond the end of its file, or sets and checksums are not those of
/// its blocks.
pub fn encode(trailer: &Trailer) -> Option<Vec<u8>> {
    let Trailer { header, pinned, valid, checksums } = trailer;
    let layout = Layout::of(header)?;
    if valid.blocks() != layout.blocks || checksums.len() != layout.blocks as usize {
        return None;
    }
    let Header { dataset, path, key, size, index } = header;
    let length = (layout.end - layout.trailer) as usize;
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&(header.len() as u16).to_le_bytes());
    out.extend_from_slice(&index.to_le_bytes());
    out.extend_from_slice(dataset.as_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&(key.as_bytes().len() as u16).to_le_bytes());
    out.extend_from_slice(&(path.as_bytes().len() as u16).to_le_bytes());
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(path.as_bytes());
    out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
    out.resize((layout.marks - layout.trailer) as usize, 0);
    out.extend_from_slice(&marks(*pinned));
    out.extend_from_slice(&valid.to_bytes());
    checksums.iter().for_each(|checksum| out.extend_from_slice(&checksum.to_le_bytes()));
    out.extend_from_slice(&(length as u32).to_le_bytes());
    out.extend_from_slice(END_MAGIC);
    Some(out)
}

/// The bytes at [`Layout::marks`].
pub(crate) fn marks(pinned: bool) -> [u8; MARKS] {
    let mut marks = [0; MARKS];
    marks[0] = if pinned { PINNED } else { 0 };
    marks
}

/// Reads the trailer at the end of a file: `tail` is its last `min(file_len, MAX_TRAILER)` bytes, or more.
pub fn decode_tail(tail: &[u8], file_len: u64) -> Result<Trailer, TrailerError> {
    let end = tail.last_chunk::<END>().ok_or(TrailerError::Length)?;
    if end[4..] != *END_MAGIC {
        return Err(TrailerError::Magic);
    }
    let length = read_u32(end, 0) as usize;
    if length > MAX_TRAILER {
        return Err(TrailerError::Length);
    }
    let start = tail.len().checked_sub(length).ok_or(TrailerError::Length)?;
    let trailer = decode(&tail[start..])?;
    match Layout::of(&trailer.header) {
        Some(layout) if layout.end == file_len => Ok(trailer),
        _ => Err(TrailerError::Length),
    }
}

/// Reads exactly one trailer.
pub fn decode(bytes: &[u8]) -> Result<Trailer, TrailerError> {
    if bytes.len() < HEADER_FIXED + 4 || bytes.len() > MAX_TRAILER {
        return Err(TrailerError::Length);
    }
    if bytes[..8] != *MAGIC {
        return Err(TrailerError::Magic);
    }
    let format = read_u16(bytes, 8);
    if format != FORMAT {
        return Err(TrailerError::Format(format));
    }
    let (key_len, path_len) = (usize::from(read_u16(bytes, 40)), usize::from(read_u16(bytes, 42)));
    let crc_at = HEADER_FIXED + key_len + path_len;
    if usize::from(read_u16(bytes, 10)) != crc_at + 4 || bytes.len() < crc_at + 4 {
        return Err(TrailerError::Length);
    }
    if crc32c::crc32c(&bytes[..crc_at]) != read_u32(bytes, crc_at) {
        return Err(TrailerError::Checksum);
    }
    let header = Header {
        dataset: DatasetId::from_slice(&bytes[16..32]).ok_or(TrailerError::Field("dataset"))?,
        path: DatasetPath::parse(bytes[HEADER_FIXED + key_len..crc_at].to_vec())
            .map_err(|_| TrailerError::Field("path"))?,
        key: VersionKey::new(bytes[HEADER_FIXED..HEADER_FIXED + key_len].to_vec())
            .ok_or(TrailerError::Field("version key"))?,
        size: read_u64(bytes, 32),
        index: read_u32(bytes, 12),
    };
    let layout = Layout::of(&header).ok_or(TrailerError::Field("chunk index"))?;
    let at = |offset: u64| (offset - layout.trailer) as usize;
    if bytes.len() != at(layout.end) {
        return Err(TrailerError::Length);
    }
    let end = &bytes[at(layout.end) - END..];
    if read_u32(end, 0) as usize != bytes.len() || end[4..] != *END_MAGIC {
        return Err(TrailerError::Length);
    }
    let pinned = match &bytes[at(layout.marks)..at(layout.validity)] {
        found if *found == marks(false) => false,
        found if *found == marks(true) => true,
        _ => return Err(TrailerError::Field("mark")),
    };
    let valid = BlockSet::from_bytes(layout.blocks, &bytes[at(layout.validity)..at(layout.checksums)])
        .ok_or(TrailerError::Field("validity map"))?;
    let (checksums, _) = bytes[at(layout.checksums)..at(layout.end) - END].as_chunks::<4>();
    let checksums = checksums.iter().map(|checksum| u32::from_le_bytes(*checksum)).collect();
    Ok(Trailer { header, pinned, valid, checksums })
}

/// Fixed-width reads; every caller has checked that the bytes are there.
mod fixed {
    pub(super) fn read_u16(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    pub(super) fn read_u32(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }

    pub(super) fn read_u64(bytes: &[u8], at: usize) -> u64 {
        u64::from(read_u32(bytes, at)) | u64::from(read_u32(bytes, at + 4)) << 32
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(size: u64, index: u32, path: &str) -> Trailer {
        let header = Header {
            dataset: DatasetId::local("default", "golden"),
            path: DatasetPath::parse(path.as_bytes().to_vec()).unwrap(),
            key: VersionKey::new(b"\"etag\"".to_vec()).unwrap(),
            size,
            index,
        };
        let layout = Layout::of(&header).unwrap();
        let mut valid = BlockSet::new(layout.blocks);
        valid.insert(0);
        valid.insert(layout.blocks - 1);
        let checksums = (0..layout.blocks).map(|block| 0x1000_0000 + block).collect();
        Trailer { header, pinned: false, valid, checksums }
    }

    /// The format on disk. When this fails, `FORMAT` must change: caches of the old format are then dropped.
    #[test]
    fn the_format_on_disk_is_version_1() {
        let bytes = encode(&sample(150_000, 0, "/a/b.png")).unwrap();
        assert_eq!(FORMAT, 1);
        assert_eq!(hex::encode(&bytes), GOLDEN);
        assert_eq!(Layout::of(&sample(150_000, 0, "/a/b.png").header).unwrap().trailer, 151_552);
        assert_eq!(bytes.len(), 100);
    }

    const GOLDEN: &str = concat!(
        "46424348554e4b0001003e0000000000f4951f4669a158b3a7958f970182e3d6f0490200000000000600080022657461",
        "67222f612f622e706e679b5aad4b0000000000000000000005000000000000000000001001000010020000106400000046425452"
    );

    #[test]
    fn the_largest_trailer_fits() {
        let component = format!("/{}", "x".repeat(255));
        let mut trailer = sample(1 << 40, 7, &component.repeat(16));
        trailer.header.key = VersionKey::new(vec![b'k'; 255]).unwrap();
        assert_eq!(trailer.header.path.as_bytes().len(), 4096);
        let bytes = encode(&trailer).unwrap();
        assert_eq!(bytes.len(), MAX_TRAILER);
        assert_eq!(decode(&bytes), Ok(trailer));
    }

    #[test]
    fn a_flip_in_what_names_the_bytes_is_found() {
        let bytes = encode(&sample(150_000, 0, "/a/b.png")).unwrap();
        let layout = Layout::of(&sample(150_000, 0, "/a/b.png").header).unwrap();
        for bit in 0..(layout.validity - layout.trailer) as usize * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let padding = bit / 8 >= 62 && bit / 8 < 64;
            assert!(padding || decode(&flipped).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err());
        }
    }

    #[test]
    fn offsets_and_sizes() {
        let layout = Layout::of(&sample(100, 0, "/a").header).unwrap();
        assert_eq!((layout.len, layout.blocks, layout.trailer), (100, 1, 4096));
        assert_eq!(layout.overhead(), 3996 + 4096);
        let layout = Layout::of(&sample(CHUNK_SIZE + 1, 0, "/a").header).unwrap();
        assert_eq!((layout.len, layout.blocks, layout.trailer), (CHUNK_SIZE, 1024, CHUNK_SIZE));
        assert_eq!(layout.overhead(), 8192);
        assert_eq!(layout.bytes_of(1023, 1), BLOCK_SIZE);
        let layout = Layout::of(&sample(CHUNK_SIZE + 1, 1, "/a").header).unwrap();
        assert_eq!((layout.len, layout.first_block), (1, 1024));
        assert_eq!(layout.bytes_of(0, 5), 1);
        let beyond = Header { index: 2, ..sample(CHUNK_SIZE + 1, 1, "/a").header };
        assert_eq!(Layout::of(&beyond), None);
        assert_eq!(Layout::of(&Header { size: 0, index: 0, ..beyond }), None);
    }

    proptest! {
        #[test]
        fn decoding_anything_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..300), len in any::<u64>()) {
            prop_assert!(decode(&bytes).is_err());
            let _ = decode_tail(&bytes, len);
        }

        #[test]
        fn decoding_damage_is_total(
            size in 1u64..1 << 30,
            damage in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..4),
            cut in 0usize..100,
        ) {
            let trailer = sample(size, 0, "/some/path");
            let mut bytes = encode(&trailer).unwrap();
            for (at, byte) in &damage {
                let at = usize::from(*at) % bytes.len();
                bytes[at] = *byte;
            }
            bytes.truncate(bytes.len().saturating_sub(cut.saturating_sub(50)));
            let end = Layout::of(&trailer.header).unwrap().end;
            if let Ok(read) = decode_tail(&bytes, end) {
                prop_assert_eq!(read.header, trailer.header);
            }
        }
    }
}
