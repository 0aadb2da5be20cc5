//! The log of events: who changed what, and when. It is written with the change, or not at all.

use serde::{Deserialize, Serialize};
use sqlx::any::AnyRow;
use sqlx::{Any, Row, Transaction};

use super::{Store, StoreError, signed, unsigned};

/// So many events are kept; the oldest go first.
const KEPT: i64 = 10_000;

/// Something that happened. Nothing here knows what it means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in Unix seconds.
    pub at: u64,
    /// What kind of event it is.
    pub kind: String,
    /// Who did it.
    pub actor: String,
    /// To what, and what came of it.
    pub body: String,
}

/// An event in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEvent {
    /// Its number; they rise without gaps, but for one where a backup was restored.
    pub seq: u64,
    /// The event.
    #[serde(flatten)]
    pub event: Event,
}

impl Store {
    /// Up to `limit` events after number `after`: the last ones, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn events(&self, after: u64, limit: u32) -> Result<Vec<StoredEvent>, StoreError> {
        const LAST: &str = "SELECT seq, at, kind, actor, body FROM events WHERE seq > $1 \
                            ORDER BY seq DESC LIMIT $2";
        let rows = sqlx::query(LAST)
            .bind(signed(after))
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await?;
        rows.iter().rev().map(parse).collect()
    }

    /// Up to `limit` events after number `after`: the first ones, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn events_from(
        &self,
        after: u64,
        limit: u32,
    ) -> Result<Vec<StoredEvent>, StoreError> {
        const FIRST: &str = "SELECT seq, at, kind, actor, body FROM events WHERE seq > $1 \
                             ORDER BY seq LIMIT $2";
        let rows = sqlx::query(FIRST)
            .bind(signed(after))
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(parse).collect()
    }
}

fn parse(row: &AnyRow) -> Result<StoredEvent, StoreError> {
    let event = Event {
        at: unsigned(row.try_get("at")?),
        kind: row.try_get("kind")?,
        actor: row.try_get("actor")?,
        body: row.try_get("body")?,
    };
    Ok(StoredEvent { seq: unsigned(row.try_get("seq")?), event })
}

pub(super) async fn all(
    transaction: &mut Transaction<'_, Any>,
) -> Result<Vec<StoredEvent>, StoreError> {
    let rows = sqlx::query("SELECT seq, at, kind, actor, body FROM events ORDER BY seq")
        .fetch_all(&mut **transaction)
        .await?;
    rows.iter().map(parse).collect()
}

/// Writes events behind the last one, and drops those that are too many.
pub(super) async fn append(
    transaction: &mut Transaction<'_, Any>,
    events: &[Event],
) -> Result<Vec<StoredEvent>, StoreError> {
    let mut stored = Vec::with_capacity(events.len());
    if events.is_empty() {
        return Ok(stored);
    }
    let last = sqlx::query("SELECT COALESCE(MAX(seq), 0) AS last FROM events")
        .fetch_one(&mut **transaction)
        .await?;
    let mut seq: i64 = last.try_get("last")?;
    for event in events {
        seq = seq.saturating_add(1);
        let event = StoredEvent { seq: unsigned(seq), event: event.clone() };
        insert(transaction, &event).await?;
        stored.push(event);
    }
    // By their count: the numbers may have a gap.
    const TOO_MANY: &str = "DELETE FROM events WHERE seq <= \
                            (SELECT seq FROM events ORDER BY seq DESC LIMIT 1 OFFSET $1)";
    sqlx::query(TOO_MANY).bind(KEPT).execute(&mut **transaction).await?;
    Ok(stored)
}

pub(super) async fn insert(
    transaction: &mut Transaction<'_, Any>,
    StoredEvent { seq, event }: &StoredEvent,
) -> Result<(), StoreError> {
    const INSERT: &str =
        "INSERT INTO events (seq, at, kind, actor, body) VALUES ($1, $2, $3, $4, $5)";
    sqlx::query(INSERT)
        .bind(signed(*seq))
        .bind(signed(event.at))
        .bind(event.kind.as_str())
        .bind(event.actor.as_str())
        .bind(event.body.as_str())
        .execute(&mut **transaction)
        .await?;
    Ok(())
}
