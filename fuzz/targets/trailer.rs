//! What a worker reads from a chunk file that another process, or a fault, has written.
#![no_main]

use forebay_cache_store::trailer;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = trailer::decode(data);
    let _ = trailer::decode_tail(data, data.len() as u64);
    let _ = trailer::decode_tail(data, u64::MAX);
});
