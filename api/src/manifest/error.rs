//! What is wrong with a manifest, said to the person who wrote it.

use std::fmt;

use serde::Serialize;

/// One thing that is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestError {
    /// The file, as it was given.
    pub file: String,
    /// Number of the YAML document in the file, from 1; absent when the file as a whole is wrong.
    pub document: Option<usize>,
    /// Line in the file, from 1.
    pub line: Option<usize>,
    /// The object, such as `Dataset vision/imagenet`; empty when it is not known.
    pub object: String,
    /// The field, such as `spec.sources[1].path`; empty when the document as a whole is wrong.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl ManifestError {
    /// Something wrong with a file as a whole.
    pub(super) fn of_file(file: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            document: None,
            line: None,
            object: String::new(),
            field: String::new(),
            message: message.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, document, line, object, field, message, remedy } = self;
        if !file.is_empty() {
            f.write_str(file)?;
            if let Some(line) = line {
                write!(f, ":{line}")?;
            }
            f.write_str(": ")?;
        }
        if let Some(document) = document {
            write!(f, "document {document}")?;
            if !object.is_empty() {
                write!(f, " ({object})")?;
            }
            f.write_str(": ")?;
        }
        if !field.is_empty() {
            write!(f, "{field}: ")?;
        }
        write!(f, "{message}; remedy: {remedy}")
    }
}

impl std::error::Error for ManifestError {}

/// A value of a manifest as it may stand in a message: short, on one line, and not at all if it could hold a password
/// before an `@`.
pub(super) fn shown(value: &str) -> String {
    const LONGEST: usize = 64;
    if value.contains('@') {
        return "the value".to_owned();
    }
    let mut text: String = value.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if value.chars().nth(LONGEST).is_some() {
        text.push_str("...");
    }
    format!("'{text}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_a_sentence() {
        let mut error = ManifestError {
            file: "dataset.yaml".into(),
            document: Some(2),
            line: Some(12),
            object: "Dataset vision/imagenet".into(),
            field: "spec.sources[1].path".into(),
            message: "'/a' is given twice".into(),
            remedy: "give each a path of its own".into(),
        };
        assert_eq!(
            error.to_string(),
            "dataset.yaml:12: document 2 (Dataset vision/imagenet): spec.sources[1].path: '/a' is given twice; \
             remedy: give each a path of its own"
        );
        error.object.clear();
        error.field.clear();
        error.line = None;
        assert_eq!(
            error.to_string(),
            "dataset.yaml: document 2: '/a' is given twice; remedy: give each a path of its own"
        );
        assert_eq!(ManifestError::of_file("x.yaml", "is bad", "fix it").to_string(), "x.yaml: is bad; remedy: fix it");
    }

    #[test]
    fn values_are_shown_short_and_without_passwords() {
        assert_eq!(shown("/a\nb"), "'/a\\nb'");
        assert_eq!(shown("https://user:password@host"), "the value");
        assert_eq!(shown(&"x".repeat(65)).len(), 64 + 5);
    }
}
