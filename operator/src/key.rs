//! Keys of CacheRuntimes, all derived from one secret of the installation.
//!
//! A derived key needs no reading of Secrets: every operator computes the same, whichever of them created the Secret
//! that workers and nodes mount. Key = HMAC-SHA256(master, "forebay runtime key v1" 00 NAMESPACE "/" NAME).

use std::{fs, path::Path};

use anyhow::Context as _;
use forebay_protocol::handshake::RuntimeKey;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

const LABEL: &[u8] = b"forebay runtime key v1\0";

/// What the keys are derived from. Shown nowhere.
pub struct Master([u8; 32]);

impl Master {
    /// One that is known.
    #[cfg(test)]
    pub fn of(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads 64 hexadecimal digits, with space around them.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut master = [0; 32];
        hex::decode_to_slice(text.trim_ascii(), &mut master)
            .map_err(|_| anyhow::anyhow!("{} does not hold 64 hexadecimal digits", path.display()))?;
        Ok(Self(master))
    }

    /// The key of a CacheRuntime.
    pub fn derive(&self, namespace: &str, name: &str) -> [u8; 32] {
        // HMAC takes keys of any length, so one of 32 bytes is never refused.
        #[allow(clippy::expect_used)]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("any key length is valid for HMAC");
        mac.update(LABEL);
        mac.update(namespace.as_bytes());
        mac.update(b"/");
        mac.update(name.as_bytes());
        mac.finalize().into_bytes().into()
    }

    /// The key of a CacheRuntime, for connections to its workers.
    pub fn runtime_key(&self, namespace: &str, name: &str) -> RuntimeKey {
        RuntimeKey::new(self.derive(namespace, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_namespace_name_and_master() {
        let master = Master([1; 32]);
        let key = master.derive("a", "b");
        assert_eq!(key, Master([1; 32]).derive("a", "b"));
        // Computed with: printf 'forebay runtime key v1\0a/b' | openssl dgst -sha256 -mac hmac -macopt hexkey:0101...
        assert_eq!(hex::encode(key), "37aee70fcb508b92bf7ff7180a32cf698eea8c07d4be0c842a3c1d9ddc354851");
        for other in [master.derive("a", "c"), master.derive("c", "b"), Master([2; 32]).derive("a", "b")] {
            assert_ne!(key, other);
        }
    }

    #[test]
    fn the_file_is_checked_and_not_quoted() {
        let dir = std::env::temp_dir().join(format!("forebay-master-{}", std::process::id()));
        fs::write(&dir, format!(" {}\n", "0f".repeat(32))).unwrap();
        assert_eq!(Master::read(&dir).unwrap().0, [0x0f; 32]);
        fs::write(&dir, "hunter2").unwrap();
        let error = Master::read(&dir).err().unwrap().to_string();
        assert!(error.contains("64 hexadecimal") && !error.contains("hunter2"), "{error}");
        fs::remove_file(&dir).unwrap();
    }
}
