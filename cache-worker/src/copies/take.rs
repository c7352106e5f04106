//! Taking copies that another worker offers.

use std::sync::Arc;

use forebay_protocol::{
    BLOCK_SIZE, ChunkKey,
    worker::{ChunkToCopy, CopyOutcome, CopyState},
};
use futures::{StreamExt, stream};
use tonic::Status;

use crate::{
    dataset::Dataset,
    fill::{Class, FillError, Wanted},
    grpc::file_version,
    load::Found,
    worker::Worker,
};

/// Chunks of one message.
const MOST: usize = 1024;
/// Chunks of one message that are taken at once.
const AT_ONCE: usize = 8;

/// Takes copies from the worker `from`; the outcomes, in order.
pub(crate) async fn take(
    worker: &Arc<Worker>,
    dataset: &Arc<Dataset>,
    from: &str,
    chunks: Vec<ChunkToCopy>,
) -> Result<Vec<CopyOutcome>, Status> {
    if chunks.len() > MOST {
        return Err(Status::invalid_argument(format!("at most {MOST} chunks in one message")));
    }
    let table = worker.members.table();
    let holder = table.members.iter().find(|member| member.name == from);
    let holder = holder.ok_or_else(|| Status::unavailable(format!("no worker {from} is known here yet")))?;
    let class = Class::Copy(Arc::new(holder.clone()));
    let chunks: Vec<(Found, u32, bool)> = chunks
        .into_iter()
        .map(|ChunkToCopy { file, chunk, pin }| {
            let file = file.ok_or_else(|| Status::invalid_argument("no file is named"))?;
            Ok((file_version(file)?, chunk, pin))
        })
        .collect::<Result<_, Status>>()?;
    let taking = chunks.into_iter().map(|(file, index, pin)| take_one(worker, dataset, &class, file, index, pin));
    Ok(stream::iter(taking).buffered(AT_ONCE).collect().await)
}

async fn take_one(
    worker: &Arc<Worker>,
    dataset: &Arc<Dataset>,
    class: &Class,
    file: Found,
    index: u32,
    pin: bool,
) -> CopyOutcome {
    let Found { path, version } = file;
    let key = ChunkKey { file: dataset.identity(&path, &version), index };
    if worker.store.holds(key).is_some_and(|held| held.whole && (held.pinned || !pin)) {
        return held();
    }
    let bytes = key.len(version.size);
    if bytes == 0 {
        return failed("the file has no such chunk".to_owned());
    }
    // A chunk has 1,024 blocks at most.
    let blocks = 0..bytes.div_ceil(BLOCK_SIZE) as u32;
    let wanted = Wanted { dataset: dataset.clone(), path, version, key, blocks };
    match worker.engine.load(wanted, pin, class.clone()).await {
        Ok(0) => held(),
        Ok(_) => no_room("it was not admitted (quota, watermark or disk)".to_owned()),
        Err(FillError::NotPinned(why)) => no_room(why.to_string()),
        Err(error) => failed(error.to_string()),
    }
}

fn held() -> CopyOutcome {
    CopyOutcome { state: CopyState::Held.into(), reason: String::new() }
}

fn no_room(reason: String) -> CopyOutcome {
    CopyOutcome { state: CopyState::NoRoom.into(), reason }
}

fn failed(reason: String) -> CopyOutcome {
    CopyOutcome { state: CopyState::Failed.into(), reason }
}
