//! The path MTU to a reflector: padded questions that may not be cut on the way. Each is answered
//! in fifty bytes, so nothing can be amplified, and only those that arrive are.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::io::udp::forbid_fragments;
use crate::types::TxId;
use crate::wire::relay::{CONTROL_LEN, Control};

/// Sizes of IP packets that are tried: the IPv6 minimum, tunnels of all sorts, PPPoE, Ethernet,
/// jumbo frames.
const SIZES: [u16; 12] = [1280, 1300, 1340, 1380, 1400, 1420, 1440, 1460, 1480, 1492, 1500, 9000];
/// Each size is tried so often, in case a datagram is lost,
const ATTEMPTS: usize = 2;
/// and answers are waited for so long each time.
const PATIENCE: Duration = Duration::from_millis(400);
/// Header of UDP.
const UDP_LEN: u16 = 8;

/// The largest of some usual sizes of IP packets that arrives; none when none does, or when the
/// server is older than these questions.
pub(super) async fn measure(server: SocketAddr) -> Option<u16> {
    let (any, ip_len): (SocketAddr, u16) = if server.is_ipv4() {
        ((Ipv4Addr::UNSPECIFIED, 0).into(), 20)
    } else {
        ((Ipv6Addr::UNSPECIFIED, 0).into(), 40)
    };
    let socket = UdpSocket::bind(any).await.ok()?;
    forbid_fragments(&socket, server.is_ipv6()).ok()?;
    let questions: Vec<(TxId, u16)> =
        SIZES.iter().map(|size| (TxId(rand::random()), *size)).collect();
    let mut largest = None;
    for _ in 0..ATTEMPTS {
        for (tx, size) in questions.iter().filter(|(_, size)| Some(*size) > largest) {
            let mut question =
                Control::Reflect { tx: *tx, from_other_port: false }.encode(None).to_vec();
            question.resize(usize::from(size - ip_len - UDP_LEN), 0);
            // A size that our own link does not take is an answer too.
            let _ = socket.send_to(&question, server).await;
        }
        // The wait ends when the largest one that can have been sent is answered.
        let _ = timeout(PATIENCE, collect(&socket, &questions, &mut largest)).await;
    }
    largest
}

async fn collect(socket: &UdpSocket, questions: &[(TxId, u16)], largest: &mut Option<u16>) {
    let mut buffer = [0; CONTROL_LEN + 1];
    while *largest != SIZES.last().copied() {
        let Ok((len, _)) = socket.recv_from(&mut buffer).await else { return };
        if let Some(Ok(Control::Reflected { tx, .. })) = buffer.get(..len).map(Control::parse)
            && let Some((_, size)) = questions.iter().find(|(asked, _)| *asked == tx)
        {
            *largest = (*largest).max(Some(*size));
        }
    }
}
