//! The cluster's nodes, as the API shows them.

use serde_json::Value;

use crate::{Env, kubectl::text};

impl Env {
    /// Names of the nodes that pods can run on.
    pub fn nodes(&self) -> anyhow::Result<Vec<String>> {
        let list: Value = serde_json::from_str(&self.kubectl.run(&["get", "nodes", "-o", "json"])?)?;
        let nodes = list["items"].as_array().cloned().unwrap_or_default();
        let usable = nodes.iter().filter(|node| is_ready(node) && node["spec"]["taints"].is_null());
        Ok(usable.map(|node| text(&node["metadata"]["name"])).collect())
    }

    pub fn node_is_ready(&self, name: &str) -> anyhow::Result<bool> {
        let node: Value = serde_json::from_str(&self.kubectl.run(&["get", "node", name, "-o", "json"])?)?;
        Ok(is_ready(&node))
    }
}

fn is_ready(node: &Value) -> bool {
    let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}
