//! The frames of a data connection, after the handshake. Integers are little-endian.
//!
//! ```text
//! frame   = length u32 (bytes that follow), kind u8, reserved [u8; 3] = 0, request u64, body
//! Read    = dataset [16], epoch u64, generation u64, size u64, mtime_ns i64, first_block u64, blocks u32, purpose u8,
//!           verify u8 (0 or 1), key length u8, path length u16, key, path                   client to worker
//! Cancel  = (nothing)                                                                       client to worker
//! Data    = first_block u64, blocks u32, checksums [u32; blocks], bytes                     worker to client
//! End     = hit_blocks u32, miss_blocks u32[, workers u8]                                   worker to client
//! Failure = code u16, message length u16, message                                           worker to client
//! Alive   = (nothing), request 0                                                            worker to client
//! ```
//!
//! A Read is answered by Data frames in the order of blocks, then End; or, at any point, by Failure. `Alive` is sent
//! every [`ALIVE_INTERVAL`] while requests are open, so that a stopped worker differs from a slow source. A client that
//! got a bad block asks the same worker once more, with `verify`: what rotted on its disk is found and fetched again.
//! `workers` stands there when so many, the first of the chunk's order, hold it and are to be asked in turns.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::identity::{
    BLOCK_SIZE, BlockRange, CHUNK_SIZE, DatasetId, DatasetPath, FileVersion, MAX_PATH, MAX_VERSION_KEY, VersionKey,
};

/// Bytes before a frame's body, the length field included.
pub const HEADER: usize = 16;
/// Blocks in one Data frame at most: 1 MiB of bytes.
pub const MAX_DATA_BLOCKS: u32 = 16;
/// Blocks that one Read may ask for at most: 16 MiB. A Read never crosses a chunk.
pub const MAX_READ_BLOCKS: u32 = 256;
/// Body of the largest request: a Read with the longest key and path.
pub const MAX_REQUEST_BODY: usize = READ_FIXED + MAX_VERSION_KEY + MAX_PATH;
/// Bytes at the start of a Data frame's body, before its checksums.
pub const DATA_HEAD: usize = 12;
/// Body of the largest answer: a full Data frame.
pub const MAX_ANSWER_BODY: usize = DATA_HEAD + MAX_DATA_BLOCKS as usize * (4 + BLOCK_SIZE as usize);
/// Requests in flight on one connection at most; one more is answered by `Busy`.
pub const MAX_IN_FLIGHT: usize = 256;
/// How often a worker with open requests shows that it lives.
pub const ALIVE_INTERVAL: Duration = Duration::from_millis(250);

const READ_FIXED: usize = 16 + 8 + 8 + 8 + 8 + 8 + 4 + 1 + 1 + 1 + 2;
const MAX_MESSAGE: usize = 1024;

const KIND_READ: u8 = 1;
const KIND_CANCEL: u8 = 2;
const KIND_DATA: u8 = 16;
const KIND_END: u8 = 17;
const KIND_FAILURE: u8 = 18;
const KIND_ALIVE: u8 = 19;

/// Why bytes are no frame. The connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field is below the header or above what this side accepts.
    #[error("frame of {0} bytes")]
    Length(u32),
    /// An unknown kind, or one of the other direction.
    #[error("frame of kind {0}")]
    Kind(u8),
    /// A field does not hold what it must.
    #[error("frame with a bad {0}")]
    Field(&'static str),
}

/// Why a read was made; the worker orders and counts by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// A reader waits.
    Demand = 0,
    /// Somebody will probably read it.
    ReadAhead = 1,
    /// `forebay load` or a policy.
    Load = 2,
    /// Another worker fills from this one; only what is held is answered, up to the first block that is not, and nothing
    /// is fetched.
    Peer = 3,
}

/// A request for whole blocks of one chunk of a file version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Whose file.
    pub dataset: DatasetId,
    /// Epoch of the sender's worker table.
    pub epoch: u64,
    /// Highest generation of the dataset that the sender knows.
    pub generation: u64,
    /// Which file.
    pub path: DatasetPath,
    /// Which version of it.
    pub version: FileVersion,
    /// Which blocks, from the start of the file; at most [`MAX_READ_BLOCKS`], all in one chunk and within the file.
    pub range: BlockRange,
    /// What for.
    pub purpose: Purpose,
    /// The sender got a bad block: the worker is to check what it holds of these before it sends it.
    pub verify: bool,
}

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Asks for blocks.
    Read(Read),
    /// The answer to the request of this number is no longer wanted.
    Cancel,
}

/// What the caller of a failed read can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u16)]
pub enum FailureCode {
    /// The request is malformed; a defect of the sender.
    #[error("bad request")]
    BadRequest = 1,
    /// The worker does not (yet) know this dataset: try the next worker.
    #[error("unknown dataset")]
    UnknownDataset = 2,
    /// The source no longer has this version: the reader gets ESTALE.
    #[error("the source no longer has this version")]
    VersionGone = 3,
    /// The source refuses the credentials.
    #[error("the source refuses the credentials")]
    PermissionDenied = 4,
    /// The source does not answer, or answers with errors, beyond the retries.
    #[error("the source is unavailable")]
    SourceUnavailable = 5,
    /// Too many requests: try again after a pause.
    #[error("the worker is busy")]
    Busy = 6,
    /// The worker is stopping: try the next one.
    #[error("the worker is stopping")]
    Stopping = 7,
    /// A peer read found nothing held.
    #[error("not held")]
    NotHeld = 8,
    /// Anything else; logged at the worker.
    #[error("internal error")]
    Internal = 9,
}

impl FailureCode {
    fn from_wire(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::BadRequest,
            2 => Self::UnknownDataset,
            3 => Self::VersionGone,
            4 => Self::PermissionDenied,
            5 => Self::SourceUnavailable,
            6 => Self::Busy,
            7 => Self::Stopping,
            8 => Self::NotHeld,
            9 => Self::Internal,
            _ => return None,
        })
    }
}

/// What a worker sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Blocks with their checksums.
    Data {
        /// First block, from the start of the file.
        first_block: u64,
        /// One for each block.
        checksums: Vec<u32>,
        /// All bytes; the last block of a file may be short.
        bytes: Bytes,
    },
    /// The read is complete.
    End {
        /// Blocks that were held already.
        hit_blocks: u32,
        /// Blocks that were fetched.
        miss_blocks: u32,
        /// Workers, the first of the chunk's order, that are to be asked for it in turns; 1: it is nothing special.
        workers: u8,
    },
    /// The read failed.
    Failure {
        /// What the caller can do.
        code: FailureCode,
        /// For logs and people.
        message: String,
    },
    /// The worker lives (request number 0).
    Alive,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: u8,
    /// Number of the request, chosen by the client.
    pub request: u64,
    /// Bytes of body that follow.
    pub body: usize,
}

impl Header {
    /// Decodes the first [`HEADER`] bytes of a frame whose body may have `limit` bytes at most.
    pub fn decode(bytes: &[u8; HEADER], limit: usize) -> Result<Self, FrameError> {
        let mut buf = &bytes[..];
        let length = buf.get_u32_le();
        let kind = buf.get_u8();
        if buf.get_u8() != 0 || buf.get_u16_le() != 0 {
            return Err(FrameError::Field("reserved"));
        }
        let request = buf.get_u64_le();
        let body = (length as usize)
            .checked_sub(HEADER - 4)
            .filter(|body| *body <= limit)
            .ok_or(FrameError::Length(length))?;
        Ok(Self { kind, request, body })
    }

    /// Whether it is a Data frame, whose body may be read piece by piece: see [`decode_data_head`].
    pub fn is_data(&self) -> bool {
        self.kind == KIND_DATA
    }
}

/// Appends a request frame.
pub fn encode_request(out: &mut BytesMut, number: u64, request: &Request) {
    match request {
        Request::Read(read) => {
            let key = read.version.key.as_bytes();
            let path = read.path.as_bytes();
            put_header(out, KIND_READ, number, READ_FIXED + key.len() + path.len());
            out.put_slice(read.dataset.as_bytes());
            out.put_u64_le(read.epoch);
            out.put_u64_le(read.generation);
            out.put_u64_le(read.version.size);
            out.put_i64_le(read.version.mtime_ns);
            out.put_u64_le(read.range.first);
            // At most MAX_READ_BLOCKS; anything larger is refused by the decoder.
            out.put_u32_le(u32::try_from(read.range.count).unwrap_or(u32::MAX));
            out.put_u8(read.purpose as u8);
            out.put_u8(u8::from(read.verify));
            // VersionKey and DatasetPath bound their lengths below these types' limits.
            out.put_u8(key.len() as u8);
            out.put_u16_le(path.len() as u16);
            out.put_slice(key);
            out.put_slice(path);
        }
        Request::Cancel => put_header(out, KIND_CANCEL, number, 0),
    }
}

/// Decodes the body of a request.
pub fn decode_request(header: &Header, mut body: Bytes) -> Result<Request, FrameError> {
    match header.kind {
        KIND_READ => {
            if body.len() < READ_FIXED {
                return Err(FrameError::Field("length"));
            }
            let dataset = DatasetId::from_slice(&body.split_to(16)).ok_or(FrameError::Field("dataset"))?;
            let epoch = body.get_u64_le();
            let generation = body.get_u64_le();
            let size = body.get_u64_le();
            let mtime_ns = body.get_i64_le();
            let first = body.get_u64_le();
            let count = body.get_u32_le();
            let purpose = match body.get_u8() {
                0 => Purpose::Demand,
                1 => Purpose::ReadAhead,
                2 => Purpose::Load,
                3 => Purpose::Peer,
                _ => return Err(FrameError::Field("purpose")),
            };
            let verify = match body.get_u8() {
                0 => false,
                1 => true,
                _ => return Err(FrameError::Field("verify")),
            };
            let key_len = usize::from(body.get_u8());
            let path_len = usize::from(body.get_u16_le());
            if body.len() != key_len + path_len {
                return Err(FrameError::Field("length"));
            }
            let key = VersionKey::new(body.split_to(key_len)).ok_or(FrameError::Field("version key"))?;
            let path = DatasetPath::parse(body).map_err(|_| FrameError::Field("path"))?;
            let range = BlockRange { first, count: u64::from(count) };
            check_range(&range, size)?;
            Ok(Request::Read(Read {
                dataset,
                epoch,
                generation,
                path,
                version: FileVersion { size, mtime_ns, key },
                range,
                purpose,
                verify,
            }))
        }
        KIND_CANCEL if body.is_empty() => Ok(Request::Cancel),
        KIND_CANCEL => Err(FrameError::Field("length")),
        kind => Err(FrameError::Kind(kind)),
    }
}

/// A range must be non-empty, within the file, within one chunk, and of at most [`MAX_READ_BLOCKS`].
fn check_range(range: &BlockRange, size: u64) -> Result<(), FrameError> {
    const PER_CHUNK: u64 = CHUNK_SIZE / BLOCK_SIZE;
    let blocks = size.div_ceil(BLOCK_SIZE);
    let fits = range.count > 0
        && range.count <= u64::from(MAX_READ_BLOCKS)
        && range.first < blocks
        && range.count <= blocks - range.first
        && range.first / PER_CHUNK == (range.first + range.count - 1) / PER_CHUNK;
    if fits { Ok(()) } else { Err(FrameError::Field("range")) }
}

/// Appends everything of a Data frame but the bytes of its blocks, which the sender lets follow (by `sendfile`).
/// `len` is the number of those bytes.
pub fn encode_data_head(out: &mut BytesMut, number: u64, first_block: u64, checksums: &[u32], len: usize) {
    put_header(out, KIND_DATA, number, DATA_HEAD + 4 * checksums.len() + len);
    out.put_u64_le(first_block);
    out.put_u32_le(checksums.len() as u32);
    for checksum in checksums {
        out.put_u32_le(*checksum);
    }
}

/// Appends an answer frame.
pub fn encode_answer(out: &mut BytesMut, number: u64, answer: &Answer) {
    match answer {
        Answer::Data { first_block, checksums, bytes } => {
            encode_data_head(out, number, *first_block, checksums, bytes.len());
            out.put_slice(bytes);
        }
        Answer::End { hit_blocks, miss_blocks, workers } => {
            let several = *workers > 1;
            put_header(out, KIND_END, number, if several { 9 } else { 8 });
            out.put_u32_le(*hit_blocks);
            out.put_u32_le(*miss_blocks);
            if several {
                out.put_u8(*workers);
            }
        }
        Answer::Failure { code, message } => {
            let mut end = message.len().min(MAX_MESSAGE);
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            put_header(out, KIND_FAILURE, number, 4 + end);
            out.put_u16_le(*code as u16);
            out.put_u16_le(end as u16);
            out.put_slice(&message.as_bytes()[..end]);
        }
        Answer::Alive => put_header(out, KIND_ALIVE, number, 0),
    }
}

/// Decodes the body of an answer.
pub fn decode_answer(header: &Header, mut body: Bytes) -> Result<Answer, FrameError> {
    match header.kind {
        KIND_DATA => {
            let (range, _) = data_head(&body, body.len())?;
            body.advance(DATA_HEAD);
            let checksums = (0..range.count).map(|_| body.get_u32_le()).collect();
            Ok(Answer::Data { first_block: range.first, checksums, bytes: body })
        }
        KIND_END if matches!(body.len(), 8 | 9) => Ok(Answer::End {
            hit_blocks: body.get_u32_le(),
            miss_blocks: body.get_u32_le(),
            workers: if body.is_empty() { 1 } else { body.get_u8() },
        }),
        KIND_FAILURE => {
            if body.len() < 4 {
                return Err(FrameError::Field("length"));
            }
            let code = FailureCode::from_wire(body.get_u16_le()).ok_or(FrameError::Field("code"))?;
            if usize::from(body.get_u16_le()) != body.len() || body.len() > MAX_MESSAGE {
                return Err(FrameError::Field("length"));
            }
            Ok(Answer::Failure { code, message: String::from_utf8_lossy(&body).into_owned() })
        }
        KIND_ALIVE if body.is_empty() => Ok(Answer::Alive),
        KIND_END | KIND_ALIVE => Err(FrameError::Field("length")),
        kind => Err(FrameError::Kind(kind)),
    }
}

/// Decodes the first [`DATA_HEAD`] bytes of a Data frame's body: which blocks, and how many bytes they have. A checksum
/// (u32) for each block follows, then the bytes.
pub fn decode_data_head(header: &Header, head: &[u8; DATA_HEAD]) -> Result<(BlockRange, u64), FrameError> {
    match header.kind {
        KIND_DATA => data_head(head, header.body),
        kind => Err(FrameError::Kind(kind)),
    }
}

/// What a Data frame's body of `len` bytes that starts with `head` holds: blocks, and bytes after their checksums.
fn data_head(mut head: &[u8], len: usize) -> Result<(BlockRange, u64), FrameError> {
    if head.len() < DATA_HEAD || len < DATA_HEAD {
        return Err(FrameError::Field("length"));
    }
    let (first, blocks) = (head.get_u64_le(), head.get_u32_le());
    let bytes = (len - DATA_HEAD).checked_sub(4 * blocks.min(MAX_DATA_BLOCKS) as usize);
    let Some(bytes) = bytes.filter(|_| blocks > 0 && blocks <= MAX_DATA_BLOCKS) else {
        return Err(FrameError::Field("blocks"));
    };
    let (least, most) = (u64::from(blocks - 1) * BLOCK_SIZE, u64::from(blocks) * BLOCK_SIZE);
    if bytes as u64 <= least || bytes as u64 > most {
        return Err(FrameError::Field("length"));
    }
    Ok((BlockRange { first, count: u64::from(blocks) }, bytes as u64))
}

fn put_header(out: &mut BytesMut, kind: u8, request: u64, body: usize) {
    out.put_u32_le((HEADER - 4 + body) as u32);
    out.put_u8(kind);
    out.put_bytes(0, 3);
    out.put_u64_le(request);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(frame: &BytesMut, limit: usize) -> (Header, Bytes) {
        let header = Header::decode(frame[..HEADER].try_into().unwrap(), limit).unwrap();
        assert_eq!(frame.len(), HEADER + header.body);
        (header, frame.clone().freeze().slice(HEADER..))
    }

    fn read(size: u64, first: u64, count: u64) -> Read {
        Read {
            dataset: DatasetId::local("n", "d"),
            epoch: 3,
            generation: 4,
            path: DatasetPath::parse("/a/b").unwrap(),
            version: FileVersion { size, mtime_ns: -5, key: VersionKey::new("etag").unwrap() },
            range: BlockRange { first, count },
            purpose: Purpose::ReadAhead,
            verify: false,
        }
    }

    #[test]
    fn reads_round_trip() {
        for verify in [false, true] {
            let request = Request::Read(Read { verify, ..read(10 * BLOCK_SIZE + 1, 3, 8) });
            let mut out = BytesMut::new();
            encode_request(&mut out, 77, &request);
            let (header, body) = split(&out, MAX_REQUEST_BODY);
            assert_eq!(header.request, 77);
            assert_eq!(decode_request(&header, body), Ok(request));
        }
    }

    #[test]
    fn marks_other_than_the_known_are_refused() {
        let mut out = BytesMut::new();
        encode_request(&mut out, 1, &Request::Read(read(BLOCK_SIZE, 0, 1)));
        let purpose = HEADER + READ_FIXED - 5;
        for (at, field) in [(purpose, "purpose"), (purpose + 1, "verify")] {
            let mut bad = out.clone();
            bad[at] = 0x80;
            let (header, body) = split(&bad, MAX_REQUEST_BODY);
            assert_eq!(decode_request(&header, body), Err(FrameError::Field(field)));
        }
    }

    #[test]
    fn ranges_outside_the_file_or_across_chunks_are_refused() {
        let per_chunk = CHUNK_SIZE / BLOCK_SIZE;
        for (size, first, count) in [
            (0, 0, 1),
            (BLOCK_SIZE, 0, 0),
            (BLOCK_SIZE, 1, 1),
            (BLOCK_SIZE, 0, 2),
            (4 * CHUNK_SIZE, per_chunk - 1, 2),
            (4 * CHUNK_SIZE, 0, 257),
            (u64::MAX, u64::MAX, 1),
        ] {
            let mut out = BytesMut::new();
            encode_request(&mut out, 1, &Request::Read(read(size, first, count)));
            let (header, body) = split(&out, MAX_REQUEST_BODY);
            assert_eq!(decode_request(&header, body), Err(FrameError::Field("range")), "{size} {first} {count}");
        }
    }

    #[test]
    fn answers_round_trip() {
        let answers = [
            Answer::Data {
                first_block: 9,
                checksums: vec![1, 2],
                bytes: Bytes::from(vec![7; BLOCK_SIZE as usize + 1]),
            },
            Answer::End { hit_blocks: 1, miss_blocks: 2, workers: 1 },
            Answer::End { hit_blocks: 1, miss_blocks: 2, workers: 3 },
            Answer::Failure { code: FailureCode::VersionGone, message: "gone".into() },
            Answer::Alive,
        ];
        for answer in answers {
            let mut out = BytesMut::new();
            encode_answer(&mut out, 5, &answer);
            let (header, body) = split(&out, MAX_ANSWER_BODY);
            assert_eq!(decode_answer(&header, body), Ok(answer));
        }
    }

    #[test]
    fn the_head_of_a_data_frame_says_what_follows() {
        let decoded = |len| {
            let mut out = BytesMut::new();
            encode_data_head(&mut out, 5, 9, &[1, 2], len as usize);
            let header = Header::decode(out.first_chunk().unwrap(), MAX_ANSWER_BODY).unwrap();
            assert!(header.is_data());
            decode_data_head(&header, out[HEADER..].first_chunk().unwrap())
        };
        for len in [BLOCK_SIZE + 1, 2 * BLOCK_SIZE] {
            assert_eq!(decoded(len), Ok((BlockRange { first: 9, count: 2 }, len)));
        }
        for len in [0, BLOCK_SIZE, 2 * BLOCK_SIZE + 1] {
            assert_eq!(decoded(len), Err(FrameError::Field("length")));
        }
        let end = Header { kind: KIND_END, request: 5, body: DATA_HEAD };
        assert_eq!(decode_data_head(&end, &[0; DATA_HEAD]), Err(FrameError::Kind(KIND_END)));
    }

    #[test]
    fn oversized_frames_are_refused_before_their_body() {
        let mut out = BytesMut::new();
        put_header(&mut out, KIND_READ, 1, MAX_REQUEST_BODY + 1);
        let bytes: [u8; HEADER] = out[..].try_into().unwrap();
        assert!(matches!(Header::decode(&bytes, MAX_REQUEST_BODY), Err(FrameError::Length(_))));
        assert!(matches!(Header::decode(&[0; HEADER], MAX_REQUEST_BODY), Err(FrameError::Length(0))));
    }

    proptest! {
        /// No bytes make a decoder panic, and what decodes encodes to the same bytes.
        #[test]
        fn decoders_are_total(kind: u8, number: u64, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut frame = BytesMut::new();
            put_header(&mut frame, kind, number, body.len());
            frame.extend_from_slice(&body);
            let (header, body) = split(&frame, MAX_ANSWER_BODY);
            if let Ok(request) = decode_request(&header, body.clone()) {
                let mut again = BytesMut::new();
                encode_request(&mut again, number, &request);
                prop_assert_eq!(&again, &frame);
            }
            let _ = decode_answer(&header, body);
        }
    }
}
