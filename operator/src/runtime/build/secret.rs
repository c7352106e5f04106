//! The key of a CacheRuntime, for its workers and for nodes that mount its Datasets.

use forebay_api::{CacheRuntime, service_address};
use k8s_openapi::api::core::v1::Secret;

use crate::{key::Master, runtime::validate::ValidRuntime};

/// Type of the Secret.
const TYPE: &str = "forebay.io/runtime-key";

pub fn build(runtime: &ValidRuntime, master: &Master) -> Secret {
    let mut metadata = runtime.owner.runtime_meta();
    // A deletion of the CacheRuntime need not wait for the Secret, on whose end nobody has the right to look.
    let mut owner = runtime.owner.reference::<CacheRuntime>();
    owner.block_owner_deletion = None;
    metadata.owner_references = Some(vec![owner]);
    let key = hex::encode(master.derive(&runtime.owner.namespace, &runtime.owner.name));
    let service = service_address(&runtime.owner.namespace, &runtime.owner.name);
    Secret {
        metadata,
        type_: Some(TYPE.into()),
        immutable: Some(true),
        string_data: Some([("key".to_owned(), key), ("service".to_owned(), service)].into()),
        data: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    #[test]
    fn it_holds_the_key_and_where_the_workers_are() {
        let master = Master::of([7; 32]);
        let secret = build(&testing::runtime(ValidVolume::EmptyDir), &master);
        let data = secret.string_data.unwrap();
        assert_eq!(data["key"], hex::encode(master.derive("vision", "gpu-pool")));
        assert_eq!(data["service"], "gpu-pool-forebay.vision.svc:7400");
        assert_eq!(secret.metadata.name.as_deref(), Some("gpu-pool-forebay"));
    }
}
