//! Making room, off the read path.
//!
//! One thread. Superseded chunks go first (after a grace for those who still read the old version, at once under
//! pressure), then those of forgotten datasets and those that nobody used for the lifetime of their dataset
//! ([`crate::expiry`]), then what the policies give: for a dataset above its quota, and above the high watermark down
//! to the low one. Pinned chunks go only with their dataset. The same thread watches the directory and the free space.
//!
//! Where a policy gives way ([`Policy`]), who is refused asks for room, and does not wait for it: what it has is
//! streamed past, and the next one finds room. The quota takes it from the dataset itself, if its policy gives way; the
//! watermark, for a dataset of any policy, first from the spare copies of all (other workers have them), then from
//! those of lower priority, whatever their policies, the lowest first, and then from those of the same priority whose
//! policies give way; never below a reserve. From each of these as many bytes as it has among the chunks that were used
//! longest ago; which of its chunks go is up to its own policy. So what is there to be replaced never keeps out what is
//! there to stay, and what is there to stay goes for nobody of its rank. A chunk that somebody has open does not give
//! way. To find what does costs a look at every chunk, so more goes than was asked for: as large a part of what may go
//! as lies between the watermarks. That is down to the low one where everything gives way; where little does, it is not
//! all taken at once. Nothing goes when the sums say that it would not suffice.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use forebay_protocol::{ChunkKey, FileIdentity};
use parking_lot::{Condvar, Mutex};

use crate::catalog::{Entry, Name, PINNED, SUPERSEDED};
use crate::chunk::Chunk;
use crate::error::Refusal;
use crate::ledger::{Concession, Deficit, Ledger};
use crate::policy::Policy;
use crate::root::{Loss, Root};
use crate::shared::Shared;

/// Superseded files that wait for their grace to pass at most (32 bytes each, so 2 MB); the oldest go at once beyond.
const MAX_WAITING: usize = 65_536;
/// Rounds of one attempt to make room: each frees what is missing unless others take it meanwhile.
const MAX_ROUNDS: usize = 8;

/// What the evictor is told.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    state: Mutex<State>,
    wake: Condvar,
    /// The sweeper's.
    sweep: Condvar,
}

#[derive(Debug, Default)]
struct State {
    kicked: bool,
    pressure: bool,
    forgotten: bool,
    superseded: VecDeque<(Instant, FileIdentity)>,
    /// By dataset, what was refused and would be admitted if others gave way: the most bytes, and of which chunk.
    asked: BTreeMap<u32, (u64, Name)>,
    /// Since when the directory is gone.
    lost: Option<Instant>,
    /// A sweep is asked for.
    sweep: bool,
}

impl Signals {
    /// Look now.
    pub(crate) fn kick(&self) {
        self.state.lock().kicked = true;
        self.wake.notify_one();
    }

    /// Somebody was refused: what may go without a policy goes now, and then what gives way, where that was `asked`: of
    /// which dataset how many bytes, and for which chunk.
    pub(crate) fn press(&self, asked: Option<(u32, u64, Name)>) {
        let mut state = self.state.lock();
        // Otherwise only the next look is due, and refusals are frequent once a cache is full.
        if !state.superseded.is_empty() || state.forgotten || asked.is_some() {
            state.pressure = true;
            state.kicked = true;
            self.wake.notify_one();
        }
        if let Some((slot, bytes, name)) = asked {
            let most = state.asked.entry(slot).or_insert((bytes, name));
            *most = (*most).max((bytes, name));
        }
    }

    pub(crate) fn forget(&self) {
        let mut state = self.state.lock();
        state.forgotten = true;
        state.kicked = true;
        self.wake.notify_one();
    }

    pub(crate) fn supersede(&self, file: FileIdentity, since: Instant) {
        let mut state = self.state.lock();
        state.superseded.push_back((since, file));
        if state.superseded.len() > MAX_WAITING {
            state.kicked = true;
            self.wake.notify_one();
        }
    }
}

/// Why a chunk is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Superseded,
    Forgotten,
    Victim,
    Expired,
    Asked,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It went; bytes of blocks that it held.
    Gone(u64),
    Absent,
    Pinned,
    /// The reason no longer holds, or the disk refused.
    Kept,
}

impl Shared {
    /// The evictor thread's body: returns when the store stops.
    pub(crate) fn evict_until_stopped(&self) {
        while !self.stopping() {
            self.watch_directory();
            self.round();
            let mut state = self.signals.state.lock();
            if !state.kicked && !self.stopping() {
                self.signals.wake.wait_for(&mut state, self.tuning.tick);
            }
            state.kicked = false;
        }
    }

    /// Unlinks a chunk's file and forgets the chunk, if the reason still holds.
    pub(crate) fn evict(&self, name: Name, why: Why) -> Outcome {
        let Ok(_entered) = self.enter() else { return Outcome::Kept };
        let Some(root) = self.root() else { return Outcome::Kept };
        let _name = self.stripe(name);
        let Some(entry) = self.catalog.get(name) else { return Outcome::Absent };
        let forgotten =
            self.catalog.ledger(|ledger| ledger.account(entry.slot).is_some_and(|account| account.forgotten));
        match why {
            Why::Forgotten if !forgotten => return Outcome::Kept,
            Why::Superseded if !entry.has(SUPERSEDED) => return Outcome::Kept,
            Why::Superseded | Why::Victim | Why::Expired | Why::Asked if entry.has(PINNED) => return Outcome::Pinned,
            _ => {}
        }
        if let Err(error) = root.unlink_chunk(name.into()) {
            self.disk_failed("delete a chunk", &error);
            return Outcome::Kept;
        }
        // The stripe is held: it is the entry that was judged, perhaps grown. Removal is never refused.
        let gone = self.catalog.apply(name, false, |_| None).ok().flatten().unwrap_or(entry);
        self.detach(name);
        self.catalog.ledger(|ledger| {
            let Some(account) = ledger.account(gone.slot) else { return };
            match why {
                Why::Superseded | Why::Victim => account.evicted_bytes += u64::from(gone.data),
                Why::Expired => account.expired_bytes += u64::from(gone.data),
                Why::Forgotten | Why::Asked => {}
            }
        });
        Outcome::Gone(u64::from(gone.data))
    }

    /// Evicts what the policies give until `bytes` more of a dataset would be admitted. `false` when they will not.
    pub(crate) fn make_room(&self, slot: u32, bytes: u64, except: Name) -> bool {
        let _one = self.evicting.lock();
        self.drop_superseded(true);
        for _ in 0..MAX_ROUNDS {
            let Deficit { dataset, tier } = self.catalog.ledger(|ledger| ledger.deficit(slot, bytes));
            if dataset == 0 && tier == 0 {
                return true;
            }
            let all = Concession { slot, bytes: u64::MAX, spares: false };
            if dataset > 0 && self.evict_of(all, dataset, |name, _| name != except) == 0 {
                return false;
            }
            let tier = tier.saturating_sub(dataset);
            if tier > 0 && self.evict_of_tier(tier, None, |name, _| name != except) == 0 {
                return false;
            }
        }
        false
    }

    /// What is to give way for `bytes` of a chunk, which stays itself; nothing when that would not suffice.
    pub(crate) fn ceded(&self, slot: u32, bytes: u64, name: Name) -> Deficit {
        let stays = self.catalog.get(name).filter(|entry| !entry.has(PINNED)).map_or(0, |entry| entry.charge().used);
        self.catalog.ledger(|ledger| ledger.ceded(slot, bytes, stays))
    }

    /// Makes room for `bytes` of a chunk, by what gives way and is not in use.
    fn give_way(&self, slot: u32, bytes: u64, asking: Name) {
        let idle =
            |name, chunk: Option<&Arc<Chunk>>| name != asking && !chunk.is_some_and(|chunk| self.in_use(name, chunk));
        let dataset = self.ceded(slot, bytes, asking).dataset;
        if dataset > 0 {
            let holds = |ledger: &mut Ledger| ledger.account(slot).is_some_and(|own| !own.terms.policy.gives_way());
            let own = Concession { slot, bytes: u64::MAX, spares: self.catalog.ledger(holds) };
            self.evict_of(own, dataset, idle);
        }
        // What went is no longer missing in the tier.
        let tier = self.ceded(slot, bytes, asking).tier;
        if tier > 0 {
            self.evict_of_tier(tier, Some(slot), idle);
        }
    }

    /// Whether somebody has this open chunk, beside who asks and what keeps files open.
    pub(crate) fn in_use(&self, name: Name, chunk: &Arc<Chunk>) -> bool {
        let kept = self.open.peek(&name).is_some_and(|kept| Arc::ptr_eq(&kept, chunk));
        Arc::strong_count(chunk) > 1 + usize::from(kept)
    }

    /// Makes all the room that is due now.
    pub(crate) fn round(&self) {
        let _one = self.evicting.lock();
        if let Some(root) = self.root() {
            self.disk.refresh(&root);
        }
        let (pressure, asked) = {
            let mut state = self.signals.state.lock();
            (std::mem::take(&mut state.pressure), std::mem::take(&mut state.asked))
        };
        self.drop_superseded(pressure);
        self.drop_forgotten();
        self.expire(Instant::now());
        while !self.stopping() && self.enforce() > 0 {}
        for (slot, (bytes, name)) in asked {
            self.give_way(slot, bytes, name);
        }
    }

    /// Evicts what is above quotas and the high watermark, a round of it; the bytes that went.
    fn enforce(&self) -> u64 {
        let over = self.catalog.ledger(|ledger| {
            let accounts = ledger.accounts.iter().enumerate();
            let over = accounts.filter_map(|(slot, account)| {
                let over = account.sum.used.saturating_sub(account.terms.quota?);
                (over > 0).then_some((slot as u32, over))
            });
            over.collect::<Vec<_>>()
        });
        let all = |slot| Concession { slot, bytes: u64::MAX, spares: false };
        let gone: u64 = over.into_iter().map(|(slot, bytes)| self.evict_of(all(slot), bytes, |_, _| true)).sum();
        let over = self.catalog.ledger(|ledger| match ledger.total.used {
            used if used > ledger.high => used - ledger.low,
            _ => 0,
        });
        gone + if over > 0 { self.evict_of_tier(over, None, |_, _| true) } else { 0 }
    }

    fn drop_superseded(&self, pressure: bool) {
        let mut kept = BTreeSet::new();
        while let Some(file) = self.due(pressure) {
            for name in self.catalog.of_file(file) {
                // The disk refused: at the next look again. What is pinned comes again when it is unpinned.
                if self.evict(name, Why::Superseded) == Outcome::Kept {
                    kept.insert(file);
                }
            }
        }
        for file in kept {
            self.signals.supersede(file, Instant::now());
        }
    }

    /// The next superseded file whose grace is over.
    fn due(&self, pressure: bool) -> Option<FileIdentity> {
        let now = Instant::now();
        let mut state = self.signals.state.lock();
        let crowded = state.superseded.len() > MAX_WAITING;
        let (since, file) = *state.superseded.front()?;
        if self.stopping() || !(crowded || pressure || now.duration_since(since) >= self.tuning.supersede_grace) {
            return None;
        }
        state.superseded.pop_front();
        Some(file)
    }

    fn drop_forgotten(&self) {
        if !std::mem::take(&mut self.signals.state.lock().forgotten) {
            return;
        }
        let slots: Vec<u32> = self.catalog.ledger(|ledger| {
            let accounts = ledger.accounts.iter().enumerate();
            accounts.filter(|(_, account)| account.forgotten).map(|(slot, _)| slot as u32).collect()
        });
        for name in self.catalog.select(|name, entry| slots.contains(&entry.slot).then_some(name)) {
            if self.stopping() {
                return;
            }
            if self.evict(name, Why::Forgotten) == Outcome::Kept {
                // The disk refused: at the next look again.
                self.signals.state.lock().forgotten = true;
            }
        }
    }

    /// Evicts at least `bytes` of the chunks of all datasets that `may` go, for one of them or for nobody's sake, if there
    /// is as much; the bytes that went.
    fn evict_of_tier(&self, bytes: u64, asker: Option<u32>, may: impl Fn(Name, Option<&Arc<Chunk>>) -> bool) -> u64 {
        let mut gone = 0;
        for turn in self.catalog.ledger(|ledger| ledger.turns(asker)) {
            let mut concessions = self.catalog.ledger(|ledger| ledger.concessions(turn, asker));
            while gone < bytes && !concessions.is_empty() && !self.stopping() {
                let shares = self.shares(&concessions, bytes - gone, &may);
                concessions.retain_mut(|concession| {
                    let Some(share) = shares.get(&concession.slot) else { return !shares.is_empty() };
                    let lost = self.evict_of(*concession, *share, &may);
                    gone += lost;
                    concession.bytes = concession.bytes.saturating_sub(lost);
                    // One that lost less than its share has no more that may go.
                    lost >= *share && concession.bytes > 0
                });
            }
        }
        gone
    }

    /// Splits bytes over datasets: as much for each as it has among the chunks that were used longest ago.
    fn shares(
        &self,
        concessions: &[Concession],
        bytes: u64,
        may: impl Fn(Name, Option<&Arc<Chunk>>) -> bool,
    ) -> BTreeMap<u32, u64> {
        let of = |entry: &Entry| concessions.iter().any(|concession| concession.concerns(entry));
        let mut shares = BTreeMap::<u32, u64>::new();
        for stale in Policy::Lru.victims(self.catalog.candidates(of, may), bytes, 0) {
            *shares.entry(stale.slot).or_default() += stale.bytes;
        }
        shares
    }

    /// Evicts at least `bytes` of the chunks of a dataset that `may` go, if there is as much and it is no more than is
    /// conceded; the bytes that went.
    fn evict_of(&self, concession: Concession, bytes: u64, may: impl Fn(Name, Option<&Arc<Chunk>>) -> bool) -> u64 {
        let slot = concession.slot;
        let terms = |ledger: &mut Ledger| ledger.account(slot).map(|account| (account.terms.policy, account.hand));
        let Some((policy, hand)) = self.catalog.ledger(terms) else { return 0 };
        let (mut hits, mut count) = (0, 0);
        let candidates = self.catalog.candidates(|entry| concession.concerns(entry), &may);
        let candidates = candidates.inspect(|candidate| {
            hits += u64::from(candidate.hits);
            count += 1;
        });
        let mut left = concession.bytes;
        let victims: Vec<_> = policy
            .victims(candidates, bytes.min(concession.bytes), hand)
            .into_iter()
            .take_while(|victim| {
                let fits = victim.bytes <= left;
                left = left.saturating_sub(victim.bytes);
                fits
            })
            .collect();
        // Spare copies are not what the policy chose.
        if let Some(last) = victims.last().filter(|last| !last.spare) {
            if matches!(policy, Policy::Lfu | Policy::Sieve) {
                self.catalog.forget_uses(slot, |order, uses| policy.left(uses, order, hand, last, hits / count));
            }
            self.catalog.ledger(|ledger| {
                if let Some(account) = ledger.account(slot) {
                    account.hand = last.order;
                }
            });
        }
        let gone = |name| {
            // Those before it took their time.
            let still = !self.stopping() && may(name, self.catalog.live(name).as_ref());
            still && matches!(self.evict(name, Why::Victim), Outcome::Gone(_))
        };
        victims.iter().filter(|victim| gone(Name::from(victim.key))).map(|victim| victim.bytes).sum()
    }

    /// Notices that the directory was removed or moved away, and makes it again. What it held is given up only then, or
    /// when it cannot come back: until then it may, and what is open can be read meanwhile.
    fn watch_directory(&self) {
        let Some(root) = self.root() else { return };
        let path = root.path().to_owned();
        let loss = match root.loss() {
            Ok(Some(loss)) => loss,
            Ok(None) => {
                if self.signals.state.lock().lost.is_some() {
                    self.regain("the cache directory is back");
                }
                return;
            }
            Err(_) => return,
        };
        let since = *self.signals.state.lock().lost.get_or_insert_with(|| {
            tracing::warn!(path = %path.display(), "the cache directory was removed; nothing is cached meanwhile");
            Instant::now()
        });
        self.disk.set_lost(Some(format!("cache directory {} was removed", path.display())));
        if loss == (Loss::Directory { deleted: true }) {
            // Open files would keep its space.
            self.give_up_all();
        }
        // Whoever is removing it shall not find it growing again.
        if since.elapsed() < self.tuning.tick {
            return;
        }
        let remade = match loss {
            Loss::Chunks => root.make_chunks().map_err(|error| error.to_string()),
            Loss::Directory { .. } => Root::open(&path, &self.owner).map_err(|error| error.to_string()).map(|fresh| {
                fresh.empty_trash();
                self.set_root(Some(Arc::new(fresh)));
                self.index.reopen();
            }),
        };
        // Where not even a directory can be made, the disk may be full of what is deleted but open.
        if remade.is_ok() || loss == Loss::Chunks {
            self.give_up_all();
        }
        match remade {
            Ok(()) => self.regain("the cache directory was made again"),
            Err(reason) => {
                let problem =
                    format!("cache directory {} was removed and cannot be made again: {reason}", path.display());
                self.disk.set_lost(Some(problem));
            }
        }
    }

    /// Gives up every chunk; a pinned one keeps its place.
    fn give_up_all(&self) {
        for name in self.catalog.select(|name, _| Some(name)) {
            let _name = self.stripe(name);
            self.vanish(name, None);
        }
    }

    /// The directory is there again, with files that the catalog may not know, and without some that it knows.
    fn regain(&self, how: &'static str) {
        {
            let mut state = self.signals.state.lock();
            state.lost = None;
            state.sweep = true;
            // Before anything is admitted: a file that the catalog does not know yet is found, not made anew.
            self.unswept.store(true, Ordering::Release);
            self.sweeping.store(true, Ordering::Release);
        }
        self.signals.sweep.notify_one();
        self.disk.set_lost(None);
        if let Some(root) = self.root() {
            tracing::info!(path = %root.path().display(), "{how}");
        }
    }

    /// Waits until a sweep is asked for; `false` when the store stops.
    pub(crate) fn await_sweep(&self) -> bool {
        let mut state = self.signals.state.lock();
        while !state.sweep && !self.stopping() {
            self.signals.sweep.wait(&mut state);
        }
        state.sweep = false;
        !self.stopping()
    }

    /// Ends a sweep, unless another one was asked for meanwhile.
    pub(crate) fn swept(&self, complete: bool) {
        let state = self.signals.state.lock();
        if !state.sweep {
            self.unswept.store(!complete, Ordering::Release);
            self.sweeping.store(false, Ordering::Release);
        }
    }

    /// Marks the chunks of a file; they go after a grace.
    pub(crate) fn supersede_file(&self, file: FileIdentity) {
        let mut any = false;
        for name in self.catalog.of_file(file) {
            let before = self
                .catalog
                .apply(name, false, |entry| entry.map(|entry| Entry { flags: entry.flags | SUPERSEDED, ..entry }));
            any |= matches!(before, Ok(Some(_)));
        }
        if any {
            self.signals.supersede(file, Instant::now());
        }
    }

    /// What a former process marked: its readers are gone or have read on.
    pub(crate) fn requeue_superseded(&self) {
        let files: BTreeSet<FileIdentity> =
            self.catalog.select(|name, entry| entry.has(SUPERSEDED).then(|| ChunkKey::from(name).file)).collect();
        for file in files {
            self.signals.supersede(file, Instant::now());
        }
    }

    /// Wakes the evictor and the sweeper so that they see that the store stops.
    pub(crate) fn stop_threads(&self) {
        self.stopping.store(true, Ordering::Release);
        self.signals.kick();
        self.signals.sweep.notify_one();
    }
}

/// A refusal that eviction can do something about.
pub(crate) fn needs_room(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Quota { .. } | Refusal::Watermark { .. })
}
