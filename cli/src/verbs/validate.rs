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
    /// Manifests: CacheRuntimes, Datasets, the Secrets they name, and PreloadPolicies
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
            "policies": manifest.as_ref().map_or(0, |manifest| manifest.policies.len()),
        }))?,
        (Output::Table, Some(manifest)) => {
            let counts = (manifest.runtimes.len(), manifest.datasets.len(), manifest.policies.len());
            println!("valid: {} CacheRuntime(s), {} Dataset(s), {} PreloadPolicy(s)", counts.0, counts.1, counts.2);
        }
        (Output::Table, None) => errors.iter().for_each(|error| eprintln!("{error}")),
    }
    Ok(if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
