//! One data connection: frames of many requests, one reader task, one writer task.
//!
//! - Whoever makes a request sends it: a wake-up of the writer would cost more than the request. What the socket does not
//!   take at once is the writer's.
//! - Requests in flight are bounded by [`MAX_IN_FLIGHT`]: a slot is taken before a Read is queued and freed when the
//!   answer ended or its Cancel was written, so at most two frames for each slot wait for the socket.
//! - A body is read into memory that its request took from the budget beforehand ([`Room`]); what a request did not pay
//!   for is thrown away or, if the worker sends more than was asked, breaks the connection. The reader task never waits
//!   for a request's owner.
//! - The worker shows every 250 ms that it lives while requests are open. When nothing at all arrives for [`SILENCE`],
//!   the connection is broken and all its requests fail at once.
//!
//! What the frames mean is not judged here, beyond their form: see `fetch`.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use forebay_protocol::frame::{
    self, Answer, FailureCode, HEADER, Header, MAX_ANSWER_BODY, MAX_IN_FLIGHT, Read, Request,
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    budget::{Budget, Held, Permit},
    health::Health,
};

/// Silence with open requests after which a connection is broken: eight missed signs of life.
pub(crate) const SILENCE: Duration = Duration::from_secs(2);
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// End and Failure frames are not paid for by a request.
const UNPAID_BODY: usize = 2048;
/// Bytes read at once when frames are small.
const READ_BUFFER: usize = 64 * 1024;

/// What happens to a request.
#[derive(Debug)]
pub(crate) enum Event {
    /// Some of its blocks, not yet verified.
    Data { first_block: u64, checksums: Vec<u32>, bytes: Bytes },
    /// The worker says that this was all.
    End { hit_blocks: u32, miss_blocks: u32, workers: u8 },
    /// The worker says no.
    Failure { code: FailureCode, message: String },
    /// It gave its memory back while it waited, and there is none now that its bytes came.
    Starved,
    /// The connection is gone.
    Broken(Arc<str>),
}

/// The memory that a request's answer may take. Shared by whoever fetches and the connection's reader.
#[derive(Debug)]
pub(crate) struct Room {
    permit: Permit,
    /// Bytes that were given back because nothing came.
    parked: usize,
}

impl Room {
    pub(crate) fn new(permit: Permit) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { permit, parked: 0 }))
    }

    /// Bytes that are there.
    pub(crate) fn bytes(&self) -> usize {
        self.permit.bytes()
    }

    pub(crate) fn add(&mut self, permit: Permit) {
        self.permit.merge(permit);
        self.parked = 0;
    }

    /// Gives the memory back until bytes come.
    pub(crate) fn park(&mut self) {
        let all = self.permit.bytes();
        if all > 0 {
            self.parked += all;
            drop(self.permit.split(all));
        }
    }

    fn take(&mut self, bytes: usize, budget: &Budget) -> Taken {
        if self.parked > 0
            && let Some(permit) = budget.try_demand(self.parked)
        {
            self.parked = 0;
            self.permit.merge(permit);
        }
        if bytes <= self.permit.bytes() {
            Taken::Paid(self.permit.split(bytes))
        } else if bytes <= UNPAID_BODY {
            Taken::Paid(self.permit.split(0))
        } else if self.parked > 0 {
            Taken::Starved
        } else {
            Taken::TooMuch
        }
    }
}

enum Taken {
    Paid(Permit),
    Starved,
    TooMuch,
}

/// Frames that the socket has not taken yet.
#[derive(Default)]
struct Outbox {
    /// `None` when the connection is gone.
    stream: Option<Arc<OwnedWriteHalf>>,
    bytes: BytesMut,
    /// Of cancelled requests: free when their Cancels are out.
    slots: Vec<OwnedSemaphorePermit>,
}

impl Outbox {
    /// Sends what the socket takes; whether that is everything.
    fn pump(&mut self) -> io::Result<bool> {
        let Some(stream) = &self.stream else { return Err(io::ErrorKind::NotConnected.into()) };
        while !self.bytes.is_empty() {
            match stream.try_write(&self.bytes) {
                Ok(sent) => self.bytes.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.slots.clear();
        Ok(true)
    }
}

struct Slot {
    events: mpsc::Sender<Event>,
    room: Arc<Mutex<Room>>,
    /// Its owner gave up on this answer; frames that still come are thrown away.
    dead: bool,
}

#[derive(Default)]
struct Pending {
    slots: HashMap<u64, Slot>,
    /// Number of the next request; 0 belongs to the connection itself.
    next: u64,
    broken: Option<Arc<str>>,
}

struct Shared {
    outbox: Mutex<Outbox>,
    /// Something in the outbox is the writer's.
    unsent: Notify,
    pending: Mutex<Pending>,
    free: Arc<Semaphore>,
    budget: Budget,
    born: Instant,
    /// Milliseconds after `born` at which something arrived, or the first request was opened.
    heard: AtomicU64,
    closed: CancellationToken,
}

/// A data connection. It closes when this is dropped.
pub(crate) struct Connection {
    shared: Arc<Shared>,
}

/// A request under way. Dropping it cancels it.
pub(crate) struct Handle {
    shared: Arc<Shared>,
    number: u64,
    events: mpsc::Receiver<Event>,
    slot: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Takes over a stream after its handshake. `health` learns when it breaks with open requests.
    pub(crate) fn start(stream: TcpStream, budget: Budget, health: Arc<Health>, closed: CancellationToken) -> Self {
        let (reader, writer) = stream.into_split();
        let writer = Arc::new(writer);
        let outbox = Outbox { stream: Some(writer.clone()), ..Outbox::default() };
        let shared = Arc::new(Shared {
            outbox: Mutex::new(outbox),
            unsent: Notify::new(),
            pending: Mutex::new(Pending { next: 1, ..Pending::default() }),
            free: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            budget,
            born: Instant::now(),
            heard: AtomicU64::new(0),
            closed,
        });
        tokio::spawn(run(shared.clone(), health.clone(), read_frames(shared.clone(), reader)));
        tokio::spawn(run(shared.clone(), health, write_frames(shared.clone(), writer)));
        Self { shared }
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.shared.closed.is_cancelled()
    }

    pub(crate) fn in_flight(&self) -> usize {
        MAX_IN_FLIGHT - self.shared.free.available_permits().min(MAX_IN_FLIGHT)
    }

    /// Sends a Read; waits while the connection has [`MAX_IN_FLIGHT`]. Its answer lands in `room`.
    pub(crate) async fn request(&self, read: Read, room: Arc<Mutex<Room>>) -> Result<Handle, Arc<str>> {
        let shared = &self.shared;
        let slot = shared.free.clone().acquire_owned().await.map_err(|_| shared.why())?;
        // Each Data frame holds a block at least and together they are paid for, so this many events never overflow.
        let (events, receiver) = mpsc::channel(read.range.count as usize + 4);
        let number = {
            let mut pending = shared.pending.lock();
            if let Some(error) = &pending.broken {
                return Err(error.clone());
            }
            if pending.slots.is_empty() {
                shared.heard.store(shared.now(), Ordering::Relaxed);
            }
            let number = pending.next;
            pending.next += 1;
            pending.slots.insert(number, Slot { events, room, dead: false });
            number
        };
        let handle = Handle { shared: shared.clone(), number, events: receiver, slot: Some(slot) };
        shared.send(number, &Request::Read(read), None);
        Ok(handle)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Whoever still has a request under way hears of it.
        self.shared.closed.cancel();
    }
}

impl Handle {
    pub(crate) async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => Event::Broken(self.shared.why()),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let open = self.shared.pending.lock().slots.remove(&self.number).is_some();
        if let (true, Some(slot)) = (open, self.slot.take()) {
            self.shared.send(self.number, &Request::Cancel, Some(slot));
        }
    }
}

impl Shared {
    fn now(&self) -> u64 {
        self.born.elapsed().as_millis() as u64
    }

    /// Sends a frame, or leaves it to the writer; `slot` is free when it is out. On a connection that is gone, or breaks
    /// over it, the request hears of that like every other.
    fn send(&self, number: u64, request: &Request, slot: Option<OwnedSemaphorePermit>) {
        let mut outbox = self.outbox.lock();
        if outbox.stream.is_none() {
            return;
        }
        let first = outbox.bytes.is_empty();
        frame::encode_request(&mut outbox.bytes, number, request);
        outbox.slots.extend(slot);
        if first && !outbox.pump().is_ok_and(|all| all) {
            // It meets an error again.
            self.unsent.notify_one();
        }
    }

    fn why(&self) -> Arc<str> {
        self.pending.lock().broken.clone().unwrap_or_else(|| "connection closed".into())
    }

    /// Fails all requests, once. `health` learns of it first if there are any: nobody asks this member again meanwhile.
    fn fail(&self, error: &str, health: Option<&Arc<Health>>) {
        let slots = {
            let mut pending = self.pending.lock();
            if pending.broken.is_some() {
                return;
            }
            pending.broken = Some(error.into());
            std::mem::take(&mut pending.slots)
        };
        self.free.close();
        *self.outbox.lock() = Outbox::default();
        if let (Some(health), false) = (health, slots.is_empty()) {
            health.mark_down(error);
        }
        let error: Arc<str> = error.into();
        for slot in slots.values() {
            let _ = slot.events.try_send(Event::Broken(error.clone()));
        }
    }

    /// Where the body of this frame goes: memory of its request, or nowhere.
    fn admit(&self, header: &Header) -> Result<Option<Permit>, String> {
        if header.request == 0 {
            return if header.body == 0 { Ok(None) } else { Err("a frame for no request".into()) };
        }
        let mut pending = self.pending.lock();
        if header.request >= pending.next {
            return Err("an answer to a request that was never made".into());
        }
        let Some(slot) = pending.slots.get_mut(&header.request).filter(|slot| !slot.dead) else { return Ok(None) };
        let taken = slot.room.lock().take(header.body, &self.budget);
        match taken {
            Taken::Paid(permit) => Ok(Some(permit)),
            Taken::Starved => {
                slot.dead = true;
                let _ = slot.events.try_send(Event::Starved);
                Ok(None)
            }
            Taken::TooMuch => Err("more bytes than were asked for".into()),
        }
    }

    fn deliver(&self, number: u64, answer: Answer) -> Result<(), String> {
        let mut pending = self.pending.lock();
        let event = match answer {
            Answer::Data { first_block, checksums, bytes } => {
                if let Some(slot) = pending.slots.get(&number) {
                    slot.events.try_send(Event::Data { first_block, checksums, bytes }).or_else(
                        |error| match error {
                            mpsc::error::TrySendError::Full(_) => Err("more frames than blocks were asked for"),
                            mpsc::error::TrySendError::Closed(_) => Ok(()),
                        },
                    )?;
                }
                return Ok(());
            }
            Answer::End { hit_blocks, miss_blocks, workers } => Event::End { hit_blocks, miss_blocks, workers },
            Answer::Failure { code, message } => Event::Failure { code, message },
            Answer::Alive => return Err("a sign of life for a request".into()),
        };
        if let Some(slot) = pending.slots.remove(&number) {
            let _ = slot.events.try_send(event);
        }
        Ok(())
    }
}

async fn run(shared: Arc<Shared>, health: Arc<Health>, work: impl Future<Output = Result<(), String>>) {
    tokio::select! {
        () = shared.closed.cancelled() => shared.fail("connection closed", None),
        result = work => {
            let error = result.err().unwrap_or_else(|| "connection closed".into());
            shared.fail(&error, Some(&health));
        }
    }
    shared.closed.cancel();
}

async fn read_frames(shared: Arc<Shared>, stream: OwnedReadHalf) -> Result<(), String> {
    let mut stream = BufReader::with_capacity(READ_BUFFER, stream);
    loop {
        let mut head = [0u8; HEADER];
        fill(&shared, &mut stream, &mut &mut head[..], HEADER).await?;
        let header = Header::decode(&head, MAX_ANSWER_BODY).map_err(|error| error.to_string())?;
        match shared.admit(&header)? {
            Some(permit) => {
                let mut body = permit.buffer(header.body);
                fill(&shared, &mut stream, &mut body, header.body).await?;
                let body = Bytes::from_owner(Held::new(body, permit));
                let answer = frame::decode_answer(&header, body).map_err(|error| error.to_string())?;
                shared.deliver(header.request, answer)?;
            }
            None if header.request == 0 => match frame::decode_answer(&header, Bytes::new()) {
                Ok(Answer::Alive) => {}
                Ok(_) => return Err("a frame for no request".into()),
                Err(error) => return Err(error.to_string()),
            },
            None => discard(&shared, &mut stream, header.body).await?,
        }
    }
}

/// Reads exactly `len` bytes; every piece that arrives is a sign of life.
async fn fill<S, B>(shared: &Shared, stream: &mut S, out: &mut B, len: usize) -> Result<(), String>
where
    S: AsyncRead + Unpin,
    B: BufMut,
{
    let mut left = len;
    while left > 0 {
        let read = stream.read_buf(&mut (&mut *out).limit(left)).await.map_err(|error| lost(&error))?;
        if read == 0 {
            return Err("connection closed by the worker".into());
        }
        left -= read;
        shared.heard.store(shared.now(), Ordering::Relaxed);
    }
    Ok(())
}

async fn discard<S: AsyncRead + Unpin>(shared: &Shared, stream: &mut S, len: usize) -> Result<(), String> {
    let mut scratch = [0u8; 8192];
    let mut left = len;
    while left > 0 {
        let part = left.min(scratch.len());
        fill(shared, stream, &mut &mut scratch[..part], part).await?;
        left -= part;
    }
    Ok(())
}

fn lost(error: &io::Error) -> String {
    format!("connection lost: {error}")
}

/// Sends what those who made it could not, and watches over the connection.
async fn write_frames(shared: Arc<Shared>, stream: Arc<OwnedWriteHalf>) -> Result<(), String> {
    let mut watch = tokio::time::interval(WATCH_INTERVAL);
    watch.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shared.unsent.notified() => {
                while !shared.outbox.lock().pump().map_err(|error| lost(&error))? {
                    // A worker that does not even take requests is as dead as a silent one.
                    tokio::time::timeout(SILENCE, stream.writable())
                        .await
                        .map_err(|_| format!("the worker took no request for {SILENCE:?}"))?
                        .map_err(|error| lost(&error))?;
                }
            }
            _ = watch.tick() => {
                let silent = Duration::from_millis(shared.now().saturating_sub(shared.heard.load(Ordering::Relaxed)));
                if silent > SILENCE && !shared.pending.lock().slots.is_empty() {
                    return Err(format!("the worker was silent for {SILENCE:?}"));
                }
            }
        }
    }
}
