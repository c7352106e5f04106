//! Telling a mount what will be read, as a trainer does it.

use std::{ffi::c_void, fs::File, io};

use rustix::ioctl::{Direction, Ioctl, IoctlOutput, Opcode, opcode};

/// Bytes of one call: what fits into the size field of an ioctl.
const MOST: usize = 16_383;

struct Hint(Vec<u8>);

// SAFETY: the kernel reads exactly as many bytes from the pointer as the opcode's size says, which is the buffer's length,
// and writes none.
unsafe impl Ioctl for Hint {
    type Output = u32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::from_components(Direction::Write, 0xFB, 1, self.0.len())
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(taken: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        Ok(taken.cast_unsigned())
    }
}

/// Says that these files below a directory of a mount will be read, in this order; how many were taken, from the first on.
pub fn hint<'a>(directory: &File, paths: impl IntoIterator<Item = &'a str>) -> io::Result<usize> {
    let (mut taken, mut paths) = (0, paths.into_iter().peekable());
    while paths.peek().is_some() {
        let (mut text, mut count) = (Vec::new(), 0);
        while let Some(path) = paths.next_if(|path| text.len() + path.len() < MOST) {
            text.extend_from_slice(path.as_bytes());
            text.push(0);
            count += 1;
        }
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path does not fit"));
        }
        // SAFETY: the command is the mount's own; another file system refuses it.
        let now = unsafe { rustix::ioctl::ioctl(directory, Hint(text)) }? as usize;
        taken += now;
        if now < count {
            break;
        }
    }
    Ok(taken)
}
