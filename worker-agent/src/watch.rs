//! What the API server has, in memory: the Datasets of a namespace, and one CacheRuntime.

use std::{fmt::Debug, hash::Hash, sync::Arc, time::Duration};

use backon::ExponentialBuilder;
use forebay_api::{CacheRuntime, Dataset};
use futures::StreamExt as _;
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, Store},
        watcher::{self, ExponentialBackoff, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, task::JoinSet};
use tracing::{debug, info, warn};

/// Objects asked for at once when a watch begins.
const PAGE: u32 = 200;
/// Pauses while the API server is away: so long that a thousand workers do not hinder its return, so short that what
/// changed meanwhile is soon known. Jitter adds up to as much again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(2500));
/// Annotation with a copy of the whole object, which nobody here reads.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The watched objects.
pub(crate) struct Watched {
    pub(crate) datasets: Store<Dataset>,
    pub(crate) runtimes: Store<CacheRuntime>,
    /// Something changed.
    pub(crate) changed: Arc<Notify>,
}

impl Watched {
    /// Begins both watches; they run until `tasks` is dropped.
    pub(crate) fn start(client: &Client, namespace: &str, runtime: &str, tasks: &mut JoinSet<()>) -> Self {
        let changed = Arc::new(Notify::new());
        let all = watcher::Config::default().page_size(PAGE);
        let one = all.clone().fields(&format!("metadata.name={runtime}"));
        Self {
            datasets: follow(Api::namespaced(client.clone(), namespace), all, &changed, tasks),
            runtimes: follow(Api::namespaced(client.clone(), namespace), one, &changed, tasks),
            changed,
        }
    }

    /// Waits until both have begun.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        self.datasets.wait_until_ready().await?;
        self.runtimes.wait_until_ready().await?;
        Ok(())
    }
}

fn follow<K>(api: Api<K>, config: watcher::Config, changed: &Arc<Notify>, tasks: &mut JoinSet<()>) -> Store<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    let (store, writer) = reflector::store();
    let changed = changed.clone();
    let pauses = ExponentialBuilder::default().with_min_delay(PAUSES.0).with_max_delay(PAUSES.1).with_jitter();
    // They grow as they do by default, and do not end.
    let pauses = pauses.without_max_times();
    tasks.spawn(async move {
        let events = watcher(api, config)
            .modify(|object| {
                let meta = object.meta_mut();
                meta.managed_fields = None;
                meta.annotations.iter_mut().for_each(|annotations| drop(annotations.remove(LAST_APPLIED)));
            })
            .backoff(ExponentialBackoff::from(pauses))
            .reflect(writer);
        let mut events = std::pin::pin!(events);
        let kind = K::kind(&K::DynamicType::default()).into_owned();
        let mut interrupted = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(_) => {
                    if std::mem::take(&mut interrupted) {
                        info!(kind, "the watch goes on");
                    }
                    changed.notify_one();
                }
                // It is tried again, with pauses; what is known stays.
                Err(error) if interrupted => debug!(kind, %error, "the watch is still interrupted"),
                Err(error) => {
                    interrupted = true;
                    warn!(kind, %error, "a watch is interrupted; what is known stays in force");
                }
            }
        }
    });
    store
}
