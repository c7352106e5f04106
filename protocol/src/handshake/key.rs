//! A runtime's key, and the one form in which files and Secrets hold it.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Bytes of a key.
const LEN: usize = 32;
/// Most bytes of a key file that are read: the digits, and room for white space.
const MAX_FILE: u64 = 1024;

/// A runtime's key: 32 random bytes, the same at every member.
///
/// As text it is 64 hexadecimal digits, with white space around them allowed (editors and `echo` add a newline). No other
/// form is accepted: 32 raw bytes would sooner or later be cut or lengthened by whatever takes them for text.
#[derive(Clone)]
pub struct RuntimeKey([u8; LEN]);

/// Why a file gives no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("the runtime's key {path} cannot be read")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds something else. What it holds is never shown.
    #[error("{path} holds no runtime's key, which is 64 hexadecimal digits")]
    Invalid {
        /// Which file.
        path: PathBuf,
    },
}

impl RuntimeKey {
    /// A new random key.
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// From its bytes.
    pub fn new(bytes: [u8; LEN]) -> Self {
        Self(bytes)
    }

    /// From its text; `None` when it is no key's.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut bytes = [0; LEN];
        hex::decode_to_slice(text.trim_ascii(), &mut bytes).ok()?;
        Some(Self(bytes))
    }

    /// From the file that holds its text.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let mut text = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut text))
            .map_err(|source| KeyFileError::Read { path: path.to_owned(), source })?;
        let key = if text.len() as u64 > MAX_FILE { None } else { Self::parse(&text) };
        key.ok_or_else(|| KeyFileError::Invalid { path: path.to_owned() })
    }

    /// The text for the file or Secret that holds the key.
    pub fn to_text(&self) -> String {
        hex::encode(self.0)
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8; LEN] {
        &self.0
    }
}

impl fmt::Debug for RuntimeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RuntimeKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_form_is_a_key() {
        let key = RuntimeKey::generate();
        let text = key.to_text();
        for text in [text.clone(), text.to_uppercase(), format!("{text}\n"), format!("  {text}\r\n")] {
            assert_eq!(RuntimeKey::parse(text.as_bytes()).unwrap().expose(), key.expose());
        }
        let raw: &[u8] = key.expose();
        let digits = text.as_bytes();
        for other in [b"".as_slice(), b"00", raw, &digits[1..], &[digits, b"0"].concat(), &[b'g'; 64]] {
            assert!(RuntimeKey::parse(other).is_none());
        }
    }

    #[test]
    fn files_are_bounded_and_errors_show_no_contents() {
        let dir = std::env::temp_dir().join(format!("forebay-key-{:032x}", rand::random::<u128>()));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("key");
        assert!(matches!(RuntimeKey::read(&path), Err(KeyFileError::Read { .. })));
        let key = RuntimeKey::generate();
        std::fs::write(&path, key.to_text() + "\n").unwrap();
        assert_eq!(RuntimeKey::read(&path).unwrap().expose(), key.expose());
        std::fs::write(&path, key.to_text() + &" ".repeat(MAX_FILE as usize)).unwrap();
        assert!(matches!(RuntimeKey::read(&path), Err(KeyFileError::Invalid { .. })));
        std::fs::write(&path, "hunter2").unwrap();
        let error = RuntimeKey::read(&path).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("hunter2"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
