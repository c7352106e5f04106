//! What steps in the database changed, on its way to those who must know.

use std::collections::BTreeSet;

use bytes::Bytes;
use forebay_protocol::FileVersion;

/// Names that one invalidation carries; with more, everything in the directory may have changed.
pub(crate) const MAX_NAMES: usize = 1_000;

/// Changes of one directory.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    names: BTreeSet<Bytes>,
    overflown: bool,
    /// File versions that are no longer current, by name.
    pub(crate) superseded: Vec<(Bytes, FileVersion)>,
}

impl Changes {
    pub(crate) fn name(&mut self, name: &[u8]) {
        if self.overflown || self.names.contains(name) {
            return;
        }
        if self.names.len() == MAX_NAMES {
            self.overflown = true;
            self.names.clear();
        } else {
            self.names.insert(Bytes::copy_from_slice(name));
        }
    }

    pub(crate) fn supersede(&mut self, name: &[u8], version: FileVersion) {
        self.superseded.push((Bytes::copy_from_slice(name), version));
    }

    /// Takes over the names of a later step; its superseded versions stay with it.
    pub(crate) fn absorb(&mut self, later: &Self) {
        for name in &later.names {
            self.name(name);
        }
        if later.overflown {
            self.overflown = true;
            self.names.clear();
        }
    }

    /// The names for an invalidation: `None` when nothing changed, empty when there are too many to name.
    pub(crate) fn into_names(self) -> Option<Vec<Bytes>> {
        if self.overflown {
            return Some(Vec::new());
        }
        (!self.names.is_empty()).then(|| self.names.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_names_are_all_names() {
        let mut changes = Changes::default();
        assert!(Changes::default().into_names().is_none());
        for i in 0..MAX_NAMES {
            changes.name(format!("{i}").as_bytes());
            changes.name(b"0");
        }
        let mut more = Changes::default();
        more.absorb(&changes);
        assert_eq!(changes.into_names().map(|n| n.len()), Some(MAX_NAMES));
        more.name(b"x");
        more.name(b"y");
        assert_eq!(more.into_names(), Some(Vec::new()));
    }
}
