//! Calls that may hang, on a thread of their own.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

/// Runs `work` on its own thread and waits at most `timeout`. When the result comes later, `late` gets it on that
/// thread, to undo what nobody waits for any more. A thread that never comes back is leaked: it holds nothing but
/// itself.
pub(crate) fn run<T: Send + 'static>(
    what: &'static str,
    timeout: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
    late: impl FnOnce(T) + Send + 'static,
) -> io::Result<T> {
    // A rendezvous: a result is either taken by the caller or known not to be.
    let (sender, receiver) = mpsc::sync_channel::<io::Result<T>>(0);
    std::thread::Builder::new().name(format!("keeper-{what}")).spawn(move || {
        if let Err(mpsc::SendError(Ok(value))) = sender.send(work()) {
            late(value);
        }
    })?;
    match receiver.recv_timeout(timeout) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => {
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
        assert_eq!(run("a", Duration::from_secs(5), || Ok(1), |_| ()).unwrap(), 1);
        let error = run("b", Duration::from_secs(5), || Err::<(), _>(io::Error::other("x")), |()| ()).unwrap_err();
        assert_eq!(error.to_string(), "x");
        let (sender, receiver) = mpsc::channel();
        let slow = || {
            std::thread::sleep(Duration::from_millis(100));
            Ok(7)
        };
        let error = run("c", Duration::from_millis(1), slow, move |v| sender.send(v).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(5)).unwrap(), 7);
    }
}
