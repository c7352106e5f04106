//! The backend against a WebDAV server written by others, and against servers that do what they should not.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant, SystemTime},
};

use futures::{FutureExt, future::BoxFuture};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    task::JoinHandle,
};

use super::*;
use crate::{
    ItemKind, SourceSpec,
    conformance::{self, Abilities, Fixture, list_all, read},
};

fn open(uri: String, limits: &Limits) -> Arc<dyn UnderStore> {
    crate::open(&SourceSpec { uri, s3: None, credentials: None }, limits, Arc::default()).unwrap()
}

/// A folder served by WebDAV, by a process of its own.
struct Rclone {
    process: Child,
    folder: tempfile::TempDir,
    endpoint: String,
    /// Port that takes commands.
    control: u16,
    /// Below the folder; empty, or with a slash at its end.
    prefix: &'static str,
    puts: AtomicU64,
}

impl Drop for Rclone {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Rclone {
    async fn start(binary: &str, prefix: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join(prefix)).unwrap();
        let [port, control] = [0; 2].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [port, control] = [port, control].map(|listener| listener.local_addr().unwrap().port());
        let process = Command::new(binary)
            .args(["serve", "webdav", "--read-only", "--config", "", "--addr", &format!("127.0.0.1:{port}")])
            // It remembers the folder until it is told to look again.
            .args(["--dir-cache-time", "1h", "--poll-interval", "0s"])
            .args(["--rc", "--rc-no-auth", "--rc-addr", &format!("127.0.0.1:{control}")])
            // Names that are not UTF-8 as they are.
            .args(["--local-encoding", "Slash"])
            .arg(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let endpoint = format!("http://127.0.0.1:{port}");
        let started = Self { process, folder, endpoint, control, prefix, puts: AtomicU64::new(0) };
        // It takes commands before it has a folder that they could be about.
        let listening = async {
            while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), listening).await.unwrap();
        started
    }

    /// Has it look at the folder again.
    async fn look_again(&self) {
        let question = "POST /vfs/forget HTTP/1.0\r\nContent-Length: 0\r\n\r\n";
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.control)).await.unwrap();
        stream.write_all(question.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    }

    fn path(&self, key: &[u8]) -> PathBuf {
        self.folder.path().join(self.prefix).join(OsStr::from_bytes(key))
    }
}

impl Fixture for Rclone {
    fn store(&self) -> Arc<dyn UnderStore> {
        open(format!("{}/{}", self.endpoint, percent_encode(self.prefix.as_bytes(), PATH)), &Limits::patient())
    }

    fn put<'a>(&'a self, key: &'a [u8], bytes: Bytes) -> BoxFuture<'a, ()> {
        let path = self.path(key);
        // The clock of a file system stands still for milliseconds, but versions are told apart by time.
        let time =
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_480 + self.puts.fetch_add(1, Ordering::Relaxed));
        async move {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            self.look_again().await;
        }
        .boxed()
    }

    fn delete<'a>(&'a self, key: &'a [u8]) -> BoxFuture<'a, ()> {
        let path = self.path(key);
        async move {
            std::fs::remove_file(path).unwrap();
            self.look_again().await;
        }
        .boxed()
    }

    fn abilities(&self) -> Abilities {
        // Its folder holds no file beside a directory of its name, and no key that is no path; it shows other characters
        // for those of control.
        Abilities { raw_names: true, ..Abilities::default() }
    }
}

fn rclone() -> Option<String> {
    let binary = std::env::var("FOREBAY_RCLONE").ok();
    if binary.is_none() {
        eprintln!("SKIPPED: FOREBAY_RCLONE names no binary (scripts/rclone.sh builds one)");
    }
    binary
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_on_rclone() {
    let Some(binary) = rclone() else { return };
    conformance::run(&Rclone::start(&binary, "").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_on_rclone_below_an_odd_path() {
    let Some(binary) = rclone() else { return };
    conformance::run(&Rclone::start(&binary, "a b/100%+é/x/").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rclone_gives_the_same_etag_to_all() {
    let Some(binary) = rclone() else { return };
    let fixture = Rclone::start(&binary, "").await;
    fixture.put(b"k", Bytes::from_static(b"bytes")).await;
    let store = fixture.store();
    let (listed, _) = list_all(&*store, b"", 9).await;
    assert_eq!(listed, [store.head(b"k").await.unwrap()]);
    let ItemKind::File { version, .. } = &listed[0].kind else { panic!("a file") };
    assert!(version.as_bytes().starts_with(b"\""), "{version:?}");
    // One question to a HEAD settles it for good.
    assert_eq!(store.requests().heads, 2);
    let missing = open(format!("{}/missing/", fixture.endpoint), &Limits::hasty());
    assert!(matches!(missing.check().await, Err(StoreError::NotFound(_))));
    assert!(matches!(missing.problem(), Some(StoreError::NotFound(_))));
    let file = open(format!("{}/k", fixture.endpoint), &Limits::hasty());
    assert!(matches!(file.check().await, Err(StoreError::NotFound(_))));
}

/// A request as a server sees it.
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

/// An answer, complete or cut short; the connection ends with it.
fn answer(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut all = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
    for (name, value) in headers {
        all += &format!("{name}: {value}\r\n");
    }
    if !headers.iter().any(|(name, _)| *name == "Content-Length") {
        all += &format!("Content-Length: {}\r\n", body.len());
    }
    [all.as_bytes(), b"\r\n", body].concat()
}

/// A server that answers what it is told to.
struct Server {
    uri: String,
    task: JoinHandle<()>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Its directory is `/d/`.
    async fn start(respond: impl Fn(&Asked) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}/d/", listener.local_addr().unwrap());
        let (respond, asked) = (Arc::new(respond), Arc::new(Mutex::new(Vec::new())));
        let log = asked.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (respond, log) = (respond.clone(), log.clone());
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let Some(question) = question(&mut stream).await else { return };
                    log.lock().push(format!("{} {}", question.method, question.path));
                    // The other side may have gone.
                    let _ = stream.write_all(&respond(&question)).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { uri, task, asked }
    }

    fn count(&self, beginning: &str) -> usize {
        self.asked.lock().iter().filter(|asked| asked.starts_with(beginning)).count()
    }
}

async fn question(stream: &mut BufReader<tokio::net::TcpStream>) -> Option<Asked> {
    let (mut line, mut headers) = (String::new(), BTreeMap::new());
    stream.read_line(&mut line).await.ok()?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    stream.read_exact(&mut vec![0; length]).await.ok()?;
    Some(Asked { method, path, headers })
}

const MODIFIED: &str = "Wed, 21 Oct 2015 07:28:00 GMT";

/// One file, `/d/k`, and what its server does wrong.
struct Site {
    bytes: Vec<u8>,
    /// Of HEAD and GET.
    etag: Option<&'static str>,
    /// Of PROPFIND.
    listed_etag: Option<&'static str>,
    ignores_conditions: bool,
    ignores_ranges: bool,
    /// GETs that end after a third of their bytes.
    cuts: AtomicUsize,
}

impl Default for Site {
    fn default() -> Self {
        Self {
            bytes: (0..300_000_u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect(),
            etag: Some("\"one\""),
            listed_etag: Some("\"one\""),
            ignores_conditions: false,
            ignores_ranges: false,
            cuts: AtomicUsize::new(0),
        }
    }
}

/// An answer to PROPFIND with these entries: href and properties.
fn multistatus<'a>(entries: impl IntoIterator<Item = (&'a str, String)>) -> Vec<u8> {
    let responses = entries.into_iter().map(|(href, properties)| {
        format!(
            "<x:response><x:href>{href}</x:href><x:propstat><x:prop>{properties}</x:prop></x:propstat></x:response>"
        )
    });
    let xml = format!("<x:multistatus xmlns:x=\"DAV:\">{}</x:multistatus>", responses.collect::<String>());
    answer("207 Multi-Status", &[], xml.as_bytes())
}

fn directory() -> String {
    "<x:resourcetype><x:collection/></x:resourcetype>".to_owned()
}

impl Site {
    fn file(&self) -> String {
        let etag = self.listed_etag.map(|etag| format!("<x:getetag>{etag}</x:getetag>")).unwrap_or_default();
        let length = self.bytes.len();
        format!(
            "<x:resourcetype/><x:getlastmodified>{MODIFIED}</x:getlastmodified>\
             <x:getcontentlength>{length}</x:getcontentlength>{etag}"
        )
    }

    fn respond(&self, asked: &Asked) -> Vec<u8> {
        match (asked.method.as_str(), asked.path.as_str()) {
            ("PROPFIND", "/d/") if asked.headers["depth"] == "0" => multistatus([("/d/", directory())]),
            ("PROPFIND", "/d/") => multistatus([("/d/", directory()), ("/d/k", self.file())]),
            ("PROPFIND", "/d/k") => multistatus([("/d/k", self.file())]),
            ("GET" | "HEAD", "/d/k") => self.get(asked),
            _ => answer("404 Not Found", &[], b"no"),
        }
    }

    fn get(&self, asked: &Asked) -> Vec<u8> {
        let header = |name: &str| asked.headers.get(name).map(String::as_str);
        let differs = header("if-match").is_some_and(|etag| Some(etag) != self.etag)
            || header("if-unmodified-since").is_some_and(|time| time != MODIFIED);
        if differs && !self.ignores_conditions {
            return answer("412 Precondition Failed", &[], b"");
        }
        let mut headers = vec![("Last-Modified", MODIFIED)];
        headers.extend(self.etag.map(|etag| ("ETag", etag)));
        let size = self.bytes.len();
        let range = header("range").filter(|_| !self.ignores_ranges).map(|range| {
            let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            first.parse::<usize>().unwrap()..last.parse::<usize>().unwrap() + 1
        });
        let content_range = range.as_ref().map(|range| format!("bytes {}-{}/{size}", range.start, range.end - 1));
        headers.extend(content_range.as_deref().map(|text| ("Content-Range", text)));
        let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
        let bytes = &self.bytes[range.unwrap_or(0..size)];
        let length = bytes.len().to_string();
        headers.push(("Content-Length", &length));
        let cut = asked.method == "GET"
            && self.cuts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        let sent = match asked.method.as_str() {
            "HEAD" => 0,
            _ if cut => bytes.len() / 3,
            _ => bytes.len(),
        };
        answer(status, &headers, &bytes[..sent])
    }

    async fn serve(self) -> (Server, Vec<u8>) {
        let bytes = self.bytes.clone();
        (Server::start(move |asked| self.respond(asked)).await, bytes)
    }
}

async fn version_of(store: &dyn UnderStore) -> (VersionKey, u64) {
    match store.head(b"k").await.unwrap().kind {
        ItemKind::File { size, mtime_ns: _, version } => (version, size),
        ItemKind::Directory => panic!("a file"),
    }
}

#[tokio::test]
async fn a_server_without_webdav_is_told_apart() {
    for (status, wanted) in [
        ("405 Method Not Allowed", "Invalid"),
        ("501 Not Implemented", "Invalid"),
        ("200 OK", "Invalid"),
        ("401 Unauthorized", "PermissionDenied"),
        ("403 Forbidden", "PermissionDenied"),
        ("404 Not Found", "NotFound"),
    ] {
        let server = Server::start(move |_| answer(status, &[], b"<html>no</html>")).await;
        let store = open(server.uri.clone(), &Limits::hasty());
        let errors = [store.check().await.unwrap_err(), store.list(b"", None, 9).await.unwrap_err()];
        for error in errors {
            assert!(format!("{error:?}").starts_with(wanted), "{status}: {error:?}");
            assert!(wanted != "Invalid" || error.to_string().contains("by WebDAV"), "{error}");
        }
        assert!(store.problem().is_some() && server.count("") == 2, "{status}: a refusal is not asked again");
    }
}

#[tokio::test]
async fn hrefs_of_all_forms_are_understood() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/d/" => multistatus([
            ("http://elsewhere:8080/d", directory()),
            ("http://elsewhere:8080/d/sub", directory()),
            ("/d/slash/", directory()),
            ("/d/a%20b%2Bc&amp;%C3%A9", Site { listed_etag: None, ..Site::default() }.file()),
            ("/d/new%0Aline%01", Site { listed_etag: None, ..Site::default() }.file()),
            ("/d/not/ours", Site::default().file()),
            ("/other/x", Site::default().file()),
            ("/d/no%2Fname", directory()),
        ]),
        "/d/moved/" => multistatus([("/behind/proxy/moved/", directory())]),
        _ => answer("404 Not Found", &[], b""),
    })
    .await;
    let store = open(server.uri.clone(), &Limits::hasty());
    let (items, hidden) = list_all(&*store, b"", 2).await;
    let keys: Vec<_> = items.iter().map(|item| String::from_utf8(item.sort_key()).unwrap()).collect();
    assert_eq!((keys, hidden), (["a b+c&é", "new\nline\u{1}", "slash/", "sub/"].map(str::to_owned).to_vec(), 1));
    let error = store.list(b"moved", None, 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)) && error.to_string().contains("/behind/proxy"), "{error}");
    assert!(matches!(store.list(b"none", None, 9).await, Err(StoreError::NotFound(_))));
    assert!(matches!(store.head(b"../x").await, Err(StoreError::NotFound(_))));
}

#[tokio::test]
async fn pages_come_from_one_answer_and_the_first_is_always_asked_for() {
    let (server, _) = Site::default().serve().await;
    let many = Server::start(|asked| {
        assert_eq!((asked.method.as_str(), asked.headers["depth"].as_str()), ("PROPFIND", "1"));
        let names: Vec<_> = (0..100).map(|at| format!("/d/{at:03}")).collect();
        let files = names.iter().map(|name| (name.as_str(), Site { listed_etag: None, ..Site::default() }.file()));
        multistatus(std::iter::once(("/d/", directory())).chain(files))
    })
    .await;
    let store = open(many.uri.clone(), &Limits::hasty());
    assert_eq!(list_all(&*store, b"", 7).await.0.len(), 100);
    assert_eq!(many.count("PROPFIND"), 1);
    assert_eq!(list_all(&*store, b"", 7).await.0.len(), 100);
    assert_eq!(many.count("PROPFIND"), 2);
    let store = open(server.uri.clone(), &Limits::hasty());
    assert_eq!(list_all(&*store, b"", 7).await.0, [store.head(b"k").await.unwrap()]);
}

#[tokio::test]
async fn etags_of_propfind_count_only_where_they_are_those_of_get() {
    for (etag, listed_etag, wanted) in [
        (Some("\"one\""), Some("\"one\""), "\"one\""),
        (Some("\"one\""), Some("\"two\""), "lm:1445412480:300000"),
        (Some("W/\"one\""), Some("\"one\""), "lm:1445412480:300000"),
        (Some("\"one\""), None, "lm:1445412480:300000"),
        (None, Some("\"one\""), "lm:1445412480:300000"),
    ] {
        let (server, bytes) = Site { etag, listed_etag, ..Site::default() }.serve().await;
        for listed_first in [true, false] {
            let store = open(server.uri.clone(), &Limits::hasty());
            if listed_first {
                let (items, hidden) = list_all(&*store, b"", 9).await;
                assert_eq!((items, hidden), (vec![store.head(b"k").await.unwrap()], 0));
            }
            let (version, size) = version_of(&*store).await;
            assert_eq!(version.as_bytes(), wanted.as_bytes(), "{etag:?} {listed_etag:?}");
            assert!(read(&*store, b"k", &version, size, 5..size).await.unwrap() == bytes[5..]);
            assert!(read(&*store, b"k", &version, size, 0..0).await.unwrap().is_empty());
        }
    }
}

#[tokio::test]
async fn versions_are_checked_with_and_without_conditions() {
    for ignores_conditions in [false, true] {
        let (server, bytes) = Site { ignores_conditions, ..Site::default() }.serve().await;
        let store = open(server.uri.clone(), &Limits::hasty());
        let (version, size) = version_of(&*store).await;
        assert!(read(&*store, b"k", &version, size, 0..size).await.unwrap() == bytes);
        for other in ["\"other\"", "lm:1:300000", "lm:1445412480:7", "what"] {
            let other = VersionKey::new(other).unwrap();
            let error = read(&*store, b"k", &other, size, 0..9).await.unwrap_err();
            assert!(matches!(error, StoreError::VersionMismatch(_)), "{other:?}: {error}");
        }
        let error = read(&*store, b"k", &version, size + 1, 0..9).await.unwrap_err();
        assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}");
        assert!(store.problem().is_none());
    }
}

#[tokio::test]
async fn a_server_without_ranges_gives_what_begins_at_the_beginning() {
    let site = Site { ignores_ranges: true, ..Site::default() };
    let (server, bytes) = site.serve().await;
    let store = open(server.uri.clone(), &Limits::hasty());
    let (version, size) = version_of(&*store).await;
    for end in [1, 100_000, size] {
        assert!(read(&*store, b"k", &version, size, 0..end).await.unwrap() == bytes[..end as usize], "{end}");
    }
    let error = read(&*store, b"k", &version, size, 1..size).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)) && error.to_string().contains("Accept-Ranges"), "{error}");
    // Half of a body cannot be resumed there.
    let (server, _) = Site { ignores_ranges: true, cuts: AtomicUsize::new(1), ..Site::default() }.serve().await;
    let error = read(&*open(server.uri.clone(), &Limits::hasty()), b"k", &version, size, 0..size).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)), "{error}");
}

#[tokio::test]
async fn a_body_that_is_cut_short_is_resumed() {
    let (server, bytes) = Site { cuts: AtomicUsize::new(3), ..Site::default() }.serve().await;
    let store = open(server.uri.clone(), &Limits::hasty());
    let (version, size) = version_of(&*store).await;
    assert!(read(&*store, b"k", &version, size, 1000..size).await.unwrap() == bytes[1000..]);
    assert_eq!(server.count("GET"), 4);
    let Requests { gets, errors, .. } = store.requests();
    assert_eq!((gets, errors), (4, 3));
}

#[tokio::test]
async fn the_server_says_when_to_come_back() {
    let busy = AtomicUsize::new(1);
    let site = Site::default();
    let server = Server::start(move |asked| {
        match busy.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)) {
            Ok(_) => answer("429 Too Many Requests", &[("Retry-After", "1")], b""),
            Err(_) => site.respond(asked),
        }
    })
    .await;
    let store = open(server.uri.clone(), &Limits::hasty());
    let start = Instant::now();
    store.list(b"", None, 9).await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.count("PROPFIND"), 2);
    let server = Server::start(|_| answer("503 Service Unavailable", &[("Retry-After", "1000")], b"")).await;
    let error = open(server.uri.clone(), &Limits::hasty()).head(b"k").await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)) && server.count("") == 1, "{error}");
}

#[tokio::test]
async fn redirects_are_followed_where_the_path_stays() {
    let (server, bytes) = Site::default().serve().await;
    let target = server.uri.trim_end_matches("/d/").to_owned();
    let front = Server::start(move |asked| {
        answer("307 Temporary Redirect", &[("Location", &format!("{target}{}", asked.path))], b"")
    })
    .await;
    let store = open(front.uri.clone(), &Limits::hasty());
    assert_eq!(list_all(&*store, b"", 9).await.0.len(), 1);
    let (version, size) = version_of(&*store).await;
    assert!(read(&*store, b"k", &version, size, 7..size).await.unwrap() == bytes[7..]);
}

#[tokio::test]
async fn lasting_trouble_ends_by_the_deadline_and_long_answers_are_refused() {
    let limits = Limits { deadline: Duration::from_secs(1), ..Limits::hasty() };
    let nonsense = Server::start(|_| answer("207 Multi-Status", &[], b"<html>")).await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for uri in [nonsense.uri.clone(), format!("http://{nobody}/")] {
        let store = open(uri, &limits);
        let start = Instant::now();
        let error = store.list(b"", None, 9).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        assert!(start.elapsed() < Duration::from_secs(3) && store.problem().is_some());
    }
    let long = Server::start(|_| answer("207 Multi-Status", &[], &vec![b' '; MAX_LISTING + 1])).await;
    let error = open(long.uri.clone(), &Limits::patient()).list(b"", None, 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid(_)) && error.to_string().contains("64 MiB"), "{error}");
    assert_eq!(long.count(""), 1);
}
