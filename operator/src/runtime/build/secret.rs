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
