//! Generated contents: bytes as a function of (seed, offset). What must be read is known from here.

use std::sync::Arc;

use crate::Generator;
use bytes::Bytes;

/// Fills `buffer` with the contents of `seed` from `offset` on.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let mut position = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let word = mix(seed.wrapping_mul(0x0100_0000_01b3) ^ (position / 8)).to_le_bytes();
        let within = (position % 8) as usize;
        let count = (8 - within).min(rest.len());
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&word[within..within + count]);
        rest = later;
        position += count as u64;
    }
}

/// splitmix64.
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The first `size` bytes.
pub fn bytes(seed: u64, size: usize) -> Bytes {
    let mut buffer = vec![0; size];
    fill(seed, 0, &mut buffer);
    buffer.into()
}

/// For [`crate::TestStore::put_virtual`].
pub fn generator(seed: u64) -> Generator {
    Arc::new(move |offset, buffer: &mut [u8]| fill(seed, offset, buffer))
}

/// Where `read` (found at `offset`) differs from the contents of `seed`.
pub fn difference(seed: u64, offset: u64, read: &[u8]) -> Option<u64> {
    let mut expected = vec![0; read.len()];
    fill(seed, offset, &mut expected);
    read.iter().zip(&expected).position(|(a, b)| a != b).map(|position| offset + position as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_the_same_in_any_pieces() {
        let mut whole = vec![0; 1000];
        fill(3, 5, &mut whole);
        for cut in [1, 7, 8, 500, 999] {
            let mut pieces = vec![0; 1000];
            let (a, b) = pieces.split_at_mut(cut);
            fill(3, 5, a);
            fill(3, 5 + cut as u64, b);
            assert_eq!(pieces, whole);
        }
    }
}
