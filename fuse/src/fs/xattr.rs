//! Extended attributes: `user.forebay.*`, all read-only.
//!
//! | name | of | value (text) |
//! |---|---|---|
//! | `user.forebay.version` | files | the version key, as the source gave it |
//! | `user.forebay.cached_bytes` | files | bytes of this version that its workers hold |
//! | `user.forebay.owner` | all | the worker that owns the file's first chunk, or answers for the directory |

use crate::errno::Errno;

/// The attributes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attribute {
    Version,
    CachedBytes,
    Owner,
}

impl Attribute {
    const ALL: [Self; 3] = [Self::Version, Self::CachedBytes, Self::Owner];

    fn name(self) -> &'static [u8] {
        match self {
            Self::Version => b"user.forebay.version",
            Self::CachedBytes => b"user.forebay.cached_bytes",
            Self::Owner => b"user.forebay.owner",
        }
    }

    fn of_directories(self) -> bool {
        match self {
            Self::Version | Self::CachedBytes => false,
            Self::Owner => true,
        }
    }

    /// The attribute that a file or directory has under this name.
    pub(crate) fn parse(name: &[u8], directory: bool) -> Option<Self> {
        Self::ALL.into_iter().find(|attribute| attribute.name() == name && (!directory || attribute.of_directories()))
    }

    /// The names that a file or directory has, each with a NUL, as listxattr(2) gives them.
    pub(crate) fn names(directory: bool) -> Vec<u8> {
        let mut names = Vec::new();
        for attribute in Self::ALL {
            if !directory || attribute.of_directories() {
                names.extend_from_slice(attribute.name());
                names.push(0);
            }
        }
        names
    }
}

/// How getxattr(2) and listxattr(2) answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrReply {
    /// The caller asked how large its buffer must be.
    Size(u32),
    /// The value.
    Data(Vec<u8>),
}

impl XattrReply {
    /// `size` is that of the caller's buffer; 0 asks for the size.
    pub(crate) fn fit(value: Vec<u8>, size: u32) -> Result<Self, Errno> {
        // Values are at most a version key or a few names.
        let len = u32::try_from(value.len()).map_err(|_| Errno::ERANGE)?;
        match size {
            0 => Ok(Self::Size(len)),
            size if size < len => Err(Errno::ERANGE),
            _ => Ok(Self::Data(value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_protocol() {
        let value = || b"12345".to_vec();
        assert_eq!(XattrReply::fit(value(), 0), Ok(XattrReply::Size(5)));
        assert_eq!(XattrReply::fit(value(), 4), Err(Errno::ERANGE));
        assert_eq!(XattrReply::fit(value(), 5), Ok(XattrReply::Data(value())));
        assert_eq!(XattrReply::fit(value(), 100), Ok(XattrReply::Data(value())));
        assert_eq!(XattrReply::fit(Vec::new(), 0), Ok(XattrReply::Size(0)));
        assert_eq!(XattrReply::fit(Vec::new(), 1), Ok(XattrReply::Data(Vec::new())));
    }

    #[test]
    fn names() {
        assert_eq!(Attribute::names(true), b"user.forebay.owner\0");
        assert_eq!(Attribute::names(false).iter().filter(|byte| **byte == 0).count(), 3);
        assert_eq!(Attribute::parse(b"user.forebay.version", false), Some(Attribute::Version));
        assert_eq!(Attribute::parse(b"user.forebay.version", true), None);
        assert_eq!(Attribute::parse(b"user.forebay.owner", true), Some(Attribute::Owner));
        assert_eq!(Attribute::parse(b"security.selinux", false), None);
    }
}
