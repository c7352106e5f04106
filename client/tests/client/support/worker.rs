//! One worker: a listener, data connections with scripted answers, and the gRPC services.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use forebay_protocol::{
    BLOCK_SIZE, BlockRange, block_checksum,
    frame::{
        ALIVE_INTERVAL, Answer, FailureCode, HEADER, Header, MAX_DATA_BLOCKS, MAX_REQUEST_BODY, Read, Request,
        decode_request, encode_answer,
    },
    handshake::{self, ConnectionPurpose, RuntimeKey},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
};
use tokio_util::task::AbortOnDropHandle;

use super::{content, names::Names};

/// How a worker answers a Read.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Serve,
    /// Waits first, then serves.
    Delay(Duration),
    /// One bit of the last block is flipped.
    Flip,
    /// The bytes and checksums of another file, each valid for that one.
    Swap,
    /// The bytes and checksums of the blocks after the ones asked for, under the numbers asked for.
    Shift,
    /// Ends one block early.
    Short,
    /// Every frame twice.
    Twice,
    /// More blocks than asked for.
    TooMuch,
    /// Never, but shows that it lives.
    Stall,
    /// Half of a frame, then the connection closes.
    CloseMidFrame,
    /// Bytes that are no frame.
    Garbage,
    /// An answer to somebody else's request.
    Stranger,
    Fail(FailureCode),
}

type Script = Arc<dyn Fn(&Read) -> Reply + Send + Sync>;

pub(crate) struct State {
    key: RuntimeKey,
    script: Mutex<Script>,
    requests: Mutex<Vec<Read>>,
    cancels: AtomicUsize,
    connections: AtomicUsize,
    /// As after SIGSTOP: the kernel accepts, nobody reads or writes.
    frozen: watch::Sender<bool>,
    pub(crate) names: Arc<Names>,
}

pub(crate) struct FakeWorker {
    pub(crate) address: String,
    pub(crate) state: Arc<State>,
    task: Option<AbortOnDropHandle<()>>,
}

impl FakeWorker {
    pub(crate) async fn start(key: RuntimeKey) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State {
            key,
            script: Mutex::new(Arc::new(|_| Reply::Serve)),
            requests: Mutex::default(),
            cancels: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            frozen: watch::Sender::new(false),
            names: Arc::default(),
        });
        let task = AbortOnDropHandle::new(tokio::spawn(listen(listener, state.clone())));
        Self { address, state, task: Some(task) }
    }

    /// As kill -9: the listener and all connections are gone.
    pub(crate) fn stop(&mut self) {
        self.task = None;
    }

    /// At the same address again.
    pub(crate) async fn restart(&mut self) {
        self.stop();
        let address: SocketAddr = self.address.parse().unwrap();
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        self.task = Some(AbortOnDropHandle::new(tokio::spawn(listen(listener, self.state.clone()))));
    }

    pub(crate) fn freeze(&self, frozen: bool) {
        self.state.frozen.send_replace(frozen);
    }

    pub(crate) fn always(&self, reply: Reply) {
        self.script(move |_| reply.clone());
    }

    pub(crate) fn script(&self, script: impl Fn(&Read) -> Reply + Send + Sync + 'static) {
        *self.state.script.lock() = Arc::new(script);
    }

    pub(crate) fn requests(&self) -> Vec<Read> {
        self.state.requests.lock().clone()
    }

    pub(crate) fn cancels(&self) -> usize {
        self.state.cancels.load(Ordering::SeqCst)
    }

    /// Data connections that are open.
    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }
}

impl State {
    async fn thawed(&self) {
        let _ = self.frozen.subscribe().wait_for(|frozen| !*frozen).await;
    }
}

async fn listen(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        state.thawed().await;
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.unwrap();
                connections.spawn(serve(stream, state.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut stream: TcpStream, state: Arc<State>) {
    state.thawed().await;
    let Ok(purpose) = handshake::accept(&mut stream, &state.key).await else { return };
    match purpose {
        ConnectionPurpose::Data => {
            struct Open(Arc<State>);
            impl Drop for Open {
                fn drop(&mut self) {
                    self.0.connections.fetch_sub(1, Ordering::SeqCst);
                }
            }
            state.connections.fetch_add(1, Ordering::SeqCst);
            let _open = Open(state.clone());
            let _ = data(stream, state).await;
        }
        ConnectionPurpose::Control => {
            // The services behind a relay, which stands still while the worker is frozen.
            let (near, far) = tokio::io::duplex(64 << 10);
            let (from_client, to_client) = stream.into_split();
            let (from_service, to_service) = tokio::io::split(near);
            tokio::select! {
                () = relay(&state, from_client, to_service) => {}
                () = relay(&state, from_service, to_client) => {}
                () = state.names.clone().serve(far) => {}
            }
        }
    }
}

async fn relay(state: &State, mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return };
        state.thawed().await;
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

enum Out {
    Bytes(BytesMut),
    Close,
}

async fn data(stream: TcpStream, state: Arc<State>) -> std::io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let (frames, mut outgoing) = mpsc::channel::<Out>(64);
    let open: Arc<Mutex<HashMap<u64, AbortHandle>>> = Arc::default();
    let mut tasks = JoinSet::new();
    let write = async {
        let mut alive = tokio::time::interval(ALIVE_INTERVAL);
        loop {
            tokio::select! {
                out = outgoing.recv() => match out {
                    Some(Out::Bytes(bytes)) => {
                        state.thawed().await;
                        writer.write_all(&bytes).await?;
                    }
                    Some(Out::Close) | None => return std::io::Result::Ok(()),
                },
                _ = alive.tick() => {
                    state.thawed().await;
                    if !open.lock().is_empty() {
                        let mut out = BytesMut::new();
                        encode_answer(&mut out, 0, &Answer::Alive);
                        writer.write_all(&out).await?;
                    }
                }
            }
        }
    };
    let read = async {
        loop {
            let mut head = [0u8; HEADER];
            reader.read_exact(&mut head).await?;
            state.thawed().await;
            let header = Header::decode(&head, MAX_REQUEST_BODY).unwrap();
            let mut body = vec![0; header.body];
            reader.read_exact(&mut body).await?;
            match decode_request(&header, body.into()).unwrap() {
                Request::Cancel => {
                    state.cancels.fetch_add(1, Ordering::SeqCst);
                    if let Some(task) = open.lock().remove(&header.request) {
                        task.abort();
                    }
                }
                Request::Read(read) => {
                    state.requests.lock().push(read.clone());
                    let reply = (state.script.lock().clone())(&read);
                    let (frames, ended, number) = (frames.clone(), open.clone(), header.request);
                    let mut opened = open.lock();
                    let task = tasks.spawn(async move {
                        answer(&frames, number, &read, reply).await;
                        ended.lock().remove(&number);
                    });
                    opened.insert(number, task);
                }
            }
        }
    };
    tokio::select! {
        result = write => result,
        result = read => result,
    }
}

async fn answer(frames: &mpsc::Sender<Out>, number: u64, read: &Read, reply: Reply) {
    let identity = read.version.identity(read.dataset, &read.path);
    let size = read.version.size;
    let send = |answer: &Answer| {
        let mut out = BytesMut::new();
        encode_answer(&mut out, number, answer);
        out
    };
    let mut source = identity;
    let mut shift = 0;
    let mut range = read.range;
    match reply {
        Reply::Delay(delay) => tokio::time::sleep(delay).await,
        Reply::Swap => source.0 ^= 1,
        Reply::Shift => shift = 1,
        Reply::Short => range.count -= 1,
        Reply::TooMuch => range.count += 32,
        Reply::Stall => std::future::pending().await,
        Reply::Garbage => {
            let _ = frames.send(Out::Bytes(BytesMut::from(&[0xa5u8; 300][..]))).await;
            return;
        }
        Reply::Stranger => {
            let mut out = BytesMut::new();
            encode_answer(&mut out, number + 1000, &Answer::End { hit_blocks: 1, miss_blocks: 0, workers: 1 });
            let _ = frames.send(Out::Bytes(out)).await;
            return;
        }
        Reply::Fail(code) => {
            let failure = Answer::Failure { code, message: "as scripted".into() };
            let _ = frames.send(Out::Bytes(send(&failure))).await;
            return;
        }
        Reply::Serve | Reply::Flip | Reply::Twice | Reply::CloseMidFrame => {}
    }
    let end = range.first + range.count;
    let mut first = range.first;
    while first < end {
        let part = BlockRange { first, count: (end - first).min(u64::from(MAX_DATA_BLOCKS)) };
        // Beyond the end of the file only when more is sent than asked for.
        let len = if matches!(reply, Reply::TooMuch) { part.count * BLOCK_SIZE } else { part.len(size) };
        let mut bytes = content(source, part.offset() + shift * BLOCK_SIZE, len as usize);
        let checksums = bytes
            .chunks(BLOCK_SIZE as usize)
            .zip(first..)
            .map(|(block, index)| block_checksum(source, index + shift, block))
            .collect();
        first += part.count;
        if matches!(reply, Reply::Flip) && first == end {
            let last = bytes.len() - 1;
            bytes[last] ^= 4;
        }
        let mut frame = send(&Answer::Data { first_block: part.first, checksums, bytes: Bytes::from(bytes) });
        if matches!(reply, Reply::CloseMidFrame) {
            frame.truncate(frame.len() / 2);
            let _ = frames.send(Out::Bytes(frame)).await;
            let _ = frames.send(Out::Close).await;
            return;
        }
        let again = matches!(reply, Reply::Twice).then(|| frame.clone());
        let _ = frames.send(Out::Bytes(frame)).await;
        if let Some(again) = again {
            let _ = frames.send(Out::Bytes(again)).await;
        }
    }
    let end = Answer::End { hit_blocks: read.range.count as u32, miss_blocks: 0, workers: 1 };
    let _ = frames.send(Out::Bytes(send(&end))).await;
}
