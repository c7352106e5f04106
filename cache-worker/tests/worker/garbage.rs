//! Strangers and broken clients: an error to the sender, nothing else.

use std::{os::unix::fs::FileExt, time::Duration};

use bytes::{BufMut, BytesMut};
use forebay_client::transport;
use forebay_protocol::{
    BLOCK_SIZE, BlockRange, FileVersion, VersionKey,
    frame::{
        Answer, HEADER, Header, MAX_ANSWER_BODY, MAX_IN_FLIGHT, Purpose, Read, Request, decode_answer, encode_request,
    },
    handshake::{ConnectionPurpose, RuntimeKey},
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::harness::{Cluster, MIB, contents, eventually, files_below, generate, http, metrics, path};

async fn data(cluster: &Cluster) -> TcpStream {
    transport::connect(&cluster.workers[0].address().to_string(), &cluster.key, ConnectionPurpose::Data).await.unwrap()
}

/// Waits for the other side to close, whatever it says before.
async fn closed(stream: &mut TcpStream) {
    let mut rest = vec![0; 65536];
    let ended = timeout(Duration::from_secs(15), async {
        loop {
            match stream.read(&mut rest).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    });
    assert!(ended.await.is_ok(), "the worker kept a broken connection");
}

async fn answer(stream: &mut TcpStream) -> (u64, Answer) {
    loop {
        let mut head = [0; HEADER];
        stream.read_exact(&mut head).await.unwrap();
        let header = Header::decode(&head, MAX_ANSWER_BODY).unwrap();
        let mut body = vec![0; header.body];
        stream.read_exact(&mut body).await.unwrap();
        match decode_answer(&header, body.into()).unwrap() {
            Answer::Alive => {}
            answer => return (header.request, answer),
        }
    }
}

fn read(cluster: &Cluster, version: &FileVersion, first: u64, count: u64) -> Request {
    Request::Read(Read {
        dataset: cluster.id,
        epoch: 1,
        generation: 0,
        path: path("/f"),
        version: version.clone(),
        range: BlockRange { first, count },
        purpose: Purpose::Demand,
        verify: false,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_do_no_harm() {
    let cluster = Cluster::start(1).await;
    cluster.put("f", 1, 2 * MIB).await;
    cluster.refresh("/").await;
    let address = cluster.workers[0].address();
    let mut random = StdRng::seed_from_u64(1);
    let mut held = Vec::new();
    for round in 0..300 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut noise = vec![0; random.random_range(1..200)];
        random.fill_bytes(&mut noise);
        if round % 3 == 0 {
            // Half a handshake, then silence.
            noise = b"FBAY\x01\x00\x01\x00\x01".to_vec();
            noise.truncate(random.random_range(1..9));
            let _ = stream.write_all(&noise).await;
            held.push(stream);
        } else {
            let _ = stream.write_all(&noise).await;
        }
    }
    assert!(transport::connect(&address.to_string(), &RuntimeKey::generate(), ConnectionPurpose::Data).await.is_err());
    // Silent strangers are closed at the handshake's deadline.
    for stream in &mut held {
        closed(stream).await;
    }
    cluster.check("/f", 1, 2 * MIB).await;
    let metrics = metrics(&cluster).await;
    assert!(metrics.contains("forebay_worker_handshakes_failed_total"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_frames_end_their_connection_only() {
    let cluster = Cluster::start(1).await;
    cluster.put("f", 1, 2 * MIB).await;
    cluster.refresh("/").await;
    let version = cluster.version("/f").await.unwrap();
    let mut broken: Vec<BytesMut> = Vec::new();
    // A length beyond the limit, one below the header, an unknown kind, an answer's kind, a reserved byte.
    for (length, kind, reserved) in [(u32::MAX, 1u8, 0u8), (3, 1, 0), (12, 99, 0), (20, 16, 0), (12, 1, 1)] {
        let mut frame = BytesMut::new();
        frame.put_u32_le(length);
        frame.put_u8(kind);
        frame.put_u8(reserved);
        frame.put_u16_le(0);
        frame.put_u64_le(1);
        frame.put_bytes(0, 8);
        broken.push(frame);
    }
    // A range outside the file; the same number twice; number zero.
    for (numbers, first, count) in [(vec![1], 1000, 1), (vec![1, 1], 0, 1), (vec![0], 0, 1), (vec![1], 0, 0)] {
        let mut frames = BytesMut::new();
        for number in numbers {
            encode_request(&mut frames, number, &read(&cluster, &version, first, count));
        }
        broken.push(frames);
    }
    cluster.store.set_latency(Duration::from_millis(200));
    for bytes in &broken {
        let mut stream = data(&cluster).await;
        stream.write_all(bytes).await.unwrap();
        closed(&mut stream).await;
    }
    let mut random = StdRng::seed_from_u64(2);
    for _ in 0..100 {
        let mut stream = data(&cluster).await;
        let mut noise = vec![0; 400];
        random.fill_bytes(&mut noise);
        // A plausible length, so that more than the header is looked at.
        noise[..4].copy_from_slice(&100u32.to_le_bytes());
        noise[4] = 1;
        noise[5..8].fill(0);
        let _ = stream.write_all(&noise).await;
        closed(&mut stream).await;
    }
    cluster.store.set_latency(Duration::ZERO);
    cluster.check("/f", 1, 2 * MIB).await;
    let metrics = metrics(&cluster).await;
    assert!(metrics.contains("forebay_worker_protocol_errors_total 10"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_requests_are_busy_and_cancel_frees() {
    let cluster = Cluster::start(1).await;
    cluster.put_virtual("f", 1, 64 * MIB);
    cluster.refresh("/").await;
    let version = cluster.version("/f").await.unwrap();
    cluster.store.set_latency(Duration::from_secs(2));
    let mut stream = data(&cluster).await;
    let mut frames = BytesMut::new();
    let over = MAX_IN_FLIGHT as u64 + 5;
    for number in 1..=over {
        encode_request(&mut frames, number, &read(&cluster, &version, number, 1));
    }
    stream.write_all(&frames).await.unwrap();
    for number in MAX_IN_FLIGHT as u64 + 1..=over {
        let (request, answer) = answer(&mut stream).await;
        assert_eq!(request, number);
        assert!(matches!(answer, Answer::Failure { code: forebay_protocol::frame::FailureCode::Busy, .. }));
    }
    let mut frames = BytesMut::new();
    for number in 1..=MAX_IN_FLIGHT as u64 {
        encode_request(&mut frames, number, &Request::Cancel);
    }
    stream.write_all(&frames).await.unwrap();
    eventually("room on the connection", || async {
        metrics(&cluster).await.contains("forebay_worker_requests_in_flight 0")
    })
    .await;
    cluster.store.set_latency(Duration::ZERO);
    // The connection goes on.
    let mut frames = BytesMut::new();
    encode_request(&mut frames, 9999, &read(&cluster, &version, 500, 3));
    stream.write_all(&frames).await.unwrap();
    let mut got = Vec::new();
    loop {
        match answer(&mut stream).await {
            (9999, Answer::Data { first_block, bytes, .. }) => {
                assert_eq!(first_block, 500 + got.len() as u64 / BLOCK_SIZE);
                got.extend_from_slice(&bytes);
            }
            (9999, Answer::End { .. }) => break,
            other => panic!("{other:?}"),
        }
    }
    let mut expected = vec![0; 3 * BLOCK_SIZE as usize];
    generate(1, 500 * BLOCK_SIZE, &mut expected);
    assert!(got == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_gets_only_what_is_held() {
    let cluster = Cluster::start(1).await;
    cluster.put("f", 1, MIB).await;
    cluster.refresh("/").await;
    let version = cluster.version("/f").await.unwrap();
    let mut stream = data(&cluster).await;
    let peer = |first, count| match read(&cluster, &version, first, count) {
        Request::Read(read) => Request::Read(Read { purpose: Purpose::Peer, ..read }),
        other => other,
    };
    let mut frames = BytesMut::new();
    encode_request(&mut frames, 1, &peer(0, 16));
    stream.write_all(&frames).await.unwrap();
    let not_held = forebay_protocol::frame::FailureCode::NotHeld;
    assert!(matches!(answer(&mut stream).await, (1, Answer::Failure { code, .. }) if code == not_held));
    assert_eq!(cluster.store.counters().gets, 0);
    cluster.check("/f", 1, MIB).await;
    let mut frames = BytesMut::new();
    encode_request(&mut frames, 2, &peer(0, 16));
    stream.write_all(&frames).await.unwrap();
    assert!(matches!(answer(&mut stream).await, (2, Answer::Data { first_block: 0, .. })));
    assert!(matches!(answer(&mut stream).await, (2, Answer::End { hit_blocks: 16, miss_blocks: 0, .. })));

    let unknown = Request::Read(Read {
        dataset: forebay_protocol::DatasetId::local("other", "x"),
        epoch: 1,
        generation: 0,
        path: path("/f"),
        version: FileVersion { size: 1, mtime_ns: 0, key: VersionKey::new("k").unwrap() },
        range: BlockRange { first: 0, count: 1 },
        purpose: Purpose::Demand,
        verify: false,
    });
    let mut frames = BytesMut::new();
    encode_request(&mut frames, 3, &unknown);
    stream.write_all(&frames).await.unwrap();
    let unknown = forebay_protocol::frame::FailureCode::UnknownDataset;
    assert!(matches!(answer(&mut stream).await, (3, Answer::Failure { code, .. }) if code == unknown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rots_under_a_worker_is_found_by_a_read_that_says_so() {
    let cluster = Cluster::start(1).await;
    let size = 2 * MIB;
    cluster.put("f", 1, size).await;
    cluster.refresh("/").await;
    cluster.check("/f", 1, size).await;
    let version = cluster.version("/f").await.unwrap();
    flip_in_chunk(&cluster, size, 5 * BLOCK_SIZE + 7);
    let before = cluster.store.bytes_of("f");
    let mut stream = data(&cluster).await;
    // Its own blocks it trusts, until it is told not to; afterwards it may again.
    for (number, verify, right, misses) in [(1, false, false, 0), (2, true, true, 1), (3, false, true, 0)] {
        let request = match read(&cluster, &version, 0, 16) {
            Request::Read(read) => Request::Read(Read { verify, ..read }),
            other => other,
        };
        let mut frames = BytesMut::new();
        encode_request(&mut frames, number, &request);
        stream.write_all(&frames).await.unwrap();
        let mut got = Vec::new();
        let miss_blocks = loop {
            match answer(&mut stream).await {
                (_, Answer::Data { bytes, .. }) => got.extend_from_slice(&bytes),
                (_, Answer::End { miss_blocks, .. }) => break miss_blocks,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((got == contents(1, size)[..MIB as usize], miss_blocks), (right, misses), "{number}");
    }
    assert_eq!(cluster.store.bytes_of("f") - before, BLOCK_SIZE, "exactly the damaged block");
    assert_eq!(cluster.status(0).await.corrupt_blocks, 1);

    // The client says so by itself.
    flip_in_chunk(&cluster, size, 30 * BLOCK_SIZE);
    cluster.check("/f", 1, size).await;
    assert_eq!(cluster.status(0).await.corrupt_blocks, 2);
}

/// Flips a bit of the only chunk file.
fn flip_in_chunk(cluster: &Cluster, size: u64, at: u64) {
    let files = files_below(&cluster.workers[0].options.cache_dir.join("chunks"));
    let chunk = files.into_iter().find(|file| std::fs::metadata(file).unwrap().len() >= size).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(chunk).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_answer() {
    let cluster = Cluster::start(1).await;
    assert!(http(&cluster, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(http(&cluster, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(http(&cluster, "/nothing").await.starts_with("HTTP/1.1 404"));
    assert!(http(&cluster, "/metrics").await.contains("forebay_worker_cached_bytes{"));
}
