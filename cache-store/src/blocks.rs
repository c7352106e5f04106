//! Sets of blocks of one chunk.
//!
//! Invariant: no bit at or beyond `blocks` is ever set, so counting words counts blocks.

use std::fmt;

/// A set of chunk-relative block indexes below `blocks()`.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockSet {
    words: Box<[u64]>,
    blocks: u32,
}

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block.
    pub first: u32,
    /// Number of blocks, at least one.
    pub count: u32,
}

impl BlockSet {
    /// The empty set over `blocks` blocks.
    pub fn new(blocks: u32) -> Self {
        Self { words: vec![0; blocks.div_ceil(64) as usize].into_boxed_slice(), blocks }
    }

    /// Blocks that could be in the set: those of the chunk.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether the set holds `block`; `false` beyond the end.
    pub fn contains(&self, block: u32) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Whether the set holds all of `count` blocks from `first`.
    pub fn contains_run(&self, first: u32, count: u32) -> bool {
        first.checked_add(count).is_some_and(|end| (first..end).all(|block| self.contains(block)))
    }

    /// Adds a block; nothing beyond the end.
    pub fn insert(&mut self, block: u32) {
        if block < self.blocks {
            self.words[(block / 64) as usize] |= 1 << (block % 64);
        }
    }

    /// Takes a block out.
    pub fn remove(&mut self, block: u32) {
        if block < self.blocks {
            self.words[(block / 64) as usize] &= !(1 << (block % 64));
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds what `other`, a set over the same chunk, holds.
    pub fn insert_all(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Takes out what `other`, a set over the same chunk, holds.
    pub fn remove_all(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Number of blocks held.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether every block of the chunk is held.
    pub fn is_full(&self) -> bool {
        self.count() == self.blocks
    }

    /// The blocks held, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.blocks).filter(|block| self.contains(*block))
    }

    /// The blocks held, as runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs_of(0, self.blocks, true)
    }

    /// The blocks that are missing among `count` from `first`, as runs, ascending: what a fill has to fetch.
    pub fn missing(&self, first: u32, count: u32) -> impl Iterator<Item = Run> + '_ {
        self.runs_of(first, count, false)
    }

    /// The same set with everything outside of `count` blocks from `first` taken out.
    pub fn within(&self, first: u32, count: u32) -> Self {
        let mut part = Self::new(self.blocks);
        for block in first..first.saturating_add(count).min(self.blocks) {
            if self.contains(block) {
                part.insert(block);
            }
        }
        part
    }

    /// Little-endian 64-bit words, as they lie on disk.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// `None` when the length is wrong or a bit beyond the end is set.
    pub(crate) fn from_bytes(blocks: u32, bytes: &[u8]) -> Option<Self> {
        let mut set = Self::new(blocks);
        let (words, rest) = bytes.as_chunks::<8>();
        if words.len() != set.words.len() || !rest.is_empty() {
            return None;
        }
        for (mine, word) in set.words.iter_mut().zip(words) {
            *mine = u64::from_le_bytes(*word);
        }
        let used = blocks % 64;
        match set.words.last() {
            Some(last) if used != 0 && last >> used != 0 => None,
            _ => Some(set),
        }
    }

    fn runs_of(&self, first: u32, count: u32, held: bool) -> impl Iterator<Item = Run> + '_ {
        let end = first.saturating_add(count).min(self.blocks);
        let mut at = first;
        std::iter::from_fn(move || {
            while at < end && self.contains(at) != held {
                at += 1;
            }
            let start = at;
            while at < end && self.contains(at) == held {
                at += 1;
            }
            (at > start).then_some(Run { first: start, count: at - start })
        })
    }
}

impl fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} blocks", self.count(), self.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_what_is_held_and_what_is_missing() {
        let mut set = BlockSet::new(130);
        for block in [0, 1, 63, 64, 65, 129, 130, 500] {
            set.insert(block);
        }
        assert_eq!(set.count(), 6);
        let run = |first, count| Run { first, count };
        assert_eq!(set.runs().collect::<Vec<_>>(), [run(0, 2), run(63, 3), run(129, 1)]);
        assert_eq!(set.missing(60, 10).collect::<Vec<_>>(), [run(60, 3), run(66, 4)]);
        assert_eq!(set.missing(129, 50).count(), 0);
        assert_eq!(set.within(64, 1).iter().collect::<Vec<_>>(), [64]);
        assert!(set.contains_run(63, 3) && !set.contains_run(63, 4) && !set.contains_run(129, 2));
        assert!(!set.contains_run(u32::MAX, 2));
        let mut full = BlockSet::new(65);
        (0..65).for_each(|block| full.insert(block));
        assert!(full.is_full());
    }

    #[test]
    fn bytes_are_refused_with_bits_beyond_the_end() {
        let mut set = BlockSet::new(65);
        set.insert(64);
        let mut bytes = set.to_bytes();
        assert_eq!(BlockSet::from_bytes(65, &bytes), Some(set));
        bytes[8] |= 2;
        assert_eq!(BlockSet::from_bytes(65, &bytes), None);
        assert_eq!(BlockSet::from_bytes(65, &bytes[..8]), None);
        assert_eq!(BlockSet::from_bytes(64, &bytes), None);
    }
}
