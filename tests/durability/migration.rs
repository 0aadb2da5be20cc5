//! From one version of the store to the next, and not back.

use std::fs;
use std::path::Path;
use std::time::Duration;

use libtest_mimic::Completion;
use overlay::daemon::server::Question;
use overlay::server::admin::{NodeInfo, Request};
use sqlx::Row;
use sqlx::any::AnyPoolOptions;

use crate::server::{Place, Process, copy_dir, has_strace, join, run};

async fn sql(path: &Path, statements: &[&'static str]) {
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", path.display());
    let pool = AnyPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    for statement in statements {
        sqlx::query(*statement).execute(&pool).await.unwrap();
    }
    pool.close().await;
}

async fn schema_of(path: &Path) -> i64 {
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", path.display());
    let pool = AnyPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    let row = sqlx::query("SELECT value FROM meta WHERE key = 'schema'").fetch_one(&pool).await;
    let schema = row.unwrap().try_get(0).unwrap();
    pool.close().await;
    schema
}

/// A stopped server with members and an invite in it.
async fn with_members(place: &Place) -> Vec<NodeInfo> {
    let process = place.start().await;
    let line = place.invite(5).await.join.expose().parse().unwrap();
    for key in 1..=5 {
        join(place.address, &line, [key; 32]).await.unwrap().1.unwrap();
    }
    process.stop().await;
    let process = place.start().await;
    let nodes = place.nodes().await;
    process.stop().await;
    nodes
}

/// What of a node a migration may not touch.
fn identity(nodes: &[NodeInfo]) -> Vec<(String, String, String, String)> {
    let fields = |node: &NodeInfo| {
        (node.id.clone(), node.name.clone(), node.ipv4.to_string(), node.public_key.clone())
    };
    nodes.iter().map(fields).collect()
}

pub(crate) fn killed() -> Completion {
    if !has_strace() {
        return Completion::ignored_with("no strace");
    }
    run(async {
        let old = Place::new();
        let nodes = with_members(&old).await;
        // Exactly what version 1 made.
        let back = [
            "DROP TABLE events",
            "ALTER TABLE records DROP COLUMN sum",
            "UPDATE meta SET value = 1 WHERE key = 'schema'",
            "PRAGMA wal_checkpoint(TRUNCATE)",
        ];
        sql(&old.store(), &back).await;
        let mut kills = 0;
        for call in ["pwrite64", "write", "fdatasync", "fsync", "rename", "unlink", "ftruncate"] {
            for number in 1..=crate::size(25, 400) {
                let place = Place::new();
                copy_dir(&old.state(), &place.state());
                let (trace, kill) = (
                    format!("--trace={call}"),
                    format!("--inject={call}:signal=KILL:when={number}"),
                );
                let process =
                    place.spawn(&["strace", "-f", "-qq", "-o", "/dev/null", &trace, &kill]);
                let was_killed = killed_or_ready(&place, process).await;
                let copy = place.state().join("server.db.schema-1");
                if copy.exists() {
                    assert_eq!(schema_of(&copy).await, 1, "{call} {number}");
                }
                let process = place.start().await;
                assert_eq!(identity(&place.nodes().await), identity(&nodes), "{call} {number}");
                place.invite(1).await;
                process.stop().await;
                assert_eq!(schema_of(&place.store()).await, overlay::store::SCHEMA);
                assert_eq!(schema_of(&copy).await, 1, "{call} {number}: the old one is kept");
                if !was_killed {
                    break;
                }
                kills += 1;
            }
        }
        eprintln!("killed {kills} times on the way");
        assert!(kills > 20, "only {kills} steps were seen");
    });
    Completion::Completed
}

/// Waits for the end of the server, and ends it when it is ready; tells whether it was killed.
async fn killed_or_ready(place: &Place, mut process: Process) -> bool {
    for _ in 0..3000 {
        if process.0.try_wait().unwrap().is_some() {
            return true;
        }
        let question = Question::Admin(Request::Nodes);
        if place.try_ask(&question).await.is_some() {
            crate::server::kill_traced(process);
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("neither dead nor ready: {}", place.log());
}

/// This program on the store of a later one.
pub(crate) fn newer() -> Completion {
    run(async {
        let place = Place::new();
        with_members(&place).await;
        sql(&place.store(), &["UPDATE meta SET value = value + 1 WHERE key = 'schema'"]).await;
        let before = fs::read(place.store()).unwrap();
        let mut process = place.spawn(&[]);
        let status = process.ended(Duration::from_secs(10)).expect("it refuses");
        assert_eq!(status.code(), Some(1));
        let log = place.log();
        assert!(log.contains("written by a newer version") && log.contains("help:"), "{log}");
        assert_eq!(fs::read(place.store()).unwrap(), before);
    });
    Completion::Completed
}
