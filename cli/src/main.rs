//! The command `forebay`.
#![allow(unreachable_pub, reason = "a program: nothing is reachable from outside")]

mod args;
mod kubectl;
mod output;
mod pod;
mod preload;
mod session;
mod up;
mod verbs;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let done = if kubectl::is_plugin() { kubectl::run() } else { args::Args::parse().run() };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("forebay: {error:#}");
            ExitCode::FAILURE
        }
    }
}
