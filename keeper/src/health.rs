//! How a volume is, for whoever asks about it: what its daemon says, or that it has none.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest reason, in bytes.
pub(crate) const MAX_REASON: usize = 64;
/// Longest message, in bytes; longer ones are cut.
pub(crate) const MAX_MESSAGE: usize = 512;
/// How long nobody may serve a volume before that counts: a take-over is no trouble.
pub(crate) const VACANT: Duration = Duration::from_secs(1);

/// The reason for which a keeper itself calls a volume inaccessible.
pub const NO_DAEMON: &str = "NoDaemon";

/// Whether a volume can be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthState {
    /// All of it.
    #[default]
    Healthy,
    /// Some of it, or with less speed or redundancy than it should.
    Degraded,
    /// None of it.
    Inaccessible,
}

/// How a volume is. The default is healthy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Whether it can be read.
    pub state: HealthState,
    /// Why it is not healthy, in CamelCase, at most 64 bytes; "" when it is.
    pub reason: String,
    /// The same for people, at most 512 bytes.
    pub message: String,
}

impl Health {
    /// Anything but healthy; what is too long is cut.
    pub fn new(state: HealthState, reason: &str, message: &str) -> Self {
        Self { state, reason: cut(reason, MAX_REASON).to_owned(), message: cut(message, MAX_MESSAGE).to_owned() }
    }

    /// Nobody has served it for so long.
    pub(crate) fn no_daemon(vacant: Duration) -> Self {
        let message = format!("no FUSE daemon has served the volume for {} s; reads wait", vacant.as_secs());
        Self::new(HealthState::Inaccessible, NO_DAEMON, &message)
    }

    /// Nobody will serve it any more.
    pub(crate) fn ended() -> Self {
        let message = "the mount has ended: nobody served it, or somebody else took it down; it must be mounted again";
        Self::new(HealthState::Inaccessible, NO_DAEMON, message)
    }
}

fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_is_cut_and_what_is_written_is_read() {
        let health = Health::new(HealthState::Degraded, "WorkersUnavailable", &"ä".repeat(MAX_MESSAGE));
        assert_eq!(health.message.len(), MAX_MESSAGE);
        let json = serde_json::to_string(&Health::no_daemon(Duration::from_secs(3))).unwrap();
        assert!(json.starts_with(r#"{"state":"Inaccessible","reason":"NoDaemon","message":""#), "{json}");
        assert_eq!(serde_json::from_str::<Health>(&json).unwrap(), Health::no_daemon(Duration::from_secs(3)));
        assert_eq!(Health::default().state, HealthState::Healthy);
    }
}
