//! Loads of what a file of the dataset names.

use bytes::Bytes;
use forebay_protocol::worker::{LoadProgress, LoadRequest, Selection, selection};
use futures::future::join_all;
use tonic::{Code, Status};

use crate::harness::Cluster;

const SIZE: u64 = 3000;

async fn start(workers: usize) -> Cluster {
    let cluster = Cluster::start(workers).await;
    for file in 0..60 {
        cluster.put(&format!("train/{}/a b:{file} ü", file % 3), file, SIZE).await;
    }
    cluster
}

async fn put_list(cluster: &Cluster, text: String) {
    cluster.store.put("data", "lists/one.txt", text.into()).await;
    cluster.refresh("/").await;
}

async fn load(cluster: &Cluster, worker: usize, path: &'static str, at: &str) -> Result<LoadProgress, Status> {
    let mut control = cluster.client.control(&cluster.workers[worker].options.name).await.unwrap();
    let manifest = Some(selection::Manifest::ManifestPath(at.to_owned().into()));
    let selection = Selection { manifest, ..Selection::default() };
    let request = LoadRequest {
        dataset: cluster.id.to_bytes(),
        path: Bytes::from_static(path.as_bytes()),
        selection: Some(selection),
        ..LoadRequest::default()
    };
    let mut stream = control.load(request).await?.into_inner();
    let mut last = LoadProgress::default();
    while let Some(progress) = stream.message().await? {
        last = progress;
    }
    assert!(last.finished);
    Ok(last)
}

/// Sums over all workers: files in all, done, failed, and the reasons.
async fn load_all(cluster: &Cluster, path: &'static str) -> (u64, u64, u64, Vec<String>) {
    let loads = (0..cluster.workers.len()).map(|worker| load(cluster, worker, path, "/lists/one.txt"));
    let mut sum = (0, 0, 0, Vec::new());
    for progress in join_all(loads).await {
        let progress = progress.unwrap();
        sum.0 += progress.total_files;
        sum.1 += progress.done_files;
        sum.2 += progress.failed_files;
        sum.3.extend(progress.failures);
    }
    sum.3.sort();
    sum
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_manifest_names_is_loaded_and_nothing_else() {
    let cluster = start(3).await;
    // A directory, one of its files, single files, one of them twice, and what is not there.
    let list =
        "train/1\ntrain/1/a b:1 ü\r\n/train/0/a b:3 ü\n\ntrain/0/a b:3 ü\ntrain/2/a b:5 ü\ntrain/9/x\ntrain/0/none\n";
    put_list(&cluster, list.to_owned()).await;
    let (total, done, failed, failures) = load_all(&cluster, "/").await;
    assert_eq!((total, done, failed), (24, 22, 2));
    let missing = |path: &str| format!("{path}: the manifest names it, and it is not there");
    assert_eq!(failures, [missing("/train/0/none"), missing("/train/9/x")]);
    // The list itself is read through the workers, too.
    assert_eq!(cluster.store.counters().gets, 22 + 1);
    let (total, done, failed, _) = load_all(&cluster, "/train/2").await;
    assert_eq!((total, done, failed), (1, 1, 0), "only what is below the path");
    assert_eq!(cluster.store.counters().gets, 22 + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_is_loaded_in_its_order() {
    let cluster = start(1).await;
    let order: Vec<u64> = (0..60).map(|at| (at * 37 + 11) % 60).collect();
    let lines = order.iter().map(|file| format!("train/{}/a b:{file} ü\n", file % 3));
    let text: Bytes = lines.collect::<String>().into();
    cluster.refresh("/").await;
    // Slow, so that what is asked for can be seen: up to 32 chunks wait for their turn at once.
    let slow = forebay_protocol::worker::LoadTerms { requests_per_second: 5, ..Default::default() };
    let mut control = cluster.client.control("w-0").await.unwrap();
    let manifest = Some(selection::Manifest::ManifestText(text));
    let selection = Selection { manifest, ..Selection::default() };
    let request = LoadRequest {
        dataset: cluster.id.to_bytes(),
        path: Bytes::from_static(b"/"),
        selection: Some(selection),
        terms: Some(slow),
        ..LoadRequest::default()
    };
    let mut stream = control.load(request).await.unwrap().into_inner();
    loop {
        let progress = stream.message().await.unwrap().unwrap();
        if progress.done_files >= 8 {
            break;
        }
    }
    drop(stream);
    // Those at its beginning are there, those at its end are not.
    let asked: Vec<bool> =
        order.iter().map(|file| cluster.store.bytes_of(&format!("train/{}/a b:{file} ü", file % 3)) > 0).collect();
    assert!(asked[..32].iter().any(|asked| *asked) && !asked[45..].iter().any(|asked| *asked), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_that_cannot_be_used_is_named() {
    let cluster = start(1).await;
    put_list(&cluster, "train/1\ntrain/../2\n".to_owned()).await;
    let refusal = async |at: &str| load(&cluster, 0, "/", at).await.unwrap_err();
    for (at, why) in [
        ("/lists/one.txt", "the manifest /lists/one.txt, line 2: "),
        ("/lists/two.txt", "the manifest /lists/two.txt is not there"),
        ("/train/1", "the manifest /train/1 is a directory"),
        ("/", "the root is no manifest"),
        ("a", "path of the manifest: "),
    ] {
        let status = refusal(at).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(why), "{status}");
    }
    cluster.put_virtual("lists/huge", 1, 65 << 20);
    cluster.refresh("/").await;
    assert!(refusal("/lists/huge").await.message().ends_with("split it"));
    assert_eq!(cluster.store.counters().gets, 1);
}
