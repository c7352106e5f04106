//! The tests, by topic; the longest first, where several run at a time.

mod admission;
mod api;
mod chart;
mod health;
mod lifecycle;
mod node_cache;
mod outages;
mod preload;
mod reads;
mod sources;
mod survival;

use crate::{Company, Test};

macro_rules! tests {
    ($($company:ident { $($topic:ident: $($name:ident),+;)+ })+) => {
        /// All of them.
        pub const ALL: &[Test] = &[$($($(
            Test { name: stringify!($name), company: Company::$company, run: $topic::$name },
        )+)+)+];
    };
}

tests! {
    SideBySide {
        lifecycle: objects_go_in_every_order, long_names_and_equal_names, a_foreign_claim_is_not_adopted;
        admission: edits_take_effect_or_are_refused, invalid_specs_are_refused_with_the_field;
        preload: preloads_start_by_each_trigger;
        reads: a_pod_reads_verified_bytes, two_nodes_share_one_read_of_the_source, an_inline_volume_reads, a_stranger_gets_nothing;
        api: kubectl_explains_waits_scales_and_shows, verbs_work_as_a_kubectl_plugin, volume_stats_reach_the_kubelet;
        sources: sources_come_and_go_under_readers, a_snapshot_is_refreshed_on_request, wrong_secrets_buckets_and_endpoints_are_named_and_recover, an_impossible_tier_is_named_and_recovers;
        survival: a_worker_pod_is_deleted, workers_scale_under_readers;
        health: volume_health_reaches_the_pod;
        chart: the_examples_work;
    }
    Alone {
        survival: the_daemon_is_killed, the_daemon_pod_is_deleted, the_node_plugin_restarts, the_operator_is_deleted;
        lifecycle: objects_go_while_the_operator_is_away;
        preload: a_preload_outlives_who_drives_it;
        outages: no_pod_is_unkillable, a_node_loses_power, the_api_server_is_away;
        node_cache: files_are_read_without_the_daemon;
        chart: the_quickstart_word_by_word, uninstalling_is_refused_while_datasets_exist;
    }
}
