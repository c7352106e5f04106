//! From a worker to a client, without a mount.

use crate::{
    Bench,
    data::Large,
    job::{self, Work},
    measure::Role,
    report::{Claim, Limit, Report},
    rounds::Rounds,
    served::{self, Served, Setup},
};

const TCP: Claim =
    Claim::new("worker to client over TCP", "GB per CPU second, of a bare sendfile loop", Limit::AtLeast(0.8));
const FD: Claim =
    Claim::new("worker to client on one node by fd", "GB per CPU second, of a local read", Limit::AtLeast(0.8));
/// What is claimed.
pub(super) const CLAIMS: [Claim; 2] = [TCP, FD];

const SIZE: u64 = 1 << 30;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    if bench.wants(&FD) {
        report.unmeasured(&FD, "descriptors are not passed between worker and client yet");
    }
    if !bench.wants(&TCP) {
        return Ok(());
    }
    let dir = bench.directory("transport")?;
    let local = Large {
        path: served::source(dir.path())?.join("large.bin"),
        size: bench.scaled(SIZE).next_multiple_of(1 << 20),
        seed: 6,
    };
    bench.say("writing the file to send");
    job::run(Work::WriteLarge { file: local.clone() }, None).await?;
    let served = Served::start(bench, dir.path(), Setup { workers: 1, ..Setup::default() }).await?;
    served.load().await?;
    job::run(Work::Sequential { file: local.below(served.mount()), verify: true }, None).await?;
    let bare = Work::Sendfile { file: local.clone() };
    let client = Work::Client { state: served.state().to_owned(), file: local };
    // The chunks are in the page cache afterwards.
    job::run(client.clone(), None).await?;
    let cpu = Some(bench.cpu);
    let rounds = Rounds::run(
        bench,
        TCP.row,
        async || served::direct(vec![bare.clone()], cpu).await,
        async || {
            let mut pass = served.pass(vec![client.clone()], cpu).await?;
            // Keeper and daemons have no part in it.
            pass.cpu.retain(|role, _| *role == Role::Worker);
            Ok(pass)
        },
    )
    .await?;
    let detail = format!("'local' is the sendfile loop, sender and receiver; {}", rounds.detail());
    report.measured(&TCP, 1.0 / rounds.cpu(), true, detail);
    served.stop().await
}
