//! Unix sockets that are there as long as somebody listens.

use std::{
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// A socket's name, removed when it is dropped.
#[derive(Debug)]
pub struct Name {
    path: PathBuf,
    inode: (u64, u64),
}

/// Listens for root only. What is at `path`, left by a process that was killed, is replaced.
pub fn listen(path: &Path) -> io::Result<(UnixListener, Name)> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((listener, Name { path: path.to_owned(), inode: (metadata.dev(), metadata.ino()) }))
}

impl Drop for Name {
    fn drop(&mut self) {
        // A successor may have replaced it already.
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, socket = %self.path.display(), "not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_successor_keeps_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "stale").unwrap();
        let (_first, name) = listen(&path).unwrap();
        let (_second, successor) = listen(&path).unwrap();
        drop(name);
        assert!(tokio::net::UnixStream::connect(&path).await.is_ok());
        drop(successor);
        assert!(!path.exists());
    }
}
