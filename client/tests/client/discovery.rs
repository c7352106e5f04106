//! Workers that are found by way of a name.

use std::time::{Duration, Instant};

use forebay_client::{Client, ClientError};
use forebay_protocol::{
    handshake::RuntimeKey,
    table::WorkerTable,
    worker::{DatasetStatus, StatusResponse},
};

use crate::support::{FakeWorker, MIB, OpenFile, config, dataset_id, eventually, path, table_of, version};

struct Runtime {
    key: RuntimeKey,
    workers: Vec<FakeWorker>,
}

impl Runtime {
    async fn start(count: usize) -> Self {
        let key = RuntimeKey::generate();
        let mut workers = Vec::new();
        for _ in 0..count {
            workers.push(FakeWorker::start(key.clone()).await);
        }
        Self { key, workers }
    }

    /// From now on all workers tell this table.
    fn tell(&self, table: &WorkerTable, uid: &str) {
        for worker in &self.workers {
            *worker.state.names.table.lock() = table.to_wire(uid);
        }
    }

    /// A table of some of the workers.
    fn table(&self, epoch: u64, members: &[usize]) -> WorkerTable {
        let mut table = table_of(epoch, &self.workers);
        table.members = members.iter().map(|index| table.members[*index].clone()).collect();
        table
    }

    /// A client that knows but a name, which leads to this address.
    fn client(&self, address: &str, deadline: Duration) -> Client {
        let port = address.rsplit_once(':').unwrap().1;
        let mut config = config(&self.key);
        config.deadline = deadline;
        Client::of_service(config, format!("localhost:{port}"))
    }
}

fn open(client: &Client, name: &str) -> OpenFile {
    let (path, version) = (path(name), version(8 * MIB));
    let identity = version.identity(dataset_id(), &path);
    OpenFile { reader: client.dataset(dataset_id()).open(path, version), identity, size: 8 * MIB }
}

const PATIENT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn one_worker_leads_to_all_and_a_mention_to_the_next_table() {
    let runtime = Runtime::start(3).await;
    runtime.tell(&runtime.table(4, &[0, 1]), "uid");
    let client = runtime.client(&runtime.workers[2].address, PATIENT);
    open(&client, "/a").check(0, 1 << 20).await;
    assert_eq!((client.members().epoch, client.members().members.len()), (4, 2));
    assert!(runtime.workers[2].requests().is_empty(), "it is not in the table");

    runtime.tell(&runtime.table(5, &[0, 1, 2]), "uid");
    // The usual question is 7.5 s away at least.
    let asked = Instant::now();
    client.note_epoch(5);
    eventually("the next table", || client.members().epoch == 5).await;
    assert!(asked.elapsed() < Duration::from_secs(6));
    // Older ones are late messages.
    runtime.tell(&runtime.table(3, &[0]), "uid");
    client.note_epoch(6);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(client.members().epoch, 5);
}

#[tokio::test]
async fn workers_that_are_not_there_yet_are_waited_for() {
    let mut runtime = Runtime::start(1).await;
    let address = runtime.workers[0].address.clone();
    runtime.workers[0].stop();
    let impatient = runtime.client(&address, Duration::from_millis(300));
    let read = open(&impatient, "/a").reader.read(0, 4096).await;
    assert!(matches!(read, Err(ClientError::Unavailable(_))), "{read:?}");
    let client = runtime.client(&address, PATIENT);
    let file = open(&client, "/a");
    let arrives = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        // At first it knows nobody, as a pod whose operator has not seen it.
        runtime.workers[0].restart().await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        runtime.tell(&runtime.table(1, &[0]), "uid");
    };
    tokio::join!(file.check(0, 1 << 20), arrives);
    // And who gave up once is served as well.
    eventually("the table", || impatient.members().epoch == 1).await;
    open(&impatient, "/a").check(0, 4096).await;
}

#[tokio::test]
async fn the_name_is_asked_when_no_member_answers() {
    let mut runtime = Runtime::start(3).await;
    runtime.tell(&runtime.table(1, &[0, 1]), "uid");
    let client = runtime.client(&runtime.workers[2].address, PATIENT);
    let file = open(&client, "/a");
    file.check(0, 1 << 20).await;
    // All pods were replaced, at other addresses; nobody tells so but who answers to the name.
    runtime.tell(&runtime.table(2, &[2]), "uid");
    runtime.workers[0].stop();
    runtime.workers[1].stop();
    open(&client, "/b").check(0, 1 << 20).await;
    assert_eq!(client.members().epoch, 2);
    assert_eq!(client.metrics().members.len(), 1);
}

#[tokio::test]
async fn a_runtime_made_anew_begins_anew() {
    let mut runtime = Runtime::start(2).await;
    runtime.tell(&runtime.table(40, &[0]), "first");
    let client = runtime.client(&runtime.workers[1].address, PATIENT);
    open(&client, "/a").check(0, 1 << 20).await;
    client.note_epoch(41);
    runtime.workers[0].stop();
    runtime.tell(&runtime.table(1, &[1]), "second");
    open(&client, "/b").check(0, 1 << 20).await;
    assert_eq!((client.members().epoch, client.metrics().highest_epoch), (1, 1));
    // From here on its epochs count.
    runtime.tell(&runtime.table(2, &[0, 1]), "second");
    client.note_epoch(2);
    eventually("the next table", || client.members().epoch == 2).await;
}

#[tokio::test]
async fn a_probe_tells_who_answers_and_what_they_say() {
    let mut runtime = Runtime::start(3).await;
    let dataset = DatasetStatus {
        dataset: dataset_id().to_bytes(),
        namespace: "ns".into(),
        name: "data".into(),
        source_problem: "no such bucket".into(),
        ..Default::default()
    };
    let status = StatusResponse { table_epoch: 2, datasets: vec![dataset], ..Default::default() };
    *runtime.workers[0].state.names.status.lock() = status;
    runtime.tell(&runtime.table(1, &[0, 1, 2]), "uid");
    let client = runtime.client(&runtime.workers[0].address, PATIENT);
    eventually("a table", || client.members().epoch == 1).await;
    runtime.workers[2].stop();
    // What a worker says of the table makes the client ask for it.
    runtime.tell(&runtime.table(2, &[0, 1, 2]), "uid");

    let mut probe = client.probe(dataset_id()).await;
    assert_eq!((probe.serving, probe.table_problem), (3, None));
    probe.members.sort_by(|a, b| a.name.cmp(&b.name));
    let [first, second, third] = &probe.members[..] else { panic!("{:?}", probe.members) };
    let told = first.answer.as_ref().unwrap().as_ref().unwrap();
    assert_eq!(told.datasets[0].source_problem, "no such bucket");
    assert_eq!(second.answer, Ok(None), "it does not serve this dataset");
    assert!(third.answer.is_err());
    eventually("the table that was mentioned", || client.members().epoch == 2).await;

    assert_eq!(client.find_dataset("ns", "data").await, Some(dataset_id()));
    assert_eq!(client.find_dataset("ns", "other").await, None);
}

#[tokio::test]
async fn a_name_without_address_is_a_problem_that_is_told() {
    let runtime = Runtime::start(1).await;
    let client = Client::of_service(config(&runtime.key), "no-such-host.invalid:7400".into());
    let mut problem = None;
    for _ in 0..100 {
        problem = client.probe(dataset_id()).await.table_problem;
        if problem.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(problem.unwrap().contains("no-such-host.invalid"));
}
