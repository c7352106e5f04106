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
    Revision,
}

/// What has attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Root,
    Directory,
    File,
}

impl Attribute {
    const ALL: [Self; 4] = [Self::Version, Self::CachedBytes, Self::Owner, Self::Revision];

    fn name(self) -> &'static [u8] {
        match self {
            Self::Version => b"user.forebay.version",
            Self::CachedBytes => b"user.forebay.cached_bytes",
            Self::Owner => b"user.forebay.owner",
            Self::Revision => b"user.forebay.revision",
        }
    }

    fn is_of(self, place: Place) -> bool {
        match self {
            Self::Version | Self::CachedBytes => place == Place::File,
            Self::Owner => true,
            Self::Revision => place == Place::Root,
        }
    }

    /// The attribute that is there under this name.
    pub(crate) fn parse(name: &[u8], place: Place) -> Option<Self> {
        Self::ALL.into_iter().find(|attribute| attribute.name() == name && attribute.is_of(place))
    }

    /// The names that are there, each with a NUL, as listxattr(2) gives them.
    pub(crate) fn names(place: Place) -> Vec<u8> {
        let mut names = Vec::new();
        for attribute in Self::ALL.into_iter().filter(|attribute| attribute.is_of(place)) {
            names.extend_from_slice(attribute.name());
            names.push(0);
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
        assert_eq!(Attribute::names(Place::Directory), b"user.forebay.owner\0");
        assert_eq!(Attribute::names(Place::Root), b"user.forebay.owner\0user.forebay.revision\0");
        assert_eq!(Attribute::names(Place::File).iter().filter(|byte| **byte == 0).count(), 3);
        assert_eq!(Attribute::parse(b"user.forebay.version", Place::File), Some(Attribute::Version));
        assert_eq!(Attribute::parse(b"user.forebay.version", Place::Directory), None);
        assert_eq!(Attribute::parse(b"user.forebay.revision", Place::Directory), None);
        assert_eq!(Attribute::parse(b"user.forebay.owner", Place::Root), Some(Attribute::Owner));
        assert_eq!(Attribute::parse(b"security.selinux", Place::File), None);
    }
}
