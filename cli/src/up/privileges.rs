//! Giving up privileges in a child, before any thread exists.
//!
//! A child of `forebay up` begins as what started it, changes to the unprivileged user, drops every capability for good,
//! and ties its life to its parent's. The order matters: the kernel forgets the parent-death signal when credentials
//! change, so it is set last, and then checked against a parent that died in between.

use std::{fmt, fs, str::FromStr};

use anyhow::{Context, bail};
use rustix::{
    process::{Gid, Pid, Signal, Uid},
    thread::CapabilitySet,
};

/// The kernel overflow ids, `nobody` everywhere.
const NOBODY: u32 = 65534;

/// Whom workers and daemons run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunAs {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl RunAs {
    /// The user who called `sudo`, else nobody.
    pub fn default_for_root() -> Self {
        let sudo = |name| std::env::var(name).ok().and_then(|id| id.parse().ok()).filter(|id| *id != 0);
        match (sudo("SUDO_UID"), sudo("SUDO_GID")) {
            (Some(uid), Some(gid)) => Self { uid, gid },
            _ => Self { uid: NOBODY, gid: NOBODY },
        }
    }
}

impl fmt::Display for RunAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

impl FromStr for RunAs {
    type Err = anyhow::Error;

    /// `UID:GID`, or a name of /etc/passwd.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        if let Some((uid, gid)) = text.split_once(':') {
            let number = |id: &str| id.parse().with_context(|| format!("'{id}' is no numeric id"));
            return Self { uid: number(uid)?, gid: number(gid)? }.checked();
        }
        let passwd = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
        for line in passwd.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [name, _, uid, gid, ..] = fields[..]
                && name == text
            {
                return Self { uid: uid.parse()?, gid: gid.parse()? }.checked();
            }
        }
        bail!("no user '{text}' in /etc/passwd; give UID:GID")
    }
}

impl RunAs {
    fn checked(self) -> anyhow::Result<Self> {
        if self.uid == 0 || self.gid == 0 {
            bail!("workers and daemons do not run as root; name an unprivileged user");
        }
        Ok(self)
    }
}

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Becomes `run_as` (if given) without capabilities, and dies with the process `parent`.
///
/// Must be called before any thread is started: credentials are per thread.
pub fn become_child(run_as: Option<RunAs>, parent: u32) -> anyhow::Result<()> {
    if let Some(run_as) = run_as {
        let (uid, gid) = (Uid::from_raw(run_as.uid), Gid::from_raw(run_as.gid));
        for capability in CapabilitySet::all().iter() {
            // A capability that this kernel does not know cannot be held either.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
        rustix::thread::set_thread_groups(&[]).context("dropping supplementary groups")?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).context("setting the group")?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).context("setting the user")?;
    }
    rustix::thread::set_no_new_privs(true).context("setting no_new_privs")?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("tying this process to its parent")?;
    if rustix::process::getppid().map(Pid::as_raw_pid) != i32::try_from(parent).ok() {
        bail!("the process that started this one has ended");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_and_root_is_refused() {
        assert_eq!("12:34".parse::<RunAs>().unwrap(), RunAs { uid: 12, gid: 34 });
        assert!("0:0".parse::<RunAs>().is_err());
        assert!("root".parse::<RunAs>().is_err());
        assert!("no such user".parse::<RunAs>().unwrap_err().to_string().contains("UID:GID"));
    }
}
