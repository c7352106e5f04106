//! Errors as people read them.

use std::error::Error;

/// An error and its causes in one line, each once: for a log, a status or an event.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = message(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let told = message(cause);
        // Many errors repeat their cause, and the transport of gRPC says no more than that it is one.
        if !text.contains(&told) && told != "transport error" {
            text.push_str(": ");
            text.push_str(&told);
        }
        source = cause.source();
    }
    text
}

/// What a gRPC status displays besides its message is for programmers.
fn message(error: &(dyn Error + 'static)) -> String {
    match error.downcast_ref::<tonic::Status>() {
        Some(status) if !status.message().is_empty() => status.message().to_owned(),
        Some(status) => status.code().description().to_owned(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Outer(&'static str, #[source] io::Error);

    #[test]
    fn causes_are_told_once() {
        let cause = || io::Error::from_raw_os_error(1);
        assert_eq!(
            chain(&Outer("cannot open /dev/fuse", cause())),
            "cannot open /dev/fuse: Operation not permitted (os error 1)"
        );
        assert_eq!(
            chain(&Outer("no: Operation not permitted (os error 1)", cause())),
            "no: Operation not permitted (os error 1)"
        );
    }

    #[test]
    fn a_status_is_its_message() {
        assert_eq!(chain(&tonic::Status::unavailable("connect to w:1 failed")), "connect to w:1 failed");
        assert_eq!(chain(&tonic::Status::not_found("")), tonic::Code::NotFound.description());
    }
}
