//! Buffers of large frames, used again: memory that is new to a process has to be cleared and mapped page by page, which
//! costs half as much as the copy of the bytes into it.

use parking_lot::Mutex;

/// Smaller ones are left to the allocator, which keeps them itself.
const LEAST: usize = 128 << 10;

/// Buffers that nobody uses, at most so many bytes of them.
#[derive(Debug)]
pub(crate) struct Buffers {
    most: usize,
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, spare: Mutex::default() }
    }

    /// An empty buffer with room for `len` bytes, and for a sixteenth more at most.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        if len >= LEAST {
            let mut spare = self.spare.lock();
            let fits = |buffer: &Vec<u8>| (len..=len + len / 16).contains(&buffer.capacity());
            if let Some(place) = spare.iter().rposition(fits) {
                return spare.swap_remove(place);
            }
        }
        Vec::with_capacity(len)
    }

    /// Keeps a buffer for the next one, if there is room.
    pub(crate) fn give(&self, mut buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        if capacity < LEAST {
            return;
        }
        buffer.clear();
        let mut spare = self.spare.lock();
        if capacity + spare.iter().map(Vec::capacity).sum::<usize>() <= self.most {
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_used_again_and_no_more_is_kept_than_may_be() {
        let buffers = Buffers::new(4 * LEAST);
        let place = |buffer: &Vec<u8>| buffer.as_ptr();
        let mut first = buffers.take(LEAST);
        first.extend_from_slice(b"old");
        let at = place(&first);
        buffers.give(first);
        // Too small, and too large by far.
        assert_ne!(place(&buffers.take(2 * LEAST)), at);
        assert_ne!(place(&buffers.take(LEAST - 1)), at);
        let again = buffers.take(LEAST);
        assert!(place(&again) == at && again.is_empty());
        for len in [2 * LEAST, 3 * LEAST, LEAST - 1, 2 * LEAST] {
            buffers.give(Vec::with_capacity(len));
        }
        let kept: Vec<usize> = buffers.spare.lock().iter().map(Vec::capacity).collect();
        assert_eq!(kept, [2 * LEAST, 2 * LEAST]);
    }
}
