//! `/proc/self/mountinfo`: what is mounted, without touching it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The device number of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Device {
    /// 0 for file systems without a block device.
    pub major: u32,
    /// Counts them.
    pub minor: u32,
}

impl Device {
    /// The name of a FUSE connection under fusectl: the kernel's own form of the device number.
    pub fn connection(self) -> u64 {
        u64::from(self.major) << 20 | u64::from(self.minor)
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) device: Device,
    pub(crate) target: PathBuf,
    pub(crate) kind: String,
    pub(crate) source: OsString,
}

/// Everything mounted in this process's mount namespace, in order: of several on one target the last is on top.
pub(crate) fn read() -> io::Result<Vec<Entry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// What is on top at a target.
pub(crate) fn at(target: &Path) -> io::Result<Option<Entry>> {
    Ok(read()?.into_iter().rev().find(|entry| entry.target == target))
}

/// Lines that are not understood are left out.
fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /target options [optional fields] - kind source superoptions`
fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = Device { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let target = unescape(fields.nth(1)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8(unescape(fields.next()?)).ok()?;
    let source = OsString::from_vec(unescape(fields.next()?));
    Some(Entry { device, target: PathBuf::from(OsString::from_vec(target)), kind, source })
}

/// Space, tab, newline, backslash and '#' come as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        rest = match tail.split_first_chunk::<3>() {
            Some((octal, after)) if *first == b'\\' && octal.iter().all(|digit| (b'0'..=b'7').contains(digit)) => {
                let value = octal.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                out.push(value as u8); // The kernel escapes bytes: at most \377.
                after
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_the_kernel_writes() {
        let text = b"22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n\
            99 22 0:53 / /mnt/a\\040b\\134\\012c ro,nosuid - fuse.forebay forebay:default/x ro,user_id=0\n\
            broken line\n\
            100 22 0:54 / /m ro shared:1 master:2 - fuse.forebay a#b ro";
        let entries = parse(text);
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[0].kind, "proc");
        assert_eq!(entries[1].target, Path::new("/mnt/a b\\\nc"));
        assert_eq!(entries[1].device, Device { major: 0, minor: 53 });
        assert_eq!(entries[1].device.connection(), 53);
        assert_eq!(entries[1].source, "forebay:default/x");
        assert_eq!(entries[2].source, "a#b");
        assert_eq!(Device { major: 1, minor: 2 }.connection(), (1 << 20) + 2);
    }

    #[test]
    fn the_real_one_has_a_root() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/no/such/mount")).unwrap(), None);
    }
}
