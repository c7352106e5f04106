//! The node cache, which other tests do without: they need reads that reach daemons and workers.

use crate::{
    Env, Outcome, TestResult,
    cluster::Cluster,
    data::File,
    figures::{scrape, sum},
    kubectl::text,
    runner::say,
    wait::until,
};

/// Large enough to be passed through, and for a mount of that shape.
const FILES: usize = 4;
const SIZE: usize = 4 << 20;
/// The daemons' ports, of which one serves.
const PORTS: [u16; 2] = [7410, 7411];

/// Switched on under a reader, which then needs nobody but its kernel.
pub fn files_are_read_without_the_daemon(env: &Env, ns: &str) -> TestResult {
    let cluster = match env.own() {
        Ok(cluster) => cluster,
        Err(skipped) => return Ok(skipped),
    };
    let files: Vec<File> = (0..FILES).map(|number| File::new("/shards", &format!("s{number}"), SIZE)).collect();
    env.usual_ready(ns, &files, 1)?;
    env.reader(ns, "reader", Some("node1"), &["--loop", "--direct"])?;
    env.reads_on(ns, "reader", 10)?;
    cluster.install(&env.root, &["fuse.nodeCache.capacity=1Gi"])?;
    let result = passed_through(env, cluster, ns);
    cluster.install(&env.root, &[])?;
    result?;
    // What is passed through stays so, and nobody keeps more.
    env.reads_on(ns, "reader", 10)?;
    Ok(Outcome::Passed)
}

fn passed_through(env: &Env, cluster: &Cluster, ns: &str) -> anyhow::Result<()> {
    let find = ["find", "/var/lib/forebay/node-cache", "-size", "4096k", "-not", "-path", "*/filling/*"];
    let kept = until("the files are in the node cache", 90, || Ok(cluster.on(1, &find)?.lines().count() == FILES));
    if kept.is_err() {
        say!("{}", cluster.on(1, &["df", "/var/lib/forebay"])?);
        metrics(env)?
            .lines()
            .filter(|line| line.starts_with("forebay_fuse_node_cache"))
            .for_each(|line| say!("{line}"));
    }
    kept?;
    // What was open before.
    env.reads_on(ns, "reader", FILES as u64)?;
    let before = requests(env, ns)?;
    let seen = env.reads_on(ns, "reader", 100)?;
    let more = requests(env, ns)? - before;
    say!("{more} reads reached the daemon; longest read {:.3} s", seen.longest);
    anyhow::ensure!(more == 0.0, "{more} reads of complete files reached the daemon");

    // Neither workers nor daemons are needed to read on.
    env.kubectl.run(&["--namespace", ns, "delete", "pod", "cache-forebay-0", "--wait=false"])?;
    env.reads_on(ns, "reader", 100)?;
    Ok(())
}

/// Reads that reached the daemons of the first node, for the Dataset.
fn requests(env: &Env, ns: &str) -> anyhow::Result<f64> {
    let of = |line: &str| line.contains(&format!("dataset=\"{ns}/data\"")) && line.contains("operation=\"read\"");
    Ok(sum(&metrics(env)?, |line| line.starts_with("forebay_fuse_requests_total{") && of(line)))
}

/// What both daemons of the first node say.
fn metrics(env: &Env) -> anyhow::Result<String> {
    let pods = env.kubectl.list(&env.system, "pods", "app.kubernetes.io/component=fuse")?;
    let mut all = String::new();
    for pod in pods.iter().filter(|pod| pod["spec"]["nodeName"] == "node1") {
        for port in PORTS {
            all += &scrape(env, &text(&pod["metadata"]["name"]), port)?;
        }
    }
    Ok(all)
}
