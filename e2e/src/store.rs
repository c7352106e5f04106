//! The S3 store that Datasets read from: written by others (versitygw), reached over the network like any.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use object_store::{ObjectStoreExt as _, aws::AmazonS3Builder, path::Path};
use tokio::runtime::Runtime;

use crate::data::File;

/// Who may read and write; also in examples/.
pub const ACCESS_KEY: &str = "quickstart";
pub const SECRET_KEY: &str = "quickstart-secret";
/// What the store signs for.
pub const REGION: &str = "us-east-1";

/// The store.
pub struct Store {
    pub url: String,
    log: Option<PathBuf>,
    runtime: Runtime,
}

impl Store {
    pub fn new(url: &str, log: Option<PathBuf>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { url: url.to_owned(), log, runtime })
    }

    fn client(&self, bucket: &str) -> anyhow::Result<object_store::aws::AmazonS3> {
        Ok(AmazonS3Builder::new()
            .with_endpoint(&self.url)
            .with_allow_http(true)
            .with_region(REGION)
            .with_access_key_id(ACCESS_KEY)
            .with_secret_access_key(SECRET_KEY)
            .with_bucket_name(bucket)
            .build()?)
    }

    /// Makes a bucket; one that exists is no error.
    pub fn make_bucket(&self, bucket: &str) -> anyhow::Result<()> {
        // object_store has no request for it; `PUT /BUCKET` is that of an object with an empty key.
        let client = self.client(bucket)?;
        match self.runtime.block_on(client.put(&Path::default(), Vec::new().into())) {
            Ok(_) => Ok(()),
            // The answer that the bucket was made has no ETag, which object_store wants of every PUT.
            Err(error) if error.to_string().contains("ETag Header missing") => Ok(()),
            Err(error) if error.to_string().contains("BucketAlready") => Ok(()),
            Err(error) => Err(error).with_context(|| format!("making the bucket {bucket}")),
        }
    }

    /// Puts files of one version.
    pub fn put(&self, bucket: &str, files: &[File], version: u32) -> anyhow::Result<()> {
        let client = self.client(bucket)?;
        self.runtime.block_on(async {
            for file in files {
                let key = Path::from(file.path.trim_start_matches('/'));
                client.put(&key, file.contents(version).into()).await.with_context(|| format!("putting {key}"))?;
            }
            Ok(())
        })
    }

    /// Puts one object as it is.
    pub fn put_bytes(&self, bucket: &str, key: &str, contents: Vec<u8>) -> anyhow::Result<()> {
        let client = self.client(bucket)?;
        self.runtime.block_on(client.put(&Path::from(key), contents.into()))?;
        Ok(())
    }

    /// Makes a bucket with files in it.
    pub fn fill(&self, bucket: &str, files: &[File]) -> anyhow::Result<()> {
        self.make_bucket(bucket)?;
        self.put(bucket, files, 0)
    }

    /// Deletes an object.
    pub fn delete(&self, bucket: &str, file: &File) -> anyhow::Result<()> {
        let client = self.client(bucket)?;
        self.runtime.block_on(client.delete(&Path::from(file.path.trim_start_matches('/'))))?;
        Ok(())
    }

    /// GETs of objects of a bucket that the store answered so far; `None` where it keeps no log.
    pub fn reads(&self, bucket: &str) -> anyhow::Result<Option<u64>> {
        let Some(log) = &self.log else { return Ok(None) };
        let text = fs::read_to_string(log).with_context(|| log.display().to_string())?;
        // versitygw: ... s3_GetObject KEY /BUCKET/KEY STATUS ...
        let read = |line: &&str| {
            let Some((_, rest)) = line.split_once(" s3_GetObject ") else { return false };
            rest.split(' ').nth(1).is_some_and(|path| path.starts_with(&format!("/{bucket}/")))
        };
        Ok(Some(text.lines().filter(read).count() as u64))
    }
}
