//! What both sides read before they know each other.
#![no_main]

use forebay_protocol::handshake::{ConnectionPurpose, RuntimeKey, accept, connect};
use tokio::io::AsyncWriteExt as _;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else {
        return;
    };
    runtime.block_on(async {
        let key = RuntimeKey::new([7; 32]);
        for server in [true, false] {
            let (mut ours, mut theirs) = tokio::io::duplex(1 << 20);
            let _ = theirs.write_all(data).await;
            let _ = theirs.shutdown().await;
            if server {
                assert!(accept(&mut ours, &key).await.is_err(), "bytes from nowhere proved the key");
            } else {
                assert!(connect(&mut ours, &key, ConnectionPurpose::Data).await.is_err());
            }
        }
    });
});
