//! `kubectl forebay`: the verbs against workers in a cluster.
//!
//! kubectl runs a program of the name `kubectl-forebay` for it; this is the same program as `forebay`. It has kubectl find a
//! worker of the CacheRuntime, and runs the verb there, where the key of the runtime and the other workers are. So who may
//! `get` Datasets and `exec` into pods needs no other way to the workers.

use std::{
    ffi::OsString,
    io::IsTerminal as _,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use serde_json::Value;

use crate::args::Args;

/// The name under which kubectl finds it.
const NAME: &str = "kubectl-forebay";
/// Options of kubectl, which takes a value with each.
const PASSED: [&str; 4] = ["--namespace", "--context", "--kubeconfig", "--cluster"];
/// The container of a worker's pod.
const CONTAINER: &str = "worker";

/// Whether this process was started by kubectl.
pub fn is_plugin() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name().is_some_and(|name| name == NAME))
}

/// Runs the verb of the command line in a worker.
pub fn run() -> anyhow::Result<ExitCode> {
    let words = std::env::args_os().skip(1).map(OsString::into_string).collect::<Result<Vec<_>, _>>();
    let Ok(words) = words else { bail!("an argument is not UTF-8") };
    let (of_kubectl, mut of_verb) = split(words)?;
    let runtime = take(&mut of_verb, "--runtime")?;
    let args = Args::try_parse_from(["kubectl forebay".to_owned()].into_iter().chain(of_verb.clone()))
        .unwrap_or_else(|error| error.exit());
    let kubectl = Kubectl { options: of_kubectl };
    let dataset = args.dataset_of_verb()?;
    let found = match (runtime, dataset) {
        (Some(runtime), _) => vec![kubectl.get("cacheruntime", &runtime)?],
        (None, Some(name)) => {
            // `NAMESPACE/NAME` is understood everywhere.
            let name = name.rsplit_once('/').map_or(name, |(_, name)| name);
            let dataset = kubectl.get("dataset", name)?;
            let runtime = dataset.pointer("/spec/runtimeRef/name").and_then(Value::as_str).unwrap_or_default();
            vec![kubectl.get("cacheruntime", runtime)?]
        }
        (None, None) => kubectl.list(&["cacheruntimes"])?,
    };
    ensure!(!found.is_empty(), "there is no CacheRuntime in this namespace; --namespace chooses another one");
    if found.len() > 1 && !args.is_status() {
        let names: Vec<String> = found.iter().map(|runtime| text(runtime, "/metadata/name")).collect();
        bail!("choose one of the CacheRuntimes by --runtime: {}", names.join(", "));
    }
    let mut code = ExitCode::SUCCESS;
    for (number, runtime) in found.iter().enumerate() {
        if number > 0 {
            println!();
        }
        let status = kubectl.exec(runtime, &of_verb)?;
        if status != 0 {
            code = ExitCode::from(status);
        }
    }
    Ok(code)
}

/// Takes what is kubectl's out of the arguments, wherever it is: no verb has options of these names.
fn split(words: Vec<String>) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let (mut of_kubectl, mut of_verb) = (Vec::new(), Vec::new());
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let word = match word.strip_prefix("-n") {
            Some("") => "--namespace".to_owned(),
            Some(name) if !name.starts_with('-') => format!("--namespace={}", name.trim_start_matches('=')),
            _ => word,
        };
        if PASSED.contains(&word.as_str()) {
            let value = words.next().with_context(|| format!("{word} needs a value"))?;
            of_kubectl.push(format!("{word}={value}"));
        } else if PASSED.iter().any(|option| word.strip_prefix(option).is_some_and(|rest| rest.starts_with('='))) {
            of_kubectl.push(word);
        } else {
            of_verb.push(word);
        }
    }
    Ok((of_kubectl, of_verb))
}

/// Takes an option with its value out of the arguments.
fn take(words: &mut Vec<String>, option: &str) -> anyhow::Result<Option<String>> {
    let Some(place) = words.iter().position(|word| word == option || word.starts_with(&format!("{option}="))) else {
        return Ok(None);
    };
    let word = words.remove(place);
    if let Some((_, value)) = word.split_once('=') {
        return Ok(Some(value.to_owned()));
    }
    ensure!(place < words.len(), "{option} needs a value");
    Ok(Some(words.remove(place)))
}

struct Kubectl {
    options: Vec<String>,
}

impl Kubectl {
    fn command(&self) -> Command {
        let mut command = Command::new(std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into()));
        command.args(&self.options);
        command
    }

    fn json(&self, words: &[&str]) -> anyhow::Result<Value> {
        let output = self.command().args(words).args(["--output", "json"]).output().context("running kubectl")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        serde_json::from_slice(&output.stdout).with_context(|| format!("understanding kubectl {}", words.join(" ")))
    }

    fn get(&self, kind: &str, name: &str) -> anyhow::Result<Value> {
        self.json(&["get", kind, name])
    }

    fn list(&self, what: &[&str]) -> anyhow::Result<Vec<Value>> {
        let list = self.json(&[&["get"], what].concat())?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Runs the verb in a worker of the runtime; gives its exit status.
    fn exec(&self, runtime: &Value, verb: &[String]) -> anyhow::Result<u8> {
        let (namespace, name) = (text(runtime, "/metadata/namespace"), text(runtime, "/metadata/name"));
        let selector = runtime.pointer("/status/selector").and_then(Value::as_str);
        let selector = selector.with_context(|| format!("CacheRuntime {name} has no workers yet"))?;
        let pods = self.list(&["pods", "--selector", selector])?;
        let pod = choose(&pods).with_context(|| format!("no worker of CacheRuntime {name} runs: see its pods"))?;
        let pod = text(pod, "/metadata/name");
        let mut command = self.command();
        command.args(["exec", &pod, "--container", CONTAINER]);
        // For progress bars and `top`.
        if std::io::stdout().is_terminal() && std::io::stdin().is_terminal() {
            command.args(["--stdin", "--tty"]);
        }
        command.args(["--", "forebay", &format!("--in-pod={namespace}/{name}")]).args(verb).stdin(Stdio::inherit());
        let status = command.status().context("running kubectl exec")?;
        Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
    }
}

fn text(object: &Value, pointer: &str) -> String {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// A pod to run in: a ready one, or one that runs. The kubelet probes now and then: what serves may not be ready yet.
fn choose(pods: &[Value]) -> Option<&Value> {
    let condition = |pod: &&Value, wanted: &str| {
        let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        conditions.any(|condition| condition["type"] == wanted && condition["status"] == "True")
    };
    let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    let runs = |pod: &&Value| {
        let mut containers = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
        containers.any(|container| container["name"] == CONTAINER && container["state"]["running"].is_object())
    };
    let mut pods: Vec<&Value> = pods.iter().filter(stays).collect();
    pods.sort_by_key(|pod| !condition(pod, "Ready"));
    pods.into_iter().find(|pod| condition(pod, "Ready") || runs(pod))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_pod_that_is_ready_is_better_than_one_that_runs() {
        let pod = |name: &str, ready: &str, state: &str| {
            json!({
                "metadata": {"name": name},
                "status": {
                    "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}],
                    "containerStatuses": [{"name": CONTAINER, "state": {state: {}}}],
                },
            })
        };
        let (waits, runs, ready) =
            (pod("a", "False", "waiting"), pod("b", "False", "running"), pod("c", "True", "running"));
        let chosen = |pods: &[&Value]| {
            let pods: Vec<Value> = pods.iter().map(|pod| (*pod).clone()).collect();
            choose(&pods).map(|pod| text(pod, "/metadata/name"))
        };
        assert_eq!(chosen(&[&waits, &runs, &ready]).as_deref(), Some("c"));
        assert_eq!(chosen(&[&waits, &runs]).as_deref(), Some("b"));
        assert_eq!(chosen(&[&waits]), None);
        let mut leaves = ready.clone();
        leaves["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(chosen(&[&leaves, &runs]).as_deref(), Some("b"));
    }

    #[test]
    fn options_of_kubectl_are_told_from_those_of_verbs() {
        for (line, of_kubectl, of_verb) in [
            ("load imagenet /train -n vision", "--namespace=vision", "load imagenet /train"),
            ("-nvision status --output json", "--namespace=vision", "status --output json"),
            ("--context=prod top --count 3 --namespace x", "--context=prod --namespace=x", "top --count 3"),
            ("ls data --kubeconfig k /-n", "--kubeconfig=k", "ls data /-n"),
            ("free data /a", "", "free data /a"),
        ] {
            assert_eq!(split(words(line)).unwrap(), (words(of_kubectl), words(of_verb)), "{line}");
        }
        assert!(split(words("status -n")).is_err());
        let mut line = words("status --runtime gpu-pool -o json");
        assert_eq!(take(&mut line, "--runtime").unwrap().as_deref(), Some("gpu-pool"));
        assert_eq!(line, words("status -o json"));
        assert_eq!(take(&mut words("top --runtime=a"), "--runtime").unwrap().as_deref(), Some("a"));
        assert!(take(&mut words("top --runtime"), "--runtime").is_err());
    }
}
