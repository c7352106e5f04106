//! System calls that may hang on a dead mount: each on a thread of its own, with a deadline.
//!
//! A thread that never comes back holds nothing but itself, but it is not nothing: past [`MAX_HANGING`] of them no more
//! are started, and whoever asks is told at once.

use std::{
    io,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

/// Threads that were given up and have not come back.
static HANGING: AtomicUsize = AtomicUsize::new(0);
/// Most of them.
const MAX_HANGING: usize = 64;
/// These threads make system calls and nothing else.
const STACK: usize = 128 << 10;

/// How many calls hang now.
pub fn hanging() -> usize {
    HANGING.load(Ordering::Relaxed)
}

/// Runs `work` on its own thread and waits at most `timeout`. A result that comes later is given to `late`, on that
/// thread, which undoes what nobody waits for any more.
pub fn run<T: Send + 'static>(
    what: &'static str,
    timeout: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
    late: impl FnOnce(T) + Send + 'static,
) -> io::Result<T> {
    if hanging() >= MAX_HANGING {
        return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{what}: {MAX_HANGING} calls hang already")));
    }
    // A rendezvous: a result is either taken by the caller or known not to be.
    let (sender, receiver) = mpsc::sync_channel::<io::Result<T>>(0);
    std::thread::Builder::new().name(format!("csi-{what}")).stack_size(STACK).spawn(move || {
        if let Err(mpsc::SendError(result)) = sender.send(work()) {
            HANGING.fetch_sub(1, Ordering::Relaxed);
            if let Ok(value) = result {
                late(value);
            }
        }
    })?;
    match receiver.recv_timeout(timeout) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            // Before the receiver goes, without which the thread would not come to count itself out.
            HANGING.fetch_add(1, Ordering::Relaxed);
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("{what} did not return within {timeout:?}")))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(io::Error::other(format!("{what} panicked"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_time_late_and_failed() {
        let patience = Duration::from_secs(5);
        assert_eq!(run("a", patience, || Ok(1), |_| ()).unwrap(), 1);
        let error = run("b", patience, || Err::<(), _>(io::Error::other("x")), |()| ()).unwrap_err();
        assert_eq!(error.to_string(), "x");

        let (release, wait) = mpsc::channel::<()>();
        let (sender, undone) = mpsc::channel();
        let slow = move || {
            let _ = wait.recv();
            Ok(7)
        };
        let error = run("c", Duration::from_millis(1), slow, move |value| sender.send(value).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(hanging(), 1);
        release.send(()).unwrap();
        assert_eq!(undone.recv_timeout(patience).unwrap(), 7);
        assert_eq!(hanging(), 0);
    }
}
