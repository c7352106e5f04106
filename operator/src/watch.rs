//! What the cluster holds, in memory, and whom a change concerns.
//!
//! One watch a kind, by label for all but our own kinds; of children that we only make, the metadata. Each change puts
//! the names of the Datasets and CacheRuntimes that it concerns into [`Queue`]s.
//!
//! Invariants: a store is up to date with a change before anybody is told of it; a queue holds a name once; whatever a
//! broken watch may have missed is made up for by telling everybody when it is complete again.

mod pauses;
mod queue;
mod ripples;

use std::{hash::Hash, sync::Arc};

use forebay_api::{CacheRuntime, Dataset, PreloadPolicy};
use futures::{FutureExt as _, StreamExt as _, future::try_join_all};
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::RoleBinding,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::{self, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tracing::warn;

pub use self::queue::Queue;
use self::{pauses::Pauses, ripples::Ripples};
use crate::{
    labels::{self, DATASET, POLICY, RUNTIME, SELECTOR},
    views::{ClaimView, JobView, VolumeView, WorkerPod},
};

/// Objects asked for at once when a watch begins; bounds what is in memory twice.
const PAGE: u32 = 200;
/// Annotation with a copy of the whole object, which nobody here reads.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Metadata of objects that we make.
pub type Metas<K> = Store<PartialObjectMeta<K>>;

/// What the cluster holds, as of the last change that was heard of.
pub struct Stores {
    pub datasets: Store<Dataset>,
    pub runtimes: Store<CacheRuntime>,
    pub policies: Store<PreloadPolicy>,
    pub jobs: Store<JobView>,
    pub pods: Store<WorkerPod>,
    pub claims: Store<ClaimView>,
    pub volumes: Store<VolumeView>,
    pub stateful_sets: Metas<StatefulSet>,
    pub services: Metas<Service>,
    pub service_accounts: Metas<ServiceAccount>,
    pub budgets: Metas<PodDisruptionBudget>,
    pub network_policies: Metas<NetworkPolicy>,
    pub role_bindings: Metas<RoleBinding>,
}

/// Who is to be looked at.
#[derive(Clone, Default)]
pub struct Queues {
    pub datasets: Queue<Dataset>,
    pub runtimes: Queue<CacheRuntime>,
    pub policies: Queue<PreloadPolicy>,
}

impl Stores {
    /// Datasets of a CacheRuntime.
    pub fn datasets_of(&self, namespace: &str, runtime: &str) -> Vec<Arc<Dataset>> {
        datasets_of(&self.datasets, namespace, runtime)
    }

    /// PreloadPolicies of a Dataset, by name.
    pub fn policies_of(
        &self,
        namespace: &str,
        dataset: &Dataset,
    ) -> impl Iterator<Item = ObjectRef<PreloadPolicy>> + use<> {
        policies_of(&self.policies, namespace, &dataset.name_any())
    }

    /// Waits until every store is complete.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let Self {
            datasets,
            runtimes,
            policies,
            jobs,
            pods,
            claims,
            volumes,
            stateful_sets,
            services,
            service_accounts,
            budgets,
            network_policies,
            role_bindings,
        } = self;
        try_join_all([
            datasets.wait_until_ready().boxed(),
            runtimes.wait_until_ready().boxed(),
            policies.wait_until_ready().boxed(),
            jobs.wait_until_ready().boxed(),
            pods.wait_until_ready().boxed(),
            claims.wait_until_ready().boxed(),
            volumes.wait_until_ready().boxed(),
            stateful_sets.wait_until_ready().boxed(),
            services.wait_until_ready().boxed(),
            service_accounts.wait_until_ready().boxed(),
            budgets.wait_until_ready().boxed(),
            network_policies.wait_until_ready().boxed(),
            role_bindings.wait_until_ready().boxed(),
        ])
        .await?;
        Ok(())
    }
}

fn datasets_of(datasets: &Store<Dataset>, namespace: &str, runtime: &str) -> Vec<Arc<Dataset>> {
    datasets.state_filter(|dataset| {
        dataset.spec.runtime_ref.name == runtime && dataset.metadata.namespace.as_deref() == Some(namespace)
    })
}

fn policies_of(
    policies: &Store<PreloadPolicy>,
    namespace: &str,
    dataset: &str,
) -> impl Iterator<Item = ObjectRef<PreloadPolicy>> + use<> {
    let found = policies.state_filter(|policy| {
        policy.spec.dataset_ref.name == dataset && policy.metadata.namespace.as_deref() == Some(namespace)
    });
    found.into_iter().map(|policy| ObjectRef::from_obj(&*policy))
}

/// Begins all watches; they run until `tasks` is dropped.
pub fn start(client: &Client, queues: &Queues, tasks: &mut JoinSet<()>) -> Arc<Stores> {
    let (datasets, datasets_writer) = reflector::store();
    let (runtimes, runtimes_writer) = reflector::store();
    let (policies, policies_writer) = reflector::store();
    let mut watches = Watches { client, queues, tasks, datasets, runtimes, policies };
    let with = |label: &str| watcher::Config::default().labels(&format!("{SELECTOR},{label}")).page_size(PAGE);
    let all = watcher::Config::default().page_size(PAGE);

    let stores = Stores {
        pods: watches.children(with(RUNTIME)),
        claims: watches.of_datasets(with(DATASET), |claim: &ClaimView| {
            let name = claim.metadata.labels.as_ref()?.get(DATASET)?;
            Some(ObjectRef::new(name).within(claim.metadata.namespace.as_deref()?))
        }),
        volumes: watches.of_datasets(with(DATASET), |volume: &VolumeView| {
            let claim = &volume.spec.claim_ref;
            Some(ObjectRef::new(&claim.name).within(&claim.namespace))
        }),
        stateful_sets: watches.children(with(RUNTIME)),
        services: watches.children(with(RUNTIME)),
        service_accounts: watches.children(with(RUNTIME)),
        budgets: watches.children(with(RUNTIME)),
        network_policies: watches.children(with(RUNTIME)),
        role_bindings: watches.children(with(RUNTIME)),
        jobs: watches.of_policies(with(POLICY)),
        datasets: watches.datasets.clone(),
        runtimes: watches.runtimes.clone(),
        policies: watches.policies.clone(),
    };
    watches.datasets(all.clone(), datasets_writer);
    watches.runtimes(all.clone(), runtimes_writer);
    watches.policies(all, policies_writer);
    Arc::new(stores)
}

struct Watches<'a> {
    client: &'a Client,
    queues: &'a Queues,
    tasks: &'a mut JoinSet<()>,
    datasets: Store<Dataset>,
    runtimes: Store<CacheRuntime>,
    policies: Store<PreloadPolicy>,
}

impl Watches<'_> {
    fn datasets(&mut self, config: watcher::Config, writer: Writer<Dataset>) {
        let (queues, all, policies) = (self.queues.clone(), self.datasets.clone(), self.policies.clone());
        self.tasks.spawn(follow(self.client, config, writer, move |change| match change {
            Change::Put(dataset) | Change::Gone(dataset) => {
                queues.datasets.push(ObjectRef::from_obj(dataset));
                let namespace = dataset.metadata.namespace.as_deref().unwrap_or_default();
                policies_of(&policies, namespace, &dataset.name_any()).for_each(|policy| queues.policies.push(policy));
            }
            Change::All => {
                queues.datasets.push_all(&all);
                queues.policies.push_all(&policies);
            }
        }));
    }

    fn policies(&mut self, config: watcher::Config, writer: Writer<PreloadPolicy>) {
        let (queue, all) = (self.queues.policies.clone(), self.policies.clone());
        self.tasks.spawn(follow(self.client, config, writer, move |change| match change {
            Change::Put(policy) | Change::Gone(policy) => queue.push(ObjectRef::from_obj(policy)),
            Change::All => queue.push_all(&all),
        }));
    }

    /// Watches a kind that belongs to PreloadPolicies: their name is in its labels.
    fn of_policies<K: Watched>(&mut self, config: watcher::Config) -> Store<K> {
        let (store, writer) = reflector::store();
        let (queue, all) = (self.queues.policies.clone(), self.policies.clone());
        self.tasks.spawn(follow(self.client, config, writer, move |change: Change<'_, K>| match change {
            Change::Put(object) | Change::Gone(object) => {
                if let (Some(name), Some(namespace)) = (object.labels().get(POLICY), object.namespace()) {
                    queue.push(ObjectRef::new(name).within(&namespace));
                }
            }
            Change::All => queue.push_all(&all),
        }));
        store
    }

    fn runtimes(&mut self, config: watcher::Config, writer: Writer<CacheRuntime>) {
        let (queues, all, datasets) = (self.queues.clone(), self.runtimes.clone(), self.datasets.clone());
        let ripples = Ripples::default();
        let tell_datasets = move |runtime: &CacheRuntime| {
            let namespace = runtime.metadata.namespace.as_deref().unwrap_or_default();
            let name = runtime.metadata.name.as_deref().unwrap_or_default();
            for dataset in datasets_of(&datasets, namespace, name) {
                queues.datasets.push(ObjectRef::from_obj(&*dataset));
            }
        };
        let (queues, datasets) = (self.queues.clone(), self.datasets.clone());
        self.tasks.spawn(follow(self.client, config, writer, move |change| match change {
            Change::Put(runtime) => {
                queues.runtimes.push(ObjectRef::from_obj(runtime));
                if ripples.changed(runtime) {
                    tell_datasets(runtime);
                }
            }
            Change::Gone(runtime) => {
                ripples.gone(runtime);
                tell_datasets(runtime);
            }
            Change::All => {
                queues.runtimes.push_all(&all);
                queues.datasets.push_all(&datasets);
            }
        }));
    }

    /// Watches a kind that belongs to Datasets.
    fn of_datasets<K: Watched>(
        &mut self,
        config: watcher::Config,
        owner: impl Fn(&K) -> Option<ObjectRef<Dataset>> + Send + 'static,
    ) -> Store<K> {
        let (store, writer) = reflector::store();
        let (queue, all) = (self.queues.datasets.clone(), self.datasets.clone());
        self.tasks.spawn(follow(self.client, config, writer, move |change| match change {
            Change::Put(object) | Change::Gone(object) => owner(object).into_iter().for_each(|owner| queue.push(owner)),
            Change::All => queue.push_all(&all),
        }));
        store
    }

    /// Watches a kind that belongs to CacheRuntimes: their name is in its labels, whoever owns it.
    fn children<K: Watched>(&mut self, config: watcher::Config) -> Store<K> {
        let (store, writer) = reflector::store();
        let (queue, all) = (self.queues.runtimes.clone(), self.runtimes.clone());
        self.tasks.spawn(follow(self.client, config, writer, move |change: Change<'_, K>| match change {
            Change::Put(object) | Change::Gone(object) => {
                if let (Some(name), Some(namespace)) = (object.labels().get(labels::RUNTIME), object.namespace()) {
                    queue.push(ObjectRef::new(name).within(&namespace));
                }
            }
            Change::All => queue.push_all(&all),
        }));
        store
    }
}

/// What happened to objects of a kind.
enum Change<'a, K> {
    /// It is new, or changed.
    Put(&'a K),
    Gone(&'a K),
    /// The store was filled anew; whatever was missed is not known.
    All,
}

/// What can be watched.
trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static {}
impl<K> Watched for K where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static
{
}

/// Keeps a store up to date. `tell` is called after each change of it.
fn follow<K: Watched>(
    client: &Client,
    config: watcher::Config,
    writer: Writer<K>,
    tell: impl Fn(Change<'_, K>) + Send + 'static,
) -> impl Future<Output = ()> + Send + 'static
where
    K::DynamicType: Eq + Hash,
{
    let kind = K::kind(&()).into_owned();
    let events =
        watcher(Api::<K>::all(client.clone()), config).modify(strip).backoff(Pauses::default()).reflect(writer);
    async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(object)) => tell(Change::Put(&object)),
                Ok(watcher::Event::Delete(object)) => tell(Change::Gone(&object)),
                Ok(watcher::Event::InitDone) => tell(Change::All),
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Err(error) => warn!(%kind, %error, "a watch failed and is tried again"),
            }
        }
    }
}

/// Drops what nobody here reads.
fn strip<K: Resource>(object: &mut K) {
    let meta = object.meta_mut();
    meta.managed_fields = None;
    if let Some(annotations) = &mut meta.annotations {
        annotations.remove(LAST_APPLIED);
    }
}
