//! Passes over local files and through the mount in turns, and what their ratio is.

use std::fmt::Write as _;

use crate::{
    Bench,
    job::Work,
    measure::Role,
    report::median,
    served::{self, Pass},
};

/// Rounds of each comparison; the median counts.
pub const ROUNDS: u32 = 3;
/// Of those that take a moment only.
const SHORT_ROUNDS: u32 = 9;

/// Pairs of passes, each pair made one right after the other.
#[derive(Debug, Default)]
pub struct Rounds {
    pairs: Vec<Pair>,
}

/// One round.
#[derive(Debug)]
struct Pair {
    direct: Pass,
    mounted: Pass,
}

impl Rounds {
    /// Interleaves passes, all by one reader and on the shared CPU. Progress is told under `name`.
    pub async fn run(
        bench: &Bench,
        name: &str,
        direct: impl AsyncFn() -> anyhow::Result<Pass>,
        mounted: impl AsyncFnMut() -> anyhow::Result<Pass>,
    ) -> anyhow::Result<Self> {
        Self::of_rounds(ROUNDS, bench, name, direct, mounted).await
    }

    async fn of_rounds(
        count: u32,
        bench: &Bench,
        name: &str,
        direct: impl AsyncFn() -> anyhow::Result<Pass>,
        mut mounted: impl AsyncFnMut() -> anyhow::Result<Pass>,
    ) -> anyhow::Result<Self> {
        let mut rounds = Self::default();
        for round in 1..=count {
            let direct = direct().await?;
            let mounted = mounted().await?;
            bench.say(format_args!(
                "{name}, round {round}: wall {:.2} / {:.2} s, CPU {:.2} / {:.2} s",
                direct.done.seconds,
                mounted.done.seconds,
                direct.total(),
                mounted.total()
            ));
            rounds.pairs.push(Pair { direct, mounted });
        }
        Ok(rounds)
    }

    /// Of passes that were made in turns elsewhere.
    pub fn of(direct: Vec<Pass>, mounted: Vec<Pass>) -> Self {
        let pairs = direct.into_iter().zip(mounted).map(|(direct, mounted)| Pair { direct, mounted });
        Self { pairs: pairs.collect() }
    }

    /// The same work on warm caches, on the shared CPU: the usual case.
    pub async fn warm(
        bench: &Bench,
        name: &str,
        served: &served::Served,
        direct: &Work,
        mounted: &Work,
    ) -> anyhow::Result<Self> {
        let cpu = Some(bench.cpu);
        Self::of_rounds(
            SHORT_ROUNDS,
            bench,
            name,
            async || served::direct(vec![direct.clone()], cpu).await,
            async || served.pass(vec![mounted.clone()], cpu).await,
        )
        .await
    }

    /// CPU of everybody over CPU of a reader of local files.
    pub fn cpu(&self) -> f64 {
        self.median(|pair| pair.mounted.total() / pair.direct.total())
    }

    /// Time over time with local files.
    pub fn wall(&self) -> f64 {
        self.median(|pair| pair.mounted.done.seconds / pair.direct.done.seconds)
    }

    /// Throughput over that with local files.
    pub fn throughput(&self) -> f64 {
        self.median(|pair| pair.direct.done.seconds / pair.mounted.done.seconds)
    }

    /// The most requests that any round sent to a daemon.
    pub fn requests(&self) -> u64 {
        self.pairs.iter().map(|pair| pair.mounted.requests).max().unwrap_or_default()
    }

    fn median(&self, of: impl Fn(&Pair) -> f64) -> f64 {
        median(self.pairs.iter().map(of))
    }

    /// Medians of everything, for people.
    pub fn detail(&self) -> String {
        let mut text = format!(
            "wall {:.2} s local, {:.2} s mounted ({:.2}x); CPU {:.2} s local, {:.2} s mounted ({:.2}x: reader {:.2}",
            self.median(|pair| pair.direct.done.seconds),
            self.median(|pair| pair.mounted.done.seconds),
            self.wall(),
            self.median(|pair| pair.direct.total()),
            self.median(|pair| pair.mounted.total()),
            self.cpu(),
            self.median(|pair| pair.mounted.done.cpu),
        );
        for role in Role::ALL {
            // Writing to a string does not fail.
            let _ = write!(text, ", {} {:.2}", role.name(), self.median(|pair| pair.mounted.of(role)));
        }
        text.push(')');
        let bytes = self.median(|pair| pair.mounted.done.bytes as f64);
        if bytes > 0.0 {
            let per_gb = |of: &dyn Fn(&Pair) -> f64| self.median(of) * 1e9 / bytes;
            let (local, mounted) = (per_gb(&|pair| pair.direct.total()), per_gb(&|pair| pair.mounted.total()));
            let _ = write!(text, "; {mounted:.2} CPU s per GB ({local:.2} local)");
        }
        let files = self.median(|pair| pair.mounted.done.files as f64);
        let requests = self.median(|pair| pair.mounted.requests as f64);
        let _ = write!(text, "; {requests} requests");
        if files > 1.0 {
            let _ = write!(text, " ({:.3} a file)", requests / files);
        }
        if let Some(Pair { mounted, .. }) = self.pairs.last() {
            let _ = write!(text, "; {}", memory(mounted));
        }
        text
    }
}

/// Resident memory of each process.
fn memory(pass: &Pass) -> String {
    let of = |role| {
        let each = pass.processes.iter().filter(|process| process.role == role);
        let each: Vec<String> = each.map(|process| (process.rss >> 20).to_string()).collect();
        format!("{} {}", role.name(), each.join(" + "))
    };
    format!("RSS in MiB: {}", Role::ALL.map(of).join(", "))
}
