//! What goes, and for whom: random admissions, reads, pins and edits of the terms against a model, and the cases that the
//! policies are for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_protocol::{BLOCK_SIZE, ChunkKey, DatasetId, DatasetPath, FileVersion, VersionKey};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::trailer::{Header, Layout};
use crate::{ChunkSpec, ChunkStore, DatasetPolicy, Policy, StoreOptions, Tuning};

const CAPACITY: u64 = 500_000;
const HIGH: u64 = CAPACITY * 95 / 100;
/// One block each; the datasets take turns.
const SIZES: [u64; 16] = [
    1, 30_000, 65_536, 50_000, 12_000, 65_536, 40_000, 8_192, 61_000, 20_000, 33_333, 65_536, 5_000, 47_000, 65_536,
    100,
];

/// A store whose evictor moves only when it is called.
struct Fixture {
    /// Dropped before its directory.
    store: Arc<ChunkStore>,
    dir: tempfile::TempDir,
    low_percent: u8,
}

fn dataset(index: usize) -> DatasetId {
    DatasetId::local("default", ["a", "b"][index])
}

fn spec(dataset_index: usize, name: &str, size: u64) -> ChunkSpec {
    let path = DatasetPath::parse(format!("/{name}").into_bytes()).unwrap();
    let version = FileVersion { size, mtime_ns: 0, key: VersionKey::new(b"\"e1\"".to_vec()).unwrap() };
    let dataset = dataset(dataset_index);
    let key = ChunkKey { file: version.identity(dataset, &path), index: 0 };
    ChunkSpec { dataset, path, version, key }
}

fn overhead(spec: &ChunkSpec) -> u64 {
    let ChunkSpec { dataset, path, version, key } = spec.clone();
    let header = Header { dataset, path, key: version.key, size: version.size, index: key.index };
    u64::from(Layout::of(&header).unwrap().overhead())
}

fn open(dir: &std::path::Path, low_percent: u8) -> Arc<ChunkStore> {
    let options = StoreOptions {
        dir: dir.to_owned(),
        owner: "demo/worker-0".into(),
        capacity: CAPACITY,
        high_percent: 95,
        low_percent,
    };
    let hour = Duration::from_secs(3600);
    // Two open files: what is known of the others' use is in their entries.
    let one_use = Duration::ZERO;
    let tuning =
        Tuning { supersede_grace: hour, tick: hour, open_files: 2, watch_space: false, one_use, ..Tuning::default() };
    ChunkStore::open_tuned(options, tuning).unwrap()
}

impl Fixture {
    fn new(low_percent: u8) -> Self {
        // In memory where possible: what is tested is not the disk, and every pin syncs.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self { store: open(dir.path(), low_percent), dir, low_percent }
    }

    fn reopen(&mut self) {
        self.store.close();
        self.store = open(self.dir.path(), self.low_percent);
    }

    fn set(&self, index: usize, policy: Policy, quota: Option<u64>) {
        self.announce(index, DatasetPolicy { policy, quota, ..DatasetPolicy::default() });
    }

    fn announce(&self, index: usize, terms: DatasetPolicy) {
        self.store.set_dataset(dataset(index), terms);
        self.store.shared.round();
    }

    /// From now on others have these, and no more.
    fn mark_spare(&self, spares: &[&ChunkSpec]) {
        self.store.mark_spare(|id, key, _| spares.iter().any(|spec| (spec.dataset, spec.key) == (id, key)));
    }

    /// Tries to store the first `blocks` of a chunk; who is refused has the evictor called.
    fn write(&self, spec: &ChunkSpec, blocks: u64) -> bool {
        let bytes = vec![7; spec.version.size.min(blocks * BLOCK_SIZE) as usize];
        let written = self.store.chunk(spec, true).is_some_and(|chunk| chunk.write(0, &bytes, &[]).is_ok());
        self.store.shared.round();
        written
    }

    /// Uses a chunk that is held.
    fn read(&self, spec: &ChunkSpec, verified: bool) -> bool {
        let Some(chunk) = self.store.chunk(spec, false) else { return false };
        if verified { chunk.read_verified(0, 1, &mut Vec::new()).is_ok() } else { chunk.send(0, 1).is_some() }
    }

    fn holds(&self, spec: &ChunkSpec) -> bool {
        self.store.shared.catalog.get(spec.key.into()).is_some()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Admit {
        chunk: usize,
    },
    Read {
        chunk: usize,
        verified: bool,
    },
    Pin {
        chunk: usize,
        pinned: bool,
    },
    Supersede {
        chunk: usize,
    },
    Remove {
        chunk: usize,
    },
    Terms {
        dataset: usize,
        terms: DatasetPolicy,
    },
    /// Chunks whose bit is set have a copy elsewhere.
    Spare {
        chunks: u16,
    },
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let chunk = || 0..SIZES.len();
    let policy =
        prop_oneof![Just(Policy::Hold), Just(Policy::Lru), Just(Policy::Lfu), Just(Policy::Sieve), Just(Policy::Fifo)];
    let quota = prop_oneof![1 => Just(None), 3 => (0..300_000u64).prop_map(Some)];
    let reserve = prop_oneof![2 => Just(0), 1 => 0..300_000u64];
    prop_oneof![
        12 => chunk().prop_map(|chunk| Op::Admit { chunk }),
        12 => (chunk(), any::<bool>()).prop_map(|(chunk, verified)| Op::Read { chunk, verified }),
        2 => (chunk(), any::<bool>()).prop_map(|(chunk, pinned)| Op::Pin { chunk, pinned }),
        1 => chunk().prop_map(|chunk| Op::Supersede { chunk }),
        1 => chunk().prop_map(|chunk| Op::Remove { chunk }),
        2 => (0..2usize, policy, quota, reserve, -1..2).prop_map(|(dataset, policy, quota, reserve, priority)| {
            Op::Terms { dataset, terms: DatasetPolicy { policy, quota, ttl: None, reserve, priority } }
        }),
        1 => any::<u16>().prop_map(|chunks| Op::Spare { chunks }),
        1 => Just(Op::Reopen),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Held {
    dataset: usize,
    bytes: u64,
    admitted: u64,
    used: u64,
    hits: u64,
    pinned: bool,
    superseded: bool,
    spare: bool,
}

/// Two datasets in one tier, as lists.
struct Model {
    held: BTreeMap<usize, Held>,
    terms: [DatasetPolicy; 2],
    /// When what went last was admitted.
    hands: [u64; 2],
    low: u64,
    clock: u64,
}

impl Model {
    fn sum(&self, of: impl Fn(&Held) -> bool) -> u64 {
        self.held.values().filter(|held| of(held)).map(|held| held.bytes).sum()
    }

    fn gives_way(&self, dataset: usize) -> bool {
        self.terms[dataset].policy != Policy::Hold
    }

    /// Bytes missing in the dataset and in the tier.
    fn missing(&self, dataset: usize, bytes: u64) -> (u64, u64) {
        let quota = self.terms[dataset].quota.unwrap_or(u64::MAX);
        let used = self.sum(|held| held.dataset == dataset);
        ((used + bytes).saturating_sub(quota), (self.sum(|_| true) + bytes).saturating_sub(HIGH))
    }

    /// Drops one after the other spare copies of a dataset, and then what its policy has go first, until so many bytes are
    /// free, but no more than `limit`; the bytes that went.
    fn drop_of(&mut self, dataset: usize, bytes: u64, limit: u64, spares_only: bool) -> u64 {
        let policy = self.terms[dataset].policy;
        let left = |model: &Self| model.candidates(|held| held.dataset == dataset && (held.spare || !spares_only));
        let staying: Vec<_> = self.candidates(|held| held.dataset == dataset && !held.spare);
        let mean = staying.iter().map(|chunk| self.held[chunk].hits).sum::<u64>() / (staying.len() as u64).max(1);
        let (mut freed, mut by_policy) = (0, false);
        while freed < bytes.min(limit) {
            // The hand may pass over some and find none that fits: then it was not moved.
            let before = (self.hands[dataset], self.held.clone());
            let Some(first) = self.next(policy, dataset, &left(self)) else { break };
            let Held { bytes: size, spare, .. } = self.held[&first];
            if freed + size > limit {
                (self.hands[dataset], self.held) = before;
                break;
            }
            by_policy |= !spare;
            freed += size;
            self.held.remove(&first);
        }
        if policy == Policy::Lfu && mean > 8 && by_policy {
            self.held.values_mut().filter(|held| held.dataset == dataset).for_each(|held| held.hits /= 2);
        }
        freed
    }

    /// The one of them that goes next.
    fn next(&mut self, policy: Policy, dataset: usize, of: &[usize]) -> Option<usize> {
        let spares = of.iter().filter(|chunk| self.held[chunk].spare);
        if let Some(spare) = spares.min_by_key(|chunk| self.held[chunk].used) {
            return Some(*spare);
        }
        loop {
            let first = *of.iter().min_by_key(|chunk| {
                let Held { admitted, used, hits, .. } = self.held[chunk];
                match policy {
                    Policy::Hold => (u64::MAX - admitted, 0),
                    Policy::Lru => (used, 0),
                    Policy::Lfu => (hits, used),
                    // The hand looks at who comes after it, then begins anew.
                    Policy::Sieve => (u64::from(admitted <= self.hands[dataset]), admitted),
                    Policy::Fifo => (admitted, 0),
                }
            })?;
            self.hands[dataset] = self.held[&first].admitted;
            if policy != Policy::Sieve || self.held[&first].hits == 0 {
                return Some(first);
            }
            self.held.entry(first).and_modify(|held| held.hits = 0);
        }
    }

    fn candidates(&self, of: impl Fn(&Held) -> bool) -> Vec<usize> {
        self.held.iter().filter(|(_, held)| !held.pinned && of(held)).map(|(chunk, _)| *chunk).collect()
    }

    /// Bytes of a dataset that go for another, or for itself.
    fn cedes(&self, of: usize, to: usize) -> u64 {
        let free = self.sum(|held| !held.pinned && held.dataset == of);
        let spare = self.sum(|held| !held.pinned && held.dataset == of && held.spare);
        let (own, other) = (self.terms[of].priority, self.terms[to].priority);
        if of == to {
            return if self.gives_way(of) { free } else { spare };
        }
        let beyond_reserve = free.min(self.sum(|held| held.dataset == of).saturating_sub(self.terms[of].reserve));
        let all = own < other || own == other && self.gives_way(of);
        if all { beyond_reserve } else { beyond_reserve.min(spare) }
    }

    /// What gives way in the dataset, and in the tier; `None` when that is not enough.
    fn ceded(&self, dataset: usize, bytes: u64) -> Option<(u64, u64)> {
        let own = self.cedes(dataset, dataset);
        let all = self.cedes(0, dataset) + self.cedes(1, dataset);
        let (of_own, of_all) = self.missing(dataset, bytes);
        let amount = |missing: u64, of: u64| if missing == 0 { 0 } else { missing.max((HIGH - self.low) * of / HIGH) };
        (of_own <= own && of_all <= all).then(|| (amount(of_own, own), amount(of_all, all)))
    }

    fn refuse(&mut self, dataset: usize, bytes: u64) {
        let asked = self.ceded(dataset, bytes).is_some();
        self.held.retain(|_, held| held.pinned || !held.superseded);
        if !asked {
            return;
        }
        if let Some((bytes, _)) = self.ceded(dataset, bytes) {
            self.drop_of(dataset, bytes, u64::MAX, !self.gives_way(dataset));
        }
        if let Some((_, bytes)) = self.ceded(dataset, bytes) {
            self.drop_for(dataset, bytes);
        }
    }

    /// Drops chunks of both: spare copies first, then those of lower priority, then those of the same.
    fn drop_for(&mut self, to: usize, bytes: u64) {
        let mut missing = bytes;
        let mut priorities: Vec<_> = (0..2).map(|of| self.terms[of].priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        let turns = priorities.into_iter().filter(|priority| *priority <= self.terms[to].priority).map(Some);
        for turn in [None].into_iter().chain(turns).collect::<Vec<_>>() {
            let holds_itself = |of: usize, model: &Self| of == to && !model.gives_way(of);
            let spares = [0, 1].map(|of| turn.is_none() || holds_itself(of, self));
            let mut left = [0, 1].map(|of| match turn {
                None => self.cedes(of, to).min(self.sum(|held| !held.pinned && held.dataset == of && held.spare)),
                Some(priority) if self.terms[of].priority == priority => self.cedes(of, to),
                Some(_) => 0,
            });
            while missing > 0 {
                // As much of each as it has among what was used longest ago.
                let mut stale = self.candidates(|held| left[held.dataset] > 0 && (held.spare || !spares[held.dataset]));
                stale.sort_by_key(|chunk| (!self.held[chunk].spare, self.held[chunk].used));
                let (mut shares, mut sum) = ([0, 0], 0);
                for Held { dataset, bytes: size, .. } in stale.iter().map(|chunk| self.held[chunk]) {
                    if sum < missing {
                        shares[dataset] += size;
                        sum += size;
                    }
                }
                if sum == 0 {
                    break;
                }
                for of in (0..2).filter(|of| shares[*of] > 0) {
                    let gone = self.drop_of(of, shares[of], left[of], spares[of]);
                    missing = missing.saturating_sub(gone);
                    left[of] = if gone < shares[of] { 0 } else { left[of] - gone };
                }
            }
        }
    }

    /// Whether it is admitted; if not, room is made where it can be.
    fn admit(&mut self, chunk: usize, bytes: u64) -> bool {
        let dataset = chunk % 2;
        if self.missing(dataset, bytes) != (0, 0) {
            self.refuse(dataset, bytes);
            return false;
        }
        self.clock += 1;
        let (admitted, used) = (self.clock, self.clock);
        let flags = Held { pinned: false, superseded: false, spare: false, dataset, bytes, admitted, used, hits: 0 };
        self.held.insert(chunk, flags);
        true
    }

    fn enforce_quotas(&mut self) {
        for dataset in 0..2 {
            let (over, _) = self.missing(dataset, 0);
            self.drop_of(dataset, over, u64::MAX, false);
        }
    }

    fn pin(&mut self, chunk: usize, pinned: bool) -> bool {
        let Some(Held { dataset, bytes, pinned: before, .. }) = self.held.get(&chunk).copied() else { return !pinned };
        let fits = self.sum(|held| held.pinned && held.dataset == dataset) + bytes
            <= self.terms[dataset].quota.unwrap_or(u64::MAX)
            && self.sum(|held| held.pinned) + bytes <= self.low;
        if pinned && !before && !fits {
            return false;
        }
        self.held.entry(chunk).and_modify(|held| held.pinned = pinned);
        true
    }
}

fn check(ops: &[Op], low_percent: u8) {
    let mut real = Fixture::new(low_percent);
    let hold = DatasetPolicy::default();
    let low = CAPACITY * u64::from(low_percent) / 100;
    let mut model = Model { held: BTreeMap::new(), terms: [hold; 2], hands: [0; 2], low, clock: 0 };
    let specs: Vec<_> = SIZES.iter().enumerate().map(|(n, size)| spec(n % 2, &format!("f{n}"), *size)).collect();
    let announce = |real: &Fixture, terms: &[DatasetPolicy; 2]| {
        (0..2).for_each(|index| real.announce(index, terms[index]));
    };
    announce(&real, &model.terms);
    for op in ops {
        match *op {
            Op::Admit { chunk } => {
                // Superseded chunks that go may let what is left suffice: then the third attempt has its room.
                for _ in 0..3 {
                    if model.held.contains_key(&chunk) {
                        break;
                    }
                    let bytes = SIZES[chunk] + overhead(&specs[chunk]);
                    assert_eq!(real.write(&specs[chunk], 1), model.admit(chunk, bytes), "{op:?}");
                }
            }
            Op::Read { chunk, verified } => {
                model.clock += 1;
                let used = model.held.get_mut(&chunk).map(|held| {
                    (held.used, held.hits) = (model.clock, held.hits + 1);
                });
                assert_eq!(real.read(&specs[chunk], verified), used.is_some());
            }
            Op::Pin { chunk, pinned } => {
                assert_eq!(real.store.pin(specs[chunk].key, pinned).is_ok(), model.pin(chunk, pinned), "{op:?}");
            }
            Op::Supersede { chunk } => {
                real.store.supersede(specs[chunk].key.file);
                model.held.entry(chunk).and_modify(|held| held.superseded = true);
            }
            Op::Remove { chunk } => {
                real.store.remove(specs[chunk].key);
                model.held.retain(|held, Held { pinned, .. }| *held != chunk || *pinned);
            }
            Op::Terms { dataset, terms } => {
                real.announce(dataset, terms);
                model.terms[dataset] = terms;
            }
            Op::Spare { chunks } => {
                let is_spare = |chunk: usize| chunks & 1 << chunk != 0;
                let spares: Vec<_> = (0..SIZES.len()).filter(|chunk| is_spare(*chunk)).map(|n| &specs[n]).collect();
                real.mark_spare(&spares);
                model.held.iter_mut().for_each(|(chunk, held)| held.spare = is_spare(*chunk));
            }
            Op::Reopen => {
                real.reopen();
                announce(&real, &model.terms);
                model.held.values_mut().for_each(|held| (held.used, held.hits, held.spare) = (held.admitted, 0, false));
                model.hands = [0; 2];
            }
        }
        real.store.shared.round();
        model.enforce_quotas();
        assert_eq!(held(&real, &specs), model.held.keys().copied().collect::<Vec<_>>(), "{op:?}");
        assert_eq!(real.store.totals().used, model.sum(|_| true));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 100,
        rng_seed: RngSeed::Fixed(0x0f0e_bae5),
        max_shrink_iters: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_goes_is_what_the_model_drops(
        ops in proptest::collection::vec(op(), 20..120),
        low_percent in prop_oneof![Just(95u8), Just(80)],
    ) {
        check(&ops, low_percent);
    }
}

/// Files of a block that are stored one after the other.
fn stored(fixture: &Fixture, dataset: usize, names: std::ops::Range<u32>) -> Vec<ChunkSpec> {
    let specs: Vec<_> = names.map(|n| spec(dataset, &format!("f{n}"), BLOCK_SIZE)).collect();
    specs.iter().for_each(|spec| assert!(fixture.write(spec, 1)));
    specs
}

fn held(fixture: &Fixture, specs: &[ChunkSpec]) -> Vec<usize> {
    (0..specs.len()).filter(|n| fixture.holds(&specs[*n])).collect()
}

/// Six such files are below the high watermark, seven above it.
#[test]
fn the_tier_takes_room_from_those_who_give_way() {
    let fixture = Fixture::new(95);
    fixture.set(0, Policy::Hold, None);
    fixture.set(1, Policy::Lru, None);
    let kept = stored(&fixture, 0, 0..3);
    let passing = stored(&fixture, 1, 0..3);
    assert!(fixture.read(&passing[0], false));
    let new = spec(1, "new", BLOCK_SIZE);
    assert!(!fixture.write(&new, 1), "who comes first is streamed past");
    assert!(fixture.write(&new, 1));
    assert_eq!((held(&fixture, &kept), held(&fixture, &passing)), (vec![0, 1, 2], vec![0, 2]));
    // From now on both give way, and the one that is used least does so first.
    fixture.set(0, Policy::Lru, None);
    assert!(fixture.read(&kept[0], true) && fixture.read(&passing[2], true));
    let mine = spec(0, "mine", BLOCK_SIZE);
    assert!(!fixture.write(&mine, 1) && fixture.write(&mine, 1));
    assert_eq!((held(&fixture, &kept), held(&fixture, &passing)), (vec![0, 2], vec![0, 2]));
    assert_eq!(fixture.store.usage(dataset(0)).evicted_bytes, BLOCK_SIZE);
}

#[test]
fn what_holds_takes_the_place_of_what_gives_way_and_never_the_reverse() {
    let fixture = Fixture::new(95);
    fixture.set(0, Policy::Hold, None);
    fixture.set(1, Policy::Lru, None);
    let kept = stored(&fixture, 0, 0..3);
    let passing = stored(&fixture, 1, 0..3);
    assert!(fixture.read(&passing[0], false));
    let mine: Vec<_> = (0..4).map(|n| spec(0, &format!("mine{n}"), BLOCK_SIZE)).collect();
    for (file, left) in mine.iter().zip([&[0, 2][..], &[0], &[]]) {
        assert!(!fixture.write(file, 1), "who comes first is streamed past");
        assert_eq!(held(&fixture, &passing), left);
        assert!(fixture.write(file, 1));
    }
    // All that is left holds: neither it nor others displace it.
    for _ in 0..2 {
        assert!(!fixture.write(&mine[3], 1) && !fixture.write(&passing[0], 1));
    }
    assert_eq!((held(&fixture, &kept), held(&fixture, &mine)), (vec![0, 1, 2], vec![0, 1, 2]));
    assert_eq!(fixture.store.usage(dataset(0)).evicted_bytes, 0);
    assert_eq!(fixture.store.usage(dataset(1)).evicted_bytes, 3 * BLOCK_SIZE);
}

#[test]
fn what_is_pinned_or_in_use_does_not_give_way() {
    let fixture = Fixture::new(95);
    fixture.set(0, Policy::Hold, None);
    fixture.set(1, Policy::Lru, None);
    let passing = stored(&fixture, 1, 0..6);
    fixture.store.pin(passing[0].key, true).unwrap();
    let in_use = fixture.store.chunk(&passing[1], false).unwrap();
    let mine: Vec<_> = (0..2).map(|n| spec(0, &format!("mine{n}"), BLOCK_SIZE)).collect();
    assert!(!fixture.write(&mine[0], 1) && fixture.write(&mine[0], 1));
    assert_eq!(held(&fixture, &passing), [0, 1, 3, 4, 5]);
    drop(in_use);
    assert!(!fixture.write(&mine[1], 1) && fixture.write(&mine[1], 1));
    assert_eq!(held(&fixture, &passing), [0, 3, 4, 5]);
}

#[test]
fn the_tier_gives_way_down_to_the_low_watermark() {
    const SIZE: u64 = 5_000;
    let fixture = Fixture::new(80);
    fixture.set(0, Policy::Hold, None);
    fixture.set(1, Policy::Lru, None);
    let one = SIZE + overhead(&spec(1, "0", SIZE));
    let passing: Vec<_> = (0..HIGH / one).map(|n| spec(1, &n.to_string(), SIZE)).collect();
    assert!(passing.iter().all(|spec| fixture.write(spec, 1)));
    let full = fixture.store.totals().used;
    assert!(!fixture.write(&spec(0, "mine", SIZE), 1));
    let gone = full - fixture.store.totals().used;
    // All of it may go, and it is a little less than the high watermark.
    let between = HIGH - CAPACITY * 80 / 100;
    assert!((between - one..between + one).contains(&gone), "{gone}");
    let first = (gone / one) as usize;
    assert_eq!(held(&fixture, &passing), (first..passing.len()).collect::<Vec<_>>(), "the oldest go");
}

#[test]
fn nothing_goes_for_what_would_not_fit_all_the_same() {
    let fixture = Fixture::new(95);
    fixture.set(0, Policy::Hold, None);
    fixture.set(1, Policy::Lru, None);
    stored(&fixture, 0, 0..6);
    let small = spec(1, "small", 1);
    assert!(fixture.write(&small, 1));
    for _ in 0..2 {
        assert!(!fixture.write(&spec(1, "block", BLOCK_SIZE), 1) && fixture.holds(&small));
    }
}

#[test]
fn a_chunk_that_grows_takes_room_from_others_and_not_from_itself() {
    let fixture = Fixture::new(95);
    fixture.set(0, Policy::Lru, Some(5 * BLOCK_SIZE));
    let others = stored(&fixture, 0, 0..2);
    let large = spec(0, "large", 64 * BLOCK_SIZE);
    assert!(fixture.write(&large, 1));
    // All three are used now; the one that grows longest ago.
    others.iter().for_each(|spec| assert!(fixture.read(spec, false)));
    assert!(!fixture.write(&large, 3) && fixture.write(&large, 3));
    assert_eq!(held(&fixture, &others), [1]);
    // Two blocks more and what is beside them would not fit without the other one either.
    assert!(!fixture.write(&large, 5) && fixture.holds(&large));
    assert_eq!(held(&fixture, &others), [1]);
}

#[test]
fn an_edit_of_the_policy_is_live() {
    let fixture = Fixture::new(95);
    let three = 3 * (BLOCK_SIZE + overhead(&spec(0, "f0", BLOCK_SIZE)));
    fixture.set(0, Policy::Hold, Some(three));
    let files = stored(&fixture, 0, 0..3);
    let new = spec(0, "new", BLOCK_SIZE);
    assert!(!fixture.write(&new, 1) && !fixture.write(&new, 1));
    // What was read while it held counts.
    assert!(fixture.read(&files[0], false));
    fixture.set(0, Policy::Lru, Some(three));
    assert!(!fixture.write(&new, 1) && fixture.write(&new, 1));
    assert_eq!(held(&fixture, &files), [0, 2]);
    fixture.set(0, Policy::Hold, Some(three));
    assert!(!fixture.write(&files[1], 1) && !fixture.write(&files[1], 1));
    assert_eq!(held(&fixture, &files), [0, 2]);
}

#[test]
fn what_nobody_uses_for_its_lifetime_goes() {
    let fixture = Fixture::new(95);
    let lifetime = Duration::from_secs(3200);
    let terms = DatasetPolicy { ttl: Some(lifetime), ..DatasetPolicy::default() };
    fixture.store.set_dataset(dataset(0), terms);
    fixture.set(1, Policy::Hold, None);
    let (mine, others) = (stored(&fixture, 0, 0..4), stored(&fixture, 1, 0..1));
    fixture.store.pin(mine[1].key, true).unwrap();
    let begin = Instant::now() + lifetime / 8;
    let expire = |after: Duration| fixture.store.shared.expire(begin + after);
    expire(Duration::ZERO);
    assert!(fixture.read(&mine[0], true));
    let open = fixture.store.chunk(&mine[2], false);
    expire(lifetime - Duration::from_secs(1));
    assert_eq!(held(&fixture, &mine), [0, 1, 2, 3]);
    expire(lifetime);
    // Used since, pinned, in use.
    assert_eq!((held(&fixture, &mine), held(&fixture, &others)), (vec![0, 1, 2], vec![0]));
    drop(open);
    expire(2 * lifetime);
    assert_eq!((held(&fixture, &mine), held(&fixture, &others)), (vec![1], vec![0]));
    let usage = fixture.store.usage(dataset(0));
    assert_eq!((usage.expired_bytes, usage.evicted_bytes), (3 * BLOCK_SIZE, 0));
}
