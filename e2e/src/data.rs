//! What is in the store: files whose bytes follow from their path and version, so that a reader (pods/read.py) can check
//! them without having read them before.

use sha2::{Digest as _, Sha256};

/// A file: `/DIRECTORY/NAME-LENGTH.bin`.
#[derive(Clone, Debug)]
pub struct File {
    pub path: String,
    pub length: usize,
}

impl File {
    pub fn new(directory: &str, name: &str, length: usize) -> Self {
        Self { path: format!("{directory}/{name}-{length}.bin"), length }
    }

    /// sha256("PATH#VERSION"), over and over, to the length. The path is as readers see it.
    pub fn contents(&self, version: u32) -> Vec<u8> {
        let unit = Sha256::digest(format!("{}#{version}", self.path));
        unit.iter().copied().cycle().take(self.length).collect()
    }
}

/// `count` small files in `directories` directories, 10 to 60 KB each.
pub fn small(count: usize, directories: usize) -> Vec<File> {
    (0..count)
        .map(|n| File::new(&format!("/d{:03}", n % directories), &format!("f{n:05}"), 10_000 + n * 7919 % 50_000))
        .collect()
}

/// The set that most tests read: 120 small files, and three of a few MiB.
pub fn usual() -> Vec<File> {
    let mut files = small(120, 6);
    files.extend((0..3).map(|n| File::new("/large", &format!("l{n}"), (3 + n) << 20)));
    files
}

/// Bytes of all.
pub fn bytes(files: &[File]) -> u64 {
    files.iter().map(|file| file.length as u64).sum()
}
