//! The server as a client sees it, without a signing client: what the `under-store` crate tests is not repeated here.
#![allow(clippy::unwrap_used)]

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

async fn raw(store: &TestStore, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(store.endpoint().strip_prefix("http://").unwrap()).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

const GET: &str = "GET /data/a%20b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn unsigned_requests_are_refused_and_counted() {
    let store = TestStore::start(Options::default()).await;
    store.create_bucket("data").await;
    store.put("data", "a b", Bytes::from_static(b"x")).await;
    let answer = raw(&store, GET).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert_eq!(store.counters().gets, 1);
    assert_eq!(store.counters().bytes_of("a b"), 0);
}

#[tokio::test]
async fn faults_reach_the_wire() {
    let store = TestStore::start(Options { latency: Duration::from_millis(1), dir: None }).await;
    store.faults().add(Fault::new(Action::RetryAfter(503, 7)).key("a b").times(1));
    store.faults().add(Fault::new(Action::Reset { after: None }).key("a b").skip(1).times(1));
    let answer = raw(&store, GET).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 7"), "{answer}");
    let error = raw(&store, GET).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn put_returns_the_md5_and_dropping_removes_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = TestStore::start(Options { latency: Duration::ZERO, dir: Some(dir.path().to_owned()) }).await;
    store.create_bucket("data").await;
    let etag = store.put("data", "k", Bytes::from_static(b"hello")).await;
    assert_eq!(etag, "\"5d41402abc4b2a76b9719d911017c592\"");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    drop(store);
    for _ in 0..500 {
        if std::fs::read_dir(dir.path()).unwrap().count() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the folder is still there");
}
