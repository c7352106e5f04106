//! The S3 backend against two servers written by others, and against everything that goes wrong between.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_test_store::{Action, Fault, Options, TestStore, Verb as On};
use futures::{StreamExt, future::BoxFuture, stream};

use super::*;
use crate::{
    ItemKind, S3Credentials, S3Options,
    conformance::{self, Abilities, Fixture, list_all, read},
};

const BUCKET: &str = "data";

fn spec(endpoint: &str, key: &str, secret: &str, prefix: &str) -> SourceSpec {
    SourceSpec {
        uri: format!("s3://{BUCKET}/{prefix}"),
        s3: Some(S3Options { endpoint: Some(endpoint.to_owned()), ..S3Options::default() }),
        credentials: Some(S3Credentials {
            access_key_id: key.to_owned(),
            secret_access_key: secret.to_owned(),
            session_token: None,
        }),
    }
}

struct InProcess {
    server: TestStore,
    prefix: &'static str,
}

impl InProcess {
    async fn start(prefix: &'static str) -> Self {
        let server = TestStore::start(Options::default()).await;
        server.create_bucket(BUCKET).await;
        Self { server, prefix }
    }

    fn open(&self, limits: &Limits) -> Arc<dyn UnderStore> {
        let spec = spec(&self.server.endpoint(), self.server.access_key(), self.server.secret_key(), self.prefix);
        crate::open(&spec, limits, Arc::default()).unwrap()
    }

    /// An object, its version and its size.
    async fn object(&self, key: &str, bytes: Vec<u8>) -> (VersionKey, u64) {
        let size = bytes.len() as u64;
        let etag = self.server.put(BUCKET, key, Bytes::from(bytes)).await;
        (VersionKey::new(etag.into_bytes()).unwrap(), size)
    }
}

impl Fixture for InProcess {
    fn store(&self) -> Arc<dyn UnderStore> {
        self.open(&Limits::patient())
    }

    fn put<'a>(&'a self, key: &'a [u8], bytes: Bytes) -> BoxFuture<'a, ()> {
        let key = format!("{}{}", self.prefix, std::str::from_utf8(key).unwrap());
        Box::pin(async move { drop(self.server.put(BUCKET, &key, bytes).await) })
    }

    fn delete<'a>(&'a self, key: &'a [u8]) -> BoxFuture<'a, ()> {
        let key = format!("{}{}", self.prefix, std::str::from_utf8(key).unwrap());
        Box::pin(async move { self.server.delete(BUCKET, &key).await })
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            file_beside_directory: true,
            raw_names: false,
            control_characters: true,
            keys_that_are_no_paths: true,
            markers: true,
        }
    }

    fn denied(&self) -> Option<Arc<dyn UnderStore>> {
        let spec = spec(&self.server.endpoint(), self.server.access_key(), "wrong", self.prefix);
        Some(crate::open(&spec, &Limits::patient(), Arc::default()).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_at_the_top_of_a_bucket() {
    conformance::run(&InProcess::start("").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_below_an_odd_prefix() {
    let fixture = InProcess::start("a b/100%+é//x/").await;
    // Neighbours of the prefix are not ours.
    for key in ["a b/100%+é//x", "a b/100%+é//x0/f", "a b/100%+é//w/f", "f"] {
        fixture.server.put(BUCKET, key, Bytes::from_static(b"no")).await;
    }
    conformance::run(&fixture).await;
    let (top, _) = list_all(&*fixture.store(), b"", 3).await;
    assert!(top.iter().all(|item| item.kind == ItemKind::Directory), "{top:?}");
}

/// A gateway over a folder, as a process of its own.
struct Versity {
    process: Child,
    _folder: tempfile::TempDir,
    endpoint: String,
    transport: Transport,
}

impl Drop for Versity {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Versity {
    async fn start(binary: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new(binary)
            .args([
                "--port",
                &format!("127.0.0.1:{port}"),
                "--access",
                "key",
                "--secret",
                "hush",
                "--quiet",
                "--keep-alive",
            ])
            .arg("posix")
            .arg(&root)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let endpoint = format!("http://127.0.0.1:{port}");
        let transport = Transport::new(
            &spec(&endpoint, "key", "hush", ""),
            BUCKET,
            &Limits::patient(),
            Limiter::new(&Limits::patient(), Arc::default()),
        )
        .unwrap();
        let versity = Self { process, _folder: folder, endpoint, transport };
        // Refused connections are tried again until it listens.
        versity.call(Call::create_bucket).await;
        versity
    }

    async fn call(&self, call: impl Fn() -> Call) {
        let mut patience = Patience::new(Duration::from_secs(30));
        while let Err(failure) = self.transport.call(&mut patience, call()).await {
            patience.pause(failure).await.unwrap();
        }
    }
}

impl Fixture for Versity {
    fn store(&self) -> Arc<dyn UnderStore> {
        crate::open(&spec(&self.endpoint, "key", "hush", ""), &Limits::patient(), Arc::default()).unwrap()
    }

    fn put<'a>(&'a self, key: &'a [u8], bytes: Bytes) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let key = std::str::from_utf8(key).unwrap();
            self.call(|| Call::change(key, Some(bytes.clone()))).await;
        })
    }

    fn delete<'a>(&'a self, key: &'a [u8]) -> BoxFuture<'a, ()> {
        Box::pin(async move { self.call(|| Call::change(std::str::from_utf8(key).unwrap(), None)).await })
    }

    fn abilities(&self) -> Abilities {
        // Its folder holds no file beside a directory of its name, and its XML no control characters.
        Abilities { markers: true, ..Abilities::default() }
    }

    fn denied(&self) -> Option<Arc<dyn UnderStore>> {
        Some(crate::open(&spec(&self.endpoint, "key", "wrong", ""), &Limits::patient(), Arc::default()).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_on_versitygw() {
    match std::env::var("FOREBAY_VERSITYGW") {
        Ok(binary) => conformance::run(&Versity::start(&binary).await).await,
        Err(_) => eprintln!("SKIPPED: FOREBAY_VERSITYGW names no binary (scripts/versitygw.sh builds one)"),
    }
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|at| ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24) as u8).collect()
}

const SIZE: usize = 1 << 20;

/// An object of 1 MiB that is read while the faults are on.
async fn read_with(faults: &[Fault], limits: &Limits) -> (Result<(), StoreError>, InProcess, Duration) {
    let fixture = InProcess::start("").await;
    let bytes = pattern(SIZE);
    let (version, size) = fixture.object("k", bytes.clone()).await;
    for fault in faults {
        fixture.server.faults().add(fault.clone());
    }
    let store = fixture.open(limits);
    let start = Instant::now();
    let result = read(&*store, b"k", &version, size, 0..size).await;
    let taken = start.elapsed();
    assert!(taken < limits.deadline + Duration::from_secs(2), "{taken:?}");
    (result.map(|read| assert!(read == bytes, "wrong bytes")), fixture, taken)
}

fn is_unavailable(result: &Result<(), StoreError>) -> bool {
    matches!(result, Err(StoreError::Unavailable(_)))
}

#[tokio::test]
async fn passing_errors_pass() {
    let faults = [500, 502, 503, 429].map(|status| Fault::new(Action::Status(status)).times(1));
    let (result, fixture, _) = read_with(&faults, &Limits::hasty()).await;
    result.unwrap();
    // All four met the first request; the first status answers. Others then as they come.
    assert_eq!(fixture.server.counters().gets, 2);
    let (result, fixture, _) = read_with(&[Fault::new(Action::Status(500)).times(3)], &Limits::hasty()).await;
    result.unwrap();
    assert_eq!(fixture.server.counters().gets, 4);
    let store = fixture.open(&Limits::hasty());
    fixture.server.faults().add(Fault::new(Action::Status(503)).on(On::Head).times(2));
    fixture.server.faults().add(Fault::new(Action::Reset { after: None }).on(On::List).times(2));
    fixture.server.faults().add(Fault::new(Action::Truncate { after: 30 }).on(On::List).skip(2).times(1));
    assert!(store.head(b"k").await.is_ok());
    assert_eq!(list_all(&*store, b"", 10).await.0.len(), 1);
    let requests = store.requests();
    assert_eq!((requests.heads, requests.lists, requests.errors), (3, 4, 5));
}

#[tokio::test]
async fn lasting_errors_end_by_the_deadline() {
    for action in [
        Action::Status(500),
        Action::Status(503),
        Action::Reset { after: None },
        Action::Reset { after: Some(0) },
        Action::Truncate { after: 0 },
        Action::StallBody { after: 1000, stall: Duration::from_secs(60) },
        Action::Delay(Duration::from_secs(60)),
        Action::Header("content-range", "bytes 5-9/1048576".to_owned()),
    ] {
        let limits = Limits { deadline: Duration::from_secs(1), ..Limits::hasty() };
        let (result, _, _) = read_with(&[Fault::new(action.clone()).on(On::Get)], &limits).await;
        assert!(is_unavailable(&result), "{action:?}: {result:?}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_source_is_told_apart_and_soon() {
    let fixture = InProcess::start("").await;
    let (endpoint, id, secret) = (fixture.server.endpoint(), fixture.server.access_key(), fixture.server.secret_key());
    let kind = |error: StoreError| format!("{error:?}").split('(').next().unwrap().to_owned();
    let told = async |spec: SourceSpec| {
        let store = crate::open(&spec, &Limits::hasty(), Arc::default()).unwrap();
        let checking = store.clone();
        let check = tokio::spawn(async move { checking.check().await });
        let start = Instant::now();
        while store.problem().is_none() && start.elapsed() < Duration::from_secs(3) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        check.abort();
        store.problem().map(kind)
    };
    assert_eq!(told(spec(&endpoint, id, "wrong", "")).await.as_deref(), Some("PermissionDenied"));
    assert_eq!(told(spec(&endpoint, "NOBODY", secret, "")).await.as_deref(), Some("PermissionDenied"));
    let elsewhere = SourceSpec { uri: "s3://missing/p/".to_owned(), ..spec(&endpoint, id, secret, "") };
    assert_eq!(told(elsewhere).await.as_deref(), Some("NotFound"));
    // Nobody listens there, nobody has that name, and that is no S3 store.
    assert_eq!(told(spec("http://127.0.0.1:1", id, secret, "")).await.as_deref(), Some("Unavailable"));
    assert_eq!(told(spec("http://nowhere.invalid", id, secret, "")).await.as_deref(), Some("Unavailable"));
    fixture.server.faults().add(Fault::new(Action::Header("content-length", "0".to_owned())).on(On::List));
    assert_eq!(told(spec(&endpoint, id, secret, "")).await.as_deref(), Some("Unavailable"));
    fixture.server.faults().clear();
    assert_eq!(told(spec(&endpoint, id, secret, "no/such/prefix/")).await, None, "a prefix without keys is empty");

    let store = fixture.open(&Limits::hasty());
    let fault = fixture.server.faults().add(Fault::new(Action::Status(503)));
    let checking = store.clone();
    let check = tokio::spawn(async move { checking.check().await });
    while store.problem().is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fixture.server.faults().remove(fault);
    check.await.unwrap().unwrap();
    assert!(store.problem().is_none());
}

#[tokio::test]
async fn the_store_says_when_to_come_back() {
    let (result, _, taken) = read_with(&[Fault::new(Action::RetryAfter(503, 1)).times(1)], &Limits::hasty()).await;
    result.unwrap();
    assert!(taken >= Duration::from_secs(1), "{taken:?}");
    let (result, fixture, taken) = read_with(&[Fault::new(Action::RetryAfter(429, 1000))], &Limits::hasty()).await;
    assert!(is_unavailable(&result) && taken < Duration::from_secs(5), "{result:?} {taken:?}");
    assert_eq!(fixture.server.counters().gets, 1);
}

#[tokio::test]
async fn broken_bodies_are_resumed_where_they_stopped() {
    for action in [
        Action::Truncate { after: 700_000 },
        Action::Reset { after: Some(700_000) },
        Action::StallBody { after: 700_000, stall: Duration::from_secs(60) },
    ] {
        let (result, fixture, _) = read_with(&[Fault::new(action.clone()).times(1)], &Limits::hasty()).await;
        result.unwrap();
        let counters = fixture.server.counters();
        assert_eq!(counters.gets, 2, "{action:?}");
        // A reset may destroy what is on its way.
        let lost = if matches!(action, Action::Reset { .. }) { 700_000 } else { 0 };
        let sent = counters.bytes_of("k");
        assert!((SIZE as u64..=SIZE as u64 + lost).contains(&sent), "{action:?}: {sent}");
    }
    // Ten times in a row, each bringing a little.
    let fault = Fault::new(Action::Truncate { after: 100_000 });
    let (result, fixture, _) =
        read_with(&[fault], &Limits { deadline: Duration::from_secs(20), ..Limits::hasty() }).await;
    result.unwrap();
    assert_eq!(fixture.server.counters().gets, 11);
}

#[tokio::test]
async fn a_short_stall_is_waited_for() {
    let fault = Fault::new(Action::StallBody { after: 1000, stall: Duration::from_millis(50) });
    let (result, fixture, _) = read_with(&[fault], &Limits::hasty()).await;
    result.unwrap();
    assert_eq!(fixture.server.counters().gets, 1);
}

#[tokio::test]
async fn an_object_that_changes_in_a_stream_is_never_mixed() {
    for (ignored, deleted) in [(false, false), (true, false), (false, true)] {
        let fixture = InProcess::start("").await;
        let (version, size) = fixture.object("k", pattern(SIZE)).await;
        fixture.server.faults().add(Fault::new(Action::Truncate { after: 300_000 }).times(1));
        if ignored {
            fixture.server.faults().add(Fault::new(Action::IgnoreConditions));
        }
        let store = fixture.open(&Limits::hasty());
        let mut stream = store.get(b"k", &version, size, 0..size).await.unwrap();
        let first = stream.next().await.unwrap().unwrap();
        assert!(pattern(SIZE).starts_with(&first));
        match deleted {
            true => fixture.server.delete(BUCKET, "k").await,
            false => drop(fixture.object("k", vec![7; SIZE]).await),
        }
        let mut received = first.to_vec();
        let error = loop {
            match stream.next().await.unwrap() {
                Ok(bytes) => received.extend_from_slice(&bytes),
                Err(error) => break error,
            }
        };
        assert!(pattern(SIZE).starts_with(&received) && received.len() <= 300_000);
        match deleted {
            true => assert!(matches!(error, StoreError::NotFound(_)), "{error}"),
            false => assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}"),
        }
        assert!(stream.next().await.is_none());
    }
}

#[tokio::test]
async fn an_overwritten_object_is_read_on_by_who_has_it_open() {
    let fixture = InProcess::start("").await;
    let (version, size) = fixture.object("k", pattern(8 * SIZE)).await;
    let store = fixture.open(&Limits::hasty());
    let mut stream = store.get(b"k", &version, size, 0..size).await.unwrap();
    let mut received = stream.next().await.unwrap().unwrap().to_vec();
    fixture.object("k", vec![7; SIZE]).await;
    while let Some(bytes) = stream.next().await {
        received.extend_from_slice(&bytes.unwrap());
    }
    assert!(received == pattern(8 * SIZE));
}

#[tokio::test]
async fn refusals_are_not_tried_again() {
    for (status, wanted) in
        [(403, "PermissionDenied"), (404, "NotFound"), (412, "VersionMismatch"), (416, "VersionMismatch")]
    {
        let (result, fixture, _) = read_with(&[Fault::new(Action::Status(status))], &Limits::hasty()).await;
        let error = format!("{:?}", result.unwrap_err());
        assert!(error.starts_with(wanted), "{status}: {error}");
        assert_eq!(fixture.server.counters().gets, 1);
    }
}

#[tokio::test]
async fn servers_without_conditions_or_strong_etags_are_checked_by_their_headers() {
    let fixture = InProcess::start("").await;
    fixture.server.faults().add(Fault::new(Action::IgnoreConditions));
    let (old, size) = fixture.object("k", vec![1; 1000]).await;
    let (new, _) = fixture.object("k", vec![2; 1000]).await;
    let store = fixture.open(&Limits::hasty());
    let error = read(&*store, b"k", &old, size, 0..10).await.unwrap_err();
    assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}");
    assert_eq!(read(&*store, b"k", &new, size, 0..10).await.unwrap(), [2; 10]);

    fixture.server.set_weak_etags(true);
    for ignored in [true, false] {
        if !ignored {
            fixture.server.faults().clear();
        }
        let error = read(&*store, b"k", &new, size, 0..10).await.unwrap_err();
        assert!(matches!(error, StoreError::VersionMismatch(_)), "a weak ETag is no strong one: {error}");
        let item = store.head(b"k").await.unwrap();
        assert_eq!(list_all(&*store, b"", 9).await.0, std::slice::from_ref(&item));
        let ItemKind::File { size, mtime_ns: _, version } = item.kind else { panic!("a file") };
        assert!(version.as_bytes().starts_with(b"lm:"));
        assert_eq!(read(&*store, b"k", &version, size, 5..10).await.unwrap(), [2; 5]);
        let other = VersionKey::new(format!("lm:1:{size}").into_bytes()).unwrap();
        let error = read(&*store, b"k", &other, size, 0..10).await.unwrap_err();
        assert!(matches!(error, StoreError::VersionMismatch(_)), "{error}");
        let (_, longer) = fixture.object("k", vec![2; 2000]).await;
        let error = read(&*store, b"k", &version, size, 0..10).await.unwrap_err();
        assert!(matches!(error, StoreError::VersionMismatch(_)), "{longer}: {error}");
        fixture.object("k", vec![2; 1000]).await;
    }
}

#[tokio::test]
async fn random_reads_of_a_large_object_bring_what_was_asked() {
    let fixture = InProcess::start("").await;
    let generator = |offset: u64, buffer: &mut [u8]| {
        for (at, byte) in buffer.iter_mut().enumerate() {
            *byte = ((offset + at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8;
        }
    };
    let size = 10 << 30;
    fixture.server.put_virtual(BUCKET, "large", size, Arc::new(generator));
    let store = fixture.open(&Limits::patient());
    let ItemKind::File { size: listed, mtime_ns: _, version } = store.head(b"large").await.unwrap().kind else {
        panic!("a file")
    };
    assert_eq!(listed, size);
    for offset in [0, 1 << 20, (5 << 30) + 17, size - 100_000] {
        let mut wanted = vec![0; 100_000];
        generator(offset, &mut wanted);
        assert!(read(&*store, b"large", &version, size, offset..offset + 100_000).await.unwrap() == wanted);
    }
    assert_eq!(fixture.server.bytes_of("large"), 400_000);
    assert_eq!(store.requests().bytes, 400_000);
}

#[tokio::test]
async fn limits_hold_and_let_go() {
    let fixture = InProcess::start("").await;
    let (version, size) = fixture.object("k", pattern(4 * SIZE)).await;
    let limits =
        Limits { concurrency: 2, bytes_in_flight: 5 * SIZE, deadline: Duration::from_secs(2), ..Limits::hasty() };
    let store = fixture.open(&limits);
    let first = store.get(b"k", &version, size, 0..size).await.unwrap();
    // 4 + 4 MiB do not fit 5; the second waits until its deadline, and listings pass meanwhile.
    assert!(store.get(b"k", &version, size, 0..size).await.is_err());
    assert!(store.head(b"k").await.is_ok());
    let second = store.get(b"k", &version, size, 0..1000).await.unwrap();
    assert!(store.head(b"k").await.is_err(), "two requests are under way");
    drop((first, second));
    let (whole, _) = futures::join!(read(&*store, b"k", &version, size, 0..size), store.head(b"k"));
    assert!(whole.unwrap() == pattern(4 * SIZE));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_through_a_bad_network_get_the_right_bytes() {
    let fixture = InProcess::start("").await;
    let bytes = Arc::new(pattern(SIZE));
    let (version, size) = fixture.object("k", bytes.to_vec()).await;
    for (action, probability) in [
        (Action::Status(500), 0.1),
        (Action::Reset { after: None }, 0.1),
        (Action::Reset { after: Some(20_000) }, 0.1),
        (Action::Truncate { after: 50_000 }, 0.1),
        (Action::StallBody { after: 10_000, stall: Duration::from_secs(60) }, 0.05),
    ] {
        fixture.server.faults().add(Fault::new(action).on(On::Get).probability(probability));
    }
    let store = fixture.open(&Limits { deadline: Duration::from_secs(60), ..Limits::hasty() });
    stream::iter(0..200_u64)
        .for_each_concurrent(16, |turn| {
            let (store, version, bytes) = (store.clone(), version.clone(), bytes.clone());
            async move {
                let start = turn * 4_999 % size;
                let end = (start + 1 + turn * 31_337 % 200_000).min(size);
                let read = read(&*store, b"k", &version, size, start..end).await.unwrap();
                assert!(read == bytes[start as usize..end as usize], "turn {turn}");
            }
        })
        .await;
    assert!(store.requests().errors > 20);
}

#[tokio::test]
async fn a_store_that_is_not_there_is_unavailable() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let limits = Limits { deadline: Duration::from_millis(500), ..Limits::hasty() };
    let store =
        crate::open(&spec(&format!("http://127.0.0.1:{port}"), "key", "hush", ""), &limits, Arc::default()).unwrap();
    let start = Instant::now();
    let error = store.head(b"k").await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    assert!(start.elapsed() < Duration::from_secs(3) && store.requests().heads > 1);
    let fixture = InProcess::start("").await;
    let mut spec = spec(&fixture.server.endpoint(), fixture.server.access_key(), fixture.server.secret_key(), "");
    spec.uri = "s3://another".to_owned();
    let error = crate::open(&spec, &Limits::hasty(), Arc::default()).unwrap().list(b"", None, 1).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error}");
}
