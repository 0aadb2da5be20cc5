//! Scratch sockets: each asks one question of the server's reflector and is closed. What a NAT
//! gives a socket that it has never seen shows which ports it gives next.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// The question is asked this often, in case it is lost.
const ATTEMPTS: usize = 2;
/// An answer is waited for this long after each.
const PATIENCE: Duration = Duration::from_millis(200);
/// Longer than any answer.
const BUFFER_BYTES: usize = 128;

/// An answer, and where it came from.
pub(super) type ScratchAnswer = (SocketAddr, Vec<u8>);

/// Asks in the background; the answer, if one comes, goes to `answers`.
pub(super) fn ask(remote: SocketAddr, question: Vec<u8>, answers: mpsc::Sender<ScratchAnswer>) {
    tokio::spawn(async move {
        if let Some(answer) = exchange(remote, &question).await {
            // Nobody waits any more: the daemon ends.
            let _ = answers.send(answer).await;
        }
    });
}

async fn exchange(remote: SocketAddr, question: &[u8]) -> Option<ScratchAnswer> {
    let any: SocketAddr = if remote.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any).await.ok()?;
    let mut buffer = [0; BUFFER_BYTES];
    for _ in 0..ATTEMPTS {
        socket.send_to(question, remote).await.ok()?;
        if let Ok(Ok((len, from))) = timeout(PATIENCE, socket.recv_from(&mut buffer)).await
            // A question may ask for the answer from another port.
            && from.ip() == remote.ip()
        {
            return Some((from, buffer.get(..len)?.to_vec()));
        }
    }
    None
}
