//! `forebay validate`: checks manifests without starting anything.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use forebay_api::manifest;
use serde_json::json;

use crate::{
    args::{Global, Output},
    output,
};

/// Arguments of `validate`.
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// Manifests: CacheRuntimes, Datasets and the Secrets they name
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Checks the files; every defect is printed.
pub fn validate(global: &Global, args: ValidateArgs) -> anyhow::Result<ExitCode> {
    let (manifest, errors) = match manifest::load(&args.files) {
        Ok(manifest) => (Some(manifest), Vec::new()),
        Err(errors) => (None, errors),
    };
    match (global.output, &manifest) {
        (Output::Json, _) => output::json(&json!({
            "valid": errors.is_empty(),
            "errors": errors,
            "runtimes": manifest.as_ref().map_or(0, |manifest| manifest.runtimes.len()),
            "datasets": manifest.as_ref().map_or(0, |manifest| manifest.datasets.len()),
        }))?,
        (Output::Table, Some(manifest)) => {
            println!("valid: {} CacheRuntime(s), {} Dataset(s)", manifest.runtimes.len(), manifest.datasets.len());
        }
        (Output::Table, None) => errors.iter().for_each(|error| eprintln!("{error}")),
    }
    Ok(if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
