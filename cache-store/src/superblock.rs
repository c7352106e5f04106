//! To whom a cache directory belongs.
//!
//! A short text, so that whoever finds the directory can read what it is:
//!
//! ```text
//! forebay cache store
//! format 1
//! uuid 6f5c...
//! owner demo/worker-0
//! checksum 1a2b3c4d        (crc32c of the lines above)
//! ```

use uuid::Uuid;

/// Version of the directory's layout and of the index; a directory of another one is emptied.
pub(crate) const FORMAT: u32 = 1;
/// Longest text that can be a superblock.
pub(crate) const MAX_LEN: usize = 1024;
/// Longest owner.
pub(crate) const MAX_OWNER: usize = 512;

const MAGIC: &str = "forebay cache store\n";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) uuid: Uuid,
    pub(crate) owner: String,
}

/// What a file named like a superblock is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Ours, of this format.
    Ours(Superblock),
    /// Ours, but damaged or of another format: the directory is a cache, what it holds is of no use.
    Unusable,
    /// Not ours.
    Foreign,
}

pub(crate) fn encode(superblock: &Superblock) -> String {
    let Superblock { uuid, owner } = superblock;
    let text = format!("{MAGIC}format {FORMAT}\nuuid {uuid}\nowner {owner}\n");
    let checksum = crc32c::crc32c(text.as_bytes());
    format!("{text}checksum {checksum:08x}\n")
}

pub(crate) fn decode(bytes: &[u8]) -> Found {
    if !bytes.starts_with(MAGIC.as_bytes()) {
        return Found::Foreign;
    }
    read(bytes).map_or(Found::Unusable, Found::Ours)
}

/// Whether this can be an owner: one line, not empty, not too long.
pub(crate) fn is_owner(owner: &str) -> bool {
    !owner.is_empty() && owner.len() <= MAX_OWNER && !owner.contains('\n')
}

fn read(bytes: &[u8]) -> Option<Superblock> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut lines = text.strip_prefix(MAGIC)?.lines();
    let format: u32 = lines.next()?.strip_prefix("format ")?.parse().ok()?;
    let uuid = Uuid::try_parse(lines.next()?.strip_prefix("uuid ")?).ok()?;
    let owner = lines.next()?.strip_prefix("owner ")?.to_owned();
    let superblock = Superblock { uuid, owner };
    (format == FORMAT && is_owner(&superblock.owner) && encode(&superblock) == text).then_some(superblock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_intact_one_of_this_format_is_ours() {
        let superblock = Superblock { uuid: Uuid::nil(), owner: "demo/worker-0".into() };
        let text = encode(&superblock);
        assert_eq!(
            text,
            "forebay cache store\nformat 1\nuuid 00000000-0000-0000-0000-000000000000\nowner demo/worker-0\n\
             checksum 209214e4\n"
        );
        assert_eq!(decode(text.as_bytes()), Found::Ours(superblock));
        assert_eq!(decode(text.replace("format 1", "format 2").as_bytes()), Found::Unusable);
        assert_eq!(decode(text.replace("worker-0", "worker-1").as_bytes()), Found::Unusable);
        assert_eq!(decode(&text.as_bytes()[..40]), Found::Unusable);
        assert_eq!(decode(&text.as_bytes()[..10]), Found::Foreign);
        assert_eq!(decode(b""), Found::Foreign);
        assert_eq!(decode(b"my thesis\n"), Found::Foreign);
    }
}
