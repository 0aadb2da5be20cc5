//! What a hostile client can do with the control protocol and the relay, at a real server.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// A join line that works for many nodes.
async fn open_line(dir: &Path) -> JoinLine {
    let invite = Request::Invite { uses: 100, ttl_s: 600, name: None, tags: Vec::new() };
    let Answer::Invited(invited) = ask(dir, invite).await else {
        panic!("an invite is answered with an invite");
    };
    invited.join.expose().parse().unwrap()
}

async fn joined(line: &JoinLine, address: SocketAddr, key: u8) -> (Node, Welcome) {
    let mut node = Node::connect(line, address, key).await;
    node.hello(Some(line));
    let welcome = node.welcome().await;
    (node, welcome)
}

/// What a proxy in the middle does to the bytes from the node to the server: flip one bit, leave one
/// out, put one in, or say all of it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Flip(usize),
    Cut(usize),
    Insert(usize),
    Repeat,
}

/// More than the server waits for the rest of a frame.
const LIMIT: Duration = Duration::from_secs(12);

/// A proxy before `server` for one connection that does no harm to the HTTP request and then this.
async fn harmful_proxy(server: SocketAddr, harm: Harm) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (node, _) = listener.accept().await.unwrap();
        let (mut from_node, mut to_node) = node.into_split();
        let (mut from_server, mut to_server) =
            TcpStream::connect(server).await.unwrap().into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_node).await });
        let (mut buffer, mut first) = (vec![0; 4096], true);
        while let Ok(length @ 1..) = from_node.read(&mut buffer).await {
            let mut bytes = buffer[..length].to_vec();
            if !std::mem::take(&mut first) {
                match harm {
                    Harm::Flip(bit) => bytes[bit / 8 % length] ^= 1 << (bit % 8),
                    Harm::Cut(at) => drop(bytes.remove(at % length)),
                    Harm::Insert(at) => bytes.insert(at % length, 0x5a),
                    Harm::Repeat => bytes.extend_from_within(..),
                }
            }
            if to_server.write_all(&bytes).await.is_err() {
                break;
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_stream_that_is_tampered_with_ends_and_nothing_of_it_counts() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let flips = (0..48).map(|n| Harm::Flip(n * 61));
    let cuts = (0..8).map(|n| Harm::Cut(n * 23));
    let inserts = (0..8).map(|n| Harm::Insert(n * 23));
    // Side by side: a longer length makes the server wait for the rest until its limit.
    let mut all = tokio::task::JoinSet::new();
    for (harm, key) in flips.chain(cuts).chain(inserts).zip(1..) {
        let line = line.clone();
        all.spawn(async move {
            let proxy = harmful_proxy(address, harm).await;
            let mut node = Node::connect(&line, proxy, key).await;
            node.hello(Some(&line));
            let answer = tokio::time::timeout(LIMIT, node.link.receiver.next()).await;
            assert!(answer.expect("the server hangs up").is_err(), "{harm:?}");
        });
    }
    while let Some(tampered) = all.join_next().await {
        tampered.unwrap();
    }
    let Answer::Nodes(nodes) = ask(dir.path(), Request::Nodes).await else { panic!("nodes") };
    assert!(nodes.nodes.is_empty(), "none of these hellos was taken");
    // A frame that is said twice: the first may be heard, the second ends the connection.
    let proxy = harmful_proxy(address, Harm::Repeat).await;
    let mut node = Node::connect(&line, proxy, 1).await;
    node.hello(Some(&line));
    let ended = async { while node.link.receiver.next().await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("a repeated frame is an end");
    server.stop().await;
}

/// The first message of a handshake with another prologue, as one who strips versions would make it.
fn first_message(line: &JoinLine, prologue: &[u8]) -> String {
    let mut state = snow::Builder::new("Noise_IK_25519_ChaChaPoly_BLAKE2s".parse().unwrap())
        .local_private_key(&[9; 32])
        .and_then(|builder| builder.prologue(prologue))
        .and_then(|builder| builder.remote_public_key(&line.server_key.0))
        .and_then(snow::Builder::build_initiator)
        .unwrap();
    let mut message = [0; 96];
    let length = state.write_message(&[], &mut message).unwrap();
    data_encoding::BASE64URL_NOPAD.encode(&message[..length])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_version_in_the_prologue_is_another_handshake() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let right = "overlay control 1";
    let wrong = ["", "overlay control 0", "overlay control 2", "overlay control 1 "];
    for prologue in wrong.into_iter().chain([right]) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let first = first_message(&line, prologue.as_bytes());
        let request = format!(
            "GET /overlay HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: overlay-control\r\n\
             overlay-handshake: {first}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        let wanted = if prologue == right { "HTTP/1.1 101" } else { "HTTP/1.1 421" };
        assert_eq!(std::str::from_utf8(&answer), Ok(wanted), "{prologue:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_guesses_invites_hears_one_answer_and_leaves_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let mut said = Vec::new();
    for guess in 0..40u8 {
        let mut node = Node::connect(&line, address, guess % 100 + 1).await;
        let mut wrong = line.clone();
        // Half of them know an invite that exists, half do not.
        if guess % 2 == 0 {
            wrong.invite.0 = [guess; 4];
        }
        wrong.secret.0 = [guess; 20];
        node.hello(Some(&wrong));
        let refused = node.hear().await.refused.expect("a wrong secret is refused");
        said.push((refused.code, refused.message));
        assert!(node.link.receiver.next().await.is_err(), "and the connection closed");
    }
    assert!(said.iter().all(|answer| *answer == said[0]), "one answer for all: {said:?}");
    // Even the right one is not looked at for the rest of the minute, from there.
    let mut late = Node::connect(&line, address, 99).await;
    late.hello(Some(&line));
    let refused = late.hear().await.refused.expect("too many were wrong");
    assert_eq!(RefusedCode::from_code(refused.code), RefusedCode::NotAccepted);
    let store = lines_of_guesses(dir.path());
    assert!(store <= 2, "{store} lines in the log of events, a minute may have begun");
    server.stop().await;
}

/// How often the log of events names the guesses: read off the store's bytes, as nobody else does.
fn lines_of_guesses(dir: &Path) -> usize {
    let needle = b"invite-not-accepted";
    ["server.db", "server.db-wal"]
        .iter()
        .filter_map(|name| std::fs::read(dir.join("state").join(name)).ok())
        .map(|bytes| bytes.windows(needle.len()).filter(|window| window == needle).count())
        .max()
        .unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_cannot_be_another_whatever_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let (mut victim, welcome) = joined(&line, address, 1).await;
    // The node key of the victim under another machine key: what its netmap would go to.
    let mut thief = Node::connect(&line, address, 2).await;
    let mut hello = thief.hello_message(Some(&line));
    hello.node_key = [101; 32];
    thief.say(&ClientMessage { hello: Some(hello), ..Default::default() });
    let refused = thief.hear().await.refused.expect("somebody else's key");
    assert_eq!(RefusedCode::from_code(refused.code), RefusedCode::BadRequest);
    // A connection that has not said hello gets nothing, whatever else it asks for.
    let mut mute = Node::connect(&line, address, 3).await;
    mute.say(&ClientMessage { ping: Some(7), ..Default::default() });
    let answer = mute.hear().await;
    assert!(answer.pong.is_none() && answer.netmap.is_none() && answer.refused.is_some());
    // And the victim never noticed.
    victim.say(&ClientMessage { ping: Some(5), ..Default::default() });
    while victim.hear().await.pong != Some(5) {}
    assert!(welcome.id > 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_large_or_lies_about_itself_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let mut bombs: Vec<Vec<u8>> = vec![
        // An array, a text and a map of 2^32 - 1 or 2^64 - 1 parts, and arrays in arrays.
        vec![0xa1, 0x01, 0x9a, 0xff, 0xff, 0xff, 0xff],
        vec![0xa1, 0x00, 0x7b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        vec![0xbb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        [vec![0xa1, 0x01], vec![0x81; 60_000]].concat(),
        vec![0xff; 60_000],
    ];
    bombs.push(vec![0; 3 << 20]);
    for bomb in bombs {
        let mut node = Node::connect(&line, address, 1).await;
        let length = bomb.len();
        let _ = node.link.sender.try_send_control(bomb);
        let next = tokio::time::timeout(Duration::from_secs(10), node.link.receiver.next()).await;
        let refused = match next.expect("the server answers or hangs up") {
            Ok(Inbound::Control(bytes)) => {
                decode::<ServerMessage>(&bytes).unwrap().refused.is_some()
            }
            Ok(Inbound::Relay(_)) => false,
            Err(_) => true,
        };
        assert!(refused, "a message of {length} bytes");
    }
    // Ten thousand endpoints and a name without end: the record keeps what it may.
    let mut greedy = Node::connect(&line, address, 4).await;
    let mut hello = greedy.hello_message(Some(&line));
    hello.name = Some("x".repeat(10_000));
    greedy.say(&ClientMessage { hello: Some(hello), ..Default::default() });
    let welcome = greedy.welcome().await;
    assert!(welcome.name.len() <= 63, "{} letters of a name", welcome.name.len());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relay_frames_to_oneself_to_nobody_and_of_nobody_go_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let (mut sender, welcome) = joined(&line, address, 1).await;
    let (other, other_welcome) = joined(&line, address, 2).await;
    let removed = joined(&line, address, 3).await.1;
    ask(dir.path(), Request::Remove { node: "node3".into() }).await;
    let own = NodeId::new(welcome.id).unwrap();
    let gone = NodeId::new(removed.id).unwrap();
    let stranger = NodeId::new(0x00ff_ffff).unwrap();
    let mut sent = 0u64;
    for target in [own, gone, stranger] {
        for _ in 0..50 {
            let mut frame = data_header(target).to_vec();
            frame.extend_from_slice(b"to nobody");
            sender.link.sender.try_send_relay(&frame).unwrap();
            sent += 1;
            tokio::task::yield_now().await;
        }
    }
    let _ = other;
    // What arrives last says that all before it has been looked at.
    sender.say(&ClientMessage { ping: Some(1), ..Default::default() });
    while sender.hear().await.pong != Some(1) {}
    let drops = server.drops().snapshot();
    let counted: u64 = drops.iter().map(|(_, count)| count).sum();
    assert!(counted > 0 && counted <= sent, "dropped and counted, all for one reason: {drops:?}");
    assert!(drops.iter().all(|(reason, _)| *reason == "bad-relay-frame"), "{drops:?}");
    assert!(other_welcome.id != welcome.id);
    server.stop().await;
}

/// All ways in which a secret could stand in a capture.
fn forms(secret: &[u8]) -> [Vec<u8>; 5] {
    use data_encoding::{BASE64, BASE64URL_NOPAD, HEXLOWER, HEXUPPER};
    [
        secret.to_vec(),
        HEXLOWER.encode(secret).into_bytes(),
        HEXUPPER.encode(secret).into_bytes(),
        BASE64.encode(secret).trim_end_matches('=').into(),
        BASE64URL_NOPAD.encode(secret).into_bytes(),
    ]
}

fn assert_not_in(capture: &[u8], secrets: &[(&str, &[u8])]) {
    for (name, secret) in secrets {
        for form in forms(secret) {
            let found = capture.windows(form.len()).any(|window| window == form);
            assert!(!found, "the {name} is in {} bytes of capture", capture.len());
        }
    }
}

/// A proxy before `server` that keeps all that passes, both ways: one who terminates an outer TLS with
/// a certificate of its own sees this.
async fn curious_proxy(server: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
    let kept = Arc::clone(&seen);
    tokio::spawn(async move {
        let (node, _) = listener.accept().await.unwrap();
        let (from_node, to_node) = node.into_split();
        let (from_server, to_server) = TcpStream::connect(server).await.unwrap().into_split();
        let pass = |mut from: OwnedReadHalf, mut to: OwnedWriteHalf| {
            let kept = Arc::clone(&kept);
            async move {
                let mut buffer = vec![0; 65_536];
                while let Ok(length @ 1..) = from.read(&mut buffer).await {
                    kept.lock().unwrap().extend_from_slice(&buffer[..length]);
                    if to.write_all(&buffer[..length]).await.is_err() {
                        break;
                    }
                }
            }
        };
        tokio::join!(pass(from_node, to_server), pass(from_server, to_node));
    });
    (address, seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_all_between_node_and_server_learns_no_secret_and_no_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let (line, address) = (open_line(dir.path()).await, server.listening()[0]);
    let (_other, _) = joined(&line, address, 2).await;
    let (proxy, seen) = curious_proxy(address).await;
    let (mut node, welcome) = joined(&line, proxy, 1).await;
    let netmap = node.netmap().await;
    assert_eq!(netmap.peers.len(), 1, "it works, and there was something to be seen");
    node.say(&ClientMessage { ping: Some(7), ..Default::default() });
    while node.hear().await.pong != Some(7) {}
    let machine_key = SecretKey::from_bytes([1; 32]);
    let capture = seen.lock().unwrap().clone();
    assert_not_in(
        &capture,
        &[
            ("secret of the invite", &line.secret.0),
            ("machine key", &machine_key.expose()[..]),
            ("public machine key", &machine_key.public().0),
            ("node key", &[101; 32]),
            ("node key of a peer", &netmap.peers[0].node_key),
            ("relay key", &welcome.relay_key),
            ("name", b"node1"),
            ("name of a peer", b"node2"),
        ],
    );
    assert!(capture.windows(17).any(|it| it == b"overlay-handshake"), "no blind witness");
    server.stop().await;
}

/// Answers one upgrade as somebody would who has another key, in the way of its own that `number`
/// chooses, and returns all that the node said.
async fn impostor(listener: TcpListener, number: usize) -> Vec<u8> {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    while !said.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut buffer).await.unwrap();
        assert!(length > 0, "the node asks first");
        said.extend_from_slice(&buffer[..length]);
    }
    let encode = |bytes: &[u8]| data_encoding::BASE64URL_NOPAD.encode(bytes);
    // As a responder with a key of its own would answer, if it could open the first message.
    let ephemeral = SecretKey::from_bytes([9; 32]).public().0;
    let answer = [&ephemeral[..], &[0; 16]].concat();
    let upgraded = |handshake: &str| {
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\
             Upgrade: overlay-control\r\noverlay-handshake: {handshake}\r\n\r\n"
        )
    };
    let answer = match number {
        0 => upgraded(&encode(&answer)),
        1 => upgraded(&encode(&[0; 48])),
        2 => upgraded(""),
        3 => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_owned(),
        _ => format!(
            "HTTP/1.1 421 Misdirected Request\r\noverlay-handshake: {}\r\n\
             Content-Length: 0\r\n\r\n",
            encode(&answer)
        ),
    };
    stream.write_all(answer.as_bytes()).await.unwrap();
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        said.extend_from_slice(&buffer[..length]);
    }
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_another_key_than_the_join_line_names_hears_no_byte_of_the_invite() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(options(dir.path())).await.unwrap();
    let line = open_line(dir.path()).await;
    let machine_key = SecretKey::from_bytes([1; 32]);
    for number in 0..5 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heard = tokio::spawn(impostor(listener, number));
        let link = connect(&address.into(), &[line.server_key], &machine_key).await;
        assert!(link.is_err(), "answer {number} was believed");
        let said = tokio::time::timeout(LIMIT, heard).await.expect("the node hangs up").unwrap();
        assert_not_in(
            &said,
            &[
                ("secret of the invite", &line.secret.0),
                ("number of the invite", &line.invite.0),
                ("public machine key", &machine_key.public().0),
            ],
        );
        // The request and the first message, which opens with the pinned key only; nothing after.
        let text = String::from_utf8(said).expect("HTTP and nothing else");
        assert!(text.ends_with("\r\n\r\n") && text.matches("\r\n\r\n").count() == 1, "{text}");
    }
    server.stop().await;
}
