//! Collects what is wrong with one document.

use super::{
    ManifestError,
    node::{Node, Step, render},
};

/// Most errors of one document: a file of garbage should not fill the screen, or the memory.
const MAX_ERRORS: usize = 100;

/// What is wrong with one document of a file.
pub(super) struct Report<'a> {
    pub(super) file: &'a str,
    pub(super) document: usize,
    /// Kind, namespace and name, as far as they are known.
    pub(super) object: String,
    root: &'a Node,
    errors: Vec<ManifestError>,
}

impl<'a> Report<'a> {
    pub(super) fn new(file: &'a str, document: usize, root: &'a Node) -> Self {
        Self { file, document, object: String::new(), root, errors: Vec::new() }
    }

    /// Something is wrong at a field, or at its parent if it is missing.
    pub(super) fn at(&mut self, steps: &[Step<'_>], message: impl Into<String>, remedy: impl Into<String>) {
        if !self.is_full() {
            self.at_line(self.root.line_of(steps), steps, message, remedy);
        }
    }

    /// As [`Self::at`], on a line that the tree does not lead to: the second of two equal keys.
    pub(super) fn at_line(
        &mut self,
        line: usize,
        steps: &[Step<'_>],
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        if !self.is_full() {
            self.errors.push(ManifestError {
                file: self.file.to_owned(),
                document: Some(self.document),
                line: Some(line),
                object: self.object.clone(),
                field: render(steps),
                message: message.into(),
                remedy: remedy.into(),
            });
        }
    }

    /// Whether more errors would not be kept; looking for them is a waste.
    pub(super) fn is_full(&self) -> bool {
        self.errors.len() >= MAX_ERRORS
    }

    pub(super) fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }

    pub(super) fn into_errors(self) -> Vec<ManifestError> {
        self.errors
    }
}
