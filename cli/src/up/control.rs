//! The socket by which other commands ask a running instance about its mounts and children.
//!
//! A connection gets one JSON document and is closed; nothing is read from it.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::layout::Layout;

const DEADLINE: Duration = Duration::from_secs(5);
/// A status of thousands of mounts stays below this.
const MAX_ANSWER: u64 = 16 << 20;

/// Answers every connection with what `status` gives.
pub async fn serve(listener: UnixListener, status: Arc<dyn Fn() -> Value + Send + Sync>, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match stream {
            Ok((mut stream, _)) => {
                let text = status().to_string();
                tokio::spawn(async move {
                    // An asker that went away has nothing to complain of.
                    let _ = timeout(DEADLINE, stream.write_all(text.as_bytes())).await;
                });
            }
            Err(error) => {
                warn!(%error, "the control socket does not accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Asks the running instance.
pub async fn ask(layout: &Layout) -> anyhow::Result<Value> {
    let socket = layout.control_socket();
    let exchange = async {
        let stream = connect(&socket).await?;
        let mut text = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut text).await?;
        anyhow::Ok(serde_json::from_slice(&text)?)
    };
    timeout(DEADLINE, exchange)
        .await
        .with_context(|| format!("no answer on {} within {DEADLINE:?}", socket.display()))?
        .with_context(|| format!("asking on {}", socket.display()))
}

/// Binds a socket, also at a path over the 108 bytes that an address holds.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    let bind = || -> std::io::Result<UnixListener> {
        let (directory, name) = open_directory(path)?;
        UnixListener::bind(short_path(&directory, &name))
    };
    bind().with_context(|| format!("binding {}", path.display()))
}

async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let (directory, name) = open_directory(path)?;
    UnixStream::connect(short_path(&directory, &name)).await
}

fn open_directory(path: &Path) -> std::io::Result<(std::fs::File, std::ffi::OsString)> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    Ok((std::fs::File::open(directory)?, name.to_owned()))
}

fn short_path(directory: &std::fs::File, name: &std::ffi::OsStr) -> std::path::PathBuf {
    use std::os::fd::AsRawFd as _;
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_deep_state_directory_is_served() {
        let base = tempfile::tempdir().unwrap();
        let deep = base.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let layout = Layout::new(Some(deep)).unwrap();
        let listener = bind(&layout.control_socket()).unwrap();
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, Arc::new(|| serde_json::json!({"a": 1})), stop.clone()));
        assert_eq!(ask(&layout).await.unwrap()["a"], 1);
        stop.cancel();
        server.await.unwrap();
    }
}
