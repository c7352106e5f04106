//! A reader of a dataset that may not be known yet.

use std::sync::Arc;

use bytes::Bytes;
use forebay_client::FileReader;
use forebay_protocol::{DatasetPath, FileVersion};
use tokio::sync::OnceCell;

use super::named::Named;
use crate::tree::{Ahead, Reader, TreeError};

/// Reads one version of a file of the dataset, whose reader it makes when it is first asked.
///
/// A daemon that takes over is asked to read files that its predecessor opened, possibly before it has found the dataset.
pub struct NamedReader {
    dataset: Named,
    path: DatasetPath,
    version: FileVersion,
    reader: OnceCell<Arc<FileReader>>,
}

impl NamedReader {
    pub(super) fn new(dataset: Named, path: DatasetPath, version: FileVersion) -> Self {
        Self { dataset, path, version, reader: OnceCell::new() }
    }

    async fn reader(&self) -> Result<&Arc<FileReader>, TreeError> {
        let open = async || Ok(self.dataset.wait().await?.open(self.path.clone(), self.version.clone()));
        self.reader.get_or_try_init(open).await
    }
}

impl Reader for NamedReader {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TreeError> {
        self.reader().await?.read(offset, len).await
    }

    async fn fetch_ahead(&self) -> Ahead {
        // Without the dataset nothing can be fetched: whoever reads it says why.
        self.reader().await.map_or(Ahead::There, |reader| reader.fetch_ahead())
    }
}
