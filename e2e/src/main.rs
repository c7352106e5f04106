//! Tests of Forebay on a real Kubernetes cluster: `make e2e`, or against any cluster that `KUBECONFIG` points to.
//!
//! - `kubectl`: what a user has; everything is done and seen through it;
//! - `cluster`: what only our own cluster allows: cutting a node's power, stopping the API server, looking at processes;
//! - `store`: the S3 store that Datasets read from, with a count of its requests; `data`: what is in it;
//! - `readers`: pods that read and check; `manifests`: the objects of tests;
//! - `tests`: the tests, by topic; `runner`: in which order they run; `figures`: what docs/benchmarks.md reports.
//!
//! A test gets a namespace of its own, which goes at its end. Nothing is tried again: a test that fails stays failed.

#![allow(unreachable_pub, reason = "a program: nothing is reachable from outside")]

mod cluster;
mod data;
mod figures;
mod kubectl;
mod manifests;
mod nodes;
mod readers;
mod runner;
mod store;
mod tests;
mod wait;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;

use crate::{cluster::Cluster, kubectl::Kubectl, runner::say_line, store::Store};

#[derive(Debug, Parser)]
#[command(about = "Runs Forebay's tests on a real Kubernetes cluster")]
struct Args {
    /// Run the tests whose name holds one of these words, or measure the figures of these names; all without any
    words: Vec<String>,
    /// Print the tests' names and stop
    #[arg(long)]
    list: bool,
    /// Measure the figures of docs/benchmarks.md instead
    #[arg(long)]
    figures: bool,
    /// The directory of our own cluster; without it, tests that need more than the API are skipped
    #[arg(long, env = "FOREBAY_E2E_CLUSTER")]
    cluster: Option<PathBuf>,
    /// The project's directory
    #[arg(long, env = "FOREBAY_E2E_ROOT", default_value = ".")]
    root: PathBuf,
    /// URL of the S3 store, for pods and for this program
    #[arg(long, env = "FOREBAY_E2E_STORE", default_value = "http://s3.example.com:9000")]
    store: String,
    /// The store's access log, by which requests are counted
    #[arg(long, env = "FOREBAY_E2E_STORE_LOG")]
    store_log: Option<PathBuf>,
    /// The namespace that the chart is installed in
    #[arg(long, env = "FOREBAY_E2E_SYSTEM", default_value = "forebay-system")]
    system: String,
}

/// What every test has.
pub struct Env {
    pub kubectl: Kubectl,
    pub cluster: Option<Cluster>,
    pub store: Store,
    pub root: PathBuf,
    /// Namespace of the chart.
    pub system: String,
}

/// How a test ended.
pub enum Outcome {
    Passed,
    /// With the reason.
    Skipped(String),
}

pub type TestResult = anyhow::Result<Outcome>;

/// What may run beside a test.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Company {
    /// It disturbs only what is in its own namespace, so others like it may.
    SideBySide,
    /// It harms what all share.
    Alone,
}

/// A test: its name, and what it does in a namespace of its own.
pub struct Test {
    pub name: &'static str,
    pub company: Company,
    pub run: fn(&Env, &str) -> TestResult,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let wanted = |name: &str| args.words.is_empty() || args.words.iter().any(|word| name.contains(word.as_str()));
    let chosen: Vec<&'static Test> = tests::ALL.iter().filter(|test| wanted(test.name)).collect();
    if args.list {
        for test in chosen {
            println!("{}", test.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let env = Env {
        kubectl: Kubectl::new(),
        cluster: args.cluster.map(Cluster::new),
        store: Store::new(&args.store, args.store_log)?,
        root: args.root,
        system: args.system,
    };
    env.kubectl.run(&["version"]).context("is KUBECONFIG set, and the cluster there?")?;
    if args.figures {
        return figures::run(&env, &args.words);
    }
    let failed = runner::run(&env, &chosen);
    println!("{} tests, {} failed{}", chosen.len(), failed.len(), if failed.is_empty() { "" } else { ":" });
    for name in &failed {
        println!("  {name}");
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Env {
    /// Runs a test in a namespace that it leaves as it found it: not there.
    fn in_namespace(&self, namespace: &str, test: fn(&Env, &str) -> TestResult) -> TestResult {
        self.kubectl.remove_namespace(namespace)?;
        self.kubectl.run(&["create", "namespace", namespace])?;
        let result = test(self, namespace);
        if let Err(error) = &result {
            say_line(format_args!("{error:#}"));
            self.kubectl.describe_all(namespace, &self.system);
        }
        let removed = self.kubectl.remove_namespace(namespace);
        let outcome = result?;
        removed.context("the test's namespace cannot be removed")?;
        Ok(outcome)
    }

    /// Our own cluster, or why a test is skipped.
    pub fn own(&self) -> Result<&Cluster, Outcome> {
        self.cluster.as_ref().ok_or_else(|| Outcome::Skipped("needs our own cluster".to_owned()))
    }
}
