//! Changes of a dataset, merged from all workers.
//!
//! Each worker numbers its invalidations. A follower for each member resumes after the last number it saw, so that a
//! broken connection loses nothing; it emits a Reset when numbers are missing or the worker is another incarnation, and
//! at its first contact. A change of ownership (members or weights of the table) is a Reset, too: who owned a directory
//! may have told changes to nobody.
//!
//! Resets that nobody took yet are merged into one. Followers wait while events are not taken: workers hold what is not
//! sent, and say Reset when they cannot.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use forebay_protocol::{
    DatasetPath,
    table::{MemberState, WorkerTable},
    worker::{Invalidation, WatchRequest, invalidation::What, metadata_client::MetadataClient},
};
use futures::Stream;
use parking_lot::Mutex;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use crate::{dataset::DatasetClient, health::jittered, members::Member};

/// Events that wait to be taken.
const QUEUE: usize = 256;
/// Workers send heartbeats more often than this; silence means a dead stream.
const SILENCE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Something to forget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Entries of a directory were added, changed or removed.
    Changed {
        /// The directory.
        directory: DatasetPath,
        /// Their names; empty when all of them may have changed.
        names: Vec<Bytes>,
    },
    /// Changes may have been missed: everything that is remembered of the dataset may be wrong.
    Reset,
}

/// A stream of changes. It never ends by itself.
pub struct Watch {
    events: mpsc::Receiver<Event>,
    reset_waits: Arc<AtomicBool>,
    _supervisor: AbortOnDropHandle<()>,
}

impl Stream for Watch {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let event = std::task::ready!(self.events.poll_recv(context));
        if event == Some(Event::Reset) {
            self.reset_waits.store(false, Ordering::Release);
        }
        Poll::Ready(event)
    }
}

#[derive(Clone)]
struct Outlet {
    events: mpsc::Sender<Event>,
    reset_waits: Arc<AtomicBool>,
}

impl Outlet {
    async fn send(&self, event: Event) {
        // A Reset that was not taken yet covers this one.
        if event == Event::Reset && self.reset_waits.swap(true, Ordering::AcqRel) {
            return;
        }
        // Nobody listens: the supervisor is about to be aborted.
        let _ = self.events.send(event).await;
    }
}

pub(crate) fn start(dataset: DatasetClient) -> Watch {
    let (events, receiver) = mpsc::channel(QUEUE);
    let reset_waits = Arc::new(AtomicBool::new(false));
    let outlet = Outlet { events, reset_waits: reset_waits.clone() };
    let supervisor = AbortOnDropHandle::new(tokio::spawn(supervise(dataset, outlet)));
    Watch { events: receiver, reset_waits, _supervisor: supervisor }
}

struct Follower {
    member: Arc<Member>,
    cursor: Arc<Mutex<Cursor>>,
    _task: AbortOnDropHandle<()>,
}

/// Keeps a follower for each member of the table.
async fn supervise(dataset: DatasetClient, outlet: Outlet) {
    let mut tables = dataset.client.members.tables();
    let mut followers: HashMap<String, Follower> = HashMap::new();
    let mut owners: Option<Vec<(String, u32)>> = None;
    loop {
        tables.mark_unchanged();
        let snapshot = dataset.client.members.snapshot();
        followers.retain(|name, _| snapshot.find(name).is_some());
        for member in &snapshot.members {
            let known = followers.get(&member.name);
            if known.is_some_and(|follower| Arc::ptr_eq(&follower.member, member)) {
                continue;
            }
            // A worker that moved to another address may well be the same incarnation.
            let cursor = known.map(|follower| follower.cursor.clone()).unwrap_or_default();
            let task: JoinHandle<()> =
                tokio::spawn(follow(dataset.clone(), member.clone(), cursor.clone(), outlet.clone()));
            let follower = Follower { member: member.clone(), cursor, _task: AbortOnDropHandle::new(task) };
            followers.insert(member.name.clone(), follower);
        }
        let now = ownership(&snapshot.table);
        if owners.as_ref().is_some_and(|before| *before != now) {
            outlet.send(Event::Reset).await;
        }
        owners = Some(now);
        if tables.changed().await.is_err() {
            // Nobody feeds the table any more; the last one stays.
            std::future::pending::<()>().await;
        }
    }
}

/// What decides who owns what.
fn ownership(table: &WorkerTable) -> Vec<(String, u32)> {
    let serving = table.members.iter().filter(|member| member.state == MemberState::Serving);
    let mut owners: Vec<_> = serving.map(|member| (member.name.clone(), member.weight)).collect();
    owners.sort();
    owners
}

async fn follow(dataset: DatasetClient, member: Arc<Member>, cursor: Arc<Mutex<Cursor>>, outlet: Outlet) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut heard = false;
        let error = match stream(&dataset, &member, &cursor, &outlet, &mut heard).await {
            Ok(()) => "the stream ended".to_owned(),
            Err(error) => error,
        };
        if heard {
            pause = FIRST_PAUSE;
        }
        tracing::debug!(worker = member.name, dataset = %dataset.id, error, "watch is made again");
        tokio::select! {
            () = tokio::time::sleep(jittered(pause)) => {}
            () = dataset.client.members.recovered.notified() => {}
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn stream(
    dataset: &DatasetClient,
    member: &Arc<Member>,
    cursor: &Mutex<Cursor>,
    outlet: &Outlet,
    heard: &mut bool,
) -> Result<(), String> {
    let broken = |status: tonic::Status| member.refused(&status);
    let silent = |_| format!("nothing was heard for {SILENCE:?}");
    let channel = member.channel().await.map_err(|error| error.to_string())?;
    let Cursor { incarnation, number } = *cursor.lock();
    let request = WatchRequest { dataset: dataset.id.to_bytes(), incarnation, after: number };
    let mut metadata = MetadataClient::new(channel);
    let answer = tokio::time::timeout(SILENCE, metadata.watch(request)).await.map_err(silent)?;
    let mut messages = answer.map_err(broken)?.into_inner();
    loop {
        let message = tokio::time::timeout(SILENCE, messages.message()).await.map_err(silent)?.map_err(broken)?;
        let Some(message) = message else { return Ok(()) };
        *heard = true;
        dataset.adopt(message.generation);
        // The event is out before the number counts as seen: a follower that is replaced in between repeats it.
        let mut next = *cursor.lock();
        if let Some(event) = next.advance(message) {
            outlet.send(event).await;
        }
        *cursor.lock() = next;
    }
}

/// The last number seen of an incarnation; zero at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cursor {
    incarnation: u64,
    number: u64,
}

impl Cursor {
    /// Takes note of a message; the event that it means.
    fn advance(&mut self, message: Invalidation) -> Option<Event> {
        let Invalidation { incarnation, number, generation: _, what } = message;
        let before = std::mem::replace(self, Self { incarnation, number });
        if before.incarnation != incarnation {
            return Some(Event::Reset);
        }
        match what {
            Some(What::Reset(_)) | None => Some(Event::Reset),
            Some(What::Heartbeat(_)) if number == before.number => None,
            Some(What::Heartbeat(_)) => Some(Event::Reset),
            Some(What::Directory(changed)) => {
                if number <= before.number {
                    // Seen already.
                    *self = before;
                    return None;
                }
                let directory = DatasetPath::parse(changed.directory).ok().filter(|_| number == before.number + 1);
                Some(match directory {
                    Some(directory) => Event::Changed { directory, names: changed.names },
                    None => Event::Reset,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_protocol::worker::invalidation::{DirectoryChanged, Heartbeat, Reset};

    use super::*;

    fn message(incarnation: u64, number: u64, what: What) -> Invalidation {
        Invalidation { incarnation, number, generation: 0, what: Some(what) }
    }

    fn changed(number: u64) -> Invalidation {
        let directory = DirectoryChanged { directory: "/d".into(), names: vec!["n".into()] };
        message(7, number, What::Directory(directory))
    }

    fn heartbeat(number: u64) -> Invalidation {
        message(7, number, What::Heartbeat(Heartbeat {}))
    }

    #[test]
    fn numbers_in_order_are_changes_and_anything_else_a_reset() {
        let mut cursor = Cursor::default();
        let event = Event::Changed { directory: DatasetPath::parse("/d").unwrap(), names: vec!["n".into()] };
        assert_eq!(cursor.advance(message(7, 3, What::Reset(Reset {}))), Some(Event::Reset));
        assert_eq!(cursor.advance(changed(4)), Some(event.clone()));
        assert_eq!(cursor.advance(heartbeat(4)), None);
        assert_eq!(cursor.advance(changed(4)), None, "a repetition");
        assert_eq!(cursor.advance(changed(5)), Some(event.clone()));
        assert_eq!(cursor.advance(changed(7)), Some(Event::Reset), "a gap");
        assert_eq!(cursor.advance(changed(8)), Some(event));
        assert_eq!(cursor.advance(heartbeat(9)), Some(Event::Reset), "a gap that a heartbeat shows");
        assert_eq!(cursor, Cursor { incarnation: 7, number: 9 });
        assert_eq!(cursor.advance(message(8, 9, What::Heartbeat(Heartbeat {}))), Some(Event::Reset), "a restart");
    }
}
