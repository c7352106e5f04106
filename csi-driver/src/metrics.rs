//! Numbers of this process, for `/metrics`.

use std::{fmt, sync::Arc, time::Duration};

use forebay_keeper::{KeeperStatus, Role, VolumeState};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tonic::Code;

use crate::bounded;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: &'static str,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InRole {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    calls: Family<Call, Counter>,
    seconds: Family<Method, Histogram>,
    hanging: Gauge,
    volumes: Family<InState, Gauge>,
    daemons: Family<InRole, Gauge>,
    kills: Family<Cause, Gauge>,
    takeovers: Gauge,
    waiting: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("forebay_csi");
        let calls = Family::<Call, Counter>::default();
        registry.register("calls", "Calls answered, by method and gRPC code", calls.clone());
        // 1 ms to 65 s.
        let seconds = Family::<Method, Histogram>::new_with_constructor(|| {
            Histogram::new((0..9).map(|step| 0.001 * f64::from(1 << (2 * step))))
        });
        let help = "How long calls took, by method";
        registry.register_with_unit("call_duration", help, Unit::Seconds, seconds.clone());
        let hanging = Gauge::default();
        registry.register(
            "hanging_calls",
            "System calls on mounts that were given up and have not returned",
            hanging.clone(),
        );
        let volumes = Family::<InState, Gauge>::default();
        registry.register("volumes", "Volumes that are staged, by state", volumes.clone());
        let daemons = Family::<InRole, Gauge>::default();
        registry.register("daemons", "FUSE daemons that are connected, by role", daemons.clone());
        let kills = Family::<Cause, Gauge>::default();
        registry.register("daemon_kills", "FUSE daemons that were killed since the start, by cause", kills.clone());
        let takeovers = Gauge::default();
        registry.register(
            "takeovers",
            "Times that another daemon took over one of the staged volumes",
            takeovers.clone(),
        );
        let waiting = Gauge::default();
        registry.register("waiting_requests", "Requests of staged volumes that are not answered", waiting.clone());
        Self { registry, calls, seconds, hanging, volumes, daemons, kills, takeovers, waiting }
    }
}

impl Metrics {
    /// Shared by all that count.
    pub fn shared() -> Arc<Self> {
        Arc::default()
    }

    /// A call was answered.
    pub fn call(&self, method: &'static str, code: Code, took: Duration) {
        self.calls.get_or_create(&Call { method, code: format!("{code:?}") }).inc();
        self.seconds.get_or_create(&Method { method }).observe(took.as_secs_f64());
    }

    /// In the OpenMetrics text format, with what the keeper says now.
    pub fn text(&self, status: &KeeperStatus) -> Result<String, fmt::Error> {
        self.hanging.set(to_i64(bounded::hanging()));
        for (state, name) in [
            (VolumeState::Returning, "returning"),
            (VolumeState::Vacant, "vacant"),
            (VolumeState::Attaching, "attaching"),
            (VolumeState::Served, "served"),
            (VolumeState::Aborted, "aborted"),
        ] {
            let count = status.volumes.iter().filter(|volume| volume.state == state).count();
            self.volumes.get_or_create(&InState { state: name }).set(to_i64(count));
        }
        for (role, name) in [(Role::Active, "active"), (Role::Standby, "standby")] {
            let count = status.daemons.iter().filter(|daemon| daemon.role == role).count();
            self.daemons.get_or_create(&InRole { role: name }).set(to_i64(count));
        }
        for (cause, count) in [("silent", status.kills_silent), ("other", status.kills_other)] {
            self.kills.get_or_create(&Cause { cause }).set(to_i64(count));
        }
        self.takeovers.set(to_i64(status.volumes.iter().map(|volume| volume.takeovers).sum::<u64>()));
        self.waiting.set(to_i64(status.volumes.iter().filter_map(|volume| volume.waiting).sum::<u64>()));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn to_i64<T>(value: T) -> i64
where
    i64: TryFrom<T>,
{
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted() {
        let metrics = Metrics::default();
        metrics.call("NodeStageVolume", Code::Ok, Duration::from_millis(3));
        metrics.call("NodeStageVolume", Code::Aborted, Duration::from_millis(3));
        let text = metrics.text(&KeeperStatus::default()).unwrap();
        assert!(text.contains("forebay_csi_calls_total{method=\"NodeStageVolume\",code=\"Aborted\"} 1"), "{text}");
        assert!(
            text.contains("forebay_csi_call_duration_seconds_bucket{le=\"0.004\",method=\"NodeStageVolume\"} 2"),
            "{text}"
        );
        assert!(text.contains("forebay_csi_daemons{role=\"active\"} 0"), "{text}");
    }
}
