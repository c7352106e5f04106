//! One connection of a daemon.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::volume::Means;
use super::{HELLO, Volume};
use crate::daemon::HEARTBEAT;
use crate::handover::{Role, ToDaemon, socket};
use crate::keeper::{DaemonStatus, KeeperOptions};
use crate::sys;

/// Messages that a daemon has not read: an attach and a prepare for each of 2,048 volumes. One that is further behind
/// counts as silent.
const MAX_OUTBOX: usize = 4096;

/// One and a half heartbeats.
const SUSPECT: Duration = Duration::from_millis(HEARTBEAT.as_millis() as u64 * 3 / 2);

pub(super) struct Connection {
    pub(super) socket: OwnedFd,
    /// The process that connected, whatever its number comes to mean.
    pub(super) pidfd: OwnedFd,
    pub(super) pid: i32,
    uid: u32,
    /// What it calls itself, once it has said hello.
    pub(super) hello: Option<String>,
    /// Volumes that it announced and has not given back yet.
    pub(super) to_come: u64,
    /// Volumes whose descriptors it holds.
    pub(super) holds: BTreeSet<String>,
    /// It holds volumes that this keeper knows nothing of.
    pub(super) unclaimed: bool,
    /// It would like to exit.
    pub(super) leaving: bool,
    /// It was told that it may.
    pub(super) let_go: bool,
    pub(super) heard: Instant,
    /// Packets, and the volume whose descriptors go along.
    outbox: VecDeque<(Vec<u8>, Option<String>)>,
    overflow: bool,
}

impl Connection {
    /// `None` when its user is not allowed.
    pub(super) fn new(socket: OwnedFd, allowed: &[u32]) -> io::Result<Option<Self>> {
        let peer = rustix::net::sockopt::socket_peercred(&socket)?;
        let uid = peer.uid.as_raw();
        if uid != rustix::process::geteuid().as_raw() && !allowed.contains(&uid) {
            tracing::warn!(uid, pid = peer.pid.as_raw_nonzero().get(), "a daemon's user is not allowed");
            return Ok(None);
        }
        let pidfd = sys::peer_pidfd(&socket)?;
        let pid = peer.pid.as_raw_nonzero().get();
        Ok(Some(Self {
            socket,
            pidfd,
            pid,
            uid,
            hello: None,
            to_come: 0,
            holds: BTreeSet::new(),
            unclaimed: false,
            leaving: false,
            let_go: false,
            heard: Instant::now(),
            outbox: VecDeque::new(),
            overflow: false,
        }))
    }

    /// Whether it has been silent for so long that it may be dying.
    pub(super) fn is_suspect(&self) -> bool {
        self.hello.is_some() && self.heard.elapsed() >= SUSPECT
    }

    /// When its silence is too long.
    pub(super) fn deadline(&self, options: &KeeperOptions) -> Instant {
        match (self.overflow, &self.hello) {
            (true, _) => self.heard,
            (false, Some(_)) => self.heard + options.heartbeat_timeout,
            (false, None) => self.heard + HELLO,
        }
    }

    /// Whether it has said all that it begins with, and so is a daemon that can be asked to serve.
    pub(super) fn settled(&self) -> bool {
        self.hello.is_some() && self.to_come == 0
    }

    /// Whether it has not read what was sent to it.
    pub(super) fn backlogged(&self) -> bool {
        self.overflow
    }

    pub(super) fn push(&mut self, message: &ToDaemon, fds_of: Option<String>) {
        if self.outbox.len() < MAX_OUTBOX {
            self.outbox.push_back((message.encode(), fds_of));
        } else {
            self.overflow = true;
        }
    }

    pub(super) fn wants_to_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Sends what the socket takes. Descriptors of a volume that is gone meanwhile are not sent, nor is their message.
    pub(super) fn flush(&mut self, volumes: &BTreeMap<String, Volume>) -> io::Result<()> {
        while let Some((packet, fds_of)) = self.outbox.front() {
            match fds_of.as_ref().map(|name| volumes.get(name)) {
                None => socket::send(&self.socket, packet, &[])?,
                Some(Some(Volume { means: Some(Means { fuse, nodes, opens, counters, .. }), .. })) => {
                    socket::send(&self.socket, packet, &[fuse.as_fd(), nodes.fd(), opens.fd(), counters.fd()])?;
                }
                Some(_) => {}
            }
            self.outbox.pop_front();
        }
        Ok(())
    }

    /// `None` before hello.
    pub(super) fn status(&self, role: Role) -> Option<DaemonStatus> {
        let name = self.hello.clone()?;
        let silent_millis = self.heard.elapsed().as_millis() as u64; // Bounded by the heartbeat timeout.
        Some(DaemonStatus { pid: self.pid, uid: self.uid, name, role, silent_millis })
    }
}
