//! A file over a loopback connection: from a worker with the client library, and with nothing but sendfile(2).

use std::{
    fs::File,
    io::Read as _,
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use forebay_client::{Client, ClientConfig, EntryKind, MemoryBudget};
use forebay_protocol::{DatasetId, DatasetPath, handshake::RuntimeKey, table::WorkerTable};
use serde_json::Value;
use tokio::sync::watch;

use super::{Done, timed};
use crate::data::Large;

/// Bytes that are asked for, or sent, at once.
const PIECE: usize = 4 << 20;
/// What a FUSE daemon has.
const MEMORY: usize = 128 << 20;
const READ_AHEAD: u64 = 32 << 20;
const CONNECTIONS: usize = 2;

pub(super) fn client(state: &Path, file: &Large) -> anyhow::Result<Done> {
    let record: Value = serde_json::from_slice(&std::fs::read(state.join("up.json"))?)?;
    let path_of = |field: &str| record["runtimes"][0][field].as_str().context("the record names no runtime");
    let table: WorkerTable = serde_json::from_slice(&std::fs::read(path_of("table")?)?)?;
    let key = RuntimeKey::read(Path::new(path_of("key")?))?;
    let id: DatasetId = serde_json::from_value(record["datasets"][0]["id"].clone())?;
    let name = file.path.file_name().context("a file without a name")?.to_string_lossy().into_owned();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
        let config = ClientConfig {
            name: "bench".into(),
            key,
            memory: MemoryBudget::new(MEMORY),
            deadline: Duration::from_secs(30),
            max_read_ahead: READ_AHEAD,
            connections_per_worker: CONNECTIONS,
        };
        let (_keep, tables) = watch::channel(Arc::new(table));
        let dataset = Client::new(config, tables).dataset(id);
        let entry = dataset.lookup(&DatasetPath::root(), name.as_bytes()).await?;
        let EntryKind::File { version } = entry.kind else { bail!("{name} is a directory") };
        ensure!(version.size == file.size, "{name} has {} bytes, not {}", version.size, file.size);
        let reader = dataset.open(DatasetPath::parse(Bytes::from(format!("/{name}")))?, version);
        let (cpu, started) = (super::process_cpu(), std::time::Instant::now());
        let mut offset = 0;
        while offset < file.size {
            let parts = reader.read(offset, PIECE).await?;
            let count: usize = parts.iter().map(Bytes::len).sum();
            ensure!(count > 0, "{name} ends at {offset}");
            offset += count as u64;
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(Done { bytes: offset, files: 1, seconds, cpu: super::process_cpu() - cpu, latencies: None })
    })
}

pub(super) fn sendfile(file: &Large) -> anyhow::Result<Done> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    let open = File::open(&file.path)?;
    let mut buffer = vec![1; PIECE];
    timed(|| {
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| -> anyhow::Result<()> {
                let (connection, _) = listener.accept()?;
                let mut offset = 0;
                while offset < file.size {
                    let sent = rustix::fs::sendfile(&connection, &open, Some(&mut offset), PIECE)?;
                    ensure!(sent > 0, "{} ends at {offset}", file.path.display());
                }
                Ok(())
            });
            let mut connection = TcpStream::connect(address)?;
            let mut received = 0;
            loop {
                let count = connection.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                received += count as u64;
            }
            match sender.join() {
                Ok(sent) => sent?,
                Err(_) => bail!("the sender panicked"),
            }
            ensure!(received == file.size, "{received} bytes of {} came", file.size);
            Ok((received, 1))
        })
    })
}
