//! Whom to ask next.
//!
//! A [`Rotation`] goes through the order of a key, healthy members first; only when nobody is healthy are the others
//! asked, all of them. A full round without success ends in a pause (50 ms doubling to 1 s, jittered, cut short when a
//! member comes up), then the newest table is looked at again. It ends at the deadline and says what was last heard.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    client::Inner,
    error::ClientError,
    health::jittered,
    members::{Member, count},
};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// 50 ms * 2^5 is above 1 s.
const MAX_DOUBLINGS: u32 = 5;
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// An error this shortly before the deadline is the deadline's.
const CUT_SHORT: Duration = Duration::from_millis(100);

pub(crate) struct Rotation<'a> {
    client: &'a Inner,
    key: u64,
    deadline: Instant,
    /// The first so many members of the order are asked in turns.
    turns: usize,
    rounds: u32,
    queue: VecDeque<Arc<Member>>,
    /// Whether this round has only healthy members.
    healthy: bool,
    last_error: Option<String>,
    /// Members that are asked only when nobody else is left.
    distrusted: Vec<Arc<Member>>,
}

impl<'a> Rotation<'a> {
    pub(crate) fn new(client: &'a Inner, key: u64, deadline: Instant) -> Self {
        Self {
            client,
            key,
            deadline,
            turns: 1,
            rounds: 0,
            queue: VecDeque::new(),
            healthy: false,
            last_error: None,
            distrusted: Vec::new(),
        }
    }

    /// Begins with any of the first `workers`.
    pub(crate) fn in_turns(self, workers: usize) -> Self {
        Self { turns: workers.max(1), ..self }
    }

    /// The next member to ask, or that the deadline passed.
    pub(crate) async fn next(&mut self) -> Result<Arc<Member>, ClientError> {
        loop {
            if Instant::now() >= self.deadline {
                return Err(self.expired());
            }
            while let Some(member) = self.queue.pop_front() {
                let gone = member.closed.is_cancelled() || (self.healthy && member.health.is_down());
                if !gone {
                    return Ok(member);
                }
                if !member.closed.is_cancelled() {
                    let error = member.health.condition().error;
                    self.last_error = Some(format!("worker {}: {error}", member.name));
                }
            }
            if self.rounds > 0 {
                count(&self.client.counters.retries, 1);
                self.pause().await;
            }
            self.refill();
            self.rounds += 1;
        }
    }

    async fn pause(&self) {
        let pause = (FIRST_PAUSE * 2u32.pow(self.rounds.min(MAX_DOUBLINGS))).min(LAST_PAUSE);
        let until = (Instant::now() + jittered(pause)).min(self.deadline);
        tokio::select! {
            () = tokio::time::sleep_until(until) => {}
            () = self.client.members.recovered.notified() => {}
        }
    }

    fn refill(&mut self) {
        let mut order = self.client.members.snapshot().order(self.key);
        let turns = self.turns.min(order.len());
        if turns > 1 {
            order[..turns].rotate_left(rand::random_range(0..turns));
        }
        if order.is_empty() {
            self.last_error = Some("the worker table is empty".into());
        }
        let good = order.iter().filter(|member| !member.health.is_down() && !self.distrusts(member));
        self.queue = good.cloned().collect();
        self.healthy = !self.queue.is_empty();
        if self.queue.is_empty() {
            self.queue = order.into();
            self.client.stranded.send_modify(|times| *times += 1);
        }
    }

    /// This member did not do it.
    pub(crate) fn failed(&mut self, member: &Member, error: &str) {
        count(&self.client.counters.failovers, 1);
        count(&member.counters.failovers, 1);
        // What only the deadline cut short says less than what was heard before.
        if self.last_error.is_none() || Instant::now() + CUT_SHORT < self.deadline {
            self.last_error = Some(format!("worker {}: {error}", member.name));
        }
    }

    /// This member gave a wrong answer.
    pub(crate) fn distrust(&mut self, member: &Arc<Member>) {
        self.distrusted.push(member.clone());
    }

    /// Whether this member gave a wrong answer before.
    pub(crate) fn distrusts(&self, member: &Arc<Member>) -> bool {
        self.distrusted.iter().any(|other| Arc::ptr_eq(other, member))
    }

    /// The failure of a call whose deadline passed.
    pub(crate) fn expired(&self) -> ClientError {
        let deadline = self.client.config.deadline;
        ClientError::Unavailable(match &self.last_error {
            Some(error) => format!("no worker could answer within {deadline:?}; last: {error}"),
            None => format!("no answer within {deadline:?}"),
        })
    }
}
