//! The hello in the first message of a connection: it saves a round trip, and a recording of it is
//! worth nothing.

use overlay::io::link::connect_early;
use overlay::wire::frame::Early;
use overlay::wire::relay::Token;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::*;

/// What the server says behind its handshake when it acts on a hello: a welcome and a netmap.
const AN_ANSWER: usize = 200;
/// More than it takes to answer on a loaded machine.
const SILENCE: Duration = Duration::from_secs(2);

async fn open_line(dir: &Path) -> JoinLine {
    let invite = Request::Invite { uses: 100, ttl_s: 600, name: None, tags: Vec::new() };
    let Answer::Invited(invited) = ask(dir, invite).await else {
        panic!("an invite is answered with an invite");
    };
    invited.join.expose().parse().unwrap()
}

/// What the reflector gives who asks it from this machine.
fn token(server: SocketAddr) -> Token {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let tx = TxId([8; 12]);
    let question = Control::Reflect { tx, from_other_port: false }.encode(None);
    socket.send_to(&question, server).unwrap();
    let mut answer = [0; 100];
    let (length, _) = socket.recv_from(&mut answer).unwrap();
    assert_eq!(length, question.len(), "no longer than the question");
    match Control::parse(&answer[..length]) {
        Ok(Control::Reflected { token: Some(token), .. }) => token,
        other => panic!("no token: {other:?}"),
    }
}

fn hello(line: Option<&JoinLine>, key: u8) -> Vec<u8> {
    let invite = line.map(|line| InviteUse {
        id: line.invite.0,
        secret: line.secret.clone(),
        network: line.network.0,
    });
    let hello = Hello {
        min_version: 1,
        max_version: 1,
        software: "test".into(),
        node_key: [key + 100; 32],
        name: Some(format!("node{key}")),
        invite,
        candidates: Vec::new(),
        instance: Some(u64::from(key)),
        known: None,
    };
    encode(&ClientMessage { hello: Some(hello), ..Default::default() })
}

async fn connect_with(line: &JoinLine, to: SocketAddr, key: u8, early: &[u8]) -> Link {
    let machine = SecretKey::from_bytes([key; 32]);
    let stream = TcpStream::connect(to).await.unwrap();
    connect_early(stream, &to.into(), &line.server_key, &machine, early).await.unwrap()
}

/// The request that a node with this key sends to `server`, as somebody on the way records it.
async fn recording(line: &JoinLine, server: SocketAddr, key: u8) -> Vec<u8> {
    let hello = hello(Some(line), key);
    let early = Early { token: token(server), hello: &hello }.encode().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let machine = SecretKey::from_bytes([key; 32]);
    let node = async {
        let stream = TcpStream::connect(at).await.unwrap();
        let lost = connect_early(stream, &at.into(), &line.server_key, &machine, &early).await;
        assert!(lost.is_err(), "nobody has answered");
    };
    let record = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_buf(&mut request).await.unwrap();
        }
        request
    };
    tokio::join!(node, record).1
}

/// Says what was recorded, from this address of the machine; whether the server acts on it.
async fn is_acted_on(request: &[u8], server: SocketAddr, from: &str) -> bool {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from.parse().unwrap(), 0)).unwrap();
    let mut stream = socket.connect(server).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let read = async {
        while matches!(stream.read_buf(&mut answer).await, Ok(1..)) {
            let head = answer.windows(4).position(|it| it == b"\r\n\r\n");
            if head.is_some_and(|at| answer.len() > at + AN_ANSWER) {
                break;
            }
        }
    };
    // Silence is the answer to what is not acted on.
    let _ = tokio::time::timeout(SILENCE, read).await;
    assert!(answer.starts_with(b"HTTP/1.1 101"), "every recording opens");
    let head = answer.windows(4).position(|it| it == b"\r\n\r\n").unwrap();
    answer.len() > head + AN_ANSWER
}

async fn nodes(dir: &Path) -> usize {
    let Answer::Nodes(nodes) = ask(dir, Request::Nodes).await else { panic!("nodes") };
    nodes.nodes.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_hello_is_welcome_with_the_handshake_and_needs_a_frame_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let said = hello(Some(&line), 1);
    let early = Early { token: token(address), hello: &said }.encode().unwrap();
    let mut link = connect_with(&line, address, 1, &early).await;
    assert_eq!(link.said.as_ref(), Some(&said), "the server says that it counts");
    let Inbound::Control(bytes) = link.receiver.next().await.unwrap() else { panic!("control") };
    assert!(decode::<ServerMessage>(&bytes).unwrap().welcome.is_some());
    let confirmation = encode(&ClientMessage::default());
    link.sender.try_send_control(confirmation).unwrap();
    // Who says nothing more may not hold the session's keys.
    let said = hello(Some(&line), 2);
    let early = Early { token: token(address), hello: &said }.encode().unwrap();
    let mut silent = connect_with(&line, address, 2, &early).await;
    assert!(silent.said.is_some());
    let ended = async { while silent.receiver.next().await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(12), ended).await.expect("it is given up");
    let ping = ClientMessage { ping: Some(3), ..Default::default() };
    link.sender.try_send_control(encode(&ping)).unwrap();
    let answered = async {
        while let Ok(Inbound::Control(bytes)) = link.receiver.next().await {
            if decode::<ServerMessage>(&bytes).unwrap().pong == Some(3) {
                return true;
            }
        }
        false
    };
    assert!(tokio::time::timeout(Duration::from_secs(5), answered).await.unwrap());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_token_or_with_a_bad_one_a_hello_takes_the_long_way() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let said = hello(Some(&line), 1);
    let mut forged = token(address);
    forged.0[15] ^= 1;
    let forged = Early { token: forged, hello: &said }.encode().unwrap();
    let unknown = Early { token: Token([7; 16]), hello: &said }.encode().unwrap();
    for early in [forged, unknown, vec![1, 2, 3], Vec::new()] {
        let mut link = connect_with(&line, address, 1, &early).await;
        assert_eq!(link.said, None);
        assert_eq!(nodes(dir.path()).await, 0, "nothing has happened");
        if early.is_empty() {
            link.sender.try_send_control(said.clone()).unwrap();
            let Inbound::Control(bytes) = link.receiver.next().await.unwrap() else { panic!() };
            assert!(decode::<ServerMessage>(&bytes).unwrap().welcome.is_some());
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_early_hello_counts_once_and_not_from_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let request = recording(&line, address, 1).await;
    assert!(!is_acted_on(&request, address, "127.0.0.2").await, "from another address");
    assert_eq!(nodes(dir.path()).await, 0, "no place is taken, no invite used");
    let at_once = [(); 4].map(|()| is_acted_on(&request, address, "127.0.0.1"));
    let [a, b, c, d] = at_once;
    let (a, b, c, d) = tokio::join!(a, b, c, d);
    let acted = [a, b, c, d].into_iter().filter(|it| *it).count();
    assert_eq!((acted, nodes(dir.path()).await), (1, 1), "of four at once, one");

    // A message that was held back while its sender came in without it.
    let held = recording(&line, address, 2).await;
    let mut node = Node::connect(&line, address, 2).await;
    node.hello(Some(&line));
    node.welcome().await;
    for request in [&held, &request] {
        assert!(!is_acted_on(request, address, "127.0.0.1").await);
    }
    node.say(&ClientMessage { ping: Some(5), ..Default::default() });
    while node.hear().await.pong != Some(5) {}
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_early_hello_is_nothing_to_a_server_that_was_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let request = recording(&line, address, 1).await;
    server.stop().await;
    let server = start(options(dir.path())).await.unwrap();
    let address = server.listening()[0];
    assert!(!is_acted_on(&request, address, "127.0.0.1").await);
    assert_eq!(nodes(dir.path()).await, 0);
    let fresh = recording(&line, address, 1).await;
    assert!(is_acted_on(&fresh, address, "127.0.0.1").await, "a new one is");
    server.stop().await;
}
