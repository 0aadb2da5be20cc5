//! A small herd in every run of the tests; `cargo bench --bench herd` has the large ones.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(dead_code, reason = "the program uses all of what the two share")]

#[path = "bench/herd/crowd.rs"]
mod crowd;
#[path = "bench/herd/figures.rs"]
mod figures;
#[path = "bench/herd/member.rs"]
mod member;
#[path = "bench/herd/runs.rs"]
mod runs;
#[path = "bench/herd/server.rs"]
mod server;

use std::fmt::Debug;
use std::net::Ipv4Addr;
use std::time::Duration;

use figures::Figures;
use runs::Size;
use server::Wish;

fn die(wanted: &str, why: &dyn Debug) -> ! {
    panic!("no {wanted}: {why:?}")
}

/// The limits are those of a loaded machine and a program without optimisation.
fn size(whole_netmap_up_to: usize) -> Size {
    let nodes = std::env::var("OVERLAY_HERD_NODES").map_or(200, |text| text.parse().unwrap());
    let wish = Wish { whole_netmap_up_to, core: None, at: Ipv4Addr::LOCALHOST };
    Size { nodes, peers: 5, sources: None, wish }
}

fn nothing_is_lost(figures: &Figures) {
    assert_eq!(figures.get("gaps"), 0.0, "{}", figures.table());
    assert_eq!(figures.get("lost"), 0.0, "{}", figures.table());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_has_all_nodes_back_and_sends_no_whole_netmap_in_a_large_network() {
    let figures = runs::storm(size(0)).await;
    assert!(figures.get("all back") < 15_000.0, "{}", figures.table());
    assert_eq!(figures.get("whole netmaps"), 0.0, "{}", figures.table());
    assert_eq!(figures.get("gaps"), 0.0, "{}", figures.table());
    assert!(figures.get("server rss") < 150.0, "{}", figures.table());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_herd_behind_one_address_comes_back_too() {
    let figures = runs::storm(Size { sources: Some(1), ..size(0) }).await;
    assert!(figures.get("all back") < 15_000.0, "{}", figures.table());
    assert_eq!(figures.get("gaps"), 0.0, "{}", figures.table());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_endpoint_reaches_those_who_use_the_node_without_waiting() {
    let figures = runs::fanout(size(0), 30).await;
    nothing_is_lost(&figures);
    assert!(figures.get("endpoint seen by peers after p50") < 100.0, "{}", figures.table());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_come_and_go_are_seen_by_their_peers() {
    for whole_netmap_up_to in [0, 4_096] {
        let figures = runs::churn(size(whole_netmap_up_to), 10, Duration::from_secs(2)).await;
        nothing_is_lost(&figures);
        assert!(figures.get("return seen by peers after p99") < 1_000.0, "{}", figures.table());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_node_is_dropped_by_all_within_a_second() {
    for whole_netmap_up_to in [0, 4_096] {
        let figures = runs::revoke(size(whole_netmap_up_to), 5).await;
        nothing_is_lost(&figures);
        assert!(figures.get("dropped by a node after p99") < 1_000.0, "{}", figures.table());
        assert!(figures.get("acknowledged by all after p99") < 2_000.0, "{}", figures.table());
    }
}
