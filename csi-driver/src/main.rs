//! `forebay-csi`: the node plugin.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match forebay_csi::args::Args::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("forebay-csi: {error:#}");
            ExitCode::FAILURE
        }
    }
}
