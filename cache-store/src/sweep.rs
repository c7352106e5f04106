//! After an unclean end, and when the directory was away: makes catalog and directory tree agree, directory by directory,
//! in the background.
//!
//! Entries without a file go (a pinned chunk keeps its place), files without an entry are taken in if they are good and
//! fit, and deleted if not; the bytes of every entry are those that its file has. A chunk that somebody opened meanwhile
//! is left alone: opening it did the same. Blocks are not verified here but at their first use.

use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_protocol::ChunkKey;

use crate::catalog::Name;
use crate::files::Load;
use crate::root::{DIRECTORIES, Root};
use crate::shared::Shared;

const FLUSH_DEADLINE: Duration = Duration::from_secs(10);

impl Shared {
    /// The sweep thread's body: returns when the store stops.
    pub(crate) fn sweep_until_stopped(&self) {
        if let Some(root) = self.root() {
            root.empty_trash();
        }
        if self.unswept.load(Ordering::Acquire) {
            self.sweep();
        }
        while self.await_sweep() {
            self.sweep();
        }
    }

    fn sweep(&self) {
        let mut complete = true;
        for directory in 0..DIRECTORIES {
            complete &= self.sweep_directory(directory);
            if self.stopping() {
                return;
            }
        }
        // What was found, pins among it, shall not have to be found again.
        if let Err(reason) = self.index.flush(FLUSH_DEADLINE) {
            tracing::warn!(reason, "the rebuilt cache index is not written yet");
        }
        if !complete {
            tracing::warn!("the cache directory could not be swept in full; the next start tries again");
        }
        self.swept(complete);
    }

    /// Whether everything in it could be judged.
    fn sweep_directory(&self, directory: u16) -> bool {
        let Some(root) = self.root() else { return false };
        let mut complete = true;
        let files = match root.chunks_in(directory) {
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(directory, %error, "cannot list a cache directory");
                return false;
            }
        };
        for key in &files {
            if self.stopping() {
                return false;
            }
            complete &= self.sweep_chunk(&root, *key);
        }
        for name in self.catalog.of_directory(directory) {
            if files.binary_search(&name.into()).is_err() {
                // Perhaps created since the listing: looks again.
                complete &= self.sweep_chunk(&root, name.into());
            }
        }
        complete
    }

    fn sweep_chunk(&self, root: &Root, key: ChunkKey) -> bool {
        let Ok(_entered) = self.enter() else { return false };
        let name = Name::from(key);
        let _name = self.stripe(name);
        if self.catalog.live(name).is_some() {
            return true;
        }
        !matches!(self.load(root, key, None), Load::Unavailable(_))
    }
}
