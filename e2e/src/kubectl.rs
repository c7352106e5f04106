//! kubectl: every command has a deadline.

use std::{
    io::Write as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::runner::say_line;

/// Longest that one command may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// kubectl, against the cluster of `KUBECONFIG`.
pub struct Kubectl {
    program: String,
}

impl Kubectl {
    pub fn new() -> Self {
        Self { program: std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".to_owned()) }
    }

    /// A command's output; an error holds what it printed.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.run_with(arguments, None)
    }

    fn run_with(&self, arguments: &[&str], input: Option<&str>) -> anyhow::Result<String> {
        let command = || format!("{} {}", self.program, arguments.join(" "));
        let mut child = Command::new(&self.program)
            .args(arguments)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(command)?;
        if let (Some(mut pipe), Some(text)) = (child.stdin.take(), input) {
            pipe.write_all(text.as_bytes())?;
        }
        let (output, complaints) = (drain(child.stdout.take()), drain(child.stderr.take()));
        let status = wait(&mut child).with_context(command)?;
        let output = output.join().unwrap_or_default();
        if !status.success() {
            bail!("{}: {}", command(), complaints.join().unwrap_or_default().trim());
        }
        Ok(output)
    }

    /// Applies manifests as a user does.
    pub fn apply(&self, namespace: &str, manifests: &str) -> anyhow::Result<String> {
        self.run_with(&["--namespace", namespace, "apply", "-f", "-"], Some(manifests))
    }

    /// What the API server says to a manifest that it is to refuse.
    pub fn refusal(&self, namespace: &str, manifest: &str) -> anyhow::Result<String> {
        match self.apply(namespace, manifest) {
            Ok(_) => bail!("taken, though it is to be refused:\n{manifest}"),
            Err(error) => Ok(format!("{error:#}")),
        }
    }

    /// An object, or `None` when there is none.
    pub fn find(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<Option<Value>> {
        let text = self.run(&["--namespace", namespace, "get", kind, name, "--ignore-not-found", "-o", "json"])?;
        Ok(if text.trim().is_empty() { None } else { Some(serde_json::from_str(&text)?) })
    }

    /// An object that is there.
    pub fn get(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<Value> {
        self.find(namespace, kind, name)?.with_context(|| format!("{kind} {namespace}/{name} does not exist"))
    }

    /// Objects by label.
    pub fn list(&self, namespace: &str, kind: &str, selector: &str) -> anyhow::Result<Vec<Value>> {
        let text = self.run(&["--namespace", namespace, "get", kind, "--selector", selector, "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// A merge patch.
    pub fn patch(&self, namespace: &str, kind: &str, name: &str, patch: &str) -> anyhow::Result<()> {
        self.run(&["--namespace", namespace, "patch", kind, name, "--type=merge", "--patch", patch]).map(drop)
    }

    /// Deletes and waits until it is gone; nothing to delete is no error.
    pub fn delete(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<()> {
        let arguments = ["--namespace", namespace, "delete", kind, name, "--ignore-not-found", "--timeout=90s"];
        self.run(&arguments).map(drop)
    }

    /// Deletes and does not wait.
    pub fn delete_later(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<()> {
        self.run(&["--namespace", namespace, "delete", kind, name, "--ignore-not-found", "--wait=false"]).map(drop)
    }

    /// Waits until an object (`dataset/data`) is Ready.
    pub fn ready(&self, namespace: &str, object: &str, seconds: u64) -> anyhow::Result<()> {
        let timeout = format!("--timeout={seconds}s");
        self.run(&["--namespace", namespace, "wait", "--for=condition=Ready", object, &timeout]).map(drop)
    }

    /// Runs a command in a pod.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> anyhow::Result<String> {
        let mut arguments = vec!["--namespace", namespace, "exec", pod, "--"];
        arguments.extend_from_slice(command);
        self.run(&arguments)
    }

    pub fn logs(&self, namespace: &str, pod: &str) -> anyhow::Result<String> {
        self.run(&["--namespace", namespace, "logs", pod])
    }

    /// Whether a condition of an object has this status, with its reason and message.
    pub fn condition(&self, namespace: &str, kind: &str, name: &str, of: &str) -> anyhow::Result<Option<Condition>> {
        let object = self.get(namespace, kind, name)?;
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().find(|condition| condition["type"] == of).map(|condition| Condition {
            is: condition["status"] == "True",
            reason: text(&condition["reason"]),
            message: text(&condition["message"]),
        }))
    }

    /// Events about an object: reason and message.
    pub fn events(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<Vec<(String, String)>> {
        let selector = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let text_ =
            self.run(&["--namespace", namespace, "get", "events", "--field-selector", &selector, "-o", "json"])?;
        let list: Value = serde_json::from_str(&text_)?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().map(|event| (text(&event["reason"]), text(&event["message"]))).collect())
    }

    /// Removes a namespace with all that is in it; the Datasets and pods first, as a user would.
    pub fn remove_namespace(&self, namespace: &str) -> anyhow::Result<()> {
        if self.run(&["get", "namespace", namespace, "--ignore-not-found", "-o", "name"])?.trim().is_empty() {
            return Ok(());
        }
        self.run(&["--namespace", namespace, "delete", "pod", "--all", "--grace-period=1", "--wait=false"])?;
        self.run(&["delete", "namespace", namespace, "--timeout=100s"]).map(drop)
    }

    /// Prints what helps to see why a test failed.
    pub fn describe_all(&self, namespace: &str, system: &str) {
        for arguments in [
            vec!["--namespace", namespace, "get", "datasets,cacheruntimes,pods,pvc,statefulsets", "-o", "wide"],
            vec!["--namespace", namespace, "get", "datasets,cacheruntimes", "-o", "yaml"],
            vec!["--namespace", namespace, "get", "events", "--sort-by=.lastTimestamp"],
            vec!["--namespace", system, "get", "pods", "-o", "wide"],
            vec![
                "--namespace",
                system,
                "logs",
                "--tail=60",
                "--all-containers",
                "--prefix",
                "--selector=app.kubernetes.io/name=forebay",
            ],
            vec![
                "--namespace",
                namespace,
                "logs",
                "--tail=30",
                "--prefix",
                "--selector=app.kubernetes.io/name=forebay",
            ],
        ] {
            match self.run(&arguments) {
                Ok(output) => say_line(format_args!("--- kubectl {}\n{output}", arguments.join(" "))),
                Err(error) => say_line(format_args!("--- {error:#}")),
            }
        }
    }
}

/// A condition of an object.
#[derive(Debug)]
pub struct Condition {
    pub is: bool,
    pub reason: String,
    pub message: String,
}

/// A string member, or nothing.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn drain(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = std::io::Read::read_to_end(&mut pipe, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child) -> anyhow::Result<std::process::ExitStatus> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("no end within {} s", DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
