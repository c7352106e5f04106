//! Which changes of a CacheRuntime concern its Datasets: not that its numbers changed.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use forebay_api::{CacheRuntime, MemberState};
use kube::runtime::reflector::ObjectRef;
use parking_lot::Mutex;

use crate::conditions;

/// What Datasets last saw of each runtime.
#[derive(Default)]
pub struct Ripples(Mutex<HashMap<ObjectRef<CacheRuntime>, u64>>);

impl Ripples {
    /// Whether Datasets see something new in a runtime.
    pub fn changed(&self, runtime: &CacheRuntime) -> bool {
        let seen = digest(runtime);
        self.0.lock().insert(ObjectRef::from_obj(runtime), seen) != Some(seen)
    }

    /// Forgets a runtime that is gone.
    pub fn gone(&self, runtime: &CacheRuntime) {
        self.0.lock().remove(&ObjectRef::from_obj(runtime));
    }
}

/// What Datasets see: whether it is there, has workers, and is ready.
fn digest(runtime: &CacheRuntime) -> u64 {
    let mut hasher = DefaultHasher::new();
    runtime.metadata.uid.hash(&mut hasher);
    runtime.metadata.deletion_timestamp.is_some().hash(&mut hasher);
    if let Some(status) = &runtime.status {
        let mut members = status.table.iter().flat_map(|table| &table.members);
        members.any(|member| member.state == MemberState::Serving).hash(&mut hasher);
        if let Some(ready) = conditions::get(&status.conditions, conditions::READY) {
            (&ready.status, &ready.reason, &ready.message).hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_make_no_ripples() {
        let runtime = |status| -> CacheRuntime {
            serde_json::from_value(
                json!({"metadata": {"name": "a", "uid": "u"}, "spec": {"tiers": []}, "status": status}),
            )
            .unwrap()
        };
        let ripples = Ripples::default();
        assert!(ripples.changed(&runtime(json!({}))));
        assert!(!ripples.changed(&runtime(json!({"usedBytes": 5}))));
        let member = json!({"name": "a-0", "address": "a:1", "weight": 1, "state": "Serving"});
        let table = |epoch| runtime(json!({"table": {"epoch": epoch, "members": [member]}}));
        assert!(ripples.changed(&table(1)));
        assert!(!ripples.changed(&table(2)));
        ripples.gone(&table(2));
        assert!(ripples.changed(&table(2)));
    }
}
