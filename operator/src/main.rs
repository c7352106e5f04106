//! `forebay-operator`: makes what Datasets, CacheRuntimes and PreloadPolicies ask for, and says how they are.
//!
//! - [`watch`]: what the cluster holds, in memory, and who is told when it changes;
//! - [`runtime`], [`dataset`]: the reconcilers of what is there, each dereference, validate, build, apply, status;
//! - [`policy`]: the reconciler of what is done, from what is due to Jobs and from what workers say to a status;
//! - [`poll`]: what the workers say, every few seconds;
//! - [`apply`]: server-side apply that takes over nothing that belongs to somebody else;
//! - [`election`]: one of several operators works, the others wait;
//! - [`guard`], [`crds`]: what the chart's hooks run.
//!
//! Invariants: everything that is made carries the label of its kind and an owner (a PersistentVolume, which cannot be
//! owned from a namespace, carries the Dataset's UID in its name); every wait has a deadline; Secrets are created and
//! never read.
#![allow(unreachable_pub, reason = "a program: nothing is reachable from outside")]

mod apply;
mod args;
mod conditions;
mod context;
mod crds;
mod dataset;
mod election;
mod events;
mod guard;
mod key;
mod labels;
mod metrics;
mod numbers;
mod pods;
mod policy;
mod poll;
mod run;
mod runtime;
mod views;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match args::Args::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("forebay-operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}
