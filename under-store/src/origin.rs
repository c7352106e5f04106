//! What is read by HTTP, whatever it speaks besides: objects that are looked up and read under a condition.

use std::{future::Future, ops::Range, sync::Arc};

use forebay_protocol::VersionKey;
use futures::StreamExt;
use http::HeaderMap;
use object_store::client::HttpResponse;

use crate::{
    ByteStream, Item, ItemKind, StoreError,
    body::Body,
    patience::{Failure, Patience},
    version::State,
    wire::Wire,
};

/// A server with objects. Its keys are texts that it makes of the trait's keys: as its URLs or its messages need them.
pub(crate) trait Origin: Send + Sync + 'static {
    /// The way to it.
    fn wire(&self) -> &Wire;

    /// How messages name an object.
    fn name(&self, key: &str) -> String;

    /// One attempt to look up an object.
    fn look_up<'a>(
        &'a self,
        patience: &'a mut Patience,
        key: &'a str,
    ) -> impl Future<Output = Result<State, Failure>> + Send;

    /// One attempt to GET an object with these headers; any status but success is a failure, and counted.
    fn fetch<'a>(
        &'a self,
        patience: &'a mut Patience,
        key: &'a str,
        headers: HeaderMap,
    ) -> impl Future<Output = Result<HttpResponse, Failure>> + Send;
}

/// The object at `key`, which the origin calls `known_as`.
pub(crate) async fn head<O: Origin>(origin: &O, key: &[u8], known_as: &str) -> Result<Item, StoreError> {
    let state = look_up(origin, known_as).await?;
    let version = state
        .version()
        .ok_or_else(|| StoreError::Unavailable(format!("{}: neither ETag nor Last-Modified", origin.name(known_as))))?;
    let name = key.rsplit(|byte| *byte == b'/').next().unwrap_or(key);
    Ok(Item { name: name.to_vec(), kind: ItemKind::File { size: state.size, mtime_ns: state.mtime_ns(), version } })
}

/// Bytes `range` of the object at `key`, on condition that it still is `version` with `size` bytes in all.
pub(crate) async fn get<O: Origin>(
    origin: &Arc<O>,
    key: String,
    version: &VersionKey,
    size: u64,
    range: Range<u64>,
) -> Result<ByteStream, StoreError> {
    if range.start > range.end || range.end > size {
        let Range { start, end } = range;
        return Err(StoreError::Invalid(format!("range {start}..{end} of an object of {size} bytes")));
    }
    if range.is_empty() {
        // No range names no bytes (RFC 9110, section 14.1.1): the condition is all there is to ask.
        return match look_up(&**origin, &key).await?.is(version, size) {
            true => Ok(futures::stream::empty().boxed()),
            false => Err(StoreError::VersionMismatch(origin.name(&key))),
        };
    }
    Ok(Body::open(origin.clone(), key, version, size, range).await?.into_stream())
}

async fn look_up<O: Origin>(origin: &O, key: &str) -> Result<State, StoreError> {
    let mut patience = origin.wire().patience();
    loop {
        match origin.look_up(&mut patience, key).await {
            Ok(state) => return Ok(state),
            Err(failure) => patience.pause(failure).await?,
        }
    }
}
