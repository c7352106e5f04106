//! One trait over the stores that hold the data: conditional range reads, paged listings, errors by what the caller can
//! do.

mod error;
mod store;

pub use error::StoreError;
pub use store::{ByteStream, Item, ItemKind, Page, Requests, StoreFuture, UnderStore};
