//! Files that are replaced whole, and only when their contents change.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::Serialize;

/// A file that this process alone writes.
pub(crate) struct Replaced {
    path: PathBuf,
    contents: Option<Vec<u8>>,
}

impl Replaced {
    /// A file that may be there already.
    pub(crate) fn new(path: PathBuf) -> Self {
        let contents = fs::read(&path).ok();
        Self { path, contents }
    }

    /// What is there, if it can be understood.
    pub(crate) fn read<T: serde::de::DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(self.contents.as_deref()?).ok()
    }

    /// Writes it if it changes; gives whether it did. It holds credentials, so only its owner may read it.
    pub(crate) fn write(&mut self, value: &impl Serialize) -> anyhow::Result<bool> {
        let contents = serde_json::to_vec(value)?;
        if self.contents.as_ref() == Some(&contents) {
            return Ok(false);
        }
        replace(&self.path, &contents).with_context(|| format!("writing {}", self.path.display()))?;
        self.contents = Some(contents);
        Ok(true)
    }
}

fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(contents)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    #[test]
    fn a_file_is_replaced_when_it_changes_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        let mut file = Replaced::new(path.clone());
        assert_eq!(file.read::<u32>(), None);
        assert!(file.write(&1u32).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let inode = fs::metadata(&path).unwrap().ino();
        assert!(!file.write(&1u32).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        assert!(file.write(&2u32).unwrap());
        // What a predecessor wrote is known to its successor.
        let mut file = Replaced::new(path);
        assert_eq!(file.read::<u32>(), Some(2));
        assert!(!file.write(&2u32).unwrap());
    }
}
