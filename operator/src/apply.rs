//! Server-side apply that takes over nothing that belongs to somebody else.
//!
//! An object that exists is applied to only if its owner is ours, and then by its UID: the API server refuses when
//! another one took its place. One that does not exist is made as [`New`] says. What was applied is remembered, and not
//! applied again until it or the object changes.

use std::{
    collections::{HashMap, HashSet},
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::reflector::{ObjectRef, Store},
};
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    context::{CallError, within},
    labels::MANAGER,
};

/// Why an object is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Its name belongs to somebody else: nothing is done until that one is gone.
    #[error("{kind} {name} exists and was not made for this object")]
    NameTaken { kind: String, name: String },
    /// A former one is on its way out; its end brings us back here.
    #[error("{kind} {name} is being deleted")]
    Going { kind: String, name: String },
    /// The API server does not take it: what the user asked for has to change.
    #[error("{kind} {name} was refused: {message}")]
    Refused { kind: String, name: String, message: String },
    /// To be tried again.
    #[error("{kind} {name} could not be applied")]
    Call {
        kind: String,
        name: String,
        #[source]
        source: CallError,
    },
}

/// How an object is made that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum New {
    /// Applied without force: whoever makes it at the same moment with other content has a conflict with us. Fields can
    /// be taken back later.
    Applied,
    /// Created: whoever is first has it. For kinds of which we never take a field back; what is created is not forgotten
    /// by the API server when it is no longer applied.
    Created,
}

/// What was applied last, by UID of the owner and kind.
#[derive(Default)]
pub struct Applied(Mutex<HashMap<String, HashMap<String, Mark>>>);

/// An application: what was asked for, and what the object was like after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    asked: u64,
    state: u64,
}

fn digest(value: &impl Hash) -> u64 {
    // Within one process only: the hasher's keys are constants of the standard library.
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Changes with whatever somebody else may change of an object. Kinds with a generation count changes of their spec, and
/// changes of their status do not concern us; of the others any change counts, but for claims and volumes, which change
/// while they are bound and of which little else can be changed.
fn state(meta: &ObjectMeta, new: New) -> u64 {
    let version = match (meta.generation, new) {
        (Some(generation), _) => generation.to_string(),
        (None, New::Applied) => meta.resource_version.clone().unwrap_or_default(),
        (None, New::Created) => String::new(),
    };
    let owners: Vec<&str> = meta.owner_references.iter().flatten().map(|owner| owner.uid.as_str()).collect();
    digest(&(&meta.uid, version, &meta.labels, owners))
}

impl Applied {
    /// Applies `object`, of which `store` has what exists. `owner` is the UID of who it is made for; `ours` tells
    /// whether an object that exists was made for it. Returns the UID.
    pub async fn apply<K, V>(
        &self,
        api: &Api<K>,
        store: &Store<V>,
        owner: &str,
        object: &K,
        new: New,
        ours: impl Fn(&ObjectMeta) -> bool,
    ) -> Result<String, ApplyError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
        V: Resource<DynamicType = ()> + Clone,
    {
        let (kind, name) = (K::kind(&()).into_owned(), object.name_any());
        let failed = |source: CallError| match source.status() {
            Some(status) if status.code == 422 => {
                ApplyError::Refused { kind: kind.clone(), name: name.clone(), message: status.message.clone() }
            }
            _ => ApplyError::Call { kind: kind.clone(), name: name.clone(), source },
        };
        let mut body =
            serde_json::to_value(object).map_err(|error| failed(CallError::Api(kube::Error::SerdeError(error))))?;
        let asked = digest(&body.to_string());

        let mut key = ObjectRef::<V>::new(&name);
        key.namespace = object.namespace();
        let known = store.get(&key).map(|known| known.meta().clone());
        if known.is_none() && new == New::Created {
            let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
            match within(api.create(&params, object)).await {
                Ok(created) => return Ok(self.note(owner, kind, asked, state(created.meta(), new), created.meta())),
                // It is there after all.
                Err(error) if error.is(409) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let known = match known {
            Some(known) => Some(known),
            None => within(api.get_metadata_opt(&name)).await.map_err(&failed)?.map(|known| known.metadata),
        };
        let mut params = PatchParams::apply(MANAGER);
        if let Some(known) = &known {
            if !ours(known) {
                return Err(ApplyError::NameTaken { kind, name });
            }
            if known.deletion_timestamp.is_some() {
                return Err(ApplyError::Going { kind, name });
            }
            let uid = known.uid.clone().unwrap_or_default();
            if self.last(owner, &kind) == Some(Mark { asked, state: state(known, new) }) {
                return Ok(uid);
            }
            body["metadata"]["uid"] = uid.into();
            params = params.force();
        }
        let applied = within(api.patch_metadata(&name, &params, &Patch::Apply(&body))).await.map_err(&failed)?;
        Ok(self.note(owner, kind, asked, state(&applied.metadata, new), &applied.metadata))
    }

    /// Remembers an application. The UID of the object.
    fn note(&self, owner: &str, kind: String, asked: u64, state: u64, meta: &ObjectMeta) -> String {
        self.0.lock().entry(owner.to_owned()).or_default().insert(kind, Mark { asked, state });
        meta.uid.clone().unwrap_or_default()
    }

    fn last(&self, owner: &str, kind: &str) -> Option<Mark> {
        self.0.lock().get(owner)?.get(kind).copied()
    }

    /// Forgets what was applied for others than these.
    pub fn retain(&self, owners: &HashSet<&str>) {
        self.0.lock().retain(|owner, _| owners.contains(owner.as_str()));
    }
}

/// Deletes an object if it is still this one. Whether it was there.
pub async fn delete<K>(api: &Api<K>, meta: &ObjectMeta) -> Result<bool, CallError>
where
    K: Clone + Debug + DeserializeOwned,
{
    let preconditions = Preconditions { uid: meta.uid.clone(), resource_version: None };
    let params = DeleteParams::background().preconditions(preconditions);
    match within(api.delete(meta.name.as_deref().unwrap_or_default(), &params)).await {
        Ok(_) => Ok(true),
        // Gone, or another one.
        Err(error) if error.is(404) || error.is(409) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_changes_with_what_others_may_change() {
        let meta = |generation, version: &str| ObjectMeta {
            uid: Some("u".into()),
            generation,
            resource_version: Some(version.into()),
            ..ObjectMeta::default()
        };
        let applied = |meta: &ObjectMeta| state(meta, New::Applied);
        // A status that changed does not count where there is a generation.
        assert_eq!(applied(&meta(Some(1), "1")), applied(&meta(Some(1), "2")));
        assert_ne!(applied(&meta(Some(1), "1")), applied(&meta(Some(2), "2")));
        assert_ne!(applied(&meta(None, "1")), applied(&meta(None, "2")));
        // Nor does the binding of a claim.
        assert_eq!(state(&meta(None, "1"), New::Created), state(&meta(None, "2"), New::Created));
        for new in [New::Applied, New::Created] {
            let before = state(&meta(Some(1), "1"), new);
            let mut labelled = meta(Some(1), "1");
            labelled.labels = Some([("a".to_owned(), "b".to_owned())].into());
            assert_ne!(before, state(&labelled, new));
            let mut other = meta(Some(1), "1");
            other.uid = Some("v".into());
            assert_ne!(before, state(&other, new));
        }
    }
}
