//! Which files of a tree are loaded.

use std::ops::{Range, RangeInclusive};

use bytes::Bytes;
use forebay_protocol::{DatasetPath, worker as wire};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use tonic::Status;

use super::Found;

/// Patterns of one kind at most.
const MAX_GLOBS: usize = 256;
/// Bytes of a pattern at most: of a path.
const MAX_GLOB: usize = 4096;

/// What a file must be like. A path is matched from below the Dataset's root, without a slash at its beginning; `*` and
/// `?` stay within a component, `**` does not.
#[derive(Debug)]
pub(crate) struct Selection {
    /// `None`: all paths.
    include: Option<GlobSet>,
    exclude: GlobSet,
    sizes: RangeInclusive<u64>,
    /// Nanoseconds since 1970.
    modified: Range<i64>,
    /// Where the files are named, if not by a walk.
    manifest: Option<ManifestAt>,
}

/// Where a manifest is.
#[derive(Debug)]
pub(super) enum ManifestAt {
    /// In the dataset.
    File(DatasetPath),
    /// It came with the request.
    Here(Bytes),
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            include: None,
            exclude: GlobSet::empty(),
            sizes: 0..=u64::MAX,
            modified: i64::MIN..i64::MAX,
            manifest: None,
        }
    }
}

impl Selection {
    /// As asked for. `INVALID_ARGUMENT`, which names the pattern, when it cannot be understood.
    pub(crate) fn new(asked: &wire::Selection) -> Result<Self, Status> {
        let wire::Selection { include, exclude, min_size, max_size, modified_after_ns, modified_before_ns, manifest } =
            asked;
        let max_size = max_size.unwrap_or(u64::MAX);
        if *min_size > max_size {
            let why = format!("no file has at least {min_size} and at most {max_size} bytes");
            return Err(Status::invalid_argument(why));
        }
        let modified = modified_after_ns.unwrap_or(i64::MIN)..modified_before_ns.unwrap_or(i64::MAX);
        let include = if include.is_empty() { None } else { Some(globs("include", include)?) };
        let manifest = match manifest {
            None => None,
            Some(wire::selection::Manifest::ManifestText(text)) => Some(ManifestAt::Here(text.clone())),
            Some(wire::selection::Manifest::ManifestPath(path)) => {
                let path = DatasetPath::parse(path.clone());
                Some(ManifestAt::File(
                    path.map_err(|why| Status::invalid_argument(format!("path of the manifest: {why}")))?,
                ))
            }
        };
        Ok(Self { include, exclude: globs("exclude", exclude)?, sizes: *min_size..=max_size, modified, manifest })
    }

    /// What names what is loaded.
    pub(super) fn manifest(&self) -> Option<&ManifestAt> {
        self.manifest.as_ref()
    }

    /// Whether a file is loaded.
    pub(super) fn holds(&self, file: &Found) -> bool {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};
        let path = file.path.as_bytes();
        let path = OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path));
        self.sizes.contains(&file.version.size)
            && self.modified.contains(&file.version.mtime_ns)
            && self.include.as_ref().is_none_or(|include| include.is_match(path))
            && !self.exclude.is_match(path)
    }
}

fn globs(field: &str, patterns: &[String]) -> Result<GlobSet, Status> {
    let invalid = |why: String| Status::invalid_argument(format!("{field}: {why}"));
    if patterns.len() > MAX_GLOBS {
        return Err(invalid(format!("{} patterns; at most {MAX_GLOBS} are taken", patterns.len())));
    }
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        if pattern.len() > MAX_GLOB {
            return Err(invalid(format!("a pattern of {} bytes; a path has at most {MAX_GLOB}", pattern.len())));
        }
        let below = pattern.strip_prefix('/').unwrap_or(pattern);
        let glob = GlobBuilder::new(below).literal_separator(true).backslash_escape(true).build();
        set.add(glob.map_err(|error| invalid(format!("'{pattern}': {}", error.kind())))?);
    }
    set.build().map_err(|error| invalid(error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]
mod tests {
    use forebay_protocol::{FileVersion, VersionKey};

    use super::*;

    fn asked(include: &[&str], exclude: &[&str]) -> wire::Selection {
        let texts = |patterns: &[&str]| patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        wire::Selection { include: texts(include), exclude: texts(exclude), ..Default::default() }
    }

    fn file(path: &[u8], size: u64) -> Found {
        let path = DatasetPath::parse(path.to_vec()).unwrap();
        Found { path, version: FileVersion { size, mtime_ns: 0, key: VersionKey::new("v").unwrap() } }
    }

    fn holds(include: &[&str], exclude: &[&str], path: &str) -> bool {
        Selection::new(&asked(include, exclude)).unwrap().holds(&file(path.as_bytes(), 1))
    }

    #[test]
    fn patterns_are_of_paths_below_the_root() {
        assert!(holds(&[], &[], "/any/thing"));
        assert!(holds(&["train/**"], &[], "/train/a/b.jpg") && !holds(&["train/**"], &[], "/val/train/x"));
        assert!(holds(&["/train/*.jpg"], &[], "/train/b.jpg") && !holds(&["train/*.jpg"], &[], "/train/a/b.jpg"));
        assert!(holds(&["**/*.jpg"], &[], "/b.jpg") && holds(&["**/*.jpg"], &[], "/train/a/b.jpg"));
        assert!(holds(&["a", "b/?"], &[], "/b/c") && !holds(&["a", "b/?"], &[], "/b/cd"));
        assert!(!holds(&["**"], &["**/*.tmp"], "/a/b.tmp") && holds(&["**"], &["**/*.tmp"], "/a/b.tmp/c"));
        assert!(holds(&["{x,y}/[0-9]"], &[], "/y/7") && holds(&[r"\*"], &[], "/*") && !holds(&[r"\*"], &[], "/a"));
        // Names as they are: spaces, colons, letters of all languages.
        assert!(holds(&["a b/c:d/größe *"], &[], "/a b/c:d/größe 1"));
        assert!(Selection::new(&asked(&["**/x*"], &[])).unwrap().holds(&file(b"/d/x\xff\xfe", 1)));
    }

    #[test]
    fn sizes_are_bounds() {
        let sizes = |min_size, max_size| wire::Selection { min_size, max_size, ..Default::default() };
        let selection = Selection::new(&sizes(10, Some(20))).unwrap();
        let held: Vec<u64> = [9, 10, 20, 21].into_iter().filter(|size| selection.holds(&file(b"/f", *size))).collect();
        assert_eq!(held, [10, 20]);
        assert!(Selection::new(&sizes(0, Some(0))).unwrap().holds(&file(b"/f", 0)));
        assert!(Selection::new(&sizes(2, Some(1))).is_err());
    }

    #[test]
    fn times_are_bounds() {
        let times = |modified_after_ns, modified_before_ns| {
            let asked = wire::Selection { modified_after_ns, modified_before_ns, ..Default::default() };
            let selection = Selection::new(&asked).unwrap();
            let at = |mtime_ns| Found { version: FileVersion { mtime_ns, ..file(b"/f", 1).version }, ..file(b"/f", 1) };
            [-5, 9, 10, 19, 20].into_iter().filter(|time| selection.holds(&at(*time))).collect::<Vec<i64>>()
        };
        assert_eq!(times(None, None), [-5, 9, 10, 19, 20]);
        assert_eq!(times(Some(10), Some(20)), [10, 19]);
        assert_eq!((times(None, Some(10)), times(Some(20), None)), (vec![-5, 9], vec![20]));
    }

    #[test]
    fn what_is_no_pattern_is_named() {
        let error = Selection::new(&asked(&["a", "b/["], &[])).unwrap_err();
        assert!(error.message().starts_with("include: 'b/['"), "{error}");
        let error = Selection::new(&asked(&[], &[&"x".repeat(MAX_GLOB + 1)])).unwrap_err();
        assert!(error.message().starts_with("exclude: a pattern of 4097 bytes"), "{error}");
        assert!(Selection::new(&asked(&["x"; MAX_GLOBS + 1], &[])).is_err());
    }
}
