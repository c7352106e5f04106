//! Who uses how many bytes, and who may use more.
//!
//! A chunk is charged for what its file takes: the bytes of the blocks held (or being written), the trailer, and the
//! rounding to pages. A pinned chunk is charged in full from the pin on, so that what is still to be fetched of it has
//! its place: pinned bytes always fit.
//!
//! Invariants: every charge is changed together with the catalog's entry, under the entry's shard lock; so the sums
//! here are the sums over the entries. A change that adds bytes passes the limits or does not happen.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use forebay_protocol::DatasetId;

use crate::catalog::{Entry, SPARE};
use crate::error::{PinRefused, Refusal};
use crate::expiry::Ages;
use crate::policy::Policy;

/// What one chunk contributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Charge {
    /// Bytes on disk, or promised.
    pub(crate) used: u64,
    /// Bytes of blocks.
    pub(crate) data: u64,
    /// `used`, when pinned.
    pub(crate) pinned: u64,
    /// Bytes of the chunk, when pinned.
    pub(crate) pinned_data: u64,
    /// `used`, of a spare copy that is not pinned.
    pub(crate) spare: u64,
    pub(crate) chunks: u64,
}

/// How a dataset may use the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetPolicy {
    /// Which chunks go when room is needed.
    pub policy: Policy,
    /// Bytes on disk that it may take; `None` for no limit but the tier's.
    pub quota: Option<u64>,
    /// How long a chunk stays that nobody uses; `None`: as long as there is room for it.
    pub ttl: Option<Duration>,
    /// Bytes on disk below which chunks of others never bring it.
    pub reserve: u64,
    /// Where room is needed for a dataset, those of lower priority lose it first, and whatever their policy; those of
    /// higher priority lose nothing.
    pub priority: i32,
}

#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) id: DatasetId,
    /// Announced and not forgotten.
    pub(crate) served: bool,
    pub(crate) forgotten: bool,
    pub(crate) terms: DatasetPolicy,
    pub(crate) sum: Charge,
    /// Where the policy's hand is: the order of admission of the chunk that went last.
    pub(crate) hand: u64,
    pub(crate) ages: Ages,
    pub(crate) evicted_bytes: u64,
    pub(crate) expired_bytes: u64,
    pub(crate) bypassed: u64,
    pub(crate) corrupt_blocks: u64,
}

impl Account {
    /// Bytes that may go.
    fn evictable(&self) -> u64 {
        self.sum.used - self.sum.pinned
    }

    /// Bytes that may go for others.
    fn beyond_reserve(&self) -> u64 {
        self.evictable().min(self.sum.used.saturating_sub(self.terms.reserve))
    }

    /// Bytes that make room for the dataset `to`, which may be this one.
    fn cedes(&self, to: &Account) -> u64 {
        let gives_way = self.terms.policy.gives_way();
        if self.id == to.id {
            return if gives_way { self.evictable() } else { self.sum.spare };
        }
        let (own, other) = (self.terms.priority, to.terms.priority);
        let may = if own < other || own == other && gives_way { u64::MAX } else { self.sum.spare };
        if self.served { self.beyond_reserve().min(may) } else { 0 }
    }
}

/// Who loses chunks to others, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Spare copies, of all.
    Spares,
    /// The datasets of a priority, down to their reserves.
    Priority(i32),
    /// All, in spite of their reserves.
    Reserves,
}

/// What a dataset may lose to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Concession {
    pub(crate) slot: u32,
    /// Bytes, at most.
    pub(crate) bytes: u64,
    /// Of spare copies only.
    pub(crate) spares: bool,
}

impl Concession {
    /// Whether a chunk is one that it may be.
    pub(crate) fn concerns(&self, entry: &Entry) -> bool {
        entry.slot == self.slot && (!self.spares || entry.has(SPARE))
    }
}

/// What must go before something fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deficit {
    /// Of the dataset itself.
    pub(crate) dataset: u64,
    /// Of the tier.
    pub(crate) tier: u64,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) capacity: u64,
    /// Watermarks, in bytes.
    pub(crate) high: u64,
    pub(crate) low: u64,
    pub(crate) total: Charge,
    /// One per dataset that was ever named in this process; a slot is its position.
    pub(crate) accounts: Vec<Account>,
    slots: HashMap<DatasetId, u32>,
}

impl Ledger {
    pub(crate) fn new(capacity: u64, high_percent: u8, low_percent: u8) -> Self {
        // Below capacity, so within u64 again.
        let percent = |percent: u8| (u128::from(capacity) * u128::from(percent) / 100) as u64;
        Self {
            capacity,
            high: percent(high_percent),
            low: percent(low_percent),
            total: Charge::default(),
            accounts: Vec::new(),
            slots: HashMap::new(),
        }
    }

    /// The slot of a dataset, a new one if need be.
    pub(crate) fn slot(&mut self, id: DatasetId) -> u32 {
        *self.slots.entry(id).or_insert_with(|| {
            self.accounts.push(Account {
                id,
                served: false,
                forgotten: false,
                terms: DatasetPolicy::default(),
                sum: Charge::default(),
                hand: 0,
                ages: Ages::default(),
                evicted_bytes: 0,
                expired_bytes: 0,
                bypassed: 0,
                corrupt_blocks: 0,
            });
            (self.accounts.len() - 1) as u32
        })
    }

    pub(crate) fn find(&self, id: DatasetId) -> Option<&Account> {
        self.slots.get(&id).and_then(|slot| self.accounts.get(*slot as usize))
    }

    pub(crate) fn account(&mut self, slot: u32) -> Option<&mut Account> {
        self.accounts.get_mut(slot as usize)
    }

    /// Replaces one charge of a dataset by another. With `limited`, a change that adds bytes must fit.
    pub(crate) fn exchange(&mut self, slot: u32, from: Charge, to: Charge, limited: bool) -> Result<(), Refusal> {
        if limited {
            self.check(slot, from, to)?;
        }
        let Some(account) = self.accounts.get_mut(slot as usize) else { return Err(Refusal::Dataset) };
        for sum in [&mut account.sum, &mut self.total] {
            // Every `from` was added before: sums never go below zero.
            sum.used = sum.used + to.used - from.used;
            sum.data = sum.data + to.data - from.data;
            sum.pinned = sum.pinned + to.pinned - from.pinned;
            sum.pinned_data = sum.pinned_data + to.pinned_data - from.pinned_data;
            sum.spare = sum.spare + to.spare - from.spare;
            sum.chunks = sum.chunks + to.chunks - from.chunks;
        }
        Ok(())
    }

    /// Whether `bytes` more of a dataset would be admitted now.
    pub(crate) fn would_admit(&self, slot: u32, bytes: u64) -> Result<(), Refusal> {
        let account = self.accounts.get(slot as usize).filter(|account| account.served).ok_or(Refusal::Dataset)?;
        if let Some(quota) = account.terms.quota {
            let available = quota.saturating_sub(account.sum.used);
            if bytes > available {
                return Err(Refusal::Quota { wanted: bytes, available, quota });
            }
        }
        let available = self.high.saturating_sub(self.total.used);
        if bytes > available {
            return Err(Refusal::Watermark { wanted: bytes, available, limit: self.high });
        }
        Ok(())
    }

    /// Whether `bytes` more of a dataset could be pinned.
    pub(crate) fn would_pin(&self, slot: u32, bytes: u64) -> Result<(), PinRefused> {
        let account = self.accounts.get(slot as usize);
        let of_dataset = account.and_then(|a| a.terms.quota.map(|quota| (quota, a.sum.pinned, "the dataset's quota")));
        let of_tier = (self.low, self.total.pinned, "the cache's low watermark");
        for (limit, pinned, limited_by) in of_dataset.into_iter().chain([of_tier]) {
            let available = limit.saturating_sub(pinned);
            if bytes > available {
                return Err(PinRefused { wanted: bytes, available, limit, limited_by });
            }
        }
        Ok(())
    }

    /// What must go for `bytes` more of a dataset to be admitted.
    pub(crate) fn deficit(&self, slot: u32, bytes: u64) -> Deficit {
        let account = self.accounts.get(slot as usize);
        let quota = account.and_then(|account| account.terms.quota.map(|quota| (account.sum.used, quota)));
        Deficit {
            dataset: quota.map_or(0, |(used, quota)| used.saturating_add(bytes).saturating_sub(quota)),
            tier: self.total.used.saturating_add(bytes).saturating_sub(self.high),
        }
    }

    /// What chunks of the dataset, or of the tier's datasets, are to give way for `bytes` more of it, while `stays` of its
    /// unpinned bytes must not: what is missing, or the part between the watermarks, if that is more. Nothing when that
    /// would not suffice.
    pub(crate) fn ceded(&self, slot: u32, bytes: u64, stays: u64) -> Deficit {
        let Some(account) = self.accounts.get(slot as usize).filter(|account| account.served) else {
            return Deficit::default();
        };
        let stays = stays.min(account.cedes(account));
        let own = account.cedes(account) - stays;
        let all = self.accounts.iter().map(|other| other.cedes(account)).sum::<u64>() - stays;
        let Deficit { dataset, tier } = self.deficit(slot, bytes);
        if dataset > own || tier > all {
            return Deficit::default();
        }
        // Below `of`, so within u64 again.
        let part = |of| (u128::from(self.high - self.low) * u128::from(of) / u128::from(self.high.max(1))) as u64;
        let least = |missing: u64, of: u64| if missing == 0 { 0 } else { missing.max(part(of)) };
        Deficit { dataset: least(dataset, own), tier: least(tier, all) }
    }

    /// Whose turn it is to lose chunks when the tier needs room, first to last: for a dataset, or, for nobody's sake, until
    /// only what is pinned is left.
    pub(crate) fn turns(&self, asker: Option<u32>) -> Vec<Turn> {
        let highest = asker.and_then(|slot| self.accounts.get(slot as usize)).map(|account| account.terms.priority);
        let priorities: BTreeSet<i32> = self.accounts.iter().map(|account| account.terms.priority).collect();
        let below = priorities.into_iter().filter(|priority| highest.is_none_or(|highest| *priority <= highest));
        let last = asker.is_none().then_some(Turn::Reserves);
        [Turn::Spares].into_iter().chain(below.map(Turn::Priority)).chain(last).collect()
    }

    /// What the datasets whose turn it is may lose, those that may.
    pub(crate) fn concessions(&self, turn: Turn, asker: Option<u32>) -> Vec<Concession> {
        let to = asker.and_then(|slot| self.accounts.get(slot as usize));
        let bytes = |account: &Account| {
            let may = to.map_or(account.beyond_reserve(), |to| account.cedes(to));
            match turn {
                Turn::Spares => may.min(account.sum.spare),
                Turn::Priority(priority) if account.terms.priority == priority => may,
                Turn::Priority(_) => 0,
                Turn::Reserves => account.evictable(),
            }
        };
        // A dataset that holds gives only spare copies, also to itself.
        let spares = |account: &Account| {
            let holds = |to: &Account| to.id == account.id && !account.terms.policy.gives_way();
            turn == Turn::Spares || to.is_some_and(holds)
        };
        let concessions = (0..).zip(&self.accounts);
        concessions
            .map(|(slot, account)| Concession { slot, bytes: bytes(account), spares: spares(account) })
            .filter(|concession| concession.bytes > 0)
            .collect()
    }

    fn check(&self, slot: u32, from: Charge, to: Charge) -> Result<(), Refusal> {
        // First: for a pin that can never be, nobody makes room.
        if to.pinned > from.pinned {
            self.would_pin(slot, to.pinned - from.pinned)?;
        }
        if to.used > from.used {
            let account = self.accounts.get(slot as usize).ok_or(Refusal::Dataset)?;
            if account.forgotten {
                return Err(Refusal::Dataset);
            }
            // Bytes of a dataset that is not announced yet are on disk already: only the tier limits them.
            match self.would_admit(slot, to.used - from.used) {
                Err(Refusal::Dataset) => self.fits_tier(to.used - from.used)?,
                other => other?,
            }
        }
        Ok(())
    }

    fn fits_tier(&self, bytes: u64) -> Result<(), Refusal> {
        let available = self.high.saturating_sub(self.total.used);
        if bytes <= available {
            return Ok(());
        }
        Err(Refusal::Watermark { wanted: bytes, available, limit: self.high })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn charge(used: u64) -> Charge {
        Charge { used, data: used, pinned: 0, pinned_data: 0, spare: 0, chunks: 1 }
    }

    #[test]
    fn limits_hold_and_sums_add_up() {
        let mut ledger = Ledger::new(1000, 90, 50);
        let a = ledger.slot(DatasetId::local("n", "a"));
        let b = ledger.slot(DatasetId::local("n", "b"));
        for slot in [a, b] {
            ledger.account(slot).unwrap().served = true;
        }
        ledger.account(a).unwrap().terms.quota = Some(300);
        let none = Charge::default();
        assert_eq!(
            ledger.exchange(a, none, charge(301), true),
            Err(Refusal::Quota { wanted: 301, available: 300, quota: 300 })
        );
        ledger.exchange(a, none, charge(300), true).unwrap();
        assert_eq!(
            ledger.exchange(b, none, charge(601), true),
            Err(Refusal::Watermark { wanted: 601, available: 600, limit: 900 })
        );
        ledger.exchange(b, none, charge(600), true).unwrap();
        assert_eq!(ledger.deficit(a, 10), Deficit { dataset: 10, tier: 10 });
        ledger.exchange(b, charge(600), none, true).unwrap();
        assert_eq!(ledger.total, charge(300));
        assert!(ledger.would_pin(b, 501).is_err_and(|refused| refused.available == 500 && refused.limit == 500));
        assert!(ledger.would_pin(a, 301).is_err_and(|refused| refused.limited_by.contains("quota")));
    }
}
