//! Small files of one dataset, many to a file.
//!
//! ```text
//! DIR/DATASET/packs/NUMBER.pack    records: the checksums of a file's blocks, then its bytes
//! DIR/DATASET/packs/NUMBER.index   where each file's record is
//! ```
//!
//! A pack is written by one process, at its end only, and never synced: after a crash anything may be missing or wrong.
//! So a record of the index counts only whole, with its checksum and within its pack, and bytes are given out only if they
//! match the checksums of their blocks, which are bound to file, version and place; a record that does not is forgotten.
//! Whoever comes next begins packs of his own.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, IoSliceMut},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use forebay_protocol::{BLOCK_SIZE, FileIdentity};
use parking_lot::{Mutex, RwLock};
use rustix::io::ReadWriteFlags;

use super::{Key, blocks, checksum};

/// Extension of packs.
pub(super) const PACK: &str = "pack";
/// Extension of indices.
pub(super) const INDEX: &str = "index";
/// A pack of this size is followed by another.
const FULL: u64 = 256 << 20;
/// Bytes of an entry of the index: file, offset, size, checksum of these.
const ENTRY: usize = 32;
/// Bytes of a checksum.
const SUM: u64 = 4;

/// The packs of a dataset.
#[derive(Debug)]
pub(super) struct Packs {
    dir: PathBuf,
    index: RwLock<Index>,
    writer: Mutex<Option<Writer>>,
}

#[derive(Debug, Default)]
struct Index {
    packs: Vec<Arc<File>>,
    places: HashMap<FileIdentity, Place>,
}

/// A whole file on its way into a pack. It is a copy: what it came in is a reader's memory.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) key: Key,
    /// Room for the checksums, then the bytes.
    record: Vec<u8>,
}

impl Record {
    /// `None`: that is not the whole file.
    pub(super) fn new(key: Key, pieces: &[Bytes]) -> Option<Self> {
        let sums = (blocks(key.size) * SUM) as usize;
        let mut record = Vec::with_capacity(record_len(key.size) as usize);
        record.resize(sums, 0);
        for piece in pieces {
            record.extend_from_slice(piece);
        }
        (record.len() as u64 == record_len(key.size)).then_some(Self { key, record })
    }

    /// Bytes that it takes.
    pub(super) fn len(&self) -> u64 {
        self.record.len() as u64
    }

    fn with_sums(mut self) -> Self {
        let (sums, bytes) = self.record.split_at_mut((blocks(self.key.size) * SUM) as usize);
        for ((block, bytes), sum) in (0..).zip(bytes.chunks(BLOCK_SIZE as usize)).zip(sums.chunks_mut(SUM as usize)) {
            sum.copy_from_slice(&checksum(&self.key, block, bytes).to_le_bytes());
        }
        self
    }
}

/// Where a file's record begins.
#[derive(Clone, Copy, Debug)]
struct Place {
    pack: u32,
    offset: u32,
}

#[derive(Debug)]
struct Writer {
    /// Of the pack among [`Index::packs`].
    number: u32,
    pack: File,
    index: File,
    len: u64,
}

/// A record that may be read: [`Packs::find`].
#[derive(Clone, Debug)]
pub(super) struct Found {
    pack: Arc<File>,
    offset: u64,
}

/// Why a record gives no bytes now.
#[derive(Debug)]
pub(super) enum Refused {
    /// They are not in memory: [`Found::read`] may be called where it may wait for the disk.
    WouldBlock,
    /// They are wrong or cannot be read.
    Broken(io::Error),
}

impl Packs {
    /// What the packs of a dataset's directory hold, as their indices say.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        let mut index = Index::default();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        // A file that is in several packs is read from the last.
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == PACK)) {
            index.load(path)?;
        }
        Ok(Self { dir, index: RwLock::new(index), writer: Mutex::new(None) })
    }

    /// Files that are here.
    pub(super) fn len(&self) -> usize {
        self.index.read().places.len()
    }

    /// A file's record, if it has one.
    pub(super) fn find(&self, file: FileIdentity) -> Option<Found> {
        let index = self.index.read();
        let place = index.places.get(&file)?;
        let pack = index.packs.get(place.pack as usize)?.clone();
        Some(Found { pack, offset: place.offset.into() })
    }

    /// A file's record is not to be read any more.
    pub(super) fn forget(&self, file: FileIdentity) {
        self.index.write().places.remove(&file);
    }

    /// Takes a whole file.
    pub(super) fn append(&self, record: Record) -> io::Result<()> {
        let Record { key, record } = record.with_sums();
        let mut held = self.writer.lock();
        let mut writer = match held.take() {
            Some(writer) if writer.len < FULL => writer,
            _ => self.begin()?,
        };
        let offset = writer.len;
        // What fails here is not taken up again: the writer is dropped with its pack.
        writer.pack.write_all_at(&record, offset)?;
        writer.len += record.len() as u64;
        // A pack is at most FULL and one record long.
        let place = Place { pack: writer.number, offset: offset as u32 };
        let entry = encode(key.file, place.offset, key.size as u32);
        io::Write::write_all(&mut &writer.index, &entry)?;
        self.index.write().places.insert(key.file, place);
        *held = Some(writer);
        Ok(())
    }

    fn begin(&self) -> io::Result<Writer> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let mut last = 0;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
            last = last.max(number.unwrap_or(0));
        }
        let path = self.dir.join(format!("{:010}.{PACK}", last + 1));
        let create = |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let (pack, index) = (create(&path)?, create(&path.with_extension(INDEX))?);
        let number = {
            let mut index = self.index.write();
            index.packs.push(Arc::new(pack.try_clone()?));
            index.packs.len() as u32 - 1
        };
        Ok(Writer { number, pack, index, len: 0 })
    }
}

impl Index {
    fn load(&mut self, path: &Path) -> io::Result<()> {
        let pack = File::open(path)?;
        let len = pack.metadata()?.len();
        let entries = match fs::read(path.with_extension(INDEX)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let number = self.packs.len() as u32;
        self.packs.push(Arc::new(pack));
        for entry in entries.as_chunks::<ENTRY>().0 {
            if let Some((file, offset, size)) = decode(entry)
                && u64::from(offset) + record_len(size.into()) <= len
            {
                self.places.insert(file, Place { pack: number, offset });
            }
        }
        Ok(())
    }
}

impl Found {
    /// Exactly `len` bytes at `offset`, within the file, if they are in memory.
    pub(super) fn read_now(&self, key: &Key, offset: u64, len: usize) -> Result<Bytes, Refused> {
        self.read_with(key, offset, len, ReadWriteFlags::NOWAIT)
    }

    /// The same, from the disk if need be.
    pub(super) fn read(&self, key: &Key, offset: u64, len: usize) -> Result<Bytes, Refused> {
        self.read_with(key, offset, len, ReadWriteFlags::empty())
    }

    fn read_with(&self, key: &Key, offset: u64, len: usize, flags: ReadWriteFlags) -> Result<Bytes, Refused> {
        // Whole blocks, in one read with all that lies before them: a record is small.
        let first = offset / BLOCK_SIZE;
        let end = (offset + len as u64).next_multiple_of(BLOCK_SIZE).min(key.size);
        let (table, before) = (blocks(key.size) * SUM, first * BLOCK_SIZE);
        let mut sums = vec![0; table as usize];
        let mut bytes = vec![0; (end - before) as usize];
        if before == 0 {
            fill(&self.pack, &mut [&mut sums, &mut bytes], self.offset, flags)?;
        } else {
            fill(&self.pack, &mut [&mut sums], self.offset, flags)?;
            fill(&self.pack, &mut [&mut bytes], self.offset + table + before, flags)?;
        }
        let sums = sums.as_chunks::<{ SUM as usize }>().0;
        for ((block, bytes), sum) in (first..).zip(bytes.chunks(BLOCK_SIZE as usize)).zip(&sums[first as usize..]) {
            if checksum(key, block, bytes) != u32::from_le_bytes(*sum) {
                let message = format!("block {block} of {} does not match its checksum", key.file);
                return Err(Refused::Broken(io::Error::new(io::ErrorKind::InvalidData, message)));
            }
        }
        let from = (offset - before) as usize;
        Ok(Bytes::from(bytes).slice(from..from + len))
    }
}

/// Reads exactly what the buffers take.
fn fill(file: &File, buffers: &mut [&mut [u8]], offset: u64, flags: ReadWriteFlags) -> Result<(), Refused> {
    let wanted: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut slices: Vec<IoSliceMut<'_>> = buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
    let got = loop {
        match rustix::io::preadv2(file, &mut slices, offset, flags) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(Refused::WouldBlock),
            Err(error) => return Err(Refused::Broken(error.into())),
            Ok(got) => break got,
        }
    };
    match got {
        got if got == wanted => Ok(()),
        // A part of it is in memory.
        _ if flags.contains(ReadWriteFlags::NOWAIT) => Err(Refused::WouldBlock),
        _ => Err(Refused::Broken(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Bytes of a file's record.
fn record_len(size: u64) -> u64 {
    blocks(size) * SUM + size
}

fn encode(file: FileIdentity, offset: u32, size: u32) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[..16].copy_from_slice(&file.0.to_le_bytes());
    entry[16..20].copy_from_slice(&offset.to_le_bytes());
    entry[20..24].copy_from_slice(&size.to_le_bytes());
    let sum = crc32c::crc32c(&entry[..24]);
    entry[24..28].copy_from_slice(&sum.to_le_bytes());
    entry
}

/// `None`: it was not written whole.
fn decode(entry: &[u8; ENTRY]) -> Option<(FileIdentity, u32, u32)> {
    let word = |at: usize| Some(u32::from_le_bytes(entry.get(at..at + 4)?.try_into().ok()?));
    let file = u128::from_le_bytes(entry[..16].try_into().ok()?);
    (word(24)? == crc32c::crc32c(&entry[..24])).then_some((FileIdentity(file), word(16)?, word(20)?))
}
