//! How every TCP connection begins: version, purpose, and mutual proof of the runtime's key.
//!
//! ```text
//! ClientHello = magic "FBAY", version_min u16, version_max u16, purpose u8, reserved [3] = 0, nonce [32]   44 bytes
//! ServerHello = magic "FBAY", version u16, reserved [2] = 0, nonce [32]                                    40 bytes
//! ClientProof = HMAC-SHA256(key, "forebay client" ‖ ClientHello ‖ ServerHello)                             32 bytes
//! ServerProof = status u8, HMAC-SHA256(key, "forebay server" ‖ ClientHello ‖ ServerHello)                  33 bytes
//! ```
//!
//! Messages have fixed sizes, so garbage is refused after at most 44 bytes. Both nonces are in both proofs: nothing can
//! be replayed. The proofs say who connects; the bytes that follow are in clear and not protected.

mod key;

use std::{io, time::Duration};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use key::{KeyFileError, RuntimeKey};

/// The one version that exists.
pub const VERSION: u16 = 1;
/// How long either side waits for the whole handshake.
pub const DEADLINE: Duration = Duration::from_secs(3);

const MAGIC: [u8; 4] = *b"FBAY";
const ACCEPTED: u8 = 1;
const REFUSED: u8 = 2;

impl RuntimeKey {
    fn proof(&self, label: &[u8], client_hello: &[u8], server_hello: &[u8]) -> [u8; 32] {
        // HMAC takes keys of any length, so a 32-byte key is never refused.
        #[allow(clippy::expect_used)]
        let mut mac =
            <Hmac<Sha256> as KeyInit>::new_from_slice(self.expose()).expect("any key length is valid for HMAC");
        mac.update(label);
        mac.update(client_hello);
        mac.update(server_hello);
        mac.finalize().into_bytes().into()
    }
}

/// What the connection will carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ConnectionPurpose {
    /// Frames of [`crate::frame`].
    Data = 1,
    /// gRPC.
    Control = 2,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The stream broke.
    #[error("connection lost during the handshake")]
    Io(#[from] io::Error),
    /// It took longer than [`DEADLINE`].
    #[error("no handshake within {DEADLINE:?}")]
    Deadline,
    /// The peer speaks something else.
    #[error("the peer does not speak this protocol")]
    Protocol,
    /// The peer speaks other versions.
    #[error("the peer speaks protocol versions {min} to {max}, this side {VERSION}")]
    Version {
        /// Its lowest.
        min: u16,
        /// Its highest.
        max: u16,
    },
    /// The peer has another key: it belongs to another runtime, or to nobody.
    #[error("the peer does not hold this runtime's key")]
    Unauthenticated,
}

/// The client's side; afterwards the stream carries what `purpose` says.
pub async fn connect<S>(stream: &mut S, key: &RuntimeKey, purpose: ConnectionPurpose) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::time::timeout(DEADLINE, connect_inner(stream, key, purpose)).await.map_err(|_| HandshakeError::Deadline)?
}

async fn connect_inner<S>(stream: &mut S, key: &RuntimeKey, purpose: ConnectionPurpose) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut hello = [0u8; 44];
    hello[..4].copy_from_slice(&MAGIC);
    hello[4..6].copy_from_slice(&VERSION.to_le_bytes());
    hello[6..8].copy_from_slice(&VERSION.to_le_bytes());
    hello[8] = purpose as u8;
    hello[12..].copy_from_slice(&rand::random::<[u8; 32]>());
    stream.write_all(&hello).await?;

    let mut answer = [0u8; 40];
    stream.read_exact(&mut answer).await?;
    if answer[..4] != MAGIC || answer[6..8] != [0, 0] {
        return Err(HandshakeError::Protocol);
    }
    let version = u16::from_le_bytes([answer[4], answer[5]]);
    if version != VERSION {
        return Err(HandshakeError::Version { min: version, max: version });
    }
    stream.write_all(&key.proof(b"forebay client", &hello, &answer)).await?;

    let mut proof = [0u8; 33];
    stream.read_exact(&mut proof).await?;
    let expected = key.proof(b"forebay server", &hello, &answer);
    match proof[0] {
        ACCEPTED if bool::from(proof[1..].ct_eq(&expected)) => Ok(()),
        ACCEPTED | REFUSED => Err(HandshakeError::Unauthenticated),
        _ => Err(HandshakeError::Protocol),
    }
}

/// The server's side; gives what the client wants to do.
pub async fn accept<S>(stream: &mut S, key: &RuntimeKey) -> Result<ConnectionPurpose, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::time::timeout(DEADLINE, accept_inner(stream, key)).await.map_err(|_| HandshakeError::Deadline)?
}

async fn accept_inner<S>(stream: &mut S, key: &RuntimeKey) -> Result<ConnectionPurpose, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut hello = [0u8; 44];
    // The magic first: a peer that speaks something shorter gets its refusal at once.
    stream.read_exact(&mut hello[..4]).await?;
    if hello[..4] != MAGIC {
        return Err(HandshakeError::Protocol);
    }
    stream.read_exact(&mut hello[4..]).await?;
    let (min, max) = (u16::from_le_bytes([hello[4], hello[5]]), u16::from_le_bytes([hello[6], hello[7]]));
    let purpose = match hello[8] {
        1 => ConnectionPurpose::Data,
        2 => ConnectionPurpose::Control,
        _ => return Err(HandshakeError::Protocol),
    };
    if hello[9..12] != [0, 0, 0] {
        return Err(HandshakeError::Protocol);
    }
    let mut answer = [0u8; 40];
    answer[..4].copy_from_slice(&MAGIC);
    answer[4..6].copy_from_slice(&VERSION.to_le_bytes());
    answer[8..].copy_from_slice(&rand::random::<[u8; 32]>());
    stream.write_all(&answer).await?;
    if !(min..=max).contains(&VERSION) {
        return Err(HandshakeError::Version { min, max });
    }

    let mut proof = [0u8; 32];
    stream.read_exact(&mut proof).await?;
    let expected = key.proof(b"forebay client", &hello, &answer);
    let mut verdict = [0u8; 33];
    if bool::from(proof.ct_eq(&expected)) {
        verdict[0] = ACCEPTED;
        verdict[1..].copy_from_slice(&key.proof(b"forebay server", &hello, &answer));
        stream.write_all(&verdict).await?;
        Ok(purpose)
    } else {
        verdict[0] = REFUSED;
        stream.write_all(&verdict).await?;
        Err(HandshakeError::Unauthenticated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn equal_keys_meet() {
        let key = RuntimeKey::generate();
        let (mut a, mut b) = tokio::io::duplex(256);
        let (client, server) = tokio::join!(connect(&mut a, &key, ConnectionPurpose::Control), accept(&mut b, &key));
        client.unwrap();
        assert_eq!(server.unwrap(), ConnectionPurpose::Control);
    }

    #[tokio::test]
    async fn a_stranger_is_refused_and_learns_nothing() {
        let (mut a, mut b) = tokio::io::duplex(256);
        let (ours, theirs) = (RuntimeKey::generate(), RuntimeKey::generate());
        let (client, server) = tokio::join!(connect(&mut a, &theirs, ConnectionPurpose::Data), accept(&mut b, &ours));
        assert!(matches!(client, Err(HandshakeError::Unauthenticated)));
        assert!(matches!(server, Err(HandshakeError::Unauthenticated)));
    }

    #[tokio::test]
    async fn garbage_is_refused_without_waiting() {
        let key = RuntimeKey::generate();
        let (mut a, mut b) = tokio::io::duplex(256);
        a.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(matches!(accept(&mut b, &key).await, Err(HandshakeError::Protocol)));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_at_the_deadline() {
        let key = RuntimeKey::generate();
        let (_a, mut b) = tokio::io::duplex(256);
        assert!(matches!(accept(&mut b, &key).await, Err(HandshakeError::Deadline)));
    }
}
