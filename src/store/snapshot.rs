//! The whole store as one value: what a backup holds.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sqlx::Row;

use super::schema::SCHEMA;
use super::{Store, StoreError, StoredEvent, StoredRecord, load, log, signed, sum_of, unsigned};

/// Everything in a store at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The version of the tables that it was taken from.
    pub schema: i64,
    /// The newest revision.
    pub rev: u64,
    /// The records, deleted ones too.
    pub records: Vec<StoredRecord>,
    /// The events.
    pub events: Vec<StoredEvent>,
}

impl Store {
    /// Everything in the store, from one transaction.
    ///
    /// # Errors
    /// When the database fails, or a record is damaged.
    pub async fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let row = sqlx::query("SELECT value FROM meta WHERE key = 'rev'")
            .fetch_one(&mut *transaction)
            .await?;
        let rev = unsigned(row.try_get("value")?);
        let records = load(&mut transaction).await?;
        let events = log::all(&mut transaction).await?;
        Ok(Snapshot { schema: SCHEMA, rev, records, events })
    }

    /// Makes a new store at `path`, with this in it. When this returns, it is on disk.
    ///
    /// # Errors
    /// When the snapshot is of a newer version, or there is a store with something in it.
    pub async fn create_from(path: &Path, snapshot: &Snapshot) -> Result<Self, StoreError> {
        if snapshot.schema > SCHEMA {
            return Err(StoreError::Newer { found: snapshot.schema });
        }
        let store = Self::open(path).await?;
        if let Err(error) = store.fill(snapshot).await {
            // Else the file, and what is put in its place, would be closed some time later.
            store.close().await;
            return Err(error);
        }
        Ok(store)
    }

    async fn fill(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        for record in &snapshot.records {
            const INSERT: &str = "INSERT INTO records (kind, id, rev, deleted, body, sum) \
                                  VALUES ($1, $2, $3, $4, $5, $6)";
            sqlx::query(INSERT)
                .bind(record.kind.as_str())
                .bind(record.id.as_str())
                .bind(signed(record.rev))
                .bind(i64::from(record.body.is_none()))
                .bind(record.body.as_deref().unwrap_or_default())
                .bind(sum_of(record))
                .execute(&mut *transaction)
                .await?;
        }
        for event in &snapshot.events {
            log::insert(&mut transaction, event).await?;
        }
        sqlx::query("UPDATE meta SET value = $1 WHERE key = 'rev'")
            .bind(signed(snapshot.rev))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(())
    }
}
