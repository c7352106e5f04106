//! Which file is read when, and what the best of all caches would make of it.

use std::collections::BTreeSet;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

/// Epochs before the cache is as full as it gets: they do not count.
pub const WARMING: usize = 3;
/// Epochs that count.
pub const COUNTED: usize = 6;
/// One of so many files is hot.
const HOT: usize = 50;
/// One of so many reads is of a hot file.
const HOT_READS: u32 = 5;

/// Who reads.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// All files in a new order in every epoch.
    OneJob,
    /// Two of them, equally fast, one half an epoch ahead.
    TwoJobs,
    /// A fifth of the reads is of a fiftieth of the files, as of an index beside the data; the others are an epoch's.
    HotSet,
    /// All files in the same order in every epoch.
    Scan,
}

impl Load {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::OneJob, Self::TwoJobs, Self::HotSet, Self::Scan];

    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneJob => "one job, shuffled",
            Self::TwoJobs => "two jobs, shuffled",
            Self::HotSet => "one job and a hot set",
            Self::Scan => "one job, in order",
        }
    }

    /// The files in the order in which they are read; from where on the reads count.
    pub fn trace(self, files: usize, seed: u64) -> (Vec<u32>, usize) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut epochs = |count: usize| -> Vec<u32> {
            let mut order: Vec<u32> = (0..files as u32).collect();
            let epoch = |_| {
                if !matches!(self, Self::Scan) {
                    order.shuffle(&mut random);
                }
                order.clone()
            };
            (0..count).flat_map(epoch).collect()
        };
        let all = WARMING + COUNTED;
        match self {
            Self::OneJob | Self::Scan => (epochs(all), WARMING * files),
            Self::TwoJobs => {
                let (first, second) = (epochs(all), epochs(all));
                let ahead = files / 2;
                let together = first[ahead..].iter().zip(&second).flat_map(|(one, other)| [*one, *other]);
                (first[..ahead].iter().copied().chain(together).collect(), 2 * WARMING * files)
            }
            Self::HotSet => {
                let data = epochs(all);
                let mut trace = Vec::new();
                for file in data {
                    while random.random_range(0..HOT_READS) == 0 {
                        trace.push(random.random_range(0..(files / HOT).max(1) as u32));
                    }
                    trace.push(file);
                }
                let counted = trace.len() / all * WARMING;
                (trace, counted)
            }
        }
    }
}

/// Part of the reads that a cache of `room` files answers which knows all that is to come, may leave a file uncached, and
/// holds at the beginning what is best: no other answers more.
pub fn bound(trace: &[u32], files: usize, room: usize) -> f64 {
    const NEVER: usize = usize::MAX;
    let mut next = vec![NEVER; trace.len()];
    let mut seen = vec![NEVER; files];
    for (place, file) in trace.iter().enumerate().rev() {
        next[place] = std::mem::replace(&mut seen[*file as usize], place);
    }
    // By when they are read next; who is read last goes first.
    let mut held: BTreeSet<(usize, u32)> = seen.into_iter().zip(0..).collect();
    let mut hits = 0;
    for (place, file) in trace.iter().enumerate() {
        while held.len() > room {
            held.pop_last();
        }
        hits += usize::from(held.remove(&(place, *file)));
        held.insert((next[place], *file));
    }
    hits as f64 / trace.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_file_once() {
        for load in [Load::OneJob, Load::Scan] {
            let (trace, counted) = load.trace(50, 1);
            assert_eq!((trace.len(), counted), ((WARMING + COUNTED) * 50, WARMING * 50));
            for epoch in trace.chunks(50) {
                assert_eq!(epoch.iter().collect::<BTreeSet<_>>().len(), 50);
            }
        }
        let (trace, _) = Load::TwoJobs.trace(50, 1);
        let mine: Vec<u32> = trace[25..].iter().step_by(2).skip(25).take(50).copied().collect();
        assert_eq!(mine.iter().collect::<BTreeSet<_>>().len(), 50, "the first job's second epoch");
    }

    #[test]
    fn the_bound_is_what_can_be_had() {
        // In order, what is kept is hit in every epoch; nothing does better.
        let (trace, _) = Load::Scan.trace(100, 1);
        assert!((bound(&trace, 100, 40) - 0.4).abs() < 0.02);
        assert_eq!((bound(&trace, 100, 100), bound(&trace, 100, 0)), (1.0, 0.0));
        // By hand, with room for one: 1 is there, and is kept until its second read and then until its third.
        assert_eq!(bound(&[1, 2, 1, 3, 2, 1], 4, 1), 3.0 / 6.0);
    }
}
