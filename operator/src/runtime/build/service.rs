//! The headless Service of the workers: how nodes find a first one.

use forebay_api::{WORKER_HTTP_PORT, WORKER_PORT};
use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{labels, runtime::validate::ValidRuntime};

pub fn build(runtime: &ValidRuntime) -> Service {
    let port = |name: &str, port: u16| ServicePort {
        name: Some(name.into()),
        port: port.into(),
        target_port: Some(IntOrString::String(name.into())),
        protocol: Some("TCP".into()),
        ..ServicePort::default()
    };
    Service {
        metadata: runtime.owner.runtime_meta(),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".into()),
            cluster_ip: Some("None".into()),
            // A worker that is not ready may still know the others.
            publish_not_ready_addresses: Some(true),
            selector: Some(labels::worker_selector(&runtime.owner.name)),
            ports: Some(vec![port("data", WORKER_PORT), port("http", WORKER_HTTP_PORT)]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    #[test]
    fn it_is_headless_and_names_workers_that_are_not_ready() {
        let service = serde_json::to_value(build(&testing::runtime(ValidVolume::EmptyDir))).unwrap();
        assert_eq!(service["spec"]["clusterIP"], "None");
        assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
        assert_eq!(service["spec"]["ports"][0]["port"], 7400);
    }
}
