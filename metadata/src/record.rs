//! What stands in the database, byte by byte.
//!
//! Tables (keys and values are bytes):
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `format`, `next-id` | u64 LE |
//! | `datasets` | dataset (16) | [`DatasetRecord`] |
//! | `sources` | dataset (16) ‖ path | [`SourceRecord`] |
//! | `directories` | dataset (16) ‖ path | [`DirectoryRecord`] |
//! | `entries` | directory id (8, BE) ‖ sort key | [`EntryRecord`] |
//! | `garbage` | directory id (8, BE) | empty: its entries are unreachable and are being deleted |
//!
//! A row of `entries` for a file of 100 KB with an S3 ETag and a name of 20 bytes is 56 bytes: 8 + 20 of key, 2 of
//! checksum, 1 of flags, 3 of size, 5 of time (whole seconds) and 17 of ETag (its 32 hex digits as 16 bytes). Pages of
//! the B-tree are between half and quite full, so the file has under 130 bytes per entry.
//!
//! Every value begins with a checksum that is seeded with its key, so a value that is flipped, or at another key, is
//! refused. Decoders are total: any bytes give a record or [`DecodeError`]. A change here raises [`FORMAT`].

use bytes::Bytes;
use forebay_protocol::{DatasetId, DatasetPath, FileVersion, VersionKey};
use xxhash_rust::xxh3::Xxh3;

/// Version of everything in this file. A database with another one is rebuilt.
pub const FORMAT: u64 = 0x464f_5245_4241_5903;

/// Longest resume point that is taken from a store. It may be a key that cannot be shown, so longer than a name: S3 keys
/// have up to 1,024 bytes.
pub const MAX_RESUME: usize = 4096;

/// Bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a record of this format")]
pub struct DecodeError;

/// What is remembered of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DatasetRecord {
    /// The highest generation under which anything was listed, or that was raised here.
    pub generation: u64,
}

/// What is remembered of a dataset's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceRecord {
    /// Another one means that the listings are of another source.
    pub fingerprint: u64,
}

/// Counts of a directory's entries (not of what is below them).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sums {
    /// Files that are shown.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Subdirectories.
    pub directories: u64,
    /// Keys of the source that are not shown.
    pub hidden: u64,
    /// Sum of the digests of the files that are shown: another one, another directory.
    pub digest: u64,
}

/// A listing that came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Complete {
    /// Under which generation it began.
    pub generation: u64,
    /// What it found.
    pub sums: Sums,
    /// Entries added, changed or removed since the listing before; 0 when there was none.
    pub changed: u64,
}

/// A listing that has not come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Under which generation it began.
    pub generation: u64,
    /// Everything up to this sort key is listed; empty: nothing is.
    pub passed: Bytes,
    /// What it found so far.
    pub sums: Sums,
    /// Changes found so far.
    pub changed: u64,
    /// Whether the directory had no entries when it began: nothing is compared then.
    pub fresh: bool,
}

/// What is remembered of a directory. While `running` is set, entries up to `running.passed` are of that listing, those
/// after it of an older one, and the sums of `complete` are outdated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryRecord {
    /// Names its entries; never used again.
    pub id: u64,
    /// The last complete listing.
    pub complete: Option<Complete>,
    /// The one under way.
    pub running: Option<Running>,
}

/// A row of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryRecord {
    /// A subdirectory; its sort key ends with `/`.
    Directory,
    /// A file.
    File {
        /// Its version.
        version: FileVersion,
        /// A directory of the same name exists: the file is not shown.
        shadowed: bool,
    },
}

/// Key of a dataset's directory.
pub fn directory_key(dataset: DatasetId, path: &DatasetPath) -> Vec<u8> {
    [dataset.as_bytes().as_slice(), path.as_bytes()].concat()
}

/// The path in the key of a dataset's directory or source.
pub fn path_of_key(key: &[u8]) -> Option<Bytes> {
    key.get(16..).map(Bytes::copy_from_slice)
}

/// Key of an entry.
pub fn entry_key(directory: u64, sort_key: &[u8]) -> Vec<u8> {
    [directory.to_be_bytes().as_slice(), sort_key].concat()
}

/// Name and whether it is a directory, of a sort key.
pub fn split_sort_key(sort_key: &[u8]) -> (&[u8], bool) {
    match sort_key.strip_suffix(b"/") {
        Some(name) => (name, true),
        None => (sort_key, false),
    }
}

/// The name with `/` appended: the sort key of a directory, and how far a listing must be to know what the name is.
pub fn directory_sort_key(name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(name.len() + 1);
    key.extend_from_slice(name);
    key.push(b'/');
    key
}

const DIRECTORY_COMPLETE: u8 = 1;
const DIRECTORY_RUNNING: u8 = 2;
const DIRECTORY_FRESH: u8 = 4;

const ENTRY_FILE: u8 = 1;
const ENTRY_SHADOWED: u8 = 2;
/// The time is in whole seconds.
const ENTRY_SECONDS: u8 = 4;
/// Two bits: how the version key is written.
const ENTRY_KEY_SHIFT: u8 = 3;
const KEY_RAW: u8 = 0;
/// `"` 32 lower-case hex digits `"`: a plain S3 ETag.
const KEY_ETAG: u8 = 1;
/// The same with `-N`: the ETag of a multipart upload.
const KEY_PARTS: u8 = 2;
const ENTRY_KNOWN: u8 = 0b0001_1111;

const SECOND: i64 = 1_000_000_000;

impl DatasetRecord {
    /// The value at `key`.
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let Self { generation } = *self;
        let mut out = vec![0; 4];
        put_varint(&mut out, generation);
        seal(key, out)
    }

    /// From the value at `key`.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self, DecodeError> {
        let mut input = open(key, value)?;
        let generation = take_varint(&mut input)?;
        end(input)?;
        Ok(Self { generation })
    }
}

impl SourceRecord {
    /// The value at `key`.
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let Self { fingerprint } = *self;
        let mut out = vec![0; 4];
        out.extend_from_slice(&fingerprint.to_le_bytes());
        seal(key, out)
    }

    /// From the value at `key`.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self, DecodeError> {
        let (fingerprint, rest) = open(key, value)?.split_first_chunk::<8>().ok_or(DecodeError)?;
        end(rest)?;
        Ok(Self { fingerprint: u64::from_le_bytes(*fingerprint) })
    }
}

impl DirectoryRecord {
    /// The value at `key`.
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let Self { id, complete, running } = self;
        let mut flags = 0;
        if complete.is_some() {
            flags |= DIRECTORY_COMPLETE;
        }
        if let Some(running) = running {
            flags |= DIRECTORY_RUNNING;
            if running.fresh {
                flags |= DIRECTORY_FRESH;
            }
        }
        let mut out = vec![0, 0, 0, 0, flags];
        put_varint(&mut out, *id);
        if let Some(Complete { generation, sums, changed }) = complete {
            put_varint(&mut out, *generation);
            sums.put(&mut out);
            put_varint(&mut out, *changed);
        }
        if let Some(Running { generation, passed, sums, changed, fresh: _ }) = running {
            put_varint(&mut out, *generation);
            put_varint(&mut out, passed.len() as u64);
            out.extend_from_slice(passed);
            sums.put(&mut out);
            put_varint(&mut out, *changed);
        }
        seal(key, out)
    }

    /// From the value at `key`.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self, DecodeError> {
        let input = open(key, value)?;
        let (flags, mut input) = input.split_first().ok_or(DecodeError)?;
        let id = take_varint(&mut input)?;
        let complete = if flags & DIRECTORY_COMPLETE != 0 {
            let generation = take_varint(&mut input)?;
            let sums = Sums::take(&mut input)?;
            Some(Complete { generation, sums, changed: take_varint(&mut input)? })
        } else {
            None
        };
        let running = if flags & DIRECTORY_RUNNING != 0 {
            let generation = take_varint(&mut input)?;
            let len = usize::try_from(take_varint(&mut input)?).map_err(|_| DecodeError)?;
            if len > MAX_RESUME || len > input.len() {
                return Err(DecodeError);
            }
            let (passed, rest) = input.split_at(len);
            input = rest;
            let sums = Sums::take(&mut input)?;
            let changed = take_varint(&mut input)?;
            let fresh = flags & DIRECTORY_FRESH != 0;
            Some(Running { generation, passed: Bytes::copy_from_slice(passed), sums, changed, fresh })
        } else if flags & DIRECTORY_FRESH != 0 {
            return Err(DecodeError);
        } else {
            None
        };
        if flags & !(DIRECTORY_COMPLETE | DIRECTORY_RUNNING | DIRECTORY_FRESH) != 0 {
            return Err(DecodeError);
        }
        end(input)?;
        Ok(Self { id, complete, running })
    }
}

/// Of a file: its name, size and version key.
fn file_digest(name: &[u8], version: &FileVersion) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name);
    hasher.update(&version.size.to_le_bytes());
    hasher.update(version.key.as_bytes());
    hasher.digest()
}

impl Sums {
    /// A file is shown.
    pub fn add_file(&mut self, name: &[u8], version: &FileVersion) {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(version.size);
        self.digest = self.digest.wrapping_add(file_digest(name, version));
    }

    /// A file that was shown is not any more.
    pub fn remove_file(&mut self, name: &[u8], version: &FileVersion) {
        self.files = self.files.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(version.size);
        self.digest = self.digest.wrapping_sub(file_digest(name, version));
    }

    /// Digest of what is shown at a place in the tree; 0 when that is nothing.
    pub fn digest_at(&self, directory: &[u8]) -> u64 {
        if self.files == 0 {
            return 0;
        }
        let mut hasher = Xxh3::new();
        hasher.update(&self.digest.to_le_bytes());
        hasher.update(directory);
        hasher.digest()
    }

    fn put(&self, out: &mut Vec<u8>) {
        let Self { files, bytes, directories, hidden, digest } = *self;
        for value in [files, bytes, directories, hidden] {
            put_varint(out, value);
        }
        // As good as random: a varint would be longer.
        out.extend_from_slice(&digest.to_le_bytes());
    }

    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        Ok(Self {
            files: take_varint(input)?,
            bytes: take_varint(input)?,
            directories: take_varint(input)?,
            hidden: take_varint(input)?,
            digest: {
                let (digest, rest) = input.split_first_chunk().ok_or(DecodeError)?;
                *input = rest;
                u64::from_le_bytes(*digest)
            },
        })
    }
}

impl EntryRecord {
    /// The value at `key`.
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let mut out = vec![0, 0];
        match self {
            Self::Directory => out.push(0),
            Self::File { version: FileVersion { size, mtime_ns, key: version_key }, shadowed } => {
                let (form, packed) = pack_version_key(version_key.as_bytes());
                let mut flags = ENTRY_FILE | (form << ENTRY_KEY_SHIFT);
                if *shadowed {
                    flags |= ENTRY_SHADOWED;
                }
                let seconds = mtime_ns % SECOND == 0;
                if seconds {
                    flags |= ENTRY_SECONDS;
                }
                out.push(flags);
                put_varint(&mut out, *size);
                put_varint(&mut out, zigzag(if seconds { mtime_ns / SECOND } else { *mtime_ns }));
                out.extend_from_slice(&packed);
            }
        }
        let sum = short_sum(key, &out[2..]);
        out[..2].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// From the value at `key`.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self, DecodeError> {
        let (sum, input) = value.split_first_chunk::<2>().ok_or(DecodeError)?;
        if u16::from_le_bytes(*sum) != short_sum(key, input) {
            return Err(DecodeError);
        }
        let (flags, mut input) = input.split_first().ok_or(DecodeError)?;
        if flags & !ENTRY_KNOWN != 0 {
            return Err(DecodeError);
        }
        if flags & ENTRY_FILE == 0 {
            end(input)?;
            return if *flags == 0 { Ok(Self::Directory) } else { Err(DecodeError) };
        }
        let size = take_varint(&mut input)?;
        let time = unzigzag(take_varint(&mut input)?);
        let mtime_ns = if flags & ENTRY_SECONDS != 0 { time.checked_mul(SECOND).ok_or(DecodeError)? } else { time };
        let key = unpack_version_key(flags >> ENTRY_KEY_SHIFT, input)?;
        let version = FileVersion { size, mtime_ns, key };
        Ok(Self::File { version, shadowed: flags & ENTRY_SHADOWED != 0 })
    }
}

/// 16 bits of crc32c: a flipped row passes once in 65,536, and then the condition on its version key still refuses it.
fn short_sum(key: &[u8], value: &[u8]) -> u16 {
    let sum = crc32c::crc32c_append(crc32c::crc32c(key), value);
    (sum ^ (sum >> 16)) as u16
}

/// Fills in the four bytes of checksum at the front.
fn seal(key: &[u8], mut out: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c_append(crc32c::crc32c(key), &out[4..]);
    out[..4].copy_from_slice(&sum.to_le_bytes());
    out
}

fn open<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let (sum, input) = value.split_first_chunk::<4>().ok_or(DecodeError)?;
    if u32::from_le_bytes(*sum) == crc32c::crc32c_append(crc32c::crc32c(key), input) {
        Ok(input)
    } else {
        Err(DecodeError)
    }
}

fn end(rest: &[u8]) -> Result<(), DecodeError> {
    if rest.is_empty() { Ok(()) } else { Err(DecodeError) }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    ((value >> 1) as i64) ^ -((value & 1) as i64)
}

/// LEB128.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(input: &mut &[u8]) -> Result<u64, DecodeError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = input.split_first().ok_or(DecodeError)?;
        *input = rest;
        let bits = u64::from(byte & 0x7f);
        // The tenth byte holds one bit.
        if shift == 63 && bits > 1 {
            return Err(DecodeError);
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(DecodeError)
}

fn pack_version_key(key: &[u8]) -> (u8, Vec<u8>) {
    let packed = || {
        let inner = key.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        let (digits, parts) = inner.split_at_checked(32)?;
        let mut out = Vec::with_capacity(20);
        for pair in digits.chunks_exact(2) {
            out.push(hex_digit(pair[0])? << 4 | hex_digit(pair[1])?);
        }
        if parts.is_empty() {
            return Some((KEY_ETAG, out));
        }
        let number = std::str::from_utf8(parts.strip_prefix(b"-")?).ok()?;
        let count: u32 = number.parse().ok()?;
        // Only what is written back byte for byte ("+1" and "01" are not).
        (count.to_string() == number).then(|| {
            put_varint(&mut out, u64::from(count));
            (KEY_PARTS, out)
        })
    };
    packed().unwrap_or_else(|| (KEY_RAW, key.to_vec()))
}

fn unpack_version_key(form: u8, bytes: &[u8]) -> Result<VersionKey, DecodeError> {
    if form == KEY_RAW {
        return VersionKey::new(Bytes::copy_from_slice(bytes)).ok_or(DecodeError);
    }
    let (digits, mut rest) = bytes.split_first_chunk::<16>().ok_or(DecodeError)?;
    let mut key = Vec::with_capacity(45);
    key.push(b'"');
    for byte in digits {
        key.push(b"0123456789abcdef"[usize::from(byte >> 4)]);
        key.push(b"0123456789abcdef"[usize::from(byte & 15)]);
    }
    match form {
        KEY_ETAG => {}
        KEY_PARTS => {
            let count = u32::try_from(take_varint(&mut rest)?).map_err(|_| DecodeError)?;
            key.push(b'-');
            key.extend_from_slice(count.to_string().as_bytes());
        }
        _ => return Err(DecodeError),
    }
    end(rest)?;
    key.push(b'"');
    VersionKey::new(key).ok_or(DecodeError)
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn version(size: u64, mtime_ns: i64, key: impl Into<Bytes>) -> FileVersion {
        FileVersion { size, mtime_ns, key: VersionKey::new(key.into()).unwrap() }
    }

    fn any_key() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..=255),
            "\"[0-9a-f]{32}\"".prop_map(String::into_bytes),
            "\"[0-9a-fA-F]{31,33}-[0-9+]{0,11}\"".prop_map(String::into_bytes),
        ]
    }

    fn any_sums() -> impl Strategy<Value = Sums> {
        any::<[u64; 5]>().prop_map(|[files, bytes, directories, hidden, digest]| Sums {
            files,
            bytes,
            directories,
            hidden,
            digest,
        })
    }

    fn any_directory() -> impl Strategy<Value = DirectoryRecord> {
        let complete = (any::<u64>(), any_sums(), any::<u64>()).prop_map(|(generation, sums, changed)| Complete {
            generation,
            sums,
            changed,
        });
        let passed = proptest::collection::vec(any::<u8>(), 0..=600);
        let running = (any::<u64>(), passed, any_sums(), any::<u64>(), any::<bool>()).prop_map(
            |(generation, passed, sums, changed, fresh)| Running {
                generation,
                passed: passed.into(),
                sums,
                changed,
                fresh,
            },
        );
        (any::<u64>(), proptest::option::of(complete), proptest::option::of(running))
            .prop_map(|(id, complete, running)| DirectoryRecord { id, complete, running })
    }

    proptest! {
        #[test]
        fn entries_come_back(size: u64, mtime: i64, seconds in -9_223_372_036i64..=9_223_372_036, key in any_key(), shadowed: bool, at: Vec<u8>) {
            for mtime_ns in [mtime, seconds * SECOND] {
                let record = EntryRecord::File { version: version(size, mtime_ns, key.clone()), shadowed };
                prop_assert_eq!(EntryRecord::decode(&at, &record.encode(&at)), Ok(record));
            }
            prop_assert_eq!(EntryRecord::decode(&at, &EntryRecord::Directory.encode(&at)), Ok(EntryRecord::Directory));
        }

        #[test]
        fn directories_come_back(record in any_directory(), at: Vec<u8>) {
            prop_assert_eq!(DirectoryRecord::decode(&at, &record.encode(&at)), Ok(record));
        }

        #[test]
        fn datasets_and_sources_come_back(generation: u64, fingerprint: u64, at: Vec<u8>) {
            let record = DatasetRecord { generation };
            prop_assert_eq!(DatasetRecord::decode(&at, &record.encode(&at)), Ok(record));
            let record = SourceRecord { fingerprint };
            prop_assert_eq!(SourceRecord::decode(&at, &record.encode(&at)), Ok(record));
        }

        #[test]
        fn decoders_are_total(key: Vec<u8>, mut value: Vec<u8>) {
            let _ = EntryRecord::decode(&key, &value);
            let _ = DirectoryRecord::decode(&key, &value);
            let _ = DatasetRecord::decode(&key, &value);
            let _ = SourceRecord::decode(&key, &value);
            // Past the checksum as well.
            if value.len() >= 4 {
                let sealed = seal(&key, value.clone());
                let _ = DirectoryRecord::decode(&key, &sealed);
                let _ = DatasetRecord::decode(&key, &sealed);
                let _ = SourceRecord::decode(&key, &sealed);
                let sum = short_sum(&key, &value[2..]);
                value[..2].copy_from_slice(&sum.to_le_bytes());
                let _ = EntryRecord::decode(&key, &value);
            }
        }

        #[test]
        fn a_flipped_bit_is_seen(record in any_directory(), bit: prop::sample::Index) {
            let mut value = record.encode(b"key");
            let bit = bit.index(value.len() * 8);
            value[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(DirectoryRecord::decode(b"key", &value), Err(DecodeError));
        }
    }

    #[test]
    fn a_row_at_another_key_is_refused() {
        let value = EntryRecord::File { version: version(1, 2, "e"), shadowed: false }.encode(b"a");
        assert_eq!(EntryRecord::decode(b"b", &value), Err(DecodeError));
    }

    /// Fails when the bytes on disk change: raise [`FORMAT`] with them.
    #[test]
    fn the_format_is_pinned() {
        assert_eq!(FORMAT, 0x464f_5245_4241_5903);
        let etag = "\"d41d8cd98f00b204e9800998ecf8427e\"";
        let key = entry_key(7, b"name");
        assert_eq!(key, b"\0\0\0\0\0\0\0\x07name");
        let file = EntryRecord::File { version: version(100_000, 1_700_000_000 * SECOND, etag), shadowed: false };
        let mut rows = file.encode(&key);
        assert_eq!(rows.len(), 2 + 1 + 3 + 5 + 16);
        rows.extend(EntryRecord::Directory.encode(b"d/"));
        let complete = Complete {
            generation: 3,
            sums: Sums { files: 1, bytes: 300, directories: 2, hidden: 4, digest: 9 },
            changed: 5,
        };
        let running = Running {
            generation: 4,
            passed: Bytes::from_static(b"k"),
            sums: Sums::default(),
            changed: 6,
            fresh: false,
        };
        rows.extend(DirectoryRecord { id: 9, complete: Some(complete), running: Some(running) }.encode(b"x"));
        rows.extend(DatasetRecord { generation: 300 }.encode(b"y"));
        rows.extend(SourceRecord { fingerprint: 0x0102_0304_0506_0708 }.encode(b"z"));
        assert_eq!(crc32c::crc32c(&rows), PINNED);
        // Revisions are compared with those that others have seen.
        let mut sums = Sums::default();
        sums.add_file(b"name", &version(100_000, 1_700_000_000 * SECOND, etag));
        assert_eq!((sums.digest, sums.digest_at(b"/d")), DIGESTS);
    }

    const PINNED: u32 = 2_050_044_106;
    const DIGESTS: (u64, u64) = (12_536_415_809_475_496_675, 17_801_487_822_195_252_530);
}
