//! Who may connect to workers: anybody, to the two ports. What they get is for the handshake to decide.

use forebay_api::{WORKER_HTTP_PORT, WORKER_PORT};
use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPort, NetworkPolicySpec},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use crate::{labels, runtime::validate::ValidRuntime};

pub fn build(runtime: &ValidRuntime) -> NetworkPolicy {
    let port = |port: u16| NetworkPolicyPort {
        port: Some(IntOrString::Int(port.into())),
        protocol: Some("TCP".into()),
        end_port: None,
    };
    NetworkPolicy {
        metadata: runtime.owner.runtime_meta(),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(labels::worker_selector(&runtime.owner.name)),
                match_expressions: None,
            }),
            policy_types: Some(vec!["Ingress".into()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                ports: Some(vec![port(WORKER_PORT), port(WORKER_HTTP_PORT)]),
                from: None,
            }]),
            egress: None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    #[test]
    fn only_the_two_ports_are_open() {
        let policy = serde_json::to_value(build(&testing::runtime(ValidVolume::EmptyDir))).unwrap();
        let ports = json!([{"port": 7400, "protocol": "TCP"}, {"port": 7401, "protocol": "TCP"}]);
        assert_eq!(policy["spec"]["ingress"], json!([{"ports": ports}]));
        assert_eq!(policy["spec"]["podSelector"]["matchLabels"]["forebay.io/runtime"], "gpu-pool");
    }
}
