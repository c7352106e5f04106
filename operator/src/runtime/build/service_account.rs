//! Who the workers are to the API server, if the user does not say it.

use forebay_api::object_name;
use k8s_openapi::api::core::v1::ServiceAccount;

use crate::runtime::validate::ValidRuntime;

pub fn build(runtime: &ValidRuntime) -> Option<ServiceAccount> {
    let own = runtime.pieces.service_account_name.is_none();
    own.then(|| ServiceAccount { metadata: runtime.owner.runtime_meta(), ..ServiceAccount::default() })
}

/// Name of the ServiceAccount of the workers.
pub fn name(runtime: &ValidRuntime) -> String {
    runtime.pieces.service_account_name.clone().unwrap_or_else(|| object_name(&runtime.owner.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{build::testing, validate::ValidVolume};

    #[test]
    fn the_users_own_takes_its_place() {
        let mut runtime = testing::runtime(ValidVolume::EmptyDir);
        assert_eq!(build(&runtime).unwrap().metadata.name.unwrap(), name(&runtime));
        runtime.pieces.service_account_name = Some("s3-reader".into());
        assert!(build(&runtime).is_none());
        assert_eq!(name(&runtime), "s3-reader");
    }
}
