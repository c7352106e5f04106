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
