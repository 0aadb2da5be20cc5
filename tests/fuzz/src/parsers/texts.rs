//! Texts: files that people write, files that the program wrote and a disk may have damaged, and what
//! is said on the local sockets.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use blake2::{Blake2s256, Digest};
use data_encoding::HEXLOWER;
use overlay::config::node::NodeConfig;
use overlay::config::server::ServerConfig;
use overlay::config::{Config, ConfigError, load};
use overlay::daemon::node::{Question as NodeQuestion, explain, report, rewritten};
use overlay::daemon::server::{
    EventInfo, Question as ServerQuestion, ServerStatus, StoreAnswer, records_in,
};
use overlay::io::local::Reply;
use overlay::node::{Netmap, Node, NodeSettings};
use overlay::policy::{Filter, Member, Policy};
use overlay::server::admin::Answer;
use overlay::server::{Server, Settings};
use overlay::types::{NodeId, NodeName, PublicKey, SecretKey, Tag};
use overlay::wire::{control, filter::WireFilter};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::epoch;

/// `node.toml`.
pub(crate) fn config_node(bytes: &[u8]) {
    config::<NodeConfig>(bytes);
}

/// `server.toml`.
pub(crate) fn config_server(bytes: &[u8]) {
    config::<ServerConfig>(bytes);
}

fn config<T: Config>(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Err(error) = load::<T>(Path::new("file"), &text) else { return };
    if let ConfigError::Content { place, .. } | ConfigError::OtherRole { place, .. } = &error {
        assert!(place.line <= text.matches('\n').count() + 1, "the place is in the text");
        let said = error.to_string().len() > place.to_string().len() + ": ".len();
        assert!(said, "and it is said what is wrong");
    }
}

/// A file of access rules, with its own cases; and what the nodes are sent that it speaks of.
pub(crate) fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let policy = match Policy::parse(text) {
        Ok(policy) => policy,
        Err(error) => {
            assert!(error.line <= text.matches('\n').count() + 1, "the place is in the text");
            return;
        }
    };
    assert_eq!(policy.try_cases().len(), policy.case_count());
    let names = ["alice", "bob", "printer"].map(|name| name.parse::<NodeName>().expect("a name"));
    let tags: [Tag; 1] = ["tag:office".parse().or_else(|_| "office".parse()).expect("a tag")];
    let members = (1..).filter_map(NodeId::new).zip(&names);
    let mut compiled = policy.compile(members.map(|(id, name)| Member { id, name, tags: &tags }));
    for id in (1..=4).filter_map(NodeId::new) {
        let wire = compiled.filter_of(id);
        let sent: WireFilter = control::decode(&control::encode(&wire)).expect("it can be read");
        assert_eq!(sent, wire);
        let filter = Filter::new(&sent).expect("a network with rules has filters");
        let _ = (filter.admits_everything(id), filter.admits_icmp(id));
        let _ = (filter.admits_tcp(id, 80), filter.admits_udp(id, 53));
    }
}

/// What is said on the local socket of a node, by both sides.
pub(crate) fn local_node(bytes: &[u8]) {
    json::<NodeQuestion>(bytes);
    json::<Reply<report::Status>>(bytes);
    json::<Reply<explain::Why>>(bytes);
    json::<Reply<explain::HistoryReport>>(bytes);
}

/// What is said on the local socket of the server, by both sides.
pub(crate) fn local_server(bytes: &[u8]) {
    json::<ServerQuestion>(bytes);
    json::<Reply<Answer>>(bytes);
    json::<Reply<StoreAnswer>>(bytes);
    json::<EventInfo>(bytes);
    json::<ServerStatus>(bytes);
}

/// What can be read can be written, and then says the same.
fn json<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let text = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(serde_json::to_vec(&again).expect("and written again"), text, "the same");
}

/// The files of a node's state directory, which one is told by the first byte; a node starts with a
/// netmap that can be read.
pub(crate) fn state_node(bytes: &[u8]) {
    let Some((file, text)) = bytes.split_first() else { return };
    let name = ["node.key", "node.json", "netmap.json"][usize::from(file % 3)];
    let Ok(again) = rewritten(name, text) else { return };
    assert_eq!(rewritten(name, &again).as_ref(), Ok(&again), "a file that was written can be read");
    if name == "netmap.json" {
        let netmap: Netmap = serde_json::from_slice(&again).expect("as just now");
        let key = SecretKey::from_bytes([1; 32]);
        let settings = NodeSettings::default();
        let mut node = Node::new(key, netmap, settings, [7; 32], 1, epoch());
        node.handle_timeout(epoch() + Duration::from_secs(1));
        let _ = node.peer_statuses(epoch());
    }
}

/// The second line of a backup, under a first one that fits it; a server starts with a network that
/// can be read.
pub(crate) fn backup(bytes: &[u8]) {
    static KEY: OnceLock<PublicKey> = OnceLock::new();
    let Ok(content) = std::str::from_utf8(bytes) else { return };
    let sum = HEXLOWER.encode(&Blake2s256::digest(content));
    let header =
        r#"{"overlay_server_backup":1,"network":"0707070707070707","made":"","software":"","#;
    let text = format!("{header}\"sum\":\"{sum}\"}}\n{content}\n");
    let _ = records_in(content);
    let Ok(records) = records_in(&text) else { return };
    let settings = Settings {
        server_key: *KEY.get_or_init(|| SecretKey::from_bytes([1; 32]).public()),
        addresses: Vec::new(),
        whole_netmap_up_to: 2,
    };
    let mut server = Server::new(settings, records, [3; 32], epoch(), 1_800_000_000);
    server.handle_timeout(epoch() + Duration::from_secs(60));
    while server.poll_output().is_some() {}
}
