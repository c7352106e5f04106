//! `forebay-operator run`: everything together, and its end.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use forebay_protocol::errors::chain;
use futures::StreamExt as _;
use kube::{
    Client,
    runtime::{applier, controller},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::interval,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    apply::Applied,
    args::RunArgs,
    context::{Context, ReconcileError},
    dataset,
    election::Election,
    events::Events,
    key::Master,
    metrics::{Kind, Metrics},
    policy,
    poll::{self, Observations},
    runtime,
    watch::{self, Queues},
};

/// Objects of a kind that are looked at at once.
const CONCURRENCY: u16 = 16;
/// How long changes of one object gather before it is looked at: what is made for it comes back as changes.
const GATHER: Duration = Duration::from_millis(50);
/// How often what is left behind is cleared away.
const SWEEP: Duration = Duration::from_secs(60);

/// Runs until a signal, or until it no longer leads.
pub async fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let mut stop = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let master = Master::read(&args.master_key_file)?;
    let client = Client::try_default().await.context("no way to the API server is known")?;
    let metrics = Arc::new(Metrics::new());
    let listener = TcpListener::bind(args.http).await.with_context(|| format!("cannot listen on {}", args.http))?;
    let mut serving = JoinSet::new();
    serving.spawn(forebay_exposition::serve(listener, metrics.clone(), CancellationToken::new()));

    let election = Election::new(client.clone(), &args);
    let work = async {
        if !args.no_leader_election {
            election.win().await;
        }
        info!(identity = %args.identity, "leading");
        metrics.leading.set(1);
        let working = work(client, &args, master, metrics.clone());
        if args.no_leader_election {
            return working.await;
        }
        tokio::select! {
            ended = working => ended,
            // What another one does now must not be undone: nothing of this process may go on.
            why = election.keep() => Err(anyhow::anyhow!("no longer leading: {why}")),
        }
    };
    let ended = tokio::select! {
        ended = work => ended,
        _ = stop.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    if !args.no_leader_election {
        election.resign().await;
    }
    ended.map(|()| ExitCode::SUCCESS)
}

/// Watches, polls and reconciles.
async fn work(client: Client, args: &RunArgs, master: Master, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let queues = Queues::default();
    let mut tasks = JoinSet::new();
    let stores = watch::start(&client, &queues, &mut tasks);
    let context = Arc::new(Context {
        events: Events::new(client.clone(), args.identity.clone()),
        client,
        stores: stores.clone(),
        queues: queues.clone(),
        workers: args.workers.clone(),
        master,
        observations: Observations::default(),
        applied: Applied::default(),
        metrics,
        memory: parking_lot::Mutex::default(),
    });
    stores.ready().await?;
    context.sweep();
    tasks.spawn(poll::run(context.clone()));
    tasks.spawn(datasets(context.clone()));
    tasks.spawn(runtimes(context.clone()));
    tasks.spawn(policies(context.clone()));
    tasks.spawn(sweeps(context));
    // None of them ends.
    match tasks.join_next().await {
        Some(Err(error)) => Err(error.into()),
        _ => Err(anyhow::anyhow!("a task of the operator ended")),
    }
}

async fn datasets(context: Arc<Context>) {
    let reconcile = |dataset, context: Arc<Context>| {
        Box::pin(async move {
            let metrics = context.metrics.clone();
            metrics.timed(Kind { kind: "Dataset" }, dataset::reconcile(dataset, context)).await
        })
    };
    let queue = context.queues.datasets.clone().stream();
    let config = controller::Config::default().concurrency(CONCURRENCY).debounce(GATHER);
    applier(reconcile, dataset::failed, context.clone(), context.stores.datasets.clone(), Box::pin(queue), config)
        .for_each(|done| async { report(done) })
        .await;
}

async fn runtimes(context: Arc<Context>) {
    let reconcile = |runtime, context: Arc<Context>| {
        Box::pin(async move {
            let metrics = context.metrics.clone();
            metrics.timed(Kind { kind: "CacheRuntime" }, runtime::reconcile(runtime, context)).await
        })
    };
    let queue = context.queues.runtimes.clone().stream();
    let config = controller::Config::default().concurrency(CONCURRENCY).debounce(GATHER);
    applier(reconcile, runtime::failed, context.clone(), context.stores.runtimes.clone(), Box::pin(queue), config)
        .for_each(|done| async { report(done) })
        .await;
}

async fn policies(context: Arc<Context>) {
    let reconcile = |policy, context: Arc<Context>| {
        Box::pin(async move {
            let metrics = context.metrics.clone();
            metrics.timed(Kind { kind: "PreloadPolicy" }, policy::reconcile(policy, context)).await
        })
    };
    let queue = context.queues.policies.clone().stream();
    let config = controller::Config::default().concurrency(CONCURRENCY).debounce(GATHER);
    applier(reconcile, policy::failed, context.clone(), context.stores.policies.clone(), Box::pin(queue), config)
        .for_each(|done| async { report(done) })
        .await;
}

/// Says what failed. That an object is gone when its turn comes is how deletions look.
fn report<T, E: ReconcileError>(done: Result<T, controller::Error<E, std::convert::Infallible>>) {
    match done {
        Ok(_) => {}
        Err(controller::Error::ObjectNotFound(object)) => debug!(%object, "gone"),
        // Two changes at once; the later one sees the earlier one when it is tried again.
        Err(controller::Error::ReconcilerFailed(error, object)) if error.is_conflict() => {
            debug!(%object, error = %chain(&error), "changed meanwhile");
        }
        Err(controller::Error::ReconcilerFailed(error, object)) => {
            warn!(%object, error = %chain(&error), "reconciliation failed and is tried again");
        }
        Err(error) => warn!(%error, "a reconciliation could not be run"),
    }
}

async fn sweeps(context: Arc<Context>) {
    let mut due = interval(SWEEP);
    loop {
        due.tick().await;
        context.sweep();
        dataset::remove_orphans(&context).await;
    }
}
