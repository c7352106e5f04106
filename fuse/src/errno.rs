//! The one place where it is decided which errno a program sees.
//!
//! | what happened | errno | why |
//! |---|---|---|
//! | no such name | `ENOENT` | |
//! | the version that is open is gone at the source | `ESTALE` | never bytes of another version |
//! | no worker or source answered within the deadline | `EIO` | what programs treat as "the disk failed" |
//! | refused, on a look-up or listing | `EACCES` | `open` and `readdir` may give it |
//! | refused, in the middle of a read | `EIO` | `read` has no `EACCES` |
//! | any change of the tree | `EROFS` | the mount is read-only |
//! | an extended attribute that does not exist | `ENODATA` | `ENOSYS` would switch them off for the whole mount |

use std::fmt;

use crate::tree::TreeError;

/// A positive errno of Linux.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident),* $(,)?) => {
        #[allow(missing_docs)]
        impl Errno { $(pub const $name: Errno = Errno(libc::$name);)* }

        impl fmt::Debug for Errno {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$name => f.write_str(stringify!($name)),)*
                    Errno(other) => write!(f, "errno {other}"),
                }
            }
        }
    };
}

errnos!(
    EACCES,
    EINVAL,
    EIO,
    EISDIR,
    ENAMETOOLONG,
    ENFILE,
    ENODATA,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTDIR,
    ENOTTY,
    EOPNOTSUPP,
    ERANGE,
    EROFS,
    ESTALE,
);

impl Errno {
    /// The number, positive.
    pub fn code(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the program was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum During {
    /// Names and attributes.
    Metadata,
    /// A file's bytes.
    Data,
}

/// The errno of a tree's refusal.
pub fn of(error: &TreeError, during: During) -> Errno {
    match (error, during) {
        (TreeError::NotFound, During::Metadata) => Errno::ENOENT,
        // A file that is open was found before: what is gone is its version.
        (TreeError::NotFound | TreeError::VersionGone, During::Data) => Errno::ESTALE,
        (TreeError::VersionGone, During::Metadata) => Errno::ESTALE,
        (TreeError::NotDirectory, During::Metadata) => Errno::ENOTDIR,
        (TreeError::NotDirectory, During::Data) => Errno::EIO,
        (TreeError::PermissionDenied(_), During::Metadata) => Errno::EACCES,
        (TreeError::PermissionDenied(_), During::Data) => Errno::EIO,
        (TreeError::Unavailable(_) | TreeError::Invalid(_), _) => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_its_errno() {
        let text = || "why".to_owned();
        let table = [
            (TreeError::NotFound, Errno::ENOENT, Errno::ESTALE),
            (TreeError::VersionGone, Errno::ESTALE, Errno::ESTALE),
            (TreeError::NotDirectory, Errno::ENOTDIR, Errno::EIO),
            (TreeError::PermissionDenied(text()), Errno::EACCES, Errno::EIO),
            (TreeError::Unavailable(text()), Errno::EIO, Errno::EIO),
            (TreeError::Invalid(text()), Errno::EIO, Errno::EIO),
        ];
        for (error, metadata, data) in table {
            assert_eq!(of(&error, During::Metadata), metadata, "{error:?}");
            assert_eq!(of(&error, During::Data), data, "{error:?}");
        }
    }

    #[test]
    fn names_are_printed() {
        assert_eq!(Errno::ESTALE.to_string(), "ESTALE");
        assert_eq!(Errno::EROFS.code(), libc::EROFS);
    }
}
