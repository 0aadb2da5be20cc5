//! Two nodes of one network.

use std::time::Duration;

use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping;

/// The two, with their server and all that is around them.
pub(crate) struct Pair {
    pub(crate) net: Net,
    pub(crate) server: Server,
    pub(crate) alice: Node,
    pub(crate) bob: Node,
}

impl Pair {
    /// Both behind NATs of one kind, once they talk and `kind` is the path of both; for a path that takes
    /// longer than `limit` the test has failed.
    pub(crate) fn settled(nat: Nat, kind: &str, limit: Duration) -> Self {
        let net = Net::new();
        let server = Server::start(&net, &net.machine("server", Nat::None));
        let [mut alice, mut bob] =
            ["alice", "bob"].map(|name| Node::start(&net, &net.machine(name, nat), &server));
        ping::assert_answers(&bob.host, &alice.ipv4());
        alice.wait_path("bob", kind, limit);
        bob.wait_path("alice", kind, limit);
        Self { net, server, alice, bob }
    }
}
