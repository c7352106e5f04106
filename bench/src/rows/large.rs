//! One file of 1 GiB, complete in the node cache.

use crate::{
    Bench,
    data::Large,
    job::{self, Work},
    measure,
    report::{Claim, Limit, Report},
    rounds::Rounds,
    served::{self, Served, Setup},
};

const SEQUENTIAL: Claim = Claim::new("sequential 1 GiB", "warm, throughput", Limit::AtLeast(0.95));
const MMAP: Claim = Claim::new("mmap 1 GiB", "warm, throughput", Limit::AtLeast(0.95));
const RANDOM_4K: Claim = Claim::new("random 4 KiB", "warm, throughput", Limit::AtLeast(0.9));
const RANDOM_128K: Claim = Claim::new("random 128 KiB", "warm, throughput", Limit::AtLeast(0.9));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 4] = [SEQUENTIAL, MMAP, RANDOM_4K, RANDOM_128K];

const SIZE: u64 = 1 << 30;
/// A way to read a file.
type Kind<'a> = &'a dyn Fn(&Large) -> Work;
/// Random reads: enough for a quarter of a second.
const READS_4K: u64 = 100_000;
const READS_128K: u64 = 8_000;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let dir = bench.directory("large")?;
    let local = Large {
        path: served::source(dir.path())?.join("large.bin"),
        size: bench.scaled(SIZE).next_multiple_of(1 << 20),
        seed: 1,
    };
    bench.say("writing the large file");
    job::run(Work::WriteLarge { file: local.clone() }, None).await?;
    let served = Served::start(bench, dir.path(), Setup { shape: "Large", ..Setup::default() }).await?;
    served.load().await?;
    let mounted = local.below(served.mount());
    bench.say("checking every byte of it through the mount");
    job::run(Work::Sequential { file: mounted.clone(), verify: true }, None).await?;
    bench.say("waiting until it is in the node cache");
    served.kept(1).await?;
    // Both come into memory in the same way: how large the kernel's folios are depends on who wrote them.
    measure::forget(2 * local.size).await?;
    for file in [&mounted, &local] {
        job::run(Work::Sequential { file: file.clone(), verify: false }, None).await?;
    }

    let works: [(Claim, Kind<'_>); 4] = [
        (SEQUENTIAL, &|file| Work::Sequential { file: file.clone(), verify: false }),
        (MMAP, &|file| Work::Mmap { file: file.clone() }),
        (RANDOM_4K, &|file| Work::Random { file: file.clone(), block: 4 << 10, count: bench.scaled(READS_4K) }),
        (RANDOM_128K, &|file| Work::Random { file: file.clone(), block: 128 << 10, count: bench.scaled(READS_128K) }),
    ];
    for (claim, work) in works {
        if !bench.wants(&claim) {
            continue;
        }
        let rounds = Rounds::warm(bench, claim.row, &served, &work(&local), &work(&mounted)).await?;
        let detail = format!("complete in the node cache; {}", rounds.detail());
        report.measured(&claim, rounds.throughput(), true, detail);
    }
    served.stop().await
}
