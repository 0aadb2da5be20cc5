//! What has to survive on the server: its records, and the log of what happened to them.
//!
//! A [`Store`] is a table of records, each with the revision at which it was last written and a sum
//! that tells a damaged one, and a table of events. Nothing here knows what a record means, and
//! nothing else knows SQL. The statements are those that SQLite and PostgreSQL share, with only
//! BIGINT and TEXT columns, so that the second can serve later in the same code; what is SQLite's
//! own is in `sqlite`, the tables and their changes from version to version in `schema`, the events
//! in `log`, and the whole as one value, for backups, in `snapshot`.

mod log;
mod schema;
mod snapshot;
mod sqlite;

use std::path::PathBuf;
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::{Blake2s, Digest};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use sqlx::{Any, AnyConnection, AnyPool, Connection, Row, Transaction};

pub use log::{Event, StoredEvent};
pub use schema::SCHEMA;
pub use snapshot::Snapshot;

use crate::io::files::FileError;

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
    /// No version ever had this number.
    #[error("the store says that its version is {found}, and there is no such version")]
    Unknown {
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
    /// Nothing where there should be a database.
    #[error("there is nothing in {}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A database of another program.
    #[error("{} is the database of another program", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A record whose sum is not that of its content.
    #[error("the record {kind} {id} in the store is damaged")]
    BadSum {
        /// The kind of the record.
        kind: String,
        /// Its id.
        id: String,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// What a commit has left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The revision of the records that were written.
    pub rev: u64,
    /// The events, with the numbers that they got.
    pub events: Vec<StoredEvent>,
    /// How long it took until all of it was on disk.
    pub took: Duration,
}

impl Store {
    /// Everything in the store, deleted records too: their ids are not to be given again.
    ///
    /// # Errors
    /// When the database fails, or a record is not as it was written.
    pub async fn load(&self) -> Result<Vec<StoredRecord>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        load(&mut transaction).await
    }

    /// Writes all of `changes` and `events` or none of it, and returns the revision that the
    /// records have from then on. When this returns, a power cut cannot undo it.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when a record is not at its expected revision; nothing is written.
    pub async fn commit(
        &self,
        changes: &[Change],
        events: &[Event],
    ) -> Result<Committed, StoreError> {
        let start = crate::io::clock::now();
        let mut connection = self.pool.acquire().await?;
        match write(&mut connection, changes, events).await {
            Ok((rev, events)) => {
                let took = crate::io::clock::now().saturating_duration_since(start);
                Ok(Committed { rev: unsigned(rev), events, took })
            }
            Err(error) => {
                // When a COMMIT fails, as on a full disk, the transaction is still open, and what
                // comes next would be a part of it that looks committed and is not. The end of the
                // connection is the end of the transaction, whatever its state.
                if let StoreError::Database(_) = error {
                    let _ = connection.detach().close().await;
                }
                Err(error)
            }
        }
    }

    /// Closes the database in good order.
    pub async fn close(self) {
        self.pool.close().await;
    }
}

async fn write(
    connection: &mut AnyConnection,
    changes: &[Change],
    events: &[Event],
) -> Result<(i64, Vec<StoredEvent>), StoreError> {
    let mut transaction = connection.begin().await?;
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
    let events = log::append(&mut transaction, events).await?;
    transaction.commit().await?;
    Ok((rev, events))
}

async fn load(transaction: &mut Transaction<'_, Any>) -> Result<Vec<StoredRecord>, StoreError> {
    const ALL: &str = "SELECT kind, id, rev, deleted, body, sum FROM records ORDER BY kind, id";
    let rows = sqlx::query(ALL).fetch_all(&mut **transaction).await?;
    rows.iter()
        .map(|row| {
            let deleted: i64 = row.try_get("deleted")?;
            let body: String = row.try_get("body")?;
            let record = StoredRecord {
                kind: row.try_get("kind")?,
                id: row.try_get("id")?,
                rev: unsigned(row.try_get("rev")?),
                body: (deleted == 0).then_some(body),
            };
            let sum: String = row.try_get("sum")?;
            if sum != sum_of(&record) {
                return Err(StoreError::BadSum { kind: record.kind, id: record.id });
            }
            Ok(record)
        })
        .collect()
}

/// What tells a record from a damaged one: SQLite looks at the structure of its pages and not at
/// what is written in them.
fn sum_of(record: &StoredRecord) -> String {
    let StoredRecord { kind, id, rev, body } = record;
    let mut hash = Blake2s::<U16>::new();
    for part in [kind.as_str(), id, body.as_deref().unwrap_or_default()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update(rev.to_le_bytes());
    hash.update([u8::from(body.is_none())]);
    HEXLOWER.encode(&hash.finalize())
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

fn stored(change: &Change, rev: i64) -> StoredRecord {
    let (kind, id) = (change.kind.into(), change.id.clone());
    StoredRecord { kind, id, rev: unsigned(rev), body: change.body.clone() }
}

async fn insert(
    transaction: &mut Transaction<'_, Any>,
    change: &Change,
    rev: i64,
) -> Result<u64, StoreError> {
    const INSERT: &str = "INSERT INTO records (kind, id, rev, deleted, body, sum) \
                          VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (kind, id) DO NOTHING";
    let done = sqlx::query(INSERT)
        .bind(change.kind)
        .bind(change.id.as_str())
        .bind(rev)
        .bind(i64::from(change.body.is_none()))
        .bind(change.body.as_deref().unwrap_or_default())
        .bind(sum_of(&stored(change, rev)))
        .execute(&mut **transaction)
        .await?;
    Ok(done.rows_affected())
}

async fn update(
    transaction: &mut Transaction<'_, Any>,
    change: &Change,
    rev: i64,
) -> Result<u64, StoreError> {
    const UPDATE: &str = "UPDATE records SET rev = $1, deleted = $2, body = $3, sum = $4 \
                          WHERE kind = $5 AND id = $6 AND rev = $7 AND deleted = 0";
    let done = sqlx::query(UPDATE)
        .bind(rev)
        .bind(i64::from(change.body.is_none()))
        .bind(change.body.as_deref().unwrap_or_default())
        .bind(sum_of(&stored(change, rev)))
        .bind(change.kind)
        .bind(change.id.as_str())
        .bind(signed(change.expected_rev))
        .execute(&mut **transaction)
        .await?;
    Ok(done.rows_affected())
}

/// Revisions start at 1 and rise; a negative one could only come from a damaged store.
fn unsigned(rev: i64) -> u64 {
    u64::try_from(rev).unwrap_or_default()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
