//! How a Dataset is, from what was found. Pure.

use forebay_api::{DatasetStatus, MemberState, Phase};

use crate::{
    conditions::{self, DEGRADED, Finding, PROGRESSING, READY},
    dataset::{apply::Outcome, dereference::Found},
    poll::{DatasetSeen, RuntimeSeen, ScanState},
};

/// How a Dataset is.
pub struct Assessment {
    pub phase: Phase,
    pub findings: Vec<Finding>,
}

/// Why a Dataset cannot be used, or is less than it should be.
struct Trouble {
    reason: String,
    message: String,
    /// Somebody has to do something about it; else it is waited for.
    needs_help: bool,
    /// The message is somebody else's.
    quoted: bool,
}

impl Trouble {
    fn help(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into(), needs_help: true, quoted: false }
    }

    fn wait(reason: &str, message: impl Into<String>) -> Self {
        Self { needs_help: false, ..Self::help(reason, message) }
    }

    fn finding(&self, kind: &'static str, status: bool) -> Finding {
        Finding { quoted: self.quoted, ..Finding::new(kind, status, &self.reason, &self.message) }
    }
}

/// How a Dataset is. `None`: the workers have not been asked yet, and what was said before stays.
pub fn assess(before: &DatasetStatus, found: &Found, outcome: &Outcome) -> Option<Assessment> {
    let stopped = match stopped(found, outcome) {
        Some(trouble) => Some(trouble),
        // There are workers.
        None if found.seen.is_none() && !before.conditions.is_empty() => return None,
        None => unusable(before, found, outcome),
    };
    let (all, answering) = found.seen.as_ref().map_or((0, 0), |seen| seen.serving());
    let ready = match &stopped {
        Some(trouble) => trouble.finding(READY, false),
        None => Finding::new(READY, true, "Serving", format!("{answering} of {all} workers")),
    };
    let degraded = match &stopped {
        Some(trouble) => {
            Some(trouble).filter(|trouble| trouble.needs_help).map(|trouble| trouble.finding(DEGRADED, true))
        }
        None => impaired(found).map(|trouble| trouble.finding(DEGRADED, true)),
    };
    let is_degraded = degraded.is_some();
    let phase = match &stopped {
        Some(trouble) if trouble.needs_help => Phase::Failed,
        Some(_) => Phase::Pending,
        None if is_degraded => Phase::Degraded,
        None => Phase::Ready,
    };
    let degraded = degraded.unwrap_or_else(|| Finding::new(DEGRADED, false, "Serving", "nothing is wrong"));
    Some(Assessment { phase, findings: vec![ready, progressing(before, found), degraded] })
}

/// What has to be there before there is anybody to ask.
fn stopped(found: &Found, outcome: &Outcome) -> Option<Trouble> {
    match outcome {
        Outcome::NameTaken(message) => {
            let message = format!("{message}; remove it, or give the Dataset another name");
            return Some(Trouble::help("ClaimNameTaken", message));
        }
        Outcome::Invalid(message) => return Some(Trouble::help("SpecInvalid", message)),
        Outcome::Bound | Outcome::Binding(_) | Outcome::Failed(_) => {}
    }
    let Some(runtime) = &found.runtime else {
        return Some(Trouble::wait("RuntimeNotFound", "there is no CacheRuntime of this name in the namespace"));
    };
    let name = runtime.metadata.name.as_deref().unwrap_or_default();
    if runtime.metadata.deletion_timestamp.is_some() {
        return Some(Trouble::wait("RuntimeNotReady", format!("CacheRuntime {name} is being deleted")));
    }
    let status = runtime.status.as_ref();
    let mut members = status.and_then(|status| status.table.as_ref()).into_iter().flat_map(|table| &table.members);
    if members.any(|member| member.state == MemberState::Serving) {
        return None;
    }
    let said = status.and_then(|status| conditions::get(&status.conditions, READY));
    Some(match said {
        Some(ready) if ready.status == "False" && ready.reason != "WorkersStarting" => {
            Trouble::wait("RuntimeNotReady", format!("CacheRuntime {name}: {}", ready.message))
        }
        _ => Trouble::wait("NoWorkers", format!("CacheRuntime {name} has no worker yet")),
    })
}

/// What keeps it from being used although there are workers.
fn unusable(before: &DatasetStatus, found: &Found, outcome: &Outcome) -> Option<Trouble> {
    let none = RuntimeSeen::default();
    let seen = found.seen.as_deref().unwrap_or(&none);
    let (all, answering) = seen.serving();
    if answering == 0 {
        // One that was never of use is waited for; of one that was, somebody should know.
        return Some(match before.phase {
            None | Some(Phase::Pending) => Trouble::wait("NoWorkers", "no worker answers yet"),
            _ => Trouble::help("WorkersUnavailable", format!("none of {all} workers answers")),
        });
    }
    if let Outcome::Binding(why) | Outcome::Failed(why) = outcome {
        // A claim that was bound is so while the API server does not answer.
        let bound = matches!(outcome, Outcome::Failed(_)) && before.claim_name.is_some();
        if !bound {
            return Some(Trouble::wait("VolumeNotBound", why));
        }
    }
    let nothing = DatasetSeen::default();
    let dataset = found.dataset.as_ref().unwrap_or(&nothing);
    let scan = dataset.scan.as_ref();
    let answered = before.files.is_some()
        || conditions::is_true(&before.conditions, READY)
        || scan.is_some_and(|scan| scan.directories > 0 || scan.state == ScanState::Complete);
    match &dataset.problem {
        Some(problem) if !answered => {
            return Some(Trouble { quoted: true, ..Trouble::help(&problem.reason, &problem.message) });
        }
        _ => {}
    }
    if dataset.served_by == 0 {
        return Some(Trouble::wait("RuntimeNotReady", "workers have not taken it up yet"));
    }
    (!answered).then(|| Trouble::wait("Scanning", "its sources have not answered yet"))
}

/// What makes it less than it should be while it can be used.
fn impaired(found: &Found) -> Option<Trouble> {
    let seen = found.seen.as_deref()?;
    if let Some(problem) = found.dataset.as_ref().and_then(|dataset| dataset.problem.as_ref()) {
        let message = format!("what is cached is served: {}", problem.message);
        return Some(Trouble { quoted: true, ..Trouble::help(&problem.reason, message) });
    }
    let (all, answering) = seen.serving();
    if answering < all {
        let away = seen.workers.iter().filter(|(_, worker)| worker.serving && !worker.answered);
        let away: Vec<&str> = away.take(3).map(|(name, _)| name.as_str()).collect();
        let message = format!("{answering} of {all} workers answer; away: {}", away.join(", "));
        return Some(Trouble::help("WorkersUnavailable", message));
    }
    let failed = found.dataset.as_ref().and_then(|dataset| dataset.scan.as_ref());
    if let Some(scan) = failed.filter(|scan| scan.state == ScanState::Failed) {
        let message = format!("counting its files failed: {}", scan.error);
        return Some(Trouble { quoted: true, ..Trouble::help("SourceUnreachable", message) });
    }
    let (name, worker) = seen.workers.iter().find(|(_, worker)| !worker.tier_problem.is_empty())?;
    Some(Trouble::help("RuntimeNotReady", format!("{name} keeps nothing: {}", worker.tier_problem)))
}

fn progressing(before: &DatasetStatus, found: &Found) -> Finding {
    let scan = found.dataset.as_ref().and_then(|dataset| dataset.scan.as_ref());
    let running = match scan {
        Some(scan) => scan.state == ScanState::Running,
        None => before.files.is_none(),
    };
    if running {
        Finding::new(PROGRESSING, true, "Scanning", "its files are being counted")
    } else {
        Finding::new(PROGRESSING, false, "Scanned", "its files are counted")
    }
}
