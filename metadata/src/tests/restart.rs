//! What is there after a restart, and what must not be.

use std::{fs, time::Duration};

use super::{Fixture, id, namespace, path, sources};
use crate::{DatasetIndex, MetadataError, memory_store::Fault};

async fn filled() -> Fixture {
    let f = Fixture::new().await;
    for key in ["a", "b", "d/x", "d/y"] {
        f.store.put(key, 3, "v1");
    }
    f.names("/").await.unwrap();
    f.names("/d").await.unwrap();
    f
}

#[tokio::test]
async fn answers_come_without_asking_again() {
    let f = filled().await.restart().await;
    let lists = f.dataset.requests().lists;
    assert_eq!(f.names("/").await.unwrap(), ["a", "b", "d/"]);
    assert_eq!(f.names("/d").await.unwrap(), ["x", "y"]);
    assert_eq!(f.lookup("/d", "x").await.unwrap(), "v1");
    assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().bytes, 6);
    assert_eq!(f.dataset.requests().lists, lists);
}

#[tokio::test]
async fn a_listing_goes_on_where_it_stopped() {
    let f = Fixture::new().await;
    for i in 0..40 {
        f.store.put(format!("n{i:02}"), 1, "v");
    }
    f.store.set_page(10);
    let gate = f.store.gate();
    gate.add_permits(2);
    assert_eq!(f.lookup("/", "n15").await.unwrap(), "v");
    f.asked("", 3).await;
    let f = f.restart().await;
    f.store.ungate();
    assert_eq!(f.lookup("/", "n15").await.unwrap(), "v");
    let asked = f.store.listed("");
    assert_eq!(asked, 3, "the third page was under way; nothing was asked for what is there");
    assert_eq!(f.names("/").await.unwrap().len(), 40);
    assert_eq!(f.store.listed("") - asked, 2);
    assert_eq!(f.dataset.scan_directory(0, &path("/"), b"").await.unwrap().files, 40);
}

#[tokio::test]
async fn a_raised_generation_is_known_after_a_crash() {
    let f = filled().await;
    assert_eq!(f.raise().await, 1);
    f.store.put("a", 3, "v2");
    // As it stands on the disk now, without a shutdown.
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(f.directory.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let index = super::open_index(copy.path());
    assert_eq!(index.rebuilt(), 0);
    let dataset = DatasetIndex::open(index, id(), namespace(&f.store), f.options.clone()).await.unwrap();
    assert_eq!(dataset.generation(), 1);
    let entry = dataset.lookup(0, &path("/"), b"a").await.unwrap();
    assert!(format!("{entry:?}").contains("v2"));
    // Adopted ones as well, once something was listed under them.
    dataset.lookup(9, &path("/"), b"a").await.unwrap();
    drop(dataset);
}

#[tokio::test]
async fn an_adopted_generation_is_stored_with_what_is_listed_under_it() {
    let f = filled().await;
    f.dataset.lookup(9, &path("/d"), b"x").await.unwrap();
    let f = f.restart().await;
    assert_eq!(f.dataset.generation(), 9);
    let lists = f.store.listed("");
    f.names("/").await.unwrap();
    f.names("/d").await.unwrap();
    assert_eq!((f.store.listed(""), f.store.listed("d")), (lists + 1, 2));
}

#[tokio::test]
async fn other_sources_forget_the_listings() {
    let f = filled().await;
    assert_eq!(f.raise().await, 1);
    f.dataset.close().await;
    let others = sources(&[("/", &f.store, 7)]);
    let dataset = DatasetIndex::open(f.index.clone(), id(), others, f.options.clone()).await.unwrap();
    assert_eq!(dataset.generation(), 1);
    let lists = f.store.listed("");
    dataset.lookup(0, &path("/"), b"a").await.unwrap();
    assert_eq!(f.store.listed(""), lists + 1);
    dataset.close().await;
}

#[tokio::test]
async fn a_forgotten_dataset_leaves_nothing() {
    let f = filled().await;
    f.raise().await;
    assert_eq!(f.index.entries_on_disk().await.0, 5);
    f.dataset.close().await;
    f.index.forget_dataset(id()).await.unwrap();
    let swept = async {
        while f.index.entries_on_disk().await.0 > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), swept).await.unwrap();
    let dataset = DatasetIndex::open(f.index.clone(), id(), namespace(&f.store), f.options.clone()).await.unwrap();
    assert_eq!(dataset.generation(), 0);
    dataset.close().await;
}

#[tokio::test]
async fn damaged_rows_are_listed_again() {
    use crate::index::{DIRECTORIES, ENTRIES};
    use redb::ReadableTable;
    let f = filled().await;
    let damage = |definition: crate::index::Definition| {
        f.index.write(false, move |txn| {
            let mut table = txn.open_table(definition)?;
            let mut rows = Vec::new();
            for row in table.iter()? {
                let (key, value) = row?;
                rows.push((key.value().to_vec(), value.value().to_vec()));
            }
            for (key, mut value) in rows {
                value[0] ^= 1;
                table.insert(key.as_slice(), value.as_slice())?;
            }
            Ok(())
        })
    };
    damage(ENTRIES).await.unwrap();
    assert_eq!(f.lookup("/", "a").await.unwrap(), "v1");
    assert_eq!(f.names("/d").await.unwrap(), ["x", "y"]);
    damage(DIRECTORIES).await.unwrap();
    assert_eq!(f.lookup("/", "a").await.unwrap(), "v1");
    assert_eq!(f.names("/d").await.unwrap(), ["x", "y"]);
    assert_eq!((f.store.listed(""), f.store.listed("d")), (3, 3));
}

#[tokio::test]
async fn a_damaged_file_costs_listings_only() {
    let f = filled().await;
    f.raise().await;
    let (damaged, _) = (f.index.read(|_| Err::<(), _>(crate::error::IndexError::Damaged("test".into()))).await, ());
    assert!(damaged.is_err());
    assert_eq!(f.index.rebuilt(), 1);
    // While running: the same answers, from new listings, under the same generation.
    assert_eq!(f.names("/").await.unwrap(), ["a", "b", "d/"]);
    assert_eq!(f.dataset.generation(), 1);
    let f = f.restart().await;
    assert_eq!(f.dataset.generation(), 1);
    f.store.fault("", Fault::Hang);
    assert_eq!(f.names("/").await.unwrap(), ["a", "b", "d/"]);
    assert_eq!(f.lookup("/nowhere", "x").await, Err(MetadataError::NotFound));
}
