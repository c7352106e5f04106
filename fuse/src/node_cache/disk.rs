//! The directory of the node cache. Every call may wait for the disk.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use bytes::Bytes;
use forebay_protocol::{BLOCK_SIZE, DatasetId, FileIdentity};

use super::{
    Key, blocks, checksum,
    packs::{INDEX, PACK},
};

/// What is being written.
const FILLING: &str = "filling";
/// Small files of a dataset.
const PACKS: &str = "packs";
/// Checksums of a file.
const SUMS: &str = "sums";

#[derive(Debug)]
pub(super) struct Disk {
    dir: PathBuf,
    free_percent: u64,
    next: AtomicU64,
}

impl Disk {
    pub(super) fn new(dir: PathBuf, free_percent: u8) -> Self {
        Self { dir, free_percent: free_percent.into(), next: AtomicU64::new(0) }
    }

    /// Makes the directories that are missing, for this user only: others see files as far as the volume shows them.
    fn make(&self, directory: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)
    }

    fn path(&self, dataset: DatasetId, file: FileIdentity) -> PathBuf {
        self.dir.join(dataset.to_string()).join(file.to_string())
    }

    /// The directory of a dataset's small files.
    pub(super) fn packs(&self, dataset: DatasetId) -> PathBuf {
        self.dir.join(dataset.to_string()).join(PACKS)
    }

    /// A complete file, for reading only.
    pub(super) fn complete(&self, key: &Key) -> io::Result<File> {
        let file = File::open(self.path(key.dataset, key.file))?;
        let len = file.metadata()?.len();
        if len != key.size {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{len} bytes instead of {}", key.size)));
        }
        Ok(file)
    }

    /// Whether a file is what its checksums say; `None` when it is not there.
    pub(super) fn matches(&self, key: &Key) -> io::Result<Option<bool>> {
        let path = self.path(key.dataset, key.file);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let sums = match fs::read(path.with_extension(SUMS)) {
            Ok(sums) => sums,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(false)),
            Err(error) => return Err(error),
        };
        let (sums, rest) = sums.as_chunks::<4>();
        if file.metadata()?.len() != key.size || sums.len() as u64 != blocks(key.size) || !rest.is_empty() {
            return Ok(Some(false));
        }
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        let mut left = key.size;
        for (block, sum) in (0..).zip(sums) {
            let bytes = &mut buffer[..left.min(BLOCK_SIZE) as usize];
            file.read_exact(bytes)?;
            if checksum(key, block, bytes) != u32::from_le_bytes(*sum) {
                return Ok(Some(false));
            }
            left -= bytes.len() as u64;
        }
        Ok(Some(true))
    }

    /// Begins to write a file.
    pub(super) fn begin(&self, key: &Key) -> io::Result<Filling> {
        self.make(&self.dir.join(FILLING))?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(FILLING).join(format!("{}-{}-{number}", key.file, std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        self.make(&self.dir.join(key.dataset.to_string()))?;
        Ok(Filling { target: self.path(key.dataset, key.file), path, file, sums: Vec::new() })
    }

    /// Unlinks a file.
    pub(super) fn remove(&self, dataset: DatasetId, file: FileIdentity) -> io::Result<()> {
        remove(&self.path(dataset, file))
    }

    /// Removes what was being written; every complete file.
    pub(super) fn look(&self) -> io::Result<Vec<Found>> {
        let filling = self.dir.join(FILLING);
        self.make(&filling)?;
        for left in fs::read_dir(filling)? {
            fs::remove_file(left?.path())?;
        }
        self.files()
    }

    /// Bytes that the file system has too little for a file of this size.
    pub(super) fn missing(&self, size: u64) -> io::Result<u64> {
        self.make(&self.dir)?;
        let stat = rustix::fs::statvfs(&self.dir)?;
        let (free, stays) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize / 100 * self.free_percent);
        Ok((size + stays).saturating_sub(free))
    }

    /// Unlinks at least so many bytes of datasets that are not mounted, the oldest first; what went.
    pub(super) fn evict(&self, bytes: u64, mounted: &HashSet<DatasetId>) -> io::Result<Vec<Found>> {
        let mut files = self.files()?;
        files.retain(|file| !mounted.contains(&file.dataset));
        files.sort_by_key(|file| file.written);
        let mut freed = 0;
        let enough = files.iter().take_while(|file| {
            let more = freed < bytes;
            freed += file.size;
            more
        });
        files.truncate(enough.count());
        for file in &files {
            remove(&file.path)?;
        }
        Ok(files)
    }

    /// Every complete file and pack; what has no name of ours is left alone.
    fn files(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for directory in fs::read_dir(&self.dir)? {
            let directory = directory?.path();
            let Some(dataset) = name(&directory).and_then(DatasetId::from_text) else { continue };
            let packs = match fs::read_dir(directory.join(PACKS)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                packs => Some(packs?),
            };
            for entry in fs::read_dir(&directory)?.chain(packs.into_iter().flatten()) {
                let path = entry?.path();
                let identity = name(&path).filter(|name| name.len() == 32);
                let file = identity.and_then(|name| u128::from_str_radix(name, 16).ok()).map(FileIdentity);
                if file.is_none() && path.extension().is_none_or(|extension| extension != PACK) {
                    continue;
                }
                let metadata = fs::metadata(&path)?;
                let written = metadata.modified()?;
                found.push(Found { dataset, file, size: metadata.len(), written, path });
            }
        }
        Ok(found)
    }
}

/// A complete file, or a pack of small ones.
pub(super) struct Found {
    pub(super) dataset: DatasetId,
    /// `None`: a pack.
    pub(super) file: Option<FileIdentity>,
    pub(super) size: u64,
    written: SystemTime,
    path: PathBuf,
}

/// Unlinks a file, or a pack, with what belongs to it.
fn remove(path: &Path) -> io::Result<()> {
    // The file first: without what tells of it, it would be taken for a damaged one, or for none.
    fs::remove_file(path)?;
    let beside = if path.extension().is_some() { INDEX } else { SUMS };
    match fs::remove_file(path.with_extension(beside)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// A file that is being written. Dropped, it is gone.
#[derive(Debug)]
pub(super) struct Filling {
    target: PathBuf,
    path: PathBuf,
    file: File,
    sums: Vec<u8>,
}

impl Filling {
    /// Appends what is at `offset`, where whole blocks end, but for the file's last.
    pub(super) fn write(&mut self, key: &Key, offset: u64, pieces: &[Bytes]) -> io::Result<()> {
        let bytes = pieces.concat();
        for (block, bytes) in (offset / BLOCK_SIZE..).zip(bytes.chunks(BLOCK_SIZE as usize)) {
            self.sums.extend_from_slice(&checksum(key, block, bytes).to_le_bytes());
        }
        self.file.write_all(&bytes)
    }

    /// Makes it the complete file: on disk, checksums first, when this returns.
    pub(super) fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        let directory = self.target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let sums = self.path.with_extension(SUMS);
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).open(&sums)?;
            file.write_all(&self.sums)?;
            file.sync_all()?;
            fs::rename(&sums, self.target.with_extension(SUMS))
        })();
        if written.is_err() {
            let _ = fs::remove_file(&sums);
        }
        written?;
        fs::rename(&self.path, &self.target)?;
        File::open(directory)?.sync_all()
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // Renamed, when it is finished.
        let _ = fs::remove_file(&self.path);
    }
}
