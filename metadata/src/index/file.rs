//! The database file: opened, checked, set aside.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use redb::{Database, DatabaseError, StorageError};

use super::{DATASETS, DIRECTORIES, ENTRIES, GARBAGE, META, SOURCES, read_u64};
use crate::{error::IndexError, record::FORMAT};

pub(super) const FORMAT_KEY: &[u8] = b"format";
pub(super) const DAMAGED: &str = "metadata.redb.damaged-";
/// Files up to this size are checked page by page when they are opened (about 0.2 s); the pages of larger ones are
/// checked when an unclean end asks for it, and their rows whenever they are read.
const CHECK_WHOLE: u64 = 128 * 1024 * 1024;

/// Why a file is not opened.
#[derive(Debug)]
pub(super) enum Refused {
    /// Another process has it.
    InUse,
    /// The system refuses: nothing is wrong with the file.
    Io(String),
    /// It is no database of ours, or no longer: set it aside.
    Damaged(String),
}

/// Opens or creates the database file.
pub(super) fn open_file(path: &Path, cache_bytes: usize) -> Result<Database, Refused> {
    // redb trusts the file it opens and may panic on a damaged one.
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let size = fs::metadata(path).map(|metadata| metadata.len()).unwrap_or(0);
        let database = Database::builder()
            .set_cache_size(cache_bytes)
            .set_check_integrity_on_open(size > 0 && size <= CHECK_WHOLE)
            .create(path)
            .map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => Refused::InUse,
                DatabaseError::Storage(StorageError::Io(error))
                    if !matches!(error.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) =>
                {
                    Refused::Io(error.to_string())
                }
                other => Refused::Damaged(other.to_string()),
            })?;
        prepare(&database).map_err(|error| match error {
            IndexError::Failed(message) => Refused::Io(message),
            other => Refused::Damaged(other.to_string()),
        })?;
        Ok(database)
    }));
    opened.unwrap_or_else(|_| Err(Refused::Damaged("the database code panicked".to_owned())))
}

/// Checks the format, and makes the tables of a new file.
fn prepare(database: &Database) -> Result<(), IndexError> {
    let txn = database.begin_write()?;
    {
        let mut meta = txn.open_table(META)?;
        match read_u64(&meta, FORMAT_KEY)? {
            Some(FORMAT) => {}
            Some(other) => return Err(IndexError::Damaged(format!("format {other:#x}"))),
            None => {
                // A file without our tables is new; one with others belongs to somebody else.
                let tables = txn.list_tables()?.count();
                if tables > 1 {
                    return Err(IndexError::Damaged("another program's database".to_owned()));
                }
                meta.insert(FORMAT_KEY, FORMAT.to_le_bytes().as_slice())?;
            }
        }
        for table in [DATASETS, SOURCES, DIRECTORIES, ENTRIES, GARBAGE] {
            txn.open_table(table)?;
        }
    }
    txn.commit()?;
    Ok(())
}

/// Renames the file; only the newest one that was set aside is kept.
pub(super) fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut newest = 0;
    let mut older = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(number) = entry.file_name().to_str().and_then(|name| name.strip_prefix(DAMAGED)) {
            newest = newest.max(number.parse().unwrap_or(0u64));
            older.push(entry.path());
        }
    }
    let aside = directory.join(format!("{DAMAGED}{}", newest + 1));
    fs::rename(path, &aside)?;
    for path in older {
        fs::remove_file(path)?;
    }
    Ok(aside)
}
