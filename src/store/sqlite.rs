//! What is SQLite's own: opening the file, and the settings that make a commit durable.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use data_encoding::HEXUPPER;
use sqlx::any::AnyPoolOptions;
use sqlx::{AnyConnection, AnyPool, Row};

use super::schema::{SCHEMA, create};
use super::{Store, StoreError};
use crate::io::files::{FileError, SECRET_MODE, leave_to_owner, warn_if_open};

/// Settings of a connection. `FULL` and not `NORMAL`: with the write-ahead log, NORMAL may lose
/// acknowledged commits when the power fails.
const DURABLE: [&str; 2] = ["PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON"];
/// To open the file anew takes milliseconds, or does not work.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(5);
/// A setting of the file. It is a write, so it comes after the checks.
const LOG: &str = "PRAGMA journal_mode = WAL";

/// What is wrong with the file the checks that follow tell; here it would only be tried again.
async fn durable(connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
    for setting in DURABLE {
        if let Err(error) = sqlx::query(setting).execute(&mut *connection).await {
            tracing::debug!(%error, setting, "not set");
        }
    }
    Ok(())
}

impl Store {
    /// Opens the database in this file, or makes a new one when there is none. One of an older
    /// version is copied (`server.db.schema-1` beside `server.db`), then brought up to date.
    ///
    /// # Errors
    /// When the file is damaged, foreign or of a newer version; it is left untouched then.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_as(path, Wanted::NewOrOld).await
    }

    /// Opens the database in this file, in which there must be one.
    ///
    /// # Errors
    /// Those of [`Self::open`], and [`StoreError::Empty`].
    pub async fn open_old(path: &Path) -> Result<Self, StoreError> {
        Self::open_as(path, Wanted::Old).await
    }

    async fn open_as(path: &Path, wanted: Wanted) -> Result<Self, StoreError> {
        // Made here for its mode; the files that SQLite puts beside it take the same mode.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(wanted == Wanted::NewOrOld)
            .truncate(false)
            .mode(SECRET_MODE)
            .open(path)
            .map_err(FileError::io("open", path))?;
        leave_to_owner(path, &file);
        warn_if_open(path);
        sqlx::any::install_default_drivers();
        let pool = AnyPoolOptions::new()
            .max_connections(1)
            // A connection that has failed is replaced; one that works stays.
            .acquire_timeout(ACQUIRE_LIMIT)
            .idle_timeout(None)
            .max_lifetime(None)
            .after_connect(|connection, _| Box::pin(durable(connection)))
            .connect(&url(path))
            .await?;
        let result = prepare(&pool, path, wanted).await;
        if let Err(error) = result {
            pool.close().await;
            return Err(error);
        }
        Ok(Self { pool })
    }
}

/// The copy that is kept of a store of an older version.
fn copy_of(path: &Path, schema: i64) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".schema-{schema}"));
    PathBuf::from(name)
}

/// Copies the database in one piece, as it is, and has the copy on disk before it gets its name.
async fn copy(pool: &AnyPool, path: &Path, schema: i64) -> Result<PathBuf, StoreError> {
    let target = copy_of(path, schema);
    let mut beside = target.clone().into_os_string();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(FileError::io("remove", &beside)(error).into());
        }
        _ => {}
    }
    // SQLite takes over an empty file, with the mode that it has.
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(SECRET_MODE)
        .open(&beside)
        .map_err(FileError::io("create", &beside))?;
    leave_to_owner(&beside, &file);
    let name = beside.to_str().ok_or_else(|| {
        FileError::io("copy to", &beside)(io::Error::from(io::ErrorKind::InvalidFilename))
    })?;
    sqlx::query("VACUUM INTO $1").bind(name).execute(pool).await?;
    let kept = (|| {
        File::open(&beside)?.sync_all()?;
        fs::rename(&beside, &target)?;
        File::open(
            target
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new(".")),
        )?
        .sync_all()
    })();
    kept.map_err(FileError::io("write", &target))?;
    Ok(target)
}

/// Which database may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    NewOrOld,
    Old,
}

/// A path may hold any byte; in a URL all but the plainest are written as %XX.
fn url(path: &Path) -> String {
    let mut url = String::from("sqlite://");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => {
                url.push(char::from(*byte));
            }
            _ => {
                url.push('%');
                url.push_str(&HEXUPPER.encode(&[*byte]));
            }
        }
    }
    url
}

async fn prepare(pool: &AnyPool, path: &Path, wanted: Wanted) -> Result<(), StoreError> {
    // The checks come before the first write: a file that is not ours stays as it is.
    let damaged = |error: sqlx::Error| match kind_of(&error) {
        Fault::Content => {
            StoreError::Damaged { path: path.to_path_buf(), reason: error.to_string() }
        }
        Fault::Place => StoreError::Database(error),
    };
    let check = sqlx::query("PRAGMA integrity_check")
        .fetch_one(pool)
        .await
        .and_then(|row| row.try_get::<String, _>(0))
        .map_err(damaged)?;
    if check != "ok" {
        return Err(StoreError::Damaged { path: path.to_path_buf(), reason: check });
    }
    let count = "SELECT COUNT(*), COALESCE(SUM(name IN ('meta', 'records')), 0) FROM sqlite_master \
                 WHERE type = 'table'";
    let row = sqlx::query(count).fetch_one(pool).await.map_err(damaged)?;
    let (tables, ours): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    if tables == 0 {
        if wanted == Wanted::Old {
            return Err(StoreError::Empty { path: path.to_path_buf() });
        }
        // New, or its maker was killed before anything was in it.
        set(pool).await?;
        return create(pool).await;
    }
    if ours != 2 {
        return Err(StoreError::Foreign { path: path.to_path_buf() });
    }
    let schema = sqlx::query("SELECT value FROM meta WHERE key = 'schema'").fetch_one(pool).await;
    let schema = schema.and_then(|row| row.try_get::<i64, _>(0));
    let found = schema.map_err(|_| StoreError::Foreign { path: path.to_path_buf() })?;
    if found > SCHEMA {
        return Err(StoreError::Newer { found });
    }
    if found < 1 {
        return Err(StoreError::Unknown { found });
    }
    set(pool).await?;
    if found < SCHEMA {
        let kept = copy(pool, path, found).await?;
        tracing::info!(from = found, to = SCHEMA, copy = %kept.display(),
            "the store is brought up to this version");
        Store::migrate(pool, found).await?;
    }
    Ok(())
}

/// Whose fault an error is.
enum Fault {
    /// What is in the file.
    Content,
    /// Where the file is: a full disk, a directory that cannot be written.
    Place,
}

fn kind_of(error: &sqlx::Error) -> Fault {
    // The first byte of an extended result code is the primary one: SQLITE_CORRUPT, SQLITE_NOTADB.
    let code = error.as_database_error().and_then(|error| error.code());
    match code.and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff) {
        Some(11 | 26) => Fault::Content,
        Some(_) => Fault::Place,
        None => Fault::Content,
    }
}

async fn set(pool: &AnyPool) -> Result<(), StoreError> {
    sqlx::query(LOG).execute(pool).await?;
    Ok(())
}
