//! What the source may do to us: faults, changes under readers, odd names, huge directories and objects.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    collections::BTreeSet,
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use forebay_test_store::{Action, Fault, Verb};
use support::{BUCKET, Bench, SHAPES, Setup, can_mount, content, text};

fn is_errno(error: &std::io::Error, errno: rustix::io::Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_store_end_in_right_bytes() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), |store| async move {
        for seed in 0..7 {
            store.put(BUCKET, &format!("file-{seed}"), content::bytes(seed, 3 << 20)).await;
        }
        store
    })
    .await;
    let actions = [
        Action::Status(500),
        Action::Status(503),
        Action::Reset { after: None },
        Action::Reset { after: Some(200_000) },
        Action::Truncate { after: 100_000 },
        Action::StallBody { after: 100_000, stall: Duration::from_secs(120) },
        Action::Delay(Duration::from_millis(300)),
    ];
    for (seed, action) in actions.into_iter().enumerate() {
        let name = format!("file-{seed}");
        bench.store.faults().add(Fault::new(action.clone()).on(Verb::Get).key(&name).times(1));
        let read = std::fs::read(bench.path(&name)).unwrap_or_else(|error| panic!("{action:?}: {error}"));
        assert_eq!(read, content::bytes(seed as u64, 3 << 20), "{action:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_stays_away_is_an_error_by_the_deadline() {
    if !can_mount() {
        return;
    }
    let setup =
        Setup { arguments: ["--deadline", "4", "--node-cache", "0"].map(str::to_owned).to_vec(), ..Setup::default() };
    let bench = Bench::start(setup, |store| async move {
        store.put(BUCKET, "cached", text("cached")).await;
        store.put(BUCKET, "away", text("away")).await;
        store
    })
    .await;
    assert_eq!(std::fs::read(bench.path("cached")).unwrap(), b"cached");
    let fault = bench.store.faults().add(Fault::new(Action::Status(500)));
    let begun = Instant::now();
    let error = std::fs::read(bench.path("away")).unwrap_err();
    assert!(is_errno(&error, rustix::io::Errno::IO), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(30), "EIO came after {:?}", begun.elapsed());
    // What is cached is read as ever, past the page cache too.
    let file = support::readers::open(&bench.path("cached"), true).unwrap();
    let mut buffer = [0; 6];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"cached");
    support::eventually("the problem in the status", Duration::from_secs(10), || {
        bench.up.status()["datasets"][0]["sourceProblem"].as_str().is_some_and(|problem| !problem.is_empty())
    });
    bench.store.faults().remove(fault);
    support::eventually("recovery", Duration::from_secs(30), || {
        std::fs::read(bench.path("away")).is_ok_and(|read| read == b"away")
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overwritten_object_is_stale_and_then_new() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let bench = Bench::start(Setup::shaped(shape), |store| async move {
            store.put_virtual(BUCKET, "file", 8 << 20, content::generator(1));
            store
        })
        .await;
        let old = support::readers::open(&bench.path("file"), true).unwrap();
        let mut buffer = vec![0; 1 << 20];
        old.read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(content::difference(1, 0, &buffer), None);

        bench.store.put_virtual(BUCKET, "file", 8 << 20, content::generator(2));
        // Nobody refreshed: the failed condition of the next fetch finds out.
        let error = old.read_exact_at(&mut buffer, 7 << 20).unwrap_err();
        assert!(is_errno(&error, rustix::io::Errno::STALE), "{error}");
        support::eventually("the new version", Duration::from_secs(15), || {
            std::fs::read(bench.path("file"))
                .is_ok_and(|read| read.len() == 8 << 20 && content::difference(2, 0, &read).is_none())
        });
        // What the old version had cached stays the old version.
        old.read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(content::difference(1, 0, &buffer), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_object_is_stale_and_then_gone() {
    if !can_mount() {
        return;
    }
    for shape in SHAPES {
        let bench = Bench::start(Setup::shaped(shape), |store| async move {
            store.put(BUCKET, "file", content::bytes(1, 4 << 20)).await;
            store.put(BUCKET, "other", text("other")).await;
            store
        })
        .await;
        let file = support::readers::open(&bench.path("file"), true).unwrap();
        bench.store.delete(BUCKET, "file").await;
        let error = file.read_exact_at(&mut [0; 4096], 0).unwrap_err();
        assert!(is_errno(&error, rustix::io::Errno::STALE), "{error}");
        support::eventually("its absence", Duration::from_secs(15), || !bench.path("file").exists());
    }
}

/// The source changes while 16 readers hold the file open and read: each byte they get is of one version, or ESTALE;
/// and the mount is taken from under them in time.
#[tokio::test(flavor = "multi_thread")]
async fn the_mount_goes_down_while_the_source_changes_under_readers() {
    if !can_mount() {
        return;
    }
    for round in 0..20u64 {
        let bench = Bench::start(Setup::default(), |store| async move {
            store.put_virtual(BUCKET, "file", 64 << 20, content::generator(round));
            store
        })
        .await;
        let path = bench.path("file");
        let (open, opened) = std::sync::mpsc::channel();
        let readers: Vec<_> = (0..16u64)
            .map(|reader| {
                let (path, open) = (path.clone(), open.clone());
                std::thread::spawn(move || read_one_version(&path, round, reader, open))
            })
            .collect();
        drop(open);
        // Until all of them have the old version open, and are reading.
        assert_eq!(opened.iter().count(), 16);
        std::thread::sleep(Duration::from_millis(100));
        bench.store.put_virtual(BUCKET, "file", 64 << 20, content::generator(round + 1000));
        let refresh = bench.up.forebay(&["refresh", "data"]);
        assert!(refresh.status.success(), "{}", String::from_utf8_lossy(&refresh.stderr));
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        bench.stop();
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(30), "round {round}: the mount went down after {took:?}");
        let mut stale = 0;
        for reader in readers {
            stale += reader.join().unwrap().unwrap_or_else(|wrong| panic!("round {round}: {wrong}"));
        }
        println!("round {round}: down after {took:?}, {stale} stale reads");
    }
}

/// Reads, with the file open all the time, until the mount is gone. Gives how many reads were stale, or what was wrong.
fn read_one_version(
    path: &std::path::Path,
    old: u64,
    reader: u64,
    open: std::sync::mpsc::Sender<()>,
) -> Result<u64, String> {
    let file = support::readers::open(path, reader.is_multiple_of(2)).map_err(|error| format!("open: {error}"))?;
    let _ = open.send(());
    drop(open);
    let mut buffer = vec![0; 1 << 20];
    let mut stale = 0;
    for turn in 0u64.. {
        let offset = ((turn * 16 + reader) % 64) << 20;
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Err(format!("end of file at {offset}")),
            // Opened before the change: the old version, all of it.
            Ok(count) => match content::difference(old, offset, &buffer[..count]) {
                None => {}
                Some(position) => return Err(format!("a byte of another version at {position}")),
            },
            Err(error) if is_errno(&error, rustix::io::Errno::STALE) => stale += 1,
            Err(error) if is_errno(&error, rustix::io::Errno::NOTCONN) => return Ok(stale),
            Err(error) if is_errno(&error, rustix::io::Errno::CONNABORTED) => return Ok(stale),
            // A buffered read whose pages were on their way when the connection ended.
            Err(error) if is_errno(&error, rustix::io::Errno::IO) => {}
            Err(error) => return Err(format!("at {offset}: {error}")),
        }
    }
    Ok(stale)
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_and_empty_files() {
    if !can_mount() {
        return;
    }
    let names = [
        "with space",
        "ünï-çödé",
        "new\nline",
        "per%cent%20",
        "plus+plus",
        "quote'\"",
        "back\\slash",
        "a=b&c",
        "~tilde",
        "#hash?",
        "日本語",
        "-dash",
        "..two",
        "trailing ",
        "tab\there",
    ];
    let bench = Bench::start(Setup::default(), |store| async move {
        for name in names {
            store.put(BUCKET, &format!("odd/{name}"), text(name)).await;
        }
        store.put(BUCKET, "odd/empty", text("")).await;
        store.put(BUCKET, "both", text("the file is hidden")).await;
        store.put(BUCKET, "both/inside", text("inside")).await;
        store.put(BUCKET, "both-dash", text("between")).await;
        store.put(BUCKET, "slashes//double", text("hidden")).await;
        store
    })
    .await;
    let found: BTreeSet<String> = std::fs::read_dir(bench.path("odd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).chain(["empty".into()]).collect();
    assert_eq!(found, expected);
    for name in names {
        assert_eq!(std::fs::read_to_string(bench.path(&format!("odd/{name}"))).unwrap(), name);
    }
    assert_eq!(std::fs::read(bench.path("odd/empty")).unwrap(), b"");
    // A key that is both file and directory is the directory.
    assert!(std::fs::metadata(bench.path("both")).unwrap().is_dir());
    assert_eq!(std::fs::read(bench.path("both/inside")).unwrap(), b"inside");
    assert_eq!(std::fs::read(bench.path("both-dash")).unwrap(), b"between");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_200_000_entries() {
    if !can_mount() {
        return;
    }
    const ENTRIES: usize = 200_000;
    let bench = Bench::start(Setup::default(), |store| async move {
        for index in 0..ENTRIES {
            store.put_virtual(BUCKET, &format!("wide/{index:06}"), 10, content::generator(index as u64));
        }
        store
    })
    .await;
    let begun = Instant::now();
    let mut seen = vec![false; ENTRIES];
    for entry in std::fs::read_dir(bench.path("wide")).unwrap() {
        let index: usize = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        assert!(!std::mem::replace(&mut seen[index], true), "{index} came twice");
    }
    println!("listed {ENTRIES} entries in {:?}", begun.elapsed());
    assert!(seen.iter().all(|seen| *seen), "an entry is missing");
    let read = std::fs::read(bench.path("wide/123456")).unwrap();
    assert_eq!(content::difference(123_456, 0, &read), None);
    assert!(!bench.path("wide/200000").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn random_reads_of_a_10_gib_object_fetch_what_they_ask() {
    if !can_mount() {
        return;
    }
    const SIZE: u64 = 10 << 30;
    let bench = Bench::start(Setup::default(), |store| async move {
        store.put_virtual(BUCKET, "huge", SIZE, content::generator(5));
        store
    })
    .await;
    let file = support::readers::open(&bench.path("huge"), true).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    let mut buffer = vec![0; 1 << 20];
    file.read_exact_at(&mut buffer, 7_777_777_777).unwrap();
    assert_eq!(content::difference(5, 7_777_777_777, &buffer), None);
    let fetched = bench.store.bytes_of("huge");
    assert!(fetched <= 2 << 20, "1 MiB of a cold object took {fetched} bytes from the store");

    let mut random = 1u64;
    for _ in 0..50 {
        random = content::mix(random);
        let offset = random % (SIZE - 100_000);
        let mut buffer = vec![0; 100_000];
        file.read_exact_at(&mut buffer, offset).unwrap();
        assert_eq!(content::difference(5, offset, &buffer), None);
    }
    let mut end = [0; 10];
    assert_eq!(file.read_at(&mut end, SIZE - 3).unwrap(), 3);
    assert_eq!(content::difference(5, SIZE - 3, &end[..3]), None);
}
