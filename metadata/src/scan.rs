//! The walk of a whole tree, through the owners of its directories.
//!
//! Depth first, so that what is pending is bounded by the depth of the tree and one page of subdirectories at each level
//! (times the scans in flight), not by its width. A directory that fails is tried again a few times; when it still fails,
//! so does the scan: it is never complete with something missing. A failed scan costs little when it is started again:
//! what was listed is answered from the owners' indexes.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use forebay_protocol::DatasetPath;
use futures::future::BoxFuture;
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::MetadataError;

/// Sums of a directory and a page of its subdirectories.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirectoryScan {
    /// Files in the directory itself; this and the other sums are 0 in all pages but the first.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Keys of the source that are not shown.
    pub hidden: u64,
    /// Entries that its last listing found added, changed or removed; 0 for the first listing. A name that turned from
    /// file to directory, or back, counts more than once.
    pub changed: u64,
    /// Digest of its files, with their versions, and of its path.
    pub digest: u64,
    /// Names of subdirectories, in order.
    pub subdirectories: Vec<Bytes>,
    /// There are no more subdirectories.
    pub end: bool,
}

/// Scans one directory, here or by asking its owner.
pub trait ScanDirectories: Send + Sync + 'static {
    /// As [`crate::DatasetIndex::scan_directory`]; `after` is the sort key of the last subdirectory of the page before.
    fn scan<'a>(
        &'a self,
        generation: u64,
        directory: &'a DatasetPath,
        after: &'a [u8],
    ) -> BoxFuture<'a, Result<DirectoryScan, MetadataError>>;
}

/// Where a scan is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ScanState {
    /// On its way; sums grow.
    #[default]
    Running,
    /// Every directory was scanned; sums are exact.
    Complete,
    /// A directory could not be scanned, or the scan was cancelled: see the error. Sums are of what was scanned.
    Failed,
}

/// Progress of a scan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScanProgress {
    /// Where it is.
    pub state: ScanState,
    /// Of which generation.
    pub generation: u64,
    /// Files found.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Directories scanned, the first one included.
    pub directories: u64,
    /// Keys of the sources that are not shown.
    pub hidden: u64,
    /// Entries added, changed or removed.
    pub changed: u64,
    /// Sum of the digests of its directories: the same files in the same versions have the same, whenever they are
    /// listed, and by whom.
    pub digest: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// Settings of a scan.
#[derive(Debug, Clone)]
pub struct ScanOptions {
    /// Directories scanned at once.
    pub in_flight: usize,
    /// How often a directory is tried.
    pub attempts: u32,
    /// Pause after the first failure; doubles with each, with jitter.
    pub backoff: Duration,
}

impl Default for ScanOptions {
    fn default() -> Self {
        // Pauses of 0.5, 1, 2 and 4 s: longer than a failure is remembered by the index.
        Self { in_flight: 16, attempts: 5, backoff: Duration::from_millis(500) }
    }
}

/// Walks a tree.
pub struct Scanner {
    directories: Arc<dyn ScanDirectories>,
    generation: u64,
    options: ScanOptions,
    progress: watch::Sender<ScanProgress>,
}

/// A scan under way. Dropping it does not end the scan; the token does.
#[derive(Debug)]
pub struct ScanHandle {
    /// Its progress; the last value has a final state.
    pub progress: watch::Receiver<ScanProgress>,
    task: JoinHandle<ScanProgress>,
}

impl ScanHandle {
    /// Waits for the end.
    pub async fn finished(self) -> ScanProgress {
        match self.task.await {
            Ok(progress) => progress,
            Err(error) => ScanProgress {
                state: ScanState::Failed,
                error: Some(error.to_string()),
                ..self.progress.borrow().clone()
            },
        }
    }
}

/// A directory to scan, or the rest of one.
struct Pending {
    directory: DatasetPath,
    after: Vec<u8>,
}

enum Scanned {
    Page(DirectoryScan),
    /// It went away since its parent was listed.
    Gone,
}

impl Scanner {
    /// Starts to scan `path` and everything below it, as of `generation`.
    pub fn start(
        directories: Arc<dyn ScanDirectories>,
        generation: u64,
        path: DatasetPath,
        options: ScanOptions,
        cancel: CancellationToken,
    ) -> ScanHandle {
        let (progress, receiver) = watch::channel(ScanProgress { generation, ..ScanProgress::default() });
        let scanner = Self { directories, generation, options, progress };
        let task = tokio::spawn(scanner.run(path, cancel));
        ScanHandle { progress: receiver, task }
    }

    async fn run(self, path: DatasetPath, cancel: CancellationToken) -> ScanProgress {
        let result = cancel.run_until_cancelled(self.walk(path)).await.unwrap_or_else(|| Err("cancelled".to_owned()));
        self.progress.send_modify(|progress| match result {
            Ok(()) => progress.state = ScanState::Complete,
            Err(error) => {
                progress.state = ScanState::Failed;
                progress.error = Some(error);
            }
        });
        self.progress.borrow().clone()
    }

    async fn walk(&self, path: DatasetPath) -> Result<(), String> {
        let mut pending = vec![Pending { directory: path.clone(), after: Vec::new() }];
        // Dropped with the walk, which ends what is in flight.
        let mut flying = JoinSet::new();
        loop {
            while flying.len() < self.options.in_flight.max(1) {
                let Some(next) = pending.pop() else { break };
                let (directories, generation, options) =
                    (self.directories.clone(), self.generation, self.options.clone());
                flying.spawn(async move {
                    let scanned = scan_one(&*directories, generation, &options, &next).await;
                    (next, scanned)
                });
            }
            let Some(landed) = flying.join_next().await else { return Ok(()) };
            let (Pending { directory, after }, scanned) = landed.map_err(|error| error.to_string())?;
            let page = match scanned {
                Ok(Scanned::Page(page)) => page,
                Ok(Scanned::Gone) if directory != path => continue,
                Ok(Scanned::Gone) => return Err(format!("{directory}: {}", MetadataError::NotFound)),
                Err(error) => return Err(format!("{directory}: {error}")),
            };
            let DirectoryScan { files, bytes, hidden, changed, digest, subdirectories, end } = page;
            if !end {
                let Some(last) = subdirectories.last() else {
                    return Err(format!("{directory}: its owner gave an empty page that is not the last"));
                };
                let rest = crate::record::directory_sort_key(last);
                if rest <= after {
                    return Err(format!("{directory}: its owner gave the same page twice"));
                }
                // Below its children on the stack.
                pending.push(Pending { directory: directory.clone(), after: rest });
            }
            for name in subdirectories.iter().rev() {
                let child = directory.join(name).map_err(|error| format!("{directory}: {error}"))?;
                pending.push(Pending { directory: child, after: Vec::new() });
            }
            self.progress.send_modify(|progress| {
                progress.files += files;
                progress.bytes = progress.bytes.saturating_add(bytes);
                progress.hidden += hidden;
                progress.changed += changed;
                progress.digest = progress.digest.wrapping_add(digest);
                progress.directories += u64::from(after.is_empty());
            });
        }
    }
}

async fn scan_one(
    directories: &dyn ScanDirectories,
    generation: u64,
    options: &ScanOptions,
    next: &Pending,
) -> Result<Scanned, MetadataError> {
    let mut attempt = 1;
    loop {
        match directories.scan(generation, &next.directory, &next.after).await {
            Ok(page) => return Ok(Scanned::Page(page)),
            Err(MetadataError::NotFound) => return Ok(Scanned::Gone),
            Err(error @ (MetadataError::PermissionDenied(_) | MetadataError::Closed)) => return Err(error),
            Err(error) if attempt >= options.attempts => return Err(error),
            Err(error) => {
                tracing::debug!(directory = %next.directory, %error, attempt, "scan of a directory; trying again");
                let pause = options.backoff * 2u32.saturating_pow(attempt - 1).min(64);
                tokio::time::sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
                attempt += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use parking_lot::Mutex;

    use super::*;

    /// A tree of `width` subdirectories per directory down to `depth`, two files of 5 bytes each, in pages of 3.
    struct Tree {
        width: usize,
        depth: usize,
        failures: Mutex<HashMap<String, (u32, MetadataError)>>,
        flying: AtomicUsize,
        most: AtomicUsize,
    }

    impl Tree {
        fn new(width: usize, depth: usize) -> Self {
            let (flying, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Self { width, depth, failures: Mutex::default(), flying, most }
        }

        fn fail(self, path: &str, times: u32, error: MetadataError) -> Self {
            self.failures.lock().insert(path.to_owned(), (times, error));
            self
        }
    }

    impl ScanDirectories for Tree {
        fn scan<'a>(
            &'a self,
            _: u64,
            directory: &'a DatasetPath,
            after: &'a [u8],
        ) -> BoxFuture<'a, Result<DirectoryScan, MetadataError>> {
            Box::pin(async move {
                let flying = self.flying.fetch_add(1, Ordering::SeqCst) + 1;
                self.most.fetch_max(flying, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(10)).await;
                self.flying.fetch_sub(1, Ordering::SeqCst);
                if let Some((times, error)) = self.failures.lock().get_mut(&directory.to_string())
                    && *times > 0
                {
                    *times -= 1;
                    return Err(error.clone());
                }
                let leaf = directory.components().count() == self.depth;
                let names = (0..if leaf { 0 } else { self.width }).map(|i| Bytes::from(format!("d{i:03}")));
                let mut left = names.filter(|name| crate::record::directory_sort_key(name).as_slice() > after);
                let subdirectories: Vec<Bytes> = left.by_ref().take(3).collect();
                let end = left.next().is_none();
                let first = u64::from(after.is_empty());
                Ok(DirectoryScan {
                    files: 2 * first,
                    bytes: 10 * first,
                    hidden: first,
                    changed: first,
                    digest: first,
                    subdirectories,
                    end,
                })
            })
        }
    }

    async fn scan(tree: &Arc<Tree>) -> ScanProgress {
        let cancel = CancellationToken::new();
        let path = DatasetPath::root();
        Scanner::start(tree.clone(), 7, path, ScanOptions::default(), cancel).finished().await
    }

    #[tokio::test(start_paused = true)]
    async fn everything_is_counted_once_with_bounded_concurrency() {
        let tree = Arc::new(Tree::new(10, 3));
        let progress = scan(&tree).await;
        let directories = 1 + 10 + 100 + 1000;
        assert_eq!(
            progress,
            ScanProgress {
                state: ScanState::Complete,
                generation: 7,
                files: 2 * directories,
                bytes: 10 * directories,
                directories,
                hidden: directories,
                changed: directories,
                digest: directories,
                error: None,
            }
        );
        assert_eq!(tree.most.load(Ordering::SeqCst), 16);
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_retried_and_what_stays_fails_the_scan() {
        let down = || MetadataError::Unavailable("down".to_owned());
        let progress = scan(&Arc::new(Tree::new(3, 2).fail("/d001/d002", 4, down()))).await;
        assert_eq!((progress.state, progress.directories), (ScanState::Complete, 13));

        let progress = scan(&Arc::new(Tree::new(3, 2).fail("/d001/d002", 5, down()))).await;
        assert_eq!(progress.state, ScanState::Failed);
        assert_eq!(progress.error.as_deref(), Some("/d001/d002: the source is unavailable: down"));

        let denied = MetadataError::PermissionDenied("no".to_owned());
        assert_eq!(scan(&Arc::new(Tree::new(3, 2).fail("/d001", 1, denied))).await.state, ScanState::Failed);
        // A directory that went away is no failure; the one that was asked for is.
        let progress = scan(&Arc::new(Tree::new(3, 2).fail("/d001", 1, MetadataError::NotFound))).await;
        assert_eq!((progress.state, progress.directories), (ScanState::Complete, 9));
        let progress = scan(&Arc::new(Tree::new(3, 2).fail("/", 1, MetadataError::NotFound))).await;
        assert_eq!(progress.state, ScanState::Failed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_scan_has_failed() {
        let cancel = CancellationToken::new();
        let tree = Arc::new(Tree::new(10, 6));
        let handle = Scanner::start(tree, 1, DatasetPath::root(), ScanOptions::default(), cancel.clone());
        let mut progress = handle.progress.clone();
        progress.wait_for(|progress| progress.directories > 100).await.unwrap();
        cancel.cancel();
        let last = handle.finished().await;
        assert_eq!((last.state, last.error.as_deref()), (ScanState::Failed, Some("cancelled")));
        assert_eq!(*progress.borrow(), last);
    }
}
