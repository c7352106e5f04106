//! Faults to inject: which requests, when, and what happens to them.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// GET of an object.
    Get,
    /// HEAD of an object.
    Head,
    /// GET of a listing; its key is the prefix that is listed.
    List,
    /// PUT of an object.
    Put,
    /// Anything else.
    Other,
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// It is answered with this status.
    Status(u16),
    /// It is answered with this status and `Retry-After`, in seconds.
    RetryAfter(u16, u64),
    /// It waits before it is looked at.
    Delay(Duration),
    /// The body stops after so many bytes, for so long, then goes on.
    StallBody {
        /// Bytes sent before.
        after: u64,
        /// How long nothing is sent.
        stall: Duration,
    },
    /// The connection is closed after so many bytes of the body.
    Truncate {
        /// Bytes sent before.
        after: u64,
    },
    /// The connection is reset (RST): before the answer, or after so many bytes of the body.
    Reset {
        /// Bytes of the body sent before; `None`: nothing is answered.
        after: Option<u64>,
    },
    /// A header of the answer is set.
    Header(&'static str, String),
    /// If-Match and the other conditions are not looked at, as servers do that do not know them.
    IgnoreConditions,
}

/// A fault: an action and the requests it meets. Made with [`Fault::new`], which meets all.
#[derive(Debug, Clone)]
pub struct Fault {
    action: Action,
    verb: Option<Verb>,
    key: String,
    skip: u64,
    times: u64,
    probability: f64,
}

impl Fault {
    /// A fault that meets every request.
    pub fn new(action: Action) -> Self {
        Self { action, verb: None, key: String::new(), skip: 0, times: u64::MAX, probability: 1.0 }
    }

    /// Only requests of this verb.
    pub fn on(mut self, verb: Verb) -> Self {
        self.verb = Some(verb);
        self
    }

    /// Only keys that begin so (of any bucket).
    pub fn key(mut self, prefix: impl Into<String>) -> Self {
        self.key = prefix.into();
        self
    }

    /// Not the first `requests` of those that match.
    pub fn skip(mut self, requests: u64) -> Self {
        self.skip = requests;
        self
    }

    /// At most `requests` of those that match.
    pub fn times(mut self, requests: u64) -> Self {
        self.times = requests;
        self
    }

    /// Each with this probability (from a fixed seed).
    pub fn probability(mut self, probability: f64) -> Self {
        self.probability = probability;
        self
    }
}

/// Names a fault that was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultId(u64);

/// The faults of a store. A request meets all that match.
#[derive(Debug, Clone)]
pub struct Faults {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    armed: Vec<Armed>,
    next_id: u64,
    random: u64,
}

#[derive(Debug)]
struct Armed {
    id: FaultId,
    fault: Fault,
    hits: u64,
}

/// What the faults that a request met come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) delay: Duration,
    pub(crate) status: Option<(u16, Option<u64>)>,
    pub(crate) stall: Option<(u64, Duration)>,
    pub(crate) truncate: Option<u64>,
    /// `Some(None)`: before the answer.
    pub(crate) reset: Option<Option<u64>>,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) ignore_conditions: bool,
}

impl Faults {
    pub(crate) fn new() -> Self {
        let inner = Inner { armed: Vec::new(), next_id: 0, random: 0x9e37_79b9_7f4a_7c15 };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    /// Injects a fault from now on.
    pub fn add(&self, fault: Fault) -> FaultId {
        let mut inner = self.inner.lock();
        let id = FaultId(inner.next_id);
        inner.next_id += 1;
        inner.armed.push(Armed { id, fault, hits: 0 });
        id
    }

    /// Ends a fault.
    pub fn remove(&self, id: FaultId) {
        self.inner.lock().armed.retain(|armed| armed.id != id);
    }

    /// Ends all faults.
    pub fn clear(&self) {
        self.inner.lock().armed.clear();
    }

    /// How many requests a fault met; 0 for one that was removed.
    pub fn hits(&self, id: FaultId) -> u64 {
        self.inner.lock().armed.iter().find(|armed| armed.id == id).map_or(0, |armed| armed.hits)
    }

    /// The faults that meet this request; they count it.
    pub(crate) fn plan(&self, verb: Verb, key: &str) -> Plan {
        let mut plan = Plan::default();
        let Inner { armed, next_id: _, random } = &mut *self.inner.lock();
        for Armed { id: _, fault, hits } in armed {
            if fault.verb.is_some_and(|wanted| wanted != verb) || !key.starts_with(&fault.key) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if *hits >= fault.times || !happens(random, fault.probability) {
                continue;
            }
            *hits += 1;
            match &fault.action {
                Action::Status(status) => plan.status = plan.status.or(Some((*status, None))),
                Action::RetryAfter(status, seconds) => plan.status = plan.status.or(Some((*status, Some(*seconds)))),
                Action::Delay(delay) => plan.delay += *delay,
                Action::StallBody { after, stall } => plan.stall = Some((*after, *stall)),
                Action::Truncate { after } => plan.truncate = Some(*after),
                Action::Reset { after } => plan.reset = Some(*after),
                Action::Header(name, value) => plan.headers.push((name, value.clone())),
                Action::IgnoreConditions => plan.ignore_conditions = true,
            }
        }
        plan
    }
}

fn happens(random: &mut u64, probability: f64) -> bool {
    // xorshift64: all that a test needs.
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    (*random >> 11) as f64 / ((1_u64 << 53) as f64) < probability
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turn_and_key_and_verb_select() {
        let faults = Faults::new();
        let id = faults.add(Fault::new(Action::Status(503)).on(Verb::Get).key("a/").skip(1).times(2));
        let met = |verb, key| faults.plan(verb, key).status.is_some();
        assert!(!met(Verb::Head, "a/x") && !met(Verb::Get, "b/x"));
        assert_eq!([(); 4].map(|()| met(Verb::Get, "a/x")), [false, true, true, false]);
        assert_eq!(faults.hits(id), 2);
        faults.clear();
        assert_eq!(faults.plan(Verb::Get, "a/x"), Plan::default());
    }

    #[test]
    fn probability_is_about_right() {
        let faults = Faults::new();
        let id = faults.add(Fault::new(Action::Status(500)).probability(0.25));
        for _ in 0..4000 {
            faults.plan(Verb::Get, "k");
        }
        assert!((800..1200).contains(&faults.hits(id)), "{}", faults.hits(id));
    }
}
