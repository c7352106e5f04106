//! The operator against a real API server without controllers and nodes: what it makes, mends and takes away, what it
//! leaves alone, and what each edit does. What needs pods that run is tested in e2e.
#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of these tests fail the test")]

mod cluster;
mod datasets;
mod deletion;
mod edits;
mod policies;
mod runtimes;
mod server;

use self::{cluster::Cluster, server::Server};

/// Runs tests side by side, each in namespaces of its own; the names of those that failed.
macro_rules! run {
    ($cluster:expr, $($module:ident: $($test:ident),+;)+) => {{
        let mut running = tokio::task::JoinSet::new();
        $($(
            let cluster = $cluster.clone();
            running.spawn(async move {
                let test = tokio::spawn(async move { $module::$test(&cluster).await });
                test.await.is_err().then_some(concat!(stringify!($module), "::", stringify!($test)))
            });
        )+)+
        running.join_all().await.into_iter().flatten().collect::<Vec<_>>()
    }};
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_an_api_server() {
    let server = match Server::start().await {
        Ok(server) => server,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    // Nothing is installed: nothing is in use.
    assert!(server.run(&["guard"]).0);
    let (installed, said) = server.run(&["crds"]);
    assert!(installed, "{said}");
    assert!(server.run(&["crds"]).0, "the second time it is an upgrade");

    let operator = server.operator();
    let cluster = Cluster::new(server.client.clone());
    let failed = run! { cluster,
        runtimes: objects_are_made_and_mended, a_field_that_is_taken_back_is_gone, the_users_own_account_replaces_ours,
            foreign_objects_are_left_alone, pods_make_the_table;
        datasets: a_claim_and_its_volume, a_foreign_claim_is_left_alone, equal_names_in_two_namespaces,
            names_of_63_characters, the_volume_grows_with_the_dataset;
        deletion: the_dataset_before_its_runtime, the_runtime_before_its_dataset, the_claim_before_its_dataset,
            the_claim_is_in_use, workers_that_never_answer, the_finalizer_is_removed_by_force, the_namespace_goes;
        policies: the_next_time_follows_the_schedule, a_schedule_without_times_is_told,
            history_is_kept_within_its_limits;
        edits: of_each_field_of_a_runtime, of_each_field_of_a_dataset;
    };
    assert!(failed.is_empty(), "{}\nfailed: {}", server.said(), failed.join(", "));
    // A namespace that goes is nothing to complain of.
    let complains = |line: &&str| line.contains(deletion::GOING) && line.contains("WARN");
    assert_eq!(server.said().lines().find(complains), None);

    // Deleted while nobody works; the next one finishes it.
    drop(operator);
    datasets::make(&cluster, "away", "left").await;
    let (passed, said) = server.run(&["guard"]);
    assert!(!passed && said.contains("Dataset away/left"), "{said}");
    let operator = server.operator();
    datasets::wait_for_claim(&cluster, "away", "left").await;
    drop(operator);
    deletion::delete(&cluster, "away", "left").await;
    let _operator = server.operator();
    deletion::wait_until_gone(&cluster, "away", "left").await;
}
