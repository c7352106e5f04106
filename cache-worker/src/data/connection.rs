//! The loop that reads a connection's requests, and the task of each request.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use forebay_protocol::{
    ChunkKey,
    frame::{
        Answer, FailureCode, HEADER, Header, MAX_IN_FLIGHT, MAX_REQUEST_BODY, Purpose, Read, Request, decode_request,
        encode_data_head,
    },
};
use parking_lot::Mutex;
use tokio::{net::TcpStream, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    outgoing::FilePart,
    writer::{self, Body, Frame},
};
use crate::{
    dataset::Dataset,
    fill::{BlockReader, CHUNK_BLOCKS, Class, FillError, Piece, Wanted},
    heat,
    worker::Worker,
};

/// How long the rest of a frame may take when its first byte is there.
const FRAME_DEADLINE: Duration = Duration::from_secs(10);
/// How much is read from the socket at once; many requests fit.
const READ_BUFFER: usize = 16 * 1024;
/// How long requests that are under way may still be answered after the worker began to stop.
const DRAIN: Duration = Duration::from_secs(4);

/// Requests under way of one connection.
#[derive(Default)]
struct Open {
    /// For the writer, which shows that the worker lives while this is not zero.
    count: Arc<AtomicUsize>,
    cancels: Mutex<HashMap<u64, CancellationToken>>,
}

/// Serves a data connection until its client goes, breaks the protocol or takes nothing, or the worker stops.
pub(crate) async fn serve(worker: Arc<Worker>, socket: TcpStream) {
    let socket = Arc::new(socket);
    let open = Arc::new(Open::default());
    // Ends every request of this connection when it is dropped.
    let connection = CancellationToken::new();
    let _end = connection.clone().drop_guard();
    let (queue, queued) = mpsc::channel(writer::QUEUE);
    let writing = writer::run(socket.clone(), queued, open.count.clone(), worker.engine.disk().clone());
    let reading = read_requests(&worker, &socket, &open, &connection, queue);
    tokio::pin!(writing);
    let ended = tokio::select! {
        ended = reading => match ended {
            // The client has gone, and nobody reads what is under way.
            Ok(Ended::ByClient) => Ok(()),
            // What is under way is still answered.
            Ok(Ended::ByWorker) => timeout(DRAIN, &mut writing).await.unwrap_or(Ok(())),
            Err(error) => Err(error),
        },
        ended = &mut writing => ended,
    };
    match ended {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            worker.metrics.protocol_errors.inc();
            debug!(%error, "a data connection broke the protocol");
        }
        Err(error) => {
            if error.kind() == io::ErrorKind::TimedOut {
                worker.metrics.slow_connections.inc();
            }
            debug!(%error, "a data connection ended");
        }
    }
}

/// Who ended the reading of requests.
enum Ended {
    ByClient,
    ByWorker,
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

async fn read_requests(
    worker: &Arc<Worker>,
    socket: &TcpStream,
    open: &Arc<Open>,
    connection: &CancellationToken,
    queue: mpsc::Sender<Frame>,
) -> io::Result<Ended> {
    let mut buffer = BytesMut::with_capacity(READ_BUFFER);
    loop {
        let first = tokio::select! {
            first = next_frame(socket, &mut buffer) => first?,
            // New requests are refused by closing; the client goes to the next worker.
            () = worker.stop.cancelled() => {
                refuse_rest(&mut buffer, &queue).await;
                return Ok(Ended::ByWorker);
            }
        };
        let Some((header, body)) = first else { return Ok(Ended::ByClient) };
        match decode_request(&header, body).map_err(invalid)? {
            Request::Cancel => {
                if let Some(cancel) = open.cancels.lock().get(&header.request) {
                    cancel.cancel();
                }
            }
            Request::Read(read) => begin(worker, open, connection, &queue, header.request, read).await?,
        }
    }
}

/// Answers what has already been read when the worker stops.
async fn refuse_rest(buffer: &mut BytesMut, queue: &mpsc::Sender<Frame>) {
    while let Ok(Some((header, body))) = split_frame(buffer) {
        if let Ok(Request::Read(_)) = decode_request(&header, body) {
            let answer = failure(FailureCode::Stopping, "the worker is stopping");
            if queue.send(Frame::of(header.request, &answer)).await.is_err() {
                return;
            }
        }
    }
}

fn failure(code: FailureCode, message: impl Into<String>) -> Answer {
    Answer::Failure { code, message: message.into() }
}

/// Takes a whole frame from the front of the buffer.
fn split_frame(buffer: &mut BytesMut) -> io::Result<Option<(Header, Bytes)>> {
    let Some(head) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let header = Header::decode(head, MAX_REQUEST_BODY).map_err(invalid)?;
    if buffer.len() < HEADER + header.body {
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some((header, buffer.split_to(header.body).freeze())))
}

/// The next frame; `None` when the client closed between frames. A client may be silent between frames, not within one.
async fn next_frame(socket: &TcpStream, buffer: &mut BytesMut) -> io::Result<Option<(Header, Bytes)>> {
    loop {
        if let Some(frame) = split_frame(buffer)? {
            return Ok(Some(frame));
        }
        if buffer.is_empty() {
            socket.readable().await?;
        } else {
            timeout(FRAME_DEADLINE, socket.readable())
                .await
                .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "a frame was left unfinished"))??;
        }
        buffer.reserve(READ_BUFFER);
        match socket.try_read_buf(buffer) {
            Ok(0) if buffer.is_empty() => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn begin(
    worker: &Arc<Worker>,
    open: &Arc<Open>,
    connection: &CancellationToken,
    queue: &mpsc::Sender<Frame>,
    number: u64,
    read: Read,
) -> io::Result<()> {
    let cancel = {
        let mut cancels = open.cancels.lock();
        if number == 0 || cancels.contains_key(&number) {
            return Err(invalid("a request number that is in use"));
        }
        (cancels.len() < MAX_IN_FLIGHT).then(|| {
            let cancel = connection.child_token();
            cancels.insert(number, cancel.clone());
            cancel
        })
    };
    let Some(cancel) = cancel else {
        worker.metrics.busy_answers.inc();
        let answer = failure(FailureCode::Busy, "too many requests on this connection");
        // The queue ends only with the connection.
        let _ = queue.send(Frame::of(number, &answer)).await;
        return Ok(());
    };
    let open_request = OpenRequest::new(open.clone(), worker, number);
    let (worker, queue) = (worker.clone(), queue.clone());
    let tasks = worker.tasks.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = answer(&worker, &queue, number, read) => {}
            () = cancel.cancelled() => {
                worker.metrics.cancelled_requests.inc();
            }
        }
        drop(open_request);
    });
    Ok(())
}

/// Counts a request while it is under way.
struct OpenRequest {
    open: Arc<Open>,
    worker: Arc<Worker>,
    number: u64,
}

impl OpenRequest {
    fn new(open: Arc<Open>, worker: &Arc<Worker>, number: u64) -> Self {
        open.count.fetch_add(1, Ordering::Relaxed);
        worker.metrics.requests_in_flight.inc();
        Self { open, worker: worker.clone(), number }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.open.cancels.lock().remove(&self.number);
        self.open.count.fetch_sub(1, Ordering::Relaxed);
        self.worker.metrics.requests_in_flight.dec();
    }
}

async fn answer(worker: &Arc<Worker>, queue: &mpsc::Sender<Frame>, number: u64, read: Read) {
    let last = match read_blocks(worker, queue, number, read).await {
        Ok(end) => end,
        Err(Refusal { code, message }) => {
            worker.metrics.failed(code);
            failure(code, message)
        }
    };
    // A closed queue is a closed connection.
    let _ = queue.send(Frame::of(number, &last)).await;
}

struct Refusal {
    code: FailureCode,
    message: String,
}

impl From<FillError> for Refusal {
    fn from(error: FillError) -> Self {
        Self { code: error.code(), message: error.to_string() }
    }
}

async fn read_blocks(
    worker: &Arc<Worker>,
    queue: &mpsc::Sender<Frame>,
    number: u64,
    read: Read,
) -> Result<Answer, Refusal> {
    worker.saw_epoch(read.epoch);
    let dataset = worker.datasets.get(&read.dataset).ok_or_else(|| Refusal {
        code: FailureCode::UnknownDataset,
        message: format!("this worker does not serve dataset {}", read.dataset),
    })?;
    dataset.saw_generation(read.generation);
    let verify = read.verify;
    let (wanted, purpose, bytes) = wanted(&dataset, read);
    let mut reader: BlockReader = match purpose {
        Purpose::Demand => worker.engine.read(wanted.clone(), Class::Demand, verify).await?,
        Purpose::ReadAhead | Purpose::Load => worker.engine.read(wanted.clone(), Class::Background, verify).await?,
        Purpose::Peer => worker.engine.read_held(wanted.clone(), verify).await?,
    };
    let mut workers = 1;
    if matches!(purpose, Purpose::Demand | Purpose::ReadAhead) {
        dataset.count_request(&wanted, bytes, reader.hits);
        workers = heat::note(worker, &wanted);
    }
    let closed = || Refusal { code: FailureCode::Internal, message: "the connection is closed".into() };
    while let Some(piece) = reader.next().await? {
        queue.send(data_frame(&dataset, number, piece)).await.map_err(|_| closed())?;
    }
    Ok(Answer::End { hit_blocks: reader.hits, miss_blocks: reader.misses, workers })
}

/// The chunk and its blocks that a request (whose range the decoder has checked) asks for, and their bytes.
fn wanted(dataset: &Arc<Dataset>, read: Read) -> (Wanted, Purpose, u64) {
    let per_chunk = u64::from(CHUNK_BLOCKS);
    // A file of 2^64 bytes has 2^38 chunks, which the chunk index cannot number; no store has one, and the saturated key
    // is merely another chunk's name under the same conditional read.
    let index = u32::try_from(read.range.first / per_chunk).unwrap_or(u32::MAX);
    let first = (read.range.first % per_chunk) as u32;
    let key = ChunkKey { file: read.version.identity(dataset.id, &read.path), index };
    let blocks: Range<u32> = first..first + read.range.count as u32;
    let bytes = read.range.len(read.version.size);
    let wanted = Wanted { dataset: dataset.clone(), path: read.path, version: read.version, key, blocks };
    (wanted, read.purpose, bytes)
}

fn data_frame(dataset: &Dataset, number: u64, piece: Piece) -> Frame {
    let mut head = BytesMut::with_capacity(128);
    let (body, len) = match piece {
        Piece::Memory { first, blocks } => {
            let checksums: Vec<u32> = blocks.iter().map(|block| block.checksum).collect();
            let len = blocks.iter().map(|block| block.bytes.len()).sum();
            encode_data_head(&mut head, number, first, &checksums, len);
            (Body::Blocks(blocks), len as u64)
        }
        Piece::Stored { first, extent, chunk, first_in_chunk } => {
            encode_data_head(&mut head, number, first, &extent.checksums, extent.len as usize);
            let part = FilePart {
                file: extent.file,
                offset: extent.offset,
                len: extent.len,
                chunk,
                first: first_in_chunk,
                count: extent.checksums.len() as u32,
            };
            (Body::File(part), extent.len)
        }
    };
    Frame { head: head.freeze(), body, served: Some((dataset.metrics.served_bytes.clone(), len)) }
}
