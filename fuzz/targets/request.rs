//! What a worker reads from a data connection.
#![no_main]

use bytes::Bytes;
use forebay_protocol::frame::{HEADER, Header, MAX_REQUEST_BODY, decode_request};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((head, body)) = data.split_first_chunk::<HEADER>() else { return };
    if let Ok(header) = Header::decode(head, MAX_REQUEST_BODY) {
        let _ = decode_request(&header, Bytes::copy_from_slice(body));
    }
});
