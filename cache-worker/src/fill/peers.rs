//! Blocks from the workers that held them before this one: a new owner fills from the old one, on demand.
//!
//! A run that takes a copy asks the worker that offered it, and nobody else. Where a dataset has copies, those workers of a
//! chunk that are to have one ask the others of them. Otherwise, before a run of a chunk that this worker owns goes to the
//! source, it asks the best other workers for it, in the order that the table gives when draining members count; it does
//! so only while that is likely to help: while a member drains,
//! and for [`LIKELY`] from the first miss after the table changed or this worker started empty. Otherwise a cold read
//! would pay round trips for nothing. Whoever asks a worker for a chunk of somebody else has asked its owner before, so
//! that run goes to the source at once; but a client that knows a newer table may be right about the owner, so until this
//! worker knows it, too, others are asked for every chunk.
//!
//! Invariants:
//! - A peer answers from what it holds and asks nobody, so workers never wait for each other in a circle.
//! - A block is taken only if it matches its checksum, which is seeded with the file's identity and the block's place.
//! - It is read from the socket into memory that the run's permit has paid for, so a peer's answer needs no memory of
//!   its own: a slow reader slows the peer.
//! - What is not had from peers in time is left to the source; no answer of a peer fails a run.
//!
//! A connection carries one read at a time: a run is up to 8 MiB, and a pipe without other readers' frames between can
//! be left full. Not handled: of several members that joined lately, all may be asked, though only an older one holds
//! anything.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    io, mem,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use forebay_client::transport;
use forebay_protocol::{
    BlockRange, block_checksum,
    errors::chain,
    frame::{
        Answer, DATA_HEAD, HEADER, Header, MAX_ANSWER_BODY, MAX_READ_BLOCKS, Purpose, Read, Request, decode_answer,
        decode_data_head, encode_request,
    },
    handshake::{ConnectionPurpose, RuntimeKey},
    placement::Placement,
    table::{Member, MemberState, WorkerTable},
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};
use tracing::{debug, warn};

use super::{
    FillError, MAX_RUN_BLOCKS,
    chunk::{Block, ChunkFill},
    run::{Run, block_of_file, hand_over, nobody_waits},
};

/// How long others are likely to hold what this worker misses.
const LIKELY: Duration = Duration::from_secs(600);
/// How long the table that a client knows may take to come here, too.
const BEHIND: Duration = Duration::from_secs(10);
/// Peers that one run asks at most.
const CANDIDATES: usize = 2;
/// How long a connection may take, its handshake included.
const CONNECT: Duration = Duration::from_millis(500);
/// How long a peer may give nothing: before the first block, and between blocks.
const ANSWER: Duration = Duration::from_secs(1);
/// How long one read waits for a peer in all. A run of 8 MiB comes with 1.6 MiB/s at least, or from the source.
const WHOLE: Duration = Duration::from_secs(5);
/// How long a peer that failed is not asked at first; then one read tries it, and it is four times as long. A moment's
/// hang does not send all to the source for long; a peer that hangs on costs one run in ten seconds `CONNECT + ANSWER`.
const LEFT_ALONE: Duration = Duration::from_secs(1);
/// And at most.
const LEFT_ALONE_LONGEST: Duration = Duration::from_secs(10);
/// Reads from peers under way at most, each on a connection. Others wait for [`ANSWER`].
const READS: usize = 32;
/// Connections that are kept for later, over all peers.
const IDLE: usize = 32;
/// Body of an End or a Failure, with room.
const MAX_LAST: usize = 2048;

/// Who may hold what this worker misses, and the connections to them.
pub(crate) struct Peers {
    own_name: String,
    key: RuntimeKey,
    tables: watch::Receiver<Arc<WorkerTable>>,
    /// A leaf.
    state: Mutex<State>,
    reads: Semaphore,
}

struct State {
    table: Arc<WorkerTable>,
    /// Over all members, also those that drain.
    placement: Placement,
    /// The table changed, or the worker started empty, and nothing was missed since.
    changed: bool,
    likely_until: Option<Instant>,
    /// The highest epoch that anybody mentioned, and how long a lower one here says little about who owns what.
    highest_epoch: u64,
    behind_until: Option<Instant>,
    /// With their addresses, the one used last at the end; only to members of the table.
    idle: VecDeque<(String, Connection)>,
    /// Members that failed and have not answered since, by address: until then nobody asks them.
    left_alone: HashMap<String, LeftAlone>,
}

/// A member that failed.
struct LeftAlone {
    until: Instant,
    /// How long, the next time.
    next: Duration,
}

struct Connection {
    stream: TcpStream,
    /// Number of the last request.
    last: u64,
}

/// Why a peer gave less than was asked for.
enum Problem {
    /// It does not hold it, or says no: that is no fault.
    Refused(String),
    /// The connection is gone.
    Lost(String),
    /// It is slow, or breaks the protocol.
    Failed(String),
    /// A block does not match its checksum.
    Corrupt(String),
    /// It is this worker's affair.
    Own(FillError),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl Peers {
    /// Follows `tables`. `empty` says that this worker holds nothing yet.
    pub(crate) fn new(
        own_name: String,
        key: RuntimeKey,
        mut tables: watch::Receiver<Arc<WorkerTable>>,
        empty: bool,
    ) -> Self {
        let table = tables.borrow_and_update().clone();
        let state = State {
            placement: Placement::with_draining(&table),
            highest_epoch: table.epoch,
            table,
            changed: empty,
            likely_until: None,
            behind_until: None,
            idle: VecDeque::new(),
            left_alone: HashMap::new(),
        };
        Self { own_name, key, tables, state: Mutex::new(state), reads: Semaphore::new(READS) }
    }

    /// A client knows this epoch of the table.
    pub(crate) fn saw_epoch(&self, epoch: u64) {
        let mut state = self.state.lock();
        if epoch > state.highest_epoch {
            state.highest_epoch = epoch;
            state.behind_until = Some(Instant::now() + BEHIND);
        }
    }

    /// Whether anybody is likely to hold what this worker misses.
    fn may_help(&self) -> bool {
        self.state.lock().may_help(self)
    }

    /// Whom to ask for a chunk of which there are so many copies, best first, and the table's epoch.
    fn candidates(&self, key: u64, copies: usize) -> (u64, Vec<Member>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let may_help = state.may_help(self);
        let is_behind = state.is_behind(now);
        let State { table, placement, left_alone, .. } = &mut *state;
        if !may_help && copies < 2 {
            return (table.epoch, Vec::new());
        }
        let order = placement.order(key, table.members.len());
        let order = || order.iter().filter_map(|index| table.members.get(*index));
        let is_self = |member: &&Member| member.name == self.own_name;
        let owner = order().find(|member| member.state == MemberState::Serving);
        let owns = owner.is_some_and(|owner| is_self(&owner));
        let most = match (may_help && (is_behind || owns), copies > 1 && order().take(copies).any(|m| is_self(&m))) {
            (true, _) => CANDIDATES,
            (false, true) => CANDIDATES.min(copies - 1),
            (false, false) => 0,
        };
        let others = order().filter(|member| !is_self(member)).take(most);
        (table.epoch, others.filter(|member| is_asked(left_alone, member, now)).cloned().collect())
    }

    /// The worker that a copy is taken from, unless it is left alone, and the table's epoch.
    fn holder(&self, member: &Member) -> (u64, Vec<Member>) {
        let mut state = self.state.lock();
        let asked = is_asked(&mut state.left_alone, member, Instant::now());
        (state.table.epoch, asked.then(|| member.clone()).into_iter().collect())
    }

    /// A connection that was used before.
    fn idle(&self, address: &str) -> Option<Connection> {
        let idle = &mut self.state.lock().idle;
        loop {
            let last = idle.iter().rposition(|(of, _)| of == address)?;
            let (_, connection) = idle.remove(last)?;
            if connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    async fn connect(&self, address: &str) -> Result<Connection, Problem> {
        match timeout(CONNECT, transport::connect(address, &self.key, ConnectionPurpose::Data)).await {
            Ok(Ok(stream)) => Ok(Connection { stream, last: 0 }),
            Ok(Err(error)) => Err(Problem::Failed(chain(&error))),
            Err(_) => Err(Problem::Failed(format!("no connection within {CONNECT:?}"))),
        }
    }

    /// The peer has answered, and the connection may carry another read.
    fn keep(&self, address: &str, connection: Connection) {
        let mut state = self.state.lock();
        if !state.table.members.iter().any(|member| member.address == address) {
            return;
        }
        state.left_alone.remove(address);
        state.idle.push_back((address.to_owned(), connection));
        if state.idle.len() > IDLE {
            state.idle.pop_front();
        }
    }

    fn leave_alone(&self, member: &Member, error: &str) {
        let mut state = self.state.lock();
        state.idle.retain(|(address, _)| *address != member.address);
        if state.left_alone.contains_key(&member.address) {
            return;
        }
        let left_alone = LeftAlone { until: Instant::now() + LEFT_ALONE, next: 4 * LEFT_ALONE };
        state.left_alone.insert(member.address.clone(), left_alone);
        drop(state);
        warn!(worker = member.name, error, "another worker is not asked for what it held, for {LEFT_ALONE:?} at first");
    }
}

impl State {
    fn may_help(&mut self, peers: &Peers) -> bool {
        let table = peers.tables.borrow().clone();
        if !Arc::ptr_eq(&table, &self.table) {
            self.adopt(table);
        }
        let now = Instant::now();
        if mem::take(&mut self.changed) {
            self.likely_until = Some(now + LIKELY);
        }
        let drains = |member: &Member| member.state == MemberState::Draining && member.name != peers.own_name;
        let may = self.likely_until.is_some_and(|until| now < until)
            || self.is_behind(now)
            || self.table.members.iter().any(drains);
        if !may {
            self.idle.clear();
            self.left_alone.clear();
        }
        may
    }

    /// Whether a client knows a newer table, since a moment.
    fn is_behind(&self, now: Instant) -> bool {
        self.highest_epoch > self.table.epoch && self.behind_until.is_some_and(|until| now < until)
    }

    fn adopt(&mut self, table: Arc<WorkerTable>) {
        if table.epoch < self.table.epoch {
            // Of another runtime.
            self.highest_epoch = table.epoch;
        }
        self.changed |= table.epoch != self.table.epoch;
        self.placement = Placement::with_draining(&table);
        let known = |address: &String| table.members.iter().any(|member| member.address == *address);
        self.idle.retain(|(address, _)| known(address));
        self.left_alone.retain(|address, _| known(address));
        self.table = table;
    }
}

impl Connection {
    /// Whether it is open and nothing is left in it.
    fn is_quiet(&self) -> bool {
        matches!(self.stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Whether a member is asked, which may have failed before.
fn is_asked(left_alone: &mut HashMap<String, LeftAlone>, member: &Member, now: Instant) -> bool {
    let Some(LeftAlone { until, next }) = left_alone.get_mut(&member.address) else { return true };
    let over = *until <= now;
    if over {
        // This read tries it, the others wait for what comes of that.
        *until = now + *next;
        *next = LEFT_ALONE_LONGEST.min(*next * 4);
    }
    over
}

/// Gets what peers hold of a run, from its start on, and gives the first block that is still missing; the run's end also
/// when nobody waits for the run any more.
pub(super) async fn receive(
    fill: &Arc<ChunkFill>,
    run: &Arc<Run>,
    queue: &mpsc::Sender<(u32, Block)>,
) -> Result<u32, FillError> {
    let peers = &fill.engine.inner.peers;
    let metrics = &fill.dataset.metrics;
    let mut missing = run.blocks.clone();
    let copies = fill.dataset.copies.most() as usize;
    if run.from.is_none() && copies < 2 && !peers.may_help() {
        return Ok(missing.start);
    }
    let Ok(Ok(_read)) = timeout(ANSWER, peers.reads.acquire()).await else {
        metrics.peer_errors.inc();
        return Ok(missing.start);
    };
    // Only now: the reads before this one know who does not answer.
    let (epoch, candidates) = match &run.from {
        Some(holder) => peers.holder(holder),
        None => peers.candidates(fill.key.placement_key(), copies),
    };
    for member in candidates {
        let asked = tokio::select! {
            asked = ask(fill, run, &member, epoch, &mut missing, queue) => asked,
            () = nobody_waits(fill, run) => return Ok(run.blocks.end),
        };
        match asked {
            Ok(()) => {}
            Err(Problem::Refused(error)) => debug!(worker = member.name, error, "not from another worker"),
            Err(Problem::Own(error)) => return Err(error),
            Err(Problem::Lost(error) | Problem::Failed(error)) => {
                metrics.peer_errors.inc();
                peers.leave_alone(&member, &error);
            }
            Err(Problem::Corrupt(error)) => {
                metrics.peer_corrupt_blocks.inc();
                peers.leave_alone(&member, &error);
            }
        }
        if missing.is_empty() {
            break;
        }
    }
    Ok(missing.start)
}

/// Asks one peer for what is missing.
async fn ask(
    fill: &Arc<ChunkFill>,
    run: &Arc<Run>,
    member: &Member,
    epoch: u64,
    missing: &mut Range<u32>,
    queue: &mpsc::Sender<(u32, Block)>,
) -> Result<(), Problem> {
    let peers = &fill.engine.inner.peers;
    let mut used = peers.idle(&member.address);
    loop {
        let again = used.is_some();
        let mut connection = match used.take() {
            Some(connection) => connection,
            None => peers.connect(&member.address).await?,
        };
        let outcome = read(fill, run, &mut connection, epoch, missing, queue).await;
        match outcome {
            // The peer may have restarted since it was used last.
            Err(Problem::Lost(_)) if again => {}
            Ok(()) | Err(Problem::Refused(_)) => {
                peers.keep(&member.address, connection);
                return outcome;
            }
            Err(_) => return outcome,
        }
    }
}

/// What a read may still wait for its peer.
struct Patience(Duration);

impl Patience {
    async fn wait<T>(&mut self, step: impl Future<Output = io::Result<T>>) -> Result<T, Problem> {
        let start = Instant::now();
        let limit = ANSWER.min(self.0);
        let outcome = timeout(limit, step).await;
        self.0 = self.0.saturating_sub(start.elapsed());
        match outcome {
            Ok(outcome) => Ok(outcome?),
            Err(_) => Err(Problem::Failed(format!("no answer within {limit:?}"))),
        }
    }
}

/// Asks for what is missing and passes the blocks on that come; `missing` is what has not come.
async fn read(
    fill: &Arc<ChunkFill>,
    run: &Arc<Run>,
    connection: &mut Connection,
    epoch: u64,
    missing: &mut Range<u32>,
    queue: &mpsc::Sender<(u32, Block)>,
) -> Result<(), Problem> {
    let wrong = |what: String| Err(Problem::Failed(what));
    let (dataset, version) = (&fill.dataset, &fill.version);
    connection.last += 1;
    let (number, stream) = (connection.last, &mut connection.stream);
    let first = block_of_file(fill.key.index, missing.start);
    let request = Request::Read(Read {
        dataset: dataset.id,
        epoch,
        generation: dataset.index.generation(),
        path: fill.path.clone(),
        version: version.clone(),
        range: BlockRange { first, count: missing.len() as u64 },
        purpose: Purpose::Peer,
        verify: false,
    });
    let mut frame = BytesMut::new();
    encode_request(&mut frame, number, &request);
    let mut patience = Patience(WHOLE);
    patience.wait(stream.write_all(&frame)).await?;
    loop {
        let header = patience.wait(next_header(stream)).await?;
        if header.request != number {
            return wrong("an answer to another request".into());
        }
        if !header.is_data() {
            return last(stream, &header, &mut patience).await;
        }
        let mut head = [0; DATA_HEAD];
        patience.wait(stream.read_exact(&mut head)).await?;
        let (range, bytes) = decode_data_head(&header, &head).map_err(|error| Problem::Failed(error.to_string()))?;
        let due = BlockRange { first: block_of_file(fill.key.index, missing.start), count: missing.len() as u64 };
        if range.first != due.first || range.count > due.count || bytes != range.len(version.size) {
            return wrong(format!("{range:?} ({bytes} bytes) where {due:?} was due"));
        }
        let mut checksums = vec![0; 4 * range.count as usize];
        patience.wait(stream.read_exact(&mut checksums)).await?;
        for (number, checksum) in (range.first..).zip(checksums.as_chunks::<4>().0) {
            let permit = run.room(&fill.engine.inner.budget).await.map_err(Problem::Own)?;
            let len = BlockRange { first: number, count: 1 }.len(version.size) as usize;
            let bytes = patience.wait(read_bytes(stream, len)).await?;
            let checksum = u32::from_le_bytes(*checksum);
            if block_checksum(fill.key.file, number, &bytes) != checksum {
                let error = format!("block {number} of {} does not match its checksum", fill.path);
                return Err(Problem::Corrupt(error));
            }
            dataset.metrics.peer_bytes.inc_by(len as u64);
            let block = Block { bytes, checksum, _permit: Arc::new(permit) };
            hand_over(fill, run, missing.start, block, queue).await;
            missing.start += 1;
        }
    }
}

/// The header of the next frame that belongs to a request.
async fn next_header(stream: &mut TcpStream) -> io::Result<Header> {
    loop {
        let mut head = [0; HEADER];
        stream.read_exact(&mut head).await?;
        let header = Header::decode(&head, MAX_ANSWER_BODY).map_err(io::Error::other)?;
        match (header.request, header.body) {
            // A sign of life.
            (0, 0) => {}
            (0, _) => return Err(io::Error::other("a frame for no request")),
            _ => return Ok(header),
        }
    }
}

async fn read_bytes(stream: &mut TcpStream, len: usize) -> io::Result<Bytes> {
    let mut bytes = BytesMut::with_capacity(len);
    while bytes.len() < len {
        let left = len - bytes.len();
        if stream.read_buf(&mut (&mut bytes).limit(left)).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(bytes.freeze())
}

/// The frame that ends an answer.
async fn last(stream: &mut TcpStream, header: &Header, patience: &mut Patience) -> Result<(), Problem> {
    if header.body > MAX_LAST {
        return Err(Problem::Failed(format!("a last frame of {} bytes", header.body)));
    }
    let body = patience.wait(read_bytes(stream, header.body)).await?;
    match decode_answer(header, body) {
        Ok(Answer::End { .. }) => Ok(()),
        Ok(Answer::Failure { code, message }) => Err(Problem::Refused(format!("{code}: {message}"))),
        Ok(Answer::Data { .. } | Answer::Alive) => Err(Problem::Failed("a frame where none was due".into())),
        Err(error) => Err(Problem::Failed(error.to_string())),
    }
}

// The largest run fits into one read.
const _: () = assert!(MAX_RUN_BLOCKS <= MAX_READ_BLOCKS);

#[cfg(test)]
mod tests {
    use super::*;

    fn table(epoch: u64, members: &[(&str, MemberState)]) -> Arc<WorkerTable> {
        let member = |(name, state): &(&str, MemberState)| Member {
            name: (*name).to_owned(),
            address: format!("{name}:1"),
            weight: 1,
            state: *state,
        };
        Arc::new(WorkerTable { epoch, members: members.iter().map(member).collect() })
    }

    #[test]
    fn others_are_asked_only_while_that_is_likely_to_help() {
        const SERVING: MemberState = MemberState::Serving;
        let four = table(2, &[("me", SERVING), ("a", SERVING), ("b", SERVING), ("c", SERVING)]);
        // Then also of fewer.
        let owner = |key: &u64| Placement::new(&four).owner(*key).unwrap();
        let own = (0..).find(|key| owner(key) == 0).unwrap();

        let (sender, tables) = watch::channel(table(1, &[("me", SERVING), ("a", SERVING)]));
        let new = |empty| Peers::new("me".into(), RuntimeKey::generate(), tables.clone(), empty);
        let names = |peers: &Peers| {
            let (_, candidates) = peers.candidates(own, 1);
            candidates.into_iter().map(|member| member.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&new(true)), ["a"], "it began with nothing");
        let peers = new(false);
        assert_eq!(names(&peers), [""; 0], "it has been here for long");

        sender.send_replace(table(1, &[("me", SERVING), ("a", MemberState::Draining)]));
        assert_eq!(names(&peers), ["a"], "somebody drains");
        sender.send_replace(table(1, &[("me", MemberState::Draining), ("a", SERVING)]));
        assert_eq!(names(&peers), [""; 0], "this worker does");

        sender.send_replace(four.clone());
        let asked = names(&peers);
        assert_eq!(asked.len(), CANDIDATES, "the table changed");
        let other = (0..).find(|key| owner(key) != 0).unwrap();
        assert!(peers.candidates(other, 1).1.is_empty(), "its owner was asked before");

        let failed = peers.candidates(own, 1).1.remove(0);
        peers.leave_alone(&failed, "slow");
        assert_eq!(names(&peers), asked[1..], "one is left alone, and nobody else is asked for it");
        peers.state.lock().left_alone.get_mut(&failed.address).unwrap().until = Instant::now();
        assert_eq!(names(&peers), asked, "it is tried");
        assert_eq!(names(&peers), asked[1..], "once, until it answers");

        peers.state.lock().likely_until = Some(Instant::now());
        assert_eq!(names(&peers), [""; 0], "that was long ago");

        let of_two = |key| peers.candidates(key, 2).1.into_iter().map(|member| member.name).collect::<Vec<_>>();
        let order = |key: u64| Placement::new(&four).order(key, 2);
        assert_eq!(of_two(own), [four.members[order(own)[1]].name.clone()], "who has the other copy");
        let second = (0..).find(|key| order(*key)[1] == 0).unwrap();
        assert_eq!(of_two(second), [four.members[order(second)[0]].name.clone()]);
        let third = (0..).find(|key| !order(*key).contains(&0)).unwrap();
        assert!(of_two(third).is_empty(), "this worker is to have none");

        peers.saw_epoch(3);
        assert_eq!(peers.candidates(other, 1).1.len(), CANDIDATES, "a client knows a newer table");
        peers.state.lock().behind_until = Some(Instant::now());
        assert_eq!(names(&peers), [""; 0], "which does not come");
        sender.send_replace(table(3, &[("me", SERVING), ("a", SERVING), ("b", SERVING), ("c", SERVING)]));
        peers.saw_epoch(3);
        assert!(peers.candidates(other, 1).1.is_empty(), "it is here");
    }
}
