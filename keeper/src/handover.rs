//! What keeper and daemon say to each other: one message per packet of a Unix SOCK_SEQPACKET socket.
//!
//! ```text
//! "FBK2" | kind u16 | fields      integers little-endian; bytes and text: length u32, then the bytes
//! ```
//!
//! Both ends are of one machine and usually of one build, but not always: the node plugin and the daemon of a cluster are
//! upgraded one after the other, so the magic is a version and unknown kinds are refused. Decoding is bounded by the
//! constants here; what does not decode closes the connection.
//!
//! A daemon outlives its keeper, so a conversation begins with what the daemon has: `Hello` says how many volumes it
//! holds, and as many `Held` follow, each with all that it was given of the volume. A keeper that knows nothing yet takes
//! them back. What configurations hold (keys, say) is in no file of the keeper for that reason.

pub(crate) mod socket;

use crate::health::{Health, HealthState, MAX_MESSAGE, MAX_REASON};

/// Whether a daemon serves or waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// It is given every volume that nobody serves.
    Active,
    /// It takes over when the active one is gone, or cannot serve a volume.
    Standby,
}

/// "FBK" and the version.
const MAGIC: [u8; 4] = *b"FBK2";
/// Longest packet: an attach message with the longest configuration. Well under the default SO_SNDBUF (208 KiB).
pub(crate) const MAX_PACKET: usize = 128 * 1024;
/// Descriptors with one message: FUSE, node table, open table, counters.
pub(crate) const MAX_FDS: usize = 4;
/// Longest name of a volume, in bytes.
pub(crate) const MAX_VOLUME: usize = 255;
/// Longest configuration of a volume, in bytes.
pub(crate) const MAX_CONFIG: usize = 96 * 1024;
/// An INIT has 104 bytes; kernels to come may add some.
const MAX_INIT: usize = 4096;
/// In place of a backing id.
const NO_BACKING: u64 = u64::MAX;
/// Longest text of an error or a name of a daemon, in bytes; longer ones are cut.
const MAX_TEXT: usize = 1024;

/// Why a packet is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not the magic of this version.
    #[error("not a hand-over message of this version")]
    Magic,
    /// A kind that this side does not know.
    #[error("unknown kind of message {0}")]
    Kind(u16),
    /// It ends too early, or goes on too long.
    #[error("message has a wrong length")]
    Length,
    /// A field is longer than its limit, or no UTF-8, or no allowed value.
    #[error("a field of the message is out of its bounds")]
    Field,
    /// Not as many descriptors as the kind of message has.
    #[error("message with a wrong number of descriptors")]
    Descriptors,
}

/// Keeper to daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToDaemon {
    Role(Role),
    /// A volume that a standby may have to serve. With four descriptors, to be held.
    Prepare {
        volume: String,
        init: Vec<u8>,
        config: Vec<u8>,
    },
    /// With four descriptors.
    Attach {
        volume: String,
        generation: u64,
        first: bool,
        init: Vec<u8>,
        config: Vec<u8>,
    },
    Detach {
        volume: String,
    },
    Stop,
    /// The keeper has everything that this daemon holds: one that is leaving may exit.
    Go,
    /// The answer to `OpenBacking`: the id, or why there is none.
    Backing {
        volume: String,
        node: u64,
        result: Result<u32, String>,
    },
}

/// Daemon to keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToKeeper {
    /// The first message. `held`: how many `Held` follow. `leaving`: as if `Leaving` followed them.
    Hello {
        name: String,
        held: u64,
        leaving: bool,
    },
    Heartbeat {
        progress: u64,
    },
    Attached {
        volume: String,
        generation: u64,
    },
    AttachFailed {
        volume: String,
        generation: u64,
        error: String,
    },
    /// A volume that it held before this connection, with the four descriptors. `generation`: of the attachment by which
    /// it is served, 0 when it is only held.
    Held {
        volume: String,
        generation: u64,
        init: Vec<u8>,
        config: Vec<u8>,
    },
    /// The descriptors of a volume came with `Prepare` and are held.
    Holding {
        volume: String,
    },
    /// It would like to exit, and goes on until `Go`.
    Leaving,
    /// How a volume that it serves is, when that changed.
    Health {
        volume: String,
        health: Health,
    },
    /// A node is to be read from a file, whose descriptor comes along. An open id of that node is given again.
    OpenBacking {
        volume: String,
        node: u64,
    },
    /// It is not any more: nothing has it open.
    CloseBacking {
        volume: String,
        node: u64,
        id: u32,
    },
}

struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: u16) -> Self {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&kind.to_le_bytes());
        Self(bytes)
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(&(bytes.len() as u32).to_le_bytes()); // Bounded far below 4 GiB by MAX_PACKET.
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&text.as_bytes()[..end])
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The kind, and the reader of its fields.
    fn new(packet: &'a [u8]) -> Result<(u16, Self), WireError> {
        let (magic, rest) = packet.split_first_chunk::<4>().ok_or(WireError::Length)?;
        if *magic != MAGIC {
            return Err(WireError::Magic);
        }
        let (kind, rest) = rest.split_first_chunk::<2>().ok_or(WireError::Length)?;
        Ok((u16::from_le_bytes(*kind), Self(rest)))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        let (value, rest) = self.0.split_first_chunk::<8>().ok_or(WireError::Length)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*value))
    }

    fn flag(&mut self) -> Result<bool, WireError> {
        match self.u64()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Field),
        }
    }

    fn bytes(&mut self, max: usize) -> Result<Vec<u8>, WireError> {
        let (len, rest) = self.0.split_first_chunk::<4>().ok_or(WireError::Length)?;
        let len = u32::from_le_bytes(*len) as usize;
        if len > max {
            return Err(WireError::Field);
        }
        let (bytes, rest) = rest.split_at_checked(len).ok_or(WireError::Length)?;
        self.0 = rest;
        Ok(bytes.to_vec())
    }

    fn text(&mut self, max: usize) -> Result<String, WireError> {
        String::from_utf8(self.bytes(max)?).map_err(|_| WireError::Field)
    }

    fn end<T>(self, message: T) -> Result<T, WireError> {
        if self.0.is_empty() { Ok(message) } else { Err(WireError::Length) }
    }
}

impl ToDaemon {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Role(role) => Writer::new(1).u64(u64::from(*role == Role::Active)).0,
            Self::Prepare { volume, init, config } => {
                Writer::new(2).bytes(volume.as_bytes()).bytes(init).bytes(config).0
            }
            Self::Attach { volume, generation, first, init, config } => {
                let writer = Writer::new(3).bytes(volume.as_bytes()).u64(*generation).u64(u64::from(*first));
                writer.bytes(init).bytes(config).0
            }
            Self::Detach { volume } => Writer::new(4).bytes(volume.as_bytes()).0,
            Self::Stop => Writer::new(5).0,
            Self::Go => Writer::new(6).0,
            Self::Backing { volume, node, result } => {
                let (id, error) = match result {
                    Ok(id) => (u64::from(*id), ""),
                    Err(error) => (NO_BACKING, error.as_str()),
                };
                Writer::new(7).bytes(volume.as_bytes()).u64(*node).u64(id).text(error).0
            }
        }
    }

    /// A message and how many descriptors must have come with it.
    pub(crate) fn decode(packet: &[u8]) -> Result<(Self, usize), WireError> {
        let (kind, mut fields) = Reader::new(packet)?;
        let message = match kind {
            1 => Self::Role(if fields.flag()? { Role::Active } else { Role::Standby }),
            2 => Self::Prepare {
                volume: fields.text(MAX_VOLUME)?,
                init: fields.bytes(MAX_INIT)?,
                config: fields.bytes(MAX_CONFIG)?,
            },
            3 => Self::Attach {
                volume: fields.text(MAX_VOLUME)?,
                generation: fields.u64()?,
                first: fields.flag()?,
                init: fields.bytes(MAX_INIT)?,
                config: fields.bytes(MAX_CONFIG)?,
            },
            4 => Self::Detach { volume: fields.text(MAX_VOLUME)? },
            5 => Self::Stop,
            6 => Self::Go,
            7 => {
                let (volume, node) = (fields.text(MAX_VOLUME)?, fields.u64()?);
                let (id, error) = (fields.u64()?, fields.text(MAX_TEXT)?);
                let result = match u32::try_from(id) {
                    Ok(id) if error.is_empty() => Ok(id),
                    Err(_) if id == NO_BACKING => Err(error),
                    _ => return Err(WireError::Field),
                };
                Self::Backing { volume, node, result }
            }
            kind => return Err(WireError::Kind(kind)),
        };
        let fds = if matches!(kind, 2 | 3) { MAX_FDS } else { 0 };
        Ok((fields.end(message)?, fds))
    }
}

impl ToKeeper {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { name, held, leaving } => Writer::new(16).text(name).u64(*held).u64(u64::from(*leaving)).0,
            Self::Heartbeat { progress } => Writer::new(17).u64(*progress).0,
            Self::Attached { volume, generation } => Writer::new(18).bytes(volume.as_bytes()).u64(*generation).0,
            Self::AttachFailed { volume, generation, error } => {
                Writer::new(19).bytes(volume.as_bytes()).u64(*generation).text(error).0
            }
            Self::Held { volume, generation, init, config } => {
                Writer::new(20).bytes(volume.as_bytes()).u64(*generation).bytes(init).bytes(config).0
            }
            Self::Holding { volume } => Writer::new(21).bytes(volume.as_bytes()).0,
            Self::Leaving => Writer::new(22).0,
            Self::Health { volume, health: Health { state, reason, message } } => {
                let writer = Writer::new(32).bytes(volume.as_bytes()).u64(state_number(*state));
                writer.bytes(reason.as_bytes()).bytes(message.as_bytes()).0
            }
            Self::OpenBacking { volume, node } => Writer::new(23).bytes(volume.as_bytes()).u64(*node).0,
            Self::CloseBacking { volume, node, id } => {
                Writer::new(24).bytes(volume.as_bytes()).u64(*node).u64(u64::from(*id)).0
            }
        }
    }

    /// A message and how many descriptors must have come with it.
    pub(crate) fn decode(packet: &[u8]) -> Result<(Self, usize), WireError> {
        let (kind, mut fields) = Reader::new(packet)?;
        let message = match kind {
            16 => Self::Hello { name: fields.text(MAX_TEXT)?, held: fields.u64()?, leaving: fields.flag()? },
            17 => Self::Heartbeat { progress: fields.u64()? },
            18 => Self::Attached { volume: fields.text(MAX_VOLUME)?, generation: fields.u64()? },
            19 => Self::AttachFailed {
                volume: fields.text(MAX_VOLUME)?,
                generation: fields.u64()?,
                error: fields.text(MAX_TEXT)?,
            },
            20 => Self::Held {
                volume: fields.text(MAX_VOLUME)?,
                generation: fields.u64()?,
                init: fields.bytes(MAX_INIT)?,
                config: fields.bytes(MAX_CONFIG)?,
            },
            21 => Self::Holding { volume: fields.text(MAX_VOLUME)? },
            22 => Self::Leaving,
            23 => Self::OpenBacking { volume: fields.text(MAX_VOLUME)?, node: fields.u64()? },
            24 => Self::CloseBacking {
                volume: fields.text(MAX_VOLUME)?,
                node: fields.u64()?,
                id: u32::try_from(fields.u64()?).map_err(|_| WireError::Field)?,
            },
            32 => Self::Health {
                volume: fields.text(MAX_VOLUME)?,
                health: Health {
                    state: state_of(fields.u64()?)?,
                    reason: fields.text(MAX_REASON)?,
                    message: fields.text(MAX_MESSAGE)?,
                },
            },
            kind => return Err(WireError::Kind(kind)),
        };
        let fds = match kind {
            20 => MAX_FDS,
            23 => 1,
            _ => 0,
        };
        Ok((fields.end(message)?, fds))
    }
}

fn state_number(state: HealthState) -> u64 {
    match state {
        HealthState::Healthy => 0,
        HealthState::Degraded => 1,
        HealthState::Inaccessible => 2,
    }
}

fn state_of(number: u64) -> Result<HealthState, WireError> {
    match number {
        0 => Ok(HealthState::Healthy),
        1 => Ok(HealthState::Degraded),
        2 => Ok(HealthState::Inaccessible),
        _ => Err(WireError::Field),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_message_comes_back() {
        let volume = "default/a".to_owned();
        for message in [
            ToDaemon::Role(Role::Active),
            ToDaemon::Role(Role::Standby),
            ToDaemon::Prepare { volume: volume.clone(), init: vec![7; 104], config: b"{}".to_vec() },
            ToDaemon::Attach {
                volume: volume.clone(),
                generation: 3,
                first: true,
                init: vec![7; 104],
                config: vec![1; MAX_CONFIG],
            },
            ToDaemon::Detach { volume: volume.clone() },
            ToDaemon::Stop,
            ToDaemon::Go,
            ToDaemon::Backing { volume: volume.clone(), node: 9, result: Ok(3) },
            ToDaemon::Backing { volume: volume.clone(), node: 9, result: Err("no".to_owned()) },
        ] {
            let bytes = message.encode();
            assert!(bytes.len() <= MAX_PACKET);
            assert_eq!(ToDaemon::decode(&bytes).unwrap().0, message);
            for cut in 0..bytes.len().min(200) {
                assert!(ToDaemon::decode(&bytes[..cut]).is_err());
            }
        }
        for message in [
            ToKeeper::Hello { name: "x".to_owned(), held: 2, leaving: true },
            ToKeeper::Heartbeat { progress: u64::MAX },
            ToKeeper::Attached { volume: volume.clone(), generation: 1 },
            ToKeeper::AttachFailed { volume: volume.clone(), generation: 1, error: "no".to_owned() },
            ToKeeper::Held { volume: volume.clone(), generation: 7, init: vec![7; 104], config: vec![1; 1000] },
            ToKeeper::Holding { volume: volume.clone() },
            ToKeeper::Leaving,
            ToKeeper::OpenBacking { volume: volume.clone(), node: 9 },
            ToKeeper::CloseBacking { volume: volume.clone(), node: 9, id: 3 },
            ToKeeper::Health { volume: volume.clone(), health: Health::default() },
            ToKeeper::Health { volume: volume.clone(), health: Health::new(HealthState::Degraded, "Some", "text") },
            ToKeeper::Health { volume, health: Health::new(HealthState::Inaccessible, "NoWorker", "") },
        ] {
            let mut bytes = message.encode();
            assert_eq!(ToKeeper::decode(&bytes).unwrap().0, message);
            bytes.push(0);
            assert_eq!(ToKeeper::decode(&bytes), Err(WireError::Length));
        }
    }

    #[test]
    fn the_format_changes_only_with_its_version() {
        assert_eq!(ToKeeper::Heartbeat { progress: 258 }.encode(), b"FBK2\x11\0\x02\x01\0\0\0\0\0\0");
        assert_eq!(ToDaemon::Detach { volume: "v".to_owned() }.encode(), b"FBK2\x04\0\x01\0\0\0v");
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let message = ToKeeper::Hello { name: "ä".repeat(MAX_TEXT), held: 0, leaving: false };
        let (ToKeeper::Hello { name, .. }, 0) = ToKeeper::decode(&message.encode()).unwrap() else { panic!() };
        assert_eq!(name.len(), MAX_TEXT);
    }

    proptest! {
        #[test]
        fn garbage_is_refused(kind in 0u16..40, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&body);
            // Whatever decodes, encodes to the same bytes: there is one form of each message.
            if let Ok((message, _)) = ToDaemon::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes.clone());
            }
            if let Ok((message, _)) = ToKeeper::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
            let _ = ToDaemon::decode(&body);
            let _ = ToKeeper::decode(&body);
        }
    }
}
