//! The keeper: owner of FUSE mounts whose daemons may die.
//!
//! It opens `/dev/fuse`, mounts, answers the kernel's INIT itself, and keeps the descriptor and the tables in shared
//! memory that a daemon needs to go on where another one stopped. Daemons connect to its socket; one is active, the
//! others stand by. When the active one dies or stops, the keeper makes sure that it is dead and gives everything to a
//! standby: readers see a pause.
//!
//! - [`mount`]: mount(2) or `fusermount3`, INIT, read-ahead, and taking mounts down;
//! - [`tables`]: node table, open table and counters in memfds;
//! - [`keeper`]: the [`Keeper`] itself; [`daemon`]: the daemon's side of the hand-over;
//! - [`notify`]: the notifications that `fuser` does not have.
//!
//! Invariants:
//! - two daemons never read one descriptor: a successor gets it when its predecessor is dead (or provably unable to
//!   run: killed, and in uninterruptible sleep);
//! - nothing here ever stats, opens or walks into a mount, and every system call that can hang has a thread of its own
//!   and a deadline;
//! - a mount that nobody serves is aborted after a deadline: readers get an error, never an endless wait.
//!
//! The keeper may end, too. Each daemon holds everything that is needed to serve each volume, serves on without it, and
//! gives that to the next keeper ([`KeeperOptions::resume`]). What the next keeper must be sure of it has from its own
//! record, not from daemons: what is mounted where, and which processes may be serving. Only when the keeper and all daemons
//! are gone at once have the mounts ended.

mod control;
pub mod daemon;
mod deadline;
mod handover;
mod health;
pub mod keeper;
pub mod mount;
pub mod notify;
mod sys;
pub mod tables;

pub use handover::{Role, WireError};
pub use health::{Health, HealthState, NO_DAEMON};
pub use keeper::{
    DaemonStatus, Event, Keeper, KeeperError, KeeperOptions, KeeperStatus, LossCause, VolumeState, VolumeStatus,
};
pub use mount::{MountError, MountInfo, MountMode, MountSpec};
pub use notify::{notify_expire_entry, notify_resend};
