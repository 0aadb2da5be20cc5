//! The tables, and how a store of an older version becomes one of this.
//!
//! Each step to the next version is one transaction, with the new version number in it: whoever is
//! killed on the way finds the old version or the new one. Before the first step the store is
//! copied ([`Store::migrate`] is called with the place for it).

use sqlx::{Any, AnyPool, Row, Transaction};

use super::{Store, StoreError, StoredRecord, sum_of, unsigned};

/// The version of the tables that this program writes.
pub const SCHEMA: i64 = 6;

/// What a new store gets; equal to the oldest version after all steps.
const TABLES: [&str; 5] = [
    "CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL)",
    "CREATE TABLE records (kind TEXT NOT NULL, id TEXT NOT NULL, rev BIGINT NOT NULL, \
     deleted BIGINT NOT NULL, body TEXT NOT NULL, sum TEXT NOT NULL DEFAULT '', \
     PRIMARY KEY (kind, id))",
    EVENTS,
    "INSERT INTO meta (key, value) VALUES ('schema', 6)",
    "INSERT INTO meta (key, value) VALUES ('rev', 0)",
];
const EVENTS: &str = "CREATE TABLE events (seq BIGINT NOT NULL PRIMARY KEY, at BIGINT NOT NULL, \
                      kind TEXT NOT NULL, actor TEXT NOT NULL, body TEXT NOT NULL)";

/// Makes the tables, in one transaction.
pub(super) async fn create(pool: &AnyPool) -> Result<(), StoreError> {
    let mut transaction = pool.begin().await?;
    for statement in TABLES {
        sqlx::query(statement).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(())
}

impl Store {
    /// Goes from version `found` to the present one, a transaction for each step.
    pub(super) async fn migrate(pool: &AnyPool, found: i64) -> Result<(), StoreError> {
        for version in found..SCHEMA {
            let mut transaction = pool.begin().await?;
            match version {
                1 => add_sums_and_events(&mut transaction).await?,
                // 2 to 3: a member may have an end, which a program that knows of none would lose.
                2 => {}
                // 3 to 4: so may the members that a network will have.
                3 => {}
                // 4 to 5: so may the mark of a name that an administrator gave.
                4 => {}
                // 5 to 6: so may the key of the server in the record of the network.
                5 => {}
                _ => return Err(StoreError::Unknown { found }),
            }
            let done = sqlx::query("UPDATE meta SET value = $1 WHERE key = 'schema'")
                .bind(version + 1)
                .execute(&mut *transaction)
                .await?;
            if done.rows_affected() != 1 {
                return Err(StoreError::Unknown { found });
            }
            transaction.commit().await?;
        }
        Ok(())
    }
}

/// 1 to 2: a sum for every record, and the log of events.
async fn add_sums_and_events(transaction: &mut Transaction<'_, Any>) -> Result<(), StoreError> {
    for statement in ["ALTER TABLE records ADD COLUMN sum TEXT NOT NULL DEFAULT ''", EVENTS] {
        sqlx::query(statement).execute(&mut **transaction).await?;
    }
    let rows = sqlx::query("SELECT kind, id, rev, deleted, body FROM records")
        .fetch_all(&mut **transaction)
        .await?;
    for row in rows {
        let deleted: i64 = row.try_get("deleted")?;
        let record = StoredRecord {
            kind: row.try_get("kind")?,
            id: row.try_get("id")?,
            rev: unsigned(row.try_get("rev")?),
            body: (deleted == 0).then_some(row.try_get("body")?),
        };
        sqlx::query("UPDATE records SET sum = $1 WHERE kind = $2 AND id = $3")
            .bind(sum_of(&record))
            .bind(record.kind.as_str())
            .bind(record.id.as_str())
            .execute(&mut **transaction)
            .await?;
    }
    Ok(())
}
