//! The index against a model: a map of keys, and what a directory of it must be.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use forebay_protocol::DatasetPath;
use futures::StreamExt;
use proptest::prelude::*;

use super::{Fixture, options};
use crate::{DatasetOptions, Entry, EntryKind, InvalidationKind, MetadataError, ScanState};

/// Names around `/` in order, with spaces, newlines, UTF-8; few, one often, so that files and directories collide.
const NAMES: &[&str] = &["a", "a", "a", "a b", "a.b", "a0", "a\n", "b", "\u{e9}t\u{e9}", "~"];

#[derive(Debug, Clone)]
enum Action {
    Put(Vec<usize>, u8),
    Delete(usize),
    Raise,
    Lookup(Vec<usize>, usize),
    List(Vec<usize>, usize, usize),
    Scan(Vec<usize>),
    PageSize(usize),
    Restart,
    Recheck(Vec<usize>, usize),
}

fn directory() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0..NAMES.len(), 0..3)
}

fn action() -> impl Strategy<Value = Action> {
    let key = proptest::collection::vec(0..NAMES.len(), 1..4);
    prop_oneof![
        6 => (key, 0..3u8).prop_map(|(key, version)| Action::Put(key, version)),
        4 => (0..1000usize).prop_map(Action::Delete),
        2 => Just(Action::Raise),
        3 => (directory(), 0..NAMES.len()).prop_map(|(dir, name)| Action::Lookup(dir, name)),
        3 => (directory(), 0..NAMES.len(), 1..4usize).prop_map(|(dir, after, limit)| Action::List(dir, after, limit)),
        2 => directory().prop_map(Action::Scan),
        1 => (1..8usize).prop_map(Action::PageSize),
        1 => Just(Action::Restart),
        1 => (directory(), 0..NAMES.len()).prop_map(|(dir, name)| Action::Recheck(dir, name)),
    ]
}

fn join(parts: &[usize]) -> String {
    parts.iter().map(|part| NAMES[*part]).collect::<Vec<_>>().join("/")
}

fn path_of(parts: &[usize]) -> DatasetPath {
    super::path(&format!("/{}", join(parts)))
}

type Keys = BTreeMap<String, u8>;
/// Sort keys; a file's version, or nothing for a directory.
type Shown = BTreeMap<String, Option<u8>>;

/// What a directory shows of some keys, and how many keys it hides.
fn shown(keys: &Keys, directory: &DatasetPath) -> (Shown, u64) {
    let mut prefix = String::from_utf8(directory.as_bytes()[1..].to_vec()).unwrap();
    if !prefix.is_empty() {
        prefix.push('/');
    }
    let mut shown = Shown::new();
    for (key, version) in keys {
        let Some(rest) = key.strip_prefix(&prefix) else { continue };
        match rest.split_once('/') {
            Some((name, _)) => shown.insert(format!("{name}/"), None),
            None => shown.insert(rest.to_owned(), Some(*version)),
        };
    }
    let before = shown.len();
    let directories: Vec<String> = shown.keys().filter_map(|k| k.strip_suffix('/').map(str::to_owned)).collect();
    for name in directories {
        shown.remove(&name);
    }
    let hidden = (before - shown.len()) as u64;
    (shown, hidden)
}

fn size_of_version(version: u8) -> u64 {
    u64::from(version) * 10
}

fn as_shown(entries: &[Entry]) -> Shown {
    let convert = |entry: &Entry| {
        let version = match &entry.kind {
            EntryKind::Directory => None,
            EntryKind::File { version } => Some(version.key.as_bytes()[0] - b'0'),
        };
        (String::from_utf8(entry.sort_key()).unwrap(), version)
    };
    entries.iter().map(convert).collect()
}

/// What each directory was when it was last listed: it stays so until the generation rises, or a recheck corrects it.
struct Model {
    now: Keys,
    generation: u64,
    listed: BTreeMap<DatasetPath, (u64, Keys)>,
}

impl Model {
    /// The keys that a directory is answered from now.
    fn keys(&mut self, directory: &DatasetPath) -> Keys {
        let (generation, now) = (self.generation, self.now.clone());
        let known = self.listed.entry(directory.clone()).or_insert_with(|| (generation, now.clone()));
        if known.0 < generation {
            *known = (generation, now);
        }
        known.1.clone()
    }

    fn expected(&mut self, directory: &DatasetPath) -> Option<(Shown, u64)> {
        let keys = self.keys(directory);
        let (shown, hidden) = shown(&keys, directory);
        if shown.is_empty() && !directory.is_root() {
            // What did not exist is not remembered for good: it may be asked for again.
            return None;
        }
        Some((shown, hidden))
    }
}

async fn list_all(f: &Fixture, directory: &DatasetPath, limit: usize) -> Result<Vec<Entry>, MetadataError> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let after = all.last().map(Entry::sort_key).unwrap_or_default();
        let page = f.dataset.list(0, directory, &after, limit).await?;
        all.extend(page.entries);
        if page.end {
            return Ok(all);
        }
    }
}

async fn run(actions: Vec<Action>) -> Result<(), TestCaseError> {
    let heartbeat = std::time::Duration::from_millis(20);
    let no_limits = DatasetOptions { recheck_interval: std::time::Duration::ZERO, heartbeat, ..options() };
    let mut f = Fixture::with(no_limits).await;
    let mut model = Model { now: Keys::new(), generation: 0, listed: BTreeMap::new() };
    for action in actions {
        // An answer may come before its listing is done; the model lists at one moment.
        while f.dataset.is_listing() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        match action {
            Action::Put(key, version) => {
                let key = join(&key);
                f.store.put(&key, size_of_version(version), &version.to_string());
                model.now.insert(key, version);
            }
            Action::Delete(at) => {
                if model.now.is_empty() {
                    continue;
                }
                let key = model.now.keys().nth(at % model.now.len()).unwrap().clone();
                f.store.delete(&key);
                model.now.remove(&key);
            }
            Action::Raise => {
                model.generation += 1;
                prop_assert_eq!(f.raise().await, model.generation);
            }
            Action::PageSize(page) => f.store.set_page(page),
            Action::Restart => {
                f = f.restart().await;
                // What did not exist was remembered in memory only.
                model.listed.retain(|directory, (_, keys)| directory.is_root() || !shown(keys, directory).0.is_empty());
            }
            Action::Lookup(directory, name) => {
                let directory = path_of(&directory);
                let name = NAMES[name];
                let expected = model.expected(&directory).and_then(|(shown, _)| {
                    let directory = shown.get(&format!("{name}/")).map(|_| None);
                    directory.or_else(|| shown.get(name).copied())
                });
                match f.dataset.lookup(0, &directory, name.as_bytes()).await {
                    Ok(entry) => prop_assert_eq!(as_shown(&[entry]).into_values().next(), expected),
                    Err(error) => prop_assert_eq!((error, expected), (MetadataError::NotFound, None)),
                }
            }
            Action::List(directory, after, limit) => {
                let directory = path_of(&directory);
                let expected = model.expected(&directory).map(|(shown, _)| shown);
                match list_all(&f, &directory, limit).await {
                    Ok(all) => {
                        let found = as_shown(&all);
                        prop_assert_eq!(found.len(), all.len(), "an entry twice");
                        prop_assert_eq!(Some(&found), expected.as_ref());
                        // From anywhere in between.
                        let after = NAMES[after];
                        let page = f.dataset.list(0, &directory, after.as_bytes(), 4_096).await.unwrap();
                        let mut rest = found;
                        rest.retain(|key, _| key.as_str() > after);
                        prop_assert_eq!(as_shown(&page.entries), rest);
                    }
                    Err(error) => prop_assert_eq!((error, expected), (MetadataError::NotFound, None)),
                }
            }
            Action::Scan(directory) => {
                let directory = path_of(&directory);
                let expected = model.expected(&directory);
                check_scan(&f, &directory, expected).await?;
            }
            Action::Recheck(directory, name) => {
                let parent = path_of(&directory);
                let path = parent.join(NAMES[name].as_bytes()).unwrap();
                f.dataset.recheck_now(&path).await.unwrap();
                correct(&mut model, &parent, &path);
            }
        }
    }
    check_refresh(f, model).await
}

/// A recheck puts what is there now in the place of one file, if the directory is in the index.
fn correct(model: &mut Model, parent: &DatasetPath, path: &DatasetPath) {
    let Some((_, keys)) = model.listed.get_mut(parent) else { return };
    if shown(keys, parent).0.is_empty() && !parent.is_root() {
        return;
    }
    let key = String::from_utf8(path.as_bytes()[1..].to_vec()).unwrap();
    match model.now.get(&key) {
        Some(version) => keys.insert(key, *version),
        None => keys.remove(&key),
    };
}

async fn check_scan(f: &Fixture, directory: &DatasetPath, expected: Option<(Shown, u64)>) -> Result<(), TestCaseError> {
    match f.dataset.scan_directory(0, directory, b"").await {
        Ok(scan) => {
            let (shown, hidden) = expected.unwrap_or_default();
            let files: Vec<u8> = shown.values().copied().flatten().collect();
            prop_assert_eq!(scan.files, files.len() as u64);
            prop_assert_eq!(scan.bytes, files.iter().map(|version| size_of_version(*version)).sum::<u64>());
            prop_assert_eq!(scan.hidden, hidden);
            let names: Vec<String> = shown.keys().filter_map(|key| key.strip_suffix('/').map(str::to_owned)).collect();
            let found: Vec<String> =
                scan.subdirectories.iter().map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
            prop_assert_eq!(found, names);
        }
        Err(error) => prop_assert_eq!((error, expected), (MetadataError::NotFound, None)),
    }
    Ok(())
}

/// A refresh at the end: the whole tree is the model's, and every change of what was listed was named.
async fn check_refresh(f: Fixture, mut model: Model) -> Result<(), TestCaseError> {
    // Directories that emptied without a refresh in between: the model does not say whether they are remembered.
    let old: Vec<(DatasetPath, Keys)> = model
        .listed
        .iter()
        .filter(|(directory, (_, keys))| directory.is_root() || !shown(keys, directory).0.is_empty())
        .map(|(directory, (_, keys))| (directory.clone(), keys.clone()))
        .collect();
    let mut stream = Box::pin(f.dataset.watch(0, 0));
    prop_assert_eq!(stream.next().await.unwrap().kind, InvalidationKind::Reset);
    let mut receiver = f.dataset.take_superseded().unwrap();
    while receiver.try_recv().is_ok() {}
    model.generation = f.raise().await;
    let handle = crate::Scanner::start(
        f.dataset.clone(),
        model.generation,
        DatasetPath::root(),
        crate::ScanOptions::default(),
        tokio_util::sync::CancellationToken::new(),
    );
    let progress = handle.finished().await;
    prop_assert_eq!(progress.state, ScanState::Complete);
    f.dataset.prune(model.generation, &DatasetPath::root()).await.unwrap();

    let mut directories = BTreeSet::from([DatasetPath::root()]);
    for key in model.now.keys() {
        let mut path = super::path(&format!("/{key}"));
        while let Some((parent, _)) = path.split() {
            directories.insert(parent.clone());
            path = parent;
        }
    }
    let lists = f.dataset.requests().lists;
    let (mut files, mut hidden) = (0, 0);
    for directory in &directories {
        let (expected, unseen) = shown(&model.now, directory);
        files += expected.values().flatten().count() as u64;
        hidden += unseen;
        prop_assert_eq!(as_shown(&list_all(&f, directory, 3).await.unwrap()), expected);
    }
    prop_assert_eq!(f.dataset.requests().lists, lists, "the scan has listed everything");
    prop_assert_eq!((progress.files, progress.hidden), (files, hidden));
    prop_assert_eq!(progress.directories, directories.len() as u64);

    let mut named: BTreeMap<DatasetPath, Option<BTreeSet<String>>> = BTreeMap::new();
    let mut number = None;
    loop {
        let message = stream.next().await.unwrap();
        match message.kind {
            InvalidationKind::Directory { directory, names } => {
                prop_assert!(number.is_none_or(|last| message.number == last + 1), "numbers are consecutive");
                number = Some(message.number);
                let names: BTreeSet<String> =
                    names.iter().map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
                let all = named.entry(directory).or_insert_with(|| Some(BTreeSet::new()));
                if names.is_empty() {
                    *all = None;
                } else if let Some(all) = all {
                    all.extend(names);
                }
            }
            // Everything is in the log by now, and goes before a heartbeat.
            InvalidationKind::Heartbeat => break,
            InvalidationKind::Reset => prop_assert!(false, "reset"),
        }
    }
    let mut superseded = BTreeSet::new();
    while let Ok((path, version)) = receiver.try_recv() {
        superseded.insert((path, version.key.as_bytes()[0] - b'0'));
    }
    for (directory, keys) in old {
        let (before, after) = (shown(&keys, &directory).0, shown(&model.now, &directory).0);
        let changed: BTreeSet<String> = before
            .keys()
            .chain(after.keys())
            .filter(|key| before.get(*key) != after.get(*key))
            .map(|key| key.trim_end_matches('/').to_owned())
            .collect();
        match named.get(&directory) {
            Some(None) => {}
            Some(Some(names)) => prop_assert!(names.is_superset(&changed), "{directory}: {names:?} of {changed:?}"),
            None => prop_assert!(changed.is_empty(), "{directory}: nothing of {changed:?}"),
        }
        for (key, version) in before {
            if let Some(version) = version
                && after.get(&key) != Some(&Some(version))
            {
                let path = directory.join(key.as_bytes()).unwrap();
                prop_assert!(superseded.contains(&(path, version)), "{directory}: {key} was not superseded");
            }
        }
    }
    let Fixture { dataset, .. } = f;
    dataset.close().await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn the_index_is_what_the_model_is(actions in proptest::collection::vec(action(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(actions))?;
    }
}

/// Lookups and pages at once with refreshes and a source that changes: every answer is a state that the key had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_only_what_was_there() {
    let f = Arc::new(Fixture::new().await);
    f.store.set_page(3);
    f.store.set_latency(std::time::Duration::from_millis(1));
    for i in 0..30 {
        f.store.put(format!("k{i:02}"), 0, "0");
    }
    let readers = (0..8).map(|reader| {
        let f = f.clone();
        tokio::spawn(async move {
            let mut last = [0u8; 30];
            for round in 0..40 {
                let key = (reader * 7 + round) % 30;
                let asked = f.dataset.generation();
                let entry = f.dataset.lookup(asked, &DatasetPath::root(), format!("k{key:02}").as_bytes()).await;
                let version = as_shown(&[entry.unwrap()]).into_values().next().flatten().unwrap();
                // Written before the generation was raised, so seen by whoever asks under it; never older again.
                assert!(u64::from(version) >= asked, "k{key} of generation {asked} is {version}");
                assert!(version >= last[key], "went back");
                last[key] = version;
                let all = list_all(&f, &DatasetPath::root(), 7).await.unwrap();
                assert_eq!(all.len(), 30);
            }
        })
    });
    let readers: Vec<_> = readers.collect();
    for generation in 1..=9u8 {
        for i in 0..30 {
            f.store.put(format!("k{i:02}"), 0, &generation.to_string());
        }
        f.raise().await;
        tokio::time::sleep(std::time::Duration::from_millis(15)).await;
    }
    for reader in readers {
        reader.await.unwrap();
    }
}
