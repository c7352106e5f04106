//! Buckets and objects: an index in memory before `s3s-fs`.
//!
//! Every put writes a new object of `s3s-fs` under a running number, and the index maps keys to them. So any key can
//! be held, an overwritten object keeps its bytes for those who read it, and listings come from the index. Lock order:
//! only
//! `buckets`, never held over an await.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use futures::{Stream, stream};
use parking_lot::RwLock;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use s3s::{
    S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result,
    crypto::{Checksum, Md5},
    dto::*,
    s3_error,
};
use tempfile::TempDir;

use crate::index::{Cursor, Keys, Line, list};

/// Fills a buffer with the bytes of a virtual object from an offset on.
pub type Generator = Arc<dyn Fn(u64, &mut [u8]) + Send + Sync>;

/// Bytes of a body that are read at a time: large enough that a request is bound by copying, not by its pieces
/// (`s3s-fs` reads 4 KiB).
const PIECE: u64 = 256 * 1024;
/// Most lines of a page, as on S3.
const MAX_KEYS: i32 = 1000;
/// What S3 leaves as it is in `encoding-type=url`; a space becomes `+`.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'*').remove(b'/').remove(b' ');

/// A mark on requests whose conditions are not looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IgnoreConditions;

/// The objects; a handle.
#[derive(Clone)]
pub(crate) struct Backend {
    inner: Arc<Inner>,
}

struct Inner {
    files: s3s_fs::FileSystem,
    root: PathBuf,
    buckets: RwLock<HashMap<String, Keys<Object>>>,
    next: AtomicU64,
    weak: AtomicBool,
    /// Removed with the last handle.
    _folder: TempDir,
}

struct Object {
    size: u64,
    etag: String,
    modified: SystemTime,
    content: Content,
}

enum Content {
    /// The name of the object of `s3s-fs`.
    Stored(String),
    Virtual(Generator),
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("root", &self.inner.root).finish_non_exhaustive()
    }
}

impl Backend {
    pub(crate) fn new(dir: Option<&Path>) -> Self {
        let folder = match dir {
            Some(dir) => TempDir::with_prefix_in("test-store-", dir),
            None => TempDir::with_prefix("forebay-test-store-"),
        };
        let folder = folder.expect("a folder for the objects");
        let root = folder.path().canonicalize().expect("the folder exists");
        let inner = Inner {
            files: s3s_fs::FileSystem::new(&root).expect("the folder exists"),
            root,
            buckets: RwLock::default(),
            next: AtomicU64::new(1),
            weak: AtomicBool::new(false),
            _folder: folder,
        };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn create_bucket_now(&self, name: &str) {
        let mut buckets = self.inner.buckets.write();
        if !buckets.contains_key(name) {
            std::fs::create_dir(self.inner.root.join(name)).expect("a folder for the bucket");
            buckets.insert(name.to_owned(), Keys::new());
        }
    }

    pub(crate) fn put_now(&self, bucket: &str, key: &str, bytes: &[u8]) -> String {
        let name = self.next_name();
        let etag = hex(Md5::checksum(bytes).as_ref());
        // The name is new and unknown to the index, so nobody sees a half-written file.
        std::fs::write(self.path(bucket, &name), bytes).expect("the object's file");
        // Without it `s3s-fs` would read the whole object for each answer, to compute the ETag.
        std::fs::write(self.info_path(bucket, &name), format!("{{\"e_tag\":\"{etag}\"}}")).expect("the object's info");
        self.insert(bucket, key, bytes.len() as u64, etag, Content::Stored(name))
    }

    pub(crate) fn put_virtual_now(&self, bucket: &str, key: &str, size: u64, generator: Generator) -> String {
        let etag = format!("{:032x}", self.inner.next.fetch_add(1, Ordering::Relaxed));
        self.insert(bucket, key, size, etag, Content::Virtual(generator))
    }

    pub(crate) fn delete_now(&self, bucket: &str, key: &str) {
        let gone = self.inner.buckets.write().get_mut(bucket).and_then(|keys| keys.remove(key.as_bytes()));
        self.discard(bucket, gone.as_deref());
    }

    pub(crate) fn set_weak_etags(&self, weak: bool) {
        self.inner.weak.store(weak, Ordering::Relaxed);
    }

    fn insert(&self, bucket: &str, key: &str, size: u64, etag: String, content: Content) -> String {
        let quoted = format!("\"{etag}\"");
        let object = Arc::new(Object { size, etag, modified: SystemTime::now(), content });
        let old = {
            let mut buckets = self.inner.buckets.write();
            let keys = buckets.get_mut(bucket).unwrap_or_else(|| panic!("no bucket {bucket}"));
            keys.insert(key.as_bytes().to_vec(), object)
        };
        self.discard(bucket, old.as_deref());
        quoted
    }

    /// Removes the files of an object that left the index. Whoever has them open reads on.
    fn discard(&self, bucket: &str, object: Option<&Object>) {
        if let Some(Object { content: Content::Stored(name), .. }) = object {
            // What is left behind goes with the folder.
            let _ = std::fs::remove_file(self.path(bucket, name));
            let _ = std::fs::remove_file(self.info_path(bucket, name));
        }
    }

    fn next_name(&self) -> String {
        format!("{:016x}", self.inner.next.fetch_add(1, Ordering::Relaxed))
    }

    fn path(&self, bucket: &str, name: &str) -> PathBuf {
        self.inner.root.join(bucket).join(name)
    }

    /// Where `s3s-fs` keeps the ETag.
    fn info_path(&self, bucket: &str, name: &str) -> PathBuf {
        let encode = |text: &str| base64_simd::URL_SAFE_NO_PAD.encode_to_string(text);
        self.inner.root.join(format!(".bucket-{}.object-{}.internal.json", encode(bucket), encode(name)))
    }

    fn find(&self, bucket: &str, key: &str) -> S3Result<Arc<Object>> {
        let buckets = self.inner.buckets.read();
        let keys = buckets.get(bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
        keys.get(key.as_bytes()).cloned().ok_or_else(|| s3_error!(NoSuchKey))
    }

    fn etag(&self, object: &Object) -> ETag {
        if self.inner.weak.load(Ordering::Relaxed) {
            ETag::Weak(object.etag.clone())
        } else {
            ETag::Strong(object.etag.clone())
        }
    }

    /// RFC 9110, section 13.2.2, for GET and HEAD.
    fn check(&self, object: &Object, conditions: &Conditions) -> S3Result<()> {
        let Conditions { matches, none_matches, unmodified_since, modified_since } = conditions;
        let etag = self.etag(object);
        let modified = Timestamp::from(whole_seconds(object.modified));
        let fulfilled = match (matches, unmodified_since) {
            (Some(ETagCondition::Any), _) | (None, None) => true,
            (Some(ETagCondition::ETag(wanted)), _) => etag.strong_cmp(wanted),
            (None, Some(since)) => modified <= *since,
        };
        if !fulfilled {
            return Err(s3_error!(PreconditionFailed));
        }
        let unchanged = match (none_matches, modified_since) {
            (Some(ETagCondition::Any), _) => true,
            (Some(ETagCondition::ETag(known)), _) => etag.weak_cmp(known),
            (None, Some(since)) => modified <= *since,
            (None, None) => false,
        };
        if unchanged { Err(s3_error!(NotModified)) } else { Ok(()) }
    }

    /// Answers a GET of the object that the index names now. `None`: it was overwritten or deleted meanwhile.
    async fn get(&self, request: S3Request<GetObjectInput>, object: &Object) -> S3Result<Option<GetObjectOutput>> {
        let range = request.input.range;
        let bytes = match range {
            Some(range) => range.check(object.size)?,
            None => 0..object.size,
        };
        let output = match &object.content {
            Content::Virtual(generator) => GetObjectOutput {
                content_length: Some(length(bytes.end - bytes.start)?),
                content_range: range.map(|_| format!("bytes {}-{}/{}", bytes.start, bytes.end - 1, object.size)),
                body: Some(StreamingBlob::wrap(generated(generator.clone(), bytes))),
                ..Default::default()
            },
            Content::Stored(name) => {
                // Opened first: from here on the bytes are there, whatever happens to the object.
                let Ok(file) = File::open(self.path(&request.input.bucket, name)) else { return Ok(None) };
                let request = request.map_input(|input| GetObjectInput { key: name.clone(), ..input });
                let output = match self.inner.files.get_object(request).await {
                    Ok(response) => response.output,
                    Err(error) if *error.code() == S3ErrorCode::NoSuchKey => return Ok(None),
                    Err(error) => return Err(error),
                };
                GetObjectOutput { body: Some(StreamingBlob::wrap(stored(Arc::new(file), bytes))), ..output }
            }
        };
        Ok(Some(GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            e_tag: Some(self.etag(object)),
            last_modified: Some(Timestamp::from(object.modified)),
            ..output
        }))
    }
}

/// The conditional headers of a GET or HEAD.
#[derive(Default)]
struct Conditions {
    matches: Option<ETagCondition>,
    none_matches: Option<ETagCondition>,
    unmodified_since: Option<Timestamp>,
    modified_since: Option<Timestamp>,
}

#[async_trait::async_trait]
impl S3 for Backend {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        let name = req.input.bucket.clone();
        let response = self.inner.files.create_bucket(req).await?;
        self.inner.buckets.write().entry(name).or_default();
        Ok(response)
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.inner.files.head_bucket(req).await
    }

    async fn list_buckets(&self, req: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        self.inner.files.list_buckets(req).await
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let (bucket, key, name) = (req.input.bucket.clone(), req.input.key.clone(), self.next_name());
        let existing = match self.find(&bucket, &key) {
            Ok(object) => Some(object),
            Err(error) if *error.code() == S3ErrorCode::NoSuchKey => None,
            Err(error) => return Err(error),
        };
        let met = match (&req.input.if_match, &req.input.if_none_match) {
            (Some(ETagCondition::ETag(wanted)), _) => {
                existing.as_deref().is_some_and(|object| self.etag(object).strong_cmp(wanted))
            }
            (Some(ETagCondition::Any), _) => existing.is_some(),
            (None, Some(ETagCondition::Any)) => existing.is_none(),
            (None, Some(ETagCondition::ETag(_)) | None) => true,
        };
        if !met {
            return Err(s3_error!(PreconditionFailed));
        }
        let stored = name.clone();
        let request =
            req.map_input(|input| PutObjectInput { key: stored, if_match: None, if_none_match: None, ..input });
        let mut response = self.inner.files.put_object(request).await?;
        let size = std::fs::metadata(self.path(&bucket, &name)).map_err(S3Error::internal_error)?.len();
        let etag = response.output.e_tag.take().ok_or_else(|| s3_error!(InternalError))?.value().to_owned();
        self.insert(&bucket, &key, size, etag, Content::Stored(name));
        response.output.e_tag = Some(self.etag(&*self.find(&bucket, &key)?));
        Ok(response)
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        // Each round that fails met an overwrite of its own.
        for _ in 0..64 {
            let input = &req.input;
            let object = self.find(&input.bucket, &input.key)?;
            if req.extensions.get::<IgnoreConditions>().is_none() {
                let conditions = Conditions {
                    matches: input.if_match.clone(),
                    none_matches: input.if_none_match.clone(),
                    unmodified_since: input.if_unmodified_since.clone(),
                    modified_since: input.if_modified_since.clone(),
                };
                self.check(&object, &conditions)?;
            }
            let again = S3Request {
                input: GetObjectInput {
                    bucket: input.bucket.clone(),
                    key: input.key.clone(),
                    range: input.range,
                    ..Default::default()
                },
                method: req.method.clone(),
                uri: req.uri.clone(),
                headers: req.headers.clone(),
                extensions: Default::default(),
                credentials: req.credentials.clone(),
                region: req.region.clone(),
                service: req.service.clone(),
                trailing_headers: None,
            };
            if let Some(output) = self.get(again, &object).await? {
                return Ok(S3Response::new(output));
            }
        }
        Err(s3_error!(InternalError, "overwritten without end"))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        let object = self.find(&input.bucket, &input.key)?;
        let conditions = Conditions {
            matches: input.if_match,
            none_matches: input.if_none_match,
            unmodified_since: input.if_unmodified_since,
            modified_since: input.if_modified_since,
        };
        self.check(&object, &conditions)?;
        Ok(S3Response::new(HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(object.size)?),
            e_tag: Some(self.etag(&object)),
            last_modified: Some(Timestamp::from(object.modified)),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        if !self.inner.buckets.read().contains_key(&req.input.bucket) {
            return Err(s3_error!(NoSuchBucket));
        }
        self.delete_now(&req.input.bucket, &req.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let max = input.max_keys.unwrap_or(MAX_KEYS).clamp(0, MAX_KEYS);
        let prefix = input.prefix.clone().unwrap_or_default();
        let start = match &input.continuation_token {
            Some(token) => Some(Cursor::parse(token).ok_or_else(|| s3_error!(InvalidArgument, "continuation-token"))?),
            None => input.start_after.as_ref().map(|key| Cursor::AfterKey(key.as_bytes().to_vec())),
        };
        let delimiter = input.delimiter.as_deref().filter(|delimiter| !delimiter.is_empty());
        let listing = {
            let buckets = self.inner.buckets.read();
            let keys = buckets.get(&input.bucket).ok_or_else(|| s3_error!(NoSuchBucket))?;
            list(keys, prefix.as_bytes(), delimiter.map(str::as_bytes), start, max as usize)
        };
        let encode = input.encoding_type.as_ref().is_some_and(|encoding| encoding.as_str() == EncodingType::URL);
        // Keys and prefixes were strings when they came.
        let show = |key: &[u8]| match encode {
            true => percent_encode(key, KEPT).to_string().replace(' ', "+"),
            false => String::from_utf8_lossy(key).into_owned(),
        };
        let key_count = listing.lines.len() as i32;
        let (mut contents, mut common_prefixes) = (Vec::new(), Vec::new());
        for line in &listing.lines {
            match line {
                Line::Key(key, object) => contents.push(s3s::dto::Object {
                    key: Some(show(key)),
                    size: Some(length(object.size)?),
                    // Weak ones are left out: s3s writes them as strong ones.
                    e_tag: Some(self.etag(object)).filter(|etag| matches!(etag, ETag::Strong(_))),
                    last_modified: Some(Timestamp::from(object.modified)),
                    ..Default::default()
                }),
                Line::Prefix(prefix) => common_prefixes.push(CommonPrefix { prefix: Some(show(prefix)) }),
            }
        }
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(show(prefix.as_bytes())),
            max_keys: Some(max),
            key_count: Some(key_count),
            continuation_token: input.continuation_token,
            is_truncated: Some(listing.next.is_some()),
            next_continuation_token: listing.next.as_ref().map(Cursor::token),
            contents: Some(contents),
            common_prefixes: Some(common_prefixes),
            delimiter: delimiter.map(|delimiter| show(delimiter.as_bytes())),
            encoding_type: input.encoding_type,
            start_after: input.start_after.as_deref().map(|key| show(key.as_bytes())),
            ..Default::default()
        }))
    }
}

fn length(bytes: u64) -> S3Result<i64> {
    i64::try_from(bytes).map_err(S3Error::internal_error)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Headers carry no more.
fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(since.as_secs())
}

/// The bytes of a file, in pieces.
fn stored(file: Arc<File>, bytes: std::ops::Range<u64>) -> impl Stream<Item = std::io::Result<Bytes>> + Send + Sync {
    stream::try_unfold((file, bytes), |(file, bytes)| async move {
        let piece = PIECE.min(bytes.end - bytes.start);
        if piece == 0 {
            return Ok(None);
        }
        let (reader, offset) = (file.clone(), bytes.start);
        let read = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; piece as usize];
            reader.read_exact_at(&mut buffer, offset).map(|()| Bytes::from(buffer))
        });
        let buffer = read.await.map_err(std::io::Error::other)??;
        Ok(Some((buffer, (file, offset + piece..bytes.end))))
    })
}

/// The bytes of a virtual object, in pieces.
fn generated(
    generator: Generator,
    bytes: std::ops::Range<u64>,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + Sync {
    stream::try_unfold((generator, bytes), |(generator, bytes)| async move {
        let piece = PIECE.min(bytes.end - bytes.start);
        if piece == 0 {
            return Ok(None);
        }
        let mut buffer = vec![0; piece as usize];
        generator(bytes.start, &mut buffer);
        let rest = bytes.start + piece..bytes.end;
        Ok(Some((Bytes::from(buffer), (generator, rest))))
    })
}
