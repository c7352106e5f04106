//! Garbage on every socket, damaged caches: an error to the sender, fetched again, nothing else.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails here")]

mod support;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use support::{
    BUCKET, Bench, Setup, Up, can_mount, content, eventually,
    readers::{Kind, Readers, Target},
};

async fn fill(store: forebay_test_store::TestStore) -> forebay_test_store::TestStore {
    for seed in 0..20 {
        store.put(BUCKET, &format!("file-{seed}"), content::bytes(seed, 200_000)).await;
    }
    store
}

fn check(up: &Up) {
    for seed in 0..20 {
        assert_eq!(std::fs::read(up.mount.join(format!("file-{seed}"))).unwrap(), content::bytes(seed, 200_000));
    }
}

/// Bytes that begin like something, and bytes that do not.
fn garbage() -> Vec<Vec<u8>> {
    let mut all = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"FBAY".to_vec(),
        [b"FBAY".as_slice(), &[0xff; 200]].concat(),
        vec![0; 4096],
        vec![0xff; 1 << 20],
        Vec::new(),
    ];
    all.extend((0..20).map(|seed| content::bytes(seed, 10_000).to_vec()));
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_every_socket_harms_nobody() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    let children = bench.up.children();
    let status = bench.up.status();
    let workers: Vec<String> = status["workers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| worker["address"].as_str().unwrap().to_owned())
        .collect();
    for bytes in garbage() {
        for address in &workers {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            // The worker may close before all is written: that is the error it owes us.
            let _ = stream.write_all(&bytes);
            let _ = stream.read(&mut [0; 64]);
        }
        if let Ok(mut stream) = UnixStream::connect(bench.up.state.join("control.sock")) {
            let _ = stream.write_all(&bytes);
        }
        seqpacket(&bench.up.state.join("keeper.sock"), &bytes);
    }
    check(&bench.up);
    assert_eq!(bench.up.children(), children, "a process died of garbage");
    bench.stop();
}

/// Sends one packet to a SOCK_SEQPACKET socket.
fn seqpacket(path: &Path, bytes: &[u8]) {
    use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketType, connect, send, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    if connect(&socket, &SocketAddrUnix::new(path).unwrap()).is_ok() {
        let _ = send(&socket, &bytes[..bytes.len().min(64 << 10)], SendFlags::NOSIGNAL);
    }
}

/// Every file of the caches below the state directory, chunks and indexes, but not what says whose they are: a directory
/// that does not say so is refused, not emptied.
fn cache_files(state: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![state.join("runtimes")];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.components().any(|component| component.as_os_str() == "chunks")
                && !path.ends_with("superblock")
            {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The files that hold bytes of objects: IDENTITY-INDEX.
fn chunk_files(state: &Path) -> Vec<PathBuf> {
    let is_chunk = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.split_once('-').is_some_and(|(identity, _)| identity.len() == 32)
    };
    cache_files(state).into_iter().filter(is_chunk).collect()
}

/// Stops an instance that has everything cached, lets `damage` loose on its chunk files, and starts it again: every byte
/// must be right.
async fn after_damage(files: fn(&Path) -> Vec<PathBuf>, damage: impl Fn(usize, &Path)) -> Bench {
    let Bench { store, dir, up } = Bench::start(Setup::default(), fill).await;
    check(&up);
    let state = up.state.clone();
    up.stop();
    let files = files(&state);
    assert!(files.len() >= 20, "{} chunk files", files.len());
    for (index, file) in files.iter().enumerate() {
        damage(index, file);
    }
    let up = Up::start(&dir.path().join("data.yaml"), dir.path(), &Setup::default().arguments);
    check(&up);
    Bench { store, dir, up }
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_are_found_and_fetched_again() {
    if !can_mount() {
        return;
    }
    let bench = after_damage(chunk_files, |index, path| flip(path, content::mix(index as u64) % 200_000)).await;
    let corrupt = corrupt_blocks(&bench.up);
    // A file that was first read while its owner was still starting lies elsewhere, and is fetched anew.
    assert!(corrupt >= 10, "{corrupt} corrupt blocks counted");
}

fn flip(path: &Path, offset: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

fn corrupt_blocks(up: &Up) -> u64 {
    up.status()["datasets"][0]["corruptBlocks"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bits_that_flip_under_a_running_worker_are_not_seen_by_readers() {
    if !can_mount() {
        return;
    }
    // Nobody else has the bytes, and the worker wrote what rots itself.
    let bench = Bench::start(Setup { workers: 1, ..Setup::default() }, fill).await;
    check(&bench.up);
    let target = |seed| Target { path: bench.path(&format!("file-{seed}")), size: 200_000, seed };
    let readers = Readers::start((0..20).map(|seed| (Kind::Direct, target(seed))).collect());
    for round in 0..3 {
        let files = chunk_files(&bench.up.state);
        assert_eq!(files.len(), 20);
        for (index, file) in files.iter().enumerate() {
            flip(file, content::mix(round * 20 + index as u64) % 200_000);
        }
        let found = || corrupt_blocks(&bench.up) == (round + 1) * 20;
        eventually("all damage is found", Duration::from_secs(60), found);
        // The last of it may still be on its way into a fresh file.
        readers.progress(20 * 200_000, Duration::from_secs(60));
    }
    let report = readers.finish();
    assert_eq!(report.errors, Vec::<String>::new());
    check(&bench.up);
    bench.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn torn_truncated_and_swapped_files_are_found() {
    if !can_mount() {
        return;
    }
    after_damage(cache_files, |index, path| match index % 4 {
        0 => std::fs::File::options().write(true).open(path).unwrap().set_len(100_000).unwrap(),
        1 => std::fs::File::options().write(true).open(path).unwrap().write_all_at(&[0; 70_000], 50_000).unwrap(),
        2 => std::fs::write(path, b"not a chunk at all").unwrap(),
        // A file of another chunk under this name.
        _ => {
            let other = path.parent().unwrap().join("other");
            std::fs::write(&other, content::bytes(99, 270_000)).unwrap();
            std::fs::rename(&other, path).unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_directory_that_vanishes_is_served_around_and_comes_back() {
    if !can_mount() {
        return;
    }
    let bench = Bench::start(Setup::default(), fill).await;
    check(&bench.up);
    for file in chunk_files(&bench.up.state) {
        std::fs::remove_file(file).unwrap();
    }
    for worker in 0..3 {
        let cache = bench.up.state.join(format!("runtimes/default.runtime/cache/runtime-{worker}"));
        std::fs::remove_dir_all(cache).unwrap();
    }
    for seed in 0..20 {
        let file = support::readers::open(&bench.path(&format!("file-{seed}")), true).unwrap();
        let mut read = vec![0; 200_000];
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read, content::bytes(seed, 200_000));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_of_another_worker_is_not_used() {
    if !can_mount() {
        return;
    }
    let Bench { store, dir, up } = Bench::start(Setup::default(), fill).await;
    check(&up);
    let runtime = up.state.join("runtimes/default.runtime/cache");
    up.stop();
    std::fs::rename(runtime.join("runtime-0"), runtime.join("parked")).unwrap();
    std::fs::rename(runtime.join("runtime-1"), runtime.join("runtime-0")).unwrap();
    std::fs::rename(runtime.join("parked"), runtime.join("runtime-1")).unwrap();
    let up = Up::start(&dir.path().join("data.yaml"), dir.path(), &Setup::default().arguments);
    check(&up);
    drop(store);
    up.stop();
}
