//! The file system against a reference model: a map from path to contents.
//!
//! Between any two requests the source may change, the kernel's caches may be dropped, and the daemon may be replaced by
//! one that knows the tables only. What must hold:
//! - a look-up says what the source holds now; the same version is the same id, another version another;
//! - an id reads as the bytes of its version for ever;
//! - a listing gives every name that was there all the time exactly once, none that was never there, in order.

use std::collections::{BTreeMap, BTreeSet};

use forebay_keeper::tables::ROOT_ID;
use proptest::prelude::*;

use super::{
    tests::{file_system, handed_over, list, path, tables},
    *,
};
use crate::memory::{Contents, MemoryTree, pattern};

/// Few names, so that they meet; files and directories never share one, except below different parents.
const DIRECTORIES: [&str; 4] = ["", "/d", "/d/e", "/x y"];
const NAMES: [&str; 8] = ["a", "a-", "a0", "b", "c\n", "d.", "ü", "z"];

#[derive(Clone, Debug)]
enum Step {
    Put {
        directory: usize,
        name: usize,
        size: u16,
    },
    Remove {
        directory: usize,
        name: usize,
    },
    Lookup {
        directory: usize,
        name: usize,
    },
    Read {
        file: usize,
        offset: u16,
        size: u16,
    },
    /// Goes on with the listing of a directory, or begins one.
    List {
        directory: usize,
        room: usize,
    },
    Replace,
    Forget,
}

fn step() -> impl Strategy<Value = Step> {
    let directory = 0..DIRECTORIES.len();
    let name = 0..NAMES.len();
    prop_oneof![
        3 => (directory.clone(), name.clone(), any::<u16>())
            .prop_map(|(directory, name, size)| Step::Put { directory, name, size }),
        1 => (directory.clone(), name.clone()).prop_map(|(directory, name)| Step::Remove { directory, name }),
        4 => (directory.clone(), name).prop_map(|(directory, name)| Step::Lookup { directory, name }),
        4 => (any::<usize>(), any::<u16>(), any::<u16>())
            .prop_map(|(file, offset, size)| Step::Read { file, offset, size }),
        6 => (directory, 1..6usize).prop_map(|(directory, room)| Step::List { directory, room }),
        1 => Just(Step::Replace),
        1 => Just(Step::Forget),
    ]
}

/// A listing under way.
#[derive(Default)]
struct Walk {
    offset: u64,
    given: Vec<Bytes>,
    /// Files that were there when it began and ever since.
    always: BTreeSet<String>,
    /// Files that were there at any moment of it.
    ever: BTreeSet<String>,
}

struct Rig {
    tree: MemoryTree,
    fs: FileSystem<MemoryTree>,
    /// What the source holds: path to (seed, size).
    files: BTreeMap<String, (u64, u64)>,
    /// What every id that was given out must read as.
    ids: BTreeMap<u64, (u64, u64)>,
    walks: BTreeMap<usize, Walk>,
    seeds: u64,
}

impl Rig {
    fn new() -> Self {
        let tree = MemoryTree::new();
        for directory in &DIRECTORIES[1..] {
            tree.put_directory(&path(directory)).unwrap();
        }
        let fs = file_system(&tree, tables());
        Self { tree, fs, files: BTreeMap::new(), ids: BTreeMap::new(), walks: BTreeMap::new(), seeds: 0 }
    }

    async fn directory(&self, index: usize) -> u64 {
        let mut id = ROOT_ID;
        for name in DIRECTORIES[index].split('/').filter(|name| !name.is_empty()) {
            id = self.fs.lookup(id, name.as_bytes()).await.unwrap().attributes.unwrap().id;
        }
        id
    }

    fn learn(&mut self, full: &str, attributes: &Attributes) {
        let expected = self.files[full];
        assert_eq!(attributes.size, expected.1);
        assert_eq!(*self.ids.entry(attributes.id).or_insert(expected), expected, "{full} has another version's id");
    }

    async fn apply(&mut self, step: Step) {
        match step {
            Step::Put { directory, name, size } => {
                let full = format!("{}/{}", DIRECTORIES[directory], NAMES[name]);
                self.seeds += 1;
                let contents = (self.seeds, u64::from(size));
                self.tree.put(&path(&full), Contents::Pattern { seed: contents.0, size: contents.1 }).unwrap();
                self.files.insert(full, contents);
                if let Some(walk) = self.walks.get_mut(&directory) {
                    walk.ever.insert(NAMES[name].to_owned());
                }
                // As the invalidation does.
                self.fs.forget_listing(None);
            }
            Step::Remove { directory, name } => {
                let full = format!("{}/{}", DIRECTORIES[directory], NAMES[name]);
                if self.files.remove(&full).is_some() {
                    self.tree.remove(&path(&full)).unwrap();
                    if let Some(walk) = self.walks.get_mut(&directory) {
                        walk.always.remove(NAMES[name]);
                    }
                    self.fs.forget_listing(None);
                }
            }
            Step::Lookup { directory, name } => {
                let parent = self.directory(directory).await;
                let full = format!("{}/{}", DIRECTORIES[directory], NAMES[name]);
                match self.fs.lookup(parent, NAMES[name].as_bytes()).await.unwrap().attributes {
                    Some(attributes) => {
                        self.learn(&full, &attributes);
                        assert_eq!(self.fs.getattr(attributes.id), Ok(attributes));
                    }
                    None => assert!(!self.files.contains_key(&full), "{full} was not found"),
                }
            }
            Step::Read { file, offset, size } => {
                if self.ids.is_empty() {
                    return;
                }
                let (id, (seed, len)) = self.ids.iter().nth(file % self.ids.len()).unwrap();
                let from = u64::from(offset).min(*len);
                let to = (from + u64::from(size)).min(*len);
                let mut expected = vec![0; (to - from) as usize];
                pattern(*seed, from, &mut expected);
                let bytes = self.fs.read(*id, from, u32::from(size)).await.unwrap().concat();
                assert_eq!(bytes, expected);
            }
            Step::List { directory, room } => self.list(directory, room).await,
            Step::Replace => self.fs = file_system(&self.tree, handed_over(self.fs.tables())),
            Step::Forget => self.fs.forget_listing(None),
        }
    }

    async fn list(&mut self, directory: usize, room: usize) {
        let id = self.directory(directory).await;
        let here: BTreeSet<String> = NAMES
            .iter()
            .filter(|name| self.files.contains_key(&format!("{}/{name}", DIRECTORIES[directory])))
            .map(|name| (*name).to_owned())
            .collect();
        let mut walk = self.walks.remove(&directory).unwrap_or_else(|| Walk {
            always: here.clone(),
            ever: here,
            ..Walk::default()
        });
        let entries = list(&self.fs, id, walk.offset, room).await.unwrap();
        for (name, offset, attributes) in &entries {
            assert_ne!(*offset, walk.offset);
            walk.offset = *offset;
            if name == b"." || name == b".." {
                continue;
            }
            let text = String::from_utf8(name.clone()).unwrap();
            if !attributes.directory {
                assert!(walk.ever.contains(&text), "{text} was never there");
                // The page may be from before a change that nobody announced yet; here all were.
                self.learn(&format!("{}/{text}", DIRECTORIES[directory]), attributes);
            }
            walk.given.push(sort_key(&Bytes::from(name.clone()), attributes.directory));
        }
        if !entries.is_empty() {
            self.walks.insert(directory, walk);
            return;
        }
        assert!(walk.given.is_sorted_by(|a, b| a < b), "{:?}", walk.given);
        let given: BTreeSet<&[u8]> = walk.given.iter().map(AsRef::as_ref).collect();
        for name in &walk.always {
            assert!(given.contains(name.as_bytes()), "{name} is missing");
        }
        let below =
            DIRECTORIES.iter().filter_map(|other| other.strip_prefix(DIRECTORIES[directory])?.strip_prefix('/'));
        for name in below.filter(|name| !name.is_empty() && !name.contains('/')) {
            assert!(given.contains(format!("{name}/").as_bytes()), "directory {name} is missing");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_file_system_is_the_model(steps in proptest::collection::vec(step(), 1..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut rig = Rig::new();
            for step in steps {
                rig.apply(step).await;
            }
            // Every listing under way comes to its end.
            for directory in 0..DIRECTORIES.len() {
                while rig.walks.contains_key(&directory) {
                    rig.list(directory, 3).await;
                }
            }
        });
    }
}
