//! A real server on loopback, and nodes that only speak the control protocol.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use overlay::daemon::server::{Options, RunningServer, StartError, start};
use overlay::io::link::{Inbound, Link, connect};
use overlay::io::local::{LocalClient, Reply};
use overlay::server::admin::{Answer, Request};
use overlay::types::{NodeId, SecretKey, TxId};
use overlay::wire::control::{
    ClientMessage, Hello, InviteUse, NetmapUpdate, RefusedCode, ServerMessage, Welcome, decode,
    encode,
};
use overlay::wire::join::JoinLine;
use overlay::wire::relay::{Control, RelayKey, data_header, parse_data, verify};

#[path = "control/attacks.rs"]
mod attacks;
#[path = "control/early.rs"]
mod early;

fn options(dir: &Path) -> Options {
    Options {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        public_addr: Vec::new(),
        state_dir: dir.join("state"),
        socket: dir.join("run/server.sock"),
        network: Some("10.77.0.0/20".parse().unwrap()),
        network_ipv6: None,
        metrics: Some("127.0.0.1:0".parse().unwrap()),
        whole_netmap_up_to: overlay::server::WHOLE_NETMAP_UP_TO,
        relay_limits: overlay::server::relay::limit::Limits::default(),
    }
}

fn join_line(server: &RunningServer) -> JoinLine {
    server.first_join_line().expect("nobody has joined yet").expose().parse().unwrap()
}

/// A node as far as the server can see.
struct Node {
    link: Link,
    key: u8,
}

impl Node {
    async fn connect(line: &JoinLine, address: SocketAddr, key: u8) -> Self {
        let machine_key = SecretKey::from_bytes([key; 32]);
        let link = connect(&address.into(), &[line.server_key], &machine_key).await.unwrap();
        Self { link, key }
    }

    fn hello(&self, line: Option<&JoinLine>) {
        let hello = self.hello_message(line);
        self.say(&ClientMessage { hello: Some(hello), ..Default::default() });
    }

    fn hello_message(&self, line: Option<&JoinLine>) -> Hello {
        let invite = line.map(|line| InviteUse {
            id: line.invite.0,
            secret: line.secret.clone(),
            network: line.network.0,
        });
        Hello {
            min_version: 1,
            max_version: 1,
            software: "test".into(),
            node_key: [self.key + 100; 32],
            name: Some(format!("node{}", self.key)),
            invite,
            candidates: Vec::new(),
            instance: None,
            known: None,
        }
    }

    fn say(&self, message: &ClientMessage) {
        self.link.sender.try_send_control(encode(message)).unwrap();
    }

    async fn hear(&mut self) -> ServerMessage {
        let next = tokio::time::timeout(Duration::from_secs(10), self.link.receiver.next());
        match next.await.expect("the server answers").unwrap() {
            Inbound::Control(bytes) => decode(&bytes).unwrap(),
            Inbound::Relay(_) => panic!("a relay datagram where a message was expected"),
        }
    }

    async fn relayed(&mut self) -> Vec<u8> {
        loop {
            if let Inbound::Relay(datagram) = self.link.receiver.next().await.unwrap() {
                return datagram;
            }
        }
    }

    async fn welcome(&mut self) -> Welcome {
        self.hear().await.welcome.expect("a welcome comes first")
    }

    async fn netmap(&mut self) -> NetmapUpdate {
        loop {
            if let Some(netmap) = self.hear().await.netmap {
                return netmap;
            }
        }
    }
}

async fn ask(dir: &Path, request: Request) -> Answer {
    let mut client = LocalClient::connect(&options(dir).socket).await.unwrap();
    client.ask(&request).await.unwrap();
    match client.next().await.unwrap() {
        Some(Reply::Ok(answer)) => answer,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_once_and_is_known_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let line = join_line(&server);
    let address = server.listening()[0];
    assert_eq!(line.addresses, vec![address.into()]);

    let mut first = Node::connect(&line, address, 1).await;
    first.hello(Some(&line));
    let welcome = first.welcome().await;
    assert_eq!(welcome.name, "node1");
    assert_eq!(welcome.ipv4.to_string(), "10.77.0.1");
    assert_eq!(welcome.relay_port, Some(address.port()));
    assert_eq!(welcome.observed, Some(first.link.local));
    let netmap = first.netmap().await;
    assert!(netmap.from.is_none() && netmap.peers.is_empty());

    let mut second = Node::connect(&line, address, 2).await;
    second.hello(Some(&line));
    let refused = second.hear().await.refused.expect("the invite is used");
    assert_eq!(RefusedCode::from_code(refused.code), RefusedCode::InviteUsedUp);
    assert!(second.link.receiver.next().await.is_err(), "and the connection closed");

    server.stop().await;
    while first.link.receiver.next().await.is_ok() {}

    let server = start(options(dir.path())).await.unwrap();
    assert!(server.first_join_line().is_none(), "somebody has joined");
    let mut again = Node::connect(&line, server.listening()[0], 1).await;
    again.hello(None);
    let same = again.welcome().await;
    assert_eq!((same.id, same.ipv4, same.ipv6), (welcome.id, welcome.ipv4, welcome.ipv6));
    assert_ne!(same.relay_key, welcome.relay_key);

    let Answer::Nodes(nodes) = ask(dir.path(), Request::Nodes).await else {
        panic!("nodes are answered with nodes");
    };
    assert!(nodes.nodes.len() == 1 && nodes.nodes[0].online);
    ask(dir.path(), Request::Remove { node: "node1".into() }).await;
    loop {
        let message = again.hear().await;
        if let Some(refused) = message.refused {
            assert_eq!(RefusedCode::from_code(refused.code), RefusedCode::NotMember);
            break;
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_nodes_with_one_invite_in_the_same_instant_exactly_one_gets_in() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let line = join_line(&server);
    let address = server.listening()[0];
    let mut nodes = Vec::new();
    for key in 1..=8 {
        nodes.push(Node::connect(&line, address, key).await);
    }
    for node in &nodes {
        node.hello(Some(&line));
    }
    let mut welcomed = 0;
    for node in &mut nodes {
        let message = node.hear().await;
        welcomed += u32::from(message.welcome.is_some());
        assert!(message.welcome.is_some() != message.refused.is_some());
    }
    assert_eq!(welcomed, 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relay_datagrams_go_from_udp_to_link_and_back_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let mut line = join_line(&server);
    let address = server.listening()[0];
    let invite = Request::Invite { uses: 2, ttl_s: 60, name: None, tags: Vec::new() };
    let Answer::Invited(invited) = ask(dir.path(), invite).await else {
        panic!("an invite is answered with an invite");
    };
    assert!(invited.warning.is_some_and(|it| it.contains("loopback")), "it listens there alone");
    line = invited.join.expose().parse().unwrap_or(line);
    let mut by_udp = Node::connect(&line, address, 1).await;
    by_udp.hello(Some(&line));
    let welcome = by_udp.welcome().await;
    let mut by_link = Node::connect(&line, address, 2).await;
    by_link.hello(Some(&line));
    let other = by_link.welcome().await;
    by_link.netmap().await;
    let whole = by_udp.netmap().await;
    assert!(whole.from.is_none(), "the whole netmap first");
    let mut peers = whole.peers;
    while peers.is_empty() {
        let delta = by_udp.netmap().await;
        assert!(delta.from.is_some(), "then what has changed");
        peers = delta.peers;
    }
    assert_eq!(peers.first().map(|peer| peer.id), Some(other.id));

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let relay = SocketAddr::new(address.ip(), welcome.relay_port.unwrap());
    let second = SocketAddr::new(address.ip(), welcome.second_port.unwrap());
    let mut buffer = [0; 2000];

    // Before it has signed on, it is nobody.
    let target = NodeId::new(other.id).unwrap();
    let mut datagram = data_header(target).to_vec();
    datagram.extend_from_slice(b"sealed");
    socket.send_to(&datagram, relay).unwrap();

    let tx = TxId([9; 12]);
    for (from_other_port, to, from) in
        [(false, relay, relay), (true, relay, second), (true, second, relay)]
    {
        socket.send_to(&Control::Reflect { tx, from_other_port }.encode(None), to).unwrap();
        let (len, source) = socket.recv_from(&mut buffer).unwrap();
        let observed = socket.local_addr().unwrap();
        let answer = Control::parse(&buffer[..len]).unwrap();
        assert!(matches!(answer, Control::Reflected { tx: of, observed: at, token: Some(_) }
            if (of, at) == (tx, observed)));
        assert_eq!(source, from);
    }

    let key = RelayKey(welcome.relay_key);
    let node = NodeId::new(welcome.id).unwrap();
    socket
        .send_to(&Control::Bind { node, counter: 1, proof: None }.encode(Some(&key)), relay)
        .unwrap();
    let (len, source) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(source, relay);
    verify(&buffer[..len], &key).unwrap();

    socket.send_to(&datagram, relay).unwrap();
    let received = by_link.relayed().await;
    assert_eq!(parse_data(&received), Ok((node, b"sealed".as_slice())));

    let mut back = data_header(node).to_vec();
    back.extend_from_slice(b"answer");
    by_link.link.sender.try_send_relay(&back).unwrap();
    let (len, _) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(parse_data(&buffer[..len]), Ok((target, b"answer".as_slice())));

    for garbage in [&b""[..], b"x", &[0xb2, 1], &[0xb3; 50], &data_header(NodeId::new(99).unwrap())]
    {
        socket.send_to(garbage, relay).unwrap();
    }
    socket.send_to(&datagram, relay).unwrap();
    by_link.relayed().await;
    let drops = server.drops().snapshot();
    let bad = drops.iter().find(|(reason, _)| *reason == "bad-relay-frame").unwrap();
    assert_eq!(bad.1, 2, "the one before the sign-on, the one to a stranger: {drops:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_lost_or_busy_state_is_an_error_and_never_a_new_network() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let server = start(options.clone()).await.unwrap();
    let busy = Options { socket: dir.path().join("other.sock"), ..options.clone() };
    let error = start(busy).await.unwrap_err();
    assert!(error.to_string().contains("another process uses"), "{error}");
    server.stop().await;

    let (key, store) = (options.state_dir.join("server.key"), options.state_dir.join("server.db"));
    let saved = std::fs::read(&store).unwrap();
    std::fs::remove_file(&store).unwrap();
    assert!(matches!(start(options.clone()).await, Err(StartError::StoreLost { .. })));
    std::fs::write(&store, saved).unwrap();
    std::fs::remove_file(&key).unwrap();
    assert!(matches!(start(options).await, Err(StartError::KeyLost { .. })));
}
