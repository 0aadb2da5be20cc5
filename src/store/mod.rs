//! What has to survive on the server: its log of records.
//!
//! A [`Store`] is a table of records, each with the revision at which it was last written. Nothing
//! here knows what a record means, and nothing else knows SQL. The statements are those that SQLite
//! and PostgreSQL share, with only BIGINT and TEXT columns, so that the second can serve later in
//! the same code; what is SQLite's own is in `sqlite`.

mod sqlite;

use std::path::PathBuf;

use sqlx::{Any, AnyPool, Row, Transaction};

use crate::io::files::FileError;

/// The version of the tables.
const SCHEMA: i64 = 1;

/// Why the store is of no use.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file beside the database.
    #[error(transparent)]
    File(#[from] FileError),
    /// A newer program wrote it.
    #[error(
        "the store was written by a newer version (schema {found}, this program knows {SCHEMA})"
    )]
    Newer {
        /// The schema found.
        found: i64,
    },
    /// Not a database, or a damaged one.
    #[error("{} is damaged or no database: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the database says.
        reason: String,
    },
    /// A database of another program.
    #[error("{} is the database of another program", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else wrote one of the records in the meantime.
    #[error("{kind} {id} was changed by somebody else")]
    Conflict {
        /// The kind of the record.
        kind: String,
        /// Its id.
        id: String,
    },
    /// The database failed.
    #[error("the store failed: {0}")]
    Database(#[from] sqlx::Error),
}

/// One record as it lies in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRecord {
    /// What kind of record it is.
    pub kind: String,
    /// Its id within the kind.
    pub id: String,
    /// The revision at which it was last written.
    pub rev: u64,
    /// Its content, or none when it was deleted.
    pub body: Option<String>,
}

/// One change of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What kind of record it is.
    pub kind: &'static str,
    /// Its id within the kind.
    pub id: String,
    /// The revision that it must have; 0 when it must never have existed.
    pub expected_rev: u64,
    /// Its new content, or none to delete it.
    pub body: Option<String>,
}

/// The server's records on disk.
#[derive(Debug)]
pub struct Store {
    pool: AnyPool,
}

impl Store {
    /// Everything in the store, deleted records too: their ids are not to be given again.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn load(&self) -> Result<Vec<StoredRecord>, StoreError> {
        const ALL: &str = "SELECT kind, id, rev, deleted, body FROM records ORDER BY kind, id";
        let rows = sqlx::query(ALL).fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                let deleted: i64 = row.try_get("deleted")?;
                let body: String = row.try_get("body")?;
                Ok(StoredRecord {
                    kind: row.try_get("kind")?,
                    id: row.try_get("id")?,
                    rev: unsigned(row.try_get("rev")?),
                    body: (deleted == 0).then_some(body),
                })
            })
            .collect()
    }

    /// Writes all of `changes` or none, and returns the revision that they have from then on. When
    /// this returns, a power cut cannot undo it.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when a record is not at its expected revision; nothing is written.
    pub async fn commit(&self, changes: &[Change]) -> Result<u64, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let rev = next_rev(&mut transaction).await?;
        for change in changes {
            let written = if change.expected_rev == 0 {
                insert(&mut transaction, change, rev).await?
            } else {
                update(&mut transaction, change, rev).await?
            };
            // The guard is in the statement itself, so two writers cannot both win.
            if written != 1 {
                let (kind, id) = (change.kind.into(), change.id.clone());
                return Err(StoreError::Conflict { kind, id });
            }
        }
        transaction.commit().await?;
        Ok(unsigned(rev))
    }

    /// Closes the database in good order.
    pub async fn close(self) {
        self.pool.close().await;
    }
}

/// Makes the tables, in one transaction.
async fn create(pool: &AnyPool) -> Result<(), StoreError> {
    const STATEMENTS: [&str; 4] = [
        "CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL)",
        "CREATE TABLE records (kind TEXT NOT NULL, id TEXT NOT NULL, rev BIGINT NOT NULL, \
         deleted BIGINT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, id))",
        "INSERT INTO meta (key, value) VALUES ('schema', 1)",
        "INSERT INTO meta (key, value) VALUES ('rev', 0)",
    ];
    let mut transaction = pool.begin().await?;
    for statement in STATEMENTS {
        sqlx::query(statement).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(())
}

async fn next_rev(transaction: &mut Transaction<'_, Any>) -> Result<i64, StoreError> {
    sqlx::query("UPDATE meta SET value = value + 1 WHERE key = 'rev'")
        .execute(&mut **transaction)
        .await?;
    let row = sqlx::query("SELECT value FROM meta WHERE key = 'rev'")
        .fetch_one(&mut **transaction)
        .await?;
    Ok(row.try_get("value")?)
}

async fn insert(
    transaction: &mut Transaction<'_, Any>,
    change: &Change,
    rev: i64,
) -> Result<u64, StoreError> {
    const INSERT: &str = "INSERT INTO records (kind, id, rev, deleted, body) \
                          VALUES ($1, $2, $3, $4, $5) ON CONFLICT (kind, id) DO NOTHING";
    let done = sqlx::query(INSERT)
        .bind(change.kind)
        .bind(change.id.as_str())
        .bind(rev)
        .bind(i64::from(change.body.is_none()))
        .bind(change.body.as_deref().unwrap_or_default())
        .execute(&mut **transaction)
        .await?;
    Ok(done.rows_affected())
}

async fn update(
    transaction: &mut Transaction<'_, Any>,
    change: &Change,
    rev: i64,
) -> Result<u64, StoreError> {
    const UPDATE: &str = "UPDATE records SET rev = $1, deleted = $2, body = $3 \
                          WHERE kind = $4 AND id = $5 AND rev = $6 AND deleted = 0";
    let done = sqlx::query(UPDATE)
        .bind(rev)
        .bind(i64::from(change.body.is_none()))
        .bind(change.body.as_deref().unwrap_or_default())
        .bind(change.kind)
        .bind(change.id.as_str())
        .bind(i64::try_from(change.expected_rev).unwrap_or(i64::MAX))
        .execute(&mut **transaction)
        .await?;
    Ok(done.rows_affected())
}

/// Revisions start at 1 and rise; a negative one could only come from a damaged store.
fn unsigned(rev: i64) -> u64 {
    u64::try_from(rev).unwrap_or_default()
}

#[cfg(test)]
mod tests;
