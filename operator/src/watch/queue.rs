//! Names of objects that are to be looked at, each once.

use std::{collections::HashSet, convert::Infallible, sync::Arc};

use futures::{Stream, stream};
use kube::{
    Resource,
    runtime::reflector::{ObjectRef, Store},
};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A set of names that one reconciler takes from. It never holds more than there are objects, so pushing never waits.
pub struct Queue<K: Resource<DynamicType = ()> + 'static>(Arc<Inner<K>>);

struct Inner<K: Resource<DynamicType = ()> + 'static> {
    names: Mutex<HashSet<ObjectRef<K>>>,
    filled: Notify,
}

impl<K: Resource<DynamicType = ()>> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Resource<DynamicType = ()>> Default for Queue<K> {
    fn default() -> Self {
        Self(Arc::new(Inner { names: Mutex::default(), filled: Notify::new() }))
    }
}

impl<K: Resource<DynamicType = ()> + Clone> Queue<K> {
    /// Has an object looked at.
    pub fn push(&self, name: ObjectRef<K>) {
        self.0.names.lock().insert(name);
        self.0.filled.notify_one();
    }

    /// Has every object of a store looked at.
    pub fn push_all(&self, store: &Store<K>) {
        self.0.names.lock().extend(store.state().iter().map(|object| ObjectRef::from_obj(&**object)));
        self.0.filled.notify_one();
    }

    fn take(&self) -> Option<ObjectRef<K>> {
        let mut names = self.0.names.lock();
        let name = names.iter().next()?.clone();
        names.take(&name)
    }

    /// What is pushed, as long as somebody asks.
    pub fn stream(self) -> impl Stream<Item = Result<ObjectRef<K>, Infallible>> {
        stream::unfold(self, |queue| async move {
            loop {
                // A push between the look and the wait leaves a permit behind.
                if let Some(name) = queue.take() {
                    return Some((Ok(name), queue));
                }
                queue.0.filled.notified().await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use forebay_api::Dataset;
    use futures::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn a_name_waits_once_and_wakes_who_waits() {
        let queue = Queue::<Dataset>::default();
        let name = |name: &str| ObjectRef::<Dataset>::new(name).within("default");
        queue.push(name("a"));
        queue.push(name("a"));
        let mut stream = std::pin::pin!(queue.clone().stream());
        assert_eq!(stream.next().await.unwrap().unwrap(), name("a"));
        let nothing = tokio::time::timeout(Duration::from_millis(10), stream.next()).await;
        assert!(nothing.is_err());
        queue.push(name("b"));
        assert_eq!(stream.next().await.unwrap().unwrap(), name("b"));
    }
}
