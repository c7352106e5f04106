//! Connections of the kubelet's plugin watcher, made acceptable to our HTTP/2 server.
//!
//! It dials the registration socket by its path, and grpc-go makes `:authority` of that (`%2Fvar%2Flib...`), which is none
//! (RFC 3986, 3.2): h2 answers PROTOCOL_ERROR before any service sees the request
//! (<https://github.com/kubernetes/kubernetes/issues/109081>). The driver's own socket needs none of this: there the
//! kubelet says `localhost`. So this stands between the registration socket and the server, and says `localhost`, too.
//!
//! Header blocks (RFC 7541) are decoded and written again without compression, so the server's table stays empty; all
//! other frames (RFC 9113) go through as they are. What breaks a bound ends the connection.

use std::io;

use loona_hpack::Decoder;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, copy, duplex, split},
    net::UnixStream,
};
use tracing::debug;

/// Length of what a client says first, `PRI * HTTP/2.0...`.
const PREFACE: usize = 24;
/// Largest frame that a client may send to a server that does not raise the limit, and the largest block of headers here.
const MAX_FRAME: usize = 16_384;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Bytes between this and the server.
const BUFFER: usize = 64 * 1024;

/// The connection as the server is to see it.
pub fn mended(connection: UnixStream) -> DuplexStream {
    let (ours, servers) = duplex(BUFFER);
    tokio::spawn(async move {
        let (mut from_client, mut to_client) = connection.into_split();
        let (mut from_server, mut to_server) = split(ours);
        let ended = tokio::select! {
            ended = requests(&mut from_client, &mut to_server) => ended,
            ended = copy(&mut from_server, &mut to_client) => ended.map(drop),
        };
        if let Err(error) = ended {
            debug!(%error, "a connection of the plugin watcher ended");
        }
    });
    servers
}

/// One frame.
struct Frame {
    kind: u8,
    flags: u8,
    stream: [u8; 4],
    payload: Vec<u8>,
}

async fn requests(client: &mut (impl AsyncRead + Unpin), server: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut preface = [0; PREFACE];
    client.read_exact(&mut preface).await?;
    server.write_all(&preface).await?;
    let mut decoder = Decoder::new();
    loop {
        let mut frame = match receive(client).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return server.shutdown().await,
            frame => frame?,
        };
        if frame.kind == HEADERS {
            let mut block = fragment(&frame)?.to_vec();
            let mut complete = frame.flags & END_HEADERS != 0;
            while !complete {
                let more = receive(client).await?;
                if more.kind != CONTINUATION || more.stream != frame.stream {
                    return Err(invalid("a block of headers is interrupted"));
                }
                complete = more.flags & END_HEADERS != 0;
                block.extend_from_slice(&more.payload);
                bounded(block.len())?;
            }
            frame.payload = rewrite(&mut decoder, &block)?;
            frame.flags = frame.flags & END_STREAM | END_HEADERS;
            bounded(frame.payload.len())?;
        }
        send(server, &frame).await?;
    }
}

async fn receive(client: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    client.read_exact(&mut head).await?;
    let [a, b, c, kind, flags, stream @ ..] = head;
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    bounded(length)?;
    let mut payload = vec![0; length];
    client.read_exact(&mut payload).await?;
    Ok(Frame { kind, flags, stream, payload })
}

async fn send(server: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let Frame { kind, flags, stream, payload } = frame;
    // Bounded by MAX_FRAME, so three bytes hold it.
    let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
    let mut bytes = vec![a, b, c, *kind, *flags];
    bytes.extend_from_slice(stream);
    bytes.extend_from_slice(payload);
    server.write_all(&bytes).await
}

/// The part of a block that a HEADERS frame holds: without padding and priority.
fn fragment(frame: &Frame) -> io::Result<&[u8]> {
    let mut rest = frame.payload.as_slice();
    let mut padding = 0;
    if frame.flags & PADDED != 0 {
        let (first, after) = rest.split_first().ok_or_else(|| invalid("no padding"))?;
        (padding, rest) = (usize::from(*first), after);
    }
    if frame.flags & PRIORITY != 0 {
        rest = rest.get(5..).ok_or_else(|| invalid("no priority"))?;
    }
    let length = rest.len().checked_sub(padding).ok_or_else(|| invalid("more padding than payload"))?;
    Ok(&rest[..length])
}

fn rewrite(decoder: &mut Decoder<'_>, block: &[u8]) -> io::Result<Vec<u8>> {
    let headers = decoder.decode(block).map_err(|error| invalid(format!("{error:?}")))?;
    let mut out = Vec::with_capacity(block.len() * 2);
    for (name, value) in headers {
        let value = if name == b":authority" { b"localhost".to_vec() } else { value };
        // A literal that is never indexed, with a literal name; neither is Huffman-coded (RFC 7541, 6.2.3).
        out.push(0x10);
        text(&mut out, &name);
        text(&mut out, &value);
    }
    Ok(out)
}

/// Length as an integer with a prefix of 7 bits (RFC 7541, 5.1), then the bytes.
fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    match bytes.len().checked_sub(127) {
        None => out.push(bytes.len() as u8), // Below 127.
        Some(mut rest) => {
            out.push(127);
            while rest >= 128 {
                out.push((rest % 128) as u8 | 128); // The lower seven bits.
                rest /= 128;
            }
            out.push(rest as u8); // Below 128.
        }
    }
    out.extend_from_slice(bytes);
}

fn bounded(length: usize) -> io::Result<()> {
    if length <= MAX_FRAME { Ok(()) } else { Err(invalid("longer than a frame may be")) }
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use loona_hpack::Encoder;

    use super::*;

    const SOCKET: &[u8] = b"%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fcsi.forebay.io-reg.sock";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 1]);
        bytes.extend(payload);
        bytes
    }

    async fn pass(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        requests(&mut &*bytes, &mut out).await?;
        Ok(out)
    }

    fn headers(long: &[u8]) -> Vec<(&'static [u8], Vec<u8>)> {
        vec![
            (b":method", b"POST".to_vec()),
            (b":path", b"/pluginregistration.Registration/GetInfo".to_vec()),
            (b":authority", SOCKET.to_vec()),
            (b"x-long", long.to_vec()),
        ]
    }

    fn encode(encoder: &mut Encoder<'_>, headers: &[(&'static [u8], Vec<u8>)]) -> Vec<u8> {
        encoder.encode(headers.iter().map(|(name, value)| (*name, value.as_slice())))
    }

    #[tokio::test]
    async fn the_authority_becomes_localhost_and_everything_else_stays() {
        let preface = [7; PREFACE];
        let (mut encoder, long) = (Encoder::new(), vec![b'x'; 1000]);
        let settings = frame(4, 0, &[1; 12]);
        // The second block refers to the table that the first one filled; it is padded, and comes in two frames.
        let first = encode(&mut encoder, &headers(&long));
        let second = encode(&mut encoder, &headers(&long));
        let (head, tail) = second.split_at(second.len() / 2);
        let padded = [&[3, 0, 0, 0, 0, 16][..], head, &[0; 3]].concat();
        let data = frame(0, END_STREAM, &[0; 5]);
        let input = [
            preface.to_vec(),
            settings.clone(),
            frame(HEADERS, END_HEADERS, &first),
            data.clone(),
            frame(HEADERS, PADDED | PRIORITY | END_STREAM, &padded),
            frame(CONTINUATION, END_HEADERS, tail),
        ]
        .concat();
        let output = pass(&input).await.unwrap();
        let rest = output.strip_prefix(&preface[..]).unwrap();
        let mut rest = rest.strip_prefix(settings.as_slice()).unwrap();
        for flags in [END_HEADERS, END_HEADERS | END_STREAM] {
            let got = receive(&mut rest).await.unwrap();
            assert_eq!((got.kind, got.flags), (HEADERS, flags));
            // A decoder without a past: nothing refers to a table.
            let decoded = Decoder::new().decode(&got.payload).unwrap();
            let wanted = headers(&long).into_iter().map(|(name, value)| {
                let value = if name == b":authority" { b"localhost".to_vec() } else { value };
                (name.to_vec(), value)
            });
            assert_eq!(decoded, wanted.collect::<Vec<_>>());
            rest = rest.strip_prefix(data.as_slice()).unwrap_or(rest);
        }
        assert!(rest.is_empty());
    }

    #[tokio::test]
    async fn garbage_ends_the_connection() {
        let preface = vec![7; PREFACE];
        for bytes in [
            frame(HEADERS, END_HEADERS, &[0xff; 40]),
            frame(HEADERS, END_HEADERS | PADDED, &[200, 1]),
            frame(HEADERS, END_HEADERS | PRIORITY, &[1]),
            frame(0, 0, &vec![0; MAX_FRAME + 1]),
            [frame(HEADERS, 0, &[]), frame(0, 0, &[])].concat(),
        ] {
            assert!(pass(&[preface.clone(), bytes].concat()).await.is_err());
        }
    }
}
