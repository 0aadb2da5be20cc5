//! What is SQLite's own: opening the file, and the settings that make a commit durable.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use data_encoding::HEXUPPER;
use sqlx::any::AnyPoolOptions;
use sqlx::{AnyPool, Row};

use super::{SCHEMA, Store, StoreError, create};
use crate::io::files::{FileError, SECRET_MODE};

/// `FULL` and not `NORMAL`: with the write-ahead log, NORMAL may lose acknowledged commits when the
/// power fails.
const SETTINGS: [&str; 3] =
    ["PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON"];

impl Store {
    /// Opens the database in this file, or makes a new one when there is none.
    ///
    /// # Errors
    /// When the file is damaged, foreign or of a newer version; it is left untouched then.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let is_new = std::fs::metadata(path).is_ok_and(|file| file.len() == 0) || !path.exists();
        // Made here for its mode; the files that SQLite puts beside it take the same mode.
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(SECRET_MODE)
            .open(path)
            .map_err(FileError::io("open", path))?;
        sqlx::any::install_default_drivers();
        let pool = AnyPoolOptions::new().max_connections(1).connect(&url(path)).await?;
        let result = prepare(&pool, path, is_new).await;
        if let Err(error) = result {
            pool.close().await;
            return Err(error);
        }
        Ok(Self { pool })
    }
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

async fn prepare(pool: &AnyPool, path: &Path, is_new: bool) -> Result<(), StoreError> {
    if is_new {
        set(pool).await?;
        return create(pool).await;
    }
    // The checks come before the first write: a file that is not ours stays as it is.
    let damaged = |reason: String| StoreError::Damaged { path: path.to_path_buf(), reason };
    let check = sqlx::query("PRAGMA quick_check")
        .fetch_one(pool)
        .await
        .and_then(|row| row.try_get::<String, _>(0))
        .map_err(|error| damaged(error.to_string()))?;
    if check != "ok" {
        return Err(damaged(check));
    }
    let ours = "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('meta', 'records')";
    let ours: i64 = sqlx::query(ours).fetch_one(pool).await?.try_get(0)?;
    if ours != 2 {
        return Err(StoreError::Foreign { path: path.to_path_buf() });
    }
    let schema = sqlx::query("SELECT value FROM meta WHERE key = 'schema'").fetch_one(pool).await;
    let schema = schema.and_then(|row| row.try_get::<i64, _>(0));
    let found = schema.map_err(|_| StoreError::Foreign { path: path.to_path_buf() })?;
    if found > SCHEMA {
        return Err(StoreError::Newer { found });
    }
    set(pool).await
}

async fn set(pool: &AnyPool) -> Result<(), StoreError> {
    for setting in SETTINGS {
        sqlx::query(setting).execute(pool).await?;
    }
    Ok(())
}
