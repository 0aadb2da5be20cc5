//! Revisions, transactions and what a restart finds.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn put(id: &str, expected_rev: u64, body: &str) -> Change {
    Change { kind: "member", id: id.into(), expected_rev, body: Some(body.into()) }
}

fn database() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd name?#%.db");
    (dir, path)
}

#[tokio::test]
async fn what_was_committed_is_there_after_opening_again() {
    let (dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    assert_eq!(store.commit(&[put("a", 0, "1"), put("b", 0, "2")], &[]).await.unwrap().rev, 1);
    let delete = Change { body: None, ..put("b", 1, "") };
    assert_eq!(store.commit(&[put("a", 1, "3"), delete], &[]).await.unwrap().rev, 2);
    let records = store.load().await.unwrap();
    store.close().await;
    let store = Store::open(&path).await.unwrap();
    assert_eq!(store.load().await.unwrap(), records);
    let bodies: Vec<_> = records.iter().map(|record| record.body.as_deref()).collect();
    assert_eq!(bodies, [Some("3"), None], "the deleted one is remembered");
    assert_eq!(store.commit(&[put("c", 0, "4")], &[]).await.unwrap().rev, 3, "revisions go on");
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        let mode = file.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", file.path());
    }
}

#[tokio::test]
async fn a_change_of_something_else_than_expected_is_refused_whole() {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    store.commit(&[put("a", 0, "1")], &[]).await.unwrap();
    let before = store.load().await.unwrap();
    for wrong in [put("a", 0, "2"), put("a", 7, "2"), put("never", 1, "2")] {
        let error = store.commit(&[put("z", 0, "9"), wrong], &[]).await.unwrap_err();
        assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
        assert_eq!(store.load().await.unwrap(), before, "nothing of it was written");
    }
}

#[tokio::test]
async fn of_two_writers_exactly_one_wins() {
    let (_dir, path) = database();
    let first = Store::open(&path).await.unwrap();
    let second = Store::open(&path).await.unwrap();
    first.commit(&[put("invite", 0, "unused")], &[]).await.unwrap();
    let (first_use, second_use) = ([put("invite", 1, "by 1")], [put("invite", 1, "by 2")]);
    let (a, b) = tokio::join!(first.commit(&first_use, &[]), second.commit(&second_use, &[]));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_alone() {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    sqlx::query("UPDATE meta SET value = $1 WHERE key = 'schema'")
        .bind(SCHEMA + 1)
        .execute(&store.pool)
        .await
        .unwrap();
    store.close().await;
    let before = std::fs::read(&path).unwrap();
    let refused = Store::open(&path).await;
    assert!(matches!(refused, Err(StoreError::Newer { found }) if found == SCHEMA + 1));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_file_that_is_no_database_or_of_another_program_is_refused_and_left_alone() {
    let (_dir, path) = database();
    let garbage = vec![0xa5; 8192];
    std::fs::write(&path, &garbage).unwrap();
    let error = Store::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), garbage);

    std::fs::remove_file(&path).unwrap();
    let store = Store::open(&path).await.unwrap();
    for statement in ["DROP TABLE records", "DROP TABLE meta", "CREATE TABLE cats (name TEXT)"] {
        sqlx::query(statement).execute(&store.pool).await.unwrap();
    }
    store.close().await;
    let error = Store::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn a_damaged_database_is_refused() {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    for number in 0..200 {
        store.commit(&[put(&number.to_string(), 0, &"x".repeat(500))], &[]).await.unwrap();
    }
    store.close().await;
    let mut bytes = std::fs::read(&path).unwrap();
    let len = bytes.len();
    bytes[4096..len.min(20_000)].fill(0x5a);
    std::fs::write(&path, &bytes).unwrap();
    let error = Store::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn commits_wait_for_the_disk_on_every_connection() {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    for _ in 0..2 {
        let mut connection = store.pool.acquire().await.unwrap();
        for (setting, value) in [("PRAGMA synchronous", "2"), ("PRAGMA journal_mode", "wal")] {
            let row = sqlx::query(setting).fetch_one(&mut *connection).await.unwrap();
            let has =
                row.try_get::<String, _>(0).or(row.try_get::<i64, _>(0).map(|n| n.to_string()));
            assert_eq!(has.unwrap(), value, "{setting}");
        }
        connection.detach().close().await.unwrap();
    }
}

#[tokio::test]
async fn a_record_with_another_sum_is_refused() {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    store.commit(&[put("a", 0, "one")], &[]).await.unwrap();
    sqlx::query("UPDATE records SET body = 'two'").execute(&store.pool).await.unwrap();
    assert!(matches!(store.load().await, Err(StoreError::BadSum { .. })));
}

#[tokio::test]
async fn events_have_numbers_without_gaps_and_go_with_their_change() {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    let event =
        |kind: &str| Event { at: 7, kind: kind.into(), actor: "test".into(), body: "{}".into() };
    let committed = store.commit(&[put("a", 0, "1")], &[event("one"), event("two")]).await.unwrap();
    assert_eq!(committed.events.iter().map(|event| event.seq).collect::<Vec<_>>(), [1, 2]);
    store.commit(&[put("a", 0, "2")], &[event("never")]).await.unwrap_err();
    store.commit(&[put("a", 1, "2")], &[event("three")]).await.unwrap();
    let kinds = |events: Vec<StoredEvent>| {
        events.into_iter().map(|stored| (stored.seq, stored.event.kind)).collect::<Vec<_>>()
    };
    let last = kinds(store.events(0, 2).await.unwrap());
    assert_eq!(last, [(2, "two".into()), (3, "three".into())]);
    assert_eq!(kinds(store.events(2, 9).await.unwrap()), [(3, "three".into())]);
    let first = kinds(store.events_from(0, 2).await.unwrap());
    assert_eq!(first, [(1, "one".into()), (2, "two".into())]);
    assert_eq!(kinds(store.events_from(2, u32::MAX).await.unwrap()), [(3, "three".into())]);
    assert!(store.events(0, 0).await.unwrap().is_empty());
    // More than are kept.
    let many: Vec<Event> = (0..10_000).map(|_| event("many")).collect();
    store.commit(&[], &many).await.unwrap();
    let all = store.events(0, 100_000).await.unwrap();
    assert_eq!((all.len(), all[0].seq), (10_000, 4));
    // Numbers that go on far above leave the lines before them.
    let (_dir, path) = database();
    let last = StoredEvent { seq: 1 << 40, event: event("restored") };
    let mut snapshot = Snapshot { schema: SCHEMA, rev: 1, records: Vec::new(), events: all };
    snapshot.events.push(last);
    let store = Store::create_from(&path, &snapshot).await.unwrap();
    store.commit(&[], &[event("next")]).await.unwrap();
    let all = store.events(0, 100_000).await.unwrap();
    assert_eq!((all.len(), all[0].seq, all[9_999].seq), (10_000, 6, (1 << 40) + 1));
}

#[tokio::test]
async fn a_store_of_the_version_before_is_copied_and_brought_up_to_date() {
    for version in [2, 3, 4, 5] {
        brought_up_to_date_from(version).await;
    }
}

async fn brought_up_to_date_from(version: i64) {
    let (_dir, path) = database();
    let store = Store::open(&path).await.unwrap();
    store.commit(&[put("member", 0, "kept")], &[]).await.unwrap();
    sqlx::query("UPDATE meta SET value = $1 WHERE key = 'schema'")
        .bind(version)
        .execute(&store.pool)
        .await
        .unwrap();
    store.close().await;
    let store = Store::open(&path).await.unwrap();
    let row = sqlx::query("SELECT value FROM meta WHERE key = 'schema'").fetch_one(&store.pool);
    assert_eq!(row.await.unwrap().try_get::<i64, _>(0).unwrap(), SCHEMA);
    let records = store.load().await.unwrap();
    assert!(records.iter().any(|record| record.body.as_deref() == Some("kept")));
    let kept = path.with_file_name(format!("odd name?#%.db.schema-{version}"));
    assert!(kept.exists(), "the old one is kept");
}
