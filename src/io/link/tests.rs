//! Links over loopback: a true server side, and things that are no server.

use std::future::Future;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::io::listen::{self, UpgradeError};
use crate::io::said::Said;
use crate::types::{DropReason, SecretKey};
use crate::wire::frame::{Early, MAX_MESSAGE};
use crate::wire::join::ServerAddr;
use crate::wire::relay::Token;

fn server_key() -> SecretKey {
    SecretKey::from_bytes([1; 32])
}

fn machine_key() -> SecretKey {
    SecretKey::from_bytes([2; 32])
}

async fn listener() -> (TcpListener, ServerAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().into();
    (listener, addr)
}

/// The server's side of an upgrade, where no early hello counts.
async fn accept(stream: TcpStream, key: &SecretKey) -> Result<Link, UpgradeError> {
    listen::upgrade(stream, key, &Said::default(), |_, _| false).await.map(|(link, _)| link)
}

/// The two ends of a link.
async fn pair() -> (Link, Link) {
    let (listener, addr) = listener().await;
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        accept(stream, &server_key()).await
    };
    let keys = [server_key().public()];
    let machine = machine_key();
    let (server, client) = tokio::join!(serve, connect(&addr, &keys, &machine));
    (client.unwrap(), server.unwrap())
}

/// What `connect` says when `behave` is done with the one connection that comes.
async fn connect_to<F: Future<Output = ()>>(behave: impl FnOnce(TcpStream) -> F) -> ConnectError {
    let (listener, addr) = listener().await;
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        behave(stream).await;
        std::future::pending::<()>().await;
    };
    let keys = [server_key().public()];
    let machine = machine_key();
    let result = tokio::select! {
        result = connect(&addr, &keys, &machine) => result,
        () = serve => unreachable!("it waits for ever"),
    };
    result.expect_err("no link comes of this")
}

#[tokio::test]
async fn both_ends_know_each_other_and_messages_of_any_size_arrive_in_order() {
    let (mut client, mut server) = pair().await;
    assert_eq!(client.peer_key, server_key().public());
    assert_eq!(server.peer_key, machine_key().public());
    assert_eq!((client.local, client.remote), (server.remote, server.local));
    for len in [0, 1, 70_000, 1_000_000] {
        client.sender.try_send_control(vec![7; len]).unwrap();
        assert_eq!(server.receiver.next().await.unwrap(), Inbound::Control(vec![7; len]));
    }
    server.sender.try_send_relay(b"datagram").unwrap();
    assert_eq!(client.receiver.next().await.unwrap(), Inbound::Relay(b"datagram".to_vec()));
}

#[tokio::test]
async fn control_goes_before_relay_and_the_oldest_datagram_makes_room() {
    let (client, mut server) = pair().await;
    // Nothing is written before this task waits, so everything below meets in the queues.
    for number in 0..300u16 {
        let result = client.sender.try_send_relay(&number.to_be_bytes());
        let full = number >= 256;
        assert_eq!(result, if full { Err(DropReason::QueueFull) } else { Ok(()) }, "{number}");
    }
    client.sender.try_send_control(b"first".to_vec()).unwrap();
    assert_eq!(server.receiver.next().await.unwrap(), Inbound::Control(b"first".to_vec()));
    for number in 44..300u16 {
        let datagram = number.to_be_bytes().to_vec();
        assert_eq!(server.receiver.next().await.unwrap(), Inbound::Relay(datagram));
    }
}

#[tokio::test]
async fn a_train_arrives_as_its_datagrams_and_its_losses_are_counted() {
    let (client, mut server) = pair().await;
    let train: Vec<u8> = (0..200u8).flat_map(|number| [number; 10]).chain([200; 3]).collect();
    assert_eq!(client.sender.try_send_train(&train, 10), Ok(()));
    assert_eq!(client.sender.try_send_train(&[7; 600], 10), Err((DropReason::QueueFull, 5)));
    for number in 5..=200u8 {
        let datagram = vec![number; if number == 200 { 3 } else { 10 }];
        assert_eq!(server.receiver.next().await.unwrap(), Inbound::Relay(datagram));
    }
    for _ in 0..60 {
        assert_eq!(server.receiver.next().await.unwrap(), Inbound::Relay(vec![7; 10]));
    }
    let long = vec![0; 70_000];
    assert_eq!(client.sender.try_send_train(&long, 70_000), Err((DropReason::TooLarge, 1)));
    client.sender.close();
    assert_eq!(client.sender.try_send_train(&train, 10), Err((DropReason::NoPath, 201)));
}

#[tokio::test]
async fn what_has_come_together_is_taken_together_and_in_its_order() {
    let (client, mut server) = pair().await;
    let train: Vec<u8> = (0..200u8).flat_map(|number| [number; 1_000]).collect();
    let (mut taken, mut calls, mut most) = (Vec::new(), 0, 0);
    for round in 0..20u8 {
        assert_eq!(client.sender.try_send_train(&train, 1_000), Ok(()));
        let Inbound::Relay(first) = server.receiver.next().await.unwrap() else {
            panic!("round {round}: a datagram comes first")
        };
        client.sender.try_send_control(vec![round]).unwrap();
        let mut pending = first;
        loop {
            let mut batch = RelayBatch::default();
            batch.push(&pending);
            server.receiver.more_relayed(&mut batch);
            calls += 1;
            most = most.max(batch.iter().count());
            assert!(batch.len() <= RELAYED_BYTES + 1_000, "{}", batch.len());
            taken.extend(batch.iter().map(<[u8]>::to_vec));
            match server.receiver.next().await.unwrap() {
                Inbound::Relay(datagram) => pending = datagram,
                Inbound::Control(message) => {
                    assert_eq!(message, [round]);
                    break;
                }
            }
        }
        // The message overtakes what was not taken out of the queue yet.
        while taken.len() < usize::from(round + 1) * 200 {
            match server.receiver.next().await.unwrap() {
                Inbound::Relay(datagram) => taken.push(datagram),
                Inbound::Control(_) => panic!("one message a round"),
            }
        }
    }
    let expected: Vec<Vec<u8>> =
        (0..20).flat_map(|_| (0..200u8).map(|number| vec![number; 1_000])).collect();
    assert!(taken == expected, "every datagram, in order");
    assert!(most > 1, "{calls} calls, {most} datagrams at the most");
}

#[tokio::test]
async fn a_forged_frame_behind_relay_datagrams_ends_the_link_after_them() {
    let (client, mut server) = pair().await;
    client.sender.try_send_train(&[7; 30], 10).unwrap();
    let mut batch = RelayBatch::default();
    let Inbound::Relay(first) = server.receiver.next().await.unwrap() else { panic!("relay") };
    batch.push(&first);
    server.receiver.buffer.extend_from_slice(&[0, 17]);
    server.receiver.buffer.extend_from_slice(&[0; 17]);
    server.receiver.more_relayed(&mut batch);
    assert_eq!(batch.iter().collect::<Vec<_>>(), [[7; 10]; 3]);
    assert!(matches!(server.receiver.next().await, Err(LinkError::Forged)));
    assert!(matches!(server.receiver.next().await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn queues_are_bounded() {
    let (client, _server) = pair().await;
    let results: Vec<_> =
        (0..3).map(|_| client.sender.try_send_control(vec![0; MAX_MESSAGE])).collect();
    assert!(results[..2].iter().all(Result::is_ok));
    assert!(matches!(results[2], Err(LinkError::QueueFull)));
    assert_eq!(client.sender.try_send_relay(&[0; 65_536]), Err(DropReason::TooLarge));
}

#[tokio::test]
async fn a_cancelled_wait_loses_nothing() {
    let (client, mut server) = pair().await;
    let message = vec![9; 500_000];
    client.sender.try_send_control(message.clone()).unwrap();
    let mut received = None;
    while received.is_none() {
        tokio::select! {
            biased;
            result = server.receiver.next() => received = Some(result.unwrap()),
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(received, Some(Inbound::Control(message)));
}

#[tokio::test]
async fn the_last_message_arrives_before_the_end() {
    let (mut client, server) = pair().await;
    client.sender.try_send_control(b"never read".to_vec()).unwrap();
    server.sender.try_send_control(b"refused".to_vec()).unwrap();
    let (_, received) = tokio::join!(server.receiver.close(), async {
        let received = client.receiver.next().await.unwrap();
        assert!(matches!(client.receiver.next().await, Err(LinkError::Closed)));
        drop(client.receiver);
        received
    });
    assert_eq!(received, Inbound::Control(b"refused".to_vec()));
    assert!(client.sender.try_send_control(Vec::new()).is_err(), "the sender knows of the end");
}

#[tokio::test]
async fn who_has_closed_a_link_gets_nothing_more_of_it_and_what_was_said_still_goes_out() {
    let (mut client, mut server) = pair().await;
    for number in 0..800u16 {
        client.sender.try_send_control(number.to_be_bytes().to_vec()).unwrap();
    }
    assert_eq!(server.receiver.next().await.unwrap(), Inbound::Control(vec![0, 0]));
    server.sender.try_send_control(b"refused".to_vec()).unwrap();
    server.sender.close();
    assert!(!server.receiver.buffer.is_empty(), "there is more in the buffer");
    assert!(matches!(server.receiver.next().await, Err(LinkError::Closed)));
    let (_, heard) = tokio::join!(server.receiver.close(), async {
        let heard = client.receiver.next().await;
        drop(client.receiver);
        heard
    });
    assert_eq!(heard.unwrap(), Inbound::Control(b"refused".to_vec()));
}

#[tokio::test]
async fn the_last_word_of_the_other_side_is_heard_also_when_nothing_can_be_sent_any_more() {
    let (mut client, server) = pair().await;
    server.sender.try_send_control(b"refused".to_vec()).unwrap();
    // Both are here before the receiver looks: the message, and the failure of the sending half.
    client.receiver.stream.readable().await.unwrap();
    let writer = client.receiver.writer.as_mut().unwrap();
    writer.abort();
    let _ = writer.await;
    let failed = io::Error::from(io::ErrorKind::BrokenPipe);
    client.receiver.writer = Some(tokio::spawn(async { Err(LinkError::Io(failed)) }));
    client.receiver.outbox.close();
    tokio::task::yield_now().await;
    let heard = client.receiver.next().await.unwrap();
    assert_eq!(heard, Inbound::Control(b"refused".to_vec()));
    assert!(matches!(client.receiver.next().await, Err(LinkError::Io(_))));
    assert!(matches!(client.receiver.next().await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn a_forged_frame_ends_the_link() {
    let (mut client, _server) = pair().await;
    client.receiver.buffer.extend_from_slice(&[0, 17]);
    client.receiver.buffer.extend_from_slice(&[0; 17]);
    assert!(matches!(client.receiver.next().await, Err(LinkError::Forged)));
    assert!(matches!(client.receiver.next().await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn another_server_key_is_told_as_such_by_both_ends() {
    let (listener, addr) = listener().await;
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        accept(stream, &SecretKey::from_bytes([9; 32])).await
    };
    let keys = [server_key().public()];
    let machine = machine_key();
    let (server, client) = tokio::join!(serve, connect(&addr, &keys, &machine));
    assert!(matches!(client, Err(ConnectError::WrongKey { .. })));
    assert!(matches!(server, Err(UpgradeError::WrongKey)));
}

#[tokio::test]
async fn the_next_server_key_is_tried_after_the_first() {
    let (listener, addr) = listener().await;
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        assert!(accept(stream, &server_key()).await.is_err());
        let (stream, _) = listener.accept().await.unwrap();
        accept(stream, &server_key()).await.unwrap()
    };
    let keys = [SecretKey::from_bytes([9; 32]).public(), server_key().public()];
    let machine = machine_key();
    let (_server, client) = tokio::join!(serve, connect(&addr, &keys, &machine));
    assert_eq!(client.unwrap().peer_key, server_key().public());
}

/// What becomes of a hello in the first message when these `offers` are there before the server takes
/// the connection: the two ends, and what the server has read.
async fn early(
    offers: watch::Sender<Offers>,
    in_time: bool,
    counts: bool,
) -> (Link, Link, Option<Vec<u8>>) {
    let (listener, addr) = listener().await;
    let ip = addr.literal().unwrap().ip();
    let offered = offers.subscribe();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        if in_time {
            offers.send_modify(|it| it.put(ip, Token([5; 16]), b"hello".to_vec()));
        }
        let is_new = |key: PublicKey, payload: &[u8]| {
            let early = Early { token: Token([5; 16]), hello: b"hello" };
            assert_eq!(Early::parse(payload), in_time.then_some(early));
            assert_eq!(key, machine_key().public());
            counts
        };
        listen::upgrade(stream, &server_key(), &Said::default(), is_new).await.unwrap()
    };
    let (way, keys, machine) = (Way::default(), [server_key().public()], machine_key());
    let client = connect_by(&way, &addr, &keys, &machine, offered);
    let ((server, read), client) = tokio::join!(serve, client);
    (client.unwrap(), server, read)
}

#[tokio::test]
async fn a_hello_goes_with_the_first_message_when_its_token_is_there_in_time() {
    let ip = "127.0.0.1".parse().unwrap();
    for counts in [true, false] {
        let offers = watch::Sender::<Offers>::default();
        offers.send_modify(|it| it.expect([ip]));
        let (client, mut server, read) = early(offers, true, counts).await;
        assert_eq!(client.said.as_deref(), counts.then_some(&b"hello"[..]), "both ends agree");
        let read = read.as_deref().and_then(Early::parse).map(|early| early.hello);
        assert_eq!(read, client.said.as_deref());
        client.sender.try_send_control(vec![7; 3]).unwrap();
        assert_eq!(server.receiver.next().await.unwrap(), Inbound::Control(vec![7; 3]));
    }
}

#[tokio::test]
async fn a_token_that_does_not_come_holds_nobody_up() {
    for asked in [Some("127.0.0.1".parse().unwrap()), None] {
        let offers = watch::Sender::<Offers>::default();
        offers.send_modify(|it| it.expect(asked));
        let (client, _server, read) = early(offers, false, false).await;
        assert_eq!((client.said, read), (None, None));
    }
}

#[tokio::test]
async fn a_web_server_is_not_ours_and_says_so() {
    let error = connect_to(|mut stream| async move {
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
    })
    .await;
    assert!(
        matches!(&error, ConnectError::NotOurProtocol { found, .. } if found.contains("404")),
        "{error}"
    );
}

#[tokio::test]
async fn another_protocol_is_not_ours() {
    let error = connect_to(|mut stream| async move {
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await;
    })
    .await;
    assert!(matches!(error, ConnectError::NotOurProtocol { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_hangs_up_is_told_from_a_silent_one() {
    let error = connect_to(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
    })
    .await;
    assert!(matches!(error, ConnectError::Closed { .. }), "{error}");
}

#[tokio::test]
async fn a_silent_server_is_given_up_after_five_seconds() {
    let error = connect_to(|stream| async move {
        let _held_open = stream;
        std::future::pending::<()>().await;
    })
    .await;
    assert!(matches!(error, ConnectError::TimedOut { .. }), "{error}");
}

#[tokio::test]
async fn a_closed_port_is_unreachable() {
    let (listener, addr) = listener().await;
    drop(listener);
    let error = connect(&addr, &[server_key().public()], &machine_key()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn a_browser_sees_a_short_text_and_no_name() {
    let (listener, addr) = listener().await;
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        accept(stream, &server_key()).await
    };
    let browse = async {
        let mut stream = TcpStream::connect(addr.literal().unwrap()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).await.unwrap();
        page
    };
    let (server, page) = tokio::join!(serve, browse);
    assert!(matches!(server, Err(UpgradeError::NotOurs)));
    assert!(page.starts_with("HTTP/1.1 404") && page.len() < 200, "{page}");
    assert!(!page.to_lowercase().contains("overlay"), "{page}");
}

#[tokio::test]
async fn garbage_and_endless_headers_end_the_connection() {
    for bytes in [vec![0xff; 64], [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 20_000]].concat()]
    {
        let (listener, addr) = listener().await;
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            accept(stream, &server_key()).await
        };
        let send = async {
            let mut stream = TcpStream::connect(addr.literal().unwrap()).await.unwrap();
            let _ = stream.write_all(&bytes).await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let (server, ()) = tokio::join!(serve, send);
        assert!(matches!(server, Err(UpgradeError::Http(_))));
    }
}
