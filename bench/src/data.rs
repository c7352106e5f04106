//! The data sets: which files there are, of what size, with what bytes. All of it follows from a number, so a reader
//! knows what it must find, and a set is told to another process in a few words.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use forebay_test_store::content;
use serde::{Deserialize, Serialize};

/// Many files in directories.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Set {
    /// What sets differ by.
    pub seed: u64,
    /// Files.
    pub files: u64,
    /// Directories, one level of them.
    pub directories: u64,
    /// Bytes of the smallest file.
    pub smallest: u64,
    /// Bytes of the largest.
    pub largest: u64,
    /// Whether the files are holes: only names and sizes count.
    pub sparse: bool,
}

impl Set {
    /// Where a file is.
    pub fn path(&self, file: u64) -> String {
        format!("d{:03}/f{file:06}.bin", file % self.directories)
    }

    /// Its bytes.
    pub fn size(&self, file: u64) -> u64 {
        self.smallest + content::mix(self.seed_of(file)) % (self.largest - self.smallest + 1)
    }

    /// What [`content::fill`] makes its contents of.
    pub fn seed_of(&self, file: u64) -> u64 {
        self.seed << 32 | file
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        (0..self.files).map(|file| self.size(file)).sum()
    }

    /// Files and directories.
    pub fn entries(&self) -> u64 {
        self.files + self.directories
    }

    /// Writes all files below `root`.
    pub fn write(&self, root: &Path) -> std::io::Result<()> {
        for directory in 0..self.directories.min(self.files) {
            // The directory of the file of the same number.
            if let Some(directory) = Path::new(&self.path(directory)).parent() {
                std::fs::create_dir_all(root.join(directory))?;
            }
        }
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut buffer = Vec::new();
                        loop {
                            let file = next.fetch_add(1, Ordering::Relaxed);
                            if file >= self.files {
                                return Ok(());
                            }
                            let size = self.size(file);
                            let mut open = File::create(root.join(self.path(file)))?;
                            if self.sparse {
                                open.set_len(size)?;
                            } else {
                                buffer.resize(size as usize, 0);
                                content::fill(self.seed_of(file), 0, &mut buffer);
                                open.write_all(&buffer)?;
                            }
                        }
                    })
                })
                .collect();
            writers.into_iter().try_for_each(|writer| match writer.join() {
                Ok(written) => written,
                Err(_) => Err(std::io::Error::other("a writer panicked")),
            })
        })
    }
}

/// One large file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Large {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// What [`content::fill`] makes its contents of.
    pub seed: u64,
}

impl Large {
    /// Writes it.
    pub fn write(&self) -> std::io::Result<()> {
        let mut file = File::create(&self.path)?;
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < self.size {
            let count = (self.size - offset).min(buffer.len() as u64) as usize;
            content::fill(self.seed, offset, &mut buffer[..count]);
            file.write_all(&buffer[..count])?;
            offset += count as u64;
        }
        Ok(())
    }

    /// The same file below another directory.
    pub fn below(&self, root: &Path) -> Self {
        Self { path: root.join(self.path.file_name().unwrap_or_default()), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_what_it_says() {
        let set = Set { seed: 1, files: 10, directories: 3, smallest: 80, largest: 120, sparse: false };
        let dir = tempfile::tempdir().unwrap();
        set.write(dir.path()).unwrap();
        for file in 0..set.files {
            let size = std::fs::metadata(dir.path().join(set.path(file))).unwrap().len();
            assert_eq!(size, set.size(file));
            assert!((80..=120).contains(&size));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count() as u64, set.directories);
    }
}
