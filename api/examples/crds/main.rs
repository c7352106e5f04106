//! Writes what is generated from the API types: the CRDs in `crds/` and the reference in `docs/api.md`.
//!
//! `cargo run -p forebay-api --example crds` shows what is out of date, `-- --write` writes it.

mod render;

use std::{error::Error, path::Path, process::ExitCode};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let write = std::env::args().any(|argument| argument == "--write");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut stale = false;
    for (path, content) in render::files()? {
        let file = root.join(&path);
        if std::fs::read_to_string(&file).is_ok_and(|current| current == content) {
            continue;
        }
        if write {
            if let Some(directory) = file.parent() {
                std::fs::create_dir_all(directory)?;
            }
            std::fs::write(&file, content)?;
            println!("written: {path}");
        } else {
            println!("out of date: {path}");
            stale = true;
        }
    }
    Ok(if stale { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
