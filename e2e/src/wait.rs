//! Waiting for what is to come, with a deadline that names it.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::bail;

/// How often is looked.
const LOOK: Duration = Duration::from_millis(200);

/// Waits until `look` gives something. An error of `look` is what it was last seen to be, and ends nothing.
pub fn eventually<T>(
    what: &str,
    seconds: u64,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let seen = match look() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > deadline {
            match seen {
                Some(error) => return Err(error.context(format!("not within {seconds} s: {what}"))),
                None => bail!("not within {seconds} s: {what}"),
            }
        }
        sleep(LOOK);
    }
}

/// As [`eventually`], for what is or is not.
pub fn until(what: &str, seconds: u64, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    eventually(what, seconds, || Ok(holds()?.then_some(())))
}

/// Checks for `seconds` that something stays the case.
pub fn stays(what: &str, seconds: u64, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        if !holds()? {
            bail!("no longer the case: {what}");
        }
        sleep(LOOK);
    }
    Ok(())
}
