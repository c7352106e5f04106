//! Tests of the node table: against a model, through second mappings, and under SIGKILL.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn file(version: u64) -> NodeKind {
    let key = VersionKey::new(Bytes::from(format!("\"etag-{version:032x}\""))).unwrap();
    NodeKind::File { version: FileVersion { size: version * 3, mtime_ns: -(version as i64), key } }
}

fn again(table: &NodeTable) -> NodeTable {
    NodeTable::attach(table.fd().try_clone_to_owned().unwrap()).unwrap()
}

fn small() -> NodeTable {
    NodeTable::create(1 << 20).unwrap()
}

#[test]
fn ids_paths_and_versions() {
    let table = small();
    let root = table.resolve(ROOT_ID).unwrap();
    assert_eq!((root.parent, root.kind), (ROOT_ID, NodeKind::Directory));
    let dir = table.intern(ROOT_ID, b"a b\n", &NodeKind::Directory).unwrap();
    assert_eq!(dir, FIRST_ID);
    let one = table.intern(dir, b"x", &file(1)).unwrap();
    let two = table.intern(dir, b"x", &file(2)).unwrap();
    let three = table.intern(dir, b"x", &file(3)).unwrap();
    assert_eq!(table.current(dir, b"x"), Some(three));
    assert_eq!(table.intern(dir, b"x", &file(1)).unwrap(), one);
    assert_eq!(table.current(dir, b"x"), Some(one));
    assert_eq!(table.find(dir, b"x", &file(2)), Some(two));
    assert_eq!(table.intern(dir, b"x", &file(2)).unwrap(), two);
    let as_directory = table.intern(dir, b"x", &NodeKind::Directory).unwrap();
    let table = again(&table);
    assert_eq!(table.current(dir, b"x"), Some(as_directory));
    assert_eq!(table.intern(dir, b"x", &file(3)).unwrap(), three);
    assert_eq!(table.resolve(two), Some(Node { parent: dir, name: Bytes::from_static(b"x"), kind: file(2) }));
    assert_eq!(table.path(two).unwrap().as_bytes(), b"/a b\n/x");
    assert_eq!(table.path(ROOT_ID), Some(DatasetPath::root()));
    let path = DatasetPath::parse(Bytes::from_static(b"/a b\n/x")).unwrap();
    assert_eq!(table.find_directory(&path), Some(as_directory));
    assert_eq!(table.find_directory(&DatasetPath::root()), Some(ROOT_ID));
    // A file is no directory, and what is in it has no path.
    let inside = table.intern(one, b"y", &file(1)).unwrap();
    assert_eq!(table.path(inside), None);
    for bad in [&b""[..], b".", b"a/b", b"a\0", &[b'x'; 256]] {
        assert!(table.intern(ROOT_ID, bad, &file(1)).is_err());
        assert_eq!(table.current(ROOT_ID, bad), None);
    }
    let longest = VersionKey::new(Bytes::from(vec![b'k'; 255])).unwrap();
    let longest = NodeKind::File { version: FileVersion { size: u64::MAX, mtime_ns: i64::MIN, key: longest } };
    let id = table.intern(ROOT_ID, &[b'n'; 255], &longest).unwrap();
    assert_eq!(table.resolve(id).unwrap().kind, longest);
}

#[test]
fn ids_that_were_never_given_out_are_unknown() {
    let table = small();
    // Contents that look like a record, if anything does.
    let name: Vec<u8> = (1u8..=255).filter(|b| *b != b'/').collect();
    let mut known = std::collections::BTreeSet::new();
    for version in 0..50 {
        known.insert(table.intern(ROOT_ID, &name, &file(version)).unwrap());
    }
    let end = table.stats().arena_bytes / 8 + FIRST_ID;
    for id in (0..end + 100).chain([u64::MAX, u64::MAX / 8, 1 << 32, 1 << 61, (1 << 61) + 16]) {
        assert_eq!(table.resolve(id).is_some(), id == ROOT_ID || known.contains(&id), "{id}");
    }
}

#[test]
fn a_full_table_says_so_and_goes_on_reading() {
    let table = small();
    let mut interned = Vec::new();
    let error = loop {
        let name = format!("file-{}", interned.len());
        match table.intern(ROOT_ID, name.as_bytes(), &file(1)) {
            Ok(id) => interned.push((name, id)),
            Err(error) => break error,
        }
    };
    assert_eq!(error, TableFull("node"));
    assert!(interned.len() > 5_000);
    let table = again(&table);
    for (name, id) in &interned {
        assert_eq!(table.current(ROOT_ID, name.as_bytes()), Some(*id));
        assert_eq!(table.intern(ROOT_ID, name.as_bytes(), &file(1)), Ok(*id));
    }
}

#[test]
fn damaged_headers_are_refused() {
    let damage = |offset: u64, value: u64| {
        let table = small();
        table.map.word(offset).store(value, Relaxed);
        NodeTable::attach(table.fd().try_clone_to_owned().unwrap()).is_err()
    };
    assert!(damage(H_MAGIC, MAGIC + 1));
    for offset in [H_ARENA_LEN, H_MAX_LOG2, H_END, H_LOG2] {
        for value in [0, 1, 7, u64::MAX, 1 << 40, i64::MAX as u64] {
            assert!(damage(offset, value), "{offset} {value}");
        }
    }
}

#[test]
fn damage_inside_is_no_crash() {
    let table = small();
    for index in 0..500u64 {
        table.intern(ROOT_ID, format!("n{index}").as_bytes(), &file(index)).unwrap();
    }
    let mut random = 88172645463325252u64;
    for _ in 0..200 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let words = (table.stats().arena_bytes / 8).max(1);
        table.map.word(PAGE + 8 * (FIRST_ID + random % words)).store(random, Relaxed);
        table.map.word(table.region(MIN_LOG2) + 8 * (random % 4096)).store(random.rotate_left(20), Relaxed);
    }
    for index in 0..500u64 {
        let id = table.intern(ROOT_ID, format!("n{index}").as_bytes(), &file(index)).unwrap();
        assert_eq!(table.resolve(id).unwrap().kind, file(index));
        assert!(table.path(id).is_some());
    }
}

#[test]
fn growth_keeps_everything_and_memory_is_bounded() {
    let table = NodeTable::create(1 << 30).unwrap();
    let dir = table.intern(ROOT_ID, b"train", &NodeKind::Directory).unwrap();
    let count = 200_000u64;
    let started = Instant::now();
    let ids: Vec<u64> =
        (0..count).map(|i| table.intern(dir, format!("img_{i:010}.jpeg").as_bytes(), &file(i)).unwrap()).collect();
    let took = started.elapsed();
    let stats = table.stats();
    let per_entry = stats.resident_bytes / count;
    println!(
        "{count} entries (19-byte names, 39-byte keys): {} arena + index = {per_entry} bytes each, {:?} each",
        stats.arena_bytes / count,
        took / count as u32
    );
    assert!(per_entry < 150, "{per_entry}");
    assert_eq!(stats.names, count + 1);
    let table = again(&table);
    let started = Instant::now();
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(table.current(dir, format!("img_{i:010}.jpeg").as_bytes()), Some(*id));
    }
    println!("lookup {:?} each", started.elapsed() / count as u32);
}

#[test]
fn readers_need_no_lock_while_it_grows() {
    let table = small();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let first = table.intern(ROOT_ID, b"first", &file(0)).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0u64;
            while !stop.load(Relaxed) {
                assert_eq!(table.current(ROOT_ID, b"first"), Some(first));
                assert_eq!(table.resolve(first).unwrap().name.as_ref(), b"first");
                rounds += 1;
            }
            rounds
        });
        for index in 0..6_000u64 {
            table.intern(ROOT_ID, format!("n{index}").as_bytes(), &NodeKind::Directory).unwrap();
        }
        stop.store(true, Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
    assert!(table.log2() > MIN_LOG2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn like_a_map(steps in proptest::collection::vec((0u8..12, 0u64..6, 0u64..30, 0u64..4), 1..300)) {
        let mut table = small();
        let mut nodes: HashMap<(u64, u64, u64), u64> = HashMap::new();
        let mut current: HashMap<(u64, u64), u64> = HashMap::new();
        let mut directories = vec![ROOT_ID];
        for (what, dir, name, version) in steps {
            let parent = directories[dir as usize % directories.len()];
            let text = format!("name{name}");
            match what {
                0..=7 => {
                    let id = table.intern(parent, text.as_bytes(), &file(version)).unwrap();
                    let known = *nodes.entry((parent, name, version)).or_insert(id);
                    prop_assert_eq!(known, id);
                    current.insert((parent, name), id);
                }
                8 => {
                    let id = table.intern(parent, format!("dir{name}").as_bytes(), &NodeKind::Directory).unwrap();
                    if !directories.contains(&id) {
                        directories.push(id);
                    }
                }
                9 => table = again(&table),
                _ => {
                    let other = again(&table);
                    for ((parent, name), id) in &current {
                        prop_assert_eq!(other.current(*parent, format!("name{name}").as_bytes()), Some(*id));
                    }
                    let mut ids: Vec<u64> = nodes.values().copied().collect();
                    ids.sort_unstable();
                    ids.dedup();
                    prop_assert_eq!(ids.len(), nodes.len());
                }
            }
        }
        for ((parent, name, version), id) in &nodes {
            let node = table.resolve(*id).unwrap();
            prop_assert_eq!(node.parent, *parent);
            prop_assert_eq!(node.name, Bytes::from(format!("name{name}")));
            prop_assert_eq!(node.kind, file(*version));
            let path = table.path(*id).unwrap();
            prop_assert_eq!(table.find_directory(&path.split().unwrap().0), Some(*parent));
        }
    }
}

/// In the child: where the table is.
const CHILD: &str = "FOREBAY_TEST_NODE_WRITER";

/// Reads everything that was published, as a successor would. Returns how many records are known by their name, and how
/// many are not: those of writers that were killed between publishing and linking, at most one each.
fn verify(table: &NodeTable) -> (u64, u64) {
    let end = table.map.word(H_END).load(Acquire) / 8;
    let (mut id, mut records, mut orphans) = (FIRST_ID, 0, 0);
    while id < end {
        let Some(record) = table.record(id) else { panic!("no record at {id} of {end}") };
        let Node { parent, name, kind } = record.node;
        match table.find(parent, &name, &kind) {
            Some(found) if found == id => records += 1,
            // Not linked when its writer was killed; the next writer of that name made another.
            _ => orphans += 1,
        }
        id += Draft::new(parent, &name, &kind).unwrap().len as u64;
    }
    assert_eq!(id, end);
    (records, orphans)
}

#[test]
fn a_writer_killed_at_any_moment_leaves_a_whole_table() {
    if let Ok(fd) = std::env::var(CHILD) {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
        // SAFETY: the parent passed exactly this descriptor, and nothing else here uses it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd.parse().unwrap()) };
        let table = NodeTable::attach(fd).unwrap();
        let mut random = u64::from(std::process::id()) | 1;
        loop {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let name = format!("n{}", random % 2_000_000);
            let id = table.intern(ROOT_ID, name.as_bytes(), &file(random % 3)).unwrap();
            assert_eq!(table.resolve(id).unwrap().name, name.as_bytes());
        }
    }
    let table = NodeTable::create(1 << 30).unwrap();
    let mut pause = 12345u64;
    let mut records = 0;
    for round in 0..50u64 {
        let fd = table.fd().try_clone_to_owned().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tables::nodes::tests::a_writer_killed_at_any_moment_leaves_a_whole_table"]);
        command.env(CHILD, fd.as_raw_fd().to_string()).stdout(Stdio::null()).stderr(Stdio::null());
        let keep = move || Ok(rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?);
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(keep) };
        let before = table.stats().arena_bytes;
        let mut child = command.spawn().unwrap();
        let started = Instant::now();
        while table.stats().arena_bytes == before {
            assert!(started.elapsed() < Duration::from_secs(30) && child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        pause = pause.wrapping_mul(6364136223846793005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(pause >> 50)); // Up to 16 ms.
        child.kill().unwrap();
        child.wait().unwrap();
        let successor = again(&table);
        if round % 10 == 9 {
            let (now, orphans) = verify(&successor);
            assert!(now > records);
            assert!(orphans <= round + 1, "{orphans} orphans after {} kills", round + 1);
            println!("{} kills: {now} records whole, {orphans} orphans", round + 1);
            records = now;
        }
    }
}
