//! `overlay server status`: what the running server does.

use std::path::Path;

use crate::cli::Done;
use crate::cli::ask;
use crate::cli::fail::Failure;
use crate::cli::print::{json, line};
use crate::config::paths::Role;
use crate::daemon::server::{Question, RateInfo, ServerStatus, StoreAnswer, WayInfo};

pub(super) fn run(as_json: bool, socket: &Path) -> Done {
    let StoreAnswer::Status(status) = ask::ask(Role::Server, socket, &Question::Status)? else {
        return Err(Failure::new(
            "the server gave another answer",
            "command and server are of different versions",
            "restart the server: systemctl restart overlay-server",
        ));
    };
    if as_json { json(&status) } else { print(&status) }
}

fn print(status: &ServerStatus) -> Done {
    let relay = &status.relay;
    line(format!("network {}, up since {}", status.network, status.started))?;
    line(format!(
        "nodes: {} of {} online, {} control connections",
        status.online, status.nodes, status.connections
    ))?;
    if status.members_last_s.is_some() {
        line(super::admin::lasting(status.members_last_s))?;
    }
    line(format!("relayed by UDP: {}", way(relay.udp)))?;
    line(format!("relayed by TCP: {}", way(relay.tcp)))?;
    line(format!(
        "relay limits: {} for a node, {} in all; {} bytes wait",
        rate(relay.node_limit),
        rate(relay.network_limit),
        relay.waiting_bytes
    ))?;
    let drops: Vec<String> =
        status.drops.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    let drops = if drops.is_empty() { "none".into() } else { drops.join(", ") };
    line(format!("dropped datagrams: {drops}"))
}

fn way(way: WayInfo) -> String {
    format!("{} datagrams, {} bytes", way.datagrams, way.bytes)
}

fn rate(rate: RateInfo) -> String {
    format!("{} Mbit/s and {} packets/s", rate.mbit, rate.packets)
}
