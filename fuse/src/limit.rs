//! How much memory this process may use: the limit of its control group (versions 1 and 2), or what the machine has.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Of a limit, the part that file contents may take at most and at least. The rest is for what is not counted: the tables
/// of names (shared memory is charged to whoever writes it first), socket buffers, the runtime.
const SHARE: (u64, u64) = (2, 8);
/// What stays for that where the limit allows it: a daemon that has shown a million names takes 160 MiB.
const REST: u64 = 192 << 20;
/// The most that is taken where nobody set a limit, and the part of the machine's memory.
const UNLIMITED: (u64, u64) = (1 << 30, 4);

/// Memory for file contents when nothing else is said, in bytes.
pub fn default_memory_budget() -> usize {
    let machine = machine(Path::new("/proc/meminfo"));
    let limit = groups(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
    usize::try_from(budget(limit, machine)).unwrap_or(usize::MAX)
}

fn budget(limit: Option<u64>, machine: Option<u64>) -> u64 {
    // Version 1 writes "no limit" as a number that no machine has.
    match limit.filter(|limit| machine.is_none_or(|machine| *limit < machine)) {
        Some(limit) => (limit / SHARE.0).min(limit.saturating_sub(REST)).max(limit / SHARE.1),
        None => machine.map_or(UNLIMITED.0, |machine| (machine / UNLIMITED.1).min(UNLIMITED.0)),
    }
}

/// The machine's memory.
fn machine(meminfo: &Path) -> Option<u64> {
    let text = fs::read_to_string(meminfo).ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The lowest limit of the groups that this process is in. `own` lists them (see cgroups(7)), `root` is where they are
/// mounted. In a container either may begin at the container's own group, so a path that is not there is no error.
fn groups(own: &Path, root: &Path) -> Option<u64> {
    let text = fs::read_to_string(own).ok()?;
    let limits = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (base, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => return None,
        };
        lowest(&base, Path::new(path), file)
    });
    limits.min()
}

/// A group is bound by the limits of those above it, too.
fn lowest(base: &Path, path: &Path, file: &str) -> Option<u64> {
    let inside: PathBuf = path.components().filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
    let limits = inside.ancestors().filter_map(|group| {
        // "max" is no number, and no limit.
        fs::read_to_string(base.join(group).join(file)).ok()?.trim().parse().ok()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limit(own: &str, files: &[(&str, &str)]) -> Option<u64> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let list = dir.path().join("cgroup");
        fs::write(&list, own).unwrap();
        groups(&list, &root)
    }

    #[test]
    fn the_lowest_limit_above_this_process_counts() {
        let own = "0::/kubepods/pod7/c1\n";
        let tree = [
            ("kubepods/memory.max", "max\n"),
            ("kubepods/pod7/memory.max", "2097152\n"),
            ("kubepods/pod7/c1/memory.max", "4194304\n"),
            ("other/memory.max", "1\n"),
        ];
        assert_eq!(limit(own, &tree), Some(2 * MIB));
        // The container sees its own group at the root, under a name that is not there.
        assert_eq!(limit(own, &[("memory.max", "3145728\n")]), Some(3 * MIB));
        assert_eq!(limit("0::/../..\n", &[("memory.max", "3145728\n")]), Some(3 * MIB));
        assert_eq!(limit("0::/\n", &[("memory.max", "max\n")]), None);
        let first = "4:cpu,memory:/kubepods/c1\n0::/\n";
        assert_eq!(limit(first, &[("memory/memory.limit_in_bytes", "1048576\n")]), Some(MIB));
        assert_eq!(limit("garbage", &[]), None);
    }

    #[test]
    fn the_budget_is_a_part_of_what_there_is() {
        let machine = Some(16 << 30);
        for (limit, given) in [(4096, 2048), (512, 256), (256, 64), (200, 25), (64, 8)] {
            assert_eq!(budget(Some(limit * MIB), machine), given * MIB);
        }
        assert_eq!(budget(Some(i64::MAX as u64 & !4095), machine), 1 << 30);
        assert_eq!(budget(None, Some(2 << 30)), 512 * MIB);
        assert_eq!(budget(None, None), 1 << 30);
        assert!(default_memory_budget() > 0);
    }
}
